"""The rollout of model.py, faster: nothing is computed twice. For rollouts without gradient, on one device.

    net = Fast(net)
    for chunk in stream(net, noise, text, grid, num_chunks=8): show(chunk.x0)

Fast(net) is called as the network is in a rollout (cache=..., clean=...; append; new_cache) and returns the same
numbers up to rounding. The network is the reference: tests/equations/test_fast.py compares the two. Who changes one of
them changes both: samples are made here, and so are the clips that Salt's critic learns from (stage.for_rollouts).

In every layer of every step model.py joins the frames of the past and turns all of their keys by RoPE again, which is
how one reads it, and what a gradient needs. What is saved here:

  - The past is one buffer per layer. A frame's keys are turned once, by its position in the clip, and written in place,
    and what a chunk sees is one slice. Attention depends on differences of positions, so where these are counted inside
    the window only the sink has to be turned again, as it moves along with the window.
  - Keys and values of the prompt are computed once, kept with the cache, and renewed when the words change.
  - Of a chunk that is committed the last layer computes keys and values, and nothing else.
  - q, k and v are one product. Their parameters stay in use: they become parts of one tensor.
  - Attention runs on the backend that is the fastest here (fast/attention.py).

A network with cameras has a new origin in every chunk, and so new keys; a window that keeps poses has new positions.
Both keep model.py's cache and layout, and have all else from here.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.attention import fastest, using
from flowmap import per_frame, words_and_rows
from model import Cache, attention, modulate, rope_angles

# ---------------------------------------------------------------------------------------------------------------------
# The cache


@dataclass
class Part:
    """One of the chunks of a forward."""

    tokens: slice  # which tokens of the forward are its own
    runs: list[tuple[int, int, int]]  # where they are written: (first slot, first of its frames, how many frames)
    sees: int  # the first so many slots
    commits: bool
    moves_sink: int | None  # how many frames later than at first the sink is put; None: as before


class Buffer(Cache):
    """model.Cache in one preallocated tensor per layer, of keys with RoPE and of values: `b (slots s) nh dh`.

    A frame lies in a slot. The next chunk takes the slots of frames that it does not see, which are forgotten when it
    is begun, then new ones. So what it sees are the first so many slots; their order does not matter, as keys carry
    their positions. There are as many slots as the window has frames; without a window, twice as many whenever they are
    full.
    """

    def __init__(self, num_layers: int, window: int | None = None, sink: int = 0, relative: bool = False):
        super().__init__(num_layers, window, sink, relative)
        self.keys, self.values, self.sink_keys = [None] * num_layers, [None] * num_layers, [None] * num_layers
        self.slots: list[int] = []  # of the frames held
        self.sink_moved = 0

    def begin(self, chunks: list[int], commits: list[bool], s: int) -> list[Part]:
        """Make room for chunks of so many frames of s tokens, one after the other; hold those that are committed."""
        parts, tokens = [], 0
        for n, commit in zip(chunks, commits):
            (seen,) = self.visible_frames(n)
            self.frames, self.slots = ([held[i] for i in seen[:-n]] for held in (self.frames, self.slots))
            slots = [slot for slot in range(len(seen)) if slot not in self.slots]
            if len(slots) != n:
                raise ValueError(f"got a chunk of {n} frames behind a look at a longer one, expected one as long: "
                                 "commit before the length changes, or use the network itself")
            starts = [i for i in range(n) if i == 0 or slots[i] != slots[i - 1] + 1]
            runs = [(slots[i], i, end - i) for i, end in zip(starts, [*starts[1:], n])]
            moved = self.sink_distance()
            parts.append(Part(slice(tokens, tokens + n * s), runs, len(seen), commit,
                              moved if moved != self.sink_moved else None))
            tokens, self.sink_moved = tokens + n * s, moved
            if commit:
                self.frames += range(self.next_frame, self.next_frame + n)
                self.slots += slots
                self.next_frame += n
        return parts

    def sink_distance(self) -> int:
        """How many frames later than at first the sink must lie, to be right before the other frames that are seen."""
        if not self.relative or not 0 < self.sink <= len(self.frames):
            return 0
        next_to_it = self.frames[self.sink] if len(self.frames) > self.sink else self.next_frame
        return next_to_it - self.sink - self.frames[0]

    def put(self, layer: int, part: Part, k: Tensor, v: Tensor, rope: "Rope") -> tuple[Tensor, Tensor]:
        """Write the keys, with RoPE, and the values of a part, `b (n s) nh dh`. Returns those of all that it sees,
        `b (sees s) nh dh`."""
        frames = sum(n for *_, n in part.runs)
        if part.sees == frames and not part.commits:
            return k, v  # there is no past: a clip that is made at once needs no buffer
        s, self.batch = k.shape[1] // frames, len(k)
        for held, new in ((self.keys, k), (self.values, v)):
            if held[layer] is None or held[layer].shape[1] < part.sees * s:
                slots = self.window or (part.sees if held[layer] is None else 2 * part.sees)
                larger = new.new_empty(len(new), slots * s, *new.shape[2:])
                if held[layer] is not None:
                    larger[:, : held[layer].shape[1]] = held[layer]
                held[layer] = larger
            for slot, frame, n in part.runs:
                held[layer][:, slot * s : (slot + n) * s] = new[:, frame * s : (frame + n) * s]
        if part.moves_sink is not None:
            sink = self.keys[layer][:, : self.sink * s]
            if self.sink_keys[layer] is None:
                self.sink_keys[layer] = sink.clone()
            sink.copy_(turn(self.sink_keys[layer], rope.later(part.moves_sink)))
        return self.keys[layer][:, : part.sees * s], self.values[layer][:, : part.sees * s]


# ---------------------------------------------------------------------------------------------------------------------
# Positions

def turn(x: Tensor, rope: Tensor) -> Tensor:
    """model.rotate of x `b n nh dh`, with cosines and sines `n 1 dh/2 2`, float32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # real arithmetic, which the compiler joins with what is around it
        (a, b), (c, s) = pairs.unbind(-1), rope.unbind(-1)
        turned = torch.stack([a * c - b * s, a * s + b * c], -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    return turned.flatten(-2).to(x.dtype)


class Rope:
    """Cosines and sines of model.rope_angles, looked up: `... dh/2 2`, float32, on a device."""

    def __init__(self, dh: int, device):
        self.dh, self.device, self.by_place = dh, device, {}
        self.pairs = dh // 2 - 2 * (dh // 6)  # that turn with the frame
        self.by_frame = self.table(torch.arange(64, device=device), 1, 1)

    def table(self, frames: Tensor, h: int, w: int) -> Tensor:
        angles = rope_angles(frames, h, w, self.dh)
        return torch.stack([angles.cos(), angles.sin()], -1).float()

    def frames(self, first: int, n: int) -> Tensor:
        """At the upper left of n frames, `n dh/2 2`."""
        while len(self.by_frame) < first + n:
            further = torch.arange(len(self.by_frame), 2 * len(self.by_frame), device=self.device)
            self.by_frame = torch.cat([self.by_frame, self.table(further, 1, 1)])
        return self.by_frame[first : first + n]

    def later(self, frames: int) -> Tensor:
        """So many frames later at the same place of the picture, `1 1 dh/2 2`."""
        return self.frames(frames, 1)[:, None]

    def tokens(self, first: int, n: int, h: int, w: int) -> Tensor:
        """Of all tokens of n frames, `(n h w) 1 dh/2 2`."""
        if (h, w) not in self.by_place:
            self.by_place[h, w] = self.table(torch.zeros(1, device=self.device), h, w)[:, self.pairs :]
        by_frame = self.frames(first, n)[:, None, : self.pairs].expand(n, h * w, -1, -1)
        return torch.cat([by_frame, self.by_place[h, w].expand(n, -1, -1, -1)], dim=2).flatten(0, 1)[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# The network

def as_one(*parameters: Tensor) -> Tensor:
    """Parameters, joined along their first axis; they become parts of the result, which costs no memory."""
    joined = torch.cat([p.data for p in parameters])
    for p, part in zip(parameters, joined.split([len(p) for p in parameters])):
        p.data = part
    return joined


class Layer:
    """A Block whose q, k and v are one product."""

    def __init__(self, block, compiled: bool):
        attn = block.self_attn
        self.block, self.heads, self.eps = block, attn.num_heads, attn.norm_q.eps
        self.weight = as_one(attn.q.weight, attn.k.weight, attn.v.weight)
        self.bias = as_one(attn.q.bias, attn.k.bias, attn.v.bias)
        self.norm = as_one(attn.norm_q.weight, attn.norm_k.weight).unflatten(0, (2, -1))
        if compiled:
            self.before, self.after = (torch.compile(f, dynamic=False) for f in (self.before, self.after))

    def before(self, x, time, rope):
        """Block.before, with RoPE in q and k unless rope is None."""
        shift, scale = (self.block.modulation[:, None] + time)[:, :, :2].unbind(2)
        qkv = F.linear(modulate(self.block.norm1(x), shift, scale), self.weight, self.bias).unflatten(-1, (3, -1))
        qk = F.rms_norm(qkv[:, :, :2], qkv.shape[-1:], None, self.eps) * self.norm
        qk = qk.flatten(2).unflatten(-1, (2 * self.heads, -1))
        q, k = (qk if rope is None else turn(qk, rope)).chunk(2, dim=2)
        return q, k, qkv[:, :, 2].unflatten(-1, (self.heads, -1))

    def after(self, *of_block):
        return self.block.after(*of_block)


class Fast(nn.Module):
    """A CausalWan for rollouts.

    backend: of attention, a name of fast.attention.BACKENDS; "": the fastest, measured. compiled: torch.compile all but
    attention, anew for every shape. The network's parameters stay in use, and may be trained meanwhile; they must not
    be moved to other memory (`net.to`), nor may another Fast be made of them while this one is used. A forward forgets
    what its chunk does not see, so until the next commit all chunks have one length. backends_used: those asked for so
    far (short sequences on a CPU use none, see model.attention).
    """

    def __init__(self, net, backend: str = "", compiled: bool = False):
        super().__init__()
        self.net, self.config, self.backend, self.backends_used = net, net.config, backend, set()
        self.layers = [Layer(block, compiled) for block in net.blocks]
        self.rope = Rope(self.config.dim // self.config.num_heads, net.patch_embedding.weight.device)

    def new_cache(self, window: int | None = None, sink: int | None = None, relative: bool = False,
                  keep: str = "latest") -> Cache:
        """As the network's."""
        cache = self.net.new_cache(window, sink, relative, keep)
        if keep == "latest" and not self.config.sees_cameras:
            cache = Buffer(self.config.num_layers, cache.window, cache.sink, relative)
        cache.words, cache.text = None, []  # of the prompt, and every layer's keys and values of it
        return cache

    def append(self, cache: Cache, x0: Tensor, text) -> None:
        """Commit a finished chunk x0 `b f c h w`."""
        self(x0, 0.0, text, cache=cache, commit=True)

    def forward(self, x: Tensor, t, text, *, cache: Cache, clean: Tensor | None = None, commit=False) -> Tensor | None:
        """v `b f c h w`, as CausalWan.forward with a cache; with commit, nothing."""
        # A tensor made in inference mode must not meet a gradient. So v is cloned outside of it, and the layout of
        # model.Cache, which fills a table that training shares (model.rope_table), does without.
        with torch.inference_mode() if isinstance(cache, Buffer) else torch.no_grad():
            v = self.predict(x, t, text, cache, clean, commit)
        return v if v is None else v.clone()

    def predict(self, x, t, text, cache, clean, commit):
        net, t, (words, rows) = self.net, per_frame(t, x), words_and_rows(text)
        net._check(x, t, words, rows, None, clean, cache, commit)
        f, x_t, t_own, chunks, commits = x.shape[1], x, t, [x.shape[1]], [commit]
        if clean is not None:
            chunks, commits = [clean.shape[1], f], [True, False]
            x, t = torch.cat([clean, x], dim=1), F.pad(t, (clean.shape[1], 0))
        h, w = (n // patch for n, patch in zip(x.shape[3:], self.config.patch_size[1:]))
        tokens, time, time6 = net.embed(x, t, rows)
        self.read(cache, words, tokens.dtype)
        layout = self.buffered if isinstance(cache, Buffer) else self.joined
        attend, rope, sees = layout(cache, chunks, commits, h, w, rows)
        with using(self.backend_for(tokens, f * h * w, sees * h * w)):
            for i, layer in enumerate(self.layers):
                q, k, v = layer.before(tokens, time6, rope)
                if i == len(self.layers) - 1:
                    tokens, time6 = tokens[:, -f * h * w :], time6[:, -f:]
                attended = attend(i, q, k, v)
                if attended is None:
                    return None
                tokens = layer.after(tokens, attended[:, -tokens.shape[1] :], time6, *cache.text[i])
        return net.velocity(tokens, time[:, -f:], x_t, t_own)

    def read(self, cache: Cache, words: Tensor, dtype) -> None:
        """Keep every layer's keys and values of the prompt, `b l text_dim`, in the cache."""
        if cache.words is not words:
            text = self.net.text_embedding(words.to(dtype))
            cache.words, cache.text = words, [layer.block.cross_attn.keys_and_values(text) for layer in self.layers]

    def backend_for(self, tokens: Tensor, queries: int, keys: int) -> str:
        c = self.config
        name = self.backend or fastest(tokens.device, tokens.dtype, len(tokens), c.num_heads, c.dim // c.num_heads,
                                       queries, keys)
        self.backends_used.add(name)
        return name

    # Layouts: attend(layer, q, k, v), which in the last layer skips chunks that are only committed (None: there are no
    # others); RoPE for q and k, where attend does not turn them itself; how many frames the last chunk sees.

    def buffered(self, cache: Buffer, chunks, commits, h, w, rows):
        rope, parts = self.rope.tokens(cache.next_frame, sum(chunks), h, w), cache.begin(chunks, commits, h * w)

        def attend(layer, q, k, v):
            out = []
            for part in parts:
                keys, values = cache.put(layer, part, k[:, part.tokens], v[:, part.tokens], self.rope)
                if not part.commits or layer < len(self.layers) - 1:
                    out.append(attention(q[:, part.tokens], keys, values))
            return torch.cat(out, dim=1) if out else None

        return attend, rope, parts[-1].sees

    def joined(self, cache: Cache, chunks, commits, h, w, rows):
        camera = rows[..., self.config.row_dim :] if self.config.sees_cameras else None
        networks_attend = self.net._cached(cache, chunks, h, w, self.rope.device, camera)
        sees, n, keys, values = len(cache.frames) + sum(chunks), chunks[0], [], []

        def attend(layer, q, k, v):
            if commits[0]:
                keys.append(k[:, : n * h * w].clone())
                values.append(v[:, : n * h * w].clone())
                if layer == len(self.layers) - 1:
                    cache.write(keys, values, n, None if camera is None else camera[:, :n])
                    if len(chunks) == 1:
                        return None
            return networks_attend(layer, q, k, v)

        return attend, None, sees
