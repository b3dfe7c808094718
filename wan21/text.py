"""Words for Wan: prompts to embeddings, by the encoder of UMT5-XXL, and embeddings on disk.

The network of model.py does not see words: a prompt reaches it as `l d`, a vector per token. The encoder that makes
them takes 11 GB in bf16, which is why prompts are encoded once, to a file (tools/encode_prompts.py). It is read from
whatever was downloaded (pip install -r requirements-wan.txt):

    Wan2.1-T2V-1.3B/            models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl/tokenizer.json
    Wan2.1-T2V-1.3B-Diffusers/  text_encoder/, tokenizer/tokenizer.json

Where we differ from the official code, and why
  - Prompts are padded to the longest of their batch, not to 512 tokens: padding is masked, so the result is the same.
  - tokenizer.json is read by the tokenizers library itself. The T5Tokenizer class of transformers 5 rebuilds the
    tokenizer for T5, whose unknown token is number 2; that of UMT5 is number 3.
"""

import html
import zlib
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from wan21.errors import optional_packages, reading
from wan21.weights import load_into, pretrained, read_pt
from worlds import latent_folder

TEXT_LEN = 512  # the largest number of tokens (wan/configs/shared_config.py of Wan2.1)
# sample_neg_prompt of wan/configs/shared_config.py, to the letter: what guidance leads away from
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，"
    "倒着走")


def clean_prompt(text: str) -> str:
    """Repair broken Unicode, resolve HTML entities, one space between words (wan/modules/tokenizers.py of Wan2.1)."""
    with optional_packages():
        import ftfy
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


class TextEncoder:
    """UMT5's encoder and its tokenizer, made by load_text_encoder. Its memory is free once it is dropped."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> list[Tensor]:
        """Embeddings of prompts: a list of `l d` on the encoder's device and in its dtype, l <= 512 tokens, the end
        token included, padding not."""
        tokens = self.tokenizer.encode_batch([clean_prompt(prompt) for prompt in prompts])
        ids = torch.tensor([t.ids for t in tokens], device=self.model.device)
        mask = torch.tensor([t.attention_mask for t in tokens], device=self.model.device)
        embeds = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return [x[:n].clone() for x, n in zip(embeds, mask.sum(1).tolist())]  # a view would keep the whole batch


def pad_text(texts: list[Tensor], length: int = TEXT_LEN) -> Tensor:
    """Zero-pad embeddings `l d` to `b length d`, as the network wants them."""
    assert max(len(text) for text in texts) <= length, [text.shape for text in texts]
    return torch.stack([torch.nn.functional.pad(text, (0, 0, 0, length - len(text))) for text in texts])


def load_text_encoder(folder: Path, device="cpu", dtype=torch.bfloat16) -> TextEncoder:
    """UMT5's encoder from a downloaded folder. The official file is memory-mapped: on a CPU in bf16 it is never copied.
    ValueError if the folder has no text encoder or no tokenizer, or if a file is damaged or does not fit."""
    with optional_packages():
        from tokenizers import Tokenizer
        from transformers import UMT5EncoderModel
    folder = Path(folder)
    official = folder / "models_t5_umt5-xxl-enc-bf16.pth"
    if official.is_file():
        weights, tokens = official, folder / "google" / "umt5-xxl"
    elif (folder / "text_encoder").is_dir():
        weights, tokens = folder / "text_encoder", folder / "tokenizer"
    else:
        raise ValueError(f"got no text encoder in {folder}, expected {official.name} or text_encoder/: change --wan")
    with reading(tokens / "tokenizer.json", "UMT5's tokenizer: change --wan", Exception):  # nothing more specific
        tokenizer = Tokenizer.from_file(str(tokens / "tokenizer.json"))
    tokenizer.enable_truncation(TEXT_LEN)
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>")
    if weights == official:
        model = official_umt5(official, dtype)
    else:
        model = pretrained(UMT5EncoderModel, weights, tied=["encoder.embed_tokens.weight"], dtype=dtype)
    # some versions of transformers leave the encoder's own table of words at zero where the config says untied
    model.encoder.embed_tokens.weight = model.shared.weight
    return TextEncoder(model.to(device).eval().requires_grad_(False), tokenizer)


# names within a block: official (wan/modules/t5.py of Wan2.1) -> transformers' UMT5EncoderModel
UMT5_NAMES = {
    **{f"attn.{x}": f"layer.0.SelfAttention.{x}" for x in "qkvo"},
    **{f"ffn.{a}": f"layer.1.DenseReluDense.{b}" for a, b in (("gate.0", "wi_0"), ("fc1", "wi_1"), ("fc2", "wo"))},
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm1": "layer.0.layer_norm", "norm2": "layer.1.layer_norm"}


def official_umt5(path: Path, dtype):
    """transformers' UMT5EncoderModel with the weights of the official .pth; all sizes are read off their shapes."""
    from transformers import UMT5Config, UMT5EncoderModel

    official, weights = read_pt(path), {}
    with reading(path, "the names of wan/modules/t5.py: change --wan", KeyError, IndexError, AttributeError):
        for name, w in official.items():
            block = name.removesuffix(".weight").split(".", 2)
            new = ({"token_embedding": "shared", "norm": "encoder.final_layer_norm"}[block[0]] if len(block) == 1
                   else f"encoder.block.{block[1]}.{UMT5_NAMES[block[2]]}")
            weights[f"{new}.weight"] = w.to(dtype)
        weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
        vocabulary, d = official["token_embedding.weight"].shape
        buckets, heads = official["blocks.0.pos_embedding.embedding.weight"].shape
        config = UMT5Config(
            vocab_size=vocabulary, d_model=d, d_ff=len(official["blocks.0.ffn.fc1.weight"]), num_heads=heads,
            d_kv=len(official["blocks.0.attn.q.weight"]) // heads,
            num_layers=sum(name.endswith("attn.q.weight") for name in official),
            relative_attention_num_buckets=buckets, relative_attention_max_distance=128, layer_norm_epsilon=1e-6,
            feed_forward_proj="gated-gelu", use_cache=False)
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    return load_into(model, weights, path)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line. ValueError if it cannot be read or holds none."""
    with reading(path, "a text file in UTF-8, one prompt a line: change --prompts", OSError, UnicodeDecodeError):
        if not Path(path).is_file():  # nor a pipe, which would be waited for
            raise OSError("it is no file")
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    if not any(lines):
        raise ValueError(f"got no prompt in {path}, expected one a line: change --prompts")
    return [line for line in lines if line]


def encode_prompts(prompts: Path, out: Path, folder: Path, device="cpu", batch: int = 8,
                   negative: str = NEGATIVE_PROMPT) -> int:
    """Encode a text file of prompts, one a line, to a prompts-only shard of latent_folder.LatentFolder, in bf16.

    out: a new `.safetensors` file. null.safetensors, the embedding of `negative`, and empty.safetensors, that of the
    empty prompt, are written beside it unless they exist. batch: prompts at a time. All embeddings are held in memory
    (8 kB a token), and in a folder OUT-*.parts, from which the same command continues after a stop. Returns how many
    there are. ValueError if there is no prompt, or if `out` exists or has another ending."""
    out = Path(out)
    others = {out.with_name("null.safetensors"): negative, out.with_name("empty.safetensors"): ""}
    if out.suffix != ".safetensors" or out in others or out.exists():
        raise ValueError(f"got the output {out}, expected a new file whose name ends in .safetensors, other than "
                         f"{' and '.join(path.name for path in others)}")
    lines = read_prompts(prompts)
    encoder = load_text_encoder(folder, device)
    for path, prompt in others.items():
        if not path.exists():
            latent_folder.write_null(path, encoder.encode([prompt])[0].bfloat16())
    of_this_encoder = f"{zlib.crc32(str(Path(folder).resolve()).encode()):08x}"
    parts, samples = out.with_name(f"{out.stem}-{of_this_encoder}.parts"), []
    files = {start: parts / f"{start:08d}.safetensors" for start in range(0, len(lines), batch)}
    for start, file in tqdm(files.items(), desc="prompts", unit="batch"):
        some = lines[start:start + batch]
        held = latent_folder.read_shard(file) if file.exists() else []
        if [sample["caption"] for sample in held] != some:
            held = [{"text": text.bfloat16().cpu(), "caption": line} for text, line in zip(encoder.encode(some), some)]
            latent_folder.write_shard(file, held)
        samples += [sample | {"text": sample["text"].bfloat16()} for sample in held]
    latent_folder.write_shard(out, samples)
    for file in files.values():
        file.unlink(missing_ok=True)
    with suppress(OSError):  # if somebody has put another file there
        parts.rmdir()
    return len(lines)


def read_prompt_embeds(path: Path) -> tuple[list[str], list[Tensor]]:
    """Captions and embeddings, float32 `l d`, of a file that encode_prompts wrote. ValueError if it is another, or
    damaged."""
    with reading(path, "a file of tools.encode_prompts: change --prompt-embeds", ValueError, KeyError):
        samples = latent_folder.read_shard(path)
        return [sample["caption"] for sample in samples], [sample["text"] for sample in samples]


def read_embeddings(path: Path, prompts: list[str]) -> dict[str, Tensor]:
    """The embeddings of these prompts in a file of encode_prompts; spaces and line breaks do not matter. ValueError if
    one is missing."""
    def one_line(text: str) -> str:  # a prompt as it stands in such a file
        return " ".join(text.split())

    captions, texts = read_prompt_embeds(path)
    found = dict(zip(map(one_line, captions), texts))
    if missed := [prompt for prompt in prompts if one_line(prompt) not in found]:
        raise ValueError(f"got no embedding of {len(missed)} prompts, {missed[0]!r} for one, expected all in {path}: "
                         "change --prompt-embeds")
    return {prompt: found[one_line(prompt)] for prompt in prompts}


def read_null(path: Path, name: str = "null.safetensors") -> Tensor:
    """The embedding, float32 `l d`, in a file beside a file of prompts. name: null.safetensors, the negative prompt's,
    or empty.safetensors, the empty one's."""
    return latent_folder.read_text(Path(path).with_name(name), "an embedding beside the prompts: write it with "
                                   "tools.encode_prompts, or change --prompt-embeds")
