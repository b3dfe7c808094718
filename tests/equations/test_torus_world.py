"""findings/torus.py: its images, the measure of its clips, and its motion, against closed forms."""

import math

import pytest
import torch
from conftest import close

from findings.torus import (BALLS, LIKELY, PAINTS, QUILTS, SIZE, SPEED, WINDS, along_the_world, come_along, guided_way,
                            render)
from worlds.draws import generator


@pytest.mark.parametrize("world", [BALLS, QUILTS], ids=["balls", "quilts"])
def test_a_clip_is_read_as_it_was_drawn(world):
    """Bug: an object that is torn at the edge, a centre that is off, a step that goes the longer way round, quarters
    that are confused, latents that are not scaled back."""
    xy, labels = world.flights(range(60), 6, 3)
    x, told = world.clips(range(60), 6, 3)
    found, colours, distance = world.track(x, labels)
    off = found - xy
    assert torch.equal(labels, told) and distance.max() < 1e-3
    close((off + SIZE / 2) % SIZE, torch.full_like(off, SIZE / 2), 0.05)
    close(off, off[:, :1].expand_as(off), 0.05)  # no multiple of SIZE is lost on the way
    assert (colours[..., 0] == (labels // len(WINDS))[:, None]).all()
    if world.quilts:
        shown = colours[:, 0]
        assert (colours == shown[:, None]).all() and len(shown.unique(dim=0)) > 40
        mean, std = world.light
        again = (render(shown[:, None].expand(-1, 6, -1), xy) - mean) / std
        close(again, x)


def test_the_measure_sees_what_is_wrong():
    """Bug: quarters that change their colours count as kept, a blur as valid, a clip that stands still as lively."""
    world = QUILTS
    x, labels = world.clips(range(200), 4, 5)
    found = world.measure(x, labels)
    assert found["kept"] == 1 and found["render_error"] < 1e-3 and abs(found["motion"] - 1) < 1e-2
    assert found["motion_w1"] < 0.25
    still = world.measure(x[:, :1].expand(-1, 4, -1, -1, -1), labels)
    assert still["motion"] < 1e-3 and still["motion_w1"] > 2
    blurred = world.measure((x + x.roll(3, -1)) / 2, labels)
    assert blurred["render_error"] > 0.1
    others = torch.cat([x[:, :1], x.roll(1, 0)[:, 1:]], 1)  # those of another quilt
    assert world.measure(torch.cat([others[:, :2], x[:, 2:]], 1), labels, since=2)["kept"] == 1
    by_chance = world.measure(others, labels)["kept"]
    assert abs(by_chance - 1 / 4) < 0.08
    with pytest.raises(ValueError, match="non-finite"):
        world.measure(x * torch.nan, labels)


def test_the_quarter_in_the_prompt_does_not_count_as_kept():
    """Bug: a student that obeys the prompt and draws the rest anew seems to remember a quarter of it."""
    xy, labels = QUILTS.flights(range(40), 4, 5)
    told, (mean, std) = (labels // len(WINDS))[:, None].expand(-1, 4), QUILTS.light
    others = torch.cat([told[:, :1], (told[:, 1:] + 1) % len(PAINTS)], 1)
    rgb = render(torch.stack([told, others, others, others], 1), xy)
    assert QUILTS.measure((rgb - mean) / std, labels)["kept"] == 0


def test_the_way_along_the_wind_has_its_moments():
    """Bug: a wind that is another's, a standard deviation of one step."""
    xy, labels = BALLS.flights(range(4000), 12, 6)
    come = come_along(xy, labels)
    for frame in (2, 5, 12):
        mean, std = along_the_world(frame)
        assert abs(come[:, frame - 1].mean() - mean) < 4 * std / math.sqrt(4000)
        assert abs(come[:, frame - 1].std() / std - 1) < 0.05


def test_guidance_leads_ahead_by_as_much_as_it_should():
    """Bug: a step that is tilted twice or not at all, a past that tells no wind, or steps that it no longer shows."""
    for frame in (2, 9, 40):
        close(guided_way(1.0, 40)[frame - 1], torch.tensor(along_the_world(frame)[0]).double(), 1e-6)
    p = LIKELY**3 / (LIKELY**3 + (1 - LIKELY) ** 3)  # at first both steps are as likely without a prompt
    close(guided_way(3.0, 2)[1], torch.tensor(SPEED * (2 * p - 1)).double(), 1e-6)

    g, w, window, n, frames = generator(7), 3.0, 4, 20_000, 9  # drawn one by one, with the past of each clip
    signs, way = torch.zeros(n, 0), torch.zeros(n)
    for _ in range(frames - 1):
        shown = signs[:, -(window - 2) :]
        of_wind = torch.stack([torch.where(shown == s, LIKELY, 1 - LIKELY).prod(1) for s in (1, -1)], 1)
        of_wind = of_wind / of_wind.sum(1, keepdim=True)
        free = of_wind @ torch.tensor([LIKELY, 1 - LIKELY])
        odds = (LIKELY / (1 - LIKELY)) ** w * (free / (1 - free)) ** (1 - w)
        step = torch.where(torch.rand(n, generator=g) < odds / (1 + odds), 1.0, -1.0)
        signs, way = torch.cat([signs, step[:, None]], 1), way + SPEED * step
    got = guided_way(w, frames, window)[-1]
    assert abs(got - way.mean()) < 4 * way.std() / math.sqrt(n)
    assert abs(guided_way(w, frames, 8)[-1] - way.mean()) > 4 * way.std() / math.sqrt(n)


def test_a_ball_lies_where_it_should():
    """Bug: rows for columns, or an offset of half a pixel."""
    rgb = render(torch.tensor([[0], [2]]), torch.tensor([[2.5, 7.5], [0.0, 9.5]]))
    assert rgb.shape == (2, 3, SIZE, SIZE)
    close(rgb[0], rgb[0, :, (14 - torch.arange(SIZE)) % SIZE])  # the same above and below row 7 of 0 to 9
    close(rgb[1], rgb[1, :, :, (9 - torch.arange(SIZE)) % SIZE])  # and on both sides of the edge
    assert rgb[0, 0].argmax() == 72 and rgb[0, 1:].max() == 0 and rgb[1, :2].max() == 0
    close(rgb.amax((1, 2, 3)), PAINTS.amax() * torch.ones(2), 0.01)
