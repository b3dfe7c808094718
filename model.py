"""The causal video diffusion transformer: Wan 2.1's network, made causal, with a key/value cache.

A clip of latents `b f c h w` is cut into patches (tokens). Every frame carries its own time t; every token attends to
tokens of the frames that its *layout* lets it see; text enters through cross-attention; out comes the velocity
v = dx_t/dt = eps - x_0 (`b f c h w`). One set of weights serves four layouts, and they are all there is to "causal":

    v = net(x, t, text)                        bidirectional: every frame sees every frame         (teacher, critic)
    v = net(x, t, text, chunk=n)               diffusion forcing: a chunk sees earlier chunks and itself
    v = net(x, t, text, chunk=n, clean=x0)     teacher forcing: a noisy chunk sees the earlier *clean* chunks and itself
    v = net(x, t, text, cache=cache)           rollout: the next chunk sees the past that the cache holds, and itself
    cache = net.new_cache(); net.append(cache, x0, text)    commit a finished chunk (at t = 0, without gradient)
    v = net(x, t, text, cache=cache, clean=x0)              both in one forward: commit x0, then predict the next chunk

Teacher forcing and rollout are the same computation: run chunk by chunk with its clean past in the cache, the
network returns what teacher forcing returns for all chunks at once (tests/equations/test_model.py proves it).

No mask is ever built. For chunk i, the clean and the noisy stream attend to the same clean past; they are stacked on
the batch axis and attention is called once per chunk on [past | own chunk], at exactly the needed cost on any device.

Parameter names and shapes are those of the official Wan 2.1 state dict: `load_state_dict(strict=True)` is the loader.

Glossary   b batch, f frames, c h w latent channels, height, width; n tokens; d model width; nh heads; dh head width.
           t is in [0, 1], 1 = noise; Wan's 1000 appears only inside the time embedding. x `b f c h w`; t `b f`, or a
           float for all frames; text `b l d`, or a flowmap.Condition.

Where we differ from the public causal code, and why
  - A forward only reads the cache, and what it reads carries no gradient: gradients stop at the chunk boundary. (In
    the public code later chunks send gradient into earlier ones through in-place cache writes.)
  - The cache holds keys *before* RoPE; positions are given when they are used. So a window can slide forever with
    absolute positions (as in training) or with positions counted inside the live window (`relative=True`).
  - Teacher forcing and diffusion forcing honour the window and the sink as the rollout does.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cameras
from flowmap import per_frame, twice, words_and_rows


def check_window(window, sink, chunk):
    if sink < 0:
        raise ValueError(f"got a sink of {sink} frames, expected 0 or more: change --sink")
    if window is not None and window < sink + chunk:
        raise ValueError(f"window {window} cannot hold a sink of {sink} and a chunk of {chunk} frames: "
                         f"give --window at least {sink + chunk}, or a smaller --sink or --chunk")


@dataclass(frozen=True)
class WanConfig:
    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    in_dim: int = 16  # latent channels
    patch_size: tuple = (1, 2, 2)  # frames, height, width
    freq_dim: int = 256  # width of the sinusoidal embedding of t
    text_dim: int = 4096
    text_len: int = 512
    row_dim: int = 0  # numbers that the network is told of each frame, besides the text and the camera
    camera: str = ""  # how attention sees cameras, one of cameras.KINDS; "": there are none
    predicts_x0: bool = False  # the head gives x_0, and v is (x_t - x_0) / max(t, T_MIN)
    eps: float = 1e-6
    window: int | None = None  # frames a frame may see, its own chunk included; None: all
    sink: int = 0  # of these, how many are the first frames of the clip
    family: str = "wan2.1"  # whose latents and text it is made for: a record of wan21/families.py

    def __post_init__(self):
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(f"dim {self.dim} must split into num_heads {self.num_heads} heads of even width")
        if self.patch_size[0] != 1:
            raise ValueError(f"patch_size {self.patch_size}: a patch spans one frame, so the first number must be 1")
        if self.camera not in ("", *cameras.KINDS):
            raise ValueError(f"got camera {self.camera!r}, expected one of {', '.join(cameras.KINDS)}, or none")
        if self.camera and (self.dim // self.num_heads) % 16:
            raise ValueError(f"dim {self.dim} must split into num_heads {self.num_heads} heads of a multiple of 16 "
                             "channels, for cameras")
        check_window(self.window, self.sink, chunk=1)

    @property
    def sees_cameras(self) -> bool:
        return self.camera not in ("", "unseen")

    @property
    def row_width(self) -> int:
        return self.row_dim + (cameras.ROW if self.camera else 0)  # numbers in a row of the condition


T_MIN = 0.05  # where a network predicts x_0, the smallest t that the difference to x_t is divided by
ROOM = WanConfig(dim=128, ffn_dim=512, num_heads=8, num_layers=4, in_dim=3, patch_size=(1, 16, 4), freq_dim=64,
                 text_dim=4, text_len=1, row_dim=5, camera="ray", predicts_x0=True, family="room")
SIZES = {
    # 4 tokens of 5 x 5 RGB pixels per 10 x 10 frame, prompts of two words: see worlds/toy.py
    "toy": WanConfig(dim=128, ffn_dim=512, num_heads=8, num_layers=4, in_dim=3, patch_size=(1, 5, 5), freq_dim=64,
                     text_dim=16, text_len=2, family="toy"),
    "toy_large": WanConfig(dim=192, ffn_dim=768, num_heads=8, num_layers=6, in_dim=3, patch_size=(1, 5, 5), freq_dim=64,
                           text_dim=16, text_len=2, family="toy"),  # a teacher for --teacher-size
    # 6 tokens of 16 x 4 RGB pixels (worlds/room.py). It predicts x_0: 128 channels cannot hold 192 values of noise
    "room": ROOM, **{f"room_{kind}": replace(ROOM, camera=kind) for kind in ("frame", "prope", "unseen")},
    "wan_tiny": WanConfig(dim=192, ffn_dim=768, num_heads=4, num_layers=4),  # Wan's latents and text, to try things out
    "wan1.3b": WanConfig(),
    "wan1.3b_camera": WanConfig(camera="frame"),  # as the public minWM
    "wan14b": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    "wan2.2-5b": WanConfig(dim=3072, ffn_dim=14336, num_heads=24, in_dim=48, family="wan2.2"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Positions: t and (frame, row, column)

def sinusoid(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of Wan's timestep 1000 t. t `...` in [0, 1] -> `... dim`, [cos | sin], float32."""
    freqs = torch.pow(10000, -torch.arange(dim // 2, device=t.device, dtype=torch.float64) / (dim // 2))
    angle = 1000 * t.double()[..., None] * freqs
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def rope_angles(frames: Tensor, h: int, w: int, dh: int) -> Tensor:
    """Rotation angles of the tokens of a list of frames, in the order f, h, w.

    frames: frame positions `f`, any integers. Of the dh/2 rotated pairs, the first dh/2 - 2 (dh//6) turn with the
    frame, the next dh//6 with the row, the last dh//6 with the column. Returns float64 `(f h w) dh/2`.
    """
    third, count = dh // 6, partial(torch.arange, dtype=torch.float64, device=frames.device)

    def angles(position, pairs):
        return torch.outer(position.double(), torch.pow(10000, -count(pairs) / pairs))

    f = len(frames)
    return torch.cat([
        angles(frames, dh // 2 - 2 * third)[:, None, None].expand(f, h, w, -1),
        angles(count(h), third)[None, :, None].expand(f, h, w, -1),
        angles(count(w), third)[None, None, :].expand(f, h, w, -1),
    ], dim=-1).flatten(0, 2)


@lru_cache(maxsize=16)  # the steps of a chunk, and the chunks of the next rollout, ask for the same table
def rope_table(frames: tuple[int, ...], h: int, w: int, dh: int, device) -> Tensor:
    """exp(i angle) of rope_angles, complex64 `(f h w) 1 dh/2`, on a device."""
    angles = rope_angles(torch.tensor(frames, device=device), h, w, dh)[:, None]
    return torch.complex(angles.cos().float(), angles.sin().float())


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotary position embedding: turn each pair of neighbouring channels of x `b n nh dh`, a complex number, by its
    angle. rope: exp(i angle), `n 1 dh/2`."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope).flatten(-2).to(x.dtype)


def placed(x: Tensor, rope: Tensor | None, camera: Tensor | None) -> Tensor:
    """Queries, keys or values x `b n nh dh` with their positions: turned by RoPE (None: values are not) and, where
    there are cameras, in as many heads again multiplied by the cameras' matrices, `b f s g 4 4`."""
    turned = x if rope is None else rotate(x, rope)
    return turned if camera is None else torch.cat([turned, cameras.multiply(camera, x)], dim=2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention, softmax(q k^T / sqrt(dh)) v, of q `b n nh dh`, k and v `b m nh dh` -> `b n nh dh`. The only one
    in the project. Without a GPU, PyTorch's kernel is slow for matrices as small as the toy's."""
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))
    if not q.is_cuda and q.dtype == torch.float32 and 64 <= q.shape[2] * k.shape[2] <= 10_000:
        return ((q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Layouts: who sees whom. A layout is a function attend(layer, q, k, v) -> `b n nh dh`, or `b n 2nh dh` with cameras, of
# q, k and v without positions.

def visible(past: int, chunk: int, window: int | None, sink: int) -> list[int]:
    """The past frames that a chunk sees: all of them, or the first `sink` and the last `window - sink - chunk`."""
    if window is None or past <= window - chunk:
        return list(range(past))
    return [*range(sink), *range(past - (window - sink - chunk), past)]


class Cache:
    """The clean past of a rollout: per layer and frame its keys (before RoPE) and values `b s nh dh`, without gradient.
    cameras: of each frame, `b 18`, where the network sees them. keep: what stays when the window is full, the "latest"
    frames (and the sink), or those that cover the "poses" seen (cameras.covering).

    Frames are kept apart and joined where they are used, so a graph that waits for its backward shares them with the
    cache, and with all other chunks. frames: the positions of the frames held. `next_frame` counts the frames committed
    so far, held or dropped.
    """

    def __init__(self, num_layers: int, window: int | None = None, sink: int = 0, relative: bool = False,
                 keep: str = "latest"):
        check_window(window, sink, chunk=1)
        self.window, self.sink, self.relative, self.keep = window, sink, relative, keep
        self.keys: list[list[Tensor]] = [[] for _ in range(num_layers)]
        self.values: list[list[Tensor]] = [[] for _ in range(num_layers)]
        self.frames, self.cameras = [], []
        self.next_frame = self.batch = 0

    def visible_frames(self, *chunks: int, cameras_of: Tensor | None = None) -> list[list[int]]:
        """What each of the next chunks, of so many frames, sees, its own frames included. Frames are numbered from the
        oldest one held on, the new ones last. cameras_of: those of all of these frames, `b f 18`, to keep poses by."""
        visible_to, held, first = [], list(range(len(self.frames))), len(self.frames)
        for n in chunks:
            check_window(self.window, self.sink, n)
            past = [held[i] for i in visible(len(held), n, self.window, self.sink)]
            if self.keep == "poses" and cameras_of is not None and len(past) < len(held):
                past = [held[i] for i in cameras.covering(cameras_of[:, held], len(past))]
            held = [*past, *range(first, first + n)]
            first += n
            visible_to.append(held)
        return visible_to

    def positions(self, new: int) -> list[int]:
        """Of the frames held, and of so many new ones."""
        return [*self.frames, *range(self.next_frame, self.next_frame + new)]

    def with_new(self, cameras_of: Tensor | None) -> Tensor | None:
        """The cameras of the frames held, and of new ones `b f 18`."""
        return None if cameras_of is None else torch.cat([*(of[:, None] for of in self.cameras), cameras_of], dim=1)

    def write(self, keys: list[Tensor], values: list[Tensor], frames: int, cameras_of: Tensor | None = None):
        """Add a chunk of `frames` frames, per layer `b (f s) nh dh`, its cameras `b f 18`; forget what it did not see,
        so that memory stays flat."""
        (keep,) = self.visible_frames(frames, cameras_of=self.with_new(cameras_of))

        def kept(held, new):
            both = [*held, *new]
            return [both[i] for i in keep]

        self.keys = [kept(held, k.chunk(frames, dim=1)) for held, k in zip(self.keys, keys)]
        self.values = [kept(held, v.chunk(frames, dim=1)) for held, v in zip(self.values, values)]
        self.frames = kept(self.frames, range(self.next_frame, self.next_frame + frames))
        self.cameras = [] if cameras_of is None else kept(self.cameras, cameras_of.unbind(1))
        self.next_frame, self.batch = self.next_frame + frames, len(keys[0])


# ---------------------------------------------------------------------------------------------------------------------
# The network

class Attention(nn.Module):
    """Projections shared by self- and cross-attention; q and k are RMS-normalised over the full width, then split."""

    def __init__(self, dim, num_heads, eps):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=eps), nn.RMSNorm(dim, eps=eps)

    def queries(self, x):
        """`b n nh dh` of x `b n d`."""
        return self.norm_q(self.q(x)).unflatten(-1, (self.num_heads, -1))

    def keys_and_values(self, context):
        """Each `b m nh dh` of context `b m d`."""
        return tuple(z.unflatten(-1, (self.num_heads, -1)) for z in (self.norm_k(self.k(context)), self.v(context)))


def modulate(x, shift, scale):
    """Adaptive layer norm: x `b (f s) d` with one shift and scale `b f d` per frame."""
    return torch.addcmul(shift[:, :, None], x.unflatten(1, (shift.shape[1], -1)), 1 + scale[:, :, None]).flatten(1, 2)


def gated(x, y, gate):
    """x + gate * y, one gate `b f d` per frame."""
    x, y = (z.unflatten(1, (gate.shape[1], -1)) for z in (x, y))
    return torch.addcmul(x, y, gate[:, :, None]).flatten(1, 2)


class Block(nn.Module):
    def __init__(self, c: WanConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.dim, c.eps, elementwise_affine=False)
        self.self_attn = Attention(c.dim, c.num_heads, c.eps)
        if c.sees_cameras:
            self.self_attn.prope_o = nn.Linear(c.dim, c.dim)
        self.norm3 = nn.LayerNorm(c.dim, c.eps)
        self.cross_attn = Attention(c.dim, c.num_heads, c.eps)
        self.norm2 = nn.LayerNorm(c.dim, c.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(c.dim, c.ffn_dim), nn.GELU("tanh"), nn.Linear(c.ffn_dim, c.dim))
        self.modulation = nn.Parameter(torch.empty(1, 6, c.dim))

    def forward(self, x, time, text, attend):
        """x `b (f s) d`, time `b f 6 d`, text `b l d`; attend(q, k, v) is this layer's layout. In the last layer it
        returns those tokens alone that are asked for (always the last ones), or None: keys and values were enough."""
        attended = attend(*self.before(x, time))
        if attended is None:
            return None
        clip, token = len(x) - len(attended), x.shape[1] - attended.shape[1]  # the first ones that are asked for
        x, time, text = x[clip:, token:], time[clip:, token * time.shape[1] // x.shape[1] :], text[clip:]
        return self.after(x, attended, time, *self.cross_attn.keys_and_values(text))

    def before(self, x, time):
        """Queries, keys and values of self-attention. It is apart from `after` so that both can be compiled whole."""
        shift, scale = (self.modulation[:, None] + time)[:, :, :2].unbind(2)  # (b f d)
        y = modulate(self.norm1(x), shift, scale)
        return self.self_attn.queries(y), *self.self_attn.keys_and_values(y)

    def after(self, x, attended, time, text_keys, text_values):
        """All that follows self-attention. attended `b (f s) nh dh`, with cameras twice as many heads."""
        gate1, shift, scale, gate2 = (self.modulation[:, None] + time)[:, :, 2:].unbind(2)
        heads = [attended] if attended.shape[2] == self.self_attn.num_heads else attended.chunk(2, dim=2)
        y = self.self_attn.o(heads[0].flatten(2))
        if len(heads) == 2:
            y = y + self.self_attn.prope_o(heads[1].flatten(2))
        x = gated(x, y, gate1)
        y = attention(self.cross_attn.queries(self.norm3(x)), text_keys, text_values)
        x = x + self.cross_attn.o(y.flatten(2))
        return gated(x, self.ffn(modulate(self.norm2(x), shift, scale)), gate2)


class Head(nn.Module):
    def __init__(self, c: WanConfig):
        super().__init__()
        self.norm = nn.LayerNorm(c.dim, c.eps, elementwise_affine=False)
        self.head = nn.Linear(c.dim, c.in_dim * math.prod(c.patch_size))
        self.modulation = nn.Parameter(torch.empty(1, 2, c.dim))

    def forward(self, x, time):
        shift, scale = (self.modulation[:, None] + time[:, :, None]).unbind(2)  # time here is `b f d`
        return self.head(modulate(self.norm(x), shift, scale))


class CausalWan(nn.Module):
    """Wan 2.1's transformer with the four layouts of this file's docstring."""

    def __init__(self, config: WanConfig):
        super().__init__()
        c = self.config = config
        self.patch_embedding = nn.Conv3d(c.in_dim, c.dim, c.patch_size, stride=c.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(c.text_dim, c.dim), nn.GELU("tanh"), nn.Linear(c.dim, c.dim))
        self.time_embedding = nn.Sequential(nn.Linear(c.freq_dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.head = Head(c)
        if c.row_dim:
            self.row_embedding = nn.Linear(c.row_dim, c.dim)
        self.checkpointing = False  # recompute each block in the backward pass: little memory, a third more compute

    def compile_blocks(self):
        """torch.compile for all of a block but its self-attention, whose layout changes from call to call."""
        torch._dynamo.config.recompile_limit = 64  # with and without gradient, a chunk and the whole clip, ...
        for block in self.blocks:
            block.before, block.after = torch.compile(block.before), torch.compile(block.after)

    def random_weights(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Weights for training from scratch, name by name, from their own generator. The head starts at zero.

        Wan's Xavier initialisation, but for three things that let a small model learn in minutes. RoPE is a token's
        only sense of position, and it acts through q and k of self-attention: their biases start random, so that each
        head prefers some direction. The norms of q and k start at 2, so that attention is selective from the start.
        And the text and time embeddings keep variance 1.
        """
        g = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            w = torch.randn(p.shape, generator=g)
            if name == "head.head.weight" or "prope_o" in name:
                w.zero_()
            elif name.endswith("modulation"):
                w /= self.config.dim**0.5
            elif name.startswith(("text_embedding", "time_embedding")) and w.ndim == 2:
                w /= w.shape[1] ** 0.5
            elif w.ndim >= 2:
                w *= (2 / (w.shape[1:].numel() + w.shape[0])) ** 0.5
            elif name.endswith(("norm_q.weight", "norm_k.weight")):
                w.fill_(2.0)
            elif not name.endswith(("self_attn.q.bias", "self_attn.k.bias")):
                w.fill_(1.0 if name.endswith("norm3.weight") else 0.0)
            yield name, w

    def init_weights(self, seed: int):
        """Fill with random_weights."""
        self.load_state_dict(dict(self.random_weights(seed)))
        return self

    def forward(self, x, t, text, *, chunk=None, clean=None, cache=None, commit=False, num_blocks=None):
        """Predict the velocity eps - x_0 of noisy latents.

        x: `b f c h w`. t: `b f` or a float, in [0, 1]. text: `b l text_dim`, zero-padded to text_len (padding is not
        masked, as in Wan), or a flowmap.Condition with rows `b f row_width`: row_dim numbers that are added to the
        embedding of t, and where config.camera says so a camera (cameras.row_of).
        chunk: frames per chunk, for the causal layouts. clean: `b f c h w`, the clean clip, for teacher forcing.
        cache: the past, for a rollout; x is then the next chunk. With both, clean `b n c h w` is the chunk before x,
        finished but not in the cache yet: it is committed in the same forward (at t = 0, without gradient), and rows
        are of all n + f frames. commit: write x's keys and values into the cache, and return None (used by `append`).
        num_blocks: stop after that many blocks and return their tokens `b f s d`, the features that align.py compares.
        Returns `b f c h w` like x. Raises ValueError on shapes that do not fit.
        """
        c, t, (words, rows) = self.config, per_frame(t, x), words_and_rows(text)
        self._check(x, t, words, rows, chunk, clean, cache, commit)
        (b, f, *_), x_t, t_own = x.shape, x, t
        h, w = (n // patch for n, patch in zip(x.shape[3:], c.patch_size[1:]))
        before = clean.shape[1] if cache is not None and clean is not None else 0  # frames to commit on the way
        if before:
            x, t = torch.cat([clean, x], dim=1), torch.cat([t.new_zeros(b, before), t], dim=1)
        elif clean is not None:  # two streams, [clean | noisy], on the batch axis
            x, t = torch.cat([clean, x]), torch.cat([torch.zeros_like(t), t])
            words, rows = words_and_rows(twice(text))

        written, to_write = [], f if commit else before  # frames
        camera = rows[..., c.row_dim:] if c.sees_cameras else None
        if cache is not None:
            layout = self._cached(cache, (before, f) if before else (f,), h, w, x.device, camera)
        elif chunk is not None:
            layout = self._chunked(f, chunk, h, w, x.device, camera, two_streams=clean is not None)
        else:
            layout = self._bidirectional(f, h, w, x.device, camera)

        tokens, time, time6 = self.embed(x, t, rows)
        text = self.text_embedding(words.to(tokens.dtype))
        for layer, block in enumerate(self.blocks[:num_blocks]):
            def attend(q, k, v, layer=layer):
                if to_write:
                    written.append([z[:, : to_write * h * w].detach().clone() for z in (k, v)])
                is_last = layer + 1 == (num_blocks or c.num_layers)
                if is_last and commit:
                    return None
                return layout(layer, q, k, v)[len(x) - b :, before * h * w :] if is_last else layout(layer, q, k, v)
            if self.checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, time6, text, attend, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(tokens, time6, text, attend)
        if to_write:
            cache.write(*zip(*written), to_write, None if camera is None else camera[:, :to_write])
        if commit or num_blocks is not None:
            return None if commit else tokens.unflatten(1, (f, -1))
        return self.velocity(tokens, time[len(x) - b :, before:], x_t, t_own)

    def embed(self, x, t, rows):
        """Tokens `b (f s) d` of x; what the head, `b f d`, and the blocks, `b f 6 d`, are told of t and rows."""
        c, weight, (_, p, q) = self.config, self.patch_embedding.weight, self.config.patch_size
        dtype, patches = weight.dtype, rearrange(x, "b f c (h p) (w q) -> b (f h w) (c p q)", p=p, q=q)
        tokens = F.linear(patches.to(dtype), weight.flatten(1), self.patch_embedding.bias)  # a convolution, stride p q
        time = self.time_embedding(sinusoid(t, c.freq_dim).to(dtype))
        if c.row_dim:
            time = time + self.row_embedding(rows[..., :c.row_dim].to(dtype))
        return tokens, time, self.time_projection(time).unflatten(-1, (6, -1))

    def velocity(self, tokens, time, x_t, t):
        """v `b f c h w` at x_t and t `b f`, from the last block's tokens `b (f s) d` and time `b f d`."""
        (f, _, height, _), (_, p, q) = x_t.shape[1:], self.config.patch_size
        v = rearrange(self.head(tokens, time), "b (f h w) (p q c) -> b f c (h p) (w q)", f=f, h=height // p, p=p, q=q)
        if self.config.predicts_x0:
            v = (x_t - v) / t.clamp(min=T_MIN)[:, :, None, None, None]
        return v.to(x_t.dtype)

    def new_cache(self, window: int | None = None, sink: int | None = None, relative: bool = False,
                  keep: str = "latest") -> Cache:
        """An empty past. window and sink (frames) default to the config's. ValueError for poses that are not seen."""
        c = self.config
        if keep not in ("latest", "poses") or keep == "poses" and not c.sees_cameras:
            raise ValueError(f"got keep={keep!r}, expected latest, or poses for a network that sees cameras: change "
                             "--keep")
        return Cache(c.num_layers, c.window if window is None else window, c.sink if sink is None else sink, relative,
                     keep)

    @torch.no_grad()
    def append(self, cache: Cache, x0: Tensor, text: Tensor) -> None:
        """Commit a finished chunk x0 `b f c h w` to the cache: one forward at t = 0, no gradient."""
        self(x0, 0.0, text, cache=cache, commit=True)

    # -- the layouts -------------------------------------------------------------------------------------------------

    def _rope(self, frames, h, w, device):
        return rope_table(tuple(frames), h, w, self.config.dim // self.config.num_heads, device)

    def _cameras(self, rows, h, w, asking):
        """Of rows `b f 18`: P^T and P of the last frames, which ask, for q and the output; P^-1 of all, for k and v."""
        if rows is None:
            return None, None, None
        p, inverse = cameras.matrices(self.config.camera, rows, h, w, self.config.dim // self.config.num_heads)
        return p[:, -asking:].transpose(-1, -2), inverse, p[:, -asking:]

    def _bidirectional(self, f, h, w, device, camera):
        rope, (of_q, of_kv, of_out) = self._rope(range(f), h, w, device), self._cameras(camera, h, w, f)

        def attend(layer, q, k, v):
            out = attention(placed(q, rope, of_q), placed(k, rope, of_kv), placed(v, None, of_kv))
            return cameras.seen_by(of_out, out)

        return attend

    def _chunked(self, f, chunk, h, w, device, camera, two_streams):
        """Chunk by chunk on [past | own]. With two streams on the batch axis both see the past of the clean one."""
        rope, s, (of_q, of_kv, of_out) = self._rope(range(f), h, w, device), h * w, self._cameras(camera, h, w, f)
        sees = [visible(start, chunk, self.config.window, self.config.sink) for start in range(0, f, chunk)]

        def attend(layer, q, k, v):
            q, k, v = placed(q, rope, of_q), placed(k, rope, of_kv), placed(v, None, of_kv)
            q, k, v = (z.split(s, dim=1) for z in (q, k, v))  # per frame; split, unlike slicing, has a cheap backward
            past_k, past_v = k, v
            if two_streams:
                past_k, past_v = ([torch.cat([z.chunk(2)[0]] * 2) for z in past] for past in (k, v))
            out = []
            for start, seen in zip(range(0, f, chunk), sees):
                own = range(start, start + chunk)
                ks = torch.cat([past_k[j] for j in seen] + [k[j] for j in own], dim=1)
                vs = torch.cat([past_v[j] for j in seen] + [v[j] for j in own], dim=1)
                out.append(attention(torch.cat([q[j] for j in own], dim=1), ks, vs))
            return cameras.seen_by(of_out, torch.cat(out, dim=1))

        return attend

    def _cached(self, cache, chunks, h, w, device, camera):
        """A chunk on [past | own]. Of two chunks, the first is past to the second, and carries no gradient."""
        s, earlier, positions = h * w, sum(chunks[:-1]), cache.positions(sum(chunks))
        camera = cache.with_new(camera)
        frames_seen, tokens = cache.visible_frames(*chunks, cameras_of=camera), [n * s for n in chunks]
        keys, values = cache.keys, cache.values  # as they are now: a backward recomputes when the cache holds more
        ropes = [self._rope(range(len(seen)) if cache.relative else [positions[i] for i in seen], h, w, device)
                 for seen in frames_seen]
        of_each = [self._cameras(None if camera is None else camera[:, seen], h, w, n)
                   for n, seen in zip(chunks, frames_seen)]

        def past(held, new):
            new = new.split(s, dim=1)
            return [*held, *(z.detach() for z in new[:earlier]), *new[earlier:]]

        def attend(layer, q, k, v):
            out, ks, vs = [], past(keys[layer], k), past(values[layer], v)
            for own, seen, rope, (of_q, of_kv, of_out) in zip(q.split(tokens, dim=1), frames_seen, ropes, of_each):
                k, v = (torch.cat([z[i] for i in seen], dim=1) for z in (ks, vs))
                own = placed(own, rope[-own.shape[1]:], of_q)
                out.append(cameras.seen_by(of_out, attention(own, placed(k, rope, of_kv), placed(v, None, of_kv))))
            return torch.cat(out, dim=1)

        return attend

    def _check(self, x, t, text, rows, chunk, clean, cache, commit):
        c, (_, ph, pw) = self.config, self.config.patch_size
        if x.ndim != 5:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected five axes, b f c h w")
        b, f, channels, height, width = x.shape
        if channels != c.in_dim or height % ph or width % pw:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected b f c h w with c = {c.in_dim} and h, w divisible "
                             f"by the patch {ph} x {pw} (is this the right --size?)")
        if t.shape != (b, f):
            raise ValueError(f"t has shape {tuple(t.shape)}; expected b f = {(b, f)}, one time per frame")
        if text.shape != (b, c.text_len, c.text_dim):
            raise ValueError(f"text has shape {tuple(text.shape)}; expected {(b, c.text_len, c.text_dim)}, zero-padded")
        told = (b, f + (clean.shape[1] if cache is not None and clean is not None else 0), c.row_width)
        if (None if rows is None else rows.shape) != (told if c.row_width else None):
            raise ValueError(f"rows have shape {None if rows is None else tuple(rows.shape)}; expected "
                             f"{told if c.row_width else 'none'}, by the config's row_dim and camera")
        if clean is not None and cache is None and (clean.shape != x.shape or chunk is None):
            raise ValueError(f"teacher forcing needs chunk and a clean clip like x {tuple(x.shape)}; "
                             f"got chunk={chunk}, clean {tuple(clean.shape)}")
        if clean is not None and cache is not None and (commit or clean.shape[:1] + clean.shape[2:] != x[:, 0].shape):
            raise ValueError(f"got commit={commit} and clean {tuple(clean.shape)}, expected a clean chunk like x "
                             f"{tuple(x.shape)}, of any number of frames, which is committed instead of x")
        if cache is not None and chunk is not None:
            raise ValueError("with a cache, x is one chunk: do not give chunk")
        if commit and cache is None:
            raise ValueError("commit writes into a cache: give cache=net.new_cache()")
        if cache is not None and cache.frames and cache.batch != b:
            raise ValueError(f"x holds {b} clips, the cache {cache.batch}: start a new cache for another batch")
        if chunk is not None:
            if chunk < 1 or f % chunk:
                raise ValueError(f"{f} frames do not divide into chunks of {chunk}: change --frames or --chunk")
            check_window(c.window, c.sink, chunk)
