"""The toy world: clips of a coloured shape that flies, bounces and turns at random, and their exact measurement.

A clip is `f` frames of 10 x 10 RGB pixels, shifted and scaled to unit variance as the latents of a video model are.
Its prompt is two words, a colour and a shape. The shape starts anywhere, flies straight at SPEED pixels per frame,
bounces off the walls, and before every frame, with probability TURN, picks a new direction at random. So given the
past the next frame has many possible futures: their mean is a blur, and a model that predicts in one step what it can
only know on average draws that blur.

Since the renderer is known, any image can be inverted exactly: which shape, which colour, where. From that come,
with no learned metric, the numbers of every table of this project (`measure`):

    render_error      mean squared distance of a frame to the nearest valid render (lower is better, 0 is perfect)
    prompt_accuracy   fraction of clips that, all frames together, lie nearest to renders of their prompt
    motion            mean motion, pixels per frame, over the true world's (1: as lively as the world)
    drift             render error of the last frame over that of the third (1: no drift)
    motion_w1         how far the motion's distribution is from the world's: the Wasserstein-1 distance of speeds
                      (pixels per frame) plus that of turning angles (radians)
    brightness        mean of the pixels, minus the true world's (0: as bright; 1 is the world's standard deviation)
    contrast          standard deviation of the pixels and channels of a frame, averaged over frames, over the true
                      world's (1: as much contrast; above it, colours are too strong)

`Toy` is the world as the rest of the project sees it, whose words and labels only a world reads: a label is a row of a
tensor with the batch first, here the number of a prompt.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from worlds.draws import WORLD, generator

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
SHAPES = ("ball", "bar", "pole")
SIZE = 10  # pixels
RADIUS = 2.3  # pixels; also the closest that a centre comes to a wall
THICK = 1.05  # pixels; half the thickness of bar and pole
SPEED = 2.0  # pixels per frame
TURN = 0.5  # probability of a new direction before each frame
EDGE = 0.35  # pixels; softness of an edge, so that images depend smoothly on the position
MEAN, STD = 0.055, 0.18  # of the RGB values of this world, in [0, 1]
TEXT_DIM = 16
PROMPTS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


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
        images = render(colour[:, None].expand(-1, 9), shape[:, None].expand(-1, 9), near)
        distance, pick = (images - x[:, None]).square().flatten(2).mean(2).min(1)
        xy = near[torch.arange(len(x)), pick]
    return xy, distance, by_prompt / templates.shape[1]


def wasserstein(a: Tensor, b: Tensor) -> float:
    """Wasserstein-1 distance of two samples of a number, by their quantiles."""
    q = (torch.arange(200, dtype=a.dtype, device=a.device) + 0.5) / 200
    return (a.quantile(q) - b.quantile(q)).abs().mean().item()


def enlarged(rgb: Tensor, scale: int) -> np.ndarray:
    """RGB in [0, 1] `... 3 h w`, clipped, to bytes `... h w 3`, every pixel scale x scale times."""
    x = (rgb.clamp(0, 1) * 255).round().byte().cpu()
    x = x.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    return rearrange(x, "... c h w -> ... h w c").numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Measuring motion and light

def speeds_and_turns(xy: Tensor) -> tuple[Tensor, Tensor]:
    """Speeds (pixels per frame) and turning angles (radians in [0, pi]) of tracks `b f 2`, flattened over the batch."""
    step = xy.diff(dim=1)
    heading = torch.atan2(step[..., 1], step[..., 0])
    turn = (heading.diff(dim=1) + math.pi) % (2 * math.pi) - math.pi
    return step.norm(dim=-1).flatten(), turn.abs().flatten()


@lru_cache(maxsize=4)
def true_motion(world: "Toy", frames: int) -> tuple[Tensor, Tensor]:
    """Speeds and turns of a world, what those of generated clips are compared with."""
    return speeds_and_turns(world.tracks(range(4096), frames, WORLD)[0])


def mean_and_contrast(x: Tensor) -> tuple[float, float]:
    """Of clips `b f 3 h w`: the mean pixel, and the standard deviation within a frame, averaged over frames."""
    return x.mean().item(), x.flatten(2).std(2).mean().item()


@lru_cache(maxsize=4)
def true_light(world: "Toy", frames: int) -> tuple[float, float]:
    """Mean and contrast of a world, what those of generated clips are compared with."""
    return mean_and_contrast(world.clips(range(4096), frames, WORLD)[0])


# ---------------------------------------------------------------------------------------------------------------------
# The world

@dataclass(frozen=True)
class Toy:
    """A world of flying shapes. turn: probability of a new direction before each frame; speed: pixels per frame."""

    turn: float = TURN
    speed: float = SPEED
    latent_shape = (3, SIZE, SIZE)  # c h w
    text_shape = (2, TEXT_DIM)  # l d
    prompts = PROMPTS

    def tracks(self, indices, frames: int, *key: int) -> tuple[Tensor, Tensor]:
        """Random flights number `indices` of stream `key`: centres in pixels `b frames 2`, labels `b`."""
        u = torch.stack([torch.rand(frames, 4, generator=generator(*key, i)) for i in indices])
        labels = (u[:, 0, 3] * len(PROMPTS)).long()
        centres, angle = [RADIUS + (SIZE - 2 * RADIUS) * u[:, 0, :2]], 2 * math.pi * u[:, 0, 2]
        for i in range(1, frames):
            angle = torch.where(u[:, i, 0] < self.turn, 2 * math.pi * u[:, i, 1], angle)
            step = self.speed * torch.stack([angle.cos(), angle.sin()], dim=-1)
            straight = centres[-1] + step
            centres.append(bounce(straight))
            hit = (centres[-1] - straight).abs() > 1e-4
            step = torch.where(hit, -step, step)  # a wall mirrors the direction across it
            angle = torch.atan2(step[:, 1], step[:, 0])
        return torch.stack(centres, dim=1), labels

    def clips(self, indices, frames: int, *key: int) -> tuple[Tensor, Tensor]:
        """The same flights, drawn: x `b frames 3 SIZE SIZE`, labels `b`."""
        xy, labels = self.tracks(indices, frames, *key)
        shown = labels[:, None].expand(-1, frames)
        return render(shown // len(SHAPES), shown % len(SHAPES), xy), labels

    def draw_labels(self, n: int, frames: int, g: torch.Generator) -> Tensor:
        """Labels `n` of clips that are still to be made."""
        labels = torch.randint(len(PROMPTS), (n,), generator=g)
        return labels

    def embed(self, labels) -> Tensor:
        """Words `b 2 TEXT_DIM`: one token a word, one-hot, scaled so that cross-attention notices them early."""
        labels = torch.as_tensor(labels)
        colour, shape = labels // len(SHAPES), labels % len(SHAPES) + len(COLOURS)
        return 8.0 * torch.nn.functional.one_hot(torch.stack([colour, shape], -1), TEXT_DIM).float()

    def parse(self, prompt: str) -> int:
        """The label of a prompt; ValueError with the list of words for anything else."""
        words = prompt.lower().split()
        if len(words) != 2 or words[0] not in COLOURS or words[1] not in SHAPES:
            raise ValueError(f"got the prompt {prompt!r}, expected a colour of {', '.join(COLOURS)} and a shape of "
                             f"{', '.join(SHAPES)}, in quotes, for example \"red ball\": change --prompt")
        return PROMPTS.index(" ".join(words))

    @torch.no_grad()
    def measure(self, x: Tensor, labels: Tensor) -> dict:
        """All the metrics of this file's docstring, floats, and `render_error_by_frame`, a list of f.

        x: generated clips `b f 3 SIZE SIZE`; labels `b`. Raises ValueError on clips that are not finite.
        """
        b, f = x.shape[:2]
        if not x.isfinite().all():
            raise ValueError("got non-finite pixels in generated clips, expected finite ones: the model has diverged; "
                             "train it with a smaller learning rate")
        xy, error, by_prompt = invert(x.flatten(0, 1).float().cpu())
        (speed, turn), (true_speed, true_turn) = speeds_and_turns(xy.unflatten(0, (b, f))), true_motion(self, f)
        shown = by_prompt.unflatten(0, (b, f)).mean(1).argmin(1)
        by_frame = error.unflatten(0, (b, f)).mean(0)
        return {
            "render_error": by_frame.mean().item(),
            "prompt_accuracy": (shown == labels.cpu()).float().mean().item(),
            "motion": (speed.mean() / true_speed.mean()).item(),
            "drift": (by_frame[-1] / by_frame[min(2, f - 1)]).item(),
            "motion_w1": wasserstein(speed, true_speed) + wasserstein(turn, true_turn),
            "render_error_by_frame": by_frame.tolist(),
            **self.light(x),
        }

    def ask(self, *asked) -> dict:
        """Nothing beyond clips: every stage is measured on these alone."""
        return {}

    def columns(self, r: dict) -> dict[str, str]:
        """A row of the table as it is printed, header -> text. Raises KeyError, TypeError, ... if it lacks something.
        """
        by_frame = r["render_error_by_frame"]
        drift = f"{r['drift']:.2f}" if r["weights"] else "-"  # of frames without an error there is none
        return {"error": f"{r['render_error']:7.4f}", "frame 3": f"{by_frame[2]:7.4f}", "last": f"{by_frame[-1]:7.4f}",
                "drift": f"{drift:>5}", "prompt": f"{100 * r['prompt_accuracy']:5.1f}%",
                "motion": f"{r['motion']:6.2f}", "W1": f"{r['motion_w1']:6.3f}", "bright": f"{r['brightness']:+6.3f}",
                "contrast": f"{r['contrast']:8.3f}"}

    def light(self, x: Tensor) -> dict:
        """The metrics brightness and contrast of generated clips `b f 3 SIZE SIZE`."""
        (mean, contrast), (true_mean, true_contrast) = mean_and_contrast(x.float()), true_light(self, x.shape[1])
        return {"brightness": mean - true_mean, "contrast": contrast / true_contrast}

    def draw(self, x: Tensor, scale: int = 5) -> np.ndarray:
        """Latents `... 3 h w` to bytes `... h w 3`, enlarged."""
        return enlarged(to_rgb(x), scale)

    def from_rgb(self, rgb: Tensor) -> Tensor:
        """RGB in [0, 1] to latents."""
        return from_rgb(rgb)
