"""The losses: official numbers, hand-computed cases, and where gradient may and may not flow."""

import itertools

import pytest
import torch
from conftest import close, close_norm

from align import align_loss, relations, trd_loss
from causal_cd import causal_cd_loss, draw_index
from dmd import critic_loss, dmd_gradient, dmd_loss, surrogate_loss
from flowmap import Guided, guided, schedule
from sc_loss import draw_triple, endpoints, sc_loss, semigroup_defect, triple_ends


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- distribution matching --------------------------------------------------------------------------------------------

def test_dmd_gradient_equals_official(golden):
    """Bug: a normaliser over the batch, or by fake in place of real; v_c + w (v_c - v_u) guidance (golden H1, w = 1 +
    3)."""
    g = golden("H1")
    real = guided(g["pred_real_cond"], g["pred_real_uncond"], 4.0)
    grad = dmd_gradient(g["x"], g["pred_fake_cond"], real)
    close(grad, g["grad"])
    x = g["x"].clone().requires_grad_()
    loss = surrogate_loss(x, grad)
    loss.backward()
    close(loss.double(), g["loss__f64"], 1e-5)
    close(x.grad, g["dloss_dx"])


def test_dmd_gradient_routing(tiny):
    """Bug: gradient into the critic or the teacher from the generator's loss; into the generator from the critic's."""
    critic, teacher, x0 = tiny(), tiny(), rand(2, 2, 3, 4, 6).requires_grad_()
    text, t, eps = rand(2, 3, 5), torch.full((2, 2), 0.5), rand(2, 2, 3, 4, 6, seed=1)
    dmd_loss(x0, text, critic, Guided(teacher, torch.zeros(3, 5), 2.0), t, eps)[0].backward()
    assert x0.grad.abs().sum() > 0
    assert all(p.grad is None for net in (critic, teacher) for p in net.parameters())
    x0.grad = None
    critic_loss(critic, x0, text, t, eps)[0].backward()
    assert x0.grad is None and critic.head.head.weight.grad.abs().sum() > 0


# -- self-consistency -------------------------------------------------------------------------------------------------

def test_triples_have_exactly_the_stated_distribution():
    """Bug: a triple off the grid, an end that is never 0, a tm equal to an end, or unequal odds (Salt Eq. 9)."""
    train, infer = schedule(8, 5.0), schedule(4, 5.0)
    ts, g, n = train[2].item(), torch.Generator().manual_seed(0), 4000
    ends = [e for e in (*infer.tolist(), 0.0) if e < ts and any(e < m < ts for m in train.tolist())]
    assert triple_ends(ts, train, infer) == ends and 0.0 in ends and len(ends) == 3
    seen = {}
    for _ in range(n):
        tm, te = draw_triple(ts, train, infer, g)
        assert ts > tm > te and tm in train.tolist() and te in ends
        seen[tm, te] = seen.get((tm, te), 0) + 1
    for te in ends:
        middles = [m for m in train.tolist() if te < m < ts]
        for tm in middles:
            expected = n / len(ends) / len(middles)
            assert abs(seen[tm, te] - expected) < 5 * expected**0.5
    assert draw_triple(train[-1].item(), train, infer, g) is None


def test_semigroup_defect_by_hand():
    """Bug: composed endpoint from the wrong time. For v = x: x1 = x (1 - (ts - te)), x2 = x (1 - (ts - tm)) (1 - (tm
    - te))."""
    x, ts, tm, te = rand(4, 3).double(), 0.9, 0.5, 0.2
    calls = []

    def velocity(x, t):
        calls.append(t)
        return x

    loss, _ = sc_loss(velocity, x, x, ts, tm, te)
    assert calls == [tm]  # one extra forward, at tm
    defect = (1 - 0.7) - (1 - 0.4) * (1 - 0.3)
    close(loss, (defect * x).square().mean().float(), 1e-6)
    close(semigroup_defect(velocity, x, ts, tm, te), torch.tensor((defect / 0.7) ** 2).double(), 1e-5)
    close(semigroup_defect(velocity, 10 * x, ts, tm, te), semigroup_defect(velocity, x, ts, tm, te), 1e-6)
    constant = rand(4, 3, seed=1).double()
    assert sc_loss(lambda x, t: constant, x, constant, ts, tm, te)[0] < 1e-12  # a straight flow has none


def test_defect_is_the_mean_of_the_samples_ratios():
    """Bug: a ratio of means, or of norms that are not squared (Salt Eq. 16). With v = a x + b t for samples of their
    own a and b, x1 - x2 = (tm - te) (v(x_ts, ts) - v(x_tm, tm)), and x1 - x_ts = -(ts - te) v(x_ts, ts)."""
    ts, tm, te = 1.0, 0.6, 0.2
    x, a, b = (torch.tensor(z).double() for z in ([[1.0, 2], [3, -1]], [[0.2], [0.1]], [[0], [-0.5]]))
    v = a * x + b * ts
    v_tm = a * (x - (ts - tm) * v) + b * tm
    ratios = ((tm - te) * (v_tm - v)).square().sum(1) / ((ts - te) * v).square().sum(1)
    assert ratios.max() > 4 * ratios.min()
    close(semigroup_defect(lambda x, t: a * x + b * t, x, ts, tm, te), ratios.mean(), 1e-7)


def test_defect_is_the_change_of_velocity_along_the_path():
    """Bug: any slip in Eq. 6-7: x1 - x2 = (tm - te) (v(x_tm, tm) - v(x_ts, ts)) for every velocity field."""
    x, ts, tm, te = rand(4, 3).double(), 1.0, 0.8, 0.1
    def velocity(x, t):
        return torch.sin(3 * x) + t
    direct, composed = endpoints(velocity, x, velocity(x, ts), ts, tm, te)
    v_m = velocity(x - (ts - tm) * velocity(x, ts), tm)
    close(direct - composed, (tm - te) * (v_m - velocity(x, ts)), 1e-12)


@pytest.mark.parametrize("through", ["both", "direct", "composed"])
def test_sc_gradient_goes_where_it_is_said(through):
    """Bug: a target without stop-gradient, or a branch that is silently detached."""
    w = torch.tensor(0.5, requires_grad=True)
    a, b = torch.tensor(1.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    x = rand(4, 3)
    sc_loss(lambda x, t: b * x, x, a * x, 0.9, 0.5, 0.2, through)[0].backward()
    assert (a.grad is not None)  # v_ts also places x_tm
    assert (b.grad is not None) == (through != "direct")
    if through == "direct":  # only x1 = x (1 - .7 a) moves
        x2 = (1 - 0.4) * (1 - 0.3 * 2)
        close(a.grad, (2 * ((1 - 0.7) - x2) * -0.7 * x.square()).mean(), 1e-5)
    with pytest.raises(ValueError, match="through"):
        sc_loss(lambda x, t: w * x, x, x, 0.9, 0.5, 0.2, "neither")


# -- causal consistency distillation ----------------------------------------------------------------------------------

def test_causal_cd_equals_official(golden, golden_net):
    """Bug: guidance, Euler step, or the target's time wrong (golden I1). The official x_0 reads its sigma off a
    1000-step
    grid, up to .0016 away from t, so ours is checked on its velocities and with the sigmas it used."""
    g = golden("I1")
    teacher, student, ema = golden_net("W0"), golden_net("W1"), golden_net("W2")
    teacher = Guided(teacher, torch.zeros(32, 48), 3.0)
    teacher.both = lambda text: torch.cat([text, g["neg_context"]])
    x0, grid, index = g["clean_latent"], schedule(48, 5.0), torch.full((2, 5), 10)
    close(grid[10], g["t"][0, 0] / 1000, 1e-6)
    seen = {}

    def record(name, net):
        def call(x, t, text, **layout):
            close(t, g["t_next" if name == "ema" else "t"] / 1000, 1e-6)
            seen[name] = x, net(x, t, text, **layout)
            return seen[name][1]
        return call

    causal_cd_loss(record("student", student), record("ema", ema), record("teacher", teacher), x0, g["context"], grid,
                   index, g["noise"], 1)
    close(seen["teacher"][1], g["teacher_flow_uncond"] + 3 * (g["teacher_flow_cond"] - g["teacher_flow_uncond"]), 1e-3)
    close(seen["ema"][0], g["latent_t_next"], 1e-3)

    # once more with the official sigmas in place of ours: loss and parameter gradients
    s_noise, s, s_next = (g[f"sigma_t_{x}"].flatten()[0] for x in ("add_noise", "x0_conversion", "next_x0_conversion"))
    x_t = (1 - s_noise) * x0 + s_noise * g["noise"]
    close(x_t, g["latent_t"])
    layout = dict(chunk=1, clean=x0)
    v = teacher(x_t, g["t"] / 1000, g["context"], **layout)
    x_s = x_t - ((g["t"] - g["t_next"]) / 1000)[:, :, None, None, None] * v
    close(x_s, g["latent_t_next"])
    with torch.no_grad():
        target = x_s - s_next * ema(x_s, g["t_next"] / 1000, g["context"], **layout)
    loss = (x_t - s * student(x_t, g["t"] / 1000, g["context"], **layout) - target).square().mean()
    close(loss, g["loss"], 1e-4)
    loss.backward()
    for key in (k for k in g if k.startswith("grad::")):
        close_norm(student.get_parameter(key.removeprefix("grad::")).grad, g[key], 1e-3)


def test_causal_cd_anchors_the_last_interval_to_the_teacher():
    """Bug: the last interval left out, or a target that runs the EMA net's own guess at t = 0 (CF++ Eq. 3)."""
    grid, x0, eps = schedule(4, 5.0), rand(2, 3, 1, 2, 2), rand(2, 3, 1, 2, 2, seed=1)
    index = torch.full((2, 3), 3)  # t = .625 -> 0
    t = grid[3]
    def teacher(x, t, text, **layout):
        return 2 * x
    def student(x, t, text, **layout):
        return 2 * x
    def wild(x, t, text, **layout):
        return 1e6 * torch.ones_like(x)
    loss, _ = causal_cd_loss(student, wild, teacher, x0, None, grid, index, eps, 1)
    assert loss < 1e-10  # G_student = x_t - t 2 x_t is exactly the teacher's Euler step to 0
    loss, _ = causal_cd_loss(lambda x, t, text, **k: 3 * x, wild, teacher, x0, None, grid, index, eps, 1)
    close(loss, (t * ((1 - t) * x0 + t * eps)).square().mean(), 1e-5)


def test_causal_cd_gradient_routing_and_index(tiny):
    """Bug: gradient into teacher or target; a time that differs inside a chunk; an index that misses the last
    interval."""
    student, ema, teacher = tiny(), tiny(), tiny()
    index = draw_index(64, 6, 2, 4, torch.Generator().manual_seed(0))
    assert torch.equal(index[:, ::2], index[:, 1::2]) and set(index.flatten().tolist()) == {0, 1, 2, 3}
    x0, text, eps = rand(2, 6, 3, 4, 6), rand(2, 3, 5), rand(2, 6, 3, 4, 6, seed=1)
    causal_cd_loss(student, ema, teacher, x0, text, schedule(4, 5.0), index[:2], eps, 2)[0].backward()
    assert student.head.head.weight.grad.abs().sum() > 0
    assert all(p.grad is None for net in (ema, teacher) for p in net.parameters())


# -- reference alignment ----------------------------------------------------------------------------------------------

def test_trd_by_hand():
    """Bug: a hinge that counts the margin, squares, or takes the mean before it: tokens at 0, 60 and 90 degrees in
    frame one, at 0, 90 and 90 in the reference; in frame two they agree."""
    def tokens(*degrees):
        angle = torch.tensor(degrees).deg2rad()
        lengths = torch.tensor([[1.0], [2.0], [0.5]])  # which do not matter
        return torch.stack([angle.cos(), angle.sin()], -1) * lengths

    same = tokens(0.0, 45.0, 10.0)
    low, ref = (torch.stack([tokens(*z), same])[None] for z in ((0.0, 60.0, 90.0), (0.0, 90.0, 90.0)))
    # cosines of the pairs (1, 2), (1, 3), (2, 3): .5, 0, .866 and 0, 0, 1; each pair twice, of 9 entries in 2 frames
    off = 0.5, 0.0, 1 - 0.75**0.5
    for margin in (0.0, 0.1, 0.2):
        expected = 2 * sum(max(0, d - margin) for d in off) / 18
        close(trd_loss(low, ref, margin), torch.tensor(expected), 1e-5)


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.3])
def test_trd_equals_official_spatial(golden, margin):
    """Bug: a mean over the wrong axes, relations across frames, a margin on the wrong side (golden J, spatial part)."""
    g = golden("J")
    low, ref = g["align_normalized"], g["target_normalized"]
    close(trd_loss(low, ref, margin), g[f"loss_only_spatial_margin{margin}"], 1e-4)


def test_relations_ignore_rotation_and_scale_of_features():
    """Bug: tokens not normalised (Salt Eq. 11)."""
    z = rand(2, 3, 5, 8)
    q, _ = torch.linalg.qr(rand(8, 8, seed=1))
    close(relations(z), relations(7 * z @ q), 1e-5)
    assert relations(z).diagonal(dim1=-2, dim2=-1).allclose(torch.ones(2, 3, 5))


def test_margin_forgives_with_zero_gradient_and_reference_gets_none():
    """Bug: a margin that only shifts the loss; gradient into the reference rollout (Salt Eq. 12)."""
    low, ref = rand(1, 1, 4, 8).requires_grad_(), rand(1, 1, 4, 8, seed=1).requires_grad_()
    trd_loss(low, ref, margin=2.0).backward()  # cosines differ by at most 2
    assert low.grad.abs().sum() == 0
    trd_loss(low, ref, margin=0.1).backward()
    assert low.grad.abs().sum() > 0 and ref.grad is None


def test_align_loss_uses_one_noise_for_both():
    """Bug: fresh noise for the reference: equal rollouts would then differ."""
    x, t, eps = rand(2, 3, 3, 4, 4), torch.full((2, 3), 0.5), rand(2, 3, 3, 4, 4, seed=1)
    def features(x, t, text):
        return x.flatten(3).transpose(2, 3)
    loss, _ = align_loss(features, x.requires_grad_(), x.detach().clone(), None, t, eps, margin=0.0)
    assert loss < 1e-6
    assert align_loss(features, x, x.detach().flip(-1), None, t, eps, margin=0.0)[0] > 1e-3


def test_triple_sampler_never_leaves_the_grid():
    """Bug: a triple that DMD does not supervise, for any start and any pair of nested grids."""
    for k, infer_k in itertools.product((4, 8), (2, 4)):
        train, infer = schedule(k, 5.0), schedule(infer_k, 5.0)
        for ts in train.tolist():
            for seed in range(20):
                triple = draw_triple(ts, train, infer, torch.Generator().manual_seed(seed))
                if triple is not None:
                    assert ts > triple[0] > triple[1] and triple[0] in train.tolist()
                    assert triple[1] in [*infer.tolist(), 0.0]
