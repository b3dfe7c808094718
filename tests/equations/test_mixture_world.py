"""Causal Forcing++ Sec. 3.4 on a line: what consistency and distribution matching do with two modes, and with a history
that has drifted. World: bumps at -2 (40 %) and +2 (60 %); one-step students x_0 = mean + spread z, which cannot be
both bumps."""

import pytest
import torch
from exact_worlds import Mixture, least, normals, video

from causal_cd import causal_cd_loss
from dmd import dmd_loss
from flowmap import sample, schedule

WORLD = Mixture([-2.0, 2.0], 0.3, [0.4, 0.6])
MEAN, SPREAD = 0.4, (4 * 4 * 0.4 * 0.6 + 0.3**2) ** 0.5  # of the world as a whole


def test_mixture_velocity_samples_the_mixture():
    """Bug: a closed form that the other tests lean on and that is wrong."""
    x0 = sample(WORLD.velocity, normals(4000, 1), schedule(200, 1.0).double())
    right = x0[x0 > 0]
    assert abs(len(right) / 4000 - 0.6) < 0.04 and abs(right.mean() - 2) < 0.02 and abs(right.std() - 0.3) < 0.02


@pytest.fixture(scope="module")
def cd_student():
    """mean and spread of the student of consistency distillation, affine at each of 48 times (causal_cd_loss, no
    past)."""
    grid, x0 = schedule(48, 5.0).double(), WORLD.means[(torch.arange(4000) % 5 >= 2).long()] + 0.3 * normals(4000)
    clips, eps = video(x0[:, None]), video(normals(4000, 1, seed=1))
    weights = {}  # time -> slope and offset of v

    def student(weights):
        def net(x, t, text, chunk, clean):
            slope, offset = weights.get(t[0, 0].item(), (0.0, 0.0))
            return slope * x + offset
        return net

    def loss_at(k):
        def loss(w):
            net, index = student({grid[k].item(): w}), torch.full((4000, 1), k)
            return causal_cd_loss(net, student(weights), WORLD.net, clips, None, grid, index, eps, 1)[0]
        return loss

    for k in reversed(range(48)):
        weights[grid[k].item()] = least(loss_at(k), (2,))
    slope, offset = weights[1.0]
    return -offset.item(), 1 - slope.item()  # G(z) = z - v(z)


@pytest.fixture(scope="module")
def dmd_student():
    """mean and spread of the student of DMD with Eq. 4's weights and the exact critic of a Gaussian, from half
    way to the larger mode. (From the world's own mean and spread it stays there: a local optimum, since at high noise
    the two modes are one.)"""
    mean = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    spread = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([mean, spread], lr=0.01)
    t = torch.linspace(0.05, 0.95, 500, dtype=torch.float64)[:, None]
    for step in range(800):
        critic = Mixture(mean.detach(), spread.detach(), [1.0])
        z, eps = normals(500, 1, seed=2 * step), video(normals(500, 1, seed=2 * step + 1))
        optimizer.zero_grad()
        dmd_loss(video(mean + spread * z), None, critic.net, WORLD.net, t, eps, exact=True)[0].backward()
        optimizer.step()
    return mean.item(), abs(spread.item())


def mass(student, low, high):
    """Probability of a student's sample to lie in [low, high]."""
    normal = torch.distributions.Normal(*student)
    return (normal.cdf(torch.tensor(high)) - normal.cdf(torch.tensor(low))).item()


def test_consistency_covers_modes_and_dmd_seeks_one(cd_student, dmd_student):
    """Bug: a sign or a swap of scores that turns reverse KL around; a consistency target that is not the flow's end.
    CD (forward KL, a regression) keeps the mean between the modes and a spread that reaches both; DMD (reverse KL)
    sits on one."""
    assert abs(cd_student[0] - MEAN) < 0.1 and 0.8 * SPREAD < cd_student[1] < 1.1 * SPREAD
    assert abs(dmd_student[0] - 2) < 0.1 and dmd_student[1] < 0.5


def test_under_a_shifted_history_dmd_loses_its_good_mass_faster(cd_student, dmd_student):
    """CF++ Fig. 5(b): a drifted history moves what the student makes by delta, while good pictures stay where they are,
    within 1 of a mode. DMD starts with more good mass and loses nearly all of it; CD keeps most of its own."""
    def good(student, delta):
        moved = (student[0] + delta, student[1])
        return mass(moved, -3.0, -1.0) + mass(moved, 1.0, 3.0)
    for direction in (1, -1):
        cd, dmd = ([good(s, direction * delta) for delta in (0.0, 1.0, 2.0)] for s in (cd_student, dmd_student))
        assert dmd[0] > 0.95 > cd[0]
        assert dmd[0] - dmd[1] > cd[0] - cd[1] and dmd[2] < 0.2 < cd[2]
