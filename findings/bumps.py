"""The world of adding bumps: a video whose frames add up, one-step students of it by causal CD and by causal DMD, and
the exact drift of their rollouts.

x^i = .95 x^{i-1} + d, x^0 = 0, for every number of a frame by itself. The increment d is +1 three times in five and -1
else, with a standard deviation of .2; without a condition both are equally likely. The teacher is causal, exact and
guided: it knows the past and the two bumps.

Students know how the past moves the frame, and learn the increment that they make of noise: G(y) is linear between the
values at n knots. Two knots are an affine student, which cannot bend, so that its increments are Gaussian; 25 can make
two bumps. The critic knows the law of what the student makes, as a mixture of 60 Gaussians: of as many equally likely
pieces of the noise, on each of which G is taken for linear.

What is random is drawn for each seed by its own generator, or put on nodes (`nodes`), which gives what the losses ask
for. All seeds side by side: clips and noises `b f c 1 1`, those of the first seed first; knots `s K n`.
"""

import math

import torch
from torch import Tensor

from causal_cd import causal_cd_loss
from dmd import dmd_loss, score_times
from findings.affine import BETAS, SCORE_SHIFT, mixture_velocity
from flowmap import expand_like, guided, schedule, shift_timesteps, to_x0

RHO, WIDTH = 0.95, 0.2
BUMPS, BOTH = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0]).double(), torch.tensor([1.0, -1.0]).double()
MEAN, VARIANCE = BUMPS.mean().item(), BUMPS.var(correction=0).item() + WIDTH**2  # of an increment
EDGE = 3.0  # knots are evenly spaced in [-3, 3]
CD_GRID = schedule(48, 5.0).double()
ONE = torch.ones(1).double()  # the grid of one step
PIECES, LR = 60, 0.05


# ---------------------------------------------------------------------------------------------------------------------
# Networks

def each(means: Tensor, variances: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """mixture_velocity of numbers that choose their law one by one. means, variances `n`, or `s n` for numbers y of s
    seeds, those of the first one first; t like y."""
    if means.ndim == 2:
        means, variances = (law.repeat_interleave(y.numel() // len(law), 0) for law in (means, variances))
    return mixture_velocity(means, variances, y.reshape(-1, 1, 1, 1, 1), t.reshape(-1)).reshape(y.shape)


def behind_the_past(velocity):
    """A causal network under teacher forcing, from the velocity(y, t) of the increment: x_0 = .95 past + d, so it is
    velocity - .95 past. The past of the first frame is 0."""
    def net(x, t, text=None, *, chunk, clean):
        past = RHO * torch.cat([torch.zeros_like(clean[:, :1]), clean[:, :-1]], 1)
        t = expand_like(t, x).expand_as(x)
        return velocity(x - (1 - t) * past, t) - past
    return net


def teacher_velocity(w: float):
    variances = torch.full((5,), WIDTH**2).double()
    return lambda y, t: guided(each(BUMPS, variances, y, t), each(BOTH, variances[:2], y, t), w)


def jump(knots: Tensor, y: Tensor, level: Tensor) -> Tensor:
    """G(y) of students knots `s K n`, linear on beyond the last knot. y: numbers of the first seed first; level: like
    y, an index below K."""
    n = knots.shape[-1]
    seed = torch.arange(len(knots)).repeat_interleave(y.numel() // len(knots)).reshape(y.shape)
    position = (y + EDGE) * (n - 1) / (2 * EDGE)
    left = position.floor().clamp(0, n - 2).long()
    part = position - left
    return (1 - part) * knots[seed, level, left] + part * knots[seed, level, left + 1]


def one_step(knots: Tensor, z: Tensor) -> Tensor:
    """The increments `s n` that students make of noise z `n`, the same for all, in one step from t = 1."""
    z = z.repeat(len(knots))
    return jump(knots[:, :1], z, torch.zeros_like(z).long()).reshape(len(knots), -1)


def student_velocity(knots: Tensor, grid: Tensor):
    def velocity(y, t):
        level = (t[..., None] - grid).abs().argmin(-1)
        return (y - jump(knots, y, level)) / t
    return velocity


def pieces(n: int) -> tuple[Tensor, Tensor]:
    """Means and variances of n equally likely pieces of N(0, 1)."""
    edges = torch.special.ndtri(torch.linspace(0, 1, n + 1, dtype=torch.float64))
    density = (-edges.square() / 2).exp() / math.sqrt(2 * math.pi)
    means = -n * density.diff()
    return means, 1 - n * (edges * density).nan_to_num().diff() - means**2


def exact_critic(knots: Tensor):
    """The velocity of what students make in one step."""
    means, variances = pieces(PIECES)
    low, middle, high = (one_step(knots, means + shift) for shift in (-1e-3, 0, 1e-3))
    variances = ((high - low) / 2e-3).square() * variances
    return lambda y, t: each(middle, variances, y, t)


# ---------------------------------------------------------------------------------------------------------------------
# Draws: clips, two noises, and timesteps of the scores

def random_numbers(seeds):
    """draw(b, f, c), each seed's own."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def of_one(g, b, f, c):
        noises = torch.randn(3, b, f, c, 1, 1, generator=g, dtype=torch.float64)
        frames = [torch.zeros(b, c, 1, 1).double()]
        for d in (BUMPS[torch.randint(5, (b, f, c, 1, 1), generator=g)] + WIDTH * noises[2]).unbind(1):
            frames.append(RHO * frames[-1] + d)
        return torch.stack(frames[1:], 1), *noises[:2], score_times(b, f, SCORE_SHIFT, g).double()

    return lambda *shape: tuple(torch.cat(of) for of in zip(*(of_one(g, *shape) for g in generators)))


def nodes(n: int, times: int):
    """The same draw for one seed as quadrature: for each of `times` timesteps a clip of one frame, whose channels are
    all pairs of n nodes (a multiple of 5) for clip and first noise, and n for the other noise."""
    normal, of_bump = (pieces(k)[0] / pieces(k)[0].square().mean().sqrt() for k in (n, n // 5))
    z, eps = torch.cartesian_prod(normal, normal).T
    d, _ = torch.cartesian_prod((BUMPS[:, None] + WIDTH * of_bump).flatten(), normal).T
    low, high = (shift_timesteps(u, 1 / SCORE_SHIFT) for u in (0.02, 0.98))
    t = shift_timesteps(low + (high - low) * (torch.arange(times).double() + 0.5) / times, SCORE_SHIFT)
    return lambda *shape: (*(x.expand(times, 1, -1)[..., None, None] for x in (d, z, eps)), t[:, None])


# ---------------------------------------------------------------------------------------------------------------------
# Training

def causal_cd(draw, seeds: int, w: float, n: int) -> Tensor:
    """The optimum of causal CD (CF++ Eq. 3), from the timestep next to data to t = 1; theta- is theta. Returns the
    knots `s 1 n` at t = 1. The loss is quadratic in the knots of a timestep, and each seed has its own."""
    teacher, ema = behind_the_past(teacher_velocity(w)), lambda x, t, text, chunk, clean: x  # G(x, 0) = x
    for k in reversed(range(len(CD_GRID))):
        clips, _, eps, _ = draw(4, 8, 256)
        knots, index = torch.zeros(seeds, 1, n, dtype=torch.float64, requires_grad=True), torch.full(clips.shape[:2], k)
        student = behind_the_past(student_velocity(knots, CD_GRID[k : k + 1]))
        loss, _ = causal_cd_loss(student, ema, teacher, clips, None, CD_GRID, index, eps, 1)                # CF++ Eq. 3
        (gradient,) = torch.autograd.grad(loss, knots, create_graph=True)
        rows = [torch.autograd.grad(of_knot, knots, retain_graph=True)[0] for of_knot in gradient.sum((0, 1))]
        solved = -gradient.detach() @ torch.linalg.pinv(torch.stack(rows, -1)[:, 0], hermitian=True, rtol=1e-9)
        ema = behind_the_past(student_velocity(solved, CD_GRID[k : k + 1]))
    return solved


def causal_dmd(draw, knots: Tensor, w: float, updates: int) -> Tensor:
    """Causal DMD (CF++ Eq. 7) of one-step students, from their knots `s 1 n`."""
    knots = knots.clone().requires_grad_()
    optimizer = torch.optim.Adam([knots], lr=LR, betas=BETAS)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: min(1.0, 2 * (1 - update / updates)))
    teacher, student = behind_the_past(teacher_velocity(w)), behind_the_past(student_velocity(knots, ONE))
    for _ in range(updates):
        clips, z, eps, t = draw(4, 8, 16)
        x0 = to_x0(z, student(z, 1.0, chunk=1, clean=clips), 1.0)
        critic = behind_the_past(exact_critic(knots.detach()))
        loss, _ = dmd_loss(x0, None, critic, teacher, t, eps, chunk=1, clean=clips)                         # CF++ Eq. 7
        optimizer.zero_grad()
        (len(knots) * loss).backward()
        optimizer.step()
        decay.step()
    return knots.detach()


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts of many frames, from the mean `s` and variance `s` of an increment

def drift(mean: Tensor, frame: int) -> Tensor:
    """Mean of a frame less that of the world, in standard deviations of the world's frame."""
    spread = VARIANCE * (1 - RHO ** (2 * frame)) / (1 - RHO**2)
    return (mean - MEAN) * (1 - RHO**frame) / (1 - RHO) / spread**0.5


def inside(mean: Tensor, variance: Tensor, frame: int) -> Tensor:
    """Share of a frame within two standard deviations of the world's mean. The frame is taken for Gaussian: it is a sum
    of increments."""
    low, high = ((edge - drift(mean, frame)) / (variance / VARIANCE) ** 0.5 for edge in (-2, 2))
    return torch.special.ndtr(high) - torch.special.ndtr(low)
