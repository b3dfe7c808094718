"""What evaluate.py measures, against the same measured by hand: which weights, how they are sampled, on which clips."""

import dataclasses
import json

import pytest
import torch
from conftest import close
from PIL import Image
from test_train import config

import evaluate
import train
from cluster.files import read_tensors, write_tensors
from config import STAGES, start_of
from flowmap import schedule
from model import SIZES, CausalWan
from stage import is_finished, path_of
from worlds import WORLDS, draws, latent_folder, toy
from worlds.draws import EVALUATE, WORLD

TOY = WORLDS["toy"]
CLIPS = 3
SAMPLED = {  # stage: (causal, student, solver)
    "bidirectional": (False, False, "euler"), "teacher_forcing": (True, False, "euler"),
    "causal_cd": (True, True, "cm"), "salt": (True, True, "cm"), "dmd4": (False, True, "cm"),
    "scfm": (False, True, "euler"), "pcm": (False, True, "euler"), "causal_ode": (True, True, "cm")}


@pytest.fixture(autouse=True)
def smaller(monkeypatch):
    """A toy network that is a tenth of the size, and teachers that are sampled in three steps."""
    monkeypatch.setitem(SIZES, "toy", dataclasses.replace(SIZES["toy"], dim=48, ffn_dim=96, num_heads=4, num_layers=2))
    monkeypatch.setattr(evaluate, "TEACHER_STEPS", 3)


def random_net(seed, **window):
    """A network no part of which is silent."""
    net = CausalWan(dataclasses.replace(SIZES["toy"], **window)).init_weights(seed)
    torch.nn.init.normal_(net.head.head.weight, std=0.1, generator=torch.Generator().manual_seed(seed))
    return net.requires_grad_(False)


@pytest.fixture
def finished(tmp_path):
    """finished(stage, **settings): a config, with random weights of that stage, raw and EMA, in its --out."""
    def make(stage, **changes):
        cfg = config(tmp_path, **{"eval_clips": CLIPS, "eval_seed": 3, **changes})
        how = STAGES[stage]
        metadata = {"stage": stage, "size": "toy", "config": dataclasses.asdict(cfg), "saved": 1.0,
                    "causal": how.causal}
        for seed, suffix in ((1, ""), (2, "_raw")):
            write_tensors(path_of(cfg, stage, suffix), random_net(seed).state_dict(), metadata)
        return cfg
    return make


def velocity(net, x, t, labels, guidance, **layout):
    """Guided or not, in two forwards; layout may hold a pair of caches, conditional and unconditional."""
    times, text = torch.full(x.shape[:2], t), TOY.embed(labels)
    caches = layout.pop("caches", None)
    of = [{"cache": cache} for cache in caches] if caches else [layout] * 2
    cond = net(x, times, text, **of[0])
    if guidance == 1:
        return cond
    uncond = net(x, times, torch.zeros_like(text), **of[1])
    return uncond + guidance * (cond - uncond)


def solve(net, noise, grid, labels, solver, guidance, **layout):
    """x_0 `b f c h w` from noise `b K f c h w`: Euler, or CM with noise[:, k] at the k-th of K times."""
    times, stride = [*grid.tolist(), 0.0], noise.shape[1] // len(grid)
    x = noise[:, 0]
    for k, (t, s) in enumerate(zip(times, times[1:])):
        v = velocity(net, x, t, labels, guidance, **layout)
        if solver == "euler" or s == 0:
            x = x - (t - s) * v
        else:
            x = (1 - s) * (x - t * v) + s * noise[:, (k + 1) * stride]
    return x


def by_hand(cfg, stage, net, steps, labels, noise):
    """Clips of a stage: all at once, or chunk by chunk; students with at least --first-steps in the first chunk."""
    causal, student, solver = SAMPLED[stage]
    guidance = 1 if student else cfg.guidance
    grid, first = (schedule(k, cfg.shift) for k in (steps, max(steps, cfg.first_steps) if student else steps))
    if not causal:
        return solve(net, noise, grid, labels, solver, guidance)
    caches, made = [net.new_cache(), net.new_cache()], []
    for i in range(cfg.frames // cfg.chunk):
        own = noise[:, :, i * cfg.chunk : (i + 1) * cfg.chunk]
        made.append(solve(net, own, grid if i else first, labels, solver, guidance, caches=caches))
        for cache, text in zip(caches, (TOY.embed(labels), torch.zeros(len(labels), 2, 16))):
            net.append(cache, made[-1], text)
    return torch.cat(made, dim=1)


@pytest.mark.parametrize("stage, changes", [
    *((stage, {}) for stage in SAMPLED), ("salt", dict(window=2, sink=1)), ("causal_cd", dict(window=2, sink=1)),
    ("causal_cd", dict(chunk=2)), ("salt", dict(first_steps=1)), ("teacher_forcing", dict(chunk=2, guidance=2.5))])
def test_rows_are_what_is_measured_by_hand(finished, stage, changes):
    """Bug: EMA weights in the raw rows; a teacher without its guidance, a student with it; a student's own solver
    exchanged; a window that is not that of training, or one where training had none; a first chunk with too few steps;
    another number of steps, prompts or noise than the row says."""
    cfg = finished(stage, **changes)
    windowed = dict(window=2, sink=1) if changes.get("window") and stage == "salt" else {}
    nets = {"ema": random_net(1, **windowed), "raw": random_net(2, **windowed)}
    labels = TOY.clips(range(CLIPS), 4, EVALUATE, 3, 0)[1]
    noise = draws.noises(range(CLIPS), (8, 4, 3, 10, 10), EVALUATE, 3, 1)
    causal, student, _ = SAMPLED[stage]
    shown = ((1, 2, 4) if causal else (1, 2, 4, 8)) if student else (3, 4, 2, 1)  # a teacher at its full number: 3
    rows = evaluate.evaluate(cfg, stage)
    assert [(r["weights"], r["steps"]) for r in rows] == [
        *(("ema", k) for k in shown), *(("raw", k) for k in (shown if student else shown[:1]))]
    world = toy.speeds_and_turns(TOY.tracks(range(4096), 4, WORLD)[0])
    assert all(torch.equal(a, b) for a, b in zip(toy.true_motion(TOY, 4), world))
    for r in rows:
        x = by_hand(cfg, stage, nets[r["weights"]], r["steps"], labels, noise)
        for name, value in TOY.measure(x, labels).items():
            assert r[name] == pytest.approx(value, rel=2e-3, abs=1e-5), (r["weights"], r["steps"], name)
        assert r["nfe"] == r["steps"] * (1 if student else 2) and r["clips"] == CLIPS and r["eval_seed"] == 3


@pytest.mark.parametrize("stage", SAMPLED)
def test_defect_by_hand(finished, stage):
    """Bug: the defect of other weights, of an unguided teacher, without the clean past where there is one, off the
    4-step path, or with a tm that is not in the middle (Salt Eq. 14-16)."""
    cfg, (causal, student, _) = finished(stage, chunk=2), SAMPLED[stage]
    real, labels = TOY.clips(range(CLIPS), 4, EVALUATE, 3, 0)
    x = draws.noises(range(CLIPS), (8, 4, 3, 10, 10), EVALUATE, 3, 1)[:, 0]
    layout, net = ({"chunk": 2, "clean": real} if causal else {}), random_net(1)
    times, fine, defects = [*schedule(4, 5.0).tolist(), 0.0], schedule(8, 5.0).tolist(), []
    for ts, te in zip(times, times[1:]):
        (tm,) = [t for t in fine if te < t < ts]
        v = velocity(net, x, ts, labels, 1 if student else cfg.guidance, **layout)
        x_tm, direct = x - (ts - tm) * v, x - (ts - te) * v
        composed = x_tm - (tm - te) * velocity(net, x_tm, tm, labels, 1 if student else cfg.guidance, **layout)
        moved = (direct - x).flatten(1).square().sum(1)
        defects.append(((direct - composed).flatten(1).square().sum(1) / moved).mean())
        x = direct
    row = next(r for r in evaluate.evaluate(cfg, stage) if r["weights"] == "ema")
    close(torch.tensor(row["defect"]), torch.stack(defects).mean(), 1e-4)


def test_rows_are_measured_again_when_something_changed_and_only_then(finished, monkeypatch):
    """Bug: the rows of weights that were trained again since, or of other clips or steps; a table that grows, or that
    loses another stage's rows."""
    measured, real = [], evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda *args, **how: (measured.append(args), real(*args, **how))[1])
    cfg, _ = finished("causal_cd"), finished("bidirectional")

    def report(again, stage="causal_cd", **changes):
        measured.clear()
        now = dataclasses.replace(cfg, **changes)
        rows = evaluate.report(now, stage)
        assert bool(measured) == again
        table = json.loads(evaluate.table_path(now).read_text())
        assert [r for r in table if r["stage"] == stage] == json.loads(json.dumps(rows))
        return {r["stage"] for r in table}

    report(True, "bidirectional")
    report(True)
    assert report(False) == {"the world", "bidirectional", "causal_cd"}
    report(True, eval_clips=2)
    report(False, eval_clips=2)
    monkeypatch.setattr(evaluate, "TEACHER_STEPS", 2)
    report(True, eval_clips=2)
    report(True, eval_seed=4)
    path = path_of(cfg, "causal_cd")
    weights, metadata = read_tensors(path)
    write_tensors(path, weights, metadata | {"saved": 2.0})
    report(True, eval_seed=4)


def test_no_clip_prompt_or_noise_of_the_evaluation_is_one_of_training(tmp_path, monkeypatch):
    """Bug: a table on clips that the student has seen, at equal seeds, of any kind of draw."""
    keys, generator = [], draws.generator
    for file in (draws, toy, latent_folder):
        monkeypatch.setattr(file, "generator", lambda *key: (keys.append(key), generator(*key))[1])
    cfg = config(tmp_path, seed=0, eval_seed=0, trajectories=4, trajectory_grid=16, save_every=100)
    evaluate.evaluation_set(cfg, 8)
    toy.true_motion.cache_clear()
    toy.true_motion(TOY, cfg.frames)
    measured, trained = set(keys), set()
    assert len(measured) > 4096
    for stage, how in STAGES.items():
        for before in {start_of(cfg, stage), how.teacher} - {None, ""}:
            if not is_finished(cfg, before):
                train.run_stage(cfg, before)
        keys.clear()
        training = train.begin(cfg, stage)
        for step in range(2):
            training.update(step)
        assert keys
        trained |= set(keys)
    assert not measured & trained


def test_a_stage_is_drawn_with_the_settings_it_was_trained_with(finished, monkeypatch):
    """Bug: numbers of steps of the command for the noise of the run, which has as many as its own largest K; another
    world's drawing."""
    cfg = finished("dmd4", mixed_steps=(4,), mixed_probs=(1.0,))
    drawn = []
    monkeypatch.setattr(evaluate, "draw_clips", lambda cfg, rows, *args, **kwargs: drawn.append((cfg, rows)))
    evaluate.report(dataclasses.replace(cfg, mixed_steps=(2, 4, 8), mixed_probs=(0.2, 0.4, 0.4)), "dmd4")
    assert list(drawn[0][1]) == ["the world", "dmd4 1", "dmd4 2", "dmd4 4"]


def test_a_world_draws_its_own_clips(tmp_path, monkeypatch):
    """Bug: clips of another world drawn as those of the family's."""
    class Grey(type(TOY)):
        def draw(self, x, scale=5):
            return super().draw(x * 0, scale)

    monkeypatch.setitem(WORLDS, "grey", Grey())
    x = TOY.clips(range(2), 3, 5)[0]
    for world in ("grey", "toy"):
        evaluate.draw_clips(config(tmp_path, world=world), {"clips": x}, tmp_path / world)
    grey, colour = (Image.open(tmp_path / f"{world}.png").convert("RGB") for world in ("grey", "toy"))
    assert grey.size == colour.size and grey.tobytes() != colour.tobytes()


def test_weights_of_another_row_are_named(finished):
    """Bug: a row of STAGES that was edited between two runs, whose weights are taken as trained with today's."""
    cfg = finished("mixed_sc")
    train.check_finished(cfg, "mixed_sc")  # an older run has recorded no row
    for row in ({"lambda_align": 0.0}, {"lambda_align": 5.0}):
        for suffix in ("", "_raw"):
            weights, metadata = read_tensors(path_of(cfg, "mixed_sc", suffix))
            write_tensors(path_of(cfg, "mixed_sc", suffix), weights, metadata | {"row": row})
        if row == dict(STAGES["mixed_sc"].settings):
            train.check_finished(cfg, "mixed_sc")
        else:
            with pytest.raises(ValueError, match="lambda_align.: 5.0.*in its row of STAGES.*--out"):
                train.check_finished(cfg, "mixed_sc")
