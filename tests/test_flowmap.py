"""Time, noise, velocity and samplers, on a Gaussian world where everything is known in closed form."""

import pytest
import torch
from conftest import close

from flowmap import Guided, add_noise, euler, flow_matching_loss, renoise, sample, schedule, to_x0, warp

MEAN, STD = 0.7, 0.4


def spread(t):
    return ((1 - t) ** 2 * STD**2 + t**2) ** 0.5


def flow(x, t, s):
    """Phi^{t->s} for data N(MEAN, STD^2): standardise at t, restore at s."""
    return (1 - s) * MEAN + spread(s) / spread(t) * (x - (1 - t) * MEAN)


def velocity(x, t):
    """E[eps - x_0 | x_t] for data N(MEAN, STD^2)."""
    z = (x - (1 - t) * MEAN) / spread(t) ** 2
    return t * z - (MEAN + (1 - t) * STD**2 * z)


def test_velocity_is_the_derivative_of_the_flow():
    """Bug: a closed form that the other tests lean on and that is wrong; a sign of v = eps - x_0."""
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    dt = 1e-6
    close(flow(flow(x, 0.9, 0.5), 0.5, 0.2), flow(x, 0.9, 0.2), 1e-12)  # the semigroup law, Salt Eq. 3
    close((flow(x, 0.6, 0.6 + dt) - flow(x, 0.6, 0.6 - dt)) / (2 * dt), velocity(x, 0.6), 1e-8)


def test_euler_sampler_converges_to_the_flow_with_order_one():
    """Bug: a sampler that skips the last interval, or mixes up t and s (Salt Eq. 5): the order breaks."""
    noise = torch.randn(64, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = flow(noise[:, 0], 1.0, 0.0)
    error = [(sample(velocity, noise, schedule(n, 1.0).double()) - exact).abs().max().item() for n in (64, 128)]
    assert 0.9 < torch.tensor(error[0] / error[1]).log2() < 1.1


def test_cm_sampler_keeps_the_distribution_at_any_number_of_steps():
    """Bug: re-noising to the wrong time or with used noise. With the exact x_0 map every K gives the data
    distribution."""
    def consistency(x, t):
        return (x - flow(x, t, 0.0)) / t  # so that x - t v is the end of the trajectory
    n = 200_000
    noise = torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for k in (1, 2, 4):
        x0 = sample(consistency, noise[:, :k], schedule(k, 5.0), "cm")
        assert abs(x0.mean() - MEAN) < 5 * STD / n**0.5
        assert abs(x0.std() - STD) < 5 * STD / (2 * n) ** 0.5
    assert (x0 - sample(consistency, noise[:, :1], schedule(1, 5.0), "cm")).abs().max() > 0.1  # fresh noise was used


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


def test_flow_matching_learns_the_exact_velocity():
    """Bug: a target of the wrong sign. The best affine net of x at one t, by least squares, is the closed form."""
    g = torch.Generator().manual_seed(0)
    x0 = MEAN + STD * torch.randn(100_000, 1, 1, 1, 1, dtype=torch.float64, generator=g)
    eps, t = torch.randn(x0.shape, dtype=torch.float64, generator=g), torch.full((len(x0), 1), 0.6, dtype=torch.float64)
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss, _ = flow_matching_loss(lambda x, t, text: w[0] + w[1] * x, x0, None, t, eps)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert abs(w[0].item() - velocity(torch.tensor(0.0), 0.6).item()) < 0.02
    assert abs(w.sum().item() - velocity(torch.tensor(1.0), 0.6).item()) < 0.02
