"""Cameras in self-attention: the formula token by token, poses that count only by their relation, every layout; and
networks that predict x_0."""

import math

import pytest
import torch
from conftest import close, close_norm

from cameras import KINDS, covering, matrices, row_of, towards
from flowmap import Condition, Guided, bell_weight, loss_weight, of_frames, schedule, to_x0
from model import SIZES, WanConfig, rope_angles
from rollout import joined, recache, shared_noise, stream
from worlds.room import camera_of

SEEN = ("frame", "ray", "prope")  # the kinds that attention sees
LAYOUTS = ("bidirectional", "chunk", "clean", "cache", "cache and clean")


@pytest.fixture
def seeing(tiny):
    """seeing(kind, **config): a tiny network with cameras, whose prope_o is as random as all else. Of each frame it is
    told four other numbers, too."""
    def make(kind, **changes):
        net, g = tiny(**{**dict(dim=32, row_dim=4, camera=kind), **changes}), torch.Generator().manual_seed(0)
        for block in net.blocks if net.config.sees_cameras else ():
            torch.nn.init.normal_(block.self_attn.prope_o.weight, std=0.3, generator=g)
            torch.nn.init.normal_(block.self_attn.prope_o.bias, generator=g)
        return net
    return make


def rigid(g, *shape):
    """Random rigid matrices `... 4 4`."""
    turn, m = torch.linalg.qr(torch.randn(*shape, 3, 3, generator=g))[0], torch.eye(4).repeat(*shape, 1, 1)
    m[..., :3, :3] = turn * torch.linalg.det(turn)[..., None, None]
    m[..., :3, 3] = torch.randn(*shape, 3, generator=g)
    return m


def rows_of(g, b, f):
    """Rows `b f 4+18`: four numbers and a camera, anywhere, with two focal lengths from .4 to 1.2."""
    focal = torch.cat([0.4 + 0.8 * torch.rand(b, f, 2, generator=g), torch.ones(b, f, 1)], -1)
    return torch.cat([torch.randn(b, f, 4, generator=g), row_of(rigid(g, b, f), torch.diag_embed(focal))], -1)


def inputs(b=2, f=6):
    """x, t, the condition, a clean clip; frames of 2 x 3 patches."""
    g = torch.Generator().manual_seed(1)
    x, clean = torch.randn(2, b, f, 3, 4, 6, generator=g)
    told = Condition(torch.randn(b, 3, 5, generator=g), rows_of(g, b, f))
    return x, torch.rand(b, f, generator=g), told, clean


def moved(told, frames, by):
    """The condition with the cameras of some frames multiplied from the right by a matrix, V <- V by."""
    rows = told.rows.clone()
    v = rows[:, frames, -18:-2]
    rows[:, frames, -18:-2] = (v.unflatten(-1, (4, 4)) @ by).flatten(-2)
    return Condition(told.words, rows)


def forward(net, layout, x, t, told, clean):
    """The last four frames' velocity in a layout; with a cache the first two are committed, clean."""
    if "cache" not in layout:
        how = {"bidirectional": {}, "chunk": {"chunk": 2}, "clean": {"chunk": 2, "clean": clean}}[layout]
        return net(x, t, told, **how)[:, 2:]
    held, cache = 1 if "clean" in layout else 2, net.new_cache()
    net.append(cache, clean[:, :held], of_frames(told, 0, held))
    how = {"clean": clean[:, 1:2]} if "clean" in layout else {}
    return net(x[:, 2:], t[:, 2:], of_frames(told, held, 6), cache=cache, **how)


# ---------------------------------------------------------------------------------------------------------------------
# The formula

def turned(angles):
    """The rotation of pairs of channels by angles, as one matrix."""
    return torch.block_diag(*(torch.stack([torch.stack([a.cos(), -a.sin()]), torch.stack([a.sin(), a.cos()])])
                              for a in angles))


def defined(kind, row, i, j, h, w, dh):
    """P of the patch in row i, column j of a frame whose camera is `18`, for all channels of a head, `dh dh`."""
    v, fx, fy = row[:16].reshape(4, 4).double(), *row[16:].double()
    if kind == "ray":
        z = torch.stack([((j + 0.5) / w - 0.5) / fx, ((i + 0.5) / h - 0.5) / fy, torch.ones_like(fx)])
        x = torch.linalg.cross(torch.tensor([0.0, 1, 0]).double(), z)  # level, like the image's rows
        axes = torch.stack([x / x.norm(), torch.linalg.cross(z, x) / (z.norm() * x.norm()), z / z.norm()])
        return torch.block_diag(*dh // 4 * [torch.block_diag(axes, torch.ones(1, 1).double()) @ v])
    lifted = torch.block_diag(fx, fy, torch.eye(2).double()) @ v
    if kind == "frame":
        return torch.block_diag(*dh // 4 * [lifted])
    speeds = 100.0 ** (-torch.arange(dh // 8).double() / (dh // 8))  # arXiv 2507.10496: half, a quarter, a quarter
    return torch.block_diag(*dh // 8 * [lifted], turned(j * speeds), turned(i * speeds))


def attended(q, k, v, on_q, on_k, on_v, on_o):
    """Attention of one head, q k v `n dh`, with a matrix of every token on q, k, v and the output."""
    out = []
    for i in range(len(q)):
        logits = torch.stack([(on_q[i] @ q[i]) @ (on_k[j] @ k[j]) for j in range(len(k))]) / math.sqrt(q.shape[1])
        out.append(on_o[i] @ sum(a * (on_v[j] @ v[j]) for j, a in enumerate(logits.softmax(0))))
    return torch.stack(out)


@pytest.mark.parametrize("kind", SEEN)
@torch.no_grad()
def test_self_attention_token_by_token(seeing, kind):
    """Bug: any deviation from o(RoPE) + prope_o(P softmax((P^T q) (P^-1 k)^T / sqrt d) P^-1 v): a transpose or an
    inverse left out, matrices of another frame or patch, RoPE on the cameras' heads, the branches exchanged."""
    net, (x, t, told, _), h, w = seeing(kind, dim=64), inputs(f=3), 2, 3
    block, got, clip = net.blocks[1], {}, 1  # in its second block, the second of two clips
    attn, n, dh = block.self_attn, 3 * h * w, 32
    for name, module in dict(q=attn.norm_q, k=attn.norm_k, v=attn.v).items():
        module.register_forward_hook(lambda _, args, out, name=name: got.update({name: out[clip].double()}))
    block.register_forward_pre_hook(lambda _, args: got.update(before=args[0][clip], time=args[1][clip]))
    block.norm3.register_forward_pre_hook(lambda _, args: got.update(after=args[0][clip]))
    net(x, t, told)
    p = [defined(kind, row[4:], i, j, h, w, dh) for row in told.rows[clip] for i in range(h) for j in range(w)]
    inverse, one = [torch.linalg.inv(m) for m in p], n * [torch.eye(dh).double()]
    rope = [turned(angles) for angles in rope_angles(torch.arange(3), h, w, dh)]
    heads = list(zip(*(got[name].split(dh, 1) for name in "qkv")))
    by_rope, by_camera = (torch.cat([attended(*head, *on) for head in heads], 1).float() for on in (
        (rope, rope, one, one), ([m.T for m in p], inverse, inverse, p)))
    gate = (block.modulation[0, 2] + got["time"][:, 2]).repeat_interleave(h * w, 0)
    close(got["after"] - got["before"], gate * (attn.o(by_rope) + attn.prope_o(by_camera)))
    assert min(attn.o(by_rope).std(), attn.prope_o(by_camera).std()) > 0.3  # neither is lost beside the other


@pytest.mark.parametrize("kind", SEEN)
def test_the_inverse_is_the_inverse(kind):
    """Bug: P^-1 that is only P^T, or of other focal lengths; cameras that are lost where the last frame, the origin,
    has none."""
    rows = rows_of(torch.Generator().manual_seed(0), 2, 3)[..., 4:]
    p, inverse = matrices(kind, rows, 2, 3, 32)
    close(p @ inverse, torch.eye(4).expand_as(p))
    rows[:, -1] = 0
    p, inverse = matrices(kind, rows, 2, 3, 32)
    close((p @ inverse)[:, :-1], torch.eye(4).expand_as(p[:, :-1]))


def test_a_ray_is_a_camera_turned_to_the_middle_of_its_patch():
    """Bug: a ray through the corner of its patch, by the other focal length, or mirrored; a camera that is stretched or
    moved with its turn. What lies on the ray must be straight ahead, as far away as before; and a level camera that
    sees a patch on the horizon must be the level camera with another heading."""
    rows, h, w, far = rows_of(torch.Generator().manual_seed(0), 2, 3)[..., 4:], 3, 4, 2.5
    p, _ = matrices("ray", rows, h, w, 16)
    i, j = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    fx, fy = rows[..., 16:].unbind(-1)
    ray = torch.stack([((j + 0.5) / w - 0.5).flatten() / fx[..., None], ((i + 0.5) / h - 0.5).flatten() / fy[..., None],
                       torch.ones(2, 3, h * w)], -1)
    ray = far * ray / ray.norm(dim=-1, keepdim=True)
    v = rows[..., :16].unflatten(-1, (4, 4))[:, :, None]
    v = v @ torch.linalg.inv(v[:, -1:])  # the last frame's camera is the origin
    world = torch.linalg.inv(v) @ torch.cat([ray, torch.ones(2, 3, h * w, 1)], -1)[..., None]
    close((p[..., 0, :, :] @ world)[..., 0], torch.tensor([0, 0, far, 1]).expand(2, 3, h * w, 4))
    turn = (p[..., 0, :, :] @ torch.linalg.inv(v))[..., :3, :3]
    close(turn @ turn.transpose(-1, -2), torch.eye(3).expand_as(turn))
    assert (torch.linalg.det(turn) - 1).abs().max() < 1e-5

    pose = torch.tensor([0.3, -0.8, 1.1])
    p, _ = matrices("ray", row_of(*camera_of(pose))[None, None], h, w, 16)
    for column in range(w):  # the room's field of view is 90 degrees; a heading grows to the left
        heading = pose - torch.tensor([0, 0, math.atan(2 * ((column + 0.5) / w - 0.5))])
        close(p[0, 0, w + column, 0] @ camera_of(pose)[0], camera_of(heading)[0])


# ---------------------------------------------------------------------------------------------------------------------
# What cameras mean

@pytest.mark.parametrize("kind", SEEN)
@torch.no_grad()
def test_a_walk_may_lead_far_away(seeing, kind):
    """Bug: absolute positions that bf16 rounds: far from the start, small steps would be lost."""
    net, (x, t, told, clean), by = seeing(kind).bfloat16(), inputs(), torch.eye(4)
    by[:3, 3] = torch.tensor([50.0, -30, 200])
    for layout in LAYOUTS:
        near, far = (forward(net, layout, x, t, of, clean) for of in (told, moved(told, slice(None), by)))
        close(far, near, 0.02)


@pytest.mark.parametrize("kind", SEEN)
@torch.no_grad()
def test_only_relative_poses_count(seeing, kind):
    """Bug: a choice of world coordinates that enters attention, or a camera that nobody sees, or one that frames before
    it see. A network that is told nothing but cameras."""
    net, (x, t, told, clean) = seeing(kind, row_dim=0), inputs()
    told, by = Condition(told.words, told.rows[..., 4:]), rigid(torch.Generator().manual_seed(2))
    for how, sees in (({}, range(6)), ({"chunk": 2, "clean": clean}, range(2, 6))):
        want = net(x, t, told, **how)
        close(net(x, t, moved(told, range(6), by), **how), want)
        change = (net(x, t, moved(told, [3], by), **how) - want).abs().amax((0, 2, 3, 4))
        assert (change > 1e-2).nonzero()[:, 0].tolist() == change.nonzero()[:, 0].tolist() == list(sees)


@torch.no_grad()
def test_unseen_cameras_are_not_seen(seeing):
    """Bug: camera numbers that reach the embedding of t, or the other numbers of a row that do not."""
    net, (x, t, told, _) = seeing("unseen"), inputs()
    v = net(x, t, told)
    assert torch.equal(net(x, t, moved(told, [3], rigid(torch.Generator().manual_seed(2)))), v)
    other = Condition(told.words, torch.cat([told.rows[..., :4] + 1, told.rows[..., 4:]], -1))
    assert (net(x, t, other) - v).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_network_with_cameras_begins_as_the_one_without(tiny, kind):
    """Bug: a text-to-video model that is another one as soon as it is given cameras."""
    net, plain, (x, t, told, clean) = tiny(dim=32, row_dim=4, camera=kind), tiny(dim=32, row_dim=4), inputs()
    added = [name for name in net.state_dict() if "prope_o" in name]
    assert len(added) == (0 if kind == "unseen" else 4)
    plain.load_state_dict({name: w for name, w in net.state_dict().items() if name not in added})
    for layout in LAYOUTS:
        want = forward(plain, layout, x, t, Condition(told.words, told.rows[..., :4]), clean)
        assert torch.equal(forward(net, layout, x, t, told, clean), want), layout


@pytest.mark.parametrize("kind", SEEN)
def test_a_frame_without_a_camera(seeing, kind):
    """Bug: 0 / 0 where a row is zero; a frame without a camera that gets something from the others' values, or gives
    them of its own."""
    net, (x, t, told, _), out = seeing(kind, num_layers=1), inputs(), []
    told.rows[:, 2, 4:] = 0
    prope_o = net.blocks[0].self_attn.prope_o
    prope_o.register_forward_hook(lambda _, args, y: out.append((y - prope_o.bias).detach().unflatten(1, (6, 6))))
    net(x, t, told).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    other = x.clone()
    other[:, 2] += 1
    with torch.no_grad():
        net(other, t, told)
        assert net(x, t, Condition(told.words, torch.zeros(2, 6, 22))).isfinite().all()
    assert out[0].abs().amax((0, 2, 3)).gt(1e-2).tolist() == [True, True, False, True, True, True]
    assert out[0][:, 2].abs().max() < 1e-6 and out[2].abs().max() < 1e-6
    close(out[1], out[0], 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Layouts

@pytest.mark.parametrize("kind", SEEN)
@torch.no_grad()
def test_bidirectional_is_one_chunk(seeing, kind):
    """Bug: heads of cameras that a layout turns by RoPE, or joins to other frames than those of the text's heads."""
    net, (x, t, told, clean) = seeing(kind), inputs()
    want = net(x, t, told)
    for how in ({"chunk": 6}, {"chunk": 6, "clean": clean}, {"cache": net.new_cache()}):
        close(net(x, t, told, **how), want, 1e-5)


@pytest.mark.parametrize("kind", SEEN)
@pytest.mark.parametrize("chunk, window, sink", [(1, None, 0), (2, None, 0), (2, 4, 0), (1, 3, 1), (3, 4, 1)])
@torch.no_grad()
def test_cached_rollout_equals_teacher_forcing(seeing, kind, chunk, window, sink):
    """Bug: a cache of keys and values of one half of the heads, or of cameras that lie at another frame once the window
    slides; teacher forcing whose clean stream has no cameras."""
    net, (x, t, told, clean) = seeing(kind, window=window, sink=sink), inputs()
    want, cache = net(x, t, told, chunk=chunk, clean=clean), net.new_cache()
    for i in range(0, 6, chunk):
        own, of = slice(i, i + chunk), of_frames(told, i, i + chunk)
        close(net(x[:, own], t[:, own], of, cache=cache), want[:, own], 1e-5)
        net.append(cache, clean[:, own], of)


@pytest.mark.parametrize("kind", SEEN)
@pytest.mark.parametrize("window, sink, relative", [(None, 0, False), (4, 1, False), (4, 1, True)])
@torch.no_grad()
def test_a_commit_on_the_way_is_a_commit(seeing, kind, window, sink, relative):
    """Bug: two chunks in one forward with the cameras of one of them, or exchanged."""
    net, (x, t, told, clean), caches = seeing(kind), inputs(), []
    for fused in (True, False):
        cache = net.new_cache(window, sink, relative)
        for i in (0, 2):
            net.append(cache, clean[:, i : i + 2], of_frames(told, i, i + 2))
        before = clean[:, 4:5]
        if fused:
            v = net(x[:, 5:], t[:, 5:], of_frames(told, 4, 6), cache=cache, clean=before)
        else:
            net.append(cache, before, of_frames(told, 4, 5))
            close(v, net(x[:, 5:], t[:, 5:], of_frames(told, 5, 6), cache=cache), 1e-5)
        caches.append([z for layers in (cache.keys, cache.values) for layer in layers for z in layer])
    for got, want in zip(*caches, strict=True):
        close(got, want, 1e-5)


def test_poses_are_covered():
    """Bug: the frame forgotten that shows what no other does, or the older of two that show the same; headings or
    places that do not count; the first frame or the last ones forgotten; one clip that decides for all."""
    def kept(poses, keep):
        rows = row_of(*camera_of(torch.tensor(poses, dtype=torch.float32)))
        return covering(rows if rows.ndim == 3 else rows[None], keep)

    turn = [[0, 0, a] for a in (0, 1, 2, 1, 3, 2, 3)]
    assert kept(turn, 7) == list(range(7)) and kept(3 * [turn], 6) == [0, 1, 2, 4, 5, 6]
    assert kept([[0, 0, a] for a in (0, 1, 2, 3, 2, 1, 0)], 5) == [0, 2, 3, 5, 6]  # 4 shows what 2 did
    walk = [[x, 0, 0] for x in (0, 1, 2, 2.1, 3, 3, 3)]
    assert kept(walk, 6) == [0, 1, 2, 4, 5, 6] and kept(walk, 4) == [0, 2, 5, 6]
    assert kept([[0, 0, 0], *3 * [[0, 0, 0.1]], [0, 0, 0], [0, 0, 0]], 3) == [0, 4, 5]
    assert [kept(turn, n) for n in (2, 1, 0)] == [[0, 6], [0], []]  # a window with no room for two recent frames
    assert kept([[[0, 0, a] for a in (0, by, 0.5, 0, 0)] for by in (0.1, 2)], 4) == [0, 1, 3, 4]
    assert kept([[0, 0, 0], [1.5, 0, 0], [1.5, 0, 0.3], [1.9, 0, 0], [0, 0, 3], [0, 0, 3]], 5) == [0, 1, 3, 4, 5]
    right, down = torch.tensor([[0, 0, 0.3, 0, 0], [0, 1.6, 0, 0, 0]])  # where the axes z point
    assert covering(row_of(towards(right, down), torch.eye(3).expand(5, 3, 3))[None], 4) == [0, 1, 3, 4]


@pytest.mark.parametrize("kind", SEEN)
@torch.no_grad()
def test_a_cache_that_covers_poses_is_one_of_these_frames(seeing, kind):
    """Bug: the latest frames kept, or frames forgotten by other cameras than theirs; a commit on the way that forgets
    others than one apart."""
    net, (x, t, told, clean) = seeing(kind, num_layers=1), inputs()
    rows = told.rows.clone()
    rows[:, 2, 4:] = rows[:, 1, 4:]  # frame 2 shows what frame 1 has shown
    told = Condition(told.words, rows)
    for fused in (True, False):
        cache = net.new_cache(5, 1, True, keep="poses")
        for i in range(4):
            net.append(cache, clean[:, i : i + 1], of_frames(told, i, i + 1))
        if fused:
            got = net(x[:, 5:], t[:, 5:], of_frames(told, 4, 6), cache=cache, clean=clean[:, 4:5])
        else:
            net.append(cache, clean[:, 4:5], of_frames(told, 4, 5))
            close(got, net(x[:, 5:], t[:, 5:], of_frames(told, 5, 6), cache=cache), 1e-5)
        assert cache.frames == [0, 1, 2, 3, 4]
    assert recache(net, cache, [(i, clean[:, i : i + 1]) for i in range(5)], told).keep == cache.keep == "poses"
    seen = [0, 1, 3, 4, 5]
    clip, times = torch.cat([clean[:, seen[:4]], x[:, 5:]], 1), torch.cat([torch.zeros(2, 4), t[:, 5:]], 1)
    close(got, net(clip, times, Condition(told.words, told.rows[:, seen]))[:, 4:], 1e-5)


@pytest.mark.parametrize("kind", SEEN)
@torch.no_grad()
def test_relative_positions_keep_their_cameras(seeing, kind):
    """Bug: a frame that moves up to a place in the live window and takes over the camera of that place. In one block
    a frame sees the others' inputs alone, so the frames of the window, as a clip of their own, give the same."""
    net, (x, t, told, clean) = seeing(kind, num_layers=1), inputs()
    cache = net.new_cache(window=4, sink=1, relative=True)
    for i in range(5):
        net.append(cache, clean[:, i : i + 1], of_frames(told, i, i + 1))
    seen = [0, 3, 4, 5]
    clip, times = torch.cat([clean[:, seen[:3]], x[:, 5:]], 1), torch.cat([torch.zeros(2, 3), t[:, 5:]], 1)
    want = net(clip, times, Condition(told.words, told.rows[:, seen]))[:, 3:]
    close(net(x[:, 5:], t[:, 5:], of_frames(told, 5, 6), cache=cache), want, 1e-5)


@pytest.mark.parametrize("kind", SEEN)
@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_cameras_travel_through_a_guided_rollout(seeing, kind, fused):
    """Bug: a chunk of a rollout that is made or committed with another one's cameras."""
    net, (x, _, told, _) = seeing(kind), inputs()
    model = Guided(net, torch.zeros(3, 5), 2.0)
    x0 = joined(stream(model, shared_noise(x[:, None], 2, 1, 1), told, schedule(1, 5.0), num_chunks=3, fused=fused))
    close(x - model(x, 1.0, told, chunk=2, clean=x0), x0, 1e-5)


@pytest.mark.parametrize("kind", SEEN)
@pytest.mark.parametrize("window, sink", [(None, 0), (4, 1)])
@torch.no_grad()
def test_new_words_leave_the_cameras(seeing, kind, window, sink):
    """Bug: a past that is told new words and with them other cameras, or none."""
    net, (x, t, told, clean) = seeing(kind), inputs()
    new, caches = Condition(told.words + 1, told.rows), [net.new_cache(window, sink) for _ in range(2)]
    history = [(i, clean[:, i : i + 1]) for i in range(5)]
    for cache, condition in zip(caches, (told, new)):
        for i, x0 in history:
            if condition is told or i in caches[0].frames:  # those that are dropped leave no trace
                cache.next_frame = i
                net.append(cache, x0, of_frames(condition, i, i + 1))
    got, want, old = (net(x[:, 5:], t[:, 5:], of_frames(new, 5, 6), cache=cache)
                      for cache in (recache(net, caches[0], history, new), caches[1], caches[0]))
    close(got, want, 1e-6)
    assert (got - old).abs().max() > 1e-2


# ---------------------------------------------------------------------------------------------------------------------
# Gradients

@pytest.mark.parametrize("kind", SEEN)
def test_gradient_reaches_all_that_cameras_use(seeing, tiny, kind):
    """Bug: a branch that is detached, so that it never learns, or that a start at zero never leaves."""
    x, t, told, clean = inputs()
    net = seeing(kind)
    for block in net.blocks:
        torch.nn.init.zeros_(block.self_attn.o.weight)  # RoPE's branch gives nothing
    net(x, t, told, chunk=2, clean=clean).square().mean().backward()
    start = tiny(dim=32, row_dim=4, camera=kind)
    start(x, t, told).square().mean().backward()
    for block, at_zero in zip(net.blocks, start.blocks):
        for name in "qkv":
            assert getattr(block.self_attn, name).weight.grad.norm() > 1e-4, name
        assert at_zero.self_attn.prope_o.weight.grad.norm() > 1e-4


@pytest.mark.parametrize("kind", SEEN)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpointing_has_the_same_gradient(seeing, kind, layout):
    """Bug: a block that is computed again without its cameras, or with those of another forward."""
    net, (x, t, told, clean), gradients = seeing(kind), inputs(), []
    for net.checkpointing in (False, True):
        net.zero_grad()
        v = forward(net, layout, x, t, told, clean)
        forward(net, layout, x, t, moved(told, [3], rigid(torch.Generator().manual_seed(3))), clean)  # in between
        v.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    close_norm(gradients[1], gradients[0], 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Networks that predict x_0

@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_head_that_gives_x0(seeing, layout):
    """Bug: a velocity of another frame's x_t or t, such as the clean one's, without a limit at t = 0, or with one that
    changes x_0 where t is not small."""
    net, plain, (x, t, told, clean) = seeing("ray", predicts_x0=True), seeing("ray"), inputs()
    plain.load_state_dict(net.state_dict())
    t[:, 2:] = torch.tensor([[0.05, 0.01, 1.0, 0.3], [0.0, 0.06, 0.7, 0.02]])
    v, head = (forward(of, layout, x, t, told, clean) for of in (net, plain))
    x, t = x[:, 2:], t[:, 2:]
    divisor = torch.tensor([[0.05, 0.05, 1.0, 0.3], [0.05, 0.06, 0.7, 0.05]])
    close(v, (x - head) / divisor[:, :, None, None, None])
    close(to_x0(x, v, t)[t >= 0.05], head[t >= 0.05])


def test_weights_of_the_loss_by_hand():
    """Bug: a name that stands for another weight; small t that counts as much as for a network that predicts v, or not
    at all."""
    t = torch.tensor([1.0, 0.1**0.5, 0.1, 0.0])
    assert loss_weight("flat", t, 3.0) is None
    assert torch.equal(loss_weight("bell", t, 3.0), bell_weight(t, 3.0))
    assert loss_weight("data", t, 3.0).tolist() == pytest.approx([1.0, 0.55, 0.1, 0.0])


# ---------------------------------------------------------------------------------------------------------------------
# Settings

def test_bad_cameras_are_named(seeing):
    """Bug: a kind that does not exist and is taken for another; heads that groups of four and quarters do not divide;
    rows without a camera, or with nothing else, that are cut at the wrong place."""
    with pytest.raises(ValueError, match="got camera 'rays', expected one of frame, ray, prope, unseen"):
        WanConfig(camera="rays")
    for kind in KINDS:
        with pytest.raises(ValueError, match="dim 48 .*num_heads 2 .*multiple of 16"):
            WanConfig(dim=48, num_heads=2, camera=kind)
        net, (x, t, told, _) = seeing(kind), inputs()
        assert net.config.row_width == 22
        for wrong in (4, 18):
            with pytest.raises(ValueError, match=rf"\(2, 6, {wrong}\).*expected \(2, 6, 22\)"):
                net(x, t, Condition(told.words, told.rows[..., :wrong]))
        with pytest.raises(ValueError, match=r"None.*expected \(2, 6, 22\)"):
            net(x, t, told.words)
    assert [SIZES[size].row_width for size in ("toy", "room", "room_unseen", "wan1.3b_camera")] == [0, 23, 23, 18]
