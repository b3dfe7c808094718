"""Settings of the papers' methods at Wan's size: they are what their sources say, and they reach the updates."""

import dataclasses
import json
import re

import pytest
import torch
from conftest import close
from test_train import config

import train
from cluster.files import write_tensors
from config import PRESET_OF_STAGE, PRESETS, STAGES, Config, check, option, parse, start_of
from flowmap import bell_weight, data_weight, flow_matching_loss, schedule
from model import SIZES
from stage import build, path_of, source_of
from worlds import latent_folder
from worlds.draws import Draw


def parsed(words, **settings):
    """What the command line gives, and settings that have no flag."""
    return dataclasses.replace(parse(f"--size wan1.3b --data random --device cpu {words}".split()), **settings)


# a second reading of the sources: CF's yaml files and scripts, SF's yaml file, CF++ Sec. 4, Salt Sec. B and A.1
TEACHER = dict(teacher_forcing_lr=2e-6, teacher_betas=(0.0, 0.999), teacher_forcing_weight="bell", ema=0.0,
               teacher_forcing_steps=20_000, train_shift=5.0)
CD = dict(trajectory_betas=(0.0, 0.999), trajectory_ema=0.99, guidance=3.0, trajectory_grid=48, trajectory_steps=5000)
ODE = dict(trajectory_betas=(0.9, 0.999), trajectory_ema=0.0, guidance=6.0, trajectories=6000, trajectory_lr=2e-6)
DMD = dict(dmd_lr=2e-6, critic_lr=4e-7, dmd_betas=(0.0, 0.999), critic_steps=5, dmd_ema=0.99, dmd_ema_start=200 // 5,
           score_shift=5.0, score_guidance=1 + 3.0, shift=5.0)
ALL = dict(prompt_dropout=0.0, lr_schedule="constant", ema_ramp=False, clip_norm=10.0, frames=21, height=60, width=104)
SOURCES = {
    "self_forcing": ALL | TEACHER | CD | DMD | dict(chunk=3, rollout_steps=4, dmd_steps=600 // 5, batch=64),
    "causal_forcing": ALL | TEACHER | CD | DMD | dict(chunk=3, rollout_steps=4, batch=64),
    "causal_forcing_pp": ALL | TEACHER | CD | DMD | dict(chunk=1, first_steps=4, dmd_steps=1000 // 5, batch=64),
    "salt": ALL | TEACHER | CD | DMD | dict(chunk=3, mixed_steps=(2, 4, 8), mixed_probs=(0.2, 0.4, 0.4), lambda_sc=0.2,
                                            first_steps=1, align_warmup=600 / 1000, batch=64),
    "sc_dmd": ALL | dict(batch=16, dmd_steps=2400 // 5, shift=12.0, train_grid=8, lambda_sc=0.2),
}


@pytest.mark.parametrize("name", SOURCES)
def test_presets_are_what_the_sources_say(name):
    """Bug: "the papers' settings" with another lr, betas, schedule, EMA, guidance, chunk or warm-up, without a word."""
    assert SOURCES.keys() == PRESETS.keys()
    cfg = parsed(f"--preset {name}")
    check(cfg)
    assert cfg.preset == name
    assert {k: getattr(cfg, k) for k in SOURCES[name]} == SOURCES[name]
    for stage in ("causal_ode", "bidirectional_ode"):  # whatever the preset: CF's Stage 3 starts from either
        cfg = parsed(f"--preset {name} --stage {stage}")
        assert {k: getattr(cfg, k) for k in ODE} == ODE


def test_preset_is_of_the_stage_if_not_given_and_flags_change_it():
    """Bug: Salt's stage with the settings of another method, a flag that a preset overrides, the toy with Wan's."""
    for preset, of in dict(salt="salt mixed_sc naive_sc causal_cd teacher_forcing all", sc_dmd="dmd4 pcm rcm sc_dmd",
                           self_forcing="self_forcing causvid bidirectional_ode", causal_forcing="causal_ode",
                           causal_forcing_pp="causal_forcing_pp causal_dmd").items():
        assert {parsed(f"--stage {stage}").preset for stage in of.split()} == {preset}
    assert PRESET_OF_STAGE.keys() < STAGES.keys() and set(PRESET_OF_STAGE.values()) < PRESETS.keys()
    cfg = parsed("--stage causal_cd --preset causal_forcing_pp --trajectory-lr 3e-6 --mixed-probs 0.5 0.5 0")
    assert (cfg.chunk, cfg.trajectory_lr, cfg.mixed_probs) == (1, 3e-6, (0.5, 0.5, 0.0))
    assert parse([]) == Config() and Config().preset == ""
    for words, expected in (("--size toy --preset salt", "expected none"), ("--size wan1.3b --preset sald", "one of")):
        with pytest.raises(ValueError, match=f"--preset.*{expected}"):
            parse(words.split())
    for name, value in dict(dmd_betas=(0.9,), teacher_betas=(0.0, 1.0), lr_schedule="cosine",
                            teacher_forcing_weight="cosine", dmd_ema_start=-1).items():
        with pytest.raises(ValueError, match=re.escape(option(name))):
            check(Config(device="cpu", **{name: value}))


@pytest.fixture
def wan(monkeypatch, tmp_path):
    """wan(words): a config of --size wan1.3b with a tiny network, and weights of the stages that its stage reads."""
    tiny = dataclasses.replace(SIZES["wan1.3b"], dim=48, ffn_dim=96, num_heads=4, num_layers=2, freq_dim=32,
                               text_dim=12, text_len=6)
    monkeypatch.setitem(SIZES, "wan1.3b", tiny)

    def make(words):
        cfg = parsed(f"--out {tmp_path} --frames 6 --height 4 --width 6 --batch 2 --critic-steps 1 --trajectories 2 "
                     f"--precision fp32 {words}", trajectory_grid=16)
        check(cfg)
        path_of(cfg, cfg.stage).unlink(missing_ok=True)
        for name in {start_of(cfg, cfg.stage), STAGES[cfg.stage].teacher} - {None, ""}:
            metadata = {"stage": name, "size": "wan1.3b", "config": dataclasses.asdict(cfg)}
            net = build(cfg, seed=1)
            torch.nn.init.normal_(net.head.head.weight, std=0.1)  # so that there is something to distil
            write_tensors(path_of(cfg, name), net.state_dict(), metadata)
        return cfg

    return make


@pytest.mark.parametrize("stage, preset, betas, rates", [
    ("teacher_forcing", "causal_forcing_pp", {"net": (0.0, 0.999)}, {"net": 2e-6}),
    ("causal_cd", "causal_forcing_pp", {"net": (0.0, 0.999)}, {"net": 2e-6}),
    ("causal_ode", "causal_forcing", {"net": (0.9, 0.999)}, {"net": 2e-6}),
    ("causal_forcing_pp", "causal_forcing_pp", {"net": (0.0, 0.999), "critic": (0.0, 0.999)},
     {"net": 2e-6, "critic": 4e-7}),
    ("salt", "salt", {"net": (0.0, 0.999), "critic": (0.0, 0.999)}, {"net": 2e-6, "critic": 4e-7}),
    ("sc_dmd", "sc_dmd", {"net": (0.0, 0.999), "critic": (0.0, 0.999)}, {"net": 1e-5, "critic": 1e-5})])
def test_betas_and_a_constant_rate_reach_the_optimizers(wan, stage, preset, betas, rates):
    """Bug: AdamW's betas of the toy, or its warm-up and decay, under Wan's settings."""
    cfg = wan(f"--stage {stage} --preset {preset} --train-longer 0.02")
    training = train.begin(cfg, stage)
    assert {k: o.param_groups[0]["betas"] for k, o in training.optimizers.items()} == betas
    for step in (0, cfg.steps_of(STAGES[stage].group) - 1):
        training.update(step)
        assert {k: o.param_groups[0]["lr"] for k, o in training.optimizers.items()} == rates


@pytest.mark.parametrize("stage, step, kept", [
    ("teacher_forcing", 0, 0.0), ("causal_cd", 0, 0.99), ("causal_ode", 0, 0.0), ("causal_forcing_pp", 0, 0.0),
    ("causal_forcing_pp", 39, 0.0), ("causal_forcing_pp", 40, 0.99)])
def test_averages_of_the_public_code_reach_the_stages(wan, stage, step, kept):
    """Bug: a decay or a start of the average that a preset sets and a stage does not read."""
    cfg = wan(f"--stage {stage} --preset causal_forcing_pp --dmd-lr 1e-3 --trajectory-lr 1e-3 "
              "--teacher-forcing-lr 1e-3")
    training = train.begin(cfg, stage)
    net, ema = training.nets["net"], training.nets["ema"]
    before = {k: v.clone() for k, v in ema.state_dict().items()}
    training.update(step)
    for k, v in ema.state_dict().items():
        assert torch.allclose(v, kept * before[k] + (1 - kept) * net.state_dict()[k], rtol=0, atol=1e-6)
    assert max((v - before[k]).abs().max() for k, v in net.state_dict().items()) > 1e-4


def test_bell_weight_is_that_of_the_public_code(golden):
    """Bug: another weight than CF's training_weight(t), whose mean over the 1,000 times of shift 5 is 1."""
    official = golden("G_scheduler")
    close(bell_weight(official["shift5_1000_sigmas"], 5.0), official["shift5_1000_training_weights"], 1e-5)


def test_bell_weight_by_hand():
    """Bug: noise that teaches, or a weight that changes the size of the loss."""
    w = bell_weight(torch.tensor([1.0, 0.833, 0.5, 0.0]), 5.0)
    assert [round(x, 2) for x in w.tolist()] == [0.0, 1.03, 2.08, 0.0]
    assert bell_weight(schedule(1000, 5.0), 5.0).mean().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("stage, other", [("bidirectional", "teacher_forcing"), ("teacher_forcing", "bidirectional")])
def test_stage_one_weighs_its_loss_by_the_time_of_each_frame(wan, monkeypatch, stage, other):
    """Bug: a weight that is computed and not used, of other frames' times, or the other teacher's."""
    seen, real = [], train.flow_matching_loss
    monkeypatch.setattr(train, "flow_matching_loss", lambda *a, **k: (seen.append(a), real(*a, **k))[1])
    cfg = wan(f"--stage {stage} --preset causal_forcing_pp")
    for name in ("flat", "bell", "data"):
        train.begin(dataclasses.replace(cfg, **{f"{stage}_weight": name, f"{other}_weight": "bell"}), stage).update(0)
    (flat, bell, data), t = (weight for _, _, _, _, _, weight in seen), seen[0][3]
    assert flat is None and len(t.unique()) > 2
    assert torch.equal(bell, bell_weight(t, 5.0)) and torch.equal(data, data_weight(t))

    x0, eps = torch.zeros(2, 3, 1, 2, 2), torch.zeros(2, 3, 1, 2, 2)
    error = torch.arange(6.0).reshape(2, 3)  # of frame j of clip i
    loss, _ = flow_matching_loss(lambda x, t, text: error.sqrt()[:, :, None, None, None].expand_as(x), x0, None,
                                 torch.full((2, 3), 0.5), eps, torch.tensor([[1.0, 0, 0], [0, 0, 2]]))
    assert loss.item() == pytest.approx((0 * 1 + 5 * 2) / 6)


def test_the_critic_weighs_its_loss(wan, monkeypatch):
    """Bug: a weight that is computed and not used, of other clips' times, or the teachers'."""
    seen, real = [], train.critic_loss
    monkeypatch.setattr(train, "critic_loss", lambda *a, **k: (seen.append(a), real(*a, **k))[1])
    cfg = wan("--stage salt --preset causal_forcing_pp")
    for name in ("flat", "data"):
        cfg = dataclasses.replace(cfg, critic_weight=name, bidirectional_weight="bell", critic_steps=1)
        train.begin(cfg, "salt").update(0)
    flat, data = seen[0], seen[-1]
    assert flat[5] is None and torch.equal(data[5], data_weight(data[3]))

    x0 = torch.zeros(2, 3, 1, 2, 2)
    error = torch.tensor([2.0, 5])  # of clip i
    loss, _ = real(lambda x, t, text: error.sqrt()[:, None, None, None, None].expand_as(x), x0, None,
                   torch.full((2, 3), 0.5), x0, torch.tensor([[1.0, 1, 1], [3, 3, 3]]))
    assert loss.item() == pytest.approx((2 * 1 + 5 * 3) / 2)


def test_teacher_of_the_papers_is_named(wan, capsys):
    """Bug: a run with the papers' settings whose teacher is ten times smaller than theirs, without a word."""
    train.main(wan("--stage salt --dmd-steps 1"))
    assert "the papers' is of 14B: --teacher-size wan14b" in capsys.readouterr().out
    for words in ("--stage causal_cd --trajectory-steps 1", "--stage sc_dmd --dmd-steps 1"):  # Salt: non-AR has 1.3B
        train.main(wan(words))
        assert "14B" not in capsys.readouterr().out


def test_weights_of_another_chunk_are_refused(wan, tmp_path):
    """Bug: causal_cd trained under one preset, in chunks of 3, then causal_forcing_pp under another, frame by frame; a
    batch that all stages of a run must share."""
    changed = "--trajectory-steps 1 --trajectories 2 --frames 6 --height 4 --width 6"
    train.main(wan(f"--stage causal_cd {changed}"))
    with pytest.raises(ValueError, match="causal_cd.safetensors, trained in chunks of 3, expected 1.*--preset"):
        train.main(parsed(f"--out {tmp_path} --stage causal_forcing_pp {changed} --batch 4 --dmd-steps 1",
                          trajectory_grid=16))
    with pytest.raises(ValueError, match=r"trajectory_grid \(config.py\) 48, expected 16, with which .*causal_cd"):
        train.main(parsed(f"--out {tmp_path} --stage salt {changed} --dmd-steps 1", trajectory_grid=48))


# -- dropped prompts --------------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    """A folder of clips whose negative prompt is all 9, and a function that adds the empty prompt, all 3."""
    rows = [{"text": torch.full((2, 16), 1.0), "caption": "", "latents": torch.randn(4, 3, 10, 10)} for _ in range(8)]
    data = tmp_path / "data"
    latent_folder.write_shard(data / "0.safetensors", rows)
    latent_folder.write_null(data / "null.safetensors", torch.full((2, 16), 9.0))
    return data, lambda: latent_folder.write_null(data / "empty.safetensors", torch.full((2, 16), 3.0))


def texts(cfg, group, step):
    """What is told of the clips of an update."""
    return Draw(cfg, source_of(cfg), group, step, slice(None)).clips()[1]


@pytest.mark.parametrize("group", ["bidirectional", "teacher_forcing", "trajectory"])
def test_dropped_prompts_are_empty_and_never_the_negative_one(folder, tmp_path, group):
    """Bug: a tenth of real clips labelled with the negative prompt, "overexposed, static, blurry": guidance then leads
    away from nothing."""
    path, write_empty = folder
    cfg = config(tmp_path, data=str(path), batch=64, prompt_dropout=0.5)
    with pytest.raises(ValueError, match="empty.safetensors.*--prompt-dropout 0"):
        texts(cfg, group, 0)
    write_empty()
    text = torch.cat([texts(cfg, group, step) for step in range(2)])
    assert set(text.flatten().tolist()) == {1.0, 3.0}
    assert 40 < (text[:, 0, 0] == 3).sum() < 88
    assert set(source_of(cfg).null_text.flatten().tolist()) == {9.0}  # what guidance leads away from
    undropped = dataclasses.replace(cfg, prompt_dropout=0.0)
    assert set(texts(undropped, group, 0).flatten().tolist()) == {1.0}


def test_no_prompt_is_dropped_at_wans_size_nor_for_students_of_dmd(folder, tmp_path):
    """Bug: what the official code never does; a file asked for that a folder of Wan's need not have."""
    path, _ = folder
    assert all(preset["prompt_dropout"] == 0 for preset in PRESETS.values())
    text = texts(config(tmp_path, data=str(path), prompt_dropout=0.5), "dmd", 0)
    assert set(text.flatten().tolist()) == {1.0}


def test_settings_are_recorded_with_the_preset(wan, tmp_path):
    """Bug: a run whose method cannot be told afterwards."""
    train.main(wan("--stage teacher_forcing --teacher-forcing-steps 1 --preset causal_forcing_pp"))
    assert json.loads((tmp_path / "config.json").read_text())["preset"] == "causal_forcing_pp"
