"""The toy world: exact inversion, honest metrics, and draws that depend on nothing but their numbers."""

import pytest
import torch

import data


@pytest.fixture(scope="module")
def world():
    return data.motion(data.tracks(range(2000), 8, 1)[0])


@pytest.fixture(scope="module")
def real():
    return data.clips(range(256), 8, 2)


def test_inversion_is_exact():
    """Bug: x and y exchanged, a search that stops short, a shape taken for another."""
    xy, prompts = data.tracks(range(64), 4, 3)
    x, _ = data.clips(range(64), 4, 3)
    found, distance, by_prompt = data.invert(x.flatten(0, 1))
    assert (found - xy.flatten(0, 1)).abs().max() < 0.02
    assert distance.max() < 1e-3
    assert torch.equal(by_prompt.argmin(1), prompts.repeat_interleave(4))


def test_distance_is_to_the_nearest_render():
    """Bug: a distance that is not a mean square, or a refinement that makes it worse."""
    x, _ = data.clips(range(32), 2, 4)
    noisy = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    _, distance, by_prompt = data.invert(noisy.flatten(0, 1))
    to_truth = (noisy - x).square().flatten(2).mean(2).flatten()
    assert (distance <= to_truth + 1e-4).all() and (distance <= by_prompt.min(1).values + 1e-5).all()
    assert abs(distance.mean() - 0.09) < 0.01


def test_the_world_scores_perfectly(real, world):
    """Bug: a metric that a perfect model could not max out."""
    m = data.measure(*real, world)
    assert m["quality"] < 1e-4 and m["semantic"] == 1 and abs(m["dynamics"] - 1) < 0.05 and m["distance"] < 0.15


@pytest.mark.parametrize("name, spoil", [
    ("quality", lambda x: x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))),
    ("semantic", lambda x: x[:, :, [1, 2, 0]]),
    ("dynamics", lambda x: x[:, :1].expand_as(x)),
    ("drift", lambda x: x * torch.linspace(1, 0.5, 8)[:, None, None, None]),
    ("distance", lambda x: x[:, torch.randperm(8, generator=torch.Generator().manual_seed(0))]),
])
def test_each_metric_sees_its_defect(real, world, name, spoil):
    """Bug: a metric blind to noise, wrong colours, frozen clips, fading, or frames out of order."""
    good, bad = data.measure(*real, world)[name], data.measure(spoil(real[0]), real[1], world)[name]
    assert {"quality": bad > good + 0.05, "semantic": bad < 0.5, "dynamics": bad < 0.1, "drift": bad > 2,
            "distance": bad > good + 0.2}[name]


def test_flights_stay_inside_at_constant_speed_and_turn():
    """Bug: a bounce that lets the shape out or sends it the wrong way; a world without random turns."""
    xy, _ = data.tracks(range(500), 8, 5)
    assert xy.min() >= data.RADIUS - 1e-4 and xy.max() <= data.SIZE - data.RADIUS + 1e-4
    speed, turn = data.motion(xy)
    inside = ((xy - data.SIZE / 2).abs().max(-1).values < data.SIZE / 2 - data.RADIUS - data.SPEED)[:, :-1].flatten()
    assert (speed[inside] - data.SPEED).abs().max() < 1e-3  # far from walls nothing bounces
    assert (speed <= data.SPEED + 1e-3).all()
    straight = (turn < 1e-3).float().mean()
    assert 0.1 < straight < 1 - data.TURN + 0.05
    x = torch.tensor([data.RADIUS - 0.5, data.SIZE - data.RADIUS + 0.5])
    assert torch.allclose(data.bounce(x), torch.tensor([data.RADIUS + 0.5, data.SIZE - data.RADIUS - 0.5]))


def test_motion_by_hand():
    """Bug: a turn across +-pi counted the long way round, signed turns that cancel, angles in degrees: headings of 170,
    -170 and 100 degrees turn by 20 and by 90."""
    headings = torch.tensor([170.0, -170.0, 100.0]).deg2rad()
    steps = torch.tensor([1.0, 2.0, 3.0])[:, None] * torch.stack([headings.cos(), headings.sin()], 1)
    xy = torch.cat([torch.zeros(1, 2), steps.cumsum(0)])
    speed, turn = data.motion(torch.stack([xy, xy.flip(0)]))
    assert speed.tolist() == pytest.approx([1, 2, 3, 3, 2, 1], abs=1e-5)
    assert turn.rad2deg().tolist() == pytest.approx([20, 90, 90, 20], abs=1e-3)


def test_wasserstein_by_hand():
    """Bug: a distance of sorted samples that are not sorted, of means only, or squared: {0, 1} and {0, 3} are 1 apart,
    {0, 2} and {1, 1} are 1 apart although their means agree, and any sample moved by c is c apart."""
    a = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert data.wasserstein(a, a[torch.randperm(1000)] + 0.3) == pytest.approx(0.3, abs=1e-6)
    assert data.wasserstein(a, 3 * a) == pytest.approx(2 * a.mean().item(), rel=1e-3)
    for low, high, expected in (([0, 1], [0, 3], 1.0), ([0, 2], [1, 1], 0.5)):  # quantiles interpolate
        assert data.wasserstein(*(torch.tensor(x).double() for x in (low, high))) == pytest.approx(expected, abs=1e-9)


def test_measure_by_hand(world):
    """Bug: a drift against the first frame or upside down, a mean over other axes, a speed over another's, one vote a
    frame for the prompt: two clips of four frames, spoilt by known amounts."""
    x, prompts = data.clips(range(2), 4, 5)
    spoilt = torch.tensor([[0.0, 0.0, 0.1, 0.4], [0.0, 0.2, 0.1, 0.2]])  # offset of each frame
    m = data.measure(x + 1e-9 + spoilt[:, :, None, None, None], prompts, world)
    xy = data.tracks(range(2), 4, 5)[0]
    mean = lambda values: sum(values) / len(values)
    by_frame = [mean([data.invert(x[b, f][None] + spoilt[b, f])[1].item() for b in range(2)]) for f in range(4)]
    assert m["quality_by_frame"] == pytest.approx(by_frame, rel=1e-3, abs=1e-6)
    assert m["quality"] == pytest.approx(mean(by_frame), rel=1e-3) and m["semantic"] == 1
    assert m["drift"] == pytest.approx(by_frame[3] / by_frame[2], rel=1e-3)
    assert data.measure(x, (prompts + torch.tensor([0, 1])) % 12, world)["semantic"] == 0.5
    true = data.measure(x, prompts, world)
    speed, turn = data.motion(xy)
    assert true["dynamics"] == pytest.approx((speed.mean() / world[0].mean()).item(), abs=0.01)
    far = data.wasserstein(speed, world[0]) + data.wasserstein(turn, world[1])
    assert true["distance"] == pytest.approx(far, abs=0.05)


def test_draws_depend_on_their_numbers_only():
    """Bug: data or noise that changes with the batch, so that accumulation, ranks or resume would change a run."""
    x, prompts = data.clips(range(8), 4, 6)
    y, some = data.clips([5, 2], 4, 6)
    assert torch.equal(y, x[[5, 2]]) and torch.equal(some, prompts[[5, 2]])
    assert torch.equal(data.noises([3], (2, 2), 1, 7)[0], data.noises(range(4), (2, 2), 1, 7)[3])
    assert not torch.equal(data.noises([3], (2, 2), 1, 7), data.noises([3], (2, 2), 1, 8))
    assert not torch.equal(x, data.clips(range(8), 4, 7)[0])


def test_prompts_and_words():
    """Bug: a prompt outside the vocabulary that is silently taken for another."""
    assert all(data.parse_prompt(p) == i for i, p in enumerate(data.PROMPTS))
    assert data.parse_prompt("Red BALL") == data.parse_prompt("red ball")
    for wrong in ("purple ball", "red fox", "red", "red ball ball", "ball red"):
        with pytest.raises(ValueError, match="red, green, blue, yellow.*ball, bar, pole.*--prompt"):
            data.parse_prompt(wrong)
    words = data.embed(range(len(data.PROMPTS)))
    assert len({tuple(w.flatten().tolist()) for w in words}) == len(data.PROMPTS)
