"""findings/gaussian.py and findings/affine.py: closed forms against the project's own functions, in float64.

A sampler with an affine velocity is linear in its noise: its samples from the noise 0 and from each unit noise give
mean and variance exactly.
"""

import pytest
import torch
from conftest import close
from exact_worlds import Gaussian, normals, sigma_points, video

from baselines.whole_clip import backward_simulation
from dmd import dmd_loss
from findings import affine
from findings.gaussian import (
    composing_slope,
    gain,
    guidance_chain,
    perfect_slope,
    same_noise_difference,
    sampled_gain,
    student,
)
from flowmap import sample, schedule, to_x0
from sc_loss import path_defects, sc_loss

M, S = 0.7, 0.5  # mean and standard deviation of the data
STEPS = (1, 2, 4, 8, 16)
SLOPES = (perfect_slope, composing_slope)


def grid(steps, shift=5.0):
    return schedule(steps, shift).double()


def velocity_of(slope, mean=M, std=S):
    def velocity(x, t):
        a, b = student(slope, mean, std, t)
        return a * x + b
    return velocity


def linear_moments(velocity, path, solver):
    """Mean and variance of flowmap.sample for a velocity that is affine in x, of one number."""
    noise = torch.cat([torch.zeros(1, len(path)), torch.eye(len(path))]).double()
    x0 = sample(velocity, noise, path, solver)
    return x0[0], (x0[1:] - x0[0]).square().sum()


def random_students(seeds, steps):
    """Parameters near those of the perfect student, all different."""
    perfect = torch.tensor([student(perfect_slope, M, S, t) for t in grid(steps).tolist()], dtype=torch.float64)
    return perfect + 0.2 * normals(seeds, steps, 2)


# -- gaussian.py: what a sampler makes of a slope ---------------------------------------------------------------------

@pytest.mark.parametrize("shift, want", [(1.0, (1, 1.34, 1.63, 1.80, 1.90)), (5.0, (1, 1.09, 1.27, 1.51, 1.72))])
def test_contrast_of_a_perfect_student(shift, want):
    """Bug: a chord taken for the trajectory, or a wrong grid: Euler has too much contrast from 2 steps on, CM never."""
    for steps, value in zip(STEPS, want):
        assert gain(perfect_slope, S, grid(steps, shift), "euler") == pytest.approx(value, abs=0.0051)
        assert gain(perfect_slope, S, grid(steps, shift), "cm") == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("std", [0.1, 0.5, 2.0])
def test_contrast_under_euler_tends_to_two(std):
    """Bug: a claim that many small steps make up for the chords, or a limit that depends on the data."""
    errors = [abs(gain(perfect_slope, std, grid(steps, 1.0), "euler") - 2) for steps in (1024, 4096)]
    assert errors[1] < 0.01 and errors[1] < 0.3 * errors[0]


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("solver", ["euler", "cm"])
def test_a_shift_is_a_change_of_the_scale_of_the_data(slope, solver):
    """Bug: a shift towards the data, or a gain in other units than the std of the data."""
    for steps in STEPS:
        want = gain(slope, S / 5, grid(steps, 1.0), solver)
        assert gain(slope, S, grid(steps, 5.0), solver) == pytest.approx(want, rel=1e-6)  # grids have float32 times


def test_contrast_of_a_composing_student():
    """Bug: a slope whose steps do not compose, or a claim that a composing student suits the CM solver."""
    for steps, value in zip(STEPS, (1, 0.91, 0.80, 0.67, 0.56)):
        assert gain(composing_slope, S, grid(steps), "euler") == pytest.approx(1, abs=1e-12)
        assert gain(composing_slope, S, grid(steps), "cm") == pytest.approx(value, abs=0.0051)
    with pytest.raises(ValueError, match="heun"):
        gain(composing_slope, S, grid(4), "heun")


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("solver", ["euler", "cm"])
def test_gain_is_what_the_sampler_makes(slope, solver):
    """Bug: a recursion of the std that is not that of flowmap.sample, or a mean that depends on the slope."""
    for steps in STEPS:
        mean, variance = linear_moments(velocity_of(slope), grid(steps), solver)
        assert mean.item() == pytest.approx(M, rel=1e-12)
        assert variance.item() ** 0.5 == pytest.approx(S * gain(slope, S, grid(steps), solver), rel=1e-12)
    assert sampled_gain(slope, S, grid(4), solver, seed=0) == pytest.approx(gain(slope, S, grid(4), solver), abs=0.01)


def test_same_noise_difference_is_that_of_the_samples():
    """Bug: a difference of variances, a mean that differs, or a sum over dimensions in place of its root."""
    noise = torch.ones(1, 8, 12).double()  # mean square 1 in 12 dimensions
    two, eight = (sample(velocity_of(perfect_slope), noise, grid(steps), "euler") for steps in (2, 8))
    assert (two - eight).norm().item() == pytest.approx(same_noise_difference(S, grid(2), grid(8), 12), rel=1e-6)


# -- gaussian.py: L_SC and the semigroup defect -----------------------------------------------------------------------

def test_only_the_composing_slope_has_no_sc_loss():
    """Bug: a composing slope for one path alone, such as that of mean 0: L_SC must be 0 from every x_ts."""
    x, triple = normals(50, 3), (0.9, 0.6, 0.2)
    losses = [sc_loss(velocity, x, velocity(x, 0.9), *triple)[0] for velocity in map(velocity_of, SLOPES)]
    assert losses[1] < 1e-28 < 1e-3 < losses[0]


# -- gaussian.py: guidance --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shift, want", [(5.0, (1, 1.20, 1.62, 2.39, 3.63)), (12.0, (1, 1.08, 1.26, 1.64, 2.35))])
def test_guidance_chain(shift, want):
    """Bug: guidance applied once, or r_k with the variance of another time."""
    for steps, value in zip(STEPS, want):
        assert guidance_chain(grid(steps, shift), 1.0, 1.0) == pytest.approx(value, abs=0.0051)


def test_guidance_chain_is_that_of_the_sampler():
    """Bug: a chain that is not what CM sampling makes of a student that adds D at each timestep."""
    variance, guided, D = 0.84, 0.5, 1.1
    for steps in STEPS:
        params = []
        for t in grid(steps).tolist():
            g = (guided / ((1 - t) ** 2 * variance + t**2)) ** 0.5
            params.append([(1 - g) / t, -(M + D - g * (1 - t) * M) / t])  # x_0 = M + D + g (x - (1-t) M)
        mean, _ = affine.sample_law(torch.tensor([params]).double(), grid(steps), grid(steps), "cm")
        assert (mean.item() - M) / D == pytest.approx(guidance_chain(grid(steps), variance, guided), rel=1e-6)


# -- affine.py: the world ---------------------------------------------------------------------------------------------

def test_velocity_of_a_mixture_is_that_of_its_score():
    """Bug: channels that choose their law one by one, while the channels of a sample come from the same exit."""
    means, variances, t = torch.tensor([0.0, 0.8]).double(), torch.tensor([0.3, 0.6]).double(), 0.6
    x = normals(4, 1, 5, 1, 1).requires_grad_()
    laws = torch.distributions.Normal((1 - t) * means, ((1 - t) ** 2 * variances + t**2).sqrt())
    log_density = laws.log_prob(x.flatten(1)[..., None]).sum(1).logsumexp(1)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    eps = -t * score
    want = eps - (x.detach() - t * eps) / (1 - t)
    close(affine.mixture_velocity(means, variances, x.detach(), t), want, 1e-12)


def test_teacher_is_guided_away_from_the_marginal():
    """Bug: guidance of the wrong sign or weight, or a marginal without the spread of the means."""
    x = normals(6, 1, 3, 1, 1)
    ones, eye = torch.ones(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    inside, outside = Gaussian(0.4 * ones, 0.84 * eye), Gaussian(0 * ones, eye)
    v_c, v_u = (video(world.velocity(x[:, 0, :, 0, 0], 0.6)) for world in (inside, outside))
    close(affine.exact_teacher(0.4, 0.84, 4.0)(x, 0.6), v_u + 4 * (v_c - v_u), 1e-12)


@pytest.mark.parametrize("solver", ["euler", "cm"])
def test_law_of_the_samples_is_that_of_the_sampler(solver):
    """Bug: the parameters of another seed or timestep, or moments that no sampler has."""
    params = random_students(2, 8)
    for steps in (1, 2, 4, 8):
        mean, variance = affine.sample_law(params, grid(8), grid(steps), solver)
        for i in range(2):
            m, v = linear_moments(affine.affine_velocity(params[i : i + 1], grid(8)), grid(steps), solver)
            close(mean[i], m, 1e-12)
            close(variance[i], v, 1e-12)
    with pytest.raises(ValueError, match="not in"):
        affine.sample_law(params, grid(8), grid(3), solver)


def test_own_states_are_those_of_backward_simulation():
    """Bug: a state one step too early or too late, noise of another step, or a law of the exits from real data."""
    params, noise = random_students(1, 4), normals(5, 4, 1, 3, 1, 1)
    velocity = affine.affine_velocity(params, grid(4))
    units = torch.cat([torch.zeros(1, 4), torch.eye(4)]).double()[:, :, None, None, None, None]
    means, variances = affine.exit_laws(params, grid(4), M, S**2, own_states=True)
    for k, t in enumerate(grid(4).tolist()):
        x = affine.own_inputs(velocity, noise, grid(4), torch.full((5,), k))
        close(to_x0(x, velocity(x, t), t), backward_simulation(lambda x, t, text: velocity(x, t), noise, grid(4), k,
                                                               None), 1e-12)
        x0 = backward_simulation(lambda x, t, text: velocity(x, t), units, grid(4), k, None).flatten()
        close(means[0, k], x0[0], 1e-12)
        close(variances[0, k], (x0[1:] - x0[0]).square().sum(), 1e-12)


def test_each_exit_of_a_perfect_student_makes_the_data():
    """Bug: a critic that is told another law than that of the exits, by the mean or the spread of their inputs."""
    params = torch.tensor([[student(perfect_slope, M, S, t) for t in grid(4).tolist()]], dtype=torch.float64)
    for own_states in (False, True):
        means, variances = affine.exit_laws(params, grid(4), M, S**2, own_states)
        assert means[0].tolist() == pytest.approx([M] * 4, rel=1e-12)
        assert variances[0].tolist() == pytest.approx([S**2] * 4, rel=1e-12)


@pytest.mark.parametrize("exact", [True, False])
def test_dmd_stays_at_the_perfect_slope_and_returns_to_it(exact):
    """Bug: a critic of another law than the student's, or a gradient of the wrong sign: with the exact critic the
    gradient by the slope is 0 at the perfect student, and leads back from a larger and from a smaller slope, also for
    the composing one."""
    z, eps = (video(part) for part in sigma_points(3))
    teacher = affine.exact_teacher(M, S**2, 1.0)

    def gradient(slope, k):
        params = torch.tensor([[student(slope, M, S, t) for t in grid(4).tolist()]], dtype=torch.float64)
        level, t = torch.full((len(z),), k), grid(4)[k].item()
        x_t = (1 - t) * M + ((1 - t) ** 2 * S**2 + t**2) ** 0.5 * z
        laws = affine.exit_laws(params, grid(4), M, S**2, own_states=False)
        a, b = params[0, k]
        g = (1 - t * a).requires_grad_()
        x0 = M + g * (x_t - (1 - t) * M)
        close(x0.detach(), to_x0(x_t, a * x_t + b, t), 1e-12)
        critic, score_t = affine.exact_critic(*laws, level), torch.full((len(z), 1), 0.5)
        loss, _ = dmd_loss(x0, None, critic, teacher, score_t, eps, exact)
        return torch.autograd.grad(loss, g)[0].item()

    for k in range(4):
        assert abs(gradient(perfect_slope, k)) < 1e-12
        assert gradient(lambda s, t: 1.1 * perfect_slope(s, t), k) > 1e-5
        assert gradient(lambda s, t: 0.9 * perfect_slope(s, t), k) < -1e-5
        assert k == 0 or gradient(composing_slope, k) < 0


# -- affine.py: training ----------------------------------------------------------------------------------------------

def test_seeds_are_trained_side_by_side_as_they_are_alone():
    """Bug: a draw or a gradient that a seed shares with its neighbours."""
    def trained(seeds):
        return affine.train(seeds, 4, guidance=4.0, lambda_sc=0.2, own_states=True, updates=5)

    both = trained([3, 4])
    close(both, torch.cat([trained([3]), trained([4])]), 1e-9)
    assert (both[0] - both[1]).abs().max() > 1e-3


def test_training_moves_towards_what_is_predicted():
    """Bug: a student that does not learn or learns from a wrong critic."""
    params = affine.train([0], 4, shift=1.0, mean=0.0, variance=S**2, pooled=False, updates=150, start=composing_slope)
    for solver in ("euler", "cm"):
        start, end = (gain(slope, S, grid(4, 1.0), solver) for slope in (composing_slope, perfect_slope))
        got = affine.sample_law(params, grid(4, 1.0), grid(4, 1.0), solver)[1].sqrt().item() / S
        assert (got - start) / (end - start) == pytest.approx(1, abs=0.2)


def test_training_with_sc_loss_makes_steps_compose():
    """Bug: L_SC of another sign or without weight."""
    settings = dict(shift=1.0, mean=0.0, variance=S**2, pooled=False, updates=150)
    defect = [sum(path_defects(affine.affine_velocity(affine.train([0], 4, lambda_sc=weight, **settings), grid(4, 1.0)),
                               normals(20, 1, 1, 1, 1), grid(2, 1.0), grid(4, 1.0))) for weight in (0.0, 5.0)]
    assert defect[1] < 0.3 * defect[0]


def test_guided_training_from_own_states_pushes_the_mean_once():
    """Bug: own states with a critic that is told of noised real data, or the other way round."""
    for own_states, low, high in ((True, 0.95, 1.05), (False, 1.08, 1.2)):
        params = affine.train([0], 2, guidance=4.0, own_states=own_states, pooled=False, updates=300)
        one, two = (affine.sample_law(params, grid(2), grid(k), "cm")[0].item() - affine.MEAN for k in (1, 2))
        assert low < two / one < high


def test_guided_training_moves_the_mean_as_far_as_its_form_allows():
    """Bug: shared parameters that are free, slopes that a shift changes, or guidance that does not move the mean."""
    data = affine.MEAN, affine.VARIANCE**0.5
    start = torch.tensor([student(perfect_slope, *data, t) for t in grid(4).tolist()], dtype=torch.float64)
    for form in affine.FORMS:
        params = affine.train([0], 4, guidance=4.0, form=form, updates=60)
        change = params[0] - start
        assert (affine.sample_law(params, grid(4), grid(1), "cm")[0] > 0.8).all()
        bend = (change.diff(dim=0) / grid(4).diff()[:, None]).diff(dim=0).abs().max()  # second difference over t
        assert bend > 0.01 if form == "free" else bend < 1e-9
        if form == "shift":
            assert change[:, 0].abs().max() < 1e-12 and (change[:, 1] - change[0, 1]).abs().max() < 1e-12
