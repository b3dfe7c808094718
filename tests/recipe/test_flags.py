"""Every flag changes what it should: of train.py here, in test_wiring.py, which gives most of them a value of its own
and finds it where it belongs, and where ELSEWHERE says; of sample.py where SAMPLING says."""

import dataclasses
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_train import config
from test_wiring import SETTINGS, TABLE, Watch, home  # noqa: F401 (a fixture)

import evaluate
import model
import sample
import train
from cluster import checkpoint, fsdp, ranks
from cluster.files import read_tensors
from config import CHOICES, Config, groups_behind, same_settings
from worlds.draws import GROUPS
from model import SIZES, CausalWan
from stage import build_teacher, load_finished
from tools import plan
from worlds import WORLDS, draws
from worlds.toy import Toy

ELSEWHERE = {  # flag of train.py -> the test that sees what it changes
    "preset": "test_presets.py::test_preset_is_of_the_stage_if_not_given_and_flags_change_it",
    "stage": "test_baselines.py::test_every_baseline_trains_samples_and_resumes",
    "seed": "test_wiring.py::test_every_draw_depends_on_the_seed",
    "device": "test_train.py::test_tiny_recipe_on_cuda", "train_longer": "test_wiring.py::test_learning_rates",
    "keep": "test_faults.py::test_keep", "stop_after": "test_train.py::test_stop_after_a_time",
    "skip_nonfinite": "test_faults.py::test_nan_is_named_and_may_be_skipped",
    "data": "test_train.py::test_training_from_a_folder", "bad_data": "test_faults.py::test_damaged_sample",
    "shard_group_size": "test_ranks.py::test_copies_of_shards_and_gathering_once_change_nothing",
    "check_ranks": "test_faults.py::test_rank_that_runs_another_forward",
    "timeout": "test_faults.py::test_stalled_rank",
    "teacher_size": "test_ranks.py::test_teacher_of_another_size",
    "teacher_out": "test_ranks.py::test_teacher_of_another_size",
    "init": "test_baselines.py::test_stage_three_starts_where_its_paper_does_and_rolls_out",
    "mixed_steps": "test_wiring.py::test_the_critic_meets_all_that_the_generator_makes",
    "row_dropout": "test_data.py::test_dropped_rows_are_zeros_and_words_stay",
    "critic_weight": "test_presets.py::test_the_critic_weighs_its_loss",
    "bidirectional_weight": "test_presets.py::test_stage_one_weighs_its_loss_by_the_time_of_each_frame",
    "eval_clips": "test_evaluate.py::test_rows_are_what_is_measured_by_hand",
    "eval_seed": "test_evaluate.py::test_rows_are_what_is_measured_by_hand",
}
SAMPLING = {  # the same of sample.py, all in test_sample.py, but for what is said
    "weights": "test_whole_clips_of_wans_own_weights", "part": "test_flags_of_files_and_devices",
    "size": "test_whole_clips_of_wans_own_weights", "prompt": "test_a_public_student_goes_chunk_by_chunk",
    "prompts": "test_a_sample_depends_on_its_seed_and_prompt_alone",
    "prompt_embeds": "test_prompt_embeds_need_no_text_encoder",
    "at": "test_another_prompt_on_the_way_in_a_sliding_window",
    "image": "test_image_to_video_and_going_on", "clip": "test_image_to_video_and_going_on",
    "samples": "test_a_sample_depends_on_its_seed_and_prompt_alone", "out": "test_a_public_student_goes_chunk_by_chunk",
    "format": "test_a_public_student_goes_chunk_by_chunk", "vbench": "test_vbench_names_and_going_on_after_a_stop",
    "wan": "test_flags_of_files_and_devices", "preview": "test_a_public_student_goes_chunk_by_chunk",
    "device": "test_flags_of_files_and_devices", "text_device": "test_flags_of_files_and_devices",
    "precision": "test_flags_of_files_and_devices", "compile": "test_flags_of_files_and_devices",
    "attention": "test_flags_of_files_and_devices",
    "batch": "test_a_sample_depends_on_its_seed_and_prompt_alone",
    "keep": "test_trajectory.py::test_what_the_window_keeps",
    "trajectory": "test_trajectory.py::test_every_frame_is_made_under_its_own_camera",
} | dict.fromkeys(("negative_prompt", "seed", "frames", "height", "width", "steps", "first_steps", "chunk", "window",
                   "sink", "positions", "solver", "shift", "guidance"), "test_flags_of_a_rollout_do_what_they_say")
TESTS = {path.name: path.read_text() for path in (ROOT / "tests").glob("*/test_*.py")}


def test_every_flag_has_its_test():
    """Bug: a new flag that nothing but its parsing is tested of."""
    here = "_and_".join(re.findall(r"^def test_([a-z_]+)", TESTS["test_flags.py"], re.M)).split("_and_")
    settings = {f.name for f in dataclasses.fields(Config)}
    others = {"gpu_memory", "every_flag_has_its_test", "what_shapes_weights_is_recorded_as_doing_so",
              "constants_that_were_flags_are_those_of_old_runs"}
    tested = {*SETTINGS, *ELSEWHERE, *here} - others
    assert tested <= settings
    if untested := sorted(settings - tested):
        warnings.warn(f"nothing is tested of the settings {untested}: give each a value in test_wiring.py's SETTINGS, "
                      "a test here, or a row in ELSEWHERE", stacklevel=1)
    assert set(SAMPLING) == set(vars(sample.parse([])))
    of_sampling = (name if "::" in name else f"test_sample.py::{name}" for name in SAMPLING.values())
    for test in [*ELSEWHERE.values(), *of_sampling]:
        name, function = test.split("::")
        assert f"def {function}(" in TESTS[name], test


@pytest.fixture
def bidirectional(tmp_path):
    """bidirectional(**settings): train that stage in seven updates, as the command does; returns --out."""
    def run(**changes):
        changes = {"size": "toy_tiny", "save_every": 100, "sheet_every": 100, "bidirectional_steps": 7} | changes
        cfg = config(changes.pop("out", tmp_path), stage="bidirectional", **changes)
        Path(cfg.out).mkdir(exist_ok=True)
        with ranks.setup(cfg.device, cfg.precision, cfg.shard_group_size, cfg.timeout):
            train.run_stage(cfg, "bidirectional")
        return tmp_path
    return run


@pytest.fixture(autouse=True)
def toy_tiny(monkeypatch):
    """One more size, so that --size is read, and small."""
    monkeypatch.setitem(SIZES, "toy_tiny", dataclasses.replace(SIZES["toy"], dim=16, ffn_dim=16, num_layers=2))


def test_out_and_size(bidirectional, tmp_path):
    """Bug: a run that is somewhere else, or another network than asked for."""
    bidirectional(out=tmp_path / "there")
    weights, metadata = read_tensors(tmp_path / "there" / "bidirectional.safetensors")
    assert metadata["size"] == "toy_tiny" and weights["head.head.weight"].shape == (75, 16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


@pytest.mark.parametrize("every, saved", [(100, [7]), (3, [3, 6, 7]), (7, [7])])
def test_save_every(bidirectional, monkeypatch, every, saved):
    steps, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda folder, step, *rest, **how: (steps.append(step),
                                                                                save(folder, step, *rest, **how))[1])
    bidirectional(save_every=every)
    assert steps == saved


def test_sheet_every(tmp_path, monkeypatch):
    """Of a DMD stage alone, whose clips are worth looking at."""
    drawn, begin = [], train.begin
    monkeypatch.setattr(evaluate, "draw_clips", lambda cfg, rows, path: drawn.append((path.parent.name, path.name,
                                                                                      rows)))

    def with_images(*args, **kwargs):
        training = begin(*args, **kwargs)
        training.images.update(generator=torch.zeros(9, 4, 3, 10, 10))
        return training

    monkeypatch.setattr(train, "begin", with_images)
    train.run_stage(config(tmp_path, bidirectional_steps=7, sheet_every=3), "bidirectional")
    assert [(folder, name) for folder, name, _ in drawn] == [("bidirectional_sheets", f"{k:06d}") for k in (3, 6)]
    assert all(len(rows["generator"]) == 4 for _, _, rows in drawn)


@pytest.mark.parametrize("accum", [1, 2, 4])
def test_accum(bidirectional, monkeypatch, accum):
    slices, clips = [], draws.Draw.clips
    monkeypatch.setattr(draws.Draw, "clips", lambda draw: (slices.append((draw.step, draw.batch_slice)),
                                                           clips(draw))[1])
    bidirectional(accum=accum)
    size = 4 // accum
    assert slices == [(step, slice(i, i + size)) for step in range(7) for i in range(0, 4, size)]


def test_world(tmp_path, monkeypatch):
    """Bug: clips of another world than the one asked for, in training or in the table; a run that changes its world on
    the way."""
    slow, trained, loss = Toy(speed=0.5), [], train.flow_matching_loss
    monkeypatch.setitem(WORLDS, "slow", slow)
    monkeypatch.setitem(CHOICES, "world", ("slow", *CHOICES["world"]))
    monkeypatch.setattr(train, "flow_matching_loss", lambda net, x0, *args, **how: (trained.append(x0),
                                                                                    loss(net, x0, *args, **how))[1])
    cfg = config(tmp_path, stage="bidirectional", size="toy_tiny", world="slow", bidirectional_steps=1)
    rows = train.main(cfg)
    assert torch.equal(trained[0], slow.clips(range(4), 4, draws.CLIPS, 0, 0)[0])
    real, labels = slow.clips(range(6), 4, draws.EVALUATE, 0, 0)
    assert rows[0]["motion"] == pytest.approx(slow.measure(real, labels)["motion"]) and rows[0]["motion"] < 1.3
    assert Toy().measure(real, labels)["motion"] < 0.5 < rows[0]["motion"]
    assert all(r["motion_w1"] != 0 for r in rows)
    with pytest.raises(ValueError, match="--world toy, expected slow"):
        train.main(dataclasses.replace(cfg, world="toy"))


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision(bidirectional, monkeypatch, precision, dtype):
    """In which attention computes, and that a frozen teacher is stored in; what is trained is stored in fp32."""
    seen, attention = set(), model.attention
    monkeypatch.setattr(model, "attention", lambda q, k, v, **how: (
        seen.update((q.dtype, k.dtype, v.dtype)), attention(q, k, v, **how))[1])
    out = bidirectional(precision=precision)
    assert seen == {dtype}
    assert {v.dtype for v in read_tensors(out / "bidirectional_raw.safetensors")[0].values()} == {torch.float32}
    cfg = config(out, size="toy_tiny", precision=precision)
    assert build_teacher(cfg, load_finished(cfg, "bidirectional")).head.head.weight.dtype is dtype


def test_checkpointing_and_compile(bidirectional, monkeypatch):
    """Bug: a flag that does what the other should, or nothing."""
    done = []
    monkeypatch.setattr(model, "checkpoint", lambda block, *args, **how: (done.append("checkpoint"), block(*args))[1])
    monkeypatch.setattr(CausalWan, "compile_blocks", lambda net: done.append("compile"))
    out = bidirectional()
    assert not done
    for path in out.glob("*.safetensors"):
        path.unlink()
    for path in (out / "bidirectional.state").iterdir():
        shutil.rmtree(path)
    bidirectional(checkpointing=True, compile=True)
    assert (done.count("checkpoint"), done.count("compile")) == (7 * 2, 2)  # 7 updates, 2 blocks; the net, its average


@pytest.mark.parametrize("reshard", [True, False])
def test_reshard_after_forward(bidirectional, monkeypatch, reshard):
    seen, real = set(), fsdp.fully_shard

    def fully_shard(module, **how):
        seen.add(how["reshard_after_forward"])
        return real(module, **how)

    monkeypatch.setattr(fsdp, "fully_shard", fully_shard)
    bidirectional(reshard_after_forward=reshard, precision="bf16")  # one rank in fp32 is not sharded
    assert seen == {reshard}


def test_gpu_memory():
    """Bug: a plan for cards of another size."""
    gpus = []
    for gb in (0.01, 0.02, 0.1):
        plan_of = plan.parse(f"--stage bidirectional --device cpu --gpu-memory {gb}".split())
        gpus.append(int(list(plan.table(*plan_of))[-1].split("|")[1].split(",")[0]))
    assert gpus[0] > gpus[1] > gpus[2] == 1


OTHER = dict(  # another value of every setting that shapes weights, and of some that do not
    frames=4, height=10, width=10, chunk=3, batch=8, clip_norm=1e-6, train_shift=3.0, shift=5.0, score_shift=2.0,
    guidance=2.0, score_guidance=2.0, prompt_dropout=0.9, bidirectional_lr=2e-3, teacher_forcing_lr=1e-3,
    trajectory_lr=1e-3, dmd_lr=1e-3, critic_lr=1e-3, teacher_betas=(0.2, 0.9), trajectory_betas=(0.1, 0.9),
    dmd_betas=(0.1, 0.9), ema=0.9, trajectory_ema=0.9, dmd_ema=0.9, dmd_ema_start=0, ema_ramp=True,
    lr_schedule="constant", bidirectional_steps=4, teacher_forcing_steps=4, trajectory_steps=4, dmd_steps=4,
    critic_steps=3, trajectory_grid=32, train_grid=8, rollout_steps=2,
    first_steps=4, mixed_steps=(4, 8, 16), mixed_probs=(0.9, 0.1, 0.0), teacher_forcing_weight="flat", window=4, sink=2,
    lambda_sc=0.9, lambda_align=0.9, align_warmup=1.0, align_prob=0.1, sc_through="both", seed=5, train_longer=0.05,
    init="causal_ode", save_every=7, keep=9, sheet_every=3, stop_after="9", checkpointing=True, eval_seed=3)
WITH_STUB = ("bidirectional", "teacher_forcing", "causal_cd", "salt")
OF_ONE = {"train_grid": "sc_dmd_gan", "rollout_steps": "self_forcing"}  # stages that read these alone


def shaped(home, out, stage, **changes):  # noqa: F811
    """What a stage has become after four updates."""
    out.mkdir(parents=True)
    for path in home.out.glob("*.safetensors"):
        (out / path.name).symlink_to(path)
    w = Watch(home, stage, range(4), out=str(out), **changes)
    nets = w.training.nets
    return ([v for net in nets.values() for v in net.state_dict().values()],
            [getattr(net, "config", None) for net in nets.values()], w.cfg)


@pytest.fixture(scope="module")
def base(home, tmp_path_factory):  # noqa: F811
    return {stage: shaped(home, tmp_path_factory.mktemp("base") / stage, stage)
            for stage in {*WITH_STUB, *OF_ONE.values()}}


@pytest.mark.parametrize("flag", OTHER)
def test_what_shapes_weights_is_recorded_as_doing_so(home, base, tmp_path, flag):  # noqa: F811
    """Bug: a flag that may be changed in the middle of a run, or that another's weights are taken for one's own with;
    one that is refused although it changes nothing."""
    affects, changed = set(Config.__dataclass_fields__[flag].metadata["group"].split()), set()
    if affects == {"each"}:
        affects = set(GROUPS)
    for stage in (*WITH_STUB, *([OF_ONE[flag]] if flag in OF_ONE else ())):
        if flag == "init" and TABLE[stage].group != "dmd":
            continue
        try:
            now = shaped(home, tmp_path / stage, stage, **{flag: OTHER[flag]})
        except ValueError:  # other clips than those of the folder, other chunks than the weights': certainly
            assert flag in ("frames", "height", "width", "chunk")
            changed |= groups_behind(base[stage][2], stage)
            continue
        same_weights = all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(now[0], base[stage][0]))
        if not same_weights or now[1] != base[stage][1]:
            changed.add(TABLE[stage].group)
            assert affects & groups_behind(now[2], stage), stage
    assert {group for group in affects if group != "none"} <= changed


@pytest.mark.parametrize("name, value, other, stage", [
    ("phases", 4, 2, "pcm"), ("shortcut_grid", 32, 16, "scfm"), ("shortcut_grid", 32, 16, "dmd4_scfm"),
    ("align_margin", 0.1, 0.0, "salt"), ("align_features", "teacher", "critic", "salt"),
    ("align_depth", 0.5, 1.0, "salt"), ("lambda_gan", 0.03, 0.1, "sc_dmd_gan"), ("lambda_scfm", 1.0, 0.5, "dmd4_scfm"),
    ("lambda_rcm", 1.0, 0.5, "rcm")])
def test_constants_that_were_flags_are_those_of_old_runs(name, value, other, stage):
    """Bug: a run of an older version, with another value of what is a constant now, that resumes with today's."""
    cfg, then = Config(stage=stage), dataclasses.asdict(Config(stage=stage))
    same_settings(cfg, stage, "old", then | {name: value})
    with pytest.raises(ValueError, match=f"{name} {other}"):
        same_settings(cfg, stage, "old", then | {name: other})
    same_settings(cfg, "teacher_forcing", "old", then | {name: other})  # which does not read it
