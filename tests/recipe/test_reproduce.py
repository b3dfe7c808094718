"""reproduce.py, the ring of findings/mixture.py, and the pages of docs/findings."""

import importlib
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, close
from exact_worlds import Gaussian

import reproduce
import stage
import train
from config import STAGES, Config
from findings import alignment, gaussian, mixture, recipe, stage_two, winds
from findings.mixture import Ring
from flowmap import sample, schedule
from model import CausalWan
from worlds.draws import Draw, generator

QUICK = [name for name in reproduce.FINDINGS if name != "pixels"]  # which test_evaluate.py runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, runs):
    monkeypatch.setattr(mixture, "FOLDER", tmp_path / "students")
    monkeypatch.setattr(recipe, "ROOT", runs)
    monkeypatch.setattr(mixture, "N_EVAL", 200)
    mixture.evaluation_set.cache_clear()
    yield
    mixture.evaluation_set.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# The command

def test_all_findings_are_listed(capsys):
    """Bug: a finding that nobody finds, or one without a claim."""
    reproduce.main([])
    shown = capsys.readouterr().out
    assert all(name in shown for name in reproduce.FINDINGS) and len(shown.splitlines()) == len(reproduce.FINDINGS)
    for name in reproduce.FINDINGS:
        finding = importlib.import_module(f"findings.{name}")
        assert finding.CLAIM and finding.QUANTITIES and len(finding.PANELS) == 2 and finding.cells(False)
    with pytest.raises(ValueError, match="got the finding 'step', expected one of chords"):
        reproduce.main(["step"])
    with pytest.raises(ValueError, match="--seeds 0"):
        reproduce.main(["steps", "--seeds", "0"])


class Counting:
    """A finding of three cells that counts what is measured, and is stopped once."""

    CLAIM, ACROSS, QUANTITIES, PANELS = "-", "x", {"y": "y of the test"}, ("up", "right")

    def __init__(self):
        self.measured, self.stop_at = [], 2

    def cells(self, fast):
        return [{"x": x, "up": 1, "right": "a"} for x in (1, 2, 3)]

    def measure(self, cell, seeds, fast):
        if cell["x"] == self.stop_at:
            raise KeyboardInterrupt
        self.measured.append(cell["x"])
        return [cell | {"quantity": "y", "measured": [cell["x"] + seed / 10 for seed in seeds], "predicted": 0.5}]


def test_a_stopped_run_goes_on_and_a_complete_one_measures_nothing(tmp_path, monkeypatch):
    """Bug: a cell that is measured twice, one that is lost, or seeds of one run in the table of another."""
    finding = Counting()
    monkeypatch.setattr(reproduce, "module_of", lambda name: finding)
    with pytest.raises(KeyboardInterrupt):
        reproduce.run("chords", [1, 2], False, tmp_path)
    finding.stop_at = None
    content, measured_now = reproduce.run("chords", [1, 2], False, tmp_path)
    assert measured_now and finding.measured == [c["settings"]["x"] for c in content["cells"]] == [1, 2, 3]
    assert reproduce.run("chords", [1, 2], False, tmp_path) == (content, False)
    assert content == json.loads((tmp_path / "chords.json").read_text()) and finding.measured == [1, 2, 3]
    with pytest.raises(ValueError, match="with seeds \\[1, 2\\], expected seeds \\[1\\]: give another --out"):
        reproduce.run("chords", [1], False, tmp_path)
    with pytest.raises(ValueError, match="expected seeds \\[1, 2\\] of --fast: give another --out"):
        reproduce.run("chords", [1, 2], True, tmp_path)
    with pytest.raises(ValueError, match="which is a file, expected a folder"):
        reproduce.main(["chords", "--out", str(tmp_path / "chords.json")])


def test_a_student_is_trained_again_when_the_code_has_changed(monkeypatch):
    """Bug: a changed loss that seems to have no effect, because students of the old one are kept."""
    trained = []
    monkeypatch.setattr(mixture, "distil", lambda world, start, *rest: trained.append(rest) or start)
    for code, wanted in ((1, 1), (1, 1), (2, 2)):
        monkeypatch.setattr(mixture, "CODE", code)
        mixture.trained("DMD-4", [1], 5.0, 1.0, 2, start_updates=1)
        assert len(trained) == wanted


def test_the_table_has_mean_spread_and_prediction(tmp_path, monkeypatch):
    """Bug: a standard error in place of the deviation, columns in the wrong order, a prediction of another row."""
    finding = Counting()
    finding.stop_at = None
    monkeypatch.setattr(reproduce, "module_of", lambda name: finding)
    content, _ = reproduce.run("chords", [0, 2], False, tmp_path)
    assert reproduce.report("chords", content).splitlines() == [
        "**y of the test**", "", "| up | right | x 1 | 2 | 3 |", "| --- | --- | --- | --- | --- |",
        "| 1 | a | 1.10 ± 0.14 (0.500) | 2.10 ± 0.14 (0.500) | 3.10 ± 0.14 (0.500) |"]
    pytest.importorskip("matplotlib")
    assert reproduce.draw("chords", content, tmp_path / "chords.png")
    assert (tmp_path / "chords.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", QUICK)
def test_a_finding_runs(name, tmp_path, capsys):
    """Bug: a finding that no longer fits the losses it calls. (What they show takes minutes; see docs/findings.)"""
    reproduce.main([name, "--fast", "--seeds", "2", "--out", str(tmp_path)])
    content = json.loads((tmp_path / f"{name}.json").read_text())
    rows = [row for cell in content["cells"] for row in cell["rows"]]
    finding = importlib.import_module(f"findings.{name}")
    assert {row["quantity"] for row in rows} == set(finding.QUANTITIES)
    assert all(len(row["measured"]) == 2 and all(math.isfinite(x) for x in row["measured"]) for row in rows)
    assert "| --- |" in capsys.readouterr().out


@pytest.mark.parametrize("name", reproduce.FINDINGS)
def test_the_page_shows_what_was_measured(name):
    """Bug: a number that was typed, a table of an older run, a page without one of its five parts."""
    page = (ROOT / "docs" / "findings" / f"{name}.md").read_text()
    content = json.loads((ROOT / "results" / "findings" / f"{name}.json").read_text())
    finding = importlib.import_module(f"findings.{name}")
    assert [cell["settings"] for cell in content["cells"]] == finding.cells(False) and not content["fast"]
    assert reproduce.report(name, content) in page
    assert f"(../../results/findings/{name}.png)" in page and f"python reproduce.py {name}" in page
    parts = [line[3:] for line in page.splitlines() if line.startswith("## ")]
    assert parts == ["What the paper says", "Why it should be so", "The world, and what is exact in it",
                     "Predicted and measured", "Verdict, and what it means at 1.3B"]


def test_a_verdict_needs_seeds_that_agree():
    """Bug: a sign for a difference that one seed alone shows, or for a single seed; a spread that seeds share, which
    hides what every one of them shows."""
    assert mixture.ratio([2.0, 3.0, 4.0], [1.0, 2.0, 3.0]) == "1.50 +"
    assert mixture.ratio([1.0, 2.0, 3.0], [2.0, 3.0, 4.0]) == "0.67 -"
    assert mixture.ratio([1.0, 2.0, 9.0], [1.0, 2.0, 3.0]) == "2.00 ="
    assert mixture.ratio([3.0], [2.0]) == "1.50" and mixture.ratio([1e9], [2.0]) == "over 100"


# ---------------------------------------------------------------------------------------------------------------------
# The ring

def test_the_velocity_of_one_bump_is_that_of_a_gaussian():
    """Bug: a teacher that is not exact: everything measured against it would be its error."""
    world, x = Ring(), torch.randn(6, 1, 2, 1, 1, generator=generator(0))
    text = torch.tensor([0, 1, 2, 3, 0, 1])
    for t in (1.0, 0.7, 0.05):
        for i, label in enumerate(text):
            exact = Gaussian(world.centres[label].double(), world.width**2 * torch.eye(2, dtype=torch.float64))
            close(world.velocity(x, t, text)[i].flatten(), exact.velocity(x[i].flatten().double(), t), 1e-5)


@pytest.mark.parametrize("world", [Ring(), Ring(8, 4, 0.15), Ring(8, 1, 0.15)])
def test_the_teacher_makes_the_data(world):
    """Bug: shares of bumps that do not fit what is drawn; a ring that does not have variance 1."""
    text = torch.arange(world.labels).repeat_interleave(8000 // world.labels)
    x0 = world.draw(text, generator(1))
    assert abs(x0.mean()) < 0.03 and abs(x0.var() - 1) < 0.05
    teacher = world.teacher(1.0)
    made = sample(lambda x, t: teacher(x, t, text), torch.randn(8000, 1, 1, 2, 1, 1, generator=generator(2)),
                  schedule(60, 1.0), "heun")
    for label in range(world.labels):
        a, b = (mixture.points(x)[text == label] for x in (made, x0))
        for angle in (0.0, 1.0, 2.0):
            along = torch.tensor([math.cos(angle), math.sin(angle)])
            assert ((a @ along).sort().values - (b @ along).sort().values).abs().mean() < 0.06


@pytest.mark.parametrize("solver", ["euler", "cm"])
def test_the_perfect_student_has_the_predicted_contrast(solver):
    """Bug: a closed form that is not that of this world."""
    world, text = Ring(), torch.arange(4).repeat_interleave(5000)
    noise = torch.randn(20_000, 8, 1, 2, 1, 1, generator=generator(3))
    for steps in (1, 4, 8):
        grid = schedule(steps, 5.0)
        x = sample(lambda x, t: world.perfect_student(x, t, text), noise[:, :: 8 // steps], grid, solver)
        std = mixture.points(x).unflatten(0, (4, -1)).var(1).mean().sqrt() / world.width
        assert abs(std - gaussian.gain(gaussian.perfect_slope, world.width, grid, solver)) < 0.015


@pytest.mark.parametrize("name", ["SC-DMD 0.2", "DMD-8, critic told", "DMD-8, own states", "DMD-4 + 1 SCFM"])
def test_seeds_do_not_meet(name):
    """Bug: seeds that share draws, gradients or clipping, whose spread then says nothing."""
    def trained(seeds):
        start = mixture.flow_matching(Ring(), seeds, 3)
        return mixture.distil(Ring(), start, mixture.STUDENTS[name], seeds, 5.0, 2.0, 3).state_dict()

    both, alone = trained([7, 8]), trained([8])
    for key, weight in alone.items():
        torch.testing.assert_close(both[key][1:], weight, rtol=1e-3, atol=1e-5)
        assert not key.startswith("weights") or not torch.allclose(both[key][:1], weight, rtol=1e-2)


@pytest.mark.parametrize("name", ["DMD-4", "SC-DMD 0.4", "DMD-8, critic told", "DMD-8, own states",
                                  "DMD-4, weak teacher"])
def test_what_a_student_is_trained_on(name, monkeypatch):
    """Bug: a triple that is none, noise of another timestep than the student is told, a teacher without its guidance, a
    critic that is not told, a student that is not the one of its name."""
    world, seeds, student, seen = Ring(), [1, 2], mixture.STUDENTS[name], []
    start = mixture.flow_matching(world, seeds, 3)
    real = {of: getattr(mixture, of) for of in ("sc_dmd_loss", "dmd_loss", "critic_loss")}
    for of in real:
        monkeypatch.setattr(mixture, of, lambda *args, of=of: (seen.append((of, args)), real[of](*args))[1])
    mixture.distil(world, start, student, seeds, 5.0, 3.0, 2)
    assert [of for of, _ in seen] == 2 * [*2 * ["critic_loss"], "dmd_loss" if student.own_states else "sc_dmd_loss"]

    _, args = seen[2]
    critic, teacher = args[2:4] if student.own_states else args[1:3]
    x, text = torch.randn(8, 1, 2, 1, 1, generator=generator(0)), torch.arange(4).repeat(2)
    exact = world.teacher(3.0, start if student.weak else None)
    close(teacher(x, 0.6, text), exact(x, 0.6, text))
    assert isinstance(critic, mixture.Nets) != student.told
    if student.own_states:
        return
    _, _, _, x_ts, text, ts, tm, te, _, _, lambda_sc = args
    grid = schedule(student.grid, 5.0)
    assert lambda_sc == student.lambda_sc and set(ts.tolist()) <= set(grid.tolist())
    if lambda_sc > 0:
        ends = {*grid[::2].tolist(), 0.0}
        for a, b, c in zip(ts.tolist(), tm.tolist(), te.tolist()):
            assert a > b > c and b in grid.tolist() and c in ends or a == b == c == grid[-1]
    noised = (1 - ts) ** 2 * world.width**2 + ts**2  # the variance of x_ts around (1 - ts) mu
    gap = mixture.points(x_ts) - (1 - ts)[:, None] * world.centres[text]
    assert abs((gap.square().mean(1) / noised).mean() - 1) < 0.35


def test_the_error_of_the_perfect_student_is_its_gain(monkeypatch):
    """Bug: an error that is not the distance to the teacher, or of other samples; the noise of another number of
    steps."""
    monkeypatch.setattr(mixture, "N_EVAL", 4000)
    world, grid = Ring(), schedule(8, 5.0)
    gain = gaussian.gain(gaussian.perfect_slope, world.width, grid, "euler")
    x = mixture.samples(world.perfect_student, world, "euler", 8, 5.0)
    assert abs(mixture.error(x, world, 1.0)[0] - (gain - 1) * world.width) < 0.02
    assert abs(mixture.contrast(x, world, 1.0)[0] - gain) < 0.02
    cm = mixture.samples(world.perfect_student, world, "cm", 8, 5.0)
    assert mixture.error(cm, world, 1.0)[0] < 0.04 < mixture.error(cm, world, 4.0)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The recipe's networks

def test_alignment_is_measured_on_the_rollouts_that_training_aligns(small, tmp_path, monkeypatch):
    """Bug: exits that training never draws, or a reference of other steps than L_align's."""
    cfg, seen = Config(out=str(tmp_path), frames=3, batch=2, critic_steps=1, align_warmup=0.0, align_prob=1.0), []
    real = train.rollout
    for module in (train, alignment):
        monkeypatch.setattr(module, "rollout", lambda cfg, net, text, noise, *how: (
            seen.append(how), real(cfg, net, text, noise, *how))[1])
    monkeypatch.setattr(train, "load_finished", lambda *args: None)
    monkeypatch.setattr(stage, "load_finished", lambda *args: None)
    training = train.begin(cfg, "salt")
    aligned = set()
    for step in range(12):
        seen.clear()
        training.update(step)
        aligned |= {tuple(seen[1:])} if len(seen) == 3 else set()  # after the critic's
    seen.clear()
    for k in (2, 4):
        for exits in alignment.exits_of(cfg, k):
            draw = Draw(cfg, stage.source_of(cfg), "dmd", 0, slice(0, cfg.batch))
            _, x_low, x_ref, another = alignment.rollouts_of(cfg, training.nets["net"], draw, k, *exits)
            if k == 2:  # both make the first frame alike
                close(x_low[:, 0], x_ref[:, 0])
            assert not torch.allclose(x_ref, another())
    assert len(aligned) > 3 and aligned <= {tuple(seen[i : i + 2]) for i in range(0, len(seen), 3)}


def test_a_share_of_pairs_is_counted_by_hand():
    """Bug: a share that counts a token's relation to itself, which never differs, or differences within the margin."""
    z, near = torch.eye(3)[None, None], torch.eye(3)[None, None].clone()
    near[..., 1, 0] = 0.05
    assert alignment.share(z, near) == 0
    near[..., 1, 0] = 1.0
    close(alignment.share(z, near), torch.tensor(1 / 3))


def test_a_window_of_a_long_clip_forgets_what_it_should(small, tmp_path, monkeypatch):
    """Bug: a memory of another length than the table says; positions that matter where there is no sink; a second part
    of a clip that does not go on from the first, with the same noise."""
    monkeypatch.setattr(recipe, "ROOT", tmp_path)
    cfg = recipe.settings_of("toy", 0, True)
    recipe.trained(cfg, ("bidirectional", "teacher_forcing", "causal_cd"))
    labels = torch.arange(2)

    def made(window, sink=0, relative=False):
        memory = dict(window=window, sink=sink, relative=relative)
        return recipe.clips(cfg, "causal_cd", [(8, 2)], labels, **memory)

    all_frames, window = made(8), made(4)
    close(window[:, :4], all_frames[:, :4])
    assert not torch.allclose(window[:, 4], all_frames[:, 4], atol=1e-5)
    close(made(4, relative=True), window, 1e-3)
    assert not torch.allclose(made(4, 1, True)[:, 5:], made(4, 1)[:, 5:], atol=1e-3)

    parts, ends_otherwise = (recipe.clips(cfg, "causal_cd", [(5, 2), (3, steps)], labels) for steps in (2, 4))
    close(parts, all_frames)
    close(ends_otherwise[:, :5], all_frames[:, :5])
    assert not torch.allclose(ends_otherwise[:, 5], all_frames[:, 5], atol=1e-3)


def test_every_start_of_stage_3_has_cost_the_same(small, tmp_path, monkeypatch):
    """Bug: a start that is ahead because it has seen more clips, or has its trajectories for nothing."""
    monkeypatch.setattr(recipe, "ROOT", tmp_path)
    spent, forward, exits = [], CausalWan.forward, itertools.cycle(range(4))

    def counting(net, x, *args, **layout):
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in net.parameters())
        spent.append(len(x) * (2 if layout.get("clean") is not None else 1) * (3 if learns else 1))
        return forward(net, x, *args, **layout)

    monkeypatch.setattr(CausalWan, "forward", counting)
    monkeypatch.setattr(Draw, "integer", lambda draw, n: next(exits) % n)  # every exit as often
    cfg = recipe.trained(recipe.settings_of("toy", 0, True), ("bidirectional", "teacher_forcing"))
    for name, (stage_name, changes) in stage_two.STARTS.items():
        if name == "AR diffusion":
            continue
        asked = recipe.settings_of("toy", 0, False, **changes)
        spent.clear()
        training = train.begin(replace(cfg, critic_steps=asked.critic_steps, trajectories=cfg.batch), stage_name)
        cost_of_data = sum(spent) / cfg.batch * asked.trajectories
        spent.clear()
        for step in range(4):
            training.update(step)
        cost = sum(spent) / 4 / cfg.batch * asked.batch * asked.steps_of(STAGES[stage_name].group)
        assert cost + cost_of_data == pytest.approx(stage_two.CLIPS_THROUGH, rel=0.01), name


def test_stored_trajectories_are_paid_for_where_balls_are_blown():
    """Bug: more trajectories for nothing. Those of stage_two were counted above."""
    assert winds.ode(512, winds.FULL) == stage_two.STARTS["causal ODE"][1]
    for compute, numbers in winds.STORED.items():
        updates = [winds.ode(n, compute)["trajectory_steps"] for n in numbers]
        assert updates == sorted(updates, reverse=True) and updates[-1] > 100
    assert Config().trajectory_steps * 192 == winds.FULL == stage_two.CLIPS_THROUGH
