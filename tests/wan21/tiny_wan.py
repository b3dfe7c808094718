"""Wan 2.1 in small: a text encoder, a tokenizer, a VAE and weights, all random, in the very files of the release."""

import json
import re

import torch

WIDTH, HEADS, LAYERS = 16, 3, 2  # of the text encoder
WORDS = "a red green ball bar cat dog runs jumps over the moon , . fox through snow".split()
UMT5 = {  # transformers' names -> those of wan/modules/t5.py; our own list: encoders.py has the opposite direction
    "shared.weight": "token_embedding.weight", "encoder.final_layer_norm.weight": "norm.weight",
    "layer.0.layer_norm": "norm1", "layer.1.layer_norm": "norm2", "layer.0.SelfAttention.": "attn.",
    "attn.relative_attention_bias": "pos_embedding.embedding", "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1", "layer.1.DenseReluDense.wo": "ffn.fc2", "encoder.block.": "blocks.",
}


def write_tokenizer(folder):
    """UMT5's layout in small: <pad> 0, </s> 1, <s> 2, <unk> 3, then pieces; and a config that misleads T5Tokenizer."""
    import tokenizers
    special = ["<pad>", "</s>", "<s>", "<unk>"]
    pieces = [(s, 0.0) for s in special] + [(f"▁{word}", -2.0) for word in WORDS] + [("▁", -4.0), ("画面", -4.0)]
    t = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=3))
    t.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    t.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    t.add_special_tokens(special)
    folder.mkdir(parents=True, exist_ok=True)
    t.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))


def umt5():
    """A random UMT5 of transformers, and its weights by Wan's names."""
    import transformers
    torch.manual_seed(0)
    # d_kv * heads is not d_model, as the names could not tell
    config = transformers.UMT5Config(vocab_size=32, d_model=WIDTH, d_kv=4, d_ff=24, num_layers=LAYERS, num_heads=HEADS)
    model, official = transformers.UMT5EncoderModel(config).eval(), {}
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    for name, w in model.state_dict().items():
        if name != "encoder.embed_tokens.weight":
            for theirs, wans in UMT5.items():
                name = name.replace(theirs, wans)
            official[name] = w
    return model, official


def write_text_encoder(folder):
    """As Wan2.1-T2V-1.3B has it. Returns the weights by Wan's names."""
    folder.mkdir(parents=True, exist_ok=True)
    official = umt5()[1]
    torch.save(official, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    write_tokenizer(folder / "google" / "umt5-xxl")
    return official


def vae_names(weights):
    """diffusers' names -> those of wan/modules/vae.py, by our own rules."""
    inside = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6",
              "conv_shortcut": "shortcut"}  # of a residual block
    rules = [
        (r"(resnets|down_blocks)\.(\d+)\.(norm1|conv1|norm2|conv2|conv_shortcut)\b",
         lambda m: f"{m[1]}.{m[2]}.{inside[m[3]]}"),
        # up: three residual blocks and one resampling a level, in one flat list
        (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}"),
        (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"middle.{2 * int(m[1])}"), (r"mid_block\.attentions\.0", "middle.1"),
        ("down_blocks", "downsamples"), ("conv_in", "conv1"), ("norm_out", "head.0"), ("conv_out", "head.2"),
        ("^quant_conv", "conv1"), ("^post_quant_conv", "conv2"),
    ]
    out = {}
    for name, w in weights.items():
        for ours, theirs in rules:
            name = re.sub(ours, theirs, name)
        out[name] = w
    return out


def random_vae():
    """Diffusers' AutoencoderKLWan, small and random, such that the picture fills [-1, 1] and no part is silent."""
    import diffusers
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=4, decoder_base_dim=8).eval().requires_grad_(False)
    for name, p in vae.named_parameters():
        torch.nn.init.normal_(p, mean=float(name.endswith("gamma")), std=0.3 if p.ndim < 3 else 0.15)
    return vae


def write_vae(folder):
    """As Wan2.1-T2V-1.3B has it. Returns diffusers' model."""
    folder.mkdir(parents=True, exist_ok=True)
    vae = random_vae()
    torch.save(vae_names(vae.state_dict()), folder / "Wan2.1_VAE.pth")
    return vae
