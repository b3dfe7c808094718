"""Every flag changes what it should: of train.py here, in test_wiring.py, which gives most of them a value of its own
and finds it where it belongs, and where ELSEWHERE says; of sample.py where SAMPLING says."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_train import config
from test_wiring import SETTINGS, TABLE, Watch, home  # noqa: F401 (a fixture)

import data
import fsdp
import model
import plan
import sample
import stages
import train
from files import read_tensors
from model import SIZES, CausalWan

ELSEWHERE = {  # flag of train.py -> the test that sees what it changes
    "preset": "test_presets.py::test_preset_is_of_the_stage_if_not_given_and_flags_change_it",
    "stage": "test_baselines.py::test_every_baseline_trains_samples_and_resumes",
    "seed": "test_wiring.py::test_every_draw_depends_on_the_seed",
    "device": "test_train.py::test_tiny_recipe_on_cuda", "longer": "test_wiring.py::test_learning_rates",
    "keep": "test_faults.py::test_keep", "stop_after": "test_train.py::test_stop_after_a_time",
    "skip_nonfinite": "test_faults.py::test_nan_is_named_and_may_be_left_out",
    "data": "test_train.py::test_training_from_a_folder", "bad_data": "test_faults.py::test_damaged_sample",
    "shard_over": "test_ranks.py::test_copies_of_shards_and_gathering_once_change_nothing",
    "check_ranks": "test_faults.py::test_rank_that_runs_another_forward",
    "timeout": "test_faults.py::test_stalled_rank",
    "plan": "test_plan.py::test_plan_of_14b_fits_on_no_gpu_and_allocates_nothing",
    "teacher_size": "test_ranks.py::test_teacher_of_another_size",
    "teacher_out": "test_ranks.py::test_teacher_of_another_size",
    "init": "test_baselines.py::test_stage_three_starts_where_its_paper_does_and_rolls_out",
    "mixed_steps": "test_wiring.py::test_the_critic_meets_all_that_the_generator_makes",
    "align_features": "test_wiring.py::test_features_of_alignment_may_be_the_critics",
    "eval_clips": "test_evaluate.py::test_rows_are_what_is_measured_by_hand",
    "eval_seed": "test_evaluate.py::test_rows_are_what_is_measured_by_hand",
    "teacher_eval_steps": "test_evaluate.py::test_rows_are_what_is_measured_by_hand",
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
    "batch": "test_a_sample_depends_on_its_seed_and_prompt_alone",
} | dict.fromkeys(("negative_prompt", "seed", "frames", "height", "width", "steps", "first_steps", "chunk", "window",
                   "sink", "positions", "solver", "shift", "guidance"), "test_flags_of_a_rollout_do_what_they_say")
TESTS = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}


def test_every_flag_has_its_test():
    """Bug: a new flag that nothing but its parsing is tested of."""
    here = "_and_".join(re.findall(r"^def test_([a-z_]+)", TESTS["test_flags.py"], re.M)).split("_and_")
    flags = {f.name for f in dataclasses.fields(train.Config)}
    others = {"every_flag_has_its_test", "what_shapes_weights_is_recorded_as_doing_so"}
    assert {*SETTINGS, *ELSEWHERE, *here} - others == flags
    assert set(SAMPLING) == set(vars(sample.parse([])))
    for test in [*ELSEWHERE.values(), *(f"test_sample.py::{name}" for name in SAMPLING.values())]:
        name, function = test.split("::")
        assert f"def {function}(" in TESTS[name], test


@pytest.fixture
def bidirectional(tmp_path):
    """bidirectional(**settings): train that stage in seven updates, as the command does; returns --out."""
    def run(**changes):
        changes = {"size": "toy_tiny", "save_every": 100, "sheet_every": 100, "bidirectional_steps": 7} | changes
        cfg = config(changes.pop("out", tmp_path), stage="bidirectional", **changes)
        Path(cfg.out).mkdir(exist_ok=True)
        with fsdp.setup(cfg.device, cfg.precision, cfg.shard_over, cfg.timeout):
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
    weights, about = read_tensors(tmp_path / "there" / "bidirectional.safetensors")
    assert about["size"] == "toy_tiny" and weights["head.head.weight"].shape == (75, 16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


@pytest.mark.parametrize("every, saved", [(100, [7]), (3, [3, 6, 7]), (7, [7])])
def test_save_every(bidirectional, monkeypatch, every, saved):
    steps, save = [], fsdp.save
    monkeypatch.setattr(fsdp, "save", lambda folder, step, *rest: (steps.append(step), save(folder, step, *rest))[1])
    bidirectional(save_every=every)
    assert steps == saved


def test_sheet_every(tmp_path, monkeypatch):
    """Of a DMD stage alone, whose clips are worth looking at."""
    pictures = {"generator": torch.zeros(9, 4, 3, 10, 10)}
    drawn = []
    monkeypatch.setattr(data, "sheet", lambda rows, path: drawn.append((path.parent.name, path.name, rows)))
    begin = train.STAGES["bidirectional"].begin

    def with_pictures(cfg, start):
        training = begin(cfg, start)
        training.pictures.update(pictures)
        return training

    monkeypatch.setattr(train.STAGES["bidirectional"], "begin", with_pictures)
    train.run_stage(config(tmp_path, bidirectional_steps=7, sheet_every=3), "bidirectional")
    assert [(folder, name) for folder, name, _ in drawn] == [("bidirectional_sheets", f"{k:06d}") for k in (3, 6)]
    assert all(len(rows["generator"]) == 4 for _, _, rows in drawn)


@pytest.mark.parametrize("accum", [1, 2, 4])
def test_accum(bidirectional, monkeypatch, accum):
    parts, batch = [], stages.batch
    monkeypatch.setattr(stages, "batch", lambda cfg, kind, step, part: (parts.append((step, part)),
                                                                       batch(cfg, kind, step, part))[1])
    bidirectional(accum=accum)
    size = 4 // accum
    assert parts == [(step, slice(i, i + size)) for step in range(7) for i in range(0, 4, size)]


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision(bidirectional, monkeypatch, precision, dtype):
    """In which attention computes, and that a frozen teacher is stored in; what is trained is stored in fp32."""
    seen, attention = set(), model.attention
    monkeypatch.setattr(model, "attention", lambda q, k, v: (seen.update((q.dtype, k.dtype, v.dtype)),
                                                            attention(q, k, v))[1])
    out = bidirectional(precision=precision)
    assert seen == {dtype}
    assert {v.dtype for v in read_tensors(out / "bidirectional_raw.safetensors")[0].values()} == {torch.float32}
    cfg = config(out, size="toy_tiny", precision=precision)
    assert stages.build_teacher(cfg, stages.finished(cfg, "bidirectional")).head.head.weight.dtype is dtype


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


@pytest.mark.parametrize("gather, reshard", [("forward", True), ("update", False)])
def test_gather(bidirectional, monkeypatch, gather, reshard):
    seen, real = set(), fsdp.fully_shard

    def fully_shard(module, **how):
        seen.add(how["reshard_after_forward"])
        return real(module, **how)

    monkeypatch.setattr(fsdp, "fully_shard", fully_shard)
    bidirectional(gather=gather, precision="bf16")  # one rank in fp32 is not sharded
    assert seen == {reshard}


def test_gpu_memory():
    """Bug: a plan for cards of another size."""
    gpus = []
    for gb in (0.01, 0.02, 0.1):
        cfg = train.parse(f"--stage bidirectional --plan --device cpu --gpu-memory {gb}".split())
        gpus.append(int(list(plan.table(cfg))[-1].split("|")[1].split(",")[0]))
    assert gpus[0] > gpus[1] > gpus[2] == 1


OTHER = dict(  # another value of every flag that shapes weights, and of some that do not
    frames=4, height=10, width=10, chunk=3, batch=8, clip_norm=1e-6, train_shift=3.0, shift=5.0, score_shift=2.0,
    guidance=2.0, score_guidance=2.0, prompt_dropout=0.9, bidirectional_lr=2e-3, teacher_forcing_lr=1e-3,
    trajectory_lr=1e-3, dmd_lr=1e-3, critic_lr=1e-3, teacher_betas=(0.2, 0.9), trajectory_betas=(0.1, 0.9),
    dmd_betas=(0.1, 0.9), ema=0.9, trajectory_ema=0.9, dmd_ema=0.9, dmd_ema_start=0, ema_ramp=True,
    lr_schedule="constant", bidirectional_steps=4, teacher_forcing_steps=4, trajectory_steps=4, dmd_steps=4,
    critic_steps=3, trajectory_grid=24, phases=4, shortcut_grid=16, train_grid=8, rollout_steps=2,
    first_steps=4, mixed_steps=(1, 2, 4), mixed_probs=(0.9, 0.1, 0.0), teacher_forcing_weight="flat", window=4, sink=2,
    lambda_sc=0.9, lambda_align=0.9, lambda_gan=0.9, lambda_scfm=0.9, lambda_rcm=0.9, align_warmup=1.0, align_prob=0.1,
    align_margin=0.0, align_depth=0.5, align_features="critic", sc_through="both", seed=5, longer=0.05,
    init="causal_ode", save_every=7, keep=9, sheet_every=3, stop_after="9", checkpointing=True, eval_seed=3)
WITH_STUB = ("bidirectional", "teacher_forcing", "causal_cd", "salt")
OF_ONE = {"phases": "pcm", "shortcut_grid": "dmd4_scfm", "train_grid": "sc_dmd_gan", "lambda_gan": "sc_dmd_gan",
          "lambda_scfm": "dmd4_scfm", "lambda_rcm": "rcm", "rollout_steps": "self_forcing"}  # stages read these alone


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
            for stage in {*WITH_STUB, *OF_ONE.values(), "scfm"}}


@pytest.mark.parametrize("flag", OTHER)
def test_what_shapes_weights_is_recorded_as_doing_so(home, base, tmp_path, flag):  # noqa: F811
    """Bug: a flag that may be changed in the middle of a run, or that another's weights are taken for one's own with;
    one that is refused although it changes nothing."""
    affects, changed = set(train.Config.__dataclass_fields__[flag].metadata["affects"].split()), set()
    if affects == {"each"}:
        affects = set(stages.KINDS)
    for stage in (*WITH_STUB, *([OF_ONE[flag]] if flag in OF_ONE else ()), *(["scfm"] * (flag == "shortcut_grid"))):
        if flag == "init" and TABLE[stage].kind != "dmd":
            continue
        try:
            now = shaped(home, tmp_path / stage, stage, **{flag: OTHER[flag]})
        except ValueError:  # clips of another size: certainly
            changed |= train.kinds_behind(base[stage][2], stage)
            continue
        same_weights = all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(now[0], base[stage][0]))
        if not same_weights or now[1] != base[stage][1]:
            changed.add(TABLE[stage].kind)
            assert affects & train.kinds_behind(now[2], stage), stage
    assert {kind for kind in affects if kind != "none"} <= changed
