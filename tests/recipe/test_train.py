"""The recipe in tiny form: every stage, exact resume, the README's commands, bad input, nothing lost."""

import dataclasses
import json
import os
import re
import signal
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, wait_for
from PIL import Image

import evaluate
import sample
import train
import wan21.settings
from cluster import checkpoint
from cluster.files import read_tensors
from config import RECIPE, STAGES, WAN, Config, budget, check, parse
from fast.network import Fast
from flowmap import Condition
from model import SIZES, CausalWan
from stage import build, clip_statistics, ema_decay, optimizer_step, update_ema
from worlds import WORLDS, latent_folder, toy
from worlds.draws import Draw
from worlds.sources import open_source

pytestmark = pytest.mark.usefixtures("small")

TINY = dict(bidirectional_steps=3, teacher_forcing_steps=3, trajectory_steps=3, dmd_steps=5, batch=4, critic_steps=2,
            frames=4, eval_clips=6, align_warmup=0.0, align_prob=1.0, save_every=2, sheet_every=4, device="cpu")
# A stage for every function that trains one. The others are one of these with settings, which test_wiring.py has; of
# theirs, dmd_backward has no stage of its name, and Salt with a single K has no other
FUNCTIONS = [*(stage for stage in STAGES if not STAGES[stage].method), "dmd4_backward", "self_forcing"]
SPEED = ("seconds", "tokens_per_second", "tflops", "mfu", "memory_gb", "bad_samples")


def config(out, **changes):
    return Config(**{**TINY, "out": str(out), **changes})


def state(cfg, stage):
    """The tensors of a stage's newest checkpoint, and its metadata."""
    tensors = checkpoint.state_of(train.begin(cfg, stage))
    path = checkpoint.newest_intact(train.states_of(cfg, stage))
    checkpoint.load(path, tensors)
    return tensors, checkpoint.metadata_of(path)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def logged(out):
    """The lines of metrics.jsonl, without what the clock says."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in SPEED} for line in lines]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tiny_recipe_on_cuda(tmp_path):
    """Bug: a tensor left on the CPU."""
    assert len(train.main(config(tmp_path, device="cuda"))) > 10


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole tiny run, and its rows."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return out, train.main(config(out))


def test_whole_recipe_leaves_what_it_promises(run):
    """Bug: a stage that is not run, not saved, not measured, or not drawn."""
    out, rows = run
    assert {r["stage"] for r in rows} == {"the world", *RECIPE}
    for stage in RECIPE:
        assert {"ema", "raw"} == {r["weights"] for r in rows if r["stage"] == stage}
        assert Image.open(out / f"{stage}.png").size[0] > 100
        assert Image.open(out / f"{stage}.webp").n_frames == 4
        assert read_tensors(out / f"{stage}.safetensors")[1]["stage"] == stage
    assert json.loads((out / "config.json").read_text())["dmd_steps"] == 5
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["stage"] == "salt"] == list(range(5))
    assert lines[-1]["generator_updates"] == 5 and lines[-1]["critic_updates"] == 10
    assert not list(out.glob("*.writing"))


def test_every_stage_changes_what_it_trains(run):
    """Bug: an optimizer built on other parameters than those of the loss; an EMA that is the start, or the raw
    weights."""
    out, before = run[0], build(config(run[0]), seed=0).state_dict()
    for stage in RECIPE:
        raw, ema = (read_tensors(out / f"{stage}{suffix}.safetensors")[0] for suffix in ("_raw", ""))
        assert any(not torch.equal(raw[k], ema[k]) for k in raw)
        assert all(any(not torch.equal(x[k], before[k]) for k in raw) for x in (raw, ema))
        before = ema


def test_stopped_and_resumed_equals_straight(run, tmp_path):
    """Bug: anything not saved (optimizer, EMA, critic, step) or any draw that depends on history. Bit for bit, with
    stops in every stage, one of them right after a save and others between two."""
    out, _ = run
    for _ in range(30):
        if train.main(config(tmp_path, stop_after="3")):
            break
    for stage in RECIPE:
        for suffix in ("", "_raw"):
            a, b = (read_tensors(folder / f"{stage}{suffix}.safetensors")[0] for folder in (out, tmp_path))
            assert equal(a, b), (stage, suffix)
        assert equal(*(state(config(folder), stage)[0] for folder in (out, tmp_path)))
    assert logged(out) == logged(tmp_path)


def test_rollouts_by_fast_train_as_those_of_the_network(run, monkeypatch):
    """Bug: a critic or a reference that learns from other clips on one rank, where fast/ makes them, than on several;
    or fast/ that no longer follows the weights that are trained, or takes them out of the optimizer's reach."""
    cfg, ends, used = config(run[0], dmd_lr=0.01), [], []
    monkeypatch.setattr(Fast, "forward", lambda *args, of=Fast.forward, **layout: used.append(1) or of(*args, **layout))
    for by_fast in (True, False):
        if not by_fast:
            monkeypatch.setattr(train, "for_rollouts", lambda cfg, net: net)
        training, used[:] = train.begin(cfg, "salt"), []
        for step in range(4):
            training.update(step)
        assert bool(used) == by_fast
        ends.append({name: torch.cat([p.detach().flatten() for p in net.parameters()])
                     for name, net in training.nets.items()})
    for name, net in train.begin(cfg, "salt").nets.items():
        moved = (ends[1][name] - torch.cat([p.detach().flatten() for p in net.parameters()])).norm()
        assert (ends[0][name] - ends[1][name]).norm() <= 1e-3 * moved, name


def test_stop_after_a_time(tmp_path):
    """Bug: a budget of 90 minutes taken for 90 updates; a run that overstays it, or that cannot resume from there."""
    assert [budget(x)[0] for x in ("", "200")] == [sys.maxsize, 200]
    for x, seconds in (("90s", 90), ("30m", 1800), ("8h", 28800)):
        assert abs(budget(x)[1] - time.monotonic() - seconds) < 5 and budget(x)[0] == sys.maxsize
    assert train.main(config(tmp_path, stage="bidirectional", bidirectional_steps=10**6, stop_after="1s")) == []
    steps = [line["step"] for line in logged(tmp_path)]
    saved = checkpoint.checkpoints(tmp_path / "bidirectional.state")[-1]
    assert steps == list(range(int(saved.name)))
    with pytest.raises(ValueError, match="--stop-after"):
        check(config(tmp_path, stop_after="soon"))


def test_updates_to_stop_after_are_those_of_all_stages(tmp_path):
    """Bug: a budget of 4 updates that every stage may use up."""
    assert train.main(config(tmp_path, stop_after="4")) == []
    assert [(line["stage"], line["step"]) for line in logged(tmp_path)] == [
        *(("bidirectional", step) for step in range(3)), ("teacher_forcing", 0)]


def test_skipped_updates_are_not_counted_as_made(tmp_path):
    """Bug: generator and critic updates that a NaN has cost, counted as a paper's iterations."""
    cfg = config(tmp_path)
    assert train.counters(cfg, "salt", 9, 3) == {"nonfinite": 3, "generator_updates": 7, "critic_updates": 14}
    assert train.counters(cfg, "causal_cd", 9, 3) == {"nonfinite": 3}


def test_seconds_are_added_up_over_a_resume(tmp_path, monkeypatch):
    """Bug: a cost that forgets what was spent before a stop, counts it twice, or counts the time in between. By a clock
    on which every update takes 10 s and every pause 1,000."""
    clock = [0.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])

    def slow_step(*args, **kwargs):
        clock[0] += 10
        return optimizer_step(*args, **kwargs)

    monkeypatch.setattr("stage.optimizer_step", slow_step)
    for most in (1, 3, 9):
        cfg = config(tmp_path, stage="bidirectional", bidirectional_steps=7, save_every=100)
        train.run_stage(cfg, "bidirectional", most)
        clock[0] += 1000
    assert read_tensors(tmp_path / "bidirectional.safetensors")[1]["seconds"] == 70
    assert evaluate.report(config(tmp_path, stage="bidirectional"), "bidirectional")[0]["train_seconds"] == 70


def test_log_has_what_a_run_is_read_by(run):
    """Bug: a DMD run whose health cannot be seen, or metrics that mean another thing than their names say."""
    out, _ = run
    line = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][-1]
    assert line["generator_updates"] == 5 and line["critic_updates"] == 10 and line["nonfinite"] == 0
    for k in ("grad_norm", "critic_grad_norm", "dmd_grad", "fake_minus_real", "critic_loss", *SPEED):
        assert k in ("mfu", "bad_samples") or line[k] > 0
    assert len(line["critic_by_t"]) == 4 and len(line["chunk_std"]) == len(line["chunk_mean"]) == 4
    heard = [(loss, n) for loss, n in zip(line["critic_by_t"], (1, 1, 1, 1)) if loss is not None]
    assert min(heard)[0] <= line["critic_loss"] <= max(heard)[0]
    assert line["tokens_per_second"] == pytest.approx(4 * 4 * 4 / line["seconds"])  # clips, frames, tokens of a frame
    assert Image.open(out / "salt_sheets" / "000004.png").size[1] == 3 * (10 * 5 + 2 + 4)  # generator, teacher, critic


def test_clip_statistics():
    """Bug: chunks mixed up with clips, or a deviation that depends on how a batch is divided."""
    x = torch.randn(6, 4, 3, 5, 5) * torch.tensor([1.0, 1.0, 3.0, 3.0])[:, None, None, None] + 2
    got = train.readable(clip_statistics(x, 2) | {"critic_t_sum": torch.tensor([4.0, 0, 1, 9]),
                                                        "critic_t_count": torch.tensor([2.0, 0, 1, 3])})
    assert got["critic_by_t"] == [2, None, 1, 3] and len(got["frame_difference"]) == 3
    for i in range(2):
        part = x[:, 2 * i : 2 * i + 2]
        assert got["chunk_mean"][i] == pytest.approx(part.mean().item(), abs=1e-5)
        assert got["chunk_std"][i] == pytest.approx(part.std().item(), rel=1e-2)
    assert got["frame_difference"][1] == pytest.approx((x[:, 2] - x[:, 1]).abs().mean().item(), rel=1e-5)


@pytest.mark.parametrize("stage", ["teacher_forcing", "salt"])
def test_training_from_a_folder(run, tmp_path, stage):
    """Bug: --data that is not read, prompts-only folders refused where no video is needed, or accepted where it is."""
    rows = [{"text": torch.randn(2, 16).mul(8), "caption": "", "latents": torch.randn(4, 3, 10, 10)} for _ in range(6)]
    (tmp_path / "run").mkdir()
    for name in ("bidirectional", "causal_cd"):
        for suffix in ("", "_raw"):
            (tmp_path / "run" / f"{name}{suffix}.safetensors").symlink_to(run[0] / f"{name}{suffix}.safetensors")
    for name in ("video", "prompts"):
        samples = [{k: v for k, v in row.items() if k != "latents" or name == "video"} for row in rows]
        latent_folder.write_shard(tmp_path / name / "0.safetensors", samples)
        for text in ("null", "empty"):
            latent_folder.write_null(tmp_path / name / f"{text}.safetensors", torch.zeros(1, 16))
    if stage == "teacher_forcing":
        with pytest.raises(ValueError, match="video.*--data"):
            train.main(config(tmp_path / "run", stage=stage, data=str(tmp_path / "prompts")))
    folder = tmp_path / ("prompts" if stage == "salt" else "video")
    assert train.main(config(tmp_path / "run", stage=stage, data=str(folder), stop_after="2")) == []
    other = tmp_path / "video" if stage == "salt" else tmp_path / "prompts"
    with pytest.raises(ValueError, match="--data"):
        train.main(config(tmp_path / "run", stage=stage, data=str(other)))
    train.main(config(tmp_path / "run", stage=stage, data=str(folder)))
    assert (tmp_path / "run" / f"{stage}.safetensors").exists() and not list((tmp_path / "run").glob("table*"))


def test_evaluate_measures_a_run_with_its_own_settings(run):
    """Bug: an evaluation that takes its grid or chunk from this command's defaults, or rewrites the run's record of
    itself."""
    out, rows = run
    before = (out / "config.json").read_text()
    again = train.main(Config(out=str(out), stage="evaluate", eval_clips=6, device="cpu"))
    assert [r["render_error"] for r in again] == [r["render_error"] for r in rows]
    other = train.main(Config(out=str(out), stage="evaluate", eval_clips=6, eval_seed=5,
                                    device="cpu"))
    assert [r["render_error"] for r in other] != [r["render_error"] for r in rows]
    assert (out / "config.json").read_text() == before


def test_killed_between_saves_resumes_from_the_last_one(run, tmp_path, monkeypatch):
    """Bug: metrics counted twice, or a state that is ahead of its weights, after a crash in the middle of an update."""
    out, _ = run
    crash = {"at": 4}  # in the fourth update
    def crashing(*args, **kwargs):
        crash["at"] -= 1
        if crash["at"] == 0:
            raise KeyboardInterrupt
        update_ema(*args, **kwargs)

    for stage in list(RECIPE)[:3]:
        for suffix in ("", "_raw"):
            name = f"{stage}{suffix}.safetensors"
            (tmp_path / name).write_bytes((out / name).read_bytes())
    monkeypatch.setattr("stage.update_ema", crashing)
    with pytest.raises(KeyboardInterrupt):
        train.main(config(tmp_path, stage="salt"))
    train.main(config(tmp_path, stage="salt"))
    a, b = (read_tensors(folder / "salt_raw.safetensors")[0] for folder in (out, tmp_path))
    assert all(torch.equal(a[k], b[k]) for k in a)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(5))


def test_ctrl_c_finishes_the_update_and_saves(start, tmp_path):
    """Bug: a traceback and up to --save-every lost updates; a state saved in the middle of an update."""
    flags = [w for k, v in {**TINY, "save_every": 10**6, "bidirectional_steps": 10**6}.items()
             for w in (f"--{k.replace('_', '-')}", str(v))]
    run, log = start(ROOT / "train.py", "--out", tmp_path, *flags), tmp_path / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 3)
    os.kill(run.pid, signal.SIGINT)
    ended = run.ended()
    assert ended.returncode == 0 and "stopped; the same command resumes" in ended.stdout
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    saved = int(checkpoint.checkpoints(tmp_path / "bidirectional.state")[-1].name)
    assert steps == list(range(saved)) and saved > 3


def test_other_seeds_are_other_runs(run, tmp_path):
    """Bug: a seed that is not used."""
    train.main(config(tmp_path, stage="bidirectional", seed=1))
    a, b = (read_tensors(folder / "bidirectional.safetensors")[0] for folder in (run[0], tmp_path))
    assert any(not torch.equal(a[k], b[k]) for k in a)


def averaged(cfg, updates, decay=0.99, start=0):
    """What of its start is left in an average of a network that is 0 from the first update on."""
    ema, net = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    torch.nn.init.ones_(ema.weight), torch.nn.init.zeros_(net.weight)
    for step in range(updates):
        update_ema(ema, net, ema_decay(cfg, decay, step, start))
    return ema.weight.max().item()


def test_ema_forgets_its_start(tmp_path):
    """Bug: a decay of .99 from the first update on: after 80 updates 45 % of such an average are its start."""
    assert averaged(config(tmp_path), 80) < 1e-6
    assert ema_decay(config(tmp_path), 0.99, 10**6) == 0.99  # and has its full decay later on


def test_ema_of_the_public_code(tmp_path):
    """Bug: Wan's presets with the toy's growing decay, which never passes .957 in 200 updates. CF and SF: .99 in every
    update of CD; in DMD a copy until iteration 200, generator update 40, and .99 from there."""
    cfg = config(tmp_path, **{k: WAN[k] for k in ("ema_ramp", "trajectory_ema", "dmd_ema", "dmd_ema_start")})
    assert averaged(cfg, 80, cfg.trajectory_ema) == pytest.approx(0.99**80, rel=1e-4)
    decays = [ema_decay(cfg, cfg.dmd_ema, step, cfg.dmd_ema_start) for step in range(42)]
    assert decays == [0.0] * 40 + [0.99] * 2
    assert averaged(cfg, 1, cfg.dmd_ema, cfg.dmd_ema_start) == 0  # a copy, not the start


def test_evaluation_does_not_depend_on_its_batch(run):
    """Bug: clips that change with how many are measured at once."""
    cfg = config(run[0])
    net = evaluate.network(cfg, "salt")
    _, prompts, noise = evaluate.evaluation_set(cfg, 4)
    whole = evaluate.generate(cfg, "salt", net, 2, prompts, noise)
    half = evaluate.generate(cfg, "salt", net, 2, prompts[2:], noise[2:])
    assert torch.allclose(whole[2:], half, atol=1e-5)


class Numbered(toy.Toy):
    """The toy world that also tells each frame its number and that of the prompt: a label is the prompt's number, then
    those of all frames."""

    def numbered(self, prompts, frames):
        return torch.cat([prompts[:, None], torch.arange(frames).expand(len(prompts), -1)], dim=1)

    def clips(self, indices, frames, *key):
        x, prompts = super().clips(indices, frames, *key)
        return x, self.numbered(prompts, frames)

    def draw_labels(self, n, frames, g):
        return self.numbered(super().draw_labels(n, frames, g), frames)

    def embed(self, labels):
        rows = torch.stack([labels[:, 1:], labels[:, :1].expand_as(labels[:, 1:])], dim=-1)
        return Condition(super().embed(labels[:, 0]), rows.float())

    def measure(self, x, labels):
        return super().measure(x, labels[:, 0])


def test_every_network_is_told_the_rows_of_the_frames_it_sees(tmp_path, monkeypatch):
    """Bug: a stage, a guided teacher, a rollout or the table that drops what is told of every frame, tells it to
    another frame or clip, or loses it where the words are replaced by the empty prompt."""
    world, calls = Numbered(), []
    monkeypatch.setitem(WORLDS, "toy", world)
    monkeypatch.setitem(SIZES, "toy", dataclasses.replace(SIZES["toy"], row_dim=2))
    word_table = toy.Toy().embed(torch.arange(len(toy.PROMPTS))).flatten(1)

    def watched(forward, net, x, t, text, **layout):
        cache, before = layout.get("cache"), 0
        if cache is not None and layout.get("clean") is not None:
            before = layout["clean"].shape[1]
        first = 0 if cache is None else cache.next_frame
        told = text.words.flatten(1).any(1)
        prompt = (text.words.flatten(1) @ word_table.T).argmax(1)
        assert text.rows.shape == (len(x), before + x.shape[1], 2)
        assert (text.rows[:, :, 0] == torch.arange(first, first + before + x.shape[1])).all()
        assert (text.rows[told, :, 1] == prompt[told, None]).all()
        assert (text.rows[:, :, 1] == text.rows[:, :1, 1]).all()
        calls.append(told.all().item())
        return forward(net, x, t, text, **layout)

    for cls in (CausalWan, Fast):
        monkeypatch.setattr(cls, "forward", lambda *args, of=cls.forward, **layout: watched(of, *args, **layout))
    open_source.cache_clear()  # it holds the world of before
    try:
        cfg = config(tmp_path, bidirectional_steps=2, teacher_forcing_steps=2, trajectory_steps=2, dmd_steps=2,
                     critic_steps=1, eval_clips=2, prompt_dropout=0.5, score_guidance=2.0, mixed_steps=(2, 4),
                     mixed_probs=(0.5, 0.5), trajectories=2, trajectory_grid=16)
        assert train.main(cfg)
        assert True in calls and False in calls  # clips with words and without
        for stage in STAGES:
            if stage not in RECIPE:
                calls.clear()
                init = "causal_cd" if STAGES[stage].causal else ""
                train.begin(dataclasses.replace(cfg, init=init), stage).update(0)
                assert calls, stage
    finally:
        open_source.cache_clear()


# -- the README's commands --------------------------------------------------------------------------------------------

def test_sample_command(python, run, tmp_path):
    """Bug: the second command; 64 frames from a model trained on 4; steps, seed or solver that change nothing."""
    out, images = run[0], []
    for i, words in enumerate([(), ("--seed", 1), ("--steps", 4), ("--solver", "euler"), ("--chunk", 2)]):
        path = tmp_path / f"{i}.webp"
        ran = python(ROOT / "sample.py", "--weights", out / "salt.safetensors", "--prompt", "red ball",
                      "--frames", 64, "--out", path, *words)
        assert ran.returncode == 0, ran.stderr
        with Image.open(path) as image:
            assert image.n_frames > 1
            images.append(path.read_bytes())
    assert len(set(images)) == len(images)
    assert "warning" in ran.stderr and "chunk" in ran.stderr


def test_sample_the_toy_in_every_way(run, tmp_path):
    """Bug: what is tested on Wan's files alone fails on a checkpoint of train.py: whole clips of the bidirectional
    model, another prompt on the way, a first picture, continuing a clip, a file per clip."""
    def sampled(*words, stage="salt"):
        return sample.main(sample.parse(["--weights", str(run[0] / f"{stage}.safetensors"), *map(str, words)]))

    ball, switched, longer, whole = (tmp_path / f"{name}.safetensors" for name in "abcd")
    red = ("--prompt", "red ball")
    sampled(*red, "--frames", 6, "--out", ball)
    sampled(*red, "--at", 4, "blue bar", "--frames", 6, "--out", switched)
    sampled(*red, "--frames", 2, "--continue", ball, "--out", longer)
    sampled(*red, "--out", whole, "--steps", 8, stage="bidirectional")
    latents = {path: latent_folder.read_shard(path)[0]["latents"] for path in (ball, switched, longer, whole)}
    assert torch.equal(latents[switched][:4], latents[ball][:4])
    assert (latents[switched][4:] - latents[ball][4:]).abs().amax((1, 2, 3)).min() > 1e-3
    assert torch.equal(latents[longer][:6], latents[ball]) and len(latents[longer]) == 8
    assert len(latents[whole]) == 4  # as many as it was trained on

    folder = sampled("--frames", 2, "--out", tmp_path / "clips", "--format", "png", "--batch", 5)
    assert len(folder) == 12 and all(len(list(path.glob("*.png"))) == 2 for path in folder)
    sampled(*red, "--frames", 2, "--image", folder[0] / "00000.png", "--out", tmp_path / "from.safetensors")
    first = latent_folder.read_shard(tmp_path / "from.safetensors")[0]["latents"][0]
    with Image.open(folder[0] / "00000.png") as picture:
        shown = torch.from_numpy(np.asarray(picture.resize((10, 10), Image.Resampling.LANCZOS)).copy())
    assert (toy.to_rgb(first) - shown.permute(2, 0, 1) / 255).abs().max() < 0.01


def test_sample_finds_the_newest_student(run, tmp_path, monkeypatch):
    """Bug: a default checkpoint that is not there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wan21.settings, "SHIPPED", [tmp_path / "none.safetensors"])
    with pytest.raises(ValueError, match="train.py"):
        sample.newest_student()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(run[0])
    assert sample.newest_student().name == "salt.safetensors"


def test_help_explains_every_flag(python):
    """Bug: a setting that nobody can find."""
    ran = python(ROOT / "train.py", "--help")
    for f in (f for f in dataclasses.fields(Config) if f.metadata["help"]):
        assert re.search(rf"--{f.name.replace('_', '-')}[ ,\n]", ran.stdout), f.name
        assert f.metadata["help"].split()[0] in ran.stdout


# -- bad input --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, message", [
    (dict(size="huge"), "--size"), (dict(stage="dmdd"), "--stage"), (dict(frames=5, chunk=2), "--chunk"),
    (dict(mixed_steps=(2, 4)), "--mixed-probs"), (dict(mixed_steps=(2, 3, 8)), "--mixed-steps"),
    (dict(dmd_steps=0), "--dmd-steps"), (dict(train_longer=0.0), "--train-longer"),
    (dict(first_steps=0), "--first-steps"), (dict(critic_steps=0), "--critic-steps"), (dict(seed=-1), "--seed"),
    (dict(dmd_ema=1.0), "dmd.ema"), (dict(world="flat"), "--world"), (dict(stage="evaluate"), "--out")])
def test_bad_settings_are_named(tmp_path, changes, message):
    """Bug: a setting that fails an hour later, deep inside, or after something was written."""
    with pytest.raises(ValueError, match=message):
        train.main(config(tmp_path / "new", **changes))
    assert not (tmp_path / "new").exists()


def test_unknown_flag(python):
    """Bug: a mistyped flag that is ignored."""
    ran = python(ROOT / "train.py", "--dmd-stepz", 3)
    assert ran.returncode != 0 and "--dmd-stepz" in ran.stderr


def test_checkpoints_missing_truncated_or_of_another_stage(python, run, tmp_path):
    """Bug: a pickle error or a silent restart in place of a message; a damaged file that is overwritten."""
    with pytest.raises(ValueError, match="--stage teacher_forcing"):
        train.main(config(tmp_path, stage="causal_cd"))
    whole = (run[0] / "bidirectional.safetensors").read_bytes()
    (tmp_path / "teacher_forcing.safetensors").write_bytes(whole)
    with pytest.raises(ValueError, match="got .* of stage bidirectional.*expected stage teacher_forcing"):
        train.main(config(tmp_path, stage="causal_cd"))
    (tmp_path / "bidirectional.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="bidirectional_raw"):
        train.main(config(tmp_path))
    (tmp_path / "bidirectional_raw.safetensors").write_bytes(whole)
    with pytest.raises(ValueError, match="damaged or truncated.*bidirectional"):
        train.main(config(tmp_path))
    assert (tmp_path / "bidirectional.safetensors").read_bytes() == whole[:-100]
    ran = python(ROOT / "sample.py", "--weights", tmp_path / "none.safetensors")
    assert ran.returncode == 1 and ran.stderr.startswith("ValueError: got no file") and "--weights" in ran.stderr
    for words in (("--frames", 7, "--chunk", 2), ("--window", 1), ("--prompt", "red fox"), ("--steps", 0)):
        ran = python(ROOT / "sample.py", "--weights", run[0] / "salt.safetensors", *words)
        assert ran.returncode == 1 and ran.stderr.splitlines()[-1].startswith("ValueError: ") and words[0] in ran.stderr


def test_wrong_data_is_found_before_a_model_is_built(tmp_path, monkeypatch):
    """Bug: half a minute and 19 GB for the news that the folder of --data is not there."""
    monkeypatch.setattr("stage.build", None)
    with pytest.raises(ValueError, match="--data"):
        train.main(config(tmp_path, stage="bidirectional", data=str(tmp_path / "nowhere")))


def test_half_trained_stage_refuses_other_settings(tmp_path):
    """Bug: a run that resumes with another seed or learning rate and calls it the same."""
    train.main(config(tmp_path, stage="bidirectional", stop_after="2"))
    with pytest.raises(ValueError, match="--bidirectional-lr"):
        train.main(config(tmp_path, stage="bidirectional", bidirectional_lr=1.0))
    train.main(config(tmp_path, stage="bidirectional", dmd_steps=9, lambda_sc=0.1))  # a later stage's does not matter
    with pytest.raises(ValueError, match="--seed"):  # nor is a finished stage taken for another run's
        train.main(config(tmp_path, stage="bidirectional", seed=3))
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0


def test_non_finite_loss_stops_and_loses_nothing(tmp_path, monkeypatch):
    """Bug: a NaN that is trained on, or that overwrites the last good state."""
    train.main(config(tmp_path, stage="bidirectional", stop_after="2"))
    before, _ = state(config(tmp_path), "bidirectional")
    clips = Draw.clips
    monkeypatch.setattr(Draw, "clips", lambda *args: (clips(*args)[0] * float("nan"), clips(*args)[1]))
    with pytest.raises(ValueError, match="step 2.*non-finite.*--bidirectional-lr"):
        train.main(config(tmp_path, stage="bidirectional"))
    assert equal(before, state(config(tmp_path), "bidirectional")[0])


def test_settings_for_wan_run_through_every_stage(tmp_path, monkeypatch):
    """Bug: what only Wan's settings meet, 16 channels, chunks of 3, bf16, recomputing, guided scores, no toy world to
    measure in, and fails on the first day of a cluster's week. The network is tiny, all else is --size wan1.3b."""
    tiny = dataclasses.replace(SIZES["wan1.3b"], dim=48, ffn_dim=96, num_heads=4, num_layers=2, freq_dim=32,
                               text_dim=12, text_len=6)
    monkeypatch.setitem(SIZES, "wan1.3b", tiny)
    cfg = parse(f"--size wan1.3b --data random --out {tmp_path} --device cpu --frames 6 --height 4 --width 6 "
                      "--batch 2 --accum 2 --bidirectional-steps 2 --teacher-forcing-steps 2 --trajectory-steps 2 "
                      "--dmd-steps 2 --critic-steps 1 --sheet-every 1 --align-warmup 0".split())
    assert (cfg.chunk, cfg.precision, cfg.checkpointing, cfg.score_guidance) == (3, "bf16", True, 4.0)
    assert train.main(cfg) == []
    for stage in RECIPE:
        weights, metadata = read_tensors(tmp_path / f"{stage}.safetensors")
        assert metadata["size"] == "wan1.3b" and all(v.dtype == torch.float32 for v in weights.values())
    assert len(list((tmp_path / "salt_sheets").glob("*.png"))) == 2
