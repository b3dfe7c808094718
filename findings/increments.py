"""A walk: the smallest video whose next frame has two futures, with teachers that are exact.

A frame is one number, the place of a walker, and its next step d goes to the left or to the right, equally often:

    x^i = x^{i-1} + d^i,     d^i = -1 or +1, plus WIDTH times normal noise,     x^0 = 0,     FRAMES frames

Given the past, n frames are one of 2^n Gaussians around x^{i-1}: the autoregressive teacher. A whole clip is one of
2^FRAMES: the bidirectional teacher. Both velocities are exact, so what a student gets wrong is its own.

A chunk of n frames is one frame of n channels here: a clip is `FRAMES/n n 1 1`, and networks and losses are called with
chunk=1. Students are MLPs, the same one for every seed, side by side in one batch `(seeds b)`, as in mixture.py. They
see their noisy chunk, and the frame before it with the time of its noise: 0, clean, in teacher forcing and in rollouts,
or the past's own time, for a student of the bidirectional teacher (diffusion forcing).

Training calls the project's losses and no others, with settings chosen once for all students, on other seeds.
"""

import copy
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.causal import ode_loss, trajectory
from causal_cd import causal_cd_loss, draw_index
from config import Config
from findings.mixture import descend, follow, optimizer
from flowmap import flow_matching_loss, per_frame, schedule
from rollout import grids, joined, shared_noise, stream
from stage import lr_factor
from worlds.draws import generator

FRAMES, WIDTH, SHIFT = 6, 0.2, 5.0
BATCH, LR, EMA, START_UPDATES = 64, 3e-3, 0.9, 800
TEACHER_STEPS, STORED_STEPS = 48, 4  # steps of a trajectory, and how many of its states are kept
WEIGHTS, DATA, TRAINING, EVALUATION = range(4)  # what random numbers are for


# ---------------------------------------------------------------------------------------------------------------------
# The world

class Walk:
    """n places after a start: 2^n Gaussians with one covariance, width^2 A A^T, A the sums."""

    def __init__(self, n: int, distance: float = 1.0, width: float = WIDTH):
        self.n, self.distance, self.width, sums = n, distance, width, torch.ones(n, n).tril()
        turns = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * n).reshape(-1, n)
        self.variances, self.basis = torch.linalg.eigh(width**2 * sums @ sums.T)
        self.centres = distance * turns @ sums.T @ self.basis  # (2^n n), in the basis of the covariance

    def draw(self, b: int, g) -> Tensor:
        """Walks from 0, `b n`."""
        turns = 2.0 * torch.randint(2, (b, self.n), generator=g) - 1
        return (self.distance * turns + self.width * torch.randn(b, self.n, generator=g)).cumsum(1)

    def velocity(self, x: Tensor, t: Tensor, start: Tensor) -> Tensor:
        """E[eps - x_0 | x_t] of x `b n`, at t `b 1`, of walks from start `b 1`: exact, the mean over all turns."""
        variances, basis, centres = (of.to(x) for of in (self.variances, self.basis, self.centres))
        y, spread = (x - (1 - t) * start) @ basis, (1 - t) ** 2 * variances + t**2  # (b n)
        log_share = (1 - t) * (y / spread) @ centres.T - (1 - t) ** 2 / 2 * (1 / spread) @ centres.T.square()
        centre = log_share.softmax(1) @ centres
        v = (t - (1 - t) * variances) / spread * (y - (1 - t) * centre) - centre
        return v @ basis.T - start


def clips(places: Tensor, n: int) -> Tensor:
    """Clips `b FRAMES/n n 1 1` of places `b FRAMES`."""
    return places.unflatten(-1, (-1, n))[..., None, None]


def before(x: Tensor) -> Tensor:
    """The frame before each chunk of a clip `b f n 1 1`: `b f`. Before the first there is 0."""
    return F.pad(x[:, :-1, -1, 0, 0], (1, 0))


def causal_teacher(n: int):
    """The autoregressive teacher of chunks of n frames, behind the clean past."""
    walk = Walk(n)

    def net(x, t, text, clean, chunk=1):
        v = walk.velocity(x.flatten(0, 1)[..., 0, 0], per_frame(t, x).reshape(-1, 1), before(clean).reshape(-1, 1))
        return v.reshape(x.shape)
    return net


def bidirectional_teacher(walk: Walk):
    """The teacher of whole clips, all frames at one time."""
    def net(x, t, text=None):
        t = per_frame(t, x)[:, :1]
        return walk.velocity(x.flatten(1), t, torch.zeros_like(t)).reshape(x.shape)
    return net


def trajectories(teacher, noise: Tensor, *clean: Tensor) -> Tensor:
    """Of a teacher net(x, t, None, *clean), by TEACHER_STEPS Euler steps: `b k+1 f n 1 1`, the states at T^(k), k =
    STORED_STEPS, and the ends."""
    grid, keep = schedule(TEACHER_STEPS, SHIFT), TEACHER_STEPS // STORED_STEPS
    return torch.cat([trajectory(lambda x, t, past=past: teacher(x, t, None, *past), part, grid, keep)
                      for part, *past in zip(*(x.split(4096) for x in (noise, *clean)))])  # parts, to save memory


# ---------------------------------------------------------------------------------------------------------------------
# Networks

class Nets(nn.Module):
    """One MLP for each seed: features `(seeds b) n_in` and times `(seeds b) times` -> `(seeds b) n_out`."""

    def __init__(self, seeds, n_in: int, times: int, n_out: int, width: int):
        super().__init__()
        self.seeds, sizes = len(seeds), [n_in + 9 * times, width, width, width, n_out]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList(torch.zeros(len(seeds), 1, n) for n in sizes[1:])
        for i, (a, b) in enumerate(zip(sizes, sizes[1:])):
            weight = [torch.randn(a, b, generator=generator(seed, WEIGHTS, i)) for seed in seeds]
            self.weights.append(torch.stack(weight) * (0.1 if i == 3 else 1) / a**0.5)

    def mlp(self, x: Tensor, t: Tensor) -> Tensor:
        waves = [f(k * math.pi * t) for k in (0.5, 1, 2, 4) for f in (torch.sin, torch.cos)]
        h = torch.cat([x, t, *waves], 1).unflatten(0, (self.seeds, -1))
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            h = torch.baddbmm(bias, h if i == 0 else F.silu(h), weight)
        return h.flatten(0, 1)


class Student(Nets):
    """A causal network, with model.py's contract: teacher forcing with clean, diffusion forcing without, or a cache."""

    def __init__(self, seeds, n: int, width: int = 64):
        super().__init__(seeds, n + 1, 2, n, width)

    def new_cache(self):
        return SimpleNamespace(next_frame=0, last=0.0)

    def append(self, cache, x0, text):
        cache.next_frame, cache.last = cache.next_frame + 1, x0[:, :, -1, 0, 0]

    def forward(self, x, t, text, *, chunk=1, clean=None, cache=None):
        t = per_frame(t, x)
        past, past_t = before(x if clean is None else clean), torch.zeros_like(t)
        if cache is not None:
            if clean is not None:
                self.append(cache, clean, text)
            past = past_t + cache.last
        elif clean is None:
            past_t = F.pad(t[:, :-1], (1, 0))
        seen, times = torch.cat([x[..., 0, 0], past[..., None]], -1), torch.stack([t, past_t], -1)
        return self.mlp(seen.flatten(0, 1), times.flatten(0, 1)).reshape(x.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Training: one network for every seed; each function returns its average

def generators(seeds, *of: int) -> list[torch.Generator]:
    return [generator(seed, *of) for seed in seeds]


def real(n: int, gens, b: int = BATCH) -> Tensor:
    """b clips of every seed."""
    walk = Walk(FRAMES)
    return torch.cat([clips(walk.draw(b, g), n) for g in gens])


def normal(x0: Tensor, gens, *axes: int) -> Tensor:
    """Noise `(seeds b) *axes ...` for clips x0 `(seeds b) ...`."""
    return torch.cat([torch.randn(len(x0) // len(gens), *axes, *x0.shape[1:], generator=g) for g in gens])


def rows(stored: int, gens) -> Tensor:
    """A batch of every seed from its own `stored` clips."""
    return torch.cat([i * stored + torch.randint(stored, (BATCH,), generator=g) for i, g in enumerate(gens)])


def started(net):
    return copy.deepcopy(net).requires_grad_(True)


def regress(net, loss_of, seeds, updates: int, lr: float = LR, ema=None):
    """Descend loss_of(generators). ema: the average, where the loss calls it."""
    ema, opt, gens = ema or copy.deepcopy(net), optimizer(net), generators(seeds, TRAINING)
    for update in range(updates):
        descend(opt, loss_of(gens), seeds, lr * lr_factor(Config(), update, updates))
        follow(ema, net, update, EMA)
    return ema.requires_grad_(False)


def teacher_forcing(seeds, n: int, updates: int, width: int = 64) -> Student:
    """Stage 1, the multi-step autoregressive diffusion model that every student starts from."""
    net = Student(seeds, n, width)

    def loss_of(gens):
        x0 = real(n, gens)
        t = torch.cat([torch.rand(BATCH, x0.shape[1], generator=g) for g in gens])
        return flow_matching_loss(net, x0, None, t, normal(x0, gens), chunk=1, clean=x0)[0]
    return regress(net, loss_of, seeds, updates)


def causal_cd(start: Student, seeds, n: int, updates: int, stored: int = 0) -> Student:
    """On new clips in every update, or on `stored` clips of every seed; always with new noise."""
    net, ema, teacher, grid = started(start), copy.deepcopy(start), causal_teacher(n), schedule(TEACHER_STEPS, SHIFT)
    kept = real(n, generators(seeds, DATA), stored)

    def loss_of(gens):
        x0 = kept[rows(stored, gens)] if stored else real(n, gens)
        index = torch.cat([draw_index(BATCH, x0.shape[1], 1, TEACHER_STEPS, g) for g in gens])
        return causal_cd_loss(net, ema, teacher, x0, None, grid, index, normal(x0, gens), 1)[0]
    return regress(net, loss_of, seeds, updates, ema=ema)


def ode(start: Student, seeds, n: int, updates: int, stored: int, bidirectional: bool = False) -> Student:
    """Causal or bidirectional ODE, on `stored` trajectories of every seed."""
    net, gens = started(start), generators(seeds, DATA)
    times, x0 = torch.cat([schedule(STORED_STEPS, SHIFT), torch.zeros(1)]), real(n, gens, stored)
    if bidirectional:
        states = trajectories(bidirectional_teacher(Walk(FRAMES)), normal(x0, gens))
    else:
        states = trajectories(causal_teacher(n), normal(x0, gens), x0)

    def loss_of(gens):
        row = rows(stored, gens)
        index = torch.cat([draw_index(BATCH, x0.shape[1], 1, STORED_STEPS + bidirectional, g) for g in gens])
        return ode_loss(net, states[row], times, index, None, chunk=1, clean=None if bidirectional else x0[row])[0]
    return regress(net, loss_of, seeds, updates)


def rollout(net: Student, noise: Tensor, steps: int, exit_step=None, first_exit=None) -> Tensor:
    """Clips of so many CM steps a chunk, at least 4 in the first. noise `b 4 f n 1 1`."""
    grid, first_grid = grids(steps, SHIFT)
    return joined(stream(net, shared_noise(noise, 1, steps, len(first_grid)), None, grid, num_chunks=noise.shape[2],
                         first_grid=first_grid, exit_step=exit_step, first_exit=first_exit))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring: the steps d of clips that students roll out, in all chunks but the first, which always has 4 CM steps

def true_steps(m: int) -> Tensor:
    """The m-quantiles of the world's steps."""
    at = torch.linspace(-3, 3, 60_001, dtype=torch.float64)
    below = sum(torch.special.ndtr((at - mean) / WIDTH) / 2 for mean in (-1, 1))
    return at[torch.searchsorted(below, (torch.arange(m, dtype=torch.float64) + 0.5) / m)].float()


@torch.no_grad()
def measured(net: Student, n: int, steps: int, b: int = 2000) -> dict[str, list[float]]:
    """For every seed: error, the Wasserstein-1 distance of the steps of each frame to the world's, mean over frames;
    motion, mean |d| over the world's; variety, twice the share of d within 3 WIDTH of -1, or of +1, which is rarer."""
    noise = torch.randn(b, 4, FRAMES // n, n, 1, 1, generator=generator(EVALUATION)).repeat(net.seeds, *[1] * 5)
    d = rollout(net, noise, steps).flatten(1).unflatten(0, (net.seeds, b)).diff(dim=2)[..., n - 1 :]
    error = (d.sort(1).values - true_steps(b)[:, None]).abs().mean((1, 2))
    near = torch.stack([((d - mean).abs() < 3 * WIDTH).float().mean((1, 2)) for mean in (-1, 1)])
    return {"error": error.tolist(), "motion": (d.abs().mean((1, 2)) / true_steps(b).abs().mean()).tolist(),
            "variety": (2 * near.min(0).values).tolist()}
