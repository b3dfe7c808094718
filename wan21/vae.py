"""Pixels for Wan: videos to latents and latents to videos, by Wan 2.1's causal VAE.

1 + 4 k frames of H x W RGB pixels are 1 + k latent frames of 16 x H/8 x W/8 numbers. The VAE is diffusers'
AutoencoderKLWan, with the weights of Wan2.1-T2V-1.3B (Wan2.1_VAE.pth) or Wan2.1-T2V-1.3B-Diffusers (vae/):

    vae = load_vae("Wan2.1-T2V-1.3B", "cuda", torch.bfloat16)      # pip install -r requirements-wan.txt
    latents = encode(vae, frames)
    decoder = StreamDecoder(vae)
    for chunk in chunks: show(decoder.decode(chunk))

Where we differ from the official code: latents are scaled in float32, whatever the VAE's dtype.
"""

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from wan21.errors import optional_packages, reading
from wan21.families import FAMILIES, Family
from wan21.weights import load_into, pretrained, read_pt

WAN21 = FAMILIES["wan2.1"]


def load_vae(folder: Path, device="cpu", dtype=torch.float32, family: Family = WAN21):
    """A family's VAE, diffusers' AutoencoderKLWan, from an official folder or one of diffusers. ValueError if it has
    none, if a file is damaged or does not fit, or if this is a VAE that we cannot run."""
    family.check_vae()
    with optional_packages():
        from diffusers import AutoencoderKLWan
        from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
    path, theirs = Path(folder) / family.vae_file, Path(folder) / "vae"
    if path.is_file():
        official = read_pt(path)
        with reading(path, "the names of wan/modules/vae.py: change --wan", KeyError, TypeError, IndexError):
            config = {"base_dim": len(official["encoder.conv1.weight"]), "z_dim": len(official["conv2.weight"]),
                      "decoder_base_dim": len(official["decoder.head.0.gamma"])}
        with torch.device("meta"):
            vae = AutoencoderKLWan(**config)
        load_into(vae, {name: w.to(dtype) for name, w in convert_wan_vae_to_diffusers(official).items()}, path)
    elif theirs.is_dir():
        vae = pretrained(AutoencoderKLWan, theirs, torch_dtype=dtype)
    else:
        raise ValueError(f"got no VAE in {folder}, expected {family.vae_file} or vae/ there: change --wan")
    if vae.config.z_dim != family.vae_channels:  # Wan 2.2's has 48, other means and other patches
        raise ValueError(f"got a VAE of {vae.config.z_dim} latent channels in {folder}, expected Wan 2.1's "
                         f"{family.vae_channels}: change --wan")
    return vae.to(device).eval().requires_grad_(False)


def mean_std(vae) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the raw latents, float32 `c 1 1 1`, by which the network's are normalised."""
    return tuple(torch.tensor(x, device=vae.device).view(-1, 1, 1, 1)
                 for x in (vae.config.latents_mean, vae.config.latents_std))


@torch.no_grad()
def encode(vae, frames: Tensor, family: Family = WAN21) -> Tensor:
    """Video to the network's latents: (mode - mean) / std, float32 `b f' c h/8 w/8` with f = 1 + 4 (f' - 1).

    frames: bytes `b f h w 3`; h and w are multiples of 16, the VAE's 8 times the network's patch of 2."""
    assert frames.dtype == torch.uint8 and frames.shape[1] % family.frames_per_latent == 1, frames.shape
    x = rearrange(frames.to(vae.device).float() / 127.5 - 1, "b f h w c -> b c f h w")
    mode = vae.encode(x.to(vae.dtype)).latent_dist.mode()
    mean, std = mean_std(vae)
    return rearrange((mode.float() - mean) / std, "b c f h w -> b f c h w")


class StreamDecoder:
    """Latents to video, chunk after chunk: decode(chunk) gives what decoding the whole clip gives, bit by bit (unless
    h w is below a dozen: PyTorch then chooses another kernel for one frame).

    Wan's decoder looks back two frames at each of its convolutions. What they have seen is held here, not in the VAE,
    so many streams can share one VAE; its size is constant. The first latent frame of a stream gives 1 frame, each
    other one gives 4. All chunks of a stream have the same b, h and w. The VAE's tiling is not used."""

    def __init__(self, vae):
        convolution = type(vae.post_quant_conv)
        self.vae, self.started = vae, False
        self.cache = [None] * sum(isinstance(m, convolution) for m in vae.decoder.modules())

    def decode(self, x0: Tensor) -> Tensor:
        """The next chunk x0 `b n c h w` of normalised latents -> bytes `b f 8h 8w 3`."""
        return to_bytes(self.decode_float(x0))

    @torch.no_grad()
    def decode_float(self, x0: Tensor) -> Tensor:
        """The same as float32 in [-1, 1]."""
        mean, std = mean_std(self.vae)
        z = rearrange(x0.to(self.vae.device).float(), "b n c h w -> b c n h w") * std + mean
        frames = []
        for frame in z.to(self.vae.dtype).split(1, dim=2):  # one by one, or the bits would depend on the chunks
            frames.append(self.vae.decoder(self.vae.post_quant_conv(frame), feat_cache=self.cache, feat_idx=[0],
                                           first_chunk=not self.started).float().clamp(-1, 1))
            self.started = True
        return rearrange(torch.cat(frames, dim=2), "b c f h w -> b f h w c")


def to_bytes(x: Tensor) -> Tensor:
    """[-1, 1] to bytes 0 ... 255, rounded."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def preview(x0: Tensor, family: Family = WAN21, scale: int = 4) -> Tensor:
    """A first look without the VAE: normalised latents `b n c h w` -> bytes `b n h*scale w*scale 3`.

    A linear map of each latent to a colour, family.rgb, enlarged; one image per latent frame."""
    factors, bias = (torch.tensor(x, device=x0.device) for x in (family.rgb, family.rgb_bias))
    rgb = rearrange(x0.float(), "b n c h w -> b n h w c") @ factors + bias
    return to_bytes(rgb).repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
