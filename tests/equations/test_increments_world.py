"""The walk of findings/increments.py: teachers against quadrature, closed forms against samples, its students."""

import pytest
import torch
from conftest import close

from findings import cd_against_ode, increments, initialisation
from findings.increments import FRAMES, WIDTH, Student, Walk, bidirectional_teacher, causal_teacher, clips
from flowmap import sample, schedule
from worlds.draws import generator


def normals(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


# -- the world --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("t", [1.0, 0.6, 0.2])
def test_velocity_by_quadrature(t):
    """Bug: a teacher that is not exact: a turn without its share, a start that is not carried on, a wrong covariance.
    Two frames, E[eps - x_0 | x_t] by brute force over all x_0."""
    start, x = 0.7, normals(5, 2)
    at = torch.linspace(-4, 5, 901, dtype=torch.float64)
    first, second = at[:, None], at[None]

    def density(d):  # of one step
        return sum((-(d - mean) ** 2 / (2 * WIDTH**2)).exp() for mean in (-1, 1))

    places = torch.stack(torch.broadcast_tensors(first, second), -1)  # (901 901 2)
    prior = density(first - start) * density(second - first)
    for point, v in zip(x, Walk(2).velocity(x, torch.full((5, 1), t), torch.full((5, 1), start))):
        weight = prior * (-(point - (1 - t) * places).square().sum(-1) / (2 * t * t)).exp()
        x0 = (weight[..., None] * places).sum((0, 1)) / weight.sum()
        close(v, (point - x0) / t, 1e-5)


@pytest.mark.parametrize("n", [1, 3])
def test_both_teachers_make_the_walk(n):
    """Bug: a past that is another chunk's, a clip with frames in another order; data that are not the teacher's."""
    noise, clean, made = normals(1000, FRAMES).float(), torch.zeros(1000, FRAMES), {}
    for i in range(0, FRAMES, n):  # frame by frame, as a rollout does
        past = clips(clean, n)
        x = sample(lambda x, t, past=past: causal_teacher(n)(x, t, None, past), clips(noise, n)[:, None],
                   schedule(40, 1.0), "heun")
        clean[:, i : i + n] = x.flatten(1)[:, i : i + n]
    made["causal"] = clean
    made["whole"] = sample(bidirectional_teacher(Walk(FRAMES)), clips(noise, n)[:, None], schedule(40, 1.0),
                           "heun").flatten(1)
    made["drawn"] = Walk(FRAMES).draw(1000, generator(5))
    true = increments.true_steps(1000)
    for x in made.values():
        steps = x.diff(dim=1, prepend=torch.zeros(1000, 1))
        assert (steps.sort(0).values - true[:, None]).abs().mean(0).max() < 0.12
        assert (steps.T.corrcoef() - torch.eye(FRAMES)).abs().max() < 0.12
    assert abs(true.abs().mean() - 1) < 0.01 and abs(true.var() - 1 - WIDTH**2) < 0.01


@pytest.mark.parametrize("n", [1, 3])
def test_variance_kept_by_the_conditional_mean(n, monkeypatch):
    """Bug: a shrinkage that is not that of E[x_0 | own noise]. For normal steps it is sum_{j <= n} R_1j^2 / S_11, with
    S the covariance of a clip and R its root."""
    monkeypatch.setattr(increments, "TEACHER_STEPS", 100)
    i = torch.arange(1.0, FRAMES + 1)
    values, basis = torch.linalg.eigh(torch.minimum(i[:, None], i))
    root = basis * values.sqrt() @ basis.T
    got = initialisation.variance_kept(Walk(FRAMES, distance=0.0, width=1.0), n, pairs=4000)
    assert abs(got - root[0, :n].square().sum()) < 0.06
    assert abs(initialisation.variance_kept(Walk(n), n, pairs=4000) - 1) < 0.04  # nothing unseen, nothing lost


# -- students ---------------------------------------------------------------------------------------------------------

class Perfect(Student):
    """Jumps from noise to the step that belongs to it."""

    def forward(self, x, t, text, *, cache, clean=None):
        if clean is not None:
            self.append(cache, clean, text)
        true, share = increments.true_steps(100_000), torch.special.ndtr(x)
        step = true[(share * 100_000).long().clamp(max=99_999)]
        return (x - step - torch.as_tensor(cache.last).reshape(-1, 1, 1, 1, 1)) / t[..., None, None, None]


def test_what_is_measured():
    """Bug: steps of other frames, a distance that perfect samples do not bring near 0, a mean that seems alive."""
    net = Perfect([0, 1], 1)
    of = increments.measured(net, 1, 1, b=4000)
    assert max(of["error"]) < 0.05 and abs(of["motion"][0] - 1) < 0.02 and min(of["variety"]) > 0.95
    still = Student([0], 1)
    for p in still.parameters():
        torch.nn.init.zeros_(p)
    still.mlp = lambda x, t: x[:, :1] - x[:, 1:]  # one jump from t = 1 leads to the frame before
    of = increments.measured(still, 1, 1, b=500)
    assert abs(of["error"][0] - 1) < 0.02 and of["motion"][0] < 1e-5 and of["variety"] == [0]


@pytest.mark.parametrize("n", [1, 3])
def test_a_rollout_sees_what_teacher_forcing_shows(n):
    """Bug: a cache that is one chunk late, the past of another sample, a past that is told a wrong time."""
    net, x0 = Student([3, 4], n), clips(normals(8, FRAMES).float(), n)
    x, t = clips(normals(8, FRAMES, seed=1).float(), n), torch.rand(8, FRAMES // n, generator=generator(2))
    forced, cache = net(x, t, None, chunk=1, clean=x0), net.new_cache()
    for i in range(FRAMES // n):
        clean = x0[:, i - 1 : i] if i else None
        close(net(x[:, i : i + 1], t[:, i : i + 1], None, cache=cache, clean=clean), forced[:, i : i + 1], 1e-6)
    moved = x.clone()
    moved[:, -1] += 1  # diffusion forcing: no chunk sees a later one, and each sees the noisy one before
    noisy = net(x, t, None, chunk=1)
    close(net(moved, t, None, chunk=1)[:, :-1], noisy[:, :-1], 1e-6)
    moved[:, 0] += 1
    assert not torch.allclose(net(moved, t, None, chunk=1)[:, 1], noisy[:, 1])


TRAINED = {
    "causal CD": lambda start, seeds: increments.causal_cd(start, seeds, 1, 2),
    "causal CD, stored": lambda start, seeds: increments.causal_cd(start, seeds, 1, 2, stored=3),
    "causal ODE": lambda start, seeds: increments.ode(start, seeds, 1, 2, 50),
    "bidirectional ODE": lambda start, seeds: increments.ode(start, seeds, 1, 2, 50, bidirectional=True),
    "causal DMD": lambda start, seeds: initialisation.causal_dmd(start, seeds, 1, 2),
    "asymmetric DMD": lambda start, seeds: initialisation.asymmetric_dmd(
        start, initialisation.Critic(seeds), seeds, 1, 2, 2),
}


@pytest.mark.parametrize("name", TRAINED)
def test_seeds_do_not_meet(name):
    """Bug: seeds that share draws, trajectories, gradients or clipping, whose spread then says nothing."""
    def trained(seeds):
        return TRAINED[name](increments.teacher_forcing(seeds, 1, 2), seeds).state_dict()

    both, alone = trained([7, 8]), trained([8])
    for key, weight in alone.items():
        torch.testing.assert_close(both[key][1:], weight, rtol=1e-3, atol=1e-5)
        assert not key.startswith("weights") or not torch.allclose(both[key][:1], weight, rtol=1e-2)


def test_stage_2_costs_what_is_said(monkeypatch):
    """Bug: a method that gets more compute than the others. Clips through a network, a backward counted as two; the
    trajectories of ODE too."""
    spent, start, compute = [0], Student([0], 1), 35 * 12 * increments.BATCH
    velocity, mlp = Walk.velocity, Student.mlp

    def counted(of, clips_in):
        def call(self, x, t, *rest):
            trains = any(p.requires_grad for p in getattr(self, "parameters", lambda: [])()) and torch.is_grad_enabled()
            spent[0] += clips_in(self, x) * (3 if trains else 1)
            return of(self, x, t, *rest)
        return call

    monkeypatch.setattr(Walk, "velocity", counted(velocity, lambda self, x: len(x) * self.n / FRAMES))
    monkeypatch.setattr(Student, "mlp", counted(mlp, lambda self, x: len(x) / FRAMES))
    for name in initialisation.STARTS:
        spent[0] = 0
        initialisation.stage_2(name, start.requires_grad_(False), [0], 1, compute)
        assert abs(spent[0] / compute - (name != "AR diffusion")) < (0.1 if "DMD" in name else 0.02), name


@pytest.mark.parametrize("method", cd_against_ode.METHODS)
def test_affine_students_by_quadrature(method, monkeypatch):
    """Bug: a quadrature of another loss than the one that is trained. And what is known by hand: affine ODE keeps the
    squared correlation of noise and end."""
    grid, exact = cd_against_ode.exact_affine(method)
    trained_grid, params = cd_against_ode.trained_affine(method, 0, 20_000)
    close(grid, trained_grid, 1e-6)
    for steps in (1, 2, 4):
        (want,), (got,) = (cd_against_ode.kept(grid, of[None], steps) for of in (exact, params))
        assert abs(want - got) < 0.03
    if method == "causal ODE":
        monkeypatch.setattr(cd_against_ode, "TEACHER_STEPS", 960)
        grid, exact = cd_against_ode.exact_affine(method)
        z = torch.linspace(-6, 6, 2001, dtype=torch.float64)
        p = torch.softmax(-z * z / 2, 0)
        step = increments.true_steps(1_000_000)[(torch.special.ndtr(z) * 1e6).long().clamp(max=999_999)].double()
        by_hand = (p * z * step).sum() ** 2 / (1 + WIDTH**2)
        assert abs(cd_against_ode.kept(grid, exact[None], 1)[0] - by_hand) < 0.02
