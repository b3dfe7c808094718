"""Self-rollout: official numbers, gradients that stop at the chunk boundary, and noise that equal times share."""

import pytest
import torch
from conftest import close, close_norm

from flowmap import add_noise, schedule
from rollout import grids, shared_noise, stream


def recorded(g, chunk):
    """noise(i, k) that replays a golden rollout: chunk starts from `noise`, re-noises in call order."""
    calls = iter(sorted(k for k in g if k.startswith("renoise_")))
    b = g["noise"].shape[0]
    def noise(i, k):
        if k == 0:
            return g["noise"][:, i * chunk : (i + 1) * chunk]
        return g[next(calls)].unflatten(0, (b, chunk))
    return noise


@pytest.mark.parametrize("case, chunk, steps, first, window, sink", [
    ("E1", 3, 4, 4, None, 0), ("E2", 1, 4, 4, None, 0), ("E3", 1, 2, 4, None, 0), ("F1", 1, 4, 4, 4, 1)])
@torch.no_grad()
def test_rollouts_equal_official(golden, golden_net, case, chunk, steps, first, window, sink):
    """Bug: anything in the order of steps, re-noising, committing, the first chunk's steps, the window (golden E1-E3,
    F1)."""
    g, net = golden(case), golden_net("W0", window=window, sink=sink)
    grid, first_grid = grids(steps, 5.0, first)
    x0 = [c.x0 for c in stream(net, recorded(g, chunk), g["context"], grid, first_grid=first_grid,
                               chunks=g["noise"].shape[1] // chunk)]
    close(torch.cat(x0, 1), g["latents"])


def test_training_rollout_has_the_clean_gradient(golden, golden_net):
    """Bug: gradient that leaks through the cache (golden E8, `grad_detached`). The official rollout commits its
    chunks with
    a little noise, sigma = .00498; so does this test's network."""
    g, net = golden("E8"), golden_net("W0")
    commits = iter([g["noise_003"], g["noise_007"], g["noise_011"]])
    replay = iter(k for k in sorted(g) if k.startswith("noise_") and k not in ("noise_003", "noise_007", "noise_011"))

    class NoisyCommit:
        new_cache = net.new_cache
        def __call__(self, *args, **kwargs):
            return net(*args, **kwargs)
        def append(self, cache, x0, text):
            net.append(cache, add_noise(x0, next(commits)[None], 0.004980080295354128), text)

    start = g["noise"].clone().requires_grad_()
    def noise(i, k):
        return start[:, i : i + 1] if k == 0 else g[next(replay)][None]

    chunks = list(stream(NoisyCommit(), noise, g["context"], schedule(4, 5.0), chunks=3, exit_step=3))
    x0 = torch.cat([c.x0 for c in chunks], 1)
    close(x0, g["latents"])
    (x0 * g["grad_weight"]).sum().backward()
    for name in (k.removeprefix("grad_detached::") for k in g if k.startswith("grad_detached::")):
        close_norm(net.get_parameter(name).grad, g[f"grad_detached::{name}"])
    leaked, clean = (g[f"{kind}::blocks.1.self_attn.k.weight"] for kind in ("grad", "grad_detached"))
    assert (leaked - clean).norm() > 0.1 * clean.norm()  # what the public code computes is something else


def test_rollout_equals_teacher_forcing_on_its_own_history(tiny):
    """Bug: a rollout whose cache is not what it generated. One step, chunk-wise: a teacher-forcing pass gives the
    same clip."""
    net, g = tiny(), torch.Generator().manual_seed(0)
    noise, text = torch.randn(2, 1, 6, 3, 4, 6, generator=g), torch.randn(2, 3, 5, generator=g)
    with torch.no_grad():
        x0 = torch.cat([c.x0 for c in stream(net, shared_noise(noise, 2, 1, 1), text, schedule(1, 5.0), chunks=3)], 1)
        v = net(noise[:, 0], torch.ones(2, 6), text, chunk=2, clean=x0)
    close(noise[:, 0] - v, x0, 1e-5)


def test_gradient_stays_in_its_chunk(tiny):
    """Bug: later chunks that send gradient into earlier ones: a chunk's loss must have the gradient it has alone."""
    net, g = tiny(), torch.Generator().manual_seed(0)
    noise, text = torch.randn(1, 4, 3, 3, 4, 6, generator=g).requires_grad_(), torch.randn(1, 3, 5, generator=g)
    chunks = list(stream(net, shared_noise(noise, 1, 4, 4), text, schedule(4, 5.0), chunks=3, exit_step=0))
    (chunk,) = torch.autograd.grad(chunks[2].x0.sum(), noise)
    touched = (chunk.abs().sum((0, 3, 4, 5)) > 0)
    assert touched.nonzero().tolist() == [[0, 2]]  # step 0 of frame 2 and nothing else


@pytest.mark.parametrize("steps, exit_step, first_exit", [(2, 0, 1), (2, 1, 3), (4, 2, 2), (8, 5, 5)])
def test_exit_step(tiny, steps, exit_step, first_exit):
    """Bug: gradient through more than the exit step, or a first chunk that exits at another fraction of its grid."""
    net, g, enabled = tiny(), torch.Generator().manual_seed(0), []
    noise, text = torch.randn(1, 8, 2, 3, 4, 6, generator=g), torch.randn(1, 3, 5, generator=g)

    class Watch:
        new_cache, append = net.new_cache, net.append
        def __call__(self, x, t, text, cache):
            enabled.append((round(t[0, 0].item(), 6), torch.is_grad_enabled()))
            return net(x, t, text, cache=cache)

    grid, first_grid = grids(steps, 5.0, 4)
    list(stream(Watch(), shared_noise(noise, 1, steps, len(first_grid)), text, grid, chunks=2, first_grid=first_grid,
                exit_step=exit_step))
    def expected(times, last):
        return [(round(t, 6), k == last) for k, t in enumerate(times.tolist()[: last + 1])]
    assert enabled == expected(first_grid, first_exit) + expected(grid, exit_step)


def test_equal_times_share_noise():
    """Bug: low-step and reference rollout from different noise (Salt Sec. 3.3), and a first chunk on its own grid."""
    noise = torch.randn(1, 8, 4, 1, 1, 1)
    times = {k: schedule(k, 5.0).tolist() for k in (2, 4, 8)}
    full = shared_noise(noise, 1, 8, 8)
    for k in (2, 4):
        draw = shared_noise(noise, 1, k, 4)
        for j, t in enumerate(times[k]):
            assert torch.equal(draw(3, j), full(3, times[8].index(t)))
        for j, t in enumerate(times[4]):
            assert torch.equal(draw(0, j), full(0, times[8].index(t)))
    with pytest.raises(ValueError, match="--mixed-steps"):
        shared_noise(noise, 1, 3, 4)


def test_stream_is_lazy_and_continues(tiny):
    """Bug: a generator that computes ahead, or a cache that cannot be handed on: 2 + 2 chunks are 4 chunks."""
    net, g = tiny(), torch.Generator().manual_seed(0)
    noise, text = torch.randn(1, 2, 4, 3, 4, 6, generator=g), torch.randn(1, 3, 5, generator=g)
    with torch.no_grad():
        first_grid, grid = schedule(2, 5.0), schedule(1, 5.0)
        draw = shared_noise(noise, 1, 1, 2)
        whole = torch.cat([c.x0 for c in stream(net, draw, text, grid, first_grid=first_grid, chunks=4)], 1)
        cache = net.new_cache()
        first = [c.x0 for c in stream(net, draw, text, grid, first_grid=first_grid, chunks=2, cache=cache)]
        rest = [c.x0 for c in stream(net, lambda i, k: draw(i + 2, k), text, grid, first_grid=first_grid, chunks=2,
                                     cache=cache)]
    close(torch.cat(first + rest, 1), whole, 1e-6)
    with pytest.raises(ValueError, match="--solver"):
        next(stream(net, draw, text, schedule(2, 5.0), chunks=1, solver="heun"))
    with pytest.raises(ValueError, match="exit step"):
        next(stream(net, draw, text, schedule(2, 5.0), chunks=1, exit_step=2))
