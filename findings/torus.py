"""A world of pixels whose history adds up: a square without walls, over which a ball or a quilt is blown.

What leaves the square on one side comes in on the other, so that nothing ever brings it back, and a bias of its motion
adds up. The prompt is a colour and a wind; a frame is SPEED pixels from the one before. A ball flies with the wind, or,
each time with probability 1 - LIKELY, against it. A quilt has four quarters of different colours, of which the prompt
tells one: the others stand in the past alone. It flies straight and takes a new direction, around the wind's, before a
frame with probability TURN.

`World` draws and measures it. `along_the_world` is how far balls come along the wind, and `guided_way` how far with
guidance w, where p(step | wind, past)^w p(step | past)^(1 - w) is drawn from: both exactly.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from worlds import WORLDS
from worlds.draws import WORLD, generator
from worlds.toy import (COLOURS, EDGE, MEAN, RADIUS, SIZE, SPEED, STD, TEXT_DIM, TURN, enlarged, speeds_and_turns,
                        wasserstein)

WINDS = {"east": 0.0, "south": math.pi / 2, "west": math.pi, "north": -math.pi / 2}  # directions; rows count downwards
LIKELY = 0.7  # probability that a ball flies with the wind
GUST = 1.2  # radians; standard deviation of a quilt's new direction around the wind's
HALF = 3.0  # pixels; half the side of a quilt
PAINTS = torch.tensor(list(COLOURS.values())).float()


# ---------------------------------------------------------------------------------------------------------------------
# Images


def render(colours: Tensor, xy: Tensor) -> Tensor:
    """Objects in RGB from 0 to 1, `... 3 h w`. colours: integers `... 1` of a ball, or `... 4` of the quarters of a
    quilt, row by row; xy: centres, pixels `... 2`, column, row."""
    dx, dy = away_from(xy)
    paints = PAINTS[colours][..., None, None]  # (... n 3 1 1)
    if colours.shape[-1] == 1:
        paint, depth = paints.squeeze(-4), RADIUS - (dx**2 + dy**2).sqrt()
    else:
        right, below = (torch.sigmoid(d / EDGE)[..., None, :, :] for d in (dx, dy))  # (... 1 1 w), (... 1 h 1)
        above, under = (torch.lerp(*of_row.unbind(-4), right) for of_row in paints.split(2, dim=-4))
        paint = torch.lerp(above, under, below)
        depth = HALF - torch.maximum(dx.abs(), dy.abs())
    return torch.sigmoid(depth / EDGE)[..., None, :, :] * paint


def away_from(xy: Tensor) -> tuple[Tensor, Tensor]:
    """How far pixels lie to the right of centres `... 2` and below them, by the shorter way: `... 1 w`, `... h 1`."""
    away = folded(torch.arange(SIZE) + 0.5 - xy[..., None])
    return away[..., 0, None, :], away[..., 1, :, None]


def folded(distance: Tensor) -> Tensor:
    """Distances by the shorter way round, from -SIZE / 2 to SIZE / 2."""
    return (distance + SIZE / 2) % SIZE - SIZE / 2


@torch.no_grad()
def nearest(rgb: Tensor, colours: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The object in each frame `... 3 h w`: its centre `... 2`, its colours `... n`, and how far the frame is from it,
    the mean squared distance `...`. colours: those of balls, or None for quilts, whose colours are looked for.

    The centre is where the phase of the lowest frequency of the light puts it; of a quilt, whose seams are dark, the
    nearest one is then looked for around there."""
    light, wave = rgb.amax(-3), torch.exp(2j * math.pi * (torch.arange(SIZE) + 0.5) / SIZE)
    xy = torch.stack([(light.sum(axis) * wave).sum(-1).angle() for axis in (-2, -1)], -1) * SIZE / (2 * math.pi)
    around = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 2)
    for step in (1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64) if colours is None else ():
        near = xy[..., None, :] + step * around  # (... 9 2)
        there = colours_at(rgb, xy)[..., None, :].expand(*near.shape[:-1], 4)
        pick = (render(there, near) - rgb[..., None, :, :, :]).square().mean((-3, -2, -1)).argmin(-1)
        xy = near.gather(-2, pick[..., None, None].expand(*pick.shape, 1, 2)).squeeze(-2)
    colours = colours_at(rgb, xy) if colours is None else colours
    return xy, colours, (render(colours, xy) - rgb).square().mean((-3, -2, -1))


def colours_at(rgb: Tensor, xy: Tensor) -> Tensor:
    """The colours of the quarters, `... 4`, of quilts whose centres are at xy `... 2`."""
    dx, dy = away_from(xy)
    quarters = [((side_x * dx > 0.5) & (side_x * dx < HALF - 0.5) & (side_y * dy > 0.5) & (side_y * dy < HALF - 0.5))
                for side_y in (-1, 1) for side_x in (-1, 1)]
    seen = torch.stack([(rgb * q[..., None, :, :]).sum((-2, -1)) / q.sum((-2, -1))[..., None].clamp(1)
                        for q in quarters], -2)  # (... 4 3)
    return torch.cdist(seen, PAINTS).argmin(-1)


# ---------------------------------------------------------------------------------------------------------------------
# The world

@dataclass(frozen=True)
class World:
    """The square as the rest of the project sees it. A label is colour * 4 + wind. quilts: the objects are quilts, and
    the colour is that of the upper left quarter. The latents are scaled to unit variance (of balls 1.5)."""

    quilts: bool = False
    latent_shape = (3, SIZE, SIZE)  # c h w
    text_shape = (2, TEXT_DIM)  # l d
    prompts = [f"{colour} {wind}" for colour in COLOURS for wind in WINDS]

    @property
    def light(self) -> tuple[float, float]:
        """Mean and standard deviation of RGB values."""
        return (0.158, 0.286) if self.quilts else (MEAN, STD)

    def flights(self, indices, frames: int, *key: int) -> tuple[Tensor, Tensor]:
        """Random flights: centres in pixels `b frames 2`, not folded, and labels `b`."""
        u = torch.stack([torch.rand(frames, 4, generator=generator(*key, i)) for i in indices])
        labels = (u[:, 0, 3] * len(self.prompts)).long()
        wind = torch.tensor(list(WINDS.values()))[labels % len(WINDS)]
        if self.quilts:
            gust, turn = GUST * math.sqrt(2) * torch.erfinv(2 * u[:, :, 1].clamp(1e-6, 1 - 1e-6) - 1), TURN
        else:
            gust, turn = math.pi * (u[:, :, 1] > LIKELY), 1.0
        at, angle = [SIZE * u[:, 0, (0, 2)]], wind + gust[:, 0]
        for i in range(1, frames):
            angle = torch.where(u[:, i, 0] < turn, wind + gust[:, i], angle)
            at.append(at[-1] + SPEED * torch.stack([angle.cos(), angle.sin()], -1))
        return torch.stack(at, 1), labels

    def clips(self, indices, frames: int, *key: int) -> tuple[Tensor, Tensor]:
        """The same, drawn: x `b frames 3 SIZE SIZE`, labels `b`."""
        xy, labels = self.flights(indices, frames, *key)
        colours = (labels // len(WINDS))[:, None]
        if self.quilts:
            hidden = [torch.randint(len(COLOURS), (3,), generator=generator(*key, i, 1)) for i in indices]
            colours = torch.cat([colours, torch.stack(hidden)], 1)
        mean, std = self.light
        return (render(colours[:, None].expand(-1, frames, -1), xy) - mean) / std, labels

    def draw_labels(self, n: int, frames: int, g: torch.Generator) -> Tensor:
        return torch.randint(len(self.prompts), (n,), generator=g)

    def embed(self, labels) -> Tensor:
        """Words `b 2 TEXT_DIM`, one-hot."""
        labels = torch.as_tensor(labels)
        words = torch.stack([labels // len(WINDS), labels % len(WINDS) + len(COLOURS)], -1)
        return 8.0 * torch.nn.functional.one_hot(words, TEXT_DIM).float()

    @torch.no_grad()
    def track(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of clips `b f 3 SIZE SIZE`: centres, not folded, `b f 2`, colours `b f n` and the mean squared distance of
        each frame to the nearest valid one `b f`. ValueError on clips that are not finite."""
        if not x.isfinite().all():
            raise ValueError("got non-finite pixels in generated clips, expected finite ones: the model has diverged")
        mean, std = self.light
        told = (labels // len(WINDS))[:, None, None].expand(-1, x.shape[1], -1)
        xy, colours, distance = nearest(x.float().cpu() * std + mean, None if self.quilts else told)
        xy = torch.cat([xy[:, :1], xy[:, :1] + folded(xy.diff(dim=1)).cumsum(1)], dim=1)
        return xy, colours, distance / std**2

    def measure(self, x: Tensor, labels: Tensor, since: int = 0) -> dict:
        """Of the frames from `since` on of clips `b f 3 SIZE SIZE`: render_error, motion and motion_w1 as in
        worlds/toy.py (the step into frame `since` counts); kept, the share of the quarters without the one in the
        prompt that have the colour they had in the first frame of the clip (of balls nan)."""
        xy, colours, distance = self.track(x, labels)
        (speed, turn), (true_speed, true_turn) = speeds_and_turns(xy[:, max(0, since - 1) :]), true_motion(self)
        return {"render_error": distance[:, since:].mean().item(), "motion": (speed.mean() / SPEED).item(),
                "motion_w1": wasserstein(speed, true_speed) + wasserstein(turn, true_turn),
                "kept": (colours == colours[:, :1])[:, max(1, since) :, 1:].float().mean().item()}

    def draw(self, x: Tensor, scale: int = 5):
        """Latents `... 3 h w` to bytes `... h w 3`, enlarged."""
        mean, std = self.light
        return enlarged(x * std + mean, scale)


@lru_cache(maxsize=2)
def true_motion(world: World) -> tuple[Tensor, Tensor]:
    """Speeds and turns of a world."""
    return speeds_and_turns(world.flights(range(4096), 8, WORLD)[0])


BALLS, QUILTS = World(), World(quilts=True)
WORLDS |= {"torus": BALLS, "quilts": QUILTS}  # for recipe.py; train.py's command does not know them


# ---------------------------------------------------------------------------------------------------------------------
# Motion

def come_along(xy: Tensor, labels: Tensor) -> Tensor:
    """How far objects have come along their wind since the first frame, pixels, `b f`; centres `b f 2`, not folded."""
    wind = torch.tensor(list(WINDS.values()))[labels % len(WINDS)]
    return ((xy - xy[:, :1]) @ torch.stack([wind.cos(), wind.sin()], -1)[..., None]).squeeze(-1)


def along_the_world(frame: int) -> tuple[float, float]:
    """Mean and standard deviation of the same of the world's balls, at frame 1, 2, ..."""
    steps = frame - 1
    return SPEED * (2 * LIKELY - 1) * steps, 2 * SPEED * math.sqrt(LIKELY * (1 - LIKELY) * steps)


def guided_way(w: float, frames: int, window: int = 8) -> Tensor:
    """The mean of the same, `frames`, if every step of a ball is drawn from

        p(step | wind, past)^w p(step | past)^(1 - w),     normalised

    Without a prompt the past tells the wind, by the steps that the window shows. A guided velocity does not quite lead
    there, but nearly, where the two futures are as far apart as here."""
    signs, p, way = torch.zeros(1, 0, dtype=torch.float64), torch.ones(1, dtype=torch.float64), [0.0]  # of pasts
    for _ in range(frames - 1):
        wind = torch.sigmoid(signs.sum(1) * math.log(LIKELY / (1 - LIKELY)))  # p(this wind, not the opposite | past)
        unprompted = wind * LIKELY + (1 - wind) * (1 - LIKELY)
        with_it, against = LIKELY**w * unprompted ** (1 - w), (1 - LIKELY) ** w * (1 - unprompted) ** (1 - w)
        chance = with_it / (with_it + against)
        way.append(way[-1] + SPEED * (p * (2 * chance - 1)).sum().item())
        p = torch.stack([p * chance, p * (1 - chance)], 1).flatten()
        signs = torch.stack([torch.cat([signs, torch.full((len(signs), 1), s).double()], 1) for s in (1, -1)], 1)
        signs = signs.flatten(0, 1)
        if signs.shape[1] > window - 2:  # the first step is no longer seen: pasts that differ in it alone become one
            p, signs = p.unflatten(0, (2, -1)).sum(0), signs.unflatten(0, (2, -1))[0, :, 1:]
    return torch.tensor(way, dtype=torch.float64)
