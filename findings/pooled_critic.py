"""What does one critic for all timesteps of the grid not see?

Every timestep of the grid makes samples of its own, and DMD's critic learns the pool of them all. So DMD descends the
KL divergence of the pool, and timesteps that err in opposite directions are hardly seen. Exactly: in n dimensions, two
timesteps make N(d, s^2 I) and N(-d, s^2 I), the target is N(0, s^2 I). A critic of the first alone pushes its mean back
by

    d E_t[ (1-t)^2 / S_t^2 ],    S_t^2 = (1-t)^2 s^2 + t^2,

the critic of the pool by d E_t[ (1-t)^2 / S_t^2 tanh(a^2 + a z) ], a = (1-t) |d| / S_t, z normal: for small a, a share
of about a^2. |d| is the length of the whole offset: the more dimensions agree on it, the better an exact critic tells
the timesteps apart. The second quantity is a student of the ring whose critic is told which timestep made a sample.
"""

import numpy as np
import torch

from dmd import dmd_loss, score_times
from findings.mixture import Ring, error, regimes, samples, student_of
from worlds.draws import generator

CLAIM = "Salt Sec. 3.2: timesteps can be right one by one and wrong together. Here: their one critic hardly sees it"
ACROSS = {"force": "offset", "error": "steps"}
QUANTITIES = {"force": "force of the pooled critic / force of a critic of its own",
              "error": "sliced W2 distance to the teacher's samples (data variance is 1)"}
PANELS = ("shift", "guidance")
SHOWN = {"updates": 600}
WIDTH, OFFSETS, DIMENSIONS, N = 0.5, (0.02, 0.05, 0.1, 0.2, 0.4), (1, 8, 64), 20_000


def cells(fast):
    return [{"offset": d, "dimensions": n} for n in DIMENSIONS[: 1 if fast else 3] for d in OFFSETS] + [
        {"student": name} | regime for regime in regimes(fast, updates=(600,)) for name in ("DMD-8",
                                                                                           "DMD-8, critic told")]


def measure(cell, seeds, fast):
    return measure_force(cell, seeds) if "offset" in cell else measure_students(cell, seeds, fast)


def measure_students(cell, seeds, fast):
    net, world = student_of(cell["student"], seeds, cell, fast), Ring()
    return [cell | {"solver": solver, "steps": k, "quantity": "error", "predicted": None,
                    "measured": error(samples(net, world, solver, k, cell["shift"]), world, cell["guidance"])}
            for solver in ("euler", "cm") for k in (1, 2, 4, 8)]


def measure_force(cell, seeds):
    d, n, measured = cell["offset"], cell["dimensions"], []
    for seed in seeds:
        own, pooled = (force(d, n, critic, seed) for critic in (bumps(d), bumps(d, -d)))
        measured.append(pooled / own)
    return [cell | {"quantity": "force", "measured": measured, "predicted": exact_ratio(d * n**0.5)}]


def bumps(*means):
    """The exact velocity of an equal mixture of N(m, WIDTH^2 I), with m for every channel, as a network."""
    m = torch.tensor(means, dtype=torch.float64)

    def net(x, t, text):
        t = t[..., None, None, None, None]
        var = ((1 - t) * WIDTH) ** 2 + t**2
        gap = x[..., None] - (1 - t) * m
        which = (-gap.square() / (2 * var)).sum(2, keepdim=True).softmax(-1)
        x0 = (which * (m + (1 - t) * WIDTH**2 / var * gap)).sum(-1)
        return (x - x0) / t[..., 0]
    return net


def force(d, n, critic, seed):
    """What dmd_loss asks of the mean of the samples N(d, WIDTH^2) of n channels."""
    g = generator(seed)
    z, eps = torch.randn(2, N, 1, n, 1, 1, generator=g, dtype=torch.float64)
    mean = torch.tensor(d, dtype=torch.float64, requires_grad=True)
    t = score_times(N, 1, 1.0, g).double()
    dmd_loss(mean + WIDTH * z, None, critic, bumps(0.0), t, eps, exact=True)[0].backward()
    return mean.grad.item()


def exact_ratio(length):
    t = np.linspace(0.02, 0.98, 2001)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    var = ((1 - t) * WIDTH) ** 2 + t**2
    a = (1 - t) * length / np.sqrt(var)
    seen = np.tanh(a[:, None] ** 2 + a[:, None] * nodes) @ weights / weights.sum()
    weight = (1 - t) ** 2 / var
    return float((weight * seen).sum() / weight.sum())
