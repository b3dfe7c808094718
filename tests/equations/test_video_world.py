"""findings/video.py and findings/bumps.py: closed forms against brute force, in float64.

A rollout of an affine student is linear in its noise: clips from the noise 0 and from each unit noise give mean and
covariance exactly.
"""

import pytest
import torch
from conftest import close
from exact_worlds import normals

from findings import bumps, cache, video
from findings.gaussian import perfect_slope
from flowmap import schedule, to_x0
from rollout import grids, joined, stream
from sc_loss import sc_loss

LENGTHS = {2: 0.3, 4: 0.7}


def random_students(seeds):
    return video.params_of(perfect_slope) + 0.1 * normals(seeds, 2, 8, 3)


def linear_law(params, steps, first_steps, solver="cm", exits=(None, None)):
    """Mean and covariance of rollout.stream's clips, of one channel."""
    grid, first_grid = grids(steps, video.SHIFT, first_steps)
    most = max(steps, first_steps)
    units = torch.eye(most * video.FRAMES).reshape(-1, most, video.FRAMES)
    noise = torch.cat([torch.zeros(1, most, video.FRAMES), units]).double()
    chunks = stream(video.Student(params), lambda i, k: noise[:, k, i, None, None, None, None], None, grid,
                    num_chunks=video.FRAMES, first_grid=first_grid, solver=solver, first_exit=exits[0],
                    exit_step=exits[1])
    with torch.no_grad():
        clips = joined(chunks).flatten(1)
    rows = clips[1:] - clips[0]
    return clips[0], rows.T @ rows


# -- video.py: the world ----------------------------------------------------------------------------------------------

def test_velocity_of_a_mixture_of_clips_is_that_of_its_score():
    """Bug: frames or channels that choose their law one by one; a law, share or timestep of another seed or sample."""
    means, mix, shares = normals(2, 3, 4), 0.3 * normals(2, 3, 4, 4, seed=1), torch.tensor([0.2, 0.3, 0.5]).double()
    covariances = mix @ mix.mT + 0.2 * torch.eye(4).double()
    x, t = normals(6, 4, 2, 1, 1, seed=2).requires_grad_(), torch.tensor([0.9, 0.5, 0.1]).repeat(2).double()
    logs = []
    for i in range(6):  # samples 0 to 2 are of the first seed
        noised = (1 - t[i]) ** 2 * covariances[i // 3] + t[i] ** 2 * torch.eye(4).double()
        laws = torch.distributions.MultivariateNormal((1 - t[i]) * means[i // 3], noised)
        logs.append((shares.log() + laws.log_prob(x[i, :, :, 0, 0].T[:, None]).sum(0)).logsumexp(0))
    (score,) = torch.autograd.grad(sum(logs), x)
    t = t[:, None, None, None, None]
    eps = -t * score
    got = video.exact_net(means, covariances, shares)(x.detach(), t[:, 0, 0, 0].expand(6, 4))
    close(got, eps - (x.detach() - t * eps) / (1 - t), 1e-9)


def test_the_teacher_makes_the_world_and_is_guided_away_from_the_marginal():
    """Bug: a world that is not AR(1), a teacher of another one, guidance of the wrong sign."""
    mean, cov = cache.teacher_law(1.0)
    close(mean, video.DATA[0], 1e-4)
    close(cov, video.DATA[1], 1e-4)
    x = [video.MEAN + video.VARIANCE**0.5 * normals(200_000, seed=1)]
    for i in range(video.FRAMES - 1):
        noise = ((1 - video.RHO**2) * video.VARIANCE) ** 0.5 * normals(200_000, seed=2 + i)
        x.append(video.MEAN + video.RHO * (x[-1] - video.MEAN) + noise)
    close(torch.stack(x).cov(), video.DATA[1], 0.02)
    assert cache.teacher_law(2.0)[0].min() > video.MEAN + 0.1
    x, t = normals(3, 8, 2, 1, 1), torch.full((3, 8), 0.6).double()
    one, two, three = (video.exact_teacher(w)(x, t) for w in (1.0, 2.0, 3.0))
    close(three - two, two - one, 1e-12)


# -- video.py: laws ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("solver, steps, first", [("cm", 1, 1), ("cm", 2, 4), ("cm", 8, 1), ("euler", 2, 4),
                                                  ("euler", 4, 1)])
def test_law_of_the_clips_is_that_of_the_rollouts(solver, steps, first):
    """Bug: moments that no rollout has: the first frame's parameters or steps for others, a past noised or unseen."""
    params = random_students(2)
    laws = video.sampled_law(params, steps, solver, first)
    for i in range(2):
        for got, want in zip(laws, linear_law(params[i], steps, first, solver)):
            close(got[i], want, 1e-10)


def test_the_critic_is_told_all_that_rollouts_make():
    """Bug: an exit that is missing, one with the law of another, exits that are not equally likely; the mixture of the
    first frame's own exits."""
    params = random_students(2)
    means, covariances, shares = video.rollout_laws(params, LENGTHS, 4)
    exits = [(2, first, e) for first in range(4) for e in range(2)] + [(4, e, e) for e in range(4)]
    assert shares.tolist() == pytest.approx([0.3 / 8] * 8 + [0.7 / 4] * 4)
    for n, (steps, first, e) in enumerate(exits):
        mean, cov = linear_law(params[1], steps, 4, exits=(first, e))
        close(means[1, n], mean, 1e-10)
        close(covariances[1, n], cov, 1e-10)


def test_a_perfect_student_has_no_gradient():
    """Bug: a critic that is not the teacher's where the student makes the world, at every exit."""
    perfect = video.params_of(perfect_slope)[None]
    for got, want in zip(video.rollout_laws(perfect, {2: 0.2, 4: 0.4, 8: 0.4}, 4), video.DATA):
        close(got, want.expand_as(got), 1e-12)
    critic = video.exact_net(*video.rollout_laws(perfect, LENGTHS, 1))
    x, t = normals(4, 8, 3, 1, 1), torch.full((4, 8), 0.4).double()
    close(critic(x, t), video.exact_teacher(1.0)(x, t), 1e-11)


# -- video.py: training -----------------------------------------------------------------------------------------------

def test_seeds_are_trained_side_by_side_as_they_are_alone():
    """Bug: a draw, K, exit, triple or gradient that a seed shares with its neighbours."""
    def trained(seeds):
        return video.train(seeds, {2: 0.3, 8: 0.7}, guidance=4.0, lambda_sc=0.2, first_steps=4, updates=4)

    both = trained([3, 4])
    close(both, torch.cat([trained([3]), trained([4])]), 1e-9)
    assert (both[0] - both[1]).abs().max() > 1e-3


def test_where_sc_loss_acts(monkeypatch):
    """Bug: L_SC on other rollouts than the longest, triples that are none, or a weight or share that is ignored."""
    seen = []
    monkeypatch.setattr(video, "sc_loss", lambda *of: seen.append(of[3:]) or sc_loss(*of))
    video.train([0], {2: 0.5, 8: 0.5}, lambda_sc=0.2, updates=20)
    train_grid, ends = schedule(8, 5.0).tolist(), [*schedule(4, 5.0).tolist(), 0.0]
    assert len(seen) % video.FRAMES == 0 and 4 <= len(seen) // video.FRAMES <= 14
    assert all(ts > tm > te and ts in train_grid and tm in train_grid and te in ends for ts, tm, te in seen)
    seen.clear()
    trained = video.train([0], {4: 1.0}, lambda_sc=0.2, sc_share=0.0, updates=3)
    assert not seen
    video.train([1], {4: 1.0}, lambda_sc=0.2, updates=20)
    assert len(seen) >= 10 * video.FRAMES and {ts for ts, _, _ in seen} == set(schedule(4, 5.0).tolist()[:3])
    assert not torch.equal(trained, video.train([0], {4: 1.0}, lambda_sc=0.2, updates=3))


def test_training_returns_to_the_world():
    """Bug: a critic of other laws than the rollouts', or a gradient of the wrong sign."""
    def steeper(s, t):
        return perfect_slope(s, t) - 0.3 * t  # a larger a, by .3 at every timestep

    def error(params):
        return video.kl(video.sampled_law(params, 4, "cm", 1), video.DATA).item()

    before = error(video.params_of(steeper)[None])
    assert error(video.train([0], {4: 1.0}, start=steeper, updates=80)) < 0.15 * before


# -- bumps.py ---------------------------------------------------------------------------------------------------------

def test_increments_behind_a_past_are_those_of_the_integral():
    """Bug: a past of the wrong frame or sign, or one without its (1 - t); bumps of other shares; guidance."""
    clean, x = normals(2, 2, 3, 1, 1, seed=1), normals(2, 2, 3, 1, 1, seed=2)
    t = torch.tensor([[0.3, 0.6]] * 2).double()
    d = torch.linspace(-4, 4, 8001).double()

    def velocity(shares):  # E[eps - x_0] over d, on a grid
        density = sum(s * (-((d - m) / bumps.WIDTH) ** 2 / 2).exp() for m, s in zip((1, -1), shares))
        x0 = bumps.RHO * torch.stack([torch.zeros_like(clean[:, 0]), clean[:, 0]], 1)[..., None] + d
        time = t[:, :, None, None, None, None]
        gap = (x[..., None] - (1 - time) * x0) / time
        weight = density * (-gap.square() / 2).exp()
        return (weight * (gap - x0)).sum(-1) / weight.sum(-1)

    conditional, marginal = velocity((0.6, 0.4)), velocity((0.5, 0.5))
    for w in (1.0, 3.0):
        net = bumps.behind_the_past(bumps.teacher_velocity(w))
        close(net(x, t, chunk=1, clean=clean), marginal + w * (conditional - marginal), 1e-8)


@pytest.mark.parametrize("knots", [2, 25])
def test_the_critic_of_a_student_is_that_of_the_integral(knots):
    """Bug: pieces of noise that are too few, or have another slope than the student; laws of another seed."""
    line = torch.linspace(-bumps.EDGE, bumps.EDGE, knots).double()
    students = torch.stack([0.5 * line + 0.2, 0.9 * line + 0.3 * (2 * line).sin()])[:, None]
    z = torch.linspace(-6, 6, 20_001).double()
    weight = (-z.square() / 2).exp()
    y, t = normals(2, 5, seed=3), torch.tensor([0.05, 0.2, 0.5, 0.8, 0.95]).double()
    critic = bumps.exact_critic(students)(y, t.expand(2, 5))
    for i, g in enumerate(bumps.one_step(students, z)):
        share = weight * (-((y[i, :, None] - (1 - t[:, None]) * g) / t[:, None]).square() / 2).exp()
        close(to_x0(y, critic, t.expand(2, 5))[i], (share * g).sum(1) / share.sum(1), 0.01)  # E[G(z) | y]


def test_drift_is_that_of_a_long_rollout():
    """Bug: a sum of biases that is not that of frames, or the spread of another frame."""
    knots, n = torch.tensor([[[-2.0, 2.6]]]).double(), 100_000  # d = .3 + .767 z
    net, x = bumps.behind_the_past(bumps.student_velocity(knots, torch.ones(1).double())), None
    world, of_student = [], []
    for i in range(21):
        z = normals(n, seed=2 * i)
        clean = torch.zeros(1, 2, n, 1, 1).double() if x is None else torch.stack([x, x], 1)
        noise = z.expand(1, 2, n)[..., None, None]
        x = to_x0(noise, net(noise, torch.ones(1, 2), chunk=1, clean=clean), 1.0)[:, 1]
        of_student.append(x.flatten())
        bump = bumps.BUMPS[torch.randint(5, (n,), generator=torch.Generator().manual_seed(i))]
        world.append((bumps.RHO * world[-1] if world else 0) + bump + bumps.WIDTH * normals(n, seed=2 * i + 1))
    mean, variance = torch.tensor([0.3]).double(), torch.tensor([(2.3 / 3) ** 2]).double()
    for frame in (0, 7, 20):
        want = (of_student[frame].mean() - world[frame].mean()) / world[frame].std()
        assert bumps.drift(mean, frame + 1).item() == pytest.approx(want.item(), abs=0.02)
    share = ((of_student[20] - world[20].mean()).abs() < 2 * world[20].std()).double().mean()
    assert bumps.inside(mean, variance, 21).item() == pytest.approx(share.item(), abs=0.01)


@pytest.mark.parametrize("w", [1.0, 3.0])
def test_causal_cd_has_the_optimum_of_the_integral(w):
    """Bug: a target at the wrong timestep, a batch that is too small, weights of another seed."""
    x, velocity = torch.linspace(-7, 7, 2001).double(), bumps.teacher_velocity(w)
    a, b = 1.0, 0.0  # G(x) = a x + b at the timestep below
    times = [*schedule(48, 5.0).tolist(), 0.0]
    for t, s in reversed(list(zip(times, times[1:]))):
        target = a * (x - (t - s) * velocity(x, torch.full_like(x, t))) + b
        spread = (1 - t) ** 2 * bumps.WIDTH**2 + t**2
        density = sum(share * (-(x - (1 - t) * m) ** 2 / (2 * spread)).exp() for m, share in ((1, 0.6), (-1, 0.4)))
        density = density / density.sum()
        centre, aim = (density * x).sum(), (density * target).sum()
        a = ((density * (x - centre) * (target - aim)).sum() / (density * (x - centre) ** 2).sum()).item()
        b = (aim - a * centre).item()
    want = torch.tensor([b - a * bumps.EDGE, b + a * bumps.EDGE]).double()
    close(bumps.causal_cd(bumps.nodes(55, 1), 1, w, 2)[0, 0], want, 0.02)
    two = bumps.causal_cd(bumps.random_numbers([1, 2]), 2, w, 2)
    close(two[:, 0], want.expand(2, 2), 0.06)
    close(two[1], bumps.causal_cd(bumps.random_numbers([2]), 1, w, 2)[0], 1e-6)


def test_causal_dmd_finds_the_increments_of_one_bump(monkeypatch):
    """Bug: a critic of another law, a teacher of another past, seeds that meet."""
    monkeypatch.setattr(bumps, "BUMPS", torch.ones(5).double())
    monkeypatch.setattr(bumps, "WIDTH", 0.6)
    start = torch.tensor([[[0.0, 2.4]], [[-1.6, 4.0]]]).double()
    made = bumps.causal_dmd(bumps.random_numbers([1, 2]), start, 1.0, 160)
    close(made, torch.tensor([1 - 3 * 0.6, 1 + 3 * 0.6]).double().expand(2, 1, 2), 0.06)
    two = bumps.causal_dmd(bumps.random_numbers([1, 2]), start, 1.0, 3)
    close(two[1:], bumps.causal_dmd(bumps.random_numbers([2]), start[1:], 1.0, 3), 1e-9)
