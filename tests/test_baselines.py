"""The papers' other methods: each by what defines it, in hand-computed losses and in what its updates really do."""

import pytest
import torch
from conftest import close
from test_train import config, equal
from worlds import normals

import baselines
import evaluate
import model
import stages
import train
from causal_cd import pcm_loss, rcm_loss, trajectory
from dmd import Discriminator, adversarial_loss, discriminator_loss, dmd_gradient, surrogate_loss
from flowmap import add_noise, schedule
from model import CausalWan, about_of, read_tensors
from sc_loss import draw_shortcut, shortcut_loss


def constant(value):
    """A network whose velocity is one number."""
    return lambda x, t, text, **layout: torch.full_like(x, value)


def clips(b=3, f=2, seed=0):
    return normals(b, f, 1, 2, 2, seed=seed)


# -- losses by hand ---------------------------------------------------------------------------------------------------

def test_shortcut_by_hand():
    """Bug: a target that is one step in place of two halves, halves of unequal weight where the grid is warped, a
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
    cd = torch.autograd.grad(train.Config.lambda_rcm * baselines.RCM_WEIGHT * loss, v)[0]
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
    optimizer = torch.optim.Adam([w], lr=0.02)
    for step in range(1500):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 1500)
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
    close(adversarial_loss(logits), -p.log().mean(), 1e-6)
    assert Discriminator(8).init_weights(0)(torch.randn(2, 3, 4, 8)).shape == (2, 3, 4)


# -- what the updates do ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with tiny teachers and every stage 2."""
    out = tmp_path_factory.mktemp("runs") / "baselines"
    for stage in ("bidirectional", "teacher_forcing", "causal_cd", "bidirectional_ode", "causal_ode"):
        train.main(tiny(out, stage=stage))
    return out


def tiny(out, **changes):
    return config(out, **{**dict(trajectories=8, eval_clips=2, teacher_eval_steps=1, trajectory_grid=16, dmd_steps=100),
                          **changes})


@pytest.fixture
def calls(monkeypatch):
    """Every forward of every network: who, at which times, in which layout, with gradient or not."""
    seen, forward = [], CausalWan.forward

    def record(self, x, t, text, *, until=None, commit=False, cache=None, chunk=None, clean=None):
        layout = "cache" if cache is not None else "teacher forcing" if clean is not None else "causal" if chunk else ""
        seen.append(dict(net=self, t=t, times=set(t.flatten().tolist()), layout="commit" if commit else layout, x=x,
                         clean=clean, grad=torch.is_grad_enabled() and self.head.head.weight.requires_grad))
        return forward(self, x, t, text, until=until, commit=commit, cache=cache, chunk=chunk, clean=clean)

    monkeypatch.setattr(CausalWan, "forward", record)
    return seen


def begin(trained, stage, **changes):
    cfg = tiny(trained, stage=stage, **changes)
    train.check(cfg)
    return train.STAGES[stage].begin(cfg, train.start_of(cfg, stage))


def of_net(calls, training, name="net"):
    return [c for c in calls if c["net"] is training.nets[name]]


def same(net, path):
    return all(torch.equal(v, net.state_dict()[k]) for k, v in read_tensors(path)[0].items())


@pytest.mark.parametrize("stage", baselines.BASELINES)
def test_every_baseline_trains_samples_and_resumes(trained, tmp_path, stage):
    """Bug: a method that cannot be run by its one flag, is not measured, or forgets something when stopped."""
    for folder in ("straight", "stopped"):
        (tmp_path / folder).mkdir()
        for path in trained.iterdir():
            if path.name.split(".")[0].removesuffix("_raw") != stage:
                (tmp_path / folder / path.name).symlink_to(path)
        for name in ("causal_ode", "bidirectional_ode"):
            (tmp_path / folder / f"{name}_trajectories").unlink(missing_ok=True)
    cfg = tiny(tmp_path / "straight", stage=stage, dmd_steps=3)
    assert train.run_stage(cfg, stage, 9) == 3
    assert {r["steps"] for r in evaluate.evaluate(cfg, stage) if r["weights"] == "ema"} >= {1, 2, 4}
    cfg = tiny(tmp_path / "stopped", stage=stage, dmd_steps=3)
    assert [train.run_stage(cfg, stage, most) for most in (1, 9)] == [1, 2]
    for kind in ("_raw", ""):
        a, b = (read_tensors(tmp_path / x / f"{stage}{kind}.safetensors")[0] for x in ("straight", "stopped"))
        assert equal(a, b), kind
    start = read_tensors(trained / f"{train.STAGES[stage].start}.safetensors")[0]
    assert any(not torch.equal(a[k], start[k]) for k in start)


@pytest.mark.parametrize("stage, steps", [("dmd4", 4), ("dmd8", 8), ("sc_dmd", 8), ("sc_dmd_gan", 8), ("dmd4_scfm", 4)])
def test_dmd_on_a_grid_denoises_noised_clips_at_its_times(trained, calls, monkeypatch, stage, steps):
    """Bug: times off the grid or a time of it that never comes; one time for all clips of a batch, which makes its
    gradient as noisy as that of a single clip; generated states where real ones are due."""
    training, clips_seen = begin(trained, stage, batch=2, critic_steps=1, lambda_sc=0.0), []
    real = baselines.clips_for
    monkeypatch.setattr(baselines, "clips_for", lambda *a: (clips_seen.append(r := real(*a)), r)[1])
    met = {True: set(), False: set()}  # by the generator's own forward (with gradient), and by those for the critic
    apart = 0
    for step in range(40):
        calls.clear()
        clips_seen.clear()
        training.update(step)
        for c in of_net(calls, training):
            t = c["t"][:, :1, None, None, None]  # one for each clip
            noise = [(c["x"] - (1 - t) * x0).flatten(1).std(1) / t.flatten() for x0, _ in clips_seen]  # of t eps
            if min((n - 1).abs().max() for n in noise) < 0.1 and c["layout"] == "":
                met[c["grad"]] |= {round(t, 5) for t in c["times"]}
                apart += len(c["times"]) == 2
            else:
                assert stage == "dmd4_scfm"  # whose shortcuts make steps of their own
    assert apart > 40
    grid = {round(t, 5) for t in schedule(steps, 5.0).tolist()}
    assert met[False] == grid and (met[True] == grid or stage == "dmd4_scfm")


@pytest.mark.parametrize("stage, steps", [("dmd4_backward", 4), ("dmd8_backward", 8), ("rcm", 4)])
def test_backward_simulation_walks_from_noise_and_learns_at_the_exit(trained, calls, stage, steps):
    """Bug: gradient through the walk, or a walk that starts from data or leaves the grid (DMD2)."""
    training, exits = begin(trained, stage, critic_steps=1), set()
    grid = [round(t, 5) for t in schedule(steps, 5.0).tolist()]
    for step in range(8):
        calls.clear()
        exit_step = training.update(step)["exit_step"]
        exits.add(exit_step)
        walks = [c for c in of_net(calls, training)]
        first = next(i for i, c in enumerate(walks) if c["grad"]) - exit_step
        walk = walks[first : first + exit_step + 1]
        assert [round(t, 5) for c in walk for t in c["times"]] == grid[: exit_step + 1]
        assert [c["grad"] for c in walk] == [False] * exit_step + [True]
        assert abs(walk[0]["x"].std() - 1) < 0.1
    assert len(exits) > 2


@pytest.mark.parametrize("stage, term, weight", [
    ("sc_dmd", "sc", "lambda_sc"), ("sc_dmd_gan", "gan", "lambda_gan"), ("dmd4_scfm", "scfm", "lambda_scfm"),
    ("rcm", "rcm", "lambda_rcm"), ("naive_sc", "sc", "lambda_sc"), ("mixed_sc", "sc", "lambda_sc")])
def test_every_further_term_is_in_the_loss_with_its_weight(trained, monkeypatch, stage, term, weight):
    """Bug: a term that is logged and not learned from, or without its weight."""
    training, matched, dmd_loss = begin(trained, stage, **{weight: 0.37}), [], stages.dmd.dmd_loss
    monkeypatch.setattr(stages.dmd, "dmd_loss", lambda *a, **k: (matched.append(r := dmd_loss(*a, **k)), r)[1])
    seen = 0
    for step in range(10):
        metrics = training.update(step)
        others = sum(getattr(train.Config, f"lambda_{k}") * v.item() for k, v in metrics.items()
                     if k in ("sc", "gan", "scfm", "rcm") and k != term)
        if term in metrics:
            seen += 1
            assert metrics[term] > 0
            assert abs(metrics["loss"] - matched[-1][0].item() - 0.37 * metrics[term].item() - others) < 1e-5
    assert seen >= 2


def test_discriminator_learns_and_teaches_the_critic(trained, monkeypatch):
    """Bug: a head that no optimizer holds, or is fed generated clips as real ones (Salt's Ours-alpha)."""
    training = begin(trained, "sc_dmd_gan", dmd_lr=1e-12, lambda_gan=1.0, critic_lr=3e-3, critic_steps=8, dmd_steps=12)
    critic, head, made = training.nets["critic"], training.nets["head"], []
    critic_loss = stages.dmd.critic_loss

    def only_watch(critic, x0, *rest):
        made.append(x0)
        loss, metrics = critic_loss(critic, x0, *rest)
        return 0 * loss, metrics

    monkeypatch.setattr(stages.dmd, "critic_loss", only_watch)
    before = {k: v.clone() for k, v in critic.state_dict().items()}
    for step in range(12):
        training.update(step)
    assert any(not torch.equal(v, before[k]) for k, v in critic.state_dict().items() if k.startswith("blocks.0"))
    cfg, t = tiny(trained), torch.full((4, 4), 0.3)
    real, text = stages.batch(cfg, "trajectory", 1, slice(None))  # clips it has not seen
    real, fake = (head(critic(add_noise(x, normals(*x.shape).float(), t), t, text, until=2))
                  for x in (real, made[-1]))
    assert real.mean() > fake.mean()


def test_stage_two_by_trajectories_is_causal_and_looks_at_the_right_past(trained, calls):
    """Bug: causal ODE without the clean past, or a bidirectional ODE that is shown it (CF++ Eq. 1; CausVid)."""
    grid = {round(t, 5) for t in schedule(4, 5.0).tolist()}
    real = torch.cat([stages.batch(tiny(trained), "trajectory", i, slice(None))[0] for i in range(2)])
    for stage, layout, drawn in (("causal_ode", "teacher forcing", grid), ("bidirectional_ode", "causal", grid | {0})):
        training = begin(trained, stage)
        calls.clear()
        times = set()
        for step in range(6):
            training.update(step)
        for c in of_net(calls, training):
            assert c["layout"] == layout
            times |= {round(t, 5) for t in c["times"]}
            if stage == "causal_ode":
                assert all((real == clip).flatten(1).all(1).any() for clip in c["clean"])
        assert times == drawn


def test_trajectories_are_made_once_by_the_right_teacher_and_counted(trained, tmp_path, calls):
    """Bug: trajectories made anew at every start, by the student's layout, or of other settings; a cost that is not
    counted."""
    for name in ("bidirectional", "teacher_forcing"):
        for kind in ("", "_raw"):
            (tmp_path / f"{name}{kind}.safetensors").symlink_to(trained / f"{name}{kind}.safetensors")
    for stage, layout in (("bidirectional_ode", ""), ("causal_ode", "teacher forcing")):
        calls.clear()
        training = begin(tmp_path, stage)
        assert len(calls) == 2 * 16 and {c["layout"] for c in calls} == {layout}  # 8 clips in batches of 4, 16 steps
        assert all(same(c["net"], trained / f"{train.STAGES[stage].start}.safetensors") for c in calls)
        calls.clear()
        again = begin(tmp_path, stage)
        assert not calls and again.cost == training.cost
        files = list((tmp_path / f"{stage}_trajectories").iterdir())
        assert training.cost["data_bytes"] == sum(f.stat().st_size for f in files) and training.cost["data_seconds"] > 0
        with pytest.raises(ValueError, match="--out"):
            begin(tmp_path, stage, guidance=2.5)
    rows = train.main(tiny(trained, stage="causal_ode"))
    assert rows[-1]["data_bytes"] > 10_000 and about_of(trained / "causal_ode.safetensors")["data_seconds"] > 0


def test_causal_dmd_is_causal_in_all_three_networks(trained, calls, monkeypatch):
    """Bug: a score model that looks at the whole clip, or at a generated past (CF++ Eq. 7)."""
    training, real = begin(trained, "causal_dmd"), []
    clips_for = baselines.clips_for
    monkeypatch.setattr(baselines, "clips_for", lambda *a: (real.append(r := clips_for(*a)), r)[1])
    training.update(0)
    assert {c["layout"] for c in calls} == {"teacher forcing"} and len({c["net"] for c in calls}) == 3
    assert all(any(torch.equal(c["clean"], x0) for x0, _ in real) for c in calls)


TEACHERS = {stage: "teacher_forcing" if stage == "causal_dmd" else "bidirectional"
            for stage, how in train.STAGES.items() if how.kind == "dmd"}


@pytest.mark.parametrize("stage", TEACHERS)
def test_teacher_and_critic_are_the_right_networks(trained, calls, monkeypatch, stage):
    """Bug: a teacher that is the student's start (another --init would change what is matched), the critic, or a net
    that moves; a critic that does not start as the teacher."""
    init = "causal_cd"
    training, start = begin(trained, stage, init=init), trained / f"{TEACHERS[stage]}.safetensors"
    assert same(training.nets["net"], trained / f"{init}.safetensors") and same(training.nets["critic"], start)
    training.update(0)
    teachers = {c["net"] for c in calls} - set(training.nets.values())
    assert len(teachers) == 1 and same(teachers.pop(), start) and not same(training.nets["critic"], start)


@pytest.mark.parametrize("stage, where, loss, teacher", [
    ("rcm", baselines, "rcm_loss", 1), ("pcm", baselines, "pcm_loss", 2),
    ("scfm", baselines.sc_loss, "shortcut_loss", 2), ("dmd4_scfm", baselines.sc_loss, "shortcut_loss", 2),
    ("causal_cd", stages, "causal_cd_loss", 2)])
def test_teachers_of_trajectories_are_the_frozen_ones(trained, monkeypatch, stage, where, loss, teacher):
    """Bug: a trajectory that follows the critic or the student in place of the teacher."""
    seen, real = [], getattr(where, loss)
    monkeypatch.setattr(where, loss, lambda *a: (seen.append(a), real(*a))[1])
    training = begin(trained, stage)
    training.update(0)
    net = getattr(seen[0][teacher], "net", seen[0][teacher])  # under its guidance
    start = train.STAGES[stage].start
    assert not any(net is other for other in training.nets.values()) and same(net, trained / f"{start}.safetensors")


@pytest.mark.parametrize("stage", ["sc_dmd", "sc_dmd_gan", "naive_sc", "mixed_sc", "salt"])
def test_sc_acts_on_the_grid_and_the_states_that_dmd_supervises(trained, calls, monkeypatch, stage):
    """Bug: triples of a denser grid, which is what makes the naive hybrid fail (Salt A.2), or a defect measured from
    other states than those of DMD's own forward."""
    grid = {round(t, 5) for t in schedule(4 if stage == "naive_sc" else 8, 5.0).tolist()}
    training, seen, sc = begin(trained, stage, mixed_probs=(0.0, 0.0, 1.0)), [], stages.sc_loss.sc_loss
    monkeypatch.setattr(stages.sc_loss, "sc_loss", lambda *a: (seen.append(a), sc(*a))[1])
    for step in range(6):
        calls.clear()
        seen.clear()
        training.update(step)
        for _, x_ts, v_ts, *times, through in seen:
            for ts, tm, te in zip(*(torch.as_tensor(x).reshape(-1).tolist() for x in times)):
                assert {round(ts, 5), round(tm, 5)} <= grid and round(te, 5) in grid | {0} and through == "both"
                assert ts > tm > te or ts == tm == te == times[0].min()
            assert any(c["x"] is x_ts and c["grad"] for c in of_net(calls, training)) and v_ts.requires_grad
        assert len(seen) in (0, 1 if train.STAGES[stage].start == "bidirectional" else 4)


def test_shortcuts_of_the_hybrid_are_on_a_dense_grid(trained, monkeypatch):
    """Bug: a hybrid whose shortcuts are on DMD's own four times: that would be another method (Salt A.2)."""
    grids, shortcut = [], baselines.sc_loss.shortcut_loss
    monkeypatch.setattr(baselines.sc_loss, "shortcut_loss", lambda *a: (grids.append(a[5]), shortcut(*a))[1])
    begin(trained, "dmd4_scfm").update(0)
    assert [len(grid) for grid in grids] == [32]


def test_causvid_denoises_real_clips_by_diffusion_forcing(trained, calls):
    """Bug: a CausVid that rolls out (that is Self Forcing), or whose chunks never see a clean past."""
    training, times = begin(trained, "causvid"), set()
    for step in range(4):
        calls.clear()
        training.update(step)
        for c in of_net(calls, training):
            assert c["layout"] == "causal"
            times |= {round(t, 5) for t in c["times"]}
        assert {c["layout"] for c in calls if c["net"] is not training.nets["net"]} == {""}
    assert times == {round(t, 5) for t in [*schedule(4, 5.0).tolist(), 0.0]}


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
    assert same(training.nets["net"], trained / f"{init}.safetensors")
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
    assert same(other.nets["net"], trained / "teacher_forcing.safetensors")


@pytest.mark.parametrize("k", [1, 2])
def test_first_chunk_exits_at_each_of_its_times_whatever_the_others_do(trained, calls, k):
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
    drawn = [stages.draw_first_exit(tiny(trained), k, 0, step, which) for step in range(400) for which in (0, 1)]
    counts = torch.bincount(torch.tensor(drawn), minlength=4)
    assert (counts - 200).abs().max() < 5 * (800 * 3 / 16) ** 0.5
    pairs = {(drawn[i], drawn[i + 1]) for i in range(0, 800, 2)}
    assert len(pairs) == 16  # the critic meets other exits than the generator
    assert stages.draw_first_exit(tiny(trained), 4, 2, 0, 0) == 2  # without a grid of its own: that of the others


def test_evaluation_takes_every_step_of_the_first_chunk(trained, calls):
    """Bug: students measured with a first chunk that exits as early as the others."""
    cfg = tiny(trained, rollout_steps=1)
    net = evaluate.network(cfg, "causal_cd")
    _, prompts, noise = evaluate.evaluation_set(cfg, 2)
    for steps in (1, 2):
        calls.clear()
        evaluate.generate(cfg, "causal_cd", net, steps, prompts, noise)
        times = [c["t"].flatten()[0].item() for c in calls if c["layout"] == "cache"]
        assert times == [*schedule(4, 5.0).tolist(), *3 * schedule(steps, 5.0).tolist()]


def test_sc_leaves_out_a_first_chunk_that_exits_elsewhere(trained, monkeypatch):
    """Bug: a triple applied to a chunk that stands at another time than its ts, even below its tm."""
    seen, sc = [], stages.sc_loss.sc_loss
    monkeypatch.setattr(stages.sc_loss, "sc_loss", lambda *a: (seen.append(a), sc(*a))[1])
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
    shown, seen_by = set(), model.Cache.seen_by

    def recorded(cache, *chunks):
        sights = seen_by(cache, *chunks)
        shown.update(tuple(cache.positions(1)[i] for i in sight) for sight in sights)
        return sights

    monkeypatch.setattr(model.Cache, "seen_by", recorded)
    begin(trained, "salt", window=3, sink=1).update(0)
    assert shown == {(0,), (0, 1), (0, 1, 2), (0, 2, 3)}


def test_chunk_wise(tmp_path, calls):
    """Bug: frames of a chunk at different times, or a chunk that is rolled out frame by frame."""
    for stage in ("bidirectional", "teacher_forcing", "causal_cd", "causal_ode", "causal_dmd", "bidirectional_ode"):
        train.run_stage(tiny(tmp_path, stage=stage, chunk=2, dmd_steps=1), stage, 9)
        assert all(c["t"][:, ::2].equal(c["t"][:, 1::2]) for c in calls)
    for stage in ("causvid", "self_forcing", "causal_forcing", "salt"):
        calls.clear()
        training = begin(tmp_path, stage, chunk=2)
        training.update(0)
        rolled = [c for c in of_net(calls, training) if c["layout"] == "cache"]
        assert {c["x"].shape[1] for c in rolled} <= {2} and (rolled or stage == "causvid")
        assert all(c["t"][:, ::2].equal(c["t"][:, 1::2]) for c in calls if c["layout"])


# -- Salt Eq. 13: the schedule of alignment ---------------------------------------------------------------------------

def test_alignment_waits_is_stochastic_and_shares_its_noise(trained, monkeypatch):
    """Bug: alignment from the first update on, in every one, against a reference from other noise or of a schedule that
    is not the next denser one (Salt Sec. 3.3)."""
    on, rolled = [], []
    self_rollout = stages.self_rollout

    def watch(cfg, net, text, noise, k, exit_step, first_exit, *rest):
        rolled.append((k, exit_step, first_exit, noise, torch.is_grad_enabled()))
        return self_rollout(cfg, net, text, noise, k, exit_step, first_exit, *rest)

    monkeypatch.setattr(stages, "self_rollout", watch)
    training = begin(trained, "salt", dmd_steps=60, align_warmup=0.25, align_prob=0.5, batch=1, critic_steps=1,
                     mixed_probs=(0.4, 0.4, 0.2))
    for step in range(60):
        rolled.clear()
        metrics = training.update(step)
        if metrics["K"] < 8 and step >= 15:
            on.append("align" in metrics)
        else:
            assert "align" not in metrics
        if "align" in metrics:
            low, reference = rolled[-2:]
            assert reference[:2] == (2 * low[0], 2 * low[1] + 1) and reference[3] is low[3]
            # the first chunk has four steps in both rollouts, or twice as many in the reference
            assert reference[2] == (low[2] if low[0] == 2 else 2 * low[2] + 1)
            assert low[4] and not reference[4]
    n = len(on)
    assert n > 20 and abs(sum(on) - n / 2) < 3 * (n / 4) ** 0.5
