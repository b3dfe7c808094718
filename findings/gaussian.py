"""Closed forms for a perfect few-step student: data N(m, s^2) on every channel, everything known, in floats.

A student predicts the clean latent G_t(x) = x - t v(x, t). For these data the students of interest all have the form

    G_t(x) = m + g_t (x - (1 - t) m)

and differ in the slope g_t alone. The mean is right at every number of steps, whatever the slope; only the spread
depends on it. Two slopes matter:

    perfect_slope     one jump from any timestep gives exactly the data: what DMD and consistency distillation ask
    composing_slope   two Euler steps land where one lands: what L_SC = 0 asks

They agree at t = 1 and at t = 0 and nowhere between, where the perfect slope is the larger one for every s > 0. So a
student cannot satisfy both. `gain` tells what a sampler makes of either.
"""

import math

import torch
from torch import Tensor

from flowmap import intervals, sample


def perfect_slope(s: float, t: float) -> float:
    """g_t = s / S_t with S_t^2 = (1-t)^2 s^2 + t^2, the variance of noised data: G_t maps N((1-t) m, S_t^2) to the
    data. This is the exact flow map from t to 0, and among slopes above 0 the optimum of DMD from noised real data.
    (DMD asks for the right distribution: -g_t would do as well.)"""
    return s / math.hypot((1 - t) * s, t)


def composing_slope(s: float, t: float) -> float:
    """g_t = s / (t + (1-t) s): the velocity does not change along the student's own straight path from z to m + s z, so
    L_SC = 0 (Salt Eq. 8). From noised real data its jumps do not give the data."""
    return s / (t + (1 - t) * s)


def student(slope, m: float, s: float, t: float) -> tuple[float, float]:
    """(a, b) of the velocity v(x, t) = a x + b with which x - t v = G_t(x):

        a = (1 - g_t) / t,     b = -m (1 - g_t (1-t)) / t
    """
    g = slope(s, t)
    return (1 - g) / t, -m * (1 - g * (1 - t)) / t


def gain(slope, s: float, grid: Tensor, solver: str) -> float:
    """Contrast: the std of the samples of `len(grid)` steps, divided by s. With sigma the std of the state at timestep
    t, 1 at the start, and t' the next timestep,

        Euler    sigma' = (t'/t + (1 - t'/t) g_t) sigma
        CM       sigma'^2 = (1-t')^2 g_t^2 sigma^2 + t'^2

    For the perfect slope CM gives 1 at any number of steps. Euler gives 1 for one step, and more and more with more
    steps: log sigma at 0 tends to the integral of (g_t - 1) / t over [0, 1], which is log 2s, so the gain tends to 2.
    How fast depends on s and on the shift of the grid only by s / shift: a shift makes of the noised latents a multiple
    of those of smaller data. ValueError for another solver.
    """
    if solver not in ("euler", "cm"):
        raise ValueError(f"got solver {solver!r}, expected euler or cm")
    std = 1.0
    for t, next_t in intervals(grid):
        g = slope(s, t)
        if solver == "euler":
            std *= next_t / t + (1 - next_t / t) * g
        else:
            std = math.hypot((1 - next_t) * g * std, next_t)
    return std / s


def sampled_gain(slope, s: float, grid: Tensor, solver: str, seed: int, samples: int = 100_000) -> float:
    """The same by flowmap.sample on drawn noise, for data of mean 0."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, len(grid), generator=g, dtype=torch.float64)
    return sample(lambda x, t: student(slope, 0.0, s, t)[0] * x, noise, grid, solver).std().item() / s


def same_noise_difference(s: float, grid: Tensor, other_grid: Tensor, dimensions: int) -> float:
    """sqrt(E ||x_0 - x_0'||^2) of the perfect student's Euler samples from the same noise over two grids. Both are
    m + gain s z with the same z in d dimensions, so it is |gain - gain'| s sqrt(d)."""
    gains = [gain(perfect_slope, s, g, "euler") for g in (grid, other_grid)]
    return abs(gains[0] - gains[1]) * s * math.sqrt(dimensions)


def guidance_chain(grid: Tensor, variance: float, guided_variance: float) -> float:
    """How often guidance is applied in sampling by the CM solver, in units of one application.

    A student of guided DMD adds D to the mean of data N(M, S) and makes their variance S_w, at every timestep, from
    noised real data of variance C_t = (1-t)^2 S + t^2. Its slope is sqrt(S_w / C_t). In sampling it starts from what it
    made itself, which is off by d_{k-1} already, so

        d_k = D + r_k d_{k-1},     r_k = (1 - t_k) sqrt(S_w / C_{t_k})

    Returns d_K / D. It is 1 for one step, since r = 0 at t = 1.
    """
    offset = 0.0
    for t in grid.tolist():
        spread = (1 - t) ** 2 * variance + t**2
        offset = 1 + (1 - t) * math.sqrt(guided_variance / spread) * offset
    return offset
