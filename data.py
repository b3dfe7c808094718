"""The toy world: clips of a coloured shape that flies, bounces and turns at random, and their exact measurement.

A clip is `f` frames of 10 x 10 RGB pixels, shifted and scaled to unit variance as the latents of a video model are.
Its prompt is two words, a colour and a shape. The shape starts anywhere, flies straight at SPEED pixels per frame,
bounces off the walls, and before every frame, with probability TURN, picks a new direction at random. So given the
past the next frame has many possible futures: their mean is a blur, and a model that predicts in one step what it can
only know on average draws that blur.

Since the renderer is known, any picture can be inverted exactly: which shape, which colour, where. From that come,
with no learned metric, the numbers of every table of this project (`measure`):

    quality    mean squared distance of a frame to the nearest valid render (0: a perfect picture)
    semantic   share of clips that, all frames together, lie nearest to renders of their prompt
    dynamics   mean motion, pixels per frame, over the true world's (1: as lively as the world)
    drift      quality of the last frame over quality of the third (1: no drift)
    distance   how far the motion's distribution is from the world's: the Wasserstein-1 distance of speeds (pixels per
               frame) plus that of turning angles (radians)

Real video comes from disk, encoded beforehand: the last section reads and writes folders of latents and text embeddings
(`LatentFolder`, whose docstring is the format). What a draw gives depends, here as there, on its number only.
"""

import hashlib
import json
import math
import sys
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from torch import Tensor

from files import checksum, header_of, replacing, write_tensors

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
SHAPES = ("ball", "bar", "pole")
SIZE = 10  # pixels
RADIUS = 2.3  # pixels; also the closest that a centre comes to a wall
THICK = 1.05  # pixels; half the thickness of bar and pole
SPEED = 2.0  # pixels per frame
TURN = 0.5  # probability of a new direction before each frame
EDGE = 0.35  # pixels; softness of an edge, so that pictures depend smoothly on the position
MEAN, STD = 0.055, 0.18  # of the RGB values of this world, in [0, 1]
TEXT_DIM = 16
PROMPTS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


# ---------------------------------------------------------------------------------------------------------------------
# Making clips

def render(colour: Tensor, shape: Tensor, xy: Tensor) -> Tensor:
    """Draw frames as latents `... 3 h w`. colour, shape: integers `...`; xy: centres, pixels `... 2`, column, row."""
    pixels = torch.arange(SIZE, device=xy.device) + 0.5
    dx = (pixels - xy[..., 0:1]).abs()[..., None, :]
    dy = (pixels - xy[..., 1:2]).abs()[..., :, None]
    ball = RADIUS - (dx**2 + dy**2).sqrt()
    bar = torch.minimum(RADIUS - dx, THICK - dy)
    pole = torch.minimum(THICK - dx, RADIUS - dy)
    inside = torch.stack([ball, bar, pole], -3)  # signed distance to the edge, (... shape y x)
    inside = torch.gather(inside, -3, shape[..., None, None, None].expand(*shape.shape, 1, SIZE, SIZE))
    mask = torch.sigmoid(inside / EDGE)  # (... 1 y x)
    paint = torch.tensor(list(COLOURS.values()), dtype=xy.dtype, device=xy.device)[colour][..., None, None]
    return (mask * paint - MEAN) / STD


def to_rgb(x: Tensor) -> Tensor:
    """Latents of the toy world to RGB in [0, 1], not clipped."""
    return x * STD + MEAN


def from_rgb(rgb: Tensor) -> Tensor:
    """The way back, from RGB in [0, 1]."""
    return (rgb - MEAN) / STD


def bounce(x: Tensor) -> Tensor:
    """Fold positions (pixels) back between the walls, as often as it takes."""
    span = SIZE - 2 * RADIUS
    x = (x - RADIUS) % (2 * span)
    return RADIUS + torch.where(x > span, 2 * span - x, x)


def tracks(indices, frames: int, *key: int) -> tuple[Tensor, Tensor]:
    """Random flights number `indices` of stream `key`: centres in pixels `b frames 2`, prompts `b` (as in PROMPTS)."""
    u = torch.stack([torch.rand(frames, 4, generator=generator(*key, i)) for i in indices])
    prompts = (u[:, 0, 3] * len(PROMPTS)).long()
    centres, angle = [RADIUS + (SIZE - 2 * RADIUS) * u[:, 0, :2]], 2 * math.pi * u[:, 0, 2]
    for i in range(1, frames):
        angle = torch.where(u[:, i, 0] < TURN, 2 * math.pi * u[:, i, 1], angle)
        step = SPEED * torch.stack([angle.cos(), angle.sin()], dim=-1)
        straight = centres[-1] + step
        centres.append(bounce(straight))
        hit = (centres[-1] - straight).abs() > 1e-4
        step = torch.where(hit, -step, step)  # a wall mirrors the direction across it
        angle = torch.atan2(step[:, 1], step[:, 0])
    return torch.stack(centres, dim=1), prompts


def clips(indices, frames: int, *key: int) -> tuple[Tensor, Tensor]:
    """The same flights, drawn: x `b frames 3 SIZE SIZE`, prompts `b`."""
    xy, prompts = tracks(indices, frames, *key)
    shown = prompts[:, None].expand(-1, frames)
    return render(shown // len(SHAPES), shown % len(SHAPES), xy), prompts


def generator(*key: int) -> torch.Generator:
    """A random generator that is a function of whole numbers only, e.g. (seed, step, index in the global batch)."""
    (state,) = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)  # (a, b) is not (a, b, 0)
    return torch.Generator().manual_seed(int(state) >> 1)


def noises(indices, shape, *key: int) -> Tensor:
    """Standard normal noise `b *shape`, each sample from its own generator (*key, index)."""
    return torch.stack([torch.randn(shape, generator=generator(*key, i)) for i in indices])


def embed(prompts) -> Tensor:
    """Text embeddings `b 2 TEXT_DIM` of prompt numbers `b`: one token a word, one-hot, scaled to be noticed early."""
    colour, shape = torch.as_tensor(prompts) // len(SHAPES), torch.as_tensor(prompts) % len(SHAPES) + len(COLOURS)
    return 8.0 * torch.nn.functional.one_hot(torch.stack([colour, shape], -1), TEXT_DIM).float()


def parse_prompt(prompt: str) -> int:
    """The number of a prompt in PROMPTS; ValueError with the list of words for anything else."""
    words = prompt.lower().split()
    if len(words) != 2 or words[0] not in COLOURS or words[1] not in SHAPES:
        raise ValueError(f"got the prompt {prompt!r}, expected a colour of {', '.join(COLOURS)} and a shape of "
                         f"{', '.join(SHAPES)}, in quotes, for example \"red ball\": change --prompt")
    return PROMPTS.index(" ".join(words))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring clips

@torch.no_grad()
def invert(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the valid render nearest to each frame.

    x: `n 3 SIZE SIZE`. Returns the centre in pixels `n 2`, the mean squared distance `n`, and for each prompt the
    distance to its nearest render on a quarter-pixel grid `n prompts`. The best of all is refined to 1/128 pixel.
    """
    ticks = torch.arange(RADIUS, SIZE - RADIUS + 1e-4, 0.25, device=x.device)
    grid = torch.cartesian_prod(ticks, ticks)
    prompt = torch.arange(len(PROMPTS), device=x.device).repeat_interleave(len(grid))
    xy = grid.repeat(len(PROMPTS), 1)
    colour, shape = prompt // len(SHAPES), prompt % len(SHAPES)
    templates = render(colour, shape, xy).flatten(1)
    energy = templates.square().sum(1)
    nearest = [(energy - 2 * part @ templates.T).unflatten(1, (len(PROMPTS), -1)).min(2)
               for part in x.flatten(1).split(512)]
    by_prompt = torch.cat([n.values for n in nearest]) + x.flatten(1).square().sum(1, keepdim=True)
    best = by_prompt.argmin(1)
    place = torch.cat([n.indices for n in nearest]).gather(1, best[:, None])[:, 0]
    colour, shape, xy = best // len(SHAPES), best % len(SHAPES), grid[place]
    around = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0], device=x.device)] * 2)
    for step in (1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128):
        near = (xy[:, None] + step * around).clamp(RADIUS, SIZE - RADIUS)  # (n 9 2)
        pictures = render(colour[:, None].expand(-1, 9), shape[:, None].expand(-1, 9), near)
        distance, pick = (pictures - x[:, None]).square().flatten(2).mean(2).min(1)
        xy = near[torch.arange(len(x)), pick]
    return xy, distance, by_prompt / templates.shape[1]


def motion(xy: Tensor) -> tuple[Tensor, Tensor]:
    """Speeds (pixels per frame) and turning angles (radians in [0, pi]) of tracks `b f 2`, flattened over the batch."""
    step = xy.diff(dim=1)
    heading = torch.atan2(step[..., 1], step[..., 0])
    turn = (heading.diff(dim=1) + math.pi) % (2 * math.pi) - math.pi
    return step.norm(dim=-1).flatten(), turn.abs().flatten()


def wasserstein(a: Tensor, b: Tensor) -> float:
    """Wasserstein-1 distance of two samples of a number, by their quantiles."""
    q = (torch.arange(200, dtype=a.dtype, device=a.device) + 0.5) / 200
    return (a.quantile(q) - b.quantile(q)).abs().mean().item()


def measure(x: Tensor, prompts: Tensor, world: tuple[Tensor, Tensor]) -> dict:
    """All the metrics of this file's docstring.

    x: generated clips `b f 3 SIZE SIZE`; prompts: numbers `b`; world: motion(tracks(...)[0]), what motion is compared
    with. Returns floats, and `quality_by_frame`, a list of f. Raises ValueError on clips that are not finite.
    """
    b, f = x.shape[:2]
    if not x.isfinite().all():
        raise ValueError("got non-finite pixels in generated clips, expected finite ones: the model has diverged; "
                         "train it with a smaller learning rate")
    xy, distance, by_prompt = invert(x.flatten(0, 1).float().cpu())
    speed, turn = motion(xy.unflatten(0, (b, f)))
    shown = by_prompt.unflatten(0, (b, f)).mean(1).argmin(1)
    by_frame = distance.unflatten(0, (b, f)).mean(0)
    return {
        "quality": by_frame.mean().item(),
        "semantic": (shown == prompts.cpu()).float().mean().item(),
        "dynamics": (speed.mean() / world[0].mean()).item(),
        "drift": (by_frame[-1] / by_frame[min(2, f - 1)]).item(),
        "distance": wasserstein(speed, world[0]) + wasserstein(turn, world[1]),
        "quality_by_frame": by_frame.tolist(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def pixels(x: Tensor, scale: int = 5) -> np.ndarray:
    """Latents `... c h w`, of the toy world where c = 3, to bytes `... h w 3`, enlarged."""
    if x.shape[-3] != 3:  # latents of another world: three of their channels, for a first look
        x = x[..., :3, :, :] * 0.25 + 0.5
    else:
        x = to_rgb(x)
    x = (x.clamp(0, 1) * 255).round().byte().cpu()
    x = x.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    return rearrange(x, "... c h w -> ... h w c").numpy()


def save_webp(path: Path, frames: np.ndarray, seconds_per_frame: float = 0.2) -> None:
    """An animated WebP that loops, from bytes `f h w 3`."""
    first, *rest = [Image.fromarray(frame) for frame in frames]
    with replacing(path) as fresh:
        first.save(fresh, "webp", save_all=True, append_images=rest, duration=round(1000 * seconds_per_frame), loop=0,
                   quality=90)


def sheet(rows: dict[str, Tensor], path: Path) -> None:
    """Clips of several models on the same prompts and noise, `label -> b f 3 SIZE SIZE`, as path.png and path.webp.

    The PNG shows the frames of the first two clips side by side, the WebP all clips, playing.
    """
    def labelled(strips):  # label -> bytes (h w 3); all of one size
        h, w, _ = next(iter(strips.values())).shape
        page = Image.new("RGB", (110 + w, (h + 4) * len(strips)), "white")
        for i, (label, strip) in enumerate(strips.items()):
            page.paste(Image.fromarray(strip), (110, i * (h + 4)))
            ImageDraw.Draw(page).text((4, i * (h + 4) + h // 2 - 6), label, fill="black")
        return page

    path.parent.mkdir(parents=True, exist_ok=True)
    frames = {label: np.pad(pixels(x), [(0, 0)] * 2 + [(0, 2), (0, 2), (0, 0)]) for label, x in rows.items()}
    still = {label: rearrange(x[:2], "b f h w c -> h (b f w) c") for label, x in frames.items()}
    with replacing(path.with_suffix(".png")) as fresh:
        labelled(still).save(fresh, "png")
    playing = [labelled({label: rearrange(x[:, i], "b h w c -> h (b w) c") for label, x in frames.items()})
               for i in range(next(iter(frames.values())).shape[1])]
    save_webp(path.with_suffix(".webp"), np.stack([np.array(page) for page in playing]))


# ---------------------------------------------------------------------------------------------------------------------
# Latent folders on disk

LARGEST = 64e9  # bytes of a shard that is read whole
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # dtypes that may be stored, by safetensors' names


def write_shard(path: Path, samples: list[dict], made_by="") -> None:
    """Write a shard of a LatentFolder, whose docstring has the format; only a complete file ever appears at `path`.

    samples: dicts of `latents` (f c h w; in all or in none), `text` (l d), `caption` (str). Tensors are stored in the
    dtype they come in: bfloat16 halves the disk space of float32. made_by: a word for the header. ValueError if some
    have latents and some have not.
    """
    if len({"latents" in sample for sample in samples}) != 1:
        raise ValueError("got samples with latents and some without, or no sample, expected one kind in a shard")
    kinds = ("latents", "text") if "latents" in samples[0] else ("text",)
    about = {"captions": [sample["caption"] for sample in samples],
             "crc32": [checksum(*[sample[kind] for kind in kinds]) for sample in samples],
             **({"made_by": made_by} if made_by else {})}
    write_tensors(path, {f"{i}.{kind}": sample[kind] for i, sample in enumerate(samples) for kind in kinds}, about,
                  checked=False)  # its samples are, one by one


def read_shard(path: Path) -> list[dict]:
    """The samples that write_shard wrote, tensors in float32. ValueError if one is damaged, or it is another file."""
    try:
        if Path(path).stat().st_size > LARGEST:
            raise OSError(f"it has {Path(path).stat().st_size / 1e9:.0f} GB")
        with safe_open(path, "pt") as f:
            about, names, samples = header_of(f), set(f.keys()), []
            for i, (caption, crc) in enumerate(zip(about["captions"], about["crc32"], strict=True)):
                stored = {k: f.get_tensor(f"{i}.{k}") for k in ("latents", "text") if f"{i}.{k}" in names}
                if checksum(*stored.values()) != crc:
                    raise OSError(f"the bytes of sample {i} do not match its crc32")
                if not isinstance(caption, str) or any(len(x.shape) != (2 if k == "text" else 4) or x.shape[0] == 0
                                                       for k, x in stored.items()):
                    raise ValueError(f"sample {i} has the caption {caption!r} and shapes "
                                     f"{[tuple(x.shape) for x in stored.values()]}")
                samples.append({k: finite(x) for k, x in stored.items()} | {"caption": caption})
        return samples
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, MemoryError) as e:
        raise ValueError(f"got no readable {path} ({type(e).__name__}: {e}), expected a complete file of "
                         "clips or prompts (data.write_shard)") from e


def write_null(path: Path, text: Tensor) -> None:
    """Write null.safetensors or empty.safetensors of a LatentFolder: text `l d`, the embedding of what guidance leads
    away from (the negative prompt, or the empty one), or of the empty prompt."""
    write_tensors(path, {"text": text}, {})


def finite(x: Tensor) -> Tensor:
    """x as float32; OSError if it has non-finite values, or none that are real numbers."""
    if not x.is_floating_point():
        raise OSError(f"it holds {x.dtype}, no floating point numbers")
    x = x.float()
    if not x.isfinite().all():
        raise OSError("it holds non-finite values")
    return x


@lru_cache(maxsize=2)  # a batch may reach from one epoch into the next
def permutation(n: int, *key: int) -> Tensor:
    """A random order of n samples that is a function of n and `key` only."""
    return torch.randperm(n, generator=generator(*key))


@lru_cache(maxsize=2)
def open_folder(*how) -> "LatentFolder":
    """LatentFolder(*how), opened once."""
    return LatentFolder(*how)


class LatentFolder:
    """Encoded clips and their text embeddings in a folder, drawn in a random order that is known in advance.

    The folder holds `*.safetensors` files, the shards, each complete in itself. A shard of n samples holds

        0.latents, 1.latents, ... (n-1).latents    `f c h w`, what the VAE gave for the clip, scaled for the network
        0.text, 1.text, ... (n-1).text             `l d`, what the text encoder gave for the caption, without padding
        metadata "about"                           a JSON text: {"captions": [n strings], "crc32": [n integers]}

    in any floating point dtype. crc32 is zlib.crc32 of a sample's bytes, first those of its latents, then those of its
    text, as they lie in the file. A folder for stages that need no video has no latents in any shard (prompts-only).
    Two more files hold a tensor `text` (`l d`): `null.safetensors` what guidance leads away from, the negative prompt
    (or the empty one), embedded; `empty.safetensors`, needed for --prompt-dropout alone, the empty prompt.
    To convert a data set, write a shard for every few hundred clips; then read them back:

        data.write_shard("videos/0000.safetensors", [{"latents": x0, "text": text, "caption": "a cat"}, ...])
        data.write_null("videos/null.safetensors", text_of_negative_prompt)
        x0, text = data.LatentFolder("videos", (21, 16, 60, 104), (512, 4096)).clips(range(8), seed)

    shape: (f, c, h, w) wanted; longer clips are cut to their first f frames. text_shape: (l, d) wanted; shorter texts
    are padded with zeros. Opening reads headers only; files are memory-mapped, and a draw reads just its samples.

    A position says how many samples were drawn before since training began: step * batch + index in the global batch.
    Every n positions are an epoch, a permutation of all n samples by `key` and the number of the epoch. So ranks that
    take different positions share no sample within an epoch, and a resumed run needs no state.

    on_bad: what to do about a shard that cannot be read, and a sample with a wrong crc32 or non-finite values. "stop":
    ValueError. "skip": go on without the shard, and with the next sound sample of the same epoch in place of the bad
    one; each is named once on stderr, and `skipped` counts how often a bad sample was passed over.

    ValueError, naming file and sample, if a shape or dtype does not fit, and if there is nothing to read.
    """

    def __init__(self, path: Path, shape: tuple, text_shape: tuple, on_bad: str = "stop"):
        if on_bad not in ("stop", "skip"):
            raise ValueError(f"got {on_bad!r}, expected stop or skip: change --bad-data")
        self.path, self.shape, self.text_shape, self.on_bad = Path(path), tuple(shape), tuple(text_shape), on_bad
        self.captions, self.skipped, self.has_latents = [], 0, None
        self._samples, self._bad, self._files, self._identity = [], set(), {}, []
        for shard in sorted(self.path.glob("*.safetensors")):
            if shard.name in ("null.safetensors", "empty.safetensors"):
                continue
            try:
                captions, crcs, has_latents = self._header(shard)
            except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as e:
                self._complain(f"shard {shard} ({type(e).__name__}: {e})")
                continue
            if self.has_latents not in (None, has_latents):
                raise ValueError(f"got {shard} {'with' if has_latents else 'without'} latents, expected all shards of "
                                 "a folder to have them, or none: change --data")
            self.has_latents = has_latents
            self.captions += captions
            self._samples += [(shard, i, crc) for i, crc in enumerate(crcs)]
            self._identity.append((shard.name, shard.stat().st_size, crcs))
        if not self._samples:
            raise ValueError(f"got no readable sample in {self.path}, expected *.safetensors files as "
                             "data.LatentFolder describes them: change --data")

    def __len__(self) -> int:
        return len(self._samples)

    def clips(self, positions, *key: int) -> tuple[Tensor, Tensor]:
        """The samples at `positions`, whole numbers, in the order of `key`: x0 `b f c h w`, text `b l d`, float32.

        ValueError if the folder is prompts-only, and for damage, see on_bad.
        """
        if not self.has_latents:
            raise ValueError(f"got the prompts-only folder {self.path}, expected latents: this stage needs video: "
                             "change --data")
        x0, text = zip(*[self._draw(int(p), key) for p in positions])
        return torch.stack(x0), torch.stack(text)

    def texts(self, positions, *key: int) -> Tensor:
        """Their text alone, float32 `b l d`. Latents are verified as well, so that the samples are those of `clips`."""
        return torch.stack([self._draw(int(p), key)[1] for p in positions])

    @cached_property
    def null_text(self) -> Tensor:
        """The embedding of what guidance leads away from, float32 `l d`. ValueError if it cannot be read."""
        return self._text_in("null.safetensors", "of the empty or the negative prompt, for guidance: write it with "
                             "data.write_null, or change --data")

    @cached_property
    def empty_text(self) -> Tensor:
        """The embedding of the empty prompt, float32 `l d`. ValueError if it cannot be read."""
        return self._text_in("empty.safetensors", "of the empty prompt, with which clips are trained whose prompt is "
                             "dropped: write it with data.write_null, or give --prompt-dropout 0")

    def _text_in(self, name, expected):
        path = self.path / name
        try:
            with safe_open(path, "pt") as f:
                self._check(f"text in {path}", "text", f.get_slice("text"))
                return self._padded(finite(f.get_tensor("text")))
        except (SafetensorError, OSError) as e:
            raise ValueError(f"got no readable {path} ({e}), expected the embedding `l d` {expected}") from e

    def digest(self) -> str:
        """A short hex string of the shards' names, sizes, sample counts and checksums: equal for equal data."""
        return hashlib.sha256(json.dumps(self._identity).encode()).hexdigest()[:12]

    def _header(self, shard):
        """Captions, crc32, and whether there are latents, after all that the header tells has been checked."""
        with safe_open(shard, "pt") as f:
            try:
                about, names = header_of(f), set(f.keys())
            except ValueError as e:
                raise OSError(str(e)) from e
            n, kinds = len(about["captions"]), ("latents", "text") if "0.latents" in names else ("text",)
            if not all(isinstance(caption, str) for caption in about["captions"]) or not all(
                    isinstance(crc, int) for crc in about["crc32"]):
                raise OSError("its captions are not all text, or its checksums no numbers")
            if n == 0 or n != len(about["crc32"]) or names != {f"{i}.{kind}" for i in range(n) for kind in kinds}:
                raise OSError(f"its {len(names)} tensors, captions and crc32 do not make samples 0 to n-1")
            for i in range(n):
                for kind in kinds:
                    self._check(f"{kind} of sample {i} in {shard}", kind, f.get_slice(f"{i}.{kind}"))
        return about["captions"], about["crc32"], "latents" in kinds

    def _check(self, what, kind, stored):
        """stored: a safetensors slice, which knows dtype and shape before anything is read."""
        dtype, got = stored.get_dtype(), tuple(stored.get_shape())
        if dtype not in FLOATS:
            raise ValueError(f"got {what} of dtype {dtype}, expected one of {', '.join(FLOATS)}: change --data")
        if kind == "latents" and (got[1:] != self.shape[1:] or got[0] < self.shape[0]):
            raise ValueError(f"got {what} of shape {got}, expected {self.shape} or longer: change --frames, --height, "
                             "--width, --size or --data")
        if kind == "text" and (got[1:] != self.text_shape[1:] or got[0] > self.text_shape[0]):
            raise ValueError(f"got {what} of shape {got}, expected {self.text_shape} or shorter: change --size or "
                             "--data")

    def _draw(self, position, key):
        """Latents (None if there are none) and text at a position, or of the next sound sample of its epoch."""
        n = len(self)
        epoch, start = divmod(position, n)
        order = permutation(n, *key, epoch)
        for i in range(n):
            sample = self._samples[order[(start + i) % n]]
            try:
                if sample not in self._bad:
                    return self._read(*sample)
            except (SafetensorError, OSError) as e:
                self._complain(f"sample {sample[1]} of {sample[0]} ({e})")
                self._bad.add(sample)
            self.skipped += 1
        raise ValueError(f"got only damaged samples in {self.path}, expected at least a sound one: change --data")

    def _read(self, shard, i, crc):
        if shard not in self._files:
            self._files[shard] = safe_open(shard, "pt")
        stored = [self._files[shard].get_tensor(f"{i}.{kind}") for kind in ("latents", "text")[not self.has_latents:]]
        if checksum(*stored) != crc:
            raise OSError("its bytes do not match its crc32")
        *x0, text = [finite(x) for x in stored]
        return x0[0][:self.shape[0]] if x0 else None, self._padded(text)

    def _padded(self, text):
        return torch.nn.functional.pad(text, (0, 0, 0, self.text_shape[0] - len(text)))

    def _complain(self, damaged):
        if self.on_bad == "stop":
            raise ValueError(f"got the damaged {damaged}, expected it complete and finite: write the file again, or "
                             "give --bad-data skip")
        print(f"warning: left out the damaged {damaged}", file=sys.stderr)
