"""The toy world: exact inversion, honest metrics, and draws that depend on nothing but their numbers."""

import pytest
import torch

from config import Config
from flowmap import Condition
from worlds import draws, room, sources, toy

WORLD = toy.Toy()


@pytest.fixture(scope="module")
def real():
    return WORLD.clips(range(256), 8, 2)


def test_inversion_is_exact():
    """Bug: x and y exchanged, a search that stops short, a shape taken for another."""
    xy, prompts = WORLD.tracks(range(64), 4, 3)
    x, _ = WORLD.clips(range(64), 4, 3)
    found, distance, by_prompt = toy.invert(x.flatten(0, 1))
    assert (found - xy.flatten(0, 1)).abs().max() < 0.02
    assert distance.max() < 1e-3
    assert torch.equal(by_prompt.argmin(1), prompts.repeat_interleave(4))


def test_distance_is_to_the_nearest_render():
    """Bug: a distance that is not a mean square, or a refinement that makes it worse."""
    x, _ = WORLD.clips(range(32), 2, 4)
    noisy = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    _, distance, by_prompt = toy.invert(noisy.flatten(0, 1))
    to_truth = (noisy - x).square().flatten(2).mean(2).flatten()
    assert (distance <= to_truth + 1e-4).all() and (distance <= by_prompt.min(1).values + 1e-5).all()
    assert abs(distance.mean() - 0.09) < 0.01


def test_the_world_scores_perfectly(real):
    """Bug: a metric that a perfect model could not max out."""
    m = WORLD.measure(*real)
    assert m["render_error"] < 1e-4 and m["prompt_accuracy"] == 1
    assert abs(m["motion"] - 1) < 0.05 and m["motion_w1"] < 0.15


@pytest.mark.parametrize("name, spoil", [
    ("render_error", lambda x: x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))),
    ("prompt_accuracy", lambda x: x[:, :, [1, 2, 0]]),
    ("motion", lambda x: x[:, :1].expand_as(x)),
    ("drift", lambda x: x * torch.linspace(1, 0.5, 8)[:, None, None, None]),
    ("motion_w1", lambda x: x[:, torch.randperm(8, generator=torch.Generator().manual_seed(0))]),
])
def test_each_metric_sees_its_defect(real, name, spoil):
    """Bug: a metric blind to noise, wrong colours, frozen clips, fading, or frames out of order."""
    good, bad = WORLD.measure(*real)[name], WORLD.measure(spoil(real[0]), real[1])[name]
    assert {"render_error": bad > good + 0.05, "prompt_accuracy": bad < 0.5, "motion": bad < 0.1, "drift": bad > 2,
            "motion_w1": bad > good + 0.2}[name]


def test_flights_stay_inside_at_constant_speed_and_turn():
    """Bug: a bounce that lets the shape out or sends it the wrong way; a world without random turns."""
    xy, _ = WORLD.tracks(range(500), 8, 5)
    assert xy.min() >= toy.RADIUS - 1e-4 and xy.max() <= toy.SIZE - toy.RADIUS + 1e-4
    speed, turn = toy.speeds_and_turns(xy)
    inside = ((xy - toy.SIZE / 2).abs().max(-1).values < toy.SIZE / 2 - toy.RADIUS - toy.SPEED)[:, :-1].flatten()
    assert (speed[inside] - toy.SPEED).abs().max() < 1e-3  # far from walls nothing bounces
    assert (speed <= toy.SPEED + 1e-3).all()
    straight = (turn < 1e-3).float().mean()
    assert 0.1 < straight < 1 - toy.TURN + 0.05
    x = torch.tensor([toy.RADIUS - 0.5, toy.SIZE - toy.RADIUS + 0.5])
    assert torch.allclose(toy.bounce(x), torch.tensor([toy.RADIUS + 0.5, toy.SIZE - toy.RADIUS - 0.5]))


def test_motion_by_hand():
    """Bug: a turn across +-pi counted the long way round, signed turns that cancel, angles in degrees: headings of 170,
    -170 and 100 degrees turn by 20 and by 90."""
    headings = torch.tensor([170.0, -170.0, 100.0]).deg2rad()
    steps = torch.tensor([1.0, 2.0, 3.0])[:, None] * torch.stack([headings.cos(), headings.sin()], 1)
    xy = torch.cat([torch.zeros(1, 2), steps.cumsum(0)])
    speed, turn = toy.speeds_and_turns(torch.stack([xy, xy.flip(0)]))
    assert speed.tolist() == pytest.approx([1, 2, 3, 3, 2, 1], abs=1e-5)
    assert turn.rad2deg().tolist() == pytest.approx([20, 90, 90, 20], abs=1e-3)


def test_wasserstein_by_hand():
    """Bug: a distance of sorted samples that are not sorted, of means only, or squared: {0, 1} and {0, 3} are 1 apart,
    {0, 2} and {1, 1} are 1 apart although their means agree, and any sample moved by c is c apart."""
    a = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert toy.wasserstein(a, a[torch.randperm(1000)] + 0.3) == pytest.approx(0.3, abs=1e-6)
    assert toy.wasserstein(a, 3 * a) == pytest.approx(2 * a.mean().item(), rel=1e-3)
    for low, high, expected in (([0, 1], [0, 3], 1.0), ([0, 2], [1, 1], 0.5)):  # quantiles interpolate
        assert toy.wasserstein(*(torch.tensor(x).double() for x in (low, high))) == pytest.approx(expected, abs=1e-9)


def test_measure_by_hand():
    """Bug: a drift against the first frame or upside down, a mean over other axes, a speed over another's, one vote a
    frame for the prompt: two clips of four frames, spoilt by known amounts."""
    x, prompts = WORLD.clips(range(2), 4, 5)
    spoilt = torch.tensor([[0.0, 0.0, 0.1, 0.4], [0.0, 0.2, 0.1, 0.2]])  # offset of each frame
    m = WORLD.measure(x + 1e-9 + spoilt[:, :, None, None, None], prompts)
    xy = WORLD.tracks(range(2), 4, 5)[0]
    mean = lambda values: sum(values) / len(values)
    by_frame = [mean([toy.invert(x[b, f][None] + spoilt[b, f])[1].item() for b in range(2)]) for f in range(4)]
    assert m["render_error_by_frame"] == pytest.approx(by_frame, rel=1e-3, abs=1e-6)
    assert m["render_error"] == pytest.approx(mean(by_frame), rel=1e-3) and m["prompt_accuracy"] == 1
    assert m["drift"] == pytest.approx(by_frame[3] / by_frame[2], rel=1e-3)
    assert WORLD.measure(x, (prompts + torch.tensor([0, 1])) % 12)["prompt_accuracy"] == 0.5
    true = WORLD.measure(x, prompts)
    speed, turn = toy.speeds_and_turns(xy)
    world = toy.speeds_and_turns(WORLD.tracks(range(4096), 4, draws.WORLD)[0])
    assert true["motion"] == pytest.approx((speed.mean() / world[0].mean()).item(), abs=0.01)
    far = toy.wasserstein(speed, world[0]) + toy.wasserstein(turn, world[1])
    assert true["motion_w1"] == pytest.approx(far, abs=0.05)


def test_a_world_is_measured_by_its_own_motion():
    """Bug: another world's clips that are compared with the motion of the default one: a slow world would look half
    dead, although a model of it is perfect."""
    slow = toy.Toy(turn=0.1, speed=1.0)
    clips = slow.clips(range(256), 8, 2)
    own, other = slow.measure(*clips), WORLD.measure(*clips)
    assert abs(own["motion"] - 1) < 0.05 and own["motion_w1"] < 0.15 and own["prompt_accuracy"] == 1
    assert other["motion"] < 0.7 and other["motion_w1"] > 0.5
    xy, labels = slow.tracks(range(64), 8, 2)
    speed, turn = toy.speeds_and_turns(xy)
    assert speed.max() < 1.001 and (turn < 1e-3).float().mean() > 0.5 and torch.equal(labels, clips[1][:64])


class Told(toy.Toy):
    """A world that tells every frame two numbers besides the words."""

    def embed(self, labels):
        return Condition(super().embed(labels), labels[:, None, None].expand(-1, 4, 2).float())


@pytest.mark.parametrize("world", [WORLD, Told()])
def test_dropped_words_are_the_empty_prompts_and_rows_stay(world):
    """Bug: rows that are dropped with the words, words of the wrong clips, dropout in stages of DMD, or a slice of the
    batch that drops other clips than the whole."""
    cfg, source = Config(batch=32, frames=4, prompt_dropout=0.5, device="cpu"), sources.Drawn(world, 4)

    def clips(group, batch_slice=slice(None)):
        return draws.Draw(cfg, source, group, 3, batch_slice).clips()

    words_of = lambda text: text.words if isinstance(text, Condition) else text
    (x0, text), (_, undropped) = clips("bidirectional"), source.clips(range(96, 128), draws.CLIPS, cfg.seed, 0)
    kept = (words_of(text) == words_of(undropped)).flatten(1).all(1)
    assert 8 < kept.sum() < 24 and not words_of(text)[~kept].any() and words_of(undropped).flatten(1).any(1).all()
    assert torch.equal(x0, world.clips(range(96, 128), 4, draws.CLIPS, cfg.seed, 0)[0])
    if isinstance(text, Condition):
        assert torch.equal(text.rows, undropped.rows)
    part = clips("bidirectional", slice(8, 16))
    assert torch.equal(part[0], x0[8:16]) and torch.equal(words_of(part[1]), words_of(text)[8:16])
    assert words_of(clips("dmd")[1]).flatten(1).any(1).all()
    prompts = draws.Draw(cfg, source, "dmd", 3, slice(None)).prompts()
    part = draws.Draw(cfg, source, "dmd", 3, slice(8, 16)).prompts()
    assert torch.equal(words_of(part), words_of(prompts)[8:16]) and isinstance(part, type(prompts))


def test_dropped_rows_are_zeros_and_words_stay():
    """Bug: rows that are dropped with the words, in part, of the wrong clips, or otherwise in a slice of the batch."""
    source = sources.Drawn(room.Room(), 4)
    cfg = Config(batch=32, frames=4, prompt_dropout=0.5, row_dropout=0.5, device="cpu")
    source.empty_text = torch.ones(room.Room.text_shape)  # to be told from the room's words, which are zeros

    def clips(batch_slice):
        text = draws.Draw(cfg, source, "teacher_forcing", 3, batch_slice).clips()[1]
        return text.words, text.rows

    undropped = source.clips(range(96, 128), draws.CLIPS, cfg.seed, 1)[1].rows
    words, told = clips(slice(None))
    kept = told.flatten(1).any(1)
    assert 8 < kept.sum() < 24 and torch.equal(told[kept], undropped[kept])
    assert 4 < (kept & words.flatten(1).any(1)).sum() < 24 and 4 < (~kept & words.flatten(1).any(1)).sum()
    assert all(torch.equal(part, of[8:16]) for part, of in zip(clips(slice(8, 16)), (words, told)))


def test_draws_depend_on_their_numbers_only():
    """Bug: data or noise that changes with the batch, so that accumulation, ranks or resume would change a run."""
    x, prompts = WORLD.clips(range(8), 4, 6)
    y, some = WORLD.clips([5, 2], 4, 6)
    assert torch.equal(y, x[[5, 2]]) and torch.equal(some, prompts[[5, 2]])
    assert torch.equal(draws.noises([3], (2, 2), 1, 7)[0], draws.noises(range(4), (2, 2), 1, 7)[3])
    assert not torch.equal(draws.noises([3], (2, 2), 1, 7), draws.noises([3], (2, 2), 1, 8))
    assert not torch.equal(x, WORLD.clips(range(8), 4, 7)[0])


def test_prompts_and_words():
    """Bug: a prompt outside the vocabulary that is silently taken for another."""
    assert all(WORLD.parse(p) == i for i, p in enumerate(toy.PROMPTS))
    assert WORLD.parse("Red BALL") == WORLD.parse("red ball")
    for wrong in ("purple ball", "red fox", "red", "red ball ball", "ball red"):
        with pytest.raises(ValueError, match="red, green, blue, yellow.*ball, bar, pole.*--prompt"):
            WORLD.parse(wrong)
    words = WORLD.embed(range(len(toy.PROMPTS)))
    assert len({tuple(w.flatten().tolist()) for w in words}) == len(toy.PROMPTS)
