"""Salt Eq. 1-10 and 14-16 where all is known: data N(m, S), in float64."""

import pytest
import torch
from conftest import close
from exact_worlds import Gaussian, kl, normals, sigma_points, video

from dmd import critic_loss, dmd_gradient, dmd_loss, kl_gradient, score_times
from flowmap import flow_matching_loss, sample, schedule, shift_timesteps
from sc_loss import path_defects, sc_loss, semigroup_defect

DATA = Gaussian(torch.tensor([0.7, -0.4], dtype=torch.float64),
                torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64))
POINT = Gaussian(DATA.mean, 1e-24 * torch.eye(2, dtype=torch.float64))  # all mass in one point: a straight flow
Z, EPS = sigma_points(2)  # expectations of quadratic functions over them are exact
TIMES = (0.2, 0.5, 0.8)


def at(t):
    """One time for all sigma points, `b 1`."""
    return torch.full((len(Z), 1), t, dtype=torch.float64)


# -- Salt Eq. 1-3, 5: velocity, flow map, semigroup, Euler ------------------------------------------------------------

@pytest.mark.parametrize("t", TIMES)
def test_flow_matching_is_least_at_the_exact_velocity(t):
    """Bug: a target of another sign, or x_t with t and 1 - t exchanged: the gradient by any affine change of the exact
    velocity would not be zero (Salt Eq. 1)."""
    W, b = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True), torch.zeros(2, dtype=torch.float64)
    b.requires_grad_()

    def net(x, times, text):
        x = x[..., 0, 0]
        return video(DATA.velocity(x, t) + x @ W + b)

    x0 = DATA.mean + Z @ DATA.spread(0.0, 0.5)
    loss, _ = flow_matching_loss(net, video(x0), None, at(t), video(EPS))
    loss.backward()
    assert W.grad.abs().max() < 1e-12 and b.grad.abs().max() < 1e-12 and loss > 0.1


def test_flow_map_is_the_flow_of_the_velocity():
    """Bug: a closed form that other tests lean on and that is wrong (Salt Eq. 2: dPhi/ds = v), or a flow map that does
    not compose (Salt Eq. 3)."""
    x, ds = normals(50, 2), 1e-6
    close(DATA.flow(DATA.flow(x, 1.0, 0.6), 0.6, 0.1), DATA.flow(x, 1.0, 0.1), 1e-13)
    slope = (DATA.flow(x, 0.9, 0.5 + ds) - DATA.flow(x, 0.9, 0.5 - ds)) / (2 * ds)
    close(slope, DATA.velocity(DATA.flow(x, 0.9, 0.5), 0.5), 1e-8)
    end = DATA.flow(normals(200_000, 2), 1.0, 0.0)
    close(end.mean(0), DATA.mean, 0.02)
    close(end.T.cov(), DATA.cov, 0.02)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_euler_has_order_one(shift):
    """Bug: a sampler that skips the last interval, mixes up t and s, or evaluates v at the wrong end (Salt Eq. 5)."""
    x, steps = normals(50, 1, 2), torch.tensor([32, 64, 128, 256])
    errors = torch.tensor([(sample(DATA.velocity, x, schedule(int(n), shift).double())
                            - DATA.flow(x[:, 0], 1.0, 0.0)).abs().max() for n in steps])
    slopes = -errors.log2().diff()
    assert ((slopes > 0.9) & (slopes < 1.1)).all(), slopes


# -- Salt Eq. 4, CF++ Eq. 6: the DMD gradient -------------------------------------------------------------------------

def generated(mean, factor):
    return video(mean + Z @ factor.T)


def start():
    mean = torch.tensor([-1.0, 1.0], dtype=torch.float64, requires_grad=True)
    factor = torch.tensor([[1.0, 0.3], [0.0, 0.8]], dtype=torch.float64, requires_grad=True)
    return mean, factor


def exact_critic(mean, factor):
    return Gaussian(mean.detach(), (factor @ factor.T).detach())


@pytest.mark.parametrize("t", TIMES)
def test_dmd_gradient_is_the_gradient_of_the_kl(t):
    """Bug: a sign, a factor of t, s_real in place of s_fake, dx_t/dx_0 forgotten. For a Gaussian generator the mean
    over sigma points is the expectation, so Eq. 4 must equal the analytic gradient of KL(p_fake,t || p_real,t), by the
    mean and by the factor, to machine precision."""
    mean, factor = start()
    x0, critic = generated(mean, factor), exact_critic(mean, factor)
    loss, _ = dmd_loss(x0, None, critic.net, DATA.net, at(t), video(EPS), exact=True)
    got = torch.autograd.grad(2 * loss, (mean, factor))  # the surrogate is a mean over 2 channels
    noised = (1 - t) ** 2 * factor @ factor.T + t**2 * torch.eye(2, dtype=torch.float64)
    want = torch.autograd.grad(kl((1 - t) * mean, noised, (1 - t) * DATA.mean, DATA.spread(t, 1)), (mean, factor))
    for g, w in zip(got, want):
        close(g, w, 1e-12)


def test_kl_gradient_is_the_difference_of_scores():
    """Bug: the factor between x_0 predictions and scores (Salt Eq. 4): (1 - t) (s_fake - s_real), s = -eps / t."""
    fake, x, t = Gaussian(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)), normals(9, 2), 0.3
    x0_fake, x0_real = (x - t * world.velocity(x, t) for world in (fake, DATA))
    close(kl_gradient(x0_fake, x0_real, t), (1 - t) * (fake.score(x, t) - DATA.score(x, t)), 1e-12)


def test_normaliser_is_one_number_per_sample():
    """Bug: a normaliser over the batch or per pixel: the gradient of a sample would depend on its neighbours, or lose
    its direction."""
    x0, fake, real = (normals(3, 2, 4, 1, 1, seed=i) for i in range(3))
    whole = dmd_gradient(x0, fake, real)
    close(whole[1:2], dmd_gradient(x0[1:2], fake[1:2], real[1:2]), 1e-15)
    for i in range(3):
        close(whole[i] * (x0 - real)[i].abs().mean(), (fake - real)[i], 1e-12)


def matched(mean, factor):
    return ((mean - DATA.mean).abs().max() + (factor @ factor.T - DATA.cov).abs().max()).item()


@pytest.mark.parametrize("exact", [True, False])
def test_following_dmd_with_an_exact_critic_reaches_the_teacher(exact):
    """Bug: a gradient that vanishes elsewhere than at the teacher's Gaussian, with Eq. 4's weights or the
    normaliser."""
    mean, factor = start()
    optimizer = torch.optim.SGD([mean, factor], lr=0.05)
    for step in range(800):
        t = TIMES[step % 3]
        optimizer.zero_grad()
        dmd_loss(generated(mean, factor), None, exact_critic(mean, factor).net, DATA.net, at(t), video(EPS),
                 exact=exact)[0].backward()
        optimizer.step()
    assert matched(mean, factor) < 1e-3


def test_following_dmd_with_a_learned_critic_reaches_the_teacher():
    """Bug: a critic that learns anything but the generator's own law. It starts as the teacher (then there is no
    gradient at all) and learns by critic_loss alone: an affine velocity for each time."""
    mean, factor = start()
    weights = {t: torch.zeros(3, 2, dtype=torch.float64, requires_grad=True) for t in TIMES}

    def critic(x, t, text):
        x, t = x[..., 0, 0], t.flatten()[0].item()
        return video(DATA.velocity(x, t) + x @ weights[t][:2] + weights[t][2])

    generator = torch.optim.SGD([mean, factor], lr=0.05)
    learner = torch.optim.Adam(weights.values(), lr=0.03, betas=(0.5, 0.9))
    for step in range(400):
        t = TIMES[step % 3]
        for _ in range(2):
            learner.zero_grad()
            sum(critic_loss(critic, generated(mean, factor), None, at(s), video(EPS))[0] for s in TIMES).backward()
            learner.step()
        generator.zero_grad()
        dmd_loss(generated(mean, factor), None, critic, DATA.net, at(t), video(EPS))[0].backward()
        generator.step()
    assert matched(mean, factor) < 0.02


@pytest.mark.parametrize("shift", [2.0, 5.0])
def test_score_times_are_shifted_uniform_without_a_heap_at_the_end(shift):
    """Bug: times clamped to [.02, .98], which puts 9 of 100 draws on .98 at shift 5."""
    t = score_times(20_000, 3, shift, torch.Generator().manual_seed(0))
    assert t.min() > 0.0199 and t.max() < 0.9801 and (t == t[:, :1]).all()
    u = shift_timesteps(t[:, 0].double(), 1 / shift).sort().values  # shifted back, must be uniform
    low, high = shift_timesteps(0.02, 1 / shift), shift_timesteps(0.98, 1 / shift)
    assert (u - torch.linspace(low, high, len(u), dtype=torch.float64)).abs().max() < 1.63 / len(u) ** 0.5  # KS, 1 %


# -- Salt Eq. 6-8, 14-16: the semigroup defect ------------------------------------------------------------------------

def test_straight_flow_has_no_defect_and_a_curved_one_the_defect_computed_by_hand():
    """Bug: composed endpoint from the wrong state or time (Salt Eq. 6-8, 14-16). In one dimension without mean v = V_t
    x, V_t = (t - (1 - t) S) / C_t, so all ratios are equal and known."""
    x, (ts, tm, te) = normals(30, 2), (0.9, 0.6, 0.2)
    assert semigroup_defect(POINT.velocity, x, ts, tm, te) < 1e-20
    assert sc_loss(POINT.velocity, x, POINT.velocity(x, ts), ts, tm, te)[0] < 1e-20

    line, S = Gaussian(torch.zeros(1, dtype=torch.float64), torch.tensor([[0.3]], dtype=torch.float64)), 0.3
    def slope(t):
        return (t - (1 - t) * S) / ((1 - t) ** 2 * S + t**2)
    direct = 1 - (ts - te) * slope(ts)
    composed = (1 - (tm - te) * slope(tm)) * (1 - (ts - tm) * slope(ts))
    x, want = normals(30, 1), (direct - composed) ** 2
    close(sc_loss(line.velocity, x, line.velocity(x, ts), ts, tm, te)[0], want * x.square().mean(), 1e-12)
    got = semigroup_defect(line.velocity, x, ts, tm, te, eps=0.0)
    close(got, torch.tensor(want / (1 - direct) ** 2, dtype=torch.float64), 1e-12)


def test_defects_along_the_path_are_those_of_the_states_met_there():
    """Bug: a path that is not walked, an interval left out (the last!), a middle time off the training grid (Salt
    A.1)."""
    infer, train, x = schedule(4, 12.0), schedule(8, 12.0), normals(30, 2)
    got = path_defects(DATA.velocity, x, infer, train)
    assert len(got) == 4 and min(got) > 1e-6
    for k, (ts, te) in enumerate(zip(infer.tolist(), [*infer.tolist()[1:], 0.0])):
        walked = x
        for t, s in zip(infer.tolist()[:k], infer.tolist()[1:]):
            walked = walked - (t - s) * DATA.velocity(walked, t)
        assert got[k] == semigroup_defect(DATA.velocity, walked, ts, train.tolist()[2 * k + 1], te).item()
    assert max(path_defects(POINT.velocity, x, infer, train)) < 1e-20
    with pytest.raises(ValueError, match="training time between"):
        path_defects(DATA.velocity, x, infer, infer)


def test_a_perfect_consistency_student_has_a_defect():
    """Bug: "0 is perfect". x_t - t v is the exact flow map to 0, but Euler steps to other times are none: .0065 for
    data N(0, .1) along the 4-step path of shift 5. Steps compose, and the defect is 0, for g = s / (t + (1 - t) s)."""
    data = Gaussian(torch.zeros(1, dtype=torch.float64), torch.tensor([[0.1]], dtype=torch.float64))
    grids = schedule(4, 5.0).double(), schedule(8, 5.0).double()
    x, s = normals(100, 1), 0.1**0.5
    close(data.flow(x, 0.7, 0.0), x - 0.7 * data.consistency_velocity(x, 0.7), 1e-12)
    defects = path_defects(data.consistency_velocity, x, *grids)
    assert sum(defects) / 4 == pytest.approx(0.0065, abs=5e-5)
    composing = path_defects(lambda x, t: (1 - s / (t + (1 - t) * s)) / t * x, x, *grids)
    assert max(composing) < 1e-12
