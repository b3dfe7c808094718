"""Causal Forcing++ Eq. 1-5, 7 and Sec. 3.1, and self-rollouts, on linear-Gaussian videos, in float64."""

import pytest
import torch
from conftest import close
from exact_worlds import ARWorld, Gaussian, WindowWorld, kl, least, normals, sigma_points, video

from baselines.causal import ode_loss, trajectory
from causal_cd import causal_cd_loss
from dmd import dmd_loss
from flowmap import schedule, to_x0
from rollout import grids, joined, shared_noise, stream

A = torch.tensor([[0.8, 0.3], [-0.2, 0.7]], dtype=torch.float64)
Q = torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=torch.float64)
P = torch.tensor([[0.9, 0.2], [0.2, 0.6]], dtype=torch.float64)
EYE = torch.eye(2, dtype=torch.float64)
TEACHER, PERFECT = ARWorld(A, Q, P), ARWorld(A, Q, P, perfect=True)
CLIPS, NOISE = video(TEACHER.sample(60, 2)), video(normals(60, 2, 2, seed=7))
SOME_X = normals(200, 2, 2, seed=8)
SOME_X = 3 * SOME_X / SOME_X.norm(dim=-1, keepdim=True)  # at the edge of the law


class AffineStudent:
    """A causal network that is affine at every time: v^1 = W x^1 + b, v^2 = W x^2 + U x_gt^1 + b. At t = 0 it is
    wild, since nothing may depend on it there."""

    def __init__(self, times):
        self.times = times.tolist()
        self.weights = [torch.zeros(2, 5, 2, dtype=torch.float64) for _ in times]  # (frame, [W U b], d) at each time

    def parts(self, x, clean):
        past = torch.stack([torch.zeros_like(clean[:, 0]), clean[:, 0]], 1)[..., 0, 0]
        return torch.cat([x[..., 0, 0], past, torch.ones_like(past[..., :1])], -1)  # (b 2 5)

    def __call__(self, x, t, text, *, chunk=1, clean):
        wild = torch.full((2, 5, 2), 1e6, dtype=torch.float64)
        weights = torch.stack([self.weights[self.times.index(u)] if u > 0 else wild for u in t[0].tolist()])
        return video(torch.einsum("bfp,ffpd->bfd", self.parts(x, clean), weights))

    def predict(self, x, clean, t):
        return to_x0(x, self(x, torch.full(x.shape[:2], t, dtype=torch.float64), None, clean=clean), t)


def learn(student, k, loss_of):
    """Minimise loss_of(index), index k everywhere, over the student's weights at that time."""
    def loss(w):
        student.weights = [*before[:k], w, *before[k + 1:]]
        return loss_of(torch.full((len(CLIPS), 2), k))
    before = student.weights
    student.weights = [*before[:k], least(loss, (2, 5, 2)), *before[k + 1:]]


def distilled_by_cd(steps):
    """The optimum of causal CD (CF++ Eq. 3), from the time next to data to t = 1; theta- is theta."""
    grid = schedule(steps, 5.0).double()
    student = AffineStudent(grid)
    for k in reversed(range(steps)):
        learn(student, k,
              lambda index: causal_cd_loss(student, student, TEACHER, CLIPS, None, grid, index, NOISE, 1)[0])
    return student


def distilled_by_ode(teacher_steps):
    """The optimum of causal ODE (CF++ Eq. 1) on trajectories of the teacher behind the clean past."""
    def velocity(x, t):
        return TEACHER(x, torch.full(x.shape[:2], t, dtype=torch.float64), None, clean=CLIPS)
    grid = schedule(teacher_steps, 5.0).double()
    states = trajectory(velocity, NOISE, grid, keep=teacher_steps // 4)
    times = torch.cat([grid[:: teacher_steps // 4], torch.zeros(1, dtype=torch.float64)])
    student = AffineStudent(times[:-1])
    for k in range(4):
        learn(student, k, lambda index: ode_loss(student, states, times, index, None, chunk=1, clean=CLIPS)[0])
    return student


def flow_map(x, clean, t):
    """f: (x_t^i, x_gt^{<i}, t) -> x_0^i in closed form (CF++ Eq. 2)."""
    return to_x0(x, PERFECT(x, torch.full(x.shape[:2], t, dtype=torch.float64), None, clean=clean), t)


def error(student, times):
    """sup |f - G| over the given times and states on the edge of the law."""
    x, clean = video(SOME_X), video(SOME_X.flip(0))
    return max((student.predict(x, clean, t) - flow_map(x, clean, t)).abs().max().item() for t in times)


# -- CF++ Eq. 1-5 -----------------------------------------------------------------------------------------------------

def test_causal_ode_and_causal_cd_learn_the_same_flow_map():
    """Bug: a target behind another past, at the wrong time or without the last interval; trajectories that are not the
    teacher's. The optimum of either is the end of the teacher's 48 Euler steps, exactly, and so the AR-conditional
    flow map up to the error of Euler, here 6 % of its size (CF++ Eq. 1-4)."""
    cd, ode = distilled_by_cd(48), distilled_by_ode(48)
    grid, clean = schedule(48, 5.0).double(), video(TEACHER.sample(500, 2, seed=1))

    def velocity(x, t):
        return TEACHER(x, torch.full(x.shape[:2], t, dtype=torch.float64), None, clean=clean)

    for k in range(0, 48, 12):
        x = (1 - grid[k]) * clean + grid[k] * video(normals(500, 2, 2, seed=2))
        walked, want = trajectory(velocity, x, grid[k:], keep=48)[:, -1], flow_map(x, clean, grid[k].item())
        for student in (cd, ode):
            close(student.predict(x, clean, grid[k].item()), walked, 1e-6)
        assert (walked - want).square().mean() < 0.1**2 * want.square().mean()
    x, clean = video(SOME_X), video(SOME_X.flip(0))
    shifted = (cd.predict(x, clean, 1.0) - cd.predict(x, clean + 1, 1.0)).mean((0, 3, 4))
    close(shifted[1], -A.sum(1), 0.05)  # the past moves the next frame as A says
    assert shifted[0].abs().max() == 0


@pytest.mark.parametrize("distil", [distilled_by_cd, distilled_by_ode])
def test_error_of_the_flow_map_is_of_order_one(distil):
    """Bug: a solver step from the wrong state, which would leave an error that does not vanish or break the order
    (CF++ Eq. 5 with p = 1 for Euler): sup |f - G*| over N = 6 ... 96."""
    steps = torch.tensor([12, 24, 48, 96]) if distil is distilled_by_ode else torch.tensor([6, 12, 24, 48, 96])
    errors = torch.tensor([error(distil(int(n)), [1.0]) for n in steps])
    slopes = -errors.log2().diff()
    assert (slopes[1:] - 1).abs().max() < 0.1 and slopes[0] > 0.8, slopes


# -- CF++ Sec. 3.1 ----------------------------------------------------------------------------------------------------

def root(matrix):
    return Gaussian(matrix.new_zeros(2), matrix).spread(0.0, 0.5)


@pytest.mark.parametrize("rho", [0.5, 0.9])
def test_bidirectional_teacher_teaches_the_conditional_mean(rho):
    """Bug: none of ours; the reason for causal teachers. Two frames of one number, correlation rho. The bidirectional
    flow takes noise z to x_0 = S^(1/2) z, so the end of frame 1 depends on the noise of frame 2. A causal student that
    regresses on it learns E[x_0^1 | z^1], whose variance is ((1 + sqrt(1 - rho^2)) / 2) of the world's. The causal
    teacher's end is a function of z^1, and nothing is lost."""
    S = torch.tensor([[1, rho], [rho, 1]], dtype=torch.float64)
    joint, alone = Gaussian(S.new_zeros(2), S), Gaussian(S.new_zeros(1), S[:1, :1])
    times = torch.cat([schedule(4, 5.0).double(), torch.zeros(1, dtype=torch.float64)])
    z = sigma_points(1)
    z = torch.cat(z, dim=1)  # (4 2): noise of the two frames, moments exact
    bidirectional = torch.stack([video(joint.flow(z, 1.0, t)[..., None]) for t in times.tolist()], 1)
    causal = torch.stack([video(alone.flow(z[:, :1], 1.0, t)[..., None]) for t in times.tolist()], 1)

    def student_variance(states, k):
        """Of the prediction at time k, over that of the teacher's ends, for the first frame."""
        def loss(w):
            def student(x, t, text, chunk):
                return w * x
            return ode_loss(student, states[:, :, :1], times, torch.full((4, 1), k), None, chunk=1)[0]
        predicted = (1 - times[k] * least(loss, ())) * states[:, k, 0]
        return predicted.square().mean() / states[:, -1, 0].square().mean()

    by_hand = torch.tensor((1 + (1 - rho**2) ** 0.5) / 2, dtype=torch.float64)
    close(student_variance(bidirectional, 0), by_hand, 1e-10)
    for k in range(4):  # at every time: the squared correlation of x_t^1 and x_0^1
        x_t, x_0 = (root((1 - t) ** 2 * S + t**2 * EYE) for t in (times[k].item(), 0.0))
        correlation = (x_t @ x_0)[0, 0] / ((x_t @ x_t)[0, 0] * (x_0 @ x_0)[0, 0]) ** 0.5
        close(student_variance(bidirectional, k), correlation**2, 1e-10)
        close(student_variance(causal, k), torch.ones((), dtype=torch.float64), 1e-10)


# -- CF++ Eq. 7 -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("t", [0.2, 0.8])
def test_causal_dmd_gradient_is_that_of_the_conditional_kl(t):
    """Bug: score models that look at generated pasts in place of the clean one, or at none. Generator x^2 = B x_gt^1 +
    L z; Eq. 7 must equal the gradient of E_past KL(p_fake,t(. | past) || p_real,t(. | past)), exactly."""
    points = torch.cat(sigma_points(3), dim=1)  # (24 6): x_gt^1, z, eps; all moments exact
    past, z, eps = points[:, :2] @ root(P), points[:, 2:4], points[:, 4:]
    B = torch.tensor([[0.2, 0.0], [0.5, -0.3]], dtype=torch.float64, requires_grad=True)
    L = torch.tensor([[1.0, 0.0], [0.4, 0.7]], dtype=torch.float64, requires_grad=True)
    clean = video(torch.stack([past, past], 1))  # the second frame's own clean version must not matter
    x0 = video(torch.stack([2 * past, past @ B.T + z @ L.T], 1))  # nor what was generated before it
    noise = video(torch.stack([eps, eps], 1))
    critic = ARWorld(B.detach(), (L @ L.T).detach(), P)
    times = torch.full((len(past), 2), t, dtype=torch.float64)
    loss, _ = dmd_loss(x0, None, critic, TEACHER, times, noise, exact=True, chunk=1, clean=clean)
    got = torch.autograd.grad(4 * loss, (B, L))  # a mean over 2 frames of 2 channels; the first has no gradient
    noised = (1 - t) ** 2 * L @ L.T + t**2 * EYE
    real = Gaussian(torch.zeros(2, dtype=torch.float64), Q).spread(t, 1)
    total = sum(kl((1 - t) * B @ x, noised, (1 - t) * A @ x, real) for x in past) / len(past)
    for g, w in zip(got, torch.autograd.grad(total, (B, L))):
        close(g, w, 1e-11)


# -- rollouts ---------------------------------------------------------------------------------------------------------

OFFSET = torch.tensor([0.5, -0.2], dtype=torch.float64)
ALL = [[], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
CASES = {  # window, sink, chunk, and which frames each of six frames sees
    "everything": (None, 0, 1, ALL),
    "window 3": (3, 0, 1, [[], [0], [0, 1], [1, 2], [2, 3], [3, 4]]),
    "window 3 with a sink": (3, 1, 1, [[], [0], [0, 1], [0, 2], [0, 3], [0, 4]]),
    "chunks of 2": (None, 0, 2, [[], [], [0, 1], [0, 1], [0, 1, 2, 3], [0, 1, 2, 3]]),
    "chunks of 2, window 3 with a sink": (3, 1, 2, [[], [], [0], [0], [0], [0]]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("solver, steps, first", [("cm", 1, 1), ("cm", 2, 4), ("cm", 4, 4), ("euler", 2, 4),
                                                  ("euler", 4, 4)])
def test_rollouts_have_the_right_mean_and_covariance(case, solver, steps, first):
    """Bug: a past that is committed twice, late or not at all; a window that shows other frames than said; used noise;
    first-chunk steps given to another chunk. Moments of all frames against the recursion, within 5 standard errors.

    With a perfect student the CM solver has the world's moments at any K. Euler with the teacher's velocity shrinks the
    noise of a chunk to prod(1 - dt V_t) of itself, at every one of its times, and leaves the mean alone."""
    window, sink, chunk, shown = CASES[case]
    n, frames = 20_000, 6
    net = WindowWorld(lambda r, n: 0.8 / n if r else -0.5, OFFSET, Q, window, sink, perfect=solver == "cm")
    grid, first_grid = grids(steps, 5.0, first)
    noise = shared_noise(normals(n, 4, frames, 2, 1, 1), chunk, steps, len(first_grid))
    clips = joined(stream(net, noise, None, grid, first_grid=first_grid, num_chunks=frames // chunk,
                          solver=solver))[..., 0, 0]

    def own_noise(grid):
        gain, law = torch.eye(2, dtype=torch.float64), Gaussian(OFFSET, Q)
        for t, s in zip(grid.tolist(), [*grid.tolist()[1:], 0.0]):
            slope = t * law.spread(t, -1) - (1 - t) * law.spread(t, -1) @ Q  # v = slope (x - (1 - t) m) - m
            gain = gain @ (EYE - (t - s) * slope)
        return Q if solver == "cm" else gain @ gain.T

    mean, cov = net.moments(shown, [own_noise(first_grid if i < chunk else grid) for i in range(frames)])
    mean, cov = mean.flatten(), cov.reshape(2 * frames, 2 * frames)
    clips = clips.flatten(1)
    variance = cov.diagonal()
    assert ((clips.mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all()
    assert ((clips.T.cov() - cov).abs() < 5 * ((variance[:, None] * variance + cov**2) / n).sqrt()).all()
