"""The fast rollout is the network's: the same numbers, from a buffer that is written in place."""

from itertools import product

import pytest
import torch
from conftest import close
from test_rollout import recorded

from fast import attention
from fast.network import Buffer, Fast
from flowmap import Condition, Guided, schedule
from rollout import grids, joined, rollout_with_prompts, stream


def both(net, run):
    """What run(net) gives for the network and for the fast one, which must agree."""
    plain, fast = run(net), run(Fast(net))
    close(fast, plain, 1e-5)
    return plain, fast


def noise_of(seed, chunk, b=2):
    def noise(i, k):
        return torch.randn(b, chunk, 3, 4, 6, generator=torch.Generator().manual_seed(1000 * seed + 10 * i + k))

    return noise


def with_cameras(net, g):
    """The network with a prope_o as random as all else."""
    for name, p in net.named_parameters():
        if "prope_o" in name:
            torch.nn.init.normal_(p, std=0.3, generator=g)
    return net


@pytest.mark.parametrize("case, chunk, steps, first, window, sink", [
    ("E1", 3, 4, 4, None, 0), ("E2", 1, 4, 4, None, 0), ("E3", 1, 2, 4, None, 0), ("F1", 1, 4, 4, 4, 1)])
def test_rollouts_equal_official(golden, golden_net, case, chunk, steps, first, window, sink):
    """Bug: anything (golden E1-E3, F1)."""
    g, net = golden(case), Fast(golden_net("W0", window=window, sink=sink))
    grid, first_grid = grids(steps, 5.0, first)
    close(joined(stream(net, recorded(g, chunk), g["context"], grid, first_grid=first_grid,
                        num_chunks=g["noise"].shape[1] // chunk)), g["latents"])


@pytest.mark.parametrize("chunk, window, sink, relative, fused", [
    case for case in product([1, 2, 3], [None, 5, 7], [0, 2], [False, True], [False, True])
    if case[1] or not (case[2] or case[3])])
def test_every_window(tiny, chunk, window, sink, relative, fused):
    """Bug: a frame in a slot that another one needs, a slot that is read and was never written, a sink that does not
    move along, keys turned by a wrong position; a chunk that is forgotten or committed twice with the fused commit.
    Window 5 has room for the sink and one chunk of 3, and no more. Window 7 does not divide into the chunks, and the
    first pieces that are given are shorter than a chunk."""
    net, text = tiny(num_layers=3), torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    given = torch.randn(2, 4, 3, 4, 6, generator=torch.Generator().manual_seed(1))

    def run(net):
        cache = net.new_cache(window, sink, relative)
        clip = torch.cat(list(rollout_with_prompts(net, noise_of(0, chunk), [(0, text)], schedule(2, 5.0), chunk=chunk,
                                                   frames=6 * chunk, given=given, cache=cache, fused=fused)), dim=1)
        seen.append([cache.positions(chunk)[i] for i in cache.visible_frames(chunk)[0]])  # by one more chunk
        return clip

    seen = []
    with torch.no_grad():
        both(net, run)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("w", [1.0, 3.0])
@pytest.mark.parametrize("window, sink", [(None, 0), (5, 1)])
def test_prompt_changes_and_guidance(tiny, window, sink, w):
    """Bug: keys and values of an old prompt that stay, a recache that the buffer does not survive, guidance that reads
    one prompt for both of its halves. Then the change must have an effect."""
    g = torch.Generator().manual_seed(0)
    (one, other), null, net = torch.randn(2, 2, 3, 5, generator=g), torch.randn(3, 5, generator=g), tiny()

    def run(net, texts=((0, one), (4, other))):
        net = net if w == 1 else Guided(net, null, w)
        cache = net.new_cache(window, sink, True)
        return torch.cat(list(rollout_with_prompts(net, noise_of(0, 2), list(texts), schedule(2, 5.0), chunk=2,
                                                   frames=12, cache=cache)), dim=1)

    plain, _ = both(net, run)
    stays = run(Fast(net), [(0, one)])
    close(stays[:, :4], plain[:, :4], 1e-5)
    assert (stays[:, 4:] - plain[:, 4:]).abs().max() > 0.01


@pytest.mark.parametrize("config", [
    dict(row_dim=4), dict(predicts_x0=True), dict(camera="ray", dim=32), dict(camera="frame", dim=32, row_dim=2),
    dict(camera="prope", dim=32), dict(camera="unseen", dim=32)])
@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()  # or commits would not be fused
def test_rows_cameras_and_x0(tiny, config, fused):
    """Bug: rows of another chunk, cameras that the buffer does not know how to turn, a head that predicts x_0."""
    from worlds.room import camera_of, row_of
    g = torch.Generator().manual_seed(0)
    net = with_cameras(tiny(**config), g)
    rows = torch.randn(2, 8, net.config.row_dim, generator=g)
    if net.config.camera:
        rows = torch.cat([rows, row_of(*camera_of(torch.randn(2, 8, 3, generator=g)))], -1)
    words = torch.randn(2, 3, 5, generator=g)
    text = Condition(words, rows) if rows.shape[-1] else words
    both(net, lambda net: joined(stream(net, noise_of(0, 2), text, schedule(2, 5.0), num_chunks=4, fused=fused,
                                        cache=net.new_cache(5, 1, True))))


@torch.no_grad()
def test_poses_are_kept_as_by_the_network(tiny):
    """Bug: a window that keeps poses and gets the latest frames."""
    from worlds.room import camera_of, row_of
    g = torch.Generator().manual_seed(0)
    net = with_cameras(tiny(camera="ray", dim=32), g)
    text = Condition(torch.randn(2, 3, 5, generator=g), row_of(*camera_of(torch.randn(2, 12, 3, generator=g))))
    kept = []

    def run(net, keep="poses"):
        cache = net.new_cache(5, 1, True, keep)
        clip = joined(stream(net, noise_of(0, 1), text, schedule(1, 5.0), num_chunks=12, cache=cache))
        kept.append(cache.frames)
        return clip

    both(net, run)
    run(Fast(net), "latest")
    assert kept[0] == kept[1] != kept[2]


def test_far_from_the_start(tiny):
    """Bug: positions that lose their precision, or a table of them that ends: frame 5,000."""
    net, text = tiny(), torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))

    def run(net):
        cache = net.new_cache(5, 1, True)
        net.append(cache, noise_of(1, 1)(0, 0), text)
        cache.next_frame = 5000
        return joined(stream(net, noise_of(0, 1), text, schedule(1, 5.0), num_chunks=8, cache=cache))

    both(net, run)


def test_memory_is_the_window_and_stays_in_place(tiny):
    """Bug: frames held that nobody will see, a buffer that is made anew, memory that grows with the clip."""
    net, text = tiny(num_layers=2), torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0))
    fast = Fast(net)
    cache, places = fast.new_cache(6, 1, True), set()
    for i, _ in enumerate(stream(fast, noise_of(0, 2, b=1), text, schedule(1, 5.0), num_chunks=100, cache=cache)):
        if i > 0:
            places.add(tuple(held.data_ptr() for held in (*cache.keys, *cache.values)))
    assert isinstance(cache, Buffer) and len(places) == 1
    frame = 6 * net.config.dim * 4  # bytes: 2 x 3 tokens, float32
    held = [x.untyped_storage().nbytes() for x in (*cache.keys, *cache.values)]
    assert held == 4 * [6 * frame]  # the window's frames, of keys and of values, in each of two layers
    assert [x.untyped_storage().nbytes() for x in cache.sink_keys] == 2 * [frame]


def test_a_clip_at_once_needs_no_buffer(tiny):
    """Bug: keys and values of a whole clip that are stored although no later chunk reads them: at Wan's size 6 GB."""
    net, text, x = tiny(), torch.randn(2, 3, 5), noise_of(0, 6)(0, 0)
    fast = Fast(net)
    cache = fast.new_cache()
    close(fast(x, 0.5, text, cache=cache), net(x, 0.5, text), 1e-5)
    assert cache.keys == [None, None]


def test_the_prompt_is_read_once(tiny):
    """Bug: text that is embedded in every forward, or that stays what it was for the first chunk."""
    net, read = tiny(), []
    words = torch.randn(3, 2, 3, 5, generator=torch.Generator().manual_seed(1)).unbind()
    with torch.no_grad():
        both(net, lambda net: joined(stream(net, noise_of(0, 2), lambda i: words[i], schedule(1, 5.0), num_chunks=3)))
    fast = Fast(net)
    fast.net.text_embedding.register_forward_hook(lambda *_: read.append(1))
    text = torch.randn(2, 3, 5)
    list(stream(fast, noise_of(0, 1), text, schedule(2, 5.0), num_chunks=4))
    assert len(read) == 1


@torch.no_grad()
def test_what_is_committed_ends_with_its_last_keys(tiny):
    """Bug: feed-forward layers of the last block that run for tokens whose velocity nobody asks for."""
    fast, seen = Fast(tiny()), []
    fast.net.blocks[-1].ffn.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    list(stream(fast, noise_of(0, 2), torch.randn(2, 3, 5), schedule(2, 5.0), num_chunks=3, commit_last=True))
    assert seen == 6 * [2 * 6]  # two frames of six tokens: no commit, and not both chunks of a fused one


def test_weights_are_the_networks_own(tiny):
    """Bug: a copy of the weights, which training, an EMA or a loaded checkpoint does not reach."""
    net = tiny()
    fast, text, x = Fast(net), torch.randn(2, 3, 5), noise_of(0, 1)(0, 0)
    saved = {name: w.clone() for name, w in net.state_dict().items()}
    before = fast(x, 0.5, text, cache=fast.new_cache())
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    close(fast(x, 0.5, text, cache=fast.new_cache()), net(x, 0.5, text), 1e-5)
    net.load_state_dict(saved)
    close(fast(x, 0.5, text, cache=fast.new_cache()), before, 1e-6)


def test_bf16(tiny):
    """Bug: positions or norms in bf16. Both ways round their own way; they may differ as much as from float32."""
    net, text = tiny(), torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))

    def run(net):
        return joined(stream(net, noise_of(0, 1), text, schedule(2, 5.0), num_chunks=8,
                             cache=net.new_cache(5, 1, True)))

    exact = run(Fast(net))
    net.bfloat16()
    with torch.no_grad():
        plain, fast = run(net), run(Fast(net))
    error, networks = ((x - exact).norm() / exact.norm() for x in (fast, plain))
    assert error < 1.3 * networks < 0.05


def test_compiled(tiny, monkeypatch):
    """Bug: a graph that breaks or is made anew for every layer and chunk; real arithmetic that turns the other way."""
    frames = []
    compile_ = torch.compile

    def backend(graph, inputs):
        frames.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda f, **how: compile_(f, backend=backend, fullgraph=True, **how))
    net, text = tiny(num_layers=3), torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))

    def run(net):
        with torch.no_grad():
            return joined(stream(net, noise_of(0, 1), text, schedule(2, 5.0), num_chunks=6,
                                 cache=net.new_cache(4, 1)))

    close(run(Fast(net, compiled=True)), run(net), 1e-5)
    assert len(frames) <= 6  # before and after, of one chunk and of two; after in the last layer


def test_the_fastest_backend_is_chosen(monkeypatch):
    """Bug: a backend that is guessed, measured for every call, or chosen although it cannot compute the shape."""
    asked = []

    def seconds(name, q, k, v):
        asked.append((name, k.shape[1]))
        return {"cudnn": float("inf"), "flash": 2.0, "efficient": 1.0}[name]

    monkeypatch.setattr(attention, "seconds", seconds)
    monkeypatch.setattr(torch, "randn", lambda *shape, device, dtype: torch.empty(shape))
    attention.measured.cache_clear()
    card = torch.device("cuda")
    assert {attention.fastest(card, torch.bfloat16, 1, 2, 8, 10, keys) for keys in (33, 50, 64)} == {"efficient"}
    assert asked == [("cudnn", 64), ("flash", 64), ("efficient", 64)]
    attention.measured.cache_clear()
    assert attention.fastest(torch.device("cpu"), torch.float32, 1, 2, 8, 10, 10) == "flash"


@pytest.mark.parametrize("backend", ["math", "flash"])
def test_a_backend_that_is_named_runs(tiny, backend):
    """Bug: a name that changes nothing."""
    from torch.profiler import profile
    fast, text = Fast(tiny(), backend), torch.randn(2, 3, 5)
    with profile() as seen:
        fast(noise_of(0, 1)(0, 0), 0.5, text, cache=fast.new_cache())
    ran = {event.key for event in seen.key_averages()}
    assert any("attention_math" in name for name in ran) == (backend == "math")
    assert any("flash_attention" in name for name in ran) == (backend == "flash")
    assert fast.backends_used == {backend}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_backends_of_a_gpu():
    """Bug: a backend that PyTorch does not know, or that runs and is not measured."""
    times = attention.measured(torch.device("cuda"), torch.bfloat16, 1, 12, 128, 1560, 2048)
    assert len(times) >= 2 and all(0 < seconds < 1 for seconds in times.values())


def test_a_look_at_another_length():
    """Bug: a forward of one frame behind a look at three, whose slots are not all its own."""
    buffer = Buffer(1, window=6, sink=1)
    for _ in range(6):
        buffer.begin([1], [True], 1)
    buffer.begin([3], [False], 1)
    with pytest.raises(ValueError, match="got a chunk of 1 frames.*expected one as long"):
        buffer.begin([1], [False], 1)
