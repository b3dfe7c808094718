"""The room (worlds/room.py): geometry by hand, and measures that the truth passes and each bad model fails."""

import math
from itertools import product

import pytest
import torch
from conftest import close

from worlds import room
from worlds.room import AWAY_AND_BACK, WHOLE_TURN, Room, commanded, nearest_rooms, read, render, seen, shown

ROOM = Room()
CLIPS, FRAMES = 16, 16
RED = torch.tensor([[0, 1, 2, 3, 0, 0, 0, 0]])  # a room without pillars, red at +x


def rgb(x):
    return x * room.STD + room.MEAN


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and paths

def test_a_wall_has_the_height_that_geometry_says():
    """Bug: a wall that is bent, too high, or too dark. At depth 2 a wall of half-height .55 covers .55 / 2 of the image
    plane above the horizon, of which a unit is 12 rows: 3.3 rows of full wall, that is three and .3 of a fourth."""
    image = rgb(render(RED, torch.tensor([[[1.0, 0, 0]]])))[0, 0]
    wall = room.WALLS[0] / (1 + 0.12 * 2)
    for row, cover in ((3, 0), (4, 0.3), (5, 1), (10, 1), (11, 0.3), (12, 0)):
        above = row < 8
        depth = 12 * 0.55 / abs(row - 7.5)  # of ceiling or floor behind the middle of this row
        behind = torch.tensor(room.CEILING if above else room.FLOOR) / (1 + 0.12 * depth)
        expected = cover * wall + (1 - cover) * behind
        torch.testing.assert_close(image[:, row], expected[:, None].expand(3, room.W), atol=1e-5, rtol=0)


def test_corners_are_where_geometry_says():
    """Bug: another field of view, or left and right exchanged. At depth 4 the corners of the wall ahead are at a
    tangent of 3/4, 9 columns from the middle; the wall at +y is on the left."""
    walls = shown(RED, torch.tensor([[[-1.0, 0, 0]]]))[0, 0, :, :4].int().argmax(1)
    assert walls.tolist() == 3 * [1] + 18 * [0] + 3 * [3]


def test_a_pillar_has_the_width_and_depth_that_geometry_says():
    """Bug: a pillar at the wrong place. From the middle its axis is 1.3 sqrt 2 away, and a ray of tangent u meets it if
    |u| < .2113: the 8 rays at u = 1/72, 3/72 ... 15/72 on each side."""
    depth, _ = room.cast(torch.tensor([0.0, 0, math.pi / 4]))
    hit = depth[..., 4].isfinite()
    assert hit.sum() == 16 and hit[:, :9].sum() == hit[:, 15:].sum() == 0
    assert abs(depth[..., 4].min() - (1.3 * math.sqrt(2) - 0.38)) < 1e-3
    x = rgb(render(torch.tensor([[0, 1, 2, 3, 1, 0, 0, 0]]), torch.tensor([[[0.0, 0, math.pi / 4]]])))[0, 0]
    white = x[:, 7, 11:13]
    assert (white.amax(0) - white.amin(0)).max() < 1e-5 and (white - 1 / (1 + 0.12 * 1.4585)).abs().max() < 1e-2


def test_what_comes_back_is_the_same_frame():
    """Bug: headings that add up rounding errors, so that a perfect memory would still look wrong."""
    labels = commanded(ROOM.draw_labels(32, FRAMES, torch.Generator().manual_seed(0)), WHOLE_TURN)
    x = render(*read(labels)[:2])
    assert torch.equal(x[:, 12:], x[:, :4])
    labels = commanded(labels, AWAY_AND_BACK)
    x = render(*read(labels)[:2])
    assert torch.equal(x[:, 8:15], x[:, :7].flip(1)) and not torch.equal(x[:, 7], x[:, 0])


def test_walls_and_places_stop_the_walker():
    """Bug: a walker that goes through a wall or a pillar place, or is told that a stopped step took effect."""
    start = torch.tensor([[1.9, 0, 0], [0.3, 1.3, 0], [0, 0, math.pi / 4]])
    poses, done = room.integrate(start, torch.full((3, 4), room.FORWARD))
    assert done.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    torch.testing.assert_close(poses[:, -1, 0], torch.tensor([2.4, 0.3, math.sqrt(0.5)]))
    back, done = room.integrate(poses[:, -1], torch.full((3, 1), room.BACK))
    assert (done == room.BACK).all()
    torch.testing.assert_close(back[:, 0, 0], torch.tensor([1.9, -0.2, math.sqrt(0.5) / 2]))


def test_paths_do_not_depend_on_the_hidden_room():
    """Bug: a path that tells what stands where, or that only some rooms allow."""
    labels = ROOM.draw_labels(256, 40, torch.Generator().manual_seed(0))
    other = labels.clone()
    other[:, 3:11] = RED
    poses = read(labels)[1]
    assert torch.equal(poses, read(other)[1])
    assert not room.blocked(poses[..., :2]).any()
    assert torch.equal(labels, room.label_of(labels[:, :3], labels[:, 3:11], labels[:, 11:].long()))


def test_cameras_agree_with_the_ray_caster():
    """Bug: a camera matrix of another convention, or an image that is mirrored: points of the world must be drawn where
    the matrices project them."""
    rooms, poses, _ = read(ROOM.draw_labels(64, 8, torch.Generator().manual_seed(1)))
    view, intrinsics = room.camera_of(poses)
    assert (torch.linalg.det(view) - 1).abs().max() < 1e-5
    top = torch.tensor([[3.0, 1.0], [1.0, 3.0], [-3.0, 0.5], [0.2, -3.0]])  # upper edges of the four walls
    for height, points in ((0.0, room.PLACES), (room.EYE, top)):
        world = torch.cat([points, torch.full((4, 1), height), torch.ones(4, 1)], 1)
        seen = (view @ world.T)[..., :3, :]
        u, v, _ = ((intrinsics @ seen) / seen[..., 2:, :]).unbind(-2)  # (b f 4)
        depth = room.cast(poses)[0].amin(2)  # (b f W 8)
        for i in range(4):
            inside = (seen[..., 2, i] > 0.1) & (u[..., i] > 0) & (u[..., i] < 1)
            at = depth[inside][torch.arange(inside.sum()), (u[..., i][inside] * room.W).long()]
            assert len(at) > 20
            if height == 0:
                assert at[:, 4 + i].isfinite().all() and (v[..., i][inside] - 0.5).abs().max() < 1e-5
            else:
                near = (at[:, i] / seen[..., 2, i][inside]).log().abs()
                assert near.median() < 0.05
                assert (v[..., i] - 0.5 + 12 / 16 * 0.55 / seen[..., 2, i])[inside].abs().max() < 1e-4


def test_a_column_shows_what_could_change_it():
    """Bug: a column said to be determined by the past that depends on something else, such as an empty place before
    the wall, or one said to be new that does not."""
    labels = ROOM.draw_labels(48, 8, torch.Generator().manual_seed(2))
    rooms, poses, _ = read(labels)
    x, needed = render(rooms, poses), shown(rooms, poses)
    for variable in range(8):
        other = rooms.clone()  # two walls of one colour are fine here
        other[:, variable] = (other[:, variable] + 1) % (6 if variable < 4 else 4)
        changed = (render(other, poses) != x).any(3).any(2)
        assert torch.equal(changed, needed[..., variable]), variable


# ---------------------------------------------------------------------------------------------------------------------
# Draws

def test_a_clip_is_the_same_whatever_the_batch():
    """Bug: a clip that depends on its neighbours, so that ranks and micro-batches change the data."""
    x, labels = ROOM.clips(range(9), FRAMES, 3, 1)
    for i in (0, 5, 8):
        alone, label = ROOM.clips([i], FRAMES, 3, 1)
        assert torch.equal(alone[0], x[i]) and torch.equal(label[0], labels[i])
    other, _ = ROOM.clips(range(9), FRAMES, 3, 2)
    assert (other - x).square().mean((1, 2, 3, 4)).min() > 0.01


def test_half_of_the_clips_look_around():
    """Bug: data in which memory is hardly ever needed, or walks with other actions, or other pauses between them."""
    labels = ROOM.draw_labels(2000, 32, torch.Generator().manual_seed(0))
    rooms, poses, actions = read(labels)
    assert (poses[:, 0] == 0).all()
    side = torch.where(actions == room.LEFT, 1, 0) - torch.where(actions == room.RIGHT, 1, 0)

    def turned(n):  # from frame i to the next n, all to one side, after a frame of standing: i `b 6`
        sums = side.unfold(1, n, 1).sum(2).abs() == n
        return sums[:, 1:7] & (actions[:, :6] == room.NONE)

    whole = turned(12)
    away = torch.stack([turned(n) & (side[:, 1 : n + 7].unfold(1, n, 1)[:, :6] == -side[:, n + 1 : 2 * n + 7].unfold(
        1, n, 1)[:, :6]).all(2) for n in range(3, 8)]).any(0)
    assert abs(whole.any(1).float().mean() - 0.25) < 0.04 and abs(away.any(1).float().mean() - 0.25) < 0.05
    assert (whole.float().mean(0) > 0.02).all() and (away.float().mean(0) > 0.02).all()  # after 0 to 5 frames
    clip, i = whole.nonzero().T
    assert torch.equal(poses[clip, i + 12], poses[clip, i])
    walks = ~whole.any(1) & ~away.any(1)
    assert (actions[walks, 1:] == room.FORWARD).float().mean() > 0.2
    assert (actions[:, 0] == room.NONE).all()
    u = torch.rand(4000, room.numbers(3), generator=torch.Generator().manual_seed(0))
    u[:, 11] = 0.9  # nobody looks around; and nothing stops the first two steps
    first, second = room.drawn(u, 3)[:, 12:].long().T
    law = torch.tensor([0.08, 0.4, 0.12, 0.2, 0.2])
    assert (torch.bincount(first) / 4000 - law).abs().max() < 0.03
    assert abs((first == second).float().mean() - (0.6 + 0.4 * law.square().sum())) < 0.03
    assert (rooms[:, :4].sort(1).values.diff(dim=1) > 0).all()
    share = [torch.bincount(of.flatten()) / of.numel() for of in (rooms[:, :4], rooms[:, 4:])]
    assert all((of - 1 / len(of)).abs().max() < 0.02 for of in share) and list(map(len, share)) == [6, 4]


def test_unit_variance():
    """Bug: constants of another renderer: noise would be too weak or too strong for this world."""
    x, _ = ROOM.clips(range(384), FRAMES, 7)
    assert abs(x.mean()) < 0.04 and abs(x.std() - 1) < 0.02


def test_conditions():
    """Bug: rows of the wrong frames, or a prompt that is not what it says."""
    labels = ROOM.draw_labels(3, 6, torch.Generator().manual_seed(0))
    told = ROOM.embed(labels)
    actions, camera = told.rows.split([5, 18], -1)
    assert told.words.shape == (3, *ROOM.text_shape) and torch.equal(actions.argmax(-1), labels[:, 11:].long())
    assert (actions.sum(-1) == 1).all()
    viewmats, intrinsics = room.camera_of(read(labels)[1])
    viewmats[..., :3, 3] /= room.HALF  # the unit of length
    close(camera[..., :16].unflatten(-1, (4, 4)), viewmats, 1e-6)
    assert (camera[..., 16:] == torch.stack([intrinsics[..., 0, 0], intrinsics[..., 1, 1]], -1)).all()
    actions = ROOM.embed([ROOM.parse("Forward left left back")]).rows[..., :5].argmax(-1)
    assert actions.tolist() == [[room.NONE, room.FORWARD, room.LEFT, room.LEFT, room.BACK]]
    assert all(len(ROOM.parse(prompt)) == 11 + FRAMES for prompt in ROOM.prompts)
    with pytest.raises(ValueError, match="jump.*expected actions of none, forward"):
        ROOM.parse("forward jump")
    with pytest.raises(ValueError, match="non-finite"):
        ROOM.measure(torch.full((1, 4, *ROOM.latent_shape), math.nan), labels)


# ---------------------------------------------------------------------------------------------------------------------
# Measures

def test_the_nearest_room_is_that_of_brute_force():
    """Bug: tables of columns that are added up for the wrong rooms, so that a better room is missed."""
    labels = ROOM.draw_labels(3, 4, torch.Generator().manual_seed(4))
    _, poses, _ = read(labels)
    x = torch.randn(3, 4, *ROOM.latent_shape, generator=torch.Generator().manual_seed(5))
    walls = torch.tensor([of for of in product(range(4), repeat=4) if len(set(of)) == 4])
    places = torch.tensor(list(product(range(2), repeat=4)))
    rooms, best = nearest_rooms(x, poses, walls, places)
    every = torch.cat([torch.cat([of.expand(16, 4), places], 1) for of in walls])
    for i in range(3):
        errors = (render(every, poses[i : i + 1].expand(len(every), -1, -1)) - x[i]).square().mean((2, 3))  # (n f W)
        near = (render(rooms[i : i + 1], poses[i : i + 1]) - x[i]).square().mean()
        assert len(every) == 384 and abs(near - errors.mean((1, 2)).min()) < 1e-5
        torch.testing.assert_close(best[i], errors.amin(0), atol=1e-4, rtol=0)
    assert len(room.EVERY_WALLS.unique(dim=0)) == 360 and len(room.EVERY_PLACES.unique(dim=0)) == 256
    assert (room.EVERY_WALLS.sort(1).values.diff(dim=1) > 0).all()
    rooms, _ = nearest_rooms(x, poses)  # of all rooms: no other value of one variable, no exchange, is better
    near = (render(rooms, poses) - x).square().mean((1, 2, 3, 4))
    for variable in range(8):
        for value in range(6 if variable < 4 else 4):
            other = rooms.clone()
            if variable < 4:
                other[:, :4] = torch.where(other[:, :4] == value, other[:, variable, None], other[:, :4])
            other[:, variable] = value
            assert ((render(other, poses) - x).square().mean((1, 2, 3, 4)) > near - 1e-5).all()


def redraw(rooms, known, keys):
    """Rooms `b 8` of the world's law, given those variables of rooms that are known, `b 8`. keys: `b 10` in [0, 1)."""
    keys = keys.expand(len(rooms), 10).clone()
    walls, unseen = rooms[:, :4], ~known[:, :4]
    taken = (torch.nn.functional.one_hot(walls, 6).bool() & known[:, :4, None]).any(1)
    left = torch.where(taken, 2.0, keys[:, :6]).argsort(1)  # the colours that are left, in random order
    walls = torch.where(unseen, left.gather(1, (unseen.cumsum(1) - 1).clamp(min=0)), walls)
    return torch.cat([walls, torch.where(known[:, 4:], rooms[:, 4:], (4 * keys[:, 6:]).long())], 1)


@pytest.mark.parametrize("given", [1, 3, None])
def test_what_the_past_determines_is_what_all_its_futures_share(given):
    """Bug: errors on columns that nobody could know, or a memory that is asked for what the last frame shows."""
    g, labels = torch.Generator().manual_seed(6), ROOM.draw_labels(16, 6, torch.Generator().manual_seed(7))
    rooms, poses, _ = read(labels)
    truth, (determined, by_last) = render(rooms, poses), room.known(rooms, poses, given)

    def shared(i, first, end):  # columns of frame i that are the same in all rooms that show the same frames
        known = seen(rooms, poses[:, first:end])
        others = [redraw(rooms, known, torch.rand(16, 10, generator=g)) for _ in range(15)]
        return torch.stack([render(of, poses[:, i : i + 1])[:, 0] == truth[:, i] for of in others]).all(0).all(2).all(1)

    for i in range(given or 1, 6):
        assert torch.equal(determined[:, i], shared(i, 0, i if given is None else given))
        assert torch.equal(by_last[:, i], shared(i, i - 1, i))


# models: labels, the number of given true frames, a generator -> clips

def the_world(labels, given, g):
    return future(labels, given, torch.rand(len(labels), 10, generator=g))


def future(labels, given, keys):
    rooms, poses, _ = read(labels)
    return render(redraw(rooms, seen(rooms, poses[:, :given]), keys), poses)


def ignores_actions(labels, given, g):
    x = render(*read(labels)[:2])
    x[:, max(1, given):] = x[:, max(0, given - 1), None]
    return x


def forgets(labels, given, g):
    rooms, poses, _ = read(labels)
    x = render(rooms, poses)
    for i in range(max(1, given), x.shape[1]):
        rooms = redraw(rooms, seen(rooms, poses[:, i - 1 : i]), torch.rand(len(rooms), 10, generator=g))
        x[:, i] = render(rooms, poses[:, i : i + 1])[:, 0]
    return x


def always_the_same(labels, given, g):
    return future(labels, given, torch.linspace(0, 0.9, 10))


def blurs(labels, given, g):
    keys = torch.rand(4, 1, 10, generator=torch.Generator().manual_seed(9))
    return torch.stack([future(labels, given, of) for of in keys]).mean(0)


def scores(model):
    """All measures of a model, as the table has them."""
    g, labels = torch.Generator().manual_seed(1), ROOM.draw_labels(CLIPS, FRAMES, torch.Generator().manual_seed(0))

    def make(labels, of, given):
        n = 0 if given is None else given.shape[1]
        assert n == 0 or torch.equal(given, render(*read(labels)[:2])[:, :n])
        return model(labels, n, g)

    def jump(labels, real):
        return torch.stack([model(labels[:, : 11 + i + 1], i, g)[:, i] for i in range(FRAMES)], 1)

    asked = ROOM.ask(CLIPS, FRAMES, 1, make, jump, 0)
    return asked | ROOM.measure(model(labels, 0, g), labels)


FAILS = {  # what each model fails; it passes all else
    the_world: "",
    ignores_actions: "moved memory memory_error render_error validity variety",
    forgets: "memory memory_error return_error render_error",
    always_the_same: "variety",
    blurs: "render_error validity variety",
}


@pytest.mark.parametrize("model", FAILS)
def test_each_measure_sees_its_fault_and_no_other(model):
    """Bug: a measure that the truth does not pass, that a bad model passes, or that punishes another fault than it
    says."""
    got = scores(model)
    print(model.__name__, {k: round(v, 3) for k, v in got.items() if k != "render_error_by_frame"})
    wrong = {name: got[name] for name in "still moved memory memory_error return_error render_error validity".split()}
    wrong["variety"] = max(0, abs(got["variety"] - 1) - 0.25)  # of 32 clips
    failed = {name for name, much in wrong.items() if not much < 1e-6}
    assert all(much > 0.05 for name, much in wrong.items() if name in failed)
    assert failed == set(FAILS[model].split())


@pytest.mark.parametrize("given", [1, 4])
def test_variety_knows_the_law_of_the_world(given):
    """Bug: a world that is not as varied as itself, because a colour that the past shows cannot come again."""
    g, labels = torch.Generator().manual_seed(2), ROOM.draw_labels(500, 8, torch.Generator().manual_seed(3))
    rooms, poses, _ = read(labels)
    known = seen(rooms, poses[:, :given])
    futures = torch.stack([redraw(rooms, known, torch.rand(500, 10, generator=g)) for _ in range(3)])
    assert abs(room.variety(futures, poses, given) - 1) < 0.03
    assert room.variety(futures[:1].expand(2, -1, -1), poses, given) == 0


def test_variety_without_a_second_clip():
    """Bug: entropies of variables that nobody sees, or of other frequencies than they say."""
    labels = ROOM.draw_labels(4, 13, torch.Generator().manual_seed(0))
    labels[:, 3:11] = RED
    labels = commanded(labels, WHOLE_TURN)
    got = ROOM.measure(render(*read(labels)[:2]), labels)
    assert abs(got["wall_variety"] - math.log(4) / math.log(6)) < 1e-6 and got["pillar_variety"] == 0
    labels = labels[:, :12]
    labels[:, :3] = 0
    got = ROOM.measure(render(*read(labels)[:2]), labels)  # of one wall and perhaps of two places
    assert got["wall_variety"] == 0
    assert room.entropy(torch.arange(6), 6) == pytest.approx(1)
