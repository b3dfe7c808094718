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
