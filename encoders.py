"""Text and pixels of Wan 2.1: prompts to embeddings, videos to latents, latents to moving pictures.

The network of model.py sees neither words nor pixels. Words become vectors by the encoder of UMT5-XXL (11 GB in bf16,
which is why they are encoded once, to a file), pixels become latents by Wan's causal VAE: 1 + 4 k frames of H x W RGB
pixels are 1 + k frames of 16 x H/8 x W/8 numbers. Both are read from whatever was downloaded:

    Wan2.1-T2V-1.3B/            models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl/tokenizer.json, Wan2.1_VAE.pth
    Wan2.1-T2V-1.3B-Diffusers/  text_encoder/, tokenizer/tokenizer.json, vae/
    any/                        one Hugging Face UMT5 model with its tokenizer.json, or one AutoencoderKLWan

    pip install -r requirements-wan.txt
    python wan21.py encode-prompts prompts.txt prompts/0000.safetensors --wan Wan2.1-T2V-1.3B --device cpu --batch 8

The folder `prompts` is then a prompts-only data.LatentFolder for train.py, and its file what sample.py takes, so that
neither needs the text encoder in memory.

Where we differ from the official code, and why
  - Prompts are padded to the longest of their batch, not to 512 tokens: padding is masked, so the result is the same.
  - tokenizer.json is read by the tokenizers library itself. The T5Tokenizer class of transformers 5 rebuilds the
    tokenizer for T5, whose unknown token is number 2; that of UMT5 is number 3.
  - Latents are scaled in float32, whatever the VAE's dtype.
"""

import html
import inspect
import json
import pickle
import zlib
from contextlib import suppress
from pathlib import Path

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

import data
from files import check_finite

TEXT_LEN = 512  # tokens at most (wan/configs/shared_config.py of Wan2.1)

# sample_neg_prompt of wan/configs/shared_config.py, to the letter: what guidance pushes away from
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，"
    "倒着走")


def missing(package, error) -> ValueError:
    return ValueError(f"got no usable package {package} ({error}), expected it installed: "
                      "pip install -r requirements-wan.txt")


def read_pth(path: Path) -> dict[str, Tensor]:
    """The tensors of an official .pth file, memory-mapped. ValueError, with the path, if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as e:
        raise ValueError(f"got a damaged or truncated file {path} ({e}), expected the official weights: download it "
                         "again, or change --wan") from e


def is_model(folder: Path, key: str, value: str) -> bool:
    """Whether the config.json of a folder has this entry: the official folder has one too, of the diffusion network."""
    try:
        return json.loads((folder / "config.json").read_text())[key] == value
    except (OSError, KeyError, ValueError, TypeError, RecursionError):
        return False


def fill(model, weights: dict[str, Tensor], path):
    """Give a model built on the meta device its weights, without a copy. ValueError, with the path, if they differ."""
    try:
        check_finite(weights, path)
        model.load_state_dict(weights, assign=True)
    except RuntimeError as e:
        why = " ".join(str(e).split())[:400]  # may name every tensor
        raise ValueError(f"got weights in {path} that do not fit ({why}), expected those of Wan 2.1: change "
                         "--wan") from e
    return model


def pretrained(kind, path: Path, tied=(), **options):
    """kind.from_pretrained(path). ValueError, with the path, if it is unreadable or if a weight is missing: it would be
    random. tied: names that may be missing."""
    try:
        model, info = kind.from_pretrained(path, local_files_only=True, output_loading_info=True, **options)
    except (OSError, RuntimeError, ValueError, SafetensorError) as e:
        raise ValueError(f"got an unreadable model in {path} ({e}), expected one of class {kind.__name__}: download it "
                         "again, or change --wan") from e
    lost = sorted(set(info["missing_keys"]) - set(tied))
    if lost:
        raise ValueError(f"got no {', '.join(lost[:3])} in {path}, expected all weights of {kind.__name__}: download "
                         "it again, or change --wan")
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Text: UMT5

def clean_prompt(text: str) -> str:
    """Mend broken Unicode, resolve HTML entities, one space between words (wan/modules/tokenizers.py of Wan2.1)."""
    try:
        import ftfy
    except ImportError as e:
        raise missing("ftfy", e) from e
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


class TextEncoder:
    """UMT5's encoder and its tokenizer; load_text_encoder makes one. Its memory is free once it is dropped."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> list[Tensor]:
        """Embeddings of prompts: a list of `l d` on the encoder's device and in its dtype, l <= 512 tokens, the end
        token included, padding not. ValueError if the tokenizer knows no word of a prompt."""
        tokens = self.tokenizer.encode_batch([clean_prompt(prompt) for prompt in prompts])
        end, *unknown = (self.tokenizer.token_to_id(token) for token in ("</s>", "<unk>", "▁"))
        for prompt, t in zip(prompts, tokens):
            *words, last = t.ids[:sum(t.attention_mask)]
            if last != end or (words and set(words) <= set(unknown)):
                raise ValueError(f"got the tokens {t.ids[:8]} for the prompt {prompt!r}, expected known words and a "
                                 f"final {end} (</s>): is this UMT5's tokenizer.json? Change --wan")
        ids, mask = (torch.tensor(x, device=self.model.device) for x in ([t.ids for t in tokens],
                                                                         [t.attention_mask for t in tokens]))
        if int(ids.max()) >= self.model.shared.num_embeddings:
            raise ValueError(f"got a tokenizer of more words than the {self.model.shared.num_embeddings} of the text "
                             "encoder, expected UMT5's tokenizer.json: change --wan")
        embeds = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return [x[:n].clone() for x, n in zip(embeds, mask.sum(1).tolist())]  # a view would keep the whole batch


def pad_text(texts: list[Tensor], length: int = TEXT_LEN) -> Tensor:
    """Zero-pad embeddings `l d` to `b length d`, as the network wants them. ValueError if one is longer."""
    longest = max(len(text) for text in texts)
    if longest > length:
        raise ValueError(f"got a text of {longest} tokens, expected at most {length}: change --size or shorten the "
                         "prompt")
    return torch.stack([torch.nn.functional.pad(text, (0, 0, 0, length - len(text))) for text in texts])


def load_text_encoder(folder: Path, device="cpu", dtype=torch.bfloat16) -> TextEncoder:
    """UMT5's encoder from a downloaded folder, one of the three kinds of this file's docstring.

    The official file is memory-mapped: on a CPU in bf16 it is never copied. ValueError if the folder has no text
    encoder or no tokenizer, or if a file is damaged or does not fit.
    """
    try:
        from tokenizers import Tokenizer
        from transformers import UMT5EncoderModel
    except ImportError as e:
        raise missing("transformers", e) from e
    folder = Path(folder)
    official = folder / "models_t5_umt5-xxl-enc-bf16.pth"
    if official.is_file():
        weights, tokens = official, folder / "google" / "umt5-xxl"
    elif is_model(folder / "text_encoder", "model_type", "umt5"):
        weights, tokens = folder / "text_encoder", folder / "tokenizer"
    elif is_model(folder, "model_type", "umt5"):
        weights, tokens = folder, folder
    else:
        raise ValueError(f"got no text encoder in {folder}, expected {official.name}, text_encoder/config.json or the "
                         "config.json of a UMT5 model: change --wan")
    tokens = tokens / "tokenizer.json"
    try:  # before the weights, which take longer
        tokenizer = Tokenizer.from_file(str(tokens))
    except Exception as e:  # that library raises nothing more special
        raise ValueError(f"got no readable {tokens} ({e}), expected UMT5's tokenizer: download it, or change "
                         "--wan") from e
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
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def official_umt5(path: Path, dtype):
    """transformers' UMT5EncoderModel with the weights of the official .pth; all sizes are read off their shapes."""
    from transformers import UMT5Config, UMT5EncoderModel

    official, weights = read_pth(path), {}
    try:
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
    except (KeyError, IndexError, AttributeError) as e:
        raise ValueError(f"got {path} with or without the tensor {e}, expected the names of wan/modules/t5.py: "
                         "change --wan") from e
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    return fill(model, weights, path)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts on disk

def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line. ValueError if it cannot be read or holds none."""
    try:
        if not Path(path).is_file():  # nor a pipe, which would be waited for
            raise OSError("it is no file")
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
        if any("\0" in line for line in lines):
            raise OSError("it holds bytes of 0: is it UTF-16?")
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"got no readable {path} ({e}), expected a UTF-8 text file, one prompt a line") from e
    if not any(lines):
        raise ValueError(f"got no prompt in {path}, expected one a line")
    return [line for line in lines if line]


def encode_prompts(prompts: Path, out: Path, folder: Path, device="cpu", batch: int = 8,
                   negative: str = NEGATIVE_PROMPT) -> int:
    """Encode a text file of prompts, one a line, to a prompts-only shard of data.LatentFolder, in bf16.

    out: a new `.safetensors` file. Beside it go null.safetensors, the embedding of `negative`, and empty.safetensors,
    that of the empty prompt, unless they are there. folder: see load_text_encoder. batch: prompts at a time. Returns
    how many were written. All embeddings are held in memory until then (8 kB a token): give a few thousand a file.
    They are on disk as they come, in a folder OUT-*.parts, from which the same command goes on after a stop.
    ValueError if there is no prompt, `out` exists or has another ending.
    """
    out = Path(out)
    others = {out.with_name("null.safetensors"): negative, out.with_name("empty.safetensors"): ""}
    if out.suffix != ".safetensors" or out in others:
        raise ValueError(f"got the output {out}, expected a name that ends in .safetensors, other than "
                         f"{' and '.join(path.name for path in others)}")
    if out.exists():
        raise ValueError(f"got {out}, which is there already, expected a new file: change its name, or move it away")
    if batch < 1:
        raise ValueError(f"got a batch of {batch} prompts, expected 1 or more: change --batch")
    lines = read_prompts(prompts)
    encoder = load_text_encoder(folder, device)
    for path, prompt in others.items():
        if path.exists():
            read_null(path, path.name)
        else:
            data.write_null(path, encoder.encode([prompt])[0].bfloat16())
    of_this_encoder = f"{zlib.crc32(str(Path(folder).resolve()).encode()):08x}"
    parts, samples = out.with_name(f"{out.stem}-{of_this_encoder}.parts"), []
    for start in tqdm(range(0, len(lines), batch), desc="prompts", unit="batch"):
        some, part = lines[start:start + batch], parts / f"{start:08d}.safetensors"
        held = data.read_shard(part) if part.exists() else []
        if [sample["caption"] for sample in held] != some:
            held = [{"text": text.bfloat16().cpu(), "caption": line} for text, line in zip(encoder.encode(some), some)]
            data.write_shard(part, held)
        samples += [sample | {"text": sample["text"].bfloat16()} for sample in held]
    data.write_shard(out, samples)
    for start in range(0, len(lines), batch):
        (parts / f"{start:08d}.safetensors").unlink(missing_ok=True)
    with suppress(OSError):  # if somebody has put another file there
        parts.rmdir()
    return len(lines)


def read_prompt_embeds(path: Path) -> tuple[list[str], list[Tensor]]:
    """Captions and embeddings, float32 `l d`, of a file that encode_prompts wrote. ValueError if it is another, or
    damaged."""
    if not Path(path).is_file():
        raise ValueError(f"got no file {path}, expected one of wan21.py encode-prompts: change --prompt-embeds")
    try:
        samples = data.read_shard(path)
        return [sample["caption"] for sample in samples], [sample["text"] for sample in samples]
    except (ValueError, KeyError) as e:
        raise ValueError(f"{e}, such as wan21.py encode-prompts makes: change --prompt-embeds") from e


def read_null(path: Path, name: str = "null.safetensors") -> Tensor:
    """The embedding, float32 `l d`, in a file beside a file of prompts. name: null.safetensors, the negative prompt's,
    or empty.safetensors, the empty one's."""
    path = Path(path).with_name(name)
    try:
        with safe_open(path, "pt") as f:
            return data.finite(f.get_tensor("text"))
    except (SafetensorError, OSError) as e:
        raise ValueError(f"got no readable {path} ({e}), expected the negative prompt's embedding, for guidance, "
                         "beside the prompts: write it with wan21.py encode-prompts, or change --prompt-embeds") from e


# ---------------------------------------------------------------------------------------------------------------------
# Pixels: the VAE

def load_vae(folder: Path, device="cpu", dtype=torch.float32):
    """Wan 2.1's VAE, diffusers' AutoencoderKLWan, from one of the three kinds of folder of this file's docstring.

    ValueError if the folder has none, or if a file is damaged or does not fit.
    """
    try:
        from diffusers import AutoencoderKLWan
        from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
    except ImportError as e:
        raise missing("diffusers", e) from e
    folder = Path(folder)
    path = folder / "Wan2.1_VAE.pth"
    if path.is_file():
        official = read_pth(path)
        try:
            config = {"base_dim": len(official["encoder.conv1.weight"]), "z_dim": len(official["conv2.weight"]),
                      "decoder_base_dim": len(official["decoder.head.0.gamma"])}
        except (KeyError, TypeError, IndexError, AttributeError) as e:
            raise ValueError(f"got {path} without the tensor {e}, expected the names of wan/modules/vae.py: "
                             "change --wan") from e
        with torch.device("meta"):
            vae = AutoencoderKLWan(**config)
        fill(vae, {name: w.to(dtype) for name, w in convert_wan_vae_to_diffusers(official).items()}, path)
    else:
        path = folder / "vae" if is_model(folder / "vae", "_class_name", "AutoencoderKLWan") else folder
        if not is_model(path, "_class_name", "AutoencoderKLWan"):
            raise ValueError(f"got no VAE in {folder}, expected Wan2.1_VAE.pth, vae/config.json or the config.json of "
                             "an AutoencoderKLWan: change --wan")
        vae = pretrained(AutoencoderKLWan, path, torch_dtype=dtype)
    if vae.config.z_dim != 16:  # Wan 2.2's small model has 48, other means and other patches
        raise ValueError(f"got a VAE of {vae.config.z_dim} latent channels in {path}, expected Wan 2.1's 16: "
                         "change --wan")
    return vae.to(device).eval().requires_grad_(False)


def mean_std(vae) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the raw latents, float32 `c 1 1 1`, by which the network's are normalised."""
    return tuple(torch.tensor(x, device=vae.device).view(-1, 1, 1, 1)
                 for x in (vae.config.latents_mean, vae.config.latents_std))


@torch.no_grad()
def encode(vae, frames: Tensor) -> Tensor:
    """Video to the network's latents: (mode - mean) / std, float32 `b f' c h/8 w/8` with f = 1 + 4 (f' - 1).

    frames: `b f h w 3`, bytes, or floats in [-1, 1]; h and w are multiples of 16, the VAE's 8 times the network's
    patch of 2. ValueError for other shapes and ranges.
    """
    if frames.ndim != 5 or frames.shape[-1] != 3 or frames.shape[1] % 4 != 1 or any(s % 16 for s in frames.shape[2:4]):
        raise ValueError(f"got frames of shape {tuple(frames.shape)}, expected b f h w 3 with f = 4 k + 1 and h, w "
                         "multiples of 16: change --frames, --height or --width")
    if frames.dtype == torch.uint8:
        x = frames.to(vae.device).float() / 127.5 - 1
    elif frames.is_floating_point() and frames.abs().max() <= 1:
        x = frames.to(vae.device)
    else:
        raise ValueError(f"got frames of {frames.dtype} from {frames.min().item()} to {frames.max().item()}, expected "
                         "bytes, or floats in [-1, 1]")
    mode = vae.encode(rearrange(x, "b f h w c -> b c f h w").to(vae.dtype)).latent_dist.mode()
    mean, std = mean_std(vae)
    return rearrange((mode.float() - mean) / std, "b c f h w -> b f c h w")


class StreamDecoder:
    """Latents to video, chunk after chunk: decode(chunk) gives what decoding the whole clip gives, bit by bit.

    Wan's decoder looks back two frames at each of its convolutions. What they have seen is held here, not in the VAE,
    so many streams can share one VAE; it does not grow. The first latent frame of a stream makes 1 pixel frame, each
    other makes 4. All chunks of a stream have the same b, h and w. The VAE's tiling is not used. (Below a dozen latents
    a frame, float32 may differ from the whole clip in the last bit: PyTorch then picks another kernel for one frame.)
    """

    def __init__(self, vae):
        takes = inspect.signature(vae.decoder.forward).parameters
        if not {"feat_cache", "feat_idx", "first_chunk"} <= set(takes):
            from diffusers import __version__
            raise ValueError(f"got diffusers {__version__}, whose Wan decoder takes {list(takes)}, expected 0.35 to "
                             "0.42, with feat_cache, feat_idx and first_chunk: pip install -r requirements-wan.txt")
        convolution = type(vae.post_quant_conv)
        self.vae, self.shape = vae, None
        self.cache = [None] * sum(isinstance(m, convolution) for m in vae.decoder.modules())

    def decode(self, x0: Tensor) -> Tensor:
        """The next chunk x0 `b n c h w` of normalised latents -> bytes `b f 8h 8w 3`."""
        return to_bytes(self.decode_float(x0))

    @torch.no_grad()
    def decode_float(self, x0: Tensor) -> Tensor:
        """The same as float32 in [-1, 1]. ValueError for a chunk that does not fit the stream."""
        b, _, c, h, w = x0.shape
        if c != self.vae.config.z_dim or self.shape not in (None, (b, h, w)):
            raise ValueError(f"got a chunk of shape {tuple(x0.shape)}, expected b n {self.vae.config.z_dim} h w with "
                             f"b h w = {self.shape or 'any'}: a new stream needs a new StreamDecoder")
        mean, std = mean_std(self.vae)
        z = rearrange(x0.to(self.vae.device).float(), "b n c h w -> b c n h w") * std + mean
        frames = []
        for frame in z.to(self.vae.dtype).split(1, dim=2):  # one by one, or the bits would depend on the chunks
            frames.append(self.vae.decoder(self.vae.post_quant_conv(frame), feat_cache=self.cache, feat_idx=[0],
                                           first_chunk=self.shape is None).float().clamp(-1, 1))
            self.shape = b, h, w
        return rearrange(torch.cat(frames, dim=2), "b c f h w -> b f h w c")


def to_bytes(x: Tensor) -> Tensor:
    """[-1, 1] to bytes 0 ... 255, rounded."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# Wan21.latent_rgb_factors (R, G, B of each latent channel) and .latent_rgb_factors_bias of ComfyUI's
# comfy/latent_formats.py. Its sampler shows the x0 of the network's own space, before process_out: normalised latents.
LATENT_RGB = [
    [-0.1299, -0.1692, 0.2932], [0.0671, 0.0406, 0.0442], [0.3568, 0.2548, 0.1747], [0.0372, 0.2344, 0.1420],
    [0.0313, 0.0189, -0.0328], [0.0296, -0.0956, -0.0665], [-0.3477, -0.4059, -0.2925], [0.0166, 0.1902, 0.1975],
    [-0.0412, 0.0267, -0.1364], [-0.1293, 0.0740, 0.1636], [0.0680, 0.3019, 0.1128], [0.0032, 0.0581, 0.0639],
    [-0.1251, 0.0927, 0.1699], [0.0060, -0.0633, 0.0005], [0.3477, 0.2275, 0.2950], [0.1984, 0.0913, 0.1861],
]
LATENT_RGB_BIAS = [-0.1835, -0.0868, -0.3360]


def preview(x0: Tensor, scale: int = 4) -> Tensor:
    """A first look without the VAE: normalised latents `b n 16 h w` -> bytes `b n h*scale w*scale 3`.

    A linear map of each latent to a colour, enlarged; one picture per latent frame, which stands for 4 pixel frames.
    """
    if x0.ndim != 5 or x0.shape[2] != len(LATENT_RGB):
        raise ValueError(f"got latents of shape {tuple(x0.shape)}, expected b n {len(LATENT_RGB)} h w, Wan 2.1's")
    factors, bias = (torch.tensor(x, device=x0.device) for x in (LATENT_RGB, LATENT_RGB_BIAS))
    rgb = rearrange(x0.float(), "b n c h w -> b n h w c") @ factors + bias
    return to_bytes(rgb).repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
