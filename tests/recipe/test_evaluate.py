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
from findings import pixels
from flowmap import schedule
from model import SIZES, CausalWan
from stage import is_finished, path_of
from worlds import WORLDS, draws, latent_folder, toy
from worlds.draws import EVALUATE, WORLD

pytestmark = pytest.mark.usefixtures("small")

TOY = WORLDS["toy"]
CLIPS = 3
SAMPLED = {  # stage: (causal, student, solver)
    "bidirectional": (False, False, "euler"), "teacher_forcing": (True, False, "euler"),
    "causal_cd": (True, True, "cm"), "salt": (True, True, "cm"), "dmd4": (False, True, "cm"),
    "scfm": (False, True, "euler"), "pcm": (False, True, "euler"), "causal_ode": (True, True, "cm")}


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


def noise_by_hand():
    """Of evaluation seed 3, for 16 steps: that of 8 steps, and between every two of them one of another draw."""
    noise = torch.empty(CLIPS, 16, 4, 3, 10, 10)
    for of in (1, 2):
        noise[:, of - 1 :: 2] = draws.noises(range(CLIPS), (8, 4, 3, 10, 10), EVALUATE, 3, of)
    return noise


def by_hand(cfg, stage, net, steps, labels, noise, solver):
    """Clips of a stage: all at once, or chunk by chunk; students with at least --first-steps in the first chunk."""
    causal, student, _ = SAMPLED[stage]
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
    another number of steps, solver, prompts or noise than the row says; a noise of 8 steps that 16 steps changed."""
    cfg = finished(stage, **changes)
    windowed = dict(window=2, sink=1) if changes.get("window") and stage == "salt" else {}
    nets = {"ema": random_net(1, **windowed), "raw": random_net(2, **windowed)}
    labels, noise = TOY.clips(range(CLIPS), 4, EVALUATE, 3, 0)[1], noise_by_hand()
    causal, student, own = SAMPLED[stage]
    raw = ((1, 2, 4) if causal else (1, 2, 4, 8)) if student else (3,)  # a teacher at its full number: 3
    ema = {own: (raw if causal else (*raw, 16)) if student else (3, 4, 2, 1)}
    if student and not causal:
        ema |= {"euler" if own == "cm" else "cm": (2, 4, 8, 16)}
    rows = evaluate.evaluate(cfg, stage)
    assert [(r["weights"], r["solver"], r["steps"]) for r in rows] == [
        *(("ema", solver, k) for solver, shown in ema.items() for k in shown), *(("raw", own, k) for k in raw)]
    world = toy.speeds_and_turns(TOY.tracks(range(4096), 4, WORLD)[0])
    assert all(torch.equal(a, b) for a, b in zip(toy.true_motion(TOY, 4), world))
    for r in rows:
        x = by_hand(cfg, stage, nets[r["weights"]], r["steps"], labels, noise, r["solver"])
        for name, value in TOY.measure(x, labels).items():
            assert r[name] == pytest.approx(value, rel=2e-3, abs=1e-5), (r["weights"], r["steps"], name)
        assert r["nfe"] == r["steps"] * (1 if student else 2) and r["clips"] == CLIPS and r["eval_seed"] == 3


@pytest.mark.parametrize("stage", ["bidirectional", "teacher_forcing", "causal_cd"])
@torch.no_grad()
def test_given_frames_are_continued(finished, stage):
    """Bug: given frames that are changed, noised or not seen; a whole clip that is told another time of them than 0."""
    cfg, net, (causal, student, solver) = finished(stage), random_net(1), SAMPLED[stage]
    real, labels = TOY.clips(range(CLIPS), 4, EVALUATE, 3, 0)
    noise, given, grid = noise_by_hand(), real[:, :2], schedule(2, cfg.shift)
    guidance = 1 if student else cfg.guidance
    got = evaluate.generate(cfg, stage, net, 2, labels, noise, given=given)
    if causal:
        caches, want = [net.new_cache(), net.new_cache()], [given]
        texts = TOY.embed(labels), torch.zeros(len(labels), 2, 16)
        for i in range(4):
            if i > 1:
                want.append(solve(net, noise[:, :, i : i + 1], grid, labels, solver, guidance, caches=caches))
            for cache, text in zip(caches, texts):
                net.append(cache, given[:, i : i + 1] if i < 2 else want[-1], text)
        close(got, torch.cat(want, 1), 1e-4)
        return
    x, text = noise[:, 0], TOY.embed(labels)
    for t, s in ((grid[0].item(), grid[1].item()), (grid[1].item(), 0.0)):
        x, times = torch.cat([given, x[:, 2:]], 1), torch.tensor([0.0, 0, t, t]).expand(CLIPS, 4)
        cond, uncond = net(x, times, text), net(x, times, torch.zeros_like(text))
        x = x - (t - s) * (uncond + guidance * (cond - uncond))
    close(got, torch.cat([given, x[:, 2:]], 1), 1e-4)


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


@pytest.mark.parametrize("solver", ["euler", "cm"])
def test_nested_grids_get_the_same_noise(finished, monkeypatch, solver):
    """Bug: a sampler of 16 steps that adds other noise at a time than one of 8 or 2 steps does there: their clips would
    differ, whatever the student."""
    cfg, added = finished("dmd4"), {}
    _, labels, noise = evaluate.evaluation_set(cfg, CLIPS)

    def watched(velocity, noise, grid, how):
        assert how == solver
        added[len(grid)] = {round(t, 4): noise[:, k] for k, t in enumerate(grid.tolist())}
        return noise[:, 0]

    monkeypatch.setattr(evaluate, "sample", watched)
    for steps in (1, 2, 4, 8, 16):
        evaluate.generate(cfg, "dmd4", random_net(1), steps, labels, noise, solver)
        assert len(added[steps]) == steps
        assert all(torch.equal(x, added[steps][t]) for fewer in added.values() for t, x in fewer.items())
    assert len(torch.stack([*added[16].values()]).flatten(1)[:, :8].unique(dim=0)) == 16


def test_agreement_is_0_where_steps_compose(finished, monkeypatch):
    """Bug: clips of different noises, weights or solvers that are compared; an agreement that is no root of a mean
    square, or in other units; numbers that the raw weights or the wrong pair of numbers of steps have got."""
    cfg = finished("dmd4")
    real, labels, noise = evaluate.evaluation_set(cfg, CLIPS)

    def straight(net, x, t, text, **layout):  # from any noise to the real clip, along a line: Euler steps compose
        return (x - real) / t[..., None, None, None] if isinstance(t, torch.Tensor) else (x - real) / t

    with monkeypatch.context() as patch:
        patch.setattr(CausalWan, "forward", straight)
        ema = [r for r in evaluate.evaluate(cfg, "dmd4") if r["weights"] == "ema"]
    pairs = {"2-4", "4-8", "2-8", "2-16", "4-16", "8-16"}
    for solver in ("euler", "cm"):
        of = [r["agreement"] for r in ema if r["solver"] == solver]
        assert set().union(*of) == pairs and all(x < 1e-5 for some in of for x in some.values()), solver

    rows = evaluate.evaluate(cfg, "dmd4")
    clips = {(solver, k): by_hand(cfg, "dmd4", random_net(1), k, labels, noise, solver)
             for solver in ("euler", "cm") for k in (2, 4, 8)}
    for r in rows:
        assert ("agreement" in r) == (r["weights"] == "ema")
        assert ("by_level" in r) == ((r["weights"], r["steps"]) == ("ema", 1))
        for pair, value in r.get("agreement", {}).items():
            few, many = map(int, pair.split("-"))
            assert many == r["steps"]
            if many < 16:
                apart = clips[r["solver"], few] - clips[r["solver"], many]
                assert value == pytest.approx((apart.square().mean().sqrt() / real.std()).item(), rel=1e-3)


def test_one_jump_by_level_by_hand(finished):
    """Bug: a jump from a time, or from noise, that is not that of the input; real clips or the noise itself measured in
    place of what the student makes; levels out of order."""
    cfg = finished("pcm")
    real, labels, noise = evaluate.evaluation_set(cfg, CLIPS)
    levels = next(r["by_level"] for r in evaluate.evaluate(cfg, "pcm") if "by_level" in r)
    assert levels["t"] == schedule(16, 5.0).tolist()
    for t, brightness, contrast in zip(*(levels[name] for name in ("t", "brightness", "contrast"))):
        x_t = (1 - t) * real + t * noise[:, 0]
        made = TOY.measure(x_t - t * velocity(random_net(1), x_t, t, labels, 1), labels)
        assert (brightness, contrast) == pytest.approx((made["brightness"], made["contrast"]), rel=1e-3, abs=1e-5)


def test_brightness_and_contrast_of_the_world_and_of_a_spoilt_one():
    """Bug: a spread between frames, clips or channels in place of that within a frame; a world that is compared with
    another one, or a metric that does not see light."""
    x, labels = TOY.clips(range(512), 4, 9)
    real, spoilt = TOY.measure(x, labels), TOY.measure(1.3 * x + 0.1, labels)
    assert abs(real["brightness"]) < 0.03 and real["contrast"] == pytest.approx(1, abs=0.03)
    assert spoilt["contrast"] == pytest.approx(1.3 * real["contrast"], rel=1e-4)
    mean = TOY.clips(range(4096), 4, WORLD)[0].mean().item()
    assert spoilt["brightness"] == pytest.approx(1.3 * (mean + real["brightness"]) + 0.1 - mean, abs=1e-4)
    flat = x.mean((2, 3, 4), keepdim=True).expand_as(x)
    assert TOY.light(flat)["contrast"] < 1e-4
    assert TOY.light(flat)["brightness"] == pytest.approx(real["brightness"], abs=1e-4)


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


def test_the_table_of_an_older_version_is_measured_again(finished, capsys):
    """Bug: KeyError for a column that the table of an older version lacks, or such rows that stay in the table."""
    cfg = finished("dmd4")
    rows = evaluate.report(cfg, "dmd4")
    path = evaluate.table_path(cfg)
    older = [{k: v for k, v in r.items() if k not in ("solver", "brightness", "contrast", "agreement", "by_level")}
             for r in json.loads(path.read_text())]
    path.write_text(json.dumps(older))
    again = evaluate.report(cfg, "dmd4")
    assert [r["render_error"] for r in again] == [r["render_error"] for r in rows]
    table = json.loads(path.read_text())
    assert len(table) == len(rows) + 1 and all(evaluate.printable_row(cfg, r) for r in table)
    evaluate.report_all(cfg, again)
    printed = capsys.readouterr().out
    assert "dmd4: jump from t" in printed and max(map(len, printed.splitlines())) <= 140


def test_pixels_trains_measures_and_resumes(tmp_path, monkeypatch):
    """Bug: a finding of the toy world that trains a finished stage or a shared teacher again, reads another seed's or
    guidance's run, raw weights or another solver, or that has no number for a seed."""
    trained, real = [], train.begin
    monkeypatch.setattr(train, "begin", lambda cfg, stage: (trained.append((stage, cfg.seed, cfg.score_guidance)),
                                                            real(cfg, stage))[1])
    monkeypatch.setattr(pixels, "ROOT", tmp_path)
    (plain, guided), seeds = pixels.cells(fast=True), [1, 2]
    rows = [r for cell in (plain, guided) for r in pixels.measure(cell, seeds, fast=True)]
    assert trained == [("bidirectional", 1, 1), ("dmd4", 1, 1), ("bidirectional", 2, 1), ("dmd4", 2, 1),
                       ("sc_dmd", 1, 3), ("sc_dmd", 2, 3)]
    assert pixels.measure(guided, seeds, fast=True) == rows[len(rows) // 2 :] and len(trained) == 6
    assert {r["quantity"] for r in rows} == pixels.QUANTITIES.keys() and all(len(r["measured"]) == 2 for r in rows)
    lines = [(r["stage"], r.get("solver"), r["quantity"], r[pixels.ACROSS[r["quantity"]]]) for r in rows]
    assert len(set(lines)) == len(lines) and all(name in r for r in rows if "steps" in r for name in pixels.PANELS)
    assert all((stage, None, "jump_contrast", 1.0) in lines for stage in ("dmd4", "sc_dmd"))
    assert all((stage, solver, "render_error", k) in lines for stage, solver in (
        ("dmd4", "cm"), ("dmd4", "euler"), ("sc_dmd", "cm"), ("sc_dmd", "euler")) for k in (1, 2, 4, 8, 16))

    def of_seed(seed):
        table = json.loads((tmp_path / "fast" / f"seed{seed}_w3" / "table_seed1.json").read_text())
        return {(r["solver"], r["steps"]): r for r in table if r["weights"] == "ema"}

    kept = of_seed(2)
    for r in rows:
        if r["stage"] == "sc_dmd" and r["quantity"] == "contrast" and r["steps"] > 1:
            assert r["measured"][1] == kept[r["solver"], r["steps"]]["contrast"]
    error = sum(kept["euler", 4]["render_error"] for kept in (of_seed(1), of_seed(2))) / 2
    assert f"| 3 | euler |  |  | {error:.4f}, " in pixels.summary(rows)  # nothing of dmd4 and dmd8 at guidance 3
    cells = [(cell["stage"], cell["score_guidance"]) for cell in pixels.cells(fast=False)]
    assert len(set(cells)) == 8 and all(stage in STAGES for stage, _ in cells)


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
    assert list(drawn[0][1]) == ["the world", "dmd4 1", "dmd4 2", "dmd4 4", "dmd4 8"]


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
