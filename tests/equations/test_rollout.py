"""Self-rollout: official numbers, gradients that stop at the chunk boundary, and noise that equal times share."""

import gc

import pytest
import torch
from conftest import close, close_norm

from flowmap import Condition, Guided, add_noise, of_frames, sample, schedule, solver_step
from model import rope_angles, sinusoid
from rollout import grids, joined, recache, rollout_with_prompts, shared_noise, stream


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
    close(joined(stream(net, recorded(g, chunk), g["context"], grid, first_grid=first_grid,
                        num_chunks=g["noise"].shape[1] // chunk)), g["latents"])


def test_training_rollout_has_the_clean_gradient(golden, golden_net):
    """Bug: gradient that leaks through the cache (golden E8, `grad_detached`). The official rollout commits its
    chunks with
    a little noise, sigma = .00498; so does this test's network."""
    g, net = golden("E8"), golden_net("W0")
    commits = iter([g["noise_003"], g["noise_007"], g["noise_011"]])
    replay = iter(k for k in sorted(g) if k.startswith("noise_") and k not in ("noise_003", "noise_007", "noise_011"))

    class NoisyCommit:
        new_cache = net.new_cache
        def __call__(self, *args, **layout):
            return net(*args, **layout)
        def append(self, cache, x0, text):
            net.append(cache, add_noise(x0, next(commits)[None], 0.004980080295354128), text)

    start = g["noise"].clone().requires_grad_()
    def noise(i, k):
        return start[:, i : i + 1] if k == 0 else g[next(replay)][None]

    x0 = joined(stream(NoisyCommit(), noise, g["context"], schedule(4, 5.0), num_chunks=3, exit_step=3))
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
        x0 = joined(stream(net, shared_noise(noise, 2, 1, 1), text, schedule(1, 5.0), num_chunks=3))
        v = net(noise[:, 0], torch.ones(2, 6), text, chunk=2, clean=x0)
    close(noise[:, 0] - v, x0, 1e-5)


def told(g, words=1, frames=6):
    """Words `words 2 l d` and rows of a clip `2 f 4`."""
    return torch.randn(words, 2, 3, 5, generator=g), torch.randn(2, frames, 4, generator=g)


@pytest.mark.parametrize("w", [1.0, 3.0])
@pytest.mark.parametrize("window, sink", [(None, 0), (4, 1)])
@pytest.mark.parametrize("fused, due", [(True, False), (True, True), (False, True), (False, False)])
@torch.no_grad()
def test_rows_travel_through_the_rollout(tiny, fused, due, window, sink, w):
    """Bug: a chunk that is told the rows of another one, or committed with them; with `fused` the two chunks of a
    forward have rows of their own. Teacher forcing of the rollout's own history must give the same clip, plain and
    guided, whether the conditions come at once or with every chunk (due)."""
    net, g, asked = tiny(row_dim=4, window=window, sink=sink), torch.Generator().manual_seed(0), []
    noise, null, ((words,), rows) = torch.randn(2, 1, 6, 3, 4, 6, generator=g), torch.randn(3, 5, generator=g), told(g)
    model = net if w == 1 else Guided(net, null, w)

    def of_chunk(i):
        asked.append(i)
        return Condition(words, rows[:, 2 * i : 2 * i + 2])

    chunks = []
    for chunk in stream(model, shared_noise(noise, 2, 1, 1), of_chunk if due else Condition(words, rows),
                        schedule(1, 5.0), num_chunks=3, fused=fused):
        chunks.append(chunk)
        assert asked == list(range(len(chunks) * due))  # a condition is asked for when its chunk is due, not before
    x0 = joined(chunks)
    for i, chunk in enumerate(chunks):
        assert torch.equal(chunk.text.rows, rows[:, 2 * i : 2 * i + 2]) and torch.equal(chunk.text.words, words)
    close(noise[:, 0] - model(noise[:, 0], 1.0, Condition(words, rows), chunk=2, clean=x0), x0, 1e-5)
    other = rows.clone()
    other[:, 3] += 1  # of a frame of the second chunk
    moved = joined(stream(model, shared_noise(noise, 2, 1, 1), Condition(words, other), schedule(1, 5.0), num_chunks=3,
                          fused=fused)) - x0
    assert not moved[:, :2].any() and moved[:, 2:].abs().amax((0, 2, 3, 4)).min() > 1e-3


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("first", [2, 4])
@torch.no_grad()
def test_a_rollout_samples_every_chunk_by_its_solver(tiny, fused, first):
    """Bug: a rollout with a solver step of its own, a corrector that sees another past than its predictor or commits
    the chunk before once more, or a last step without it. Heun behind the cache is flowmap.sample of every chunk."""
    net, g, calls = tiny(), torch.Generator().manual_seed(0), []
    noise, text = torch.randn(2, 4, 6, 3, 4, 6, generator=g), torch.randn(2, 3, 5, generator=g)
    grid, first_grid = grids(2, 5.0, first)
    hook = net.register_forward_pre_hook(lambda *_: calls.append(1))
    got = joined(stream(net, shared_noise(noise, 2, 2, first), text, grid, first_grid=first_grid, num_chunks=3,
                        solver="heun", fused=fused))
    hook.remove()
    assert len(calls) == 2 * (first + 2 + 2) + (0 if fused else 2)
    cache = net.new_cache()
    for i in range(3):
        x0 = sample(lambda x, t: net(x, t, text, cache=cache), noise[:, :1, 2 * i : 2 * i + 2],
                    grid if i else first_grid, "heun")
        close(got[:, 2 * i : 2 * i + 2], x0, 1e-5)
        net.append(cache, x0, text)


def test_exit_step_of_a_solver_that_corrects(tiny):
    """Bug: an early exit of Heun that leaves out its corrector, or whose gradient flows through the steps before."""
    net, g, t = tiny(), torch.Generator().manual_seed(0), schedule(4, 5.0).tolist()
    noise, text = torch.randn(1, 1, 1, 3, 4, 6, generator=g).requires_grad_(), torch.randn(1, 3, 5, generator=g)
    (chunk,) = stream(net, lambda i, k: noise[:, k], text, schedule(4, 5.0), num_chunks=1, solver="heun", exit_step=1)

    def velocity(x, t):
        return net(x, t, text, cache=net.new_cache())

    x = solver_step("heun", velocity, noise[:, 0], velocity(noise[:, 0], t[0]), t[0], t[1], None).detach()
    want = solver_step("heun", velocity, x, velocity(x, t[1]), t[1], 0.0, None)
    close(chunk.x0, want, 1e-5)
    for got, expected in zip(*(torch.autograd.grad(x0.sum(), net.head.head.weight) for x0 in (chunk.x0, want))):
        close(got, expected, 1e-4)
    assert not chunk.x_t.requires_grad


@pytest.mark.parametrize("window, sink, relative, chunk, steps", [
    (None, 0, False, 1, 1), (None, 0, False, 2, 4), (4, 1, False, 1, 2), (4, 1, True, 2, 2), (3, 0, True, 1, 2)])
@torch.no_grad()
def test_fused_commit_changes_nothing_but_the_number_of_forwards(tiny, window, sink, relative, chunk, steps):
    """Bug: a chunk that is committed with the next one's first step and sees too much, lies at other positions or is
    kept otherwise than by a forward of its own. Guided, after a past of one frame, with everything that is held."""
    net, g, chunks = tiny(), torch.Generator().manual_seed(0), 5
    noise, text = torch.randn(2, 4, chunks * chunk, 3, 4, 6, generator=g), torch.randn(2, 3, 5, generator=g)
    image, null = torch.randn(2, 1, 3, 4, 6, generator=g), torch.randn(3, 5, generator=g)

    def rollout(fused):
        calls = []
        hook = net.register_forward_pre_hook(lambda *_: calls.append(1))
        guided = Guided(net, null, 2.0)
        cache = guided.new_cache(window=window, sink=sink, relative=relative)
        guided.append(cache, image, text)
        calls.clear()
        draw = shared_noise(noise, chunk, steps, steps)
        x0 = joined(stream(guided, draw, text, schedule(steps, 5.0), num_chunks=chunks, cache=cache, fused=fused,
                           commit_last=True))
        hook.remove()
        return x0, cache, len(calls)

    (x0, cache, calls), (want, want_cache, want_calls) = rollout(True), rollout(False)
    assert (calls, want_calls) == (chunks * steps + 1, chunks * (steps + 1))  # the last chunk's commit stands alone
    close(x0, want, 1e-5)
    assert (cache.frames, cache.next_frame) == (want_cache.frames, want_cache.next_frame)
    for held, want_held in ((cache.keys, want_cache.keys), (cache.values, want_cache.values)):
        for layer, want_layer in zip(held, want_held):
            for z, want_z in zip(layer, want_layer, strict=True):
                close(z, want_z, 1e-4)
                assert z.untyped_storage().nbytes() <= chunk * 24 * 4 * z.shape[0] * 6  # no slice of two chunks


def frames_seen(first, n, window, sink):
    """The past frames that a chunk of n frames from `first` on sees."""
    if window is None or first <= window - n:
        return list(range(first))
    return [*range(sink), *range(first - (window - sink - n), first)]


def recomputed(net, clean, x, t, text, chunk, window, sink, relative):
    """The velocity of chunk x behind all the clean chunks before it, everything computed anew, layer by layer: no
    cache, no layout of model.py. Positions are those in the clip, or (relative) among the frames that a chunk sees."""
    _, f, _, h, w = clean.shape
    s, dh = h * w // 4, net.config.dim // net.config.num_heads
    chunks = [clean[:, i : i + chunk] for i in range(0, f, chunk)] + [x]
    times = [torch.zeros(len(x), chunk)] * (f // chunk) + [t]

    def turned(z, positions):
        angle = rope_angles(torch.tensor(positions), h // 2, w // 2, dh)[:, None].float()
        z = torch.view_as_complex(z.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angle), angle)
        return torch.view_as_real(z).flatten(-2)

    tokens = [net.patch_embedding(z.transpose(1, 2)).flatten(2).transpose(1, 2) for z in chunks]
    time = [net.time_embedding(sinusoid(z, net.config.freq_dim)) for z in times]
    text = net.text_embedding(text)
    for block in net.blocks:
        time6 = [net.time_projection(e).unflatten(-1, (6, -1)) for e in time]
        q, k, v = zip(*[block.before(z, e) for z, e in zip(tokens, time6)])
        k, v = torch.cat(k, 1).split(s, 1), torch.cat(v, 1).split(s, 1)  # frame by frame
        for i, z in enumerate(tokens):
            sees = frames_seen(i * chunk, chunk, window, sink) + list(range(i * chunk, (i + 1) * chunk))
            positions = list(range(len(sees))) if relative else sees
            keys = turned(torch.cat([k[j] for j in sees], 1), positions)
            weights = torch.einsum("bnhd,bmhd->bhnm", turned(q[i], positions[-chunk:]), keys) / dh**0.5
            attended = torch.einsum("bhnm,bmhd->bnhd", weights.softmax(-1), torch.cat([v[j] for j in sees], 1))
            tokens[i] = block.after(z, attended, time6[i], *block.cross_attn.keys_and_values(text))
    v = net.head(tokens[-1], time[-1]).unflatten(1, (chunk, h // 2, w // 2)).unflatten(-1, (2, 2, -1))
    return v.permute(0, 1, 6, 2, 4, 3, 5).flatten(3, 4).flatten(4, 5)


WINDOWS = [(None, 0, False), (4, 0, False), (4, 1, False), (4, 1, True), (6, 2, True), (5, 0, True), (8, 1, True)]


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("window, sink, relative", WINDOWS)
@torch.no_grad()
def test_windowed_rollout_equals_recomputing_everything(tiny, window, sink, relative, chunk):
    """Bug: keys that are kept rotated for another place, a sink that wanders off, a frame that is dropped too early or
    too late, on a rollout three windows long."""
    net, g, f = tiny(), torch.Generator().manual_seed(0), 12
    noise, text = torch.randn(2, 2, f, 3, 4, 6, generator=g), torch.randn(2, 3, 5, generator=g)
    cache = net.new_cache(window=window, sink=sink, relative=relative)
    chunks = list(stream(net, shared_noise(noise, chunk, 2, 2), text, schedule(2, 5.0), num_chunks=f // chunk,
                         cache=cache))
    x0 = joined(chunks)
    for i, c in enumerate(chunks):
        t = torch.full((2, chunk), c.t)
        close(c.v, recomputed(net, x0[:, : i * chunk], c.x_t, t, text, chunk, window, sink, relative), 1e-5)


@pytest.mark.parametrize("chunk, window, sink, relative", [
    *((chunk, *window) for chunk in (1, 2) for window in WINDOWS), (3, 8, 1, True), (3, 8, 1, False)])
@torch.no_grad()
def test_recache_is_a_fresh_run_on_the_same_history(tiny, window, sink, relative, chunk):
    """Bug: a switch of prompts that leaves the old prompt in the cache, or frames at other positions. What follows must
    be what a new model sees that is given the frames still held, under the new prompt, and nothing else. Chunks of 3 in
    a window of 8 lose the middle frame of the first one."""
    net, g, f = tiny(), torch.Generator().manual_seed(0), 9 if chunk == 3 else 8
    noise, text = torch.randn(2, 1, f, 3, 4, 6, generator=g), torch.randn(2, 2, 3, 5, generator=g)
    cache, history = net.new_cache(window=window, sink=sink, relative=relative), []
    for c in stream(net, shared_noise(noise, chunk, 1, 1), text[0], schedule(1, 5.0), num_chunks=f // chunk,
                    cache=cache, commit_last=True):
        history.append((len(history) * chunk, c.x0))
    switched = recache(net, cache, history, text[1])
    assert (switched.frames, switched.next_frame) == (cache.frames, f)

    x, t = torch.randn(2, chunk, 3, 4, 6, generator=g), torch.full((2, chunk), 0.7)
    got = net(x, t, text[1], cache=switched)
    clean = torch.cat([x0 for _, x0 in history], 1)
    if window is None:
        close(got, recomputed(net, clean, x, t, text[1], chunk, None, 0, False), 1e-5)
    fresh = net.new_cache(relative=relative, window=window, sink=sink)
    for first in range(0, f, chunk):
        held = [i for i in range(first, first + chunk) if i in cache.frames]
        for piece in [held] if held and held[-1] - held[0] == len(held) - 1 else [[i] for i in held]:
            fresh.next_frame = piece[0]
            net.append(fresh, clean[:, piece], text[1])
    fresh.next_frame = f
    close(got, net(x, t, text[1], cache=fresh), 1e-6)
    assert (got - net(x, t, text[1], cache=cache)).abs().max() > 0.01  # what a switch without recache gives
    if window is not None:
        with pytest.raises(ValueError, match="got a history without frames"):
            recache(net, cache, history[:-1], text[1])


@pytest.mark.parametrize("given", [0, 3, 4])
@pytest.mark.parametrize("window, sink", [(None, 0), (6, 1)])
@torch.no_grad()
def test_rollout_with_prompts_is_the_rollouts_it_is_made_of(tiny, given, window, sink):
    """Bug: a new prompt one chunk early or late, noise that starts again with it, a given clip that is not the past, or
    is cut so that the model meets chunks of odd length where it need not. Chunks of 2; `at 5` is the chunk boundary at
    6, or at 5 where 3 frames are given."""
    net, g = tiny(), torch.Generator().manual_seed(0)
    noise, text = torch.randn(1, 4, 14, 3, 4, 6, generator=g), torch.randn(3, 1, 3, 5, generator=g)
    clip = torch.randn(1, given, 3, 4, 6, generator=g) if given else None
    draw, (grid, first_grid), cut = shared_noise(noise, 2, 2, 4), grids(2, 5.0, 4), [n for n in (given % 2, 2, 2) if n]
    if given:  # then no chunk is the first one, and no noise is for four steps; given pieces count
        draw = lambda i, k: noise[:, 2 * k, 2 * i - 4 : 2 * i - 2]
    made = torch.cat(list(rollout_with_prompts(
        net, draw, [(0, text[0]), (5, text[1]), (12, text[2])], grid, chunk=2, frames=14, given=clip,
        cache=net.new_cache(window, sink), first_grid=first_grid)), 1)

    cache, history, before = net.new_cache(window, sink), [], 0
    for piece in clip.split(cut[: (given + 1) // 2], 1) if given else ():
        history.append((cache.next_frame, piece))
        net.append(cache, piece, text[0])
    for i in range(7):
        now = (cache.next_frame >= 5) + (cache.next_frame >= 12)
        if now != before:
            cache = recache(net, cache, history, text[now])
        before = now
        (new,) = stream(net, lambda _, k, i=i + 2 * (given > 0): draw(i, k), text[now], grid, num_chunks=1,
                        cache=cache, first_grid=first_grid, commit_last=True)
        history.append((cache.next_frame - 2, new.x0))
    close(made, torch.cat([x for _, x in history], 1), 1e-5)
    assert made.shape[1] == given + 14 and not (given and (made[:, :given] - clip).any())


@pytest.mark.parametrize("window, sink, relative", [(None, 0, False), (4, 1, False), (4, 1, True)])
@torch.no_grad()
def test_recache_tells_every_frame_its_own_rows_again(tiny, window, sink, relative):
    """Bug: a history that is committed again with the rows of other frames, as soon as some have left the window, or
    without the new words."""
    net, g = tiny(row_dim=4), torch.Generator().manual_seed(0)
    noise, (words, rows) = torch.randn(2, 1, 8, 3, 4, 6, generator=g), told(g, words=2, frames=10)
    cache, history = net.new_cache(window=window, sink=sink, relative=relative), []
    for c in stream(net, shared_noise(noise, 2, 1, 1), Condition(words[0], rows), schedule(1, 5.0), num_chunks=4,
                    cache=cache, commit_last=True):
        history.append((2 * len(history), c.x0))
    switched, fresh = recache(net, cache, history, Condition(words[1], rows)), net.new_cache(window, sink, relative)
    for first, x0 in history:
        kept = [i for i in range(2) if first + i in cache.frames]
        if kept:
            fresh.next_frame = first + kept[0]
            net.append(fresh, x0[:, kept], Condition(words[1], rows[:, [first + i for i in kept]]))
    assert switched.frames == fresh.frames == cache.frames
    x, now = torch.randn(2, 2, 3, 4, 6, generator=g), Condition(words[1], rows[:, 8:])
    got = net(x, 0.7, now, cache=switched)
    close(got, net(x, 0.7, now, cache=fresh), 1e-6)
    assert (got - net(x, 0.7, now, cache=recache(net, cache, history, Condition(words[1], rows + 1)))).abs().max() > .01


@pytest.mark.parametrize("given", [0, 3])
@torch.no_grad()
def test_rows_keep_their_frames_when_the_words_change(tiny, given):
    """Bug: rows that start again with a new prompt, or that are counted without the given frames. The rows of the whole
    clip come with every text; the same clip is made chunk by chunk here, each told its own rows."""
    net, g = tiny(row_dim=4), torch.Generator().manual_seed(0)
    noise, (words, rows) = torch.randn(2, 1, 12, 3, 4, 6, generator=g), told(g, words=2, frames=given + 8)
    clip = torch.randn(2, given, 3, 4, 6, generator=g) if given else None
    draw, texts = shared_noise(noise, 2, 1, 1), [(0, Condition(words[0], rows)), (given + 4, Condition(words[1], rows))]
    made = torch.cat(list(rollout_with_prompts(net, draw, texts, schedule(1, 5.0), chunk=2, frames=8, given=clip)), 1)

    cache, history = net.new_cache(), []
    pieces = [clip[:, :1], clip[:, 1:]] if given else []
    for i in range(len(pieces) + 4):
        first = cache.next_frame
        text = texts[first >= given + 4][1]
        if first == given + 4:
            cache = recache(net, cache, history, text)
        x = pieces[i] if i < len(pieces) else draw(i, 0)
        of_these = of_frames(text, first, first + x.shape[1])
        x0 = x if i < len(pieces) else x - net(x, 1.0, of_these, cache=cache)
        net.append(cache, x0, of_these)
        history.append((first, x0))
    assert made.shape[1] == given + 8
    close(made, torch.cat([x0 for _, x0 in history], 1), 1e-5)


def bytes_alive():
    gc.collect()
    storages = [z.untyped_storage() for z in gc.get_objects() if type(z) in (torch.Tensor, torch.nn.Parameter)]
    return sum({z.data_ptr(): z.nbytes() for z in storages}.values())


@pytest.mark.parametrize("relative", [True, False])
@torch.no_grad()
def test_2000_frames_in_constant_memory(tiny, relative):
    """Bug: anything that grows with the clip: keys, tables of positions, a slice that keeps a whole tensor alive. All
    tensors alive are counted, after 100 frames and after 2,000; with prompts, after 300."""
    net, g = tiny(num_layers=1), torch.Generator().manual_seed(0)
    text, cache, alive = torch.randn(1, 3, 5, generator=g), net.new_cache(window=6, sink=1, relative=relative), {}

    def noise(i, k):
        return torch.randn(1, 2, 3, 4, 6, generator=g)

    for i, _ in enumerate(stream(net, noise, text, schedule(1, 5.0), num_chunks=1001, cache=cache)):
        if i in (49, 999):
            alive[i] = bytes_alive()
    assert cache.next_frame == 2000 and cache.frames == [0, 1995, 1996, 1997, 1998, 1999]
    assert alive[999] <= alive[49]
    for i, _ in enumerate(rollout_with_prompts(net, noise, [(0, text)], schedule(1, 5.0), chunk=2, frames=302,
                                               cache=net.new_cache(window=6, sink=1, relative=relative))):
        if i in (49, 149):
            alive[i] = bytes_alive()
    assert alive[149] <= alive[49]


def test_gradient_stays_in_its_chunk(tiny):
    """Bug: later chunks that send gradient into earlier ones: a chunk's loss must have the gradient it has alone."""
    net, g = tiny(), torch.Generator().manual_seed(0)
    noise, text = torch.randn(1, 4, 3, 3, 4, 6, generator=g).requires_grad_(), torch.randn(1, 3, 5, generator=g)
    chunks = list(stream(net, shared_noise(noise, 1, 4, 4), text, schedule(4, 5.0), num_chunks=3, exit_step=0))
    (chunk,) = torch.autograd.grad(chunks[2].x0.sum(), noise)
    touched = (chunk.abs().sum((0, 3, 4, 5)) > 0)
    assert touched.nonzero().tolist() == [[0, 2]]  # step 0 of frame 2 and nothing else


@pytest.mark.parametrize("steps, exit_step, first_exit, first_last", [
    (1, 0, 2, 2), (2, 0, 3, 3), (2, 1, 0, 0), (2, 0, None, 3), (4, 2, None, 2), (4, 2, 1, 1), (8, 5, None, 5)])
def test_exit_step(tiny, steps, exit_step, first_exit, first_last):
    """Bug: gradient through more than the exit step; a first chunk whose exit is tied to the others', so that with one
    step only the last of its four times is ever trained, and with two only the second and the last."""
    net, g, enabled = tiny(), torch.Generator().manual_seed(0), []
    noise, text = torch.randn(1, 8, 2, 3, 4, 6, generator=g), torch.randn(1, 3, 5, generator=g)

    class Watch:
        new_cache, append = net.new_cache, net.append
        def __call__(self, x, t, text, **layout):
            assert layout.get("clean") is None  # with gradient a commit is a forward of its own
            enabled.append((round(t[0, 0].item(), 6), torch.is_grad_enabled()))
            return net(x, t, text, **layout)

    grid, first_grid = grids(steps, 5.0, 4)
    list(stream(Watch(), shared_noise(noise, 1, steps, len(first_grid)), text, grid, num_chunks=2,
                first_grid=first_grid, exit_step=exit_step, first_exit=first_exit))
    def expected(times, last):
        return [(round(t, 6), k == last) for k, t in enumerate(times.tolist()[: last + 1])]
    assert enabled == expected(first_grid, first_last) + expected(grid, exit_step)


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
        whole = joined(stream(net, draw, text, grid, first_grid=first_grid, num_chunks=4))
        cache = net.new_cache()
        first = [c.x0 for c in stream(net, draw, text, grid, first_grid=first_grid, num_chunks=2, cache=cache,
                                     commit_last=True)]
        rest = [c.x0 for c in stream(net, lambda i, k: draw(i + 2, k), text, grid, first_grid=first_grid, num_chunks=2,
                                     cache=cache)]
    close(torch.cat(first + rest, 1), whole, 1e-6)
    with pytest.raises(ValueError, match="nonsense"):
        next(stream(net, draw, text, schedule(2, 5.0), num_chunks=1, solver="nonsense"))
    with pytest.raises(ValueError, match="exit step"):
        next(stream(net, draw, text, schedule(2, 5.0), num_chunks=1, exit_step=2))


def test_words_may_change_from_chunk_to_chunk(tiny):
    """Bug: a chunk that is committed under the prompt of the next one, where both are one forward."""
    net, noise = tiny(), torch.randn(1, 6, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    words = [torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    clips = []
    with torch.no_grad():
        for fused in (True, False):
            chunks = stream(net, lambda i, k: noise[:, 2 * i : 2 * i + 2], lambda i: words[i], torch.tensor([0.5]),
                            num_chunks=3, fused=fused)
            clips.append(torch.cat([chunk.x0 for chunk in chunks], dim=1))
    close(*clips, 1e-5)
