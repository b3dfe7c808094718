"""Time, noise, velocity, grids, guidance and samplers."""

import pytest
import torch
from conftest import close
from worlds import Gaussian, normals

from flowmap import Guided, add_noise, euler, renoise, sample, schedule, to_x0, warp


def test_cm_sampler_keeps_the_distribution_at_any_number_of_steps():
    """Bug: re-noising to the wrong time or with used noise. With the exact x_0 map every K gives the data
    distribution."""
    world = Gaussian(torch.tensor([0.7], dtype=torch.float64), torch.tensor([[0.16]], dtype=torch.float64))
    n = 200_000
    noise = normals(n, 4, 1)
    for k in (1, 2, 4):
        x0 = sample(world.consistency_velocity, noise[:, :k], schedule(k, 5.0), "cm")
        assert abs(x0.mean() - 0.7) < 5 * 0.4 / n**0.5
        assert abs(x0.std() - 0.4) < 5 * 0.4 / (2 * n) ** 0.5
    one_step = sample(world.consistency_velocity, noise[:, :1], schedule(1, 5.0), "cm")
    assert (x0 - one_step).abs().max() > 0.1  # fresh noise was used


def test_times_stay_in_float32_whatever_the_latents():
    """Bug: times rounded to the latents' bf16, where neighbours of a 48-step grid differ by up to 64 % too much or too
    little: the step t - s must be right to the rounding of the result."""
    grid = schedule(48, 5.0)
    x, v = torch.zeros(47, 1, dtype=torch.bfloat16), -torch.ones(47, 1, dtype=torch.bfloat16)
    step = euler(x, v, grid[:-1], grid[1:])[:, 0]
    assert step.dtype == torch.bfloat16
    close(step.double() / (grid[:-1] - grid[1:]).double(), torch.ones(47).double(), 2**-8)
    rounded = grid[:-1].bfloat16() - grid[1:].bfloat16()
    assert ((rounded / (grid[:-1] - grid[1:])) - 1).abs().max() > 0.5  # what a cast would have cost


def test_euler_maps_compose_on_a_straight_flow():
    """Bug: euler with the wrong step. For constant v two steps are one, and to_x0 is the step to 0 (CF++ Eq. 4)."""
    x, v = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    close(euler(euler(x, v, 0.9, 0.5), v, 0.5, 0.2), euler(x, v, 0.9, 0.2), 1e-12)
    close(euler(x, v, 0.9, 0.0), to_x0(x, v, 0.9), 1e-12)


def test_noise_velocity_and_data_agree():
    """Bug: a conversion with t and 1 - t exchanged. Times per frame `b f` must broadcast over `b f c h w`."""
    x0, eps = torch.randn(2, 2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([[0.1, 0.5, 1.0], [0.9, 0.3, 0.0]])
    x_t = add_noise(x0, eps, t)
    close(x_t[0, 2], eps[0, 2]), close(x_t[1, 2], x0[1, 2])
    close(to_x0(x_t, eps - x0, t), x0, 1e-6)
    close(renoise(x_t, eps - x0, t, 0.25, eps), add_noise(x0, eps, 0.25), 1e-6)


def test_schedules(golden):
    """Bug: sigmas of another shift, or a table that contains 0 or lacks 1 (golden G, CF++ Sec. 4)."""
    g = golden("G_")
    for k in (1, 2, 4):
        close(schedule(k, 5.0), g[f"warped_s{k}_sigmas"], 1e-6)
    close(schedule(48, 5.0), g["shift5_48_sigmas"], 1e-6)


def test_grids_nest_and_descend():
    """Bug: mixed steps whose times do not coincide, so that equal times could not share noise."""
    eight = schedule(8, 5.0)
    assert torch.equal(schedule(4, 5.0), eight[::2]) and torch.equal(schedule(2, 5.0), eight[::4])
    assert (eight.diff() < 0).all() and eight[0] == 1 and eight[-1] > 0
    assert warp(0.0, 5.0) == 0 and warp(1.0, 5.0) == 1 and abs(warp(0.5, 5.0) - 5 / 6) < 1e-12
    with pytest.raises(ValueError, match="--steps"):
        schedule(0, 5.0)


def test_guided_runs_both_halves_and_the_cache(tiny):
    """Bug: v_c + w (v_c - v_u) in place of v_u + w (v_c - v_u); a cache filled with the conditional half only."""
    net = tiny()
    x, past = torch.randn(2, 2, 1, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    text, null, t = torch.ones(2, 3, 5), torch.zeros(3, 5), torch.full((2, 1), 0.5)
    teacher = Guided(net, null, 3.0)
    caches = teacher.new_cache(), net.new_cache(), net.new_cache()
    teacher.append(caches[0], past, text)
    net.append(caches[1], past, text), net.append(caches[2], past, null.expand_as(text))
    cond, uncond = net(x, t, text, cache=caches[1]), net(x, t, null.expand_as(text), cache=caches[2])
    close(teacher(x, t, text, cache=caches[0]), uncond + 3 * (cond - uncond), 1e-5)
