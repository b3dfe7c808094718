"""Time, noise, velocity, grids, guidance and samplers."""

import pytest
import torch
from conftest import close
from exact_worlds import Gaussian, normals

from flowmap import (
    Condition,
    Guided,
    add_noise,
    euler,
    intervals,
    of_frames,
    renoise,
    sample,
    schedule,
    shift_timesteps,
    solver_step,
    to_x0,
    twice,
    words_and_rows,
)


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


def test_a_solver_that_does_not_exist_is_named():
    """Bug: a mistyped solver that samples by another one without a word."""
    with pytest.raises(ValueError, match="nonsense.*expected one of euler"):
        sample(lambda x, t: x, torch.ones(1, 1, 1), schedule(1, 5.0), "nonsense")


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_heun_has_order_two(shift):
    """Bug: a corrector that is run at the wrong time or state, or averaged with the wrong weights."""
    world = Gaussian(torch.tensor([0.7, -0.4], dtype=torch.float64),
                     torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64))
    x = normals(50, 1, 2)
    errors = torch.tensor([(sample(world.velocity, x, schedule(n, shift).double(), "heun")
                            - world.flow(x[:, 0], 1.0, 0.0)).abs().max() for n in (32, 64, 128, 256)])
    slopes = -errors.log2().diff()
    assert ((slopes > 1.85) & (slopes < 2.15)).all(), slopes


def test_heun_gains_nothing_without_its_last_corrector():
    """Bug: a last step to 0 that is Euler's, as in samplers whose network cannot be run at t = 0. The order does not
    tell, it is two all the same, but at shift 5 the last interval is the largest, and the error at K = 8 is nearly
    Euler's. For data N(.7, .16), of its spread: Euler .53, Heun .044, Heun with a last Euler step .50. Two forwards a
    step."""
    world = Gaussian(torch.tensor([0.7], dtype=torch.float64), torch.tensor([[0.16]], dtype=torch.float64))
    z, grid, calls = normals(2000, 1, 1), schedule(8, 5.0).double(), []

    def velocity(x, t):
        calls.append(t)
        return world.velocity(x, t)

    def error(x0):
        return (x0 - world.flow(z[:, 0], 1.0, 0.0)).square().mean().sqrt() / 0.4

    by_euler, by_heun = (error(sample(velocity, z, grid, solver)) for solver in ("euler", "heun"))
    assert calls == [*grid.tolist(), *(t for interval in intervals(grid) for t in interval)] and calls[-1] == 0
    x = z[:, 0]
    for t, s in intervals(grid):
        x = solver_step("heun" if s > 0 else "euler", velocity, x, velocity(x, t), t, s, None)
    assert by_heun < 0.15 * by_euler and by_heun < 0.06
    assert error(x) > 0.85 * by_euler > 0.4


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
    assert [shift_timesteps(u, 5.0) for u in (0.0, 0.5, 1.0)] == pytest.approx([0, 5 / 6, 1], abs=1e-12)
    assert list(intervals(eight[-2:])) == [(eight[-2], eight[-1]), (eight[-1], 0)]
    with pytest.raises(ValueError, match="steps"):
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


# -- what a network is told besides words -----------------------------------------------------------------------------

def test_conditions_are_cut_and_doubled_with_their_rows():
    """Bug: rows of other frames than asked for, rows that belong to the other half of the batch, words that are cut."""
    words, other, rows = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.randn(2, 6, 4)
    told = Condition(words, rows)
    assert of_frames(words, 2, 4) is words and words_and_rows(words) == (words, None)
    assert torch.equal(of_frames(told, 2, 4).rows, rows[:, 2:4]) and of_frames(told, 2, 4).words is words
    assert torch.equal(twice(words, other), torch.cat([words, other]))
    assert torch.equal(twice(told).words, torch.cat([words, words]))
    assert torch.equal(twice(told, other).words, torch.cat([words, other]))
    assert torch.equal(twice(told, other).rows, torch.cat([rows, rows]))
    assert (told.to("meta").words.device.type, told.to("meta").rows.device.type) == ("meta", "meta")


@pytest.mark.parametrize("layout", ["bidirectional", "chunk", "clean", "cache"])
def test_guidance_leads_away_from_no_words_and_keeps_the_rows(tiny, layout):
    """Bug: an unconditional half that is told no rows, those of the other half, or those of other frames: guidance
    would push along the rows, too."""
    net, g = tiny(row_dim=4), torch.Generator().manual_seed(0)
    x, clean = torch.randn(2, 2, 4, 3, 4, 6, generator=g)
    words, null, rows = (torch.randn(*shape, generator=g) for shape in ((2, 3, 5), (3, 5), (2, 6, 4)))
    teacher, t = Guided(net, null, 3.0), torch.rand(2, 4, generator=g)

    def velocity(net, words):
        how = {"bidirectional": {}, "chunk": {"chunk": 2}, "clean": {"chunk": 2, "clean": clean}}.get(layout)
        if how is None:
            how = {"cache": net.new_cache()}
            net.append(how["cache"], clean[:, :2], Condition(words, rows[:, :2]))
        return net(x, t, Condition(words, rows[:, 2:]), **how)

    cond, uncond = velocity(net, words), velocity(net, null.expand_as(words))
    close(velocity(teacher, words), uncond + 3 * (cond - uncond), 1e-5)
    rows = rows.flip(0)
    assert (velocity(net, words) - cond).abs().max() > 0.01  # the network does read its rows
