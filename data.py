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
"""

import math
import os
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

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
    """Latents of the toy world `... 3 h w` to bytes `... h w 3`, enlarged."""
    x = (to_rgb(x).clamp(0, 1) * 255).round().byte().cpu()
    x = x.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    return rearrange(x, "... c h w -> ... h w c").numpy()


def save_webp(path: Path, frames: np.ndarray, seconds_per_frame: float = 0.2) -> None:
    """An animated WebP that loops, from bytes `f h w 3`."""
    first, *rest = [Image.fromarray(frame) for frame in frames]
    fresh = path.with_name(path.name + ".writing")
    first.save(fresh, "webp", save_all=True, append_images=rest, duration=round(1000 * seconds_per_frame), loop=0,
               quality=90)
    os.replace(fresh, path)


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

    frames = {label: np.pad(pixels(x), [(0, 0)] * 2 + [(0, 2), (0, 2), (0, 0)]) for label, x in rows.items()}
    still = {label: rearrange(x[:2], "b f h w c -> h (b f w) c") for label, x in frames.items()}
    labelled(still).save(path.with_suffix(".png"))
    playing = [labelled({label: rearrange(x[:, i], "b h w c -> h (b w) c") for label, x in frames.items()})
               for i in range(next(iter(frames.values())).shape[1])]
    save_webp(path.with_suffix(".webp"), np.stack([np.array(page) for page in playing]))
