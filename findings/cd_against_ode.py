"""Causal consistency distillation against causal ODE distillation, by what they cost (CF++ Fig. 3).

Both aim at the same flow map, and there are two ways to miss it. A student that cannot bend misses by what its loss
averages: ODE regresses the ends of whole trajectories, so an affine student keeps corr(x_t, x_0)^2 of their variance;
CD chains 48 regressions of one step each, whose ends are nearly functions of their starts, and keeps more. A student
that can bend (MLP) misses by what it has not learned: CD by what its chain has not passed on yet, ODE by the
trajectories that were not stored.

The walk of increments.py, frame by frame. Compute is counted in clips through the network, as in initialisation.py: CD
5 for a clip trained on, ODE 3, and 48 for every trajectory that is stored.
"""

from functools import lru_cache

import torch

from baselines.causal import ode_loss, trajectory
from causal_cd import causal_cd_loss
from findings.affine import sample_law
from findings.increments import (BATCH, DATA, SHIFT, START_UPDATES, STORED_STEPS, TEACHER_STEPS, WIDTH, Walk, causal_cd,
                                 causal_teacher, clips, measured, ode, teacher_forcing, trajectories)
from flowmap import intervals, schedule
from worlds.draws import generator

CLAIM = "CF++ Fig. 3: causal CD is at least as good as causal ODE, at a quarter of the cost, without trajectories"
ACROSS = {"error": "compute", "variety": "compute", "stored_error": "stored", "width_error": "width", "kept": "steps"}
QUANTITIES = {"error": "W1 distance of the steps; compute in 1,000 clips",
              "variety": "both futures: twice the share of steps at the rarer one; compute in 1,000 clips",
              "stored_error": "error in one step, by the clips (CD) or trajectories (ODE) stored; compute 240",
              "width_error": "error in one step, by the width of the student; compute 240",
              "kept": "variance kept by affine students"}
PANELS = ("none", "steps")
METHODS = ("causal CD", "causal ODE")


@lru_cache(maxsize=1)
def start_of(seeds: tuple, width: int, updates: int):
    return teacher_forcing(seeds, 1, updates, width)


def distilled(method: str, seeds, compute: int, stored: int = 0, width: int = 64, fast: bool = False):
    """A student for so many forwards. stored: clips or trajectories; 0: new ones for CD, one for every 4 clips that are
    trained on for ODE."""
    start = start_of(tuple(seeds), width, 10 if fast else START_UPDATES)
    if method == "causal CD":
        return causal_cd(start, seeds, 1, compute // (5 * BATCH), stored)
    stored = stored or compute // 60
    return ode(start, seeds, 1, (compute - 48 * stored) // (3 * BATCH), stored)


# ---------------------------------------------------------------------------------------------------------------------
# Affine students, v = a x + b at each timestep: one step of a walk from 0

def least(loss) -> torch.Tensor:
    """(a, b) at the minimum of a quadratic function: one Newton step from 0."""
    zero = torch.zeros(2, dtype=torch.float64)
    curvature = torch.autograd.functional.hessian(loss, zero)
    return -torch.linalg.solve(curvature, torch.autograd.functional.jacobian(loss, zero))


def affine(of: dict):
    """A network with a and b for the times of `of`."""
    def net(x, t, text, **layout):
        a, b = of.get(round(t[0, 0].item(), 6), (0.0, 0.0))
        return a * x + b
    return net


def trained_affine(method: str, seed: int, b: int):
    """Grid and parameters `K 2`, from b drawn clips."""
    g, weights, all_clips = generator(seed, DATA), {}, torch.ones(b, 1, dtype=torch.long)
    x0, eps = clips(Walk(1).draw(b, g), 1).double(), torch.randn(b, 1, 1, 1, 1, generator=g, dtype=torch.float64)
    grid, teacher = schedule(TEACHER_STEPS if method == "causal CD" else STORED_STEPS, SHIFT), causal_teacher(1)
    grid, states = grid.double(), trajectories(teacher, eps, x0)
    times = torch.cat([grid, grid.new_zeros(1)])
    for k in reversed(range(len(grid))):
        def loss(w, k=k):
            net = affine({round(grid[k].item(), 6): w})
            if method == "causal CD":
                return causal_cd_loss(net, affine(weights), teacher, x0, None, grid, k * all_clips, eps, 1)[0]
            return ode_loss(net, states, times, k * all_clips, None)[0]
        weights[round(grid[k].item(), 6)] = least(loss)
    return grid, torch.stack([weights[round(t, 6)] for t in grid.tolist()])


def exact_affine(method: str):
    """The same by quadrature."""
    def velocity(x, t):
        return Walk(1).velocity(x[:, None], torch.full((len(x), 1), t, dtype=x.dtype), torch.zeros(len(x), 1))[:, 0]

    def fit(x, y, p, t):
        p = p / p.sum()
        dx, dy = x - (p * x).sum(), y - (p * y).sum()
        slope = (p * dx * dy).sum() / (p * dx * dx).sum()
        offset = (p * y).sum() - slope * (p * x).sum()
        return (slope, offset), torch.stack([(1 - slope) / t, -offset / t])

    x, grid, params = torch.linspace(-8, 8, 8001, dtype=torch.float64), schedule(TEACHER_STEPS, SHIFT).double(), []
    if method == "causal ODE":
        keep = TEACHER_STEPS // STORED_STEPS
        *states, end = trajectory(velocity, x, grid, keep).unbind(1)
        return grid[::keep], torch.stack([fit(state, end, (-x * x / 2).exp(), t)[1]
                                          for state, t in zip(states, grid[::keep].tolist())])
    slope, offset = 1.0, 0.0
    for t, s in reversed(list(intervals(grid))):
        spread = (1 - t) ** 2 * WIDTH**2 + t**2
        p = sum((-(x - (1 - t) * mean) ** 2 / (2 * spread)).exp() for mean in (-1, 1))
        (slope, offset), param = fit(x, slope * (x - (t - s) * velocity(x, t)) + offset, p, t)
        params.append(param)
    return grid, torch.stack(params[::-1])


def kept(grid, params, steps: int) -> list[float]:
    """The variance of samples of so many CM steps, over the world's. params `seeds K 2`."""
    return (sample_law(params, grid, schedule(steps, SHIFT).double(), "cm")[1] / (1 + WIDTH**2)).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# The finding

def cells(fast):
    kinds = {"student": ("affine",), "compute": (15, 60, 240, 960), "stored": (1, 10, 100, 1000), "width": (4, 16)}
    return [{"method": method, kind: value} for kind, values in kinds.items() for value in values[: 1 if fast else None]
            for method in METHODS]


def measure(cell, seeds, fast):
    method, compute = cell["method"], 240_000
    if "student" in cell:
        grid, params = zip(*(trained_affine(method, seed, 100 if fast else 4000) for seed in seeds))
        exact_grid, exact = exact_affine(method)
        return [{"method": method, "steps": steps, "quantity": "kept",
                 "measured": kept(grid[0], torch.stack(params), steps),
                 "predicted": kept(exact_grid, exact[None], steps)[0]} for steps in (1, 2, 4)]
    if "compute" in cell or fast:
        compute = 1000 * cell.get("compute", 15)
    net = distilled(method, seeds, compute, cell.get("stored", 0), cell.get("width", 64), fast)
    if "compute" in cell:
        rows = [{"steps": steps, "quantity": quantity, "measured": of} for steps in (1, 4)
                for quantity, of in measured(net, 1, steps).items() if quantity in ("error", "variety")]
    else:
        quantity = "stored_error" if "stored" in cell else "width_error"
        rows = [{"quantity": quantity, "measured": measured(net, 1, 1)["error"]}]
    return [cell | row | {"predicted": None} for row in rows]
