"""The network: official numbers, causality, and the cache that equals teacher forcing."""

import pytest
import torch
import torch.nn.functional as F
from conftest import close, close_norm

from flowmap import Condition, Guided
from model import SIZES, CausalWan, WanConfig, attention, rope_angles, rotate, sinusoid, visible


@pytest.mark.parametrize("size, parameters, tensors",
                         [("wan1.3b", 1_418_996_800, 825), ("wan14b", 14_288_491_584, 1_095)])
def test_official_sizes(size, parameters, tensors):
    """Bug: a missing bias or norm, or a name of ours, so that official weights would not load."""
    with torch.device("meta"):
        state = CausalWan(SIZES[size]).state_dict()
    assert sum(p.numel() for p in state.values()) == parameters
    assert len(state) == tensors


# -- the official implementations' numbers ----------------------------------------------------------------------------

def test_bidirectional_equals_wan(golden, golden_net):
    """Bug: any deviation from Wan 2.1 in embedding, modulation, RoPE, attention, head (golden B)."""
    g, net = golden("B_"), golden_net("W0")
    x = g["x"].transpose(1, 2).clone().requires_grad_()
    t = (g["t"] / 1000)[:, None].expand(x.shape[:2])
    v = net(x, t, g["context"])
    close(v, g["flow"].transpose(1, 2))
    (v * g["grad_weight"].transpose(1, 2)).sum().backward()
    close_norm(x.grad, g["grad_x"].transpose(1, 2))
    close(net(x, t, g["context"], num_blocks=1).flatten(1, 2), g["inter_block0_out"])
    close(net(x, t, g["context"], num_blocks=3).flatten(1, 2), g["inter_block2_out"])


def test_teacher_forcing_equals_causal_forcing(golden, golden_net):
    """Bug: a noisy chunk that sees its own clean version, or a clean stream with the wrong time (golden C1)."""
    g, net = golden("C1"), golden_net("W0")
    x, clean = g["x"].clone().requires_grad_(), g["clean_x"].clone().requires_grad_()
    v = net(x, g["t"] / 1000, g["context"], chunk=1, clean=clean)
    close(v, g["flow"])
    (v * g["grad_weight"]).sum().backward()
    close_norm(x.grad, g["grad_x"])
    close_norm(clean.grad, g["grad_clean_x"])


def test_diffusion_forcing_equals_causal_forcing(golden, golden_net):
    """Bug: a chunk-causal layout that leaks the future or loses the past (golden D1)."""
    g, net = golden("D1"), golden_net("W0")
    x = g["x"].clone().requires_grad_()
    v = net(x, g["t"] / 1000, g["context"], chunk=1)
    close(v, g["flow"])
    (v * g["grad_weight"]).sum().backward()
    close_norm(x.grad, g["grad_x"])


def test_positions_and_times(golden):
    """Bug: half-split instead of interleaved RoPE, axes out of order, [sin | cos] instead of [cos | sin] (golden G)."""
    g = golden("G_")
    for frames, want in ((range(2), "rope128_out"), (range(5, 7), "rope128_out_start_frame5")):
        angles = rope_angles(torch.as_tensor(frames), 3, 4, 128)[:, None]
        close(rotate(g["rope128_in"], torch.polar(torch.ones_like(angles), angles).to(torch.complex64)), g[want])
    close(sinusoid(g["sinus_t"].double() / 1000, 256), g["sinus_256"])


# -- layouts ----------------------------------------------------------------------------------------------------------

def inputs(b=2, f=6, config=None):
    g = torch.Generator().manual_seed(1)
    x, clean = torch.randn(2, b, f, 3, 4, 6, generator=g)
    return x, torch.rand(b, f, generator=g), torch.randn(b, 3, 5, generator=g), clean


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("window, sink", [(None, 0), (4, 0), (4, 1)])
def test_cached_rollout_equals_teacher_forcing(tiny, chunk, window, sink):
    """Bug: a cache with wrong positions, order, window or sink; teacher forcing that ignores the window."""
    net = tiny(window=window, sink=sink)
    x, t, text, clean = inputs()
    t = t[:, ::chunk].repeat_interleave(chunk, 1)
    want = net(x, t, text, chunk=chunk, clean=clean)
    cache = net.new_cache()
    for i in range(0, 6, chunk):
        own = slice(i, i + chunk)
        close(net(x[:, own], t[:, own], text, cache=cache), want[:, own], 1e-5)
        net.append(cache, clean[:, own], text)


def test_diffusion_forcing_of_clean_frames_is_the_clean_stream(tiny):
    """Bug: the clean stream of teacher forcing seeing anything but earlier clean chunks: a second route to the same
    number."""
    net = tiny()
    x, t, text, clean = inputs()
    mixed = torch.cat([clean[:, :4], x[:, 4:]], dim=1)
    times = torch.cat([torch.zeros_like(t[:, :4]), t[:, 4:]], dim=1)
    close(net(mixed, times, text, chunk=2)[:, 4:], net(x, t, text, chunk=2, clean=clean)[:, 4:], 1e-5)


@pytest.mark.parametrize("layout", ["bidirectional", "chunk", "clean"])
def test_causality_by_gradient(tiny, layout):
    """Bug: a frame that depends on what it must not see, or not on what it must. Read off the Jacobian, frame by
    frame."""
    net, f, chunk = tiny(), 6, 2
    x, t, text, clean = inputs(b=1)
    x.requires_grad_(), clean.requires_grad_()
    kwargs = {"bidirectional": {}, "chunk": {"chunk": chunk}, "clean": {"chunk": chunk, "clean": clean}}[layout]
    v = net(x, t, text, **kwargs)
    for i in range(f):
        seen = [z is not None and (z.flatten(2).abs().sum(2)[0] > 0).tolist() for z in
                torch.autograd.grad(v[:, i].square().sum(), (x, clean), retain_graph=True, allow_unused=True)]
        if layout == "bidirectional":
            assert seen[0] == [True] * f
        if layout == "chunk":
            assert seen[0] == [j // chunk <= i // chunk for j in range(f)]
        if layout == "clean":
            assert seen[0] == [j // chunk == i // chunk for j in range(f)]
            assert seen[1] == [j // chunk < i // chunk for j in range(f)]


@pytest.mark.parametrize("past, chunk, window, sink, seen", [
    (0, 1, None, 0, []), (5, 1, None, 0, [0, 1, 2, 3, 4]),
    (2, 1, 3, 0, [0, 1]), (3, 1, 3, 0, [1, 2]), (7, 1, 3, 0, [5, 6]),
    (2, 1, 3, 1, [0, 1]), (3, 1, 3, 1, [0, 2]), (7, 1, 3, 1, [0, 6]),
    (2, 1, 2, 1, [0]), (7, 1, 2, 1, [0]),  # a window of just the sink and the chunk
    (2, 2, 5, 1, [0, 1]), (4, 2, 5, 1, [0, 2, 3]), (6, 2, 5, 1, [0, 4, 5]), (6, 2, 4, 2, [0, 1]), (4, 2, 2, 0, []),
    (1, 2, 4, 2, [0])])
def test_visible_by_hand(past, chunk, window, sink, seen):
    """Bug: a frame too many or too few, a sink that is seen twice, or not at all where it fills the window."""
    assert visible(past, chunk, window, sink) == seen


@pytest.mark.parametrize("queries, keys", [(9, 7), (8, 8), (4, 32), (100, 100), (101, 100)])  # around both bounds
def test_attention_that_is_written_out_is_pytorchs(queries, keys):
    """Bug: another scale or a wrong axis in attention of short sequences, with or without gradient."""
    q, k, v = (torch.randn(2, n, 3, 8, requires_grad=True) for n in (queries, keys, keys))
    theirs = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    ours, g = attention(q, k, v), torch.randn(2, queries, 3, 8)
    close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), g), torch.autograd.grad(theirs, (q, k, v), g)):
        close(a, b)


@pytest.mark.parametrize("layout", ["bidirectional", "chunk", "clean", "cache", "cache and clean"])
def test_one_time_for_all_frames_may_be_a_number(tiny, layout):
    """Bug: a float t that is another time than the tensor full of it, or that the clean past is told as well."""
    net = tiny()
    x, _, text, clean = inputs()

    def velocity(net, text, t):
        how = {"bidirectional": {}, "chunk": {"chunk": 2}, "clean": {"chunk": 2, "clean": clean}}.get(layout)
        if how is None:
            how = {"cache": net.new_cache(), **({"clean": clean[:, 2:]} if "clean" in layout else {})}
            net.append(how["cache"], clean[:, :2], text)
        return net(x, t, text, **how)

    for model in (net, Guided(net, torch.zeros(3, 5), 2.0)):
        want = velocity(model, text, torch.full((2, 6), 0.5))
        assert torch.equal(velocity(model, text, 0.5), want)
        assert torch.equal(velocity(model, text, torch.full((2,), 0.5)), want)  # one for every clip
        assert not torch.equal(velocity(model, text, 0.6), want)


def test_window_and_sink_by_gradient(tiny):
    """Bug: a window off by one, or a sink that is dropped in training layouts. One block, so that seeing is direct."""
    net = tiny(num_layers=1, window=3, sink=1)
    x, t, text, _ = inputs(b=1)
    x.requires_grad_()
    v = net(x, t, text, chunk=1)
    seen = (torch.autograd.grad(v[:, 5].sum(), x)[0].flatten(2).abs().sum(2)[0] > 0).tolist()
    assert seen == [True, False, False, False, True, True]
    assert visible(5, 1, 3, 1) == [0, 4] and visible(2, 1, 3, 1) == [0, 1] and visible(7, 1, None, 0) == list(range(7))


def test_cache_is_read_only_and_detached(tiny):
    """Bug: gradient that leaks from a chunk into the past through the cache, or a forward that changes the cache."""
    net = tiny()
    x, t, text, clean = inputs()
    past = clean[:, :2].clone().requires_grad_()
    cache = net.new_cache(window=3, sink=1)  # too small for the past and a chunk of two frames
    net.append(cache, past, text)
    def held():
        return [z for layer in (*cache.keys, *cache.values) for z in layer]

    before = [z.clone() for z in held()]
    net(x[:, 2:4], t[:, 2:4], text, cache=cache).sum().backward()
    assert past.grad is None
    assert not any(z.requires_grad for z in held())
    assert all(torch.equal(a, b) for a, b in zip(before, held()))
    assert cache.frames == [0, 1] and cache.next_frame == 2
    net(past[:, :1], t[:, :1], text, cache=cache, commit=True)  # a commit that someone makes with gradient enabled
    assert not any(z.requires_grad for z in held()) and cache.next_frame == 3


def test_commit_on_the_way_carries_no_gradient(tiny):
    """Bug: gradient that flows into the chunk that a forward commits, by x or by the weights: it must be that of a
    commit of its own."""
    net = tiny()
    x, t, text, clean = inputs()
    past, gradients = clean[:, :2].clone().requires_grad_(), []
    for fused in (True, False):
        cache = net.new_cache()
        if not fused:
            net.append(cache, past, text)
        net.zero_grad()
        v = net(x[:, 2:4], t[:, 2:4], text, cache=cache, **({"clean": past} if fused else {}))
        v.square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    assert past.grad is None or not past.grad.any()
    for got, want in zip(*gradients):
        assert (got - want).norm() <= 1e-4 * want.norm() + 1e-6


def test_long_rollout_has_flat_memory_and_bounded_positions(tiny):
    """Bug: a cache that grows for ever, or relative positions that leave the range of training."""
    net = tiny()
    x, t, text, _ = inputs(b=1)
    cache = net.new_cache(window=4, sink=1, relative=True)
    for _ in range(12):
        net.append(cache, x[:, :1], text)
    v = net(x[:, :1], t[:, :1], text, cache=cache)
    assert cache.frames == [0, 9, 10, 11] and [k.shape[1] for k in cache.keys[0]] == 4 * [6]
    (seen,) = cache.visible_frames(1)
    assert [cache.positions(1)[i] for i in seen] == [0, 10, 11, 12]
    fresh = net.new_cache()  # the three frames of them that the next one sees, at positions 0, 1, 2
    fresh.keys = [[layer[i] for i in seen[:3]] for layer in cache.keys]
    fresh.values = [[layer[i] for i in seen[:3]] for layer in cache.values]
    fresh.frames, fresh.next_frame, fresh.batch = [0, 1, 2], 3, 1
    close(v, net(x[:, :1], t[:, :1], text, cache=fresh), 1e-6)


@pytest.mark.parametrize("call, message", [
    (lambda net, x, t, text: net(x[:, :, :2], t, text), "--size"),
    (lambda net, x, t, text: net(x, t[:, :1], text), "one time per frame"),
    (lambda net, x, t, text: net(x, t, text[:, :1]), "zero-padded"),
    (lambda net, x, t, text: net(x, t, text, chunk=4), "--chunk"),
    (lambda net, x, t, text: net(x, t, text, chunk=0), "--chunk"),
    (lambda net, x, t, text: net(x, t, text, clean=x), "chunk"),
    (lambda net, x, t, text: net(x, t, text, chunk=2, cache=net.new_cache()), "do not give chunk"),
    (lambda net, x, t, text: net(x, t, text, clean=x[:1], cache=net.new_cache()), "of any number of frames"),
    (lambda net, x, t, text: net(x[0], t, text), "five axes"),
    (lambda net, x, t, text: net(x, t, text, commit=True), "cache"),
    (lambda net, x, t, text: net(x, t, Condition(text, torch.ones(2, 6, 1))), "rows"),
    (lambda net, x, t, text: net.new_cache(window=0), "--window"),
    (lambda net, x, t, text: net.new_cache(window=2, sink=2), "--window"),
    (lambda net, x, t, text: WanConfig(dim=10, num_heads=3), "num_heads"),
])
def test_bad_input_is_named(tiny, call, message):
    """Bug: a shape error from deep inside torch in place of one that says what to change."""
    with pytest.raises(ValueError, match=message):
        call(tiny(), *inputs()[:3])


def test_bad_rows_are_named(tiny):
    """Bug: rows of the whole clip that are given for a chunk, or none, broadcast over the frames without a word."""
    net, (x, t, text, clean) = tiny(row_dim=4), inputs()
    rows = torch.randn(2, 6, 4)
    for wrong in (text, Condition(text, rows[:, :1]), Condition(text, rows[:1]), Condition(text, rows[:, :, :1])):
        for how in ({}, {"chunk": 2, "clean": clean}, {"cache": net.new_cache()}):
            with pytest.raises(ValueError, match="rows"):
                net(x, t, wrong, **how)
    with pytest.raises(ValueError, match="rows"):  # of the chunk that is committed on the way, too
        net(x[:, 2:], t[:, 2:], Condition(text, rows[:, 2:]), cache=net.new_cache(), clean=clean[:, :2])


def test_rows_of_a_frame_are_seen_by_gradient(tiny):
    """Bug: rows that reach another frame, or the clean stream of teacher forcing alone: the rows of frame 2 must move
    the frames that see it, its own noisy one included."""
    net, (x, t, text, clean) = tiny(row_dim=4), inputs(b=1)
    rows = torch.randn(1, 6, 4).requires_grad_()
    v = net(x, t, Condition(text, rows), chunk=2, clean=clean)
    for i in range(6):
        seen = torch.autograd.grad(v[:, i].square().sum(), rows, retain_graph=True)[0].abs().sum((0, 2)) > 0
        assert seen.tolist() == [j // 2 <= i // 2 for j in range(6)]
