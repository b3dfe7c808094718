"""The papers' other methods: each by what defines it, in hand-computed losses and in what its updates really do."""


import pytest
import torch
from conftest import close
from exact_worlds import normals
from test_train import FUNCTIONS, config, equal

import evaluate
import model
import train
from baselines import consistency
from baselines.causal import trajectory
from baselines.consistency import draw_shortcut, pcm_loss, rcm_loss, shortcut_loss
from baselines.whole_clip import Discriminator, discriminator_loss, generator_gan_loss
from cluster.files import metadata_of, read_tensors
from config import RECIPE, STAGES, check, start_of
from dmd import dmd_gradient, surrogate_loss
from flowmap import add_noise, per_frame, schedule
from model import CausalWan
from stage import is_finished, source_of
from worlds.draws import Draw

pytestmark = pytest.mark.usefixtures("small")


def constant(value):
    """A network whose velocity is one number."""
    return lambda x, t, text, **layout: torch.full_like(x, value)


def clips(b=3, f=2, seed=0):
    return normals(b, f, 1, 2, 2, seed=seed)


# -- losses by hand ---------------------------------------------------------------------------------------------------

def test_shortcut_by_hand():
    """Bug: a target that is one step in place of two halves, halves of unequal weight where the grid is shifted, a
    stride of one without the teacher, ends off the grid (SCFM)."""
    grid = schedule(8, 5.0).double()
    times = torch.cat([grid, grid.new_zeros(1)])

    def ema(x, t, text):
        return t[..., None, None, None] + x

    start = torch.tensor([[0, 0], [2, 2], [4, 4]])
    loss, _ = shortcut_loss(constant(0.5), ema, constant(9.0), clips(), None, grid, start, 4, clips(seed=1))
    t, m, s = (times[start + k][..., None, None, None] for k in (0, 2, 4))
    x_t = (1 - t) * clips() + t * clips(seed=1)
    x_m = x_t - (t - m) * (t + x_t)
    x_s = x_m - (m - s) * (m + x_m)
    close(loss, ((x_t - x_s) / (t - s) - 0.5).square().mean(), 1e-12)
    loss, _ = shortcut_loss(constant(0.5), ema, constant(9.0), clips(), None, grid, start, 1, clips(seed=1))
    close(loss, torch.tensor(8.5**2).double(), 1e-12)


def test_shortcuts_drawn_cover_the_grid():
    """Bug: strides that never reach the whole grid, or a start that steps over 0."""
    seen = set()
    for seed in range(200):
        start, stride = draw_shortcut(50, 2, 32, torch.Generator().manual_seed(seed))
        assert start.min() >= 0 and (start + stride).max() <= 32 and torch.equal(start[:, 0], start[:, 1])
        seen |= {(stride, "end")} if (start + stride == 32).any() else {(stride, "")}
    assert {(s, "end") for s in (1, 2, 4, 8, 16, 32)} <= seen


@pytest.mark.parametrize("phases, k, edge", [(4, 0, 12), (4, 11, 12), (4, 12, 24), (4, 47, 48), (2, 13, 24),
                                             (1, 0, 48)])
def test_pcm_by_hand(phases, k, edge):
    """Bug: a phase that ends at the wrong edge, a step across an edge, a target from the wrong state: teacher 7, ema s
    + x_s, student 1, and e the lower end of the phase of t (PCM)."""
    grid = schedule(48, 5.0).double()
    times = torch.cat([grid, grid.new_zeros(1)])
    t, s, e = times[k], times[k + 1], times[edge]
    index = torch.full((3, 2), k)

    def ema(x, t, text):
        return t[..., None, None, None] + x

    loss, _ = pcm_loss(constant(1.0), ema, constant(7.0), clips(), None, grid, grid[:: 48 // phases], index,
                       clips(seed=1))
    x_t = (1 - t) * clips() + t * clips(seed=1)
    x_s = x_t - (t - s) * 7
    close(loss, (x_t - (t - e) - (x_s - (s - e) * (s + x_s))).square().mean(), 1e-9)


S = 0.3  # variance of the one-dimensional world below


def spread(t):
    return ((1 - t) ** 2 * S + t**2) ** 0.5


def teacher(x, t, text):  # the exact velocity of N(0, S)
    t = t[..., None, None, None]
    return (t - (1 - t) * S) / spread(t) ** 2 * x


def perfect(x, t, text):  # x - t v is the end of the trajectory
    return (1 - S**0.5 / spread(t[..., None, None, None])) / t[..., None, None, None] * x


def test_rcm_tangent_vanishes_at_the_flow_map_and_is_computed_by_hand_elsewhere():
    """Bug: a JVP along the wrong direction (data velocity in place of the teacher's), without its part in t, or a sign:
    for v = c x, dG/dt = (1 - c t) v_teacher - c x (sCM, rCM)."""
    x0, eps, t = clips(), clips(seed=1), torch.tensor([[0.3, 0.3], [0.6, 0.6], [0.9, 0.9]]).double()
    assert rcm_loss(perfect, teacher, x0, None, t, eps)[1]["tangent"] < 1e-12
    c = 0.4
    loss, metrics = rcm_loss(lambda x, t, text: c * x, teacher, x0, None, t, eps)
    x_t, u = add_noise(x0, eps, t), t[..., None, None, None]
    tangent = (1 - c * u) * teacher(x_t, t, None) - c * x_t
    size = tangent.square().flatten(1).sum(1).sqrt()  # of the whole sample
    close(metrics["tangent"], size.mean(), 1e-12)
    close(loss, (tangent / (size[:, None, None, None, None] + 0.1)).square().mean(), 1e-12)


@pytest.mark.parametrize("side", [4, 64])
def test_rcm_weighs_consistency_against_dmd_as_rcm_does_at_every_size(side):
    """Bug: a weight that was matched on the toy: rCM normalises the tangent of a whole sample, so its pull on x by
    1 / sqrt(N) weaker than DMD's as clips grow, and ours was 29 times too strong at Wan's size. Checked against rCM's
    own form of both losses, summed over a sample, 100 on consistency."""
    v, x0, x0_fake, x0_real, drift = (normals(2, 1, 1, side, side, seed=i).requires_grad_(i < 2) for i in range(5))
    t, at = torch.full((2, 1), 0.5).double(), [2, 1, 1, 1, 1]
    loss, _ = rcm_loss(lambda x, t, text: v + 0 * x, lambda *_: drift, x0.detach(), None, t, drift)
    cd = torch.autograd.grad(consistency.LAMBDA_RCM * consistency.RCM_WEIGHT * loss, v)[0]
    dmd = torch.autograd.grad(surrogate_loss(x0, dmd_gradient(x0, x0_fake, x0_real)).mean(), x0)[0]
    g = (drift - v).detach()
    g = g / (g.flatten(1).norm(dim=1).reshape(at) + 0.1)
    cd_of_rcm = torch.autograd.grad(100 * (v - v.detach() - g).square().flatten(1).sum(1).mean(), v)[0]
    grad = (x0_fake - x0_real) / (x0 - x0_real).abs().flatten(1).mean(1).reshape(at)
    dmd_of_rcm = torch.autograd.grad((x0 - (x0 - grad).detach()).square().flatten(1).sum(1).mean(), x0)[0]
    close(cd.norm() / dmd.norm(), cd_of_rcm.norm() / dmd_of_rcm.norm(), 1e-6)


def test_following_rcm_learns_the_flow_map():
    """Bug: a tangent followed in the wrong direction. v = w(t) x with w a polynomial must come to the perfect
    student's."""
    w = torch.zeros(8, dtype=torch.float64, requires_grad=True)

    def student(x, t, text):
        return ((2 * t[..., None] - 1) ** torch.arange(8) @ w)[..., None, None, None] * x

    t = torch.linspace(0.002, 1, 200, dtype=torch.float64)[:, None]
    x0, eps = S**0.5 * normals(200, 1, 1, 8, 8), normals(200, 1, 1, 8, 8, seed=1)
    optimizer = torch.optim.Adam([w], lr=0.03)
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 600)
        optimizer.zero_grad()
        rcm_loss(student, teacher, x0, None, t, eps)[0].backward()
        optimizer.step()
    ones = torch.ones(200, 1, 1, 1, 1).double()
    assert (t * (student(ones, t, None) - perfect(ones, t, None))[..., 0, 0, 0]).abs().max() < 0.02  # of G = x - t v


def test_trajectory_keeps_the_states_it_says():
    """Bug: states of other times than those of the student's grid, or an end that is not the last Euler step."""
    grid, x = schedule(8, 5.0).double(), normals(3, 2)
    def velocity(x, t):
        return x * t
    states = trajectory(velocity, x, grid, keep=2)
    assert states.shape == (3, 5, 2)
    walked, times = [x], [*grid.tolist(), 0.0]
    for t, s in zip(times, times[1:]):
        walked.append(walked[-1] - (t - s) * velocity(walked[-1], t))
    for k in range(5):
        close(states[:, k], walked[2 * k], 1e-14)


def test_discriminator_losses_and_gradients():
    """Bug: real and generated exchanged, or a generator that helps the discriminator."""
    logits = torch.tensor([2.0, -1.0])
    p = logits.sigmoid()
    close(discriminator_loss(logits, -logits), -2 * p.log().mean(), 1e-6)
    assert discriminator_loss(logits, -logits) < discriminator_loss(-logits, logits)
    close(generator_gan_loss(logits), -p.log().mean(), 1e-6)
    assert Discriminator(8).init_weights(0)(torch.randn(2, 3, 4, 8)).shape == (2, 3, 4)


# -- what the updates do ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(*stages): a folder in which these stages are finished, in tiny form, and all that they are made from."""
    out = tmp_path_factory.mktemp("runs") / "baselines"

    def finish(*stages):
        for stage in stages:
            finish(*needed(tiny(out), stage))
            if not is_finished(tiny(out), stage):
                train.run_stage(tiny(out, stage=stage), stage)
        return out

    return finish


def needed(cfg, stage):
    """The stages whose weights a stage reads."""
    return {start_of(cfg, stage), STAGES[stage].teacher} - {None, ""}


def tiny(out, **changes):
    return config(out, **{**dict(trajectories=8, eval_clips=2, trajectory_grid=16, dmd_steps=100, save_every=100,
                                 sheet_every=100), **changes})


@pytest.fixture
def calls(monkeypatch):
    """Every forward of every network: who, at which times, in which layout, with gradient or not."""
    seen, forward = [], CausalWan.forward

    def record(self, x, t, text, *args, **how):
        every_t, clean = per_frame(t, x), how.get("clean")
        layout = ("commit" if how.get("commit") else "cache" if how.get("cache") is not None else
                  "teacher forcing" if clean is not None else "causal" if how.get("chunk") else "")
        seen.append(dict(net=self, t=every_t, times=set(every_t.flatten().tolist()), layout=layout, x=x, clean=clean,
                         grad=torch.is_grad_enabled() and self.head.head.weight.requires_grad))
        return forward(self, x, t, text, *args, **how)

    monkeypatch.setattr(CausalWan, "forward", record)
    return seen


def begin(trained, stage, **changes):
    """A stage before its first update, in a folder where all that it reads is finished."""
    cfg = tiny("", stage=stage, **changes)
    cfg.out = str(trained(*needed(cfg, stage)))
    check(cfg)
    return train.begin(cfg, stage)


def of_net(calls, training, name="net"):
    return [c for c in calls if c["net"] is training.nets[name]]


def same(net, path):
    return all(torch.equal(v, net.state_dict()[k]) for k, v in read_tensors(path)[0].items())


def link(stages, there, here):
    """The weights of finished stages, in another folder, too."""
    here.mkdir(exist_ok=True)
    for stage in stages:
        for suffix in ("", "_raw"):
            (here / f"{stage}{suffix}.safetensors").symlink_to(there / f"{stage}{suffix}.safetensors")


@pytest.mark.parametrize("stage", [stage for stage in FUNCTIONS if stage not in RECIPE])
def test_every_baseline_trains_samples_and_resumes(trained, tmp_path, stage):
    """Bug: a method that cannot be run by its one flag, is not measured, or forgets something when stopped."""
    straight, stopped = (tiny(tmp_path / name, stage=stage, dmd_steps=3) for name in ("straight", "stopped"))
    before = needed(straight, stage)
    for name in ("straight", "stopped"):
        link(before, trained(*before), tmp_path / name)
    assert train.run_stage(straight, stage, 9) == 3
    assert {r["steps"] for r in evaluate.evaluate(straight, stage) if r["weights"] == "ema"} >= {1, 2, 4}
    assert [train.run_stage(stopped, stage, most) for most in (1, 9)] == [1, 2]
    for suffix in ("_raw", ""):
        a, b = (read_tensors(tmp_path / x / f"{stage}{suffix}.safetensors")[0] for x in ("straight", "stopped"))
        assert equal(a, b), suffix
    start = read_tensors(tmp_path / "straight" / f"{STAGES[stage].start}.safetensors")[0]
    assert any(not torch.equal(a[k], start[k]) for k in start)


def test_trajectories_are_made_once_by_the_right_teacher_and_counted(trained, tmp_path, calls):
    """Bug: trajectories made anew at every start, by the student's layout, or of other settings; a cost that is not
    counted; as many as fill the last batch, whatever was asked for."""
    out = trained("causal_ode")
    link(("bidirectional", "teacher_forcing"), out, tmp_path)

    def begin_here(stage, **changes):
        return train.begin(tiny(tmp_path, stage=stage, **changes), stage)

    for stage, layout in (("bidirectional_ode", ""), ("causal_ode", "teacher forcing")):
        calls.clear()
        training = begin_here(stage)
        assert len(calls) == 2 * 16 and {c["layout"] for c in calls} == {layout}  # 8 clips in batches of 4, 16 steps
        assert all(same(c["net"], out / f"{STAGES[stage].start}.safetensors") for c in calls)
        calls.clear()
        again = begin_here(stage)
        assert not calls and again.cost == training.cost
        files = list((tmp_path / f"{stage}_trajectories").iterdir())
        assert training.cost["data_bytes"] == sum(f.stat().st_size for f in files) and training.cost["data_seconds"] > 0
        with pytest.raises(ValueError, match="--out"):
            begin_here(stage, guidance=2.5)
    other = tmp_path / "other"
    link(("bidirectional", "teacher_forcing"), out, other)
    training = train.begin(tiny(other, stage="causal_ode", trajectories=5), "causal_ode")
    assert len(list((other / "causal_ode_trajectories").iterdir())) == 5  # no more than was asked for
    training.update(0)
    rows = train.main(tiny(out, stage="causal_ode"))
    assert rows[-1]["data_bytes"] > 10_000 and metadata_of(out / "causal_ode.safetensors")["data_seconds"] > 0


@pytest.mark.parametrize("stage, init", [("self_forcing", "bidirectional_ode"), ("causal_forcing", "causal_ode"),
                                         ("causal_forcing_pp", "causal_cd"), ("naive_sc", "causal_cd")])
@pytest.mark.parametrize("k, first", [(1, 4), (2, 1), (4, 4)])
def test_stage_three_starts_where_its_paper_does_and_rolls_out(trained, calls, stage, init, k, first):
    """Bug: another initialisation than the method's own, or a K or a first chunk other than asked for."""
    if stage == "naive_sc" and k == 1:
        with pytest.raises(ValueError, match="--rollout-steps"):  # one step has nothing to compose
            begin(trained, stage, rollout_steps=k)
        return
    training = begin(trained, stage, rollout_steps=k, first_steps=first)
    assert same(training.nets["net"], trained(init) / f"{init}.safetensors")
    for step in range(3):
        calls.clear()
        metrics = training.update(step)
        walks = [c for c in of_net(calls, training) if c["grad"]]
        assert metrics["K"] == k and metrics["exit_step"] < k and {c["layout"] for c in walks} == {"cache"}
        assert "align" not in metrics and (stage == "naive_sc" or "sc" not in metrics)
        allowed = {round(t, 5) for steps in (k, max(k, first)) for t in schedule(steps, 5.0).tolist()}
        assert all({round(t, 5) for t in c["times"]} <= allowed for c in walks)
        assert len(walks) == 4 * (2 if "sc" in metrics else 1)  # one forward with gradient a frame; SC adds just one
    other = begin(trained, stage, init="teacher_forcing")
    assert same(other.nets["net"], trained("teacher_forcing") / "teacher_forcing.safetensors")


@pytest.mark.parametrize("k", [1, 2])
def test_first_chunk_exits_at_each_of_its_times_whatever_the_others_do(trained, calls, monkeypatch, k):
    """Bug: with K = 1 only t = .625 of the first chunk's four times trained, with K = 2 only .9375 and .625, though
    inference visits all four (CF++'s 1- and 2-step students)."""
    training, met = begin(trained, "causal_forcing_pp", rollout_steps=k, batch=1, critic_steps=1), set()
    grid, first_grid = ([round(t, 5) for t in schedule(n, 5.0).tolist()] for n in (k, 4))
    for step in range(12 * k):
        calls.clear()
        metrics = training.update(step)
        first, *others = [round(c["t"][0, 0].item(), 5) for c in of_net(calls, training) if c["grad"]]
        assert set(others) == {grid[metrics["exit_step"]]} and first == first_grid[metrics["first_exit"]]
        met.add((first, others[0]))
    assert {first for first, _ in met} == set(first_grid)
    drawn = exits_drawn(trained, monkeypatch, 400, rollout_steps=k)
    firsts = [first for _, first in drawn]
    counts = torch.bincount(torch.tensor(firsts), minlength=4)
    assert (counts - 200).abs().max() < 5 * (800 * 3 / 16) ** 0.5
    pairs = {(firsts[i], firsts[i + 1]) for i in range(0, 800, 2)}
    assert len(pairs) == 16  # the critic meets other exits than the generator
    alike = exits_drawn(trained, monkeypatch, 20, rollout_steps=4)  # without a grid of its own: that of the others
    assert all(exit_step == first for exit_step, first in alike) and len({first for _, first in alike}) == 4


def exits_drawn(trained, monkeypatch, steps, **changes):
    """The exit steps of causal_forcing_pp's rollouts and of their first chunks, of generator and critic in turn,
    without the rollouts."""
    class Drawn(Exception):
        pass

    def no_rollout(*args, **kwargs):
        seen.append(args[5:7])  # exit_step and first_exit of stage.rollout
        raise Drawn

    seen, passes = [], []
    with monkeypatch.context() as patch:
        patch.setattr(train, "alternate", lambda *args, **kwargs: passes.extend(args[4:6]))
        patch.setattr(train, "rollout", no_rollout)
        begin(trained, "causal_forcing_pp", batch=1, **changes)
        cfg = tiny("", batch=1)
        for step in range(steps):
            for which, one_pass in enumerate(passes):
                with pytest.raises(Drawn):
                    one_pass(Draw(cfg, source_of(cfg), "dmd", step, slice(0, 1), which))
    return seen


def test_sc_skips_a_first_chunk_that_exits_elsewhere(trained, monkeypatch):
    """Bug: a triple applied to a chunk that stands at another time than its ts, even below its tm."""
    seen, sc = [], train.sc_loss
    monkeypatch.setattr(train, "sc_loss", lambda *args, **how: (seen.append(args), sc(*args, **how))[1])
    training, counts = begin(trained, "naive_sc", rollout_steps=2, batch=1, critic_steps=1), set()
    for step in range(16):
        seen.clear()
        metrics = training.update(step)
        if metrics["exit_step"] == 0:  # ts = 1
            assert all(a[3] == 1.0 for a in seen) and len(seen) == (4 if metrics["first_exit"] == 0 else 3)
            counts.add(len(seen))
    assert counts == {3, 4}


def test_mixed_sc_is_salt_without_alignment(trained):
    """Bug: alignment in the ablation, or another rollout than Salt's."""
    ablation, salt = (begin(trained, stage, lambda_align=0.0) for stage in ("mixed_sc", "salt"))
    for step in range(3):
        assert train.readable(ablation.update(step)) == train.readable(salt.update(step))


def test_window_and_sink_in_training(trained, monkeypatch):
    """Bug: a training rollout that ignores the window, or drops the sink (LongLive)."""
    shown, visible_frames = set(), model.Cache.visible_frames

    def recorded(cache, *chunks, **how):
        visible = visible_frames(cache, *chunks, **how)
        shown.update(tuple(cache.positions(sum(chunks))[i] for i in frames) for frames in visible)
        return visible

    monkeypatch.setattr(model.Cache, "visible_frames", recorded)
    begin(trained, "salt", window=3, sink=1).update(0)
    assert shown == {(0,), (0, 1), (0, 1, 2), (0, 2, 3)}


def test_chunk_wise(tmp_path, calls):
    """Bug: frames of a chunk at different times, or a chunk that is rolled out frame by frame."""
    for stage in ("bidirectional", "teacher_forcing", "causal_cd", "causal_ode", "causal_dmd", "bidirectional_ode"):
        train.run_stage(tiny(tmp_path, stage=stage, chunk=2, dmd_steps=1), stage, 9)
        assert all(c["t"][:, ::2].equal(c["t"][:, 1::2]) for c in calls)
    for stage in ("causvid", "self_forcing", "causal_forcing", "salt"):
        calls.clear()
        training = train.begin(tiny(tmp_path, stage=stage, chunk=2), stage)
        training.update(0)
        rolled = [c for c in of_net(calls, training) if c["layout"] == "cache"]
        assert {c["x"].shape[1] for c in rolled} <= {2} and (rolled or stage == "causvid")
        assert all(c["t"][:, ::2].equal(c["t"][:, 1::2]) for c in calls if c["layout"])
