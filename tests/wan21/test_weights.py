"""Weight files: every public layout in and out bit by bit, diffusers' own network as the judge, damage, and memory."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, close
from safetensors.torch import load_file, save_file

import config
import stage
import train
import wan21.weights
from cameras import row_of
from cluster import files
from cluster.files import read_tensors
from flowmap import Condition
from model import SIZES, WanConfig
from tools import convert

MODEL = "diffusion_pytorch_model.safetensors"
TINY = WanConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=2, in_dim=3, freq_dim=16, text_dim=5, text_len=3)


def random_weights(config=TINY, seed=0, dtype=torch.float32):
    """Every tensor random and none of them zero, by Wan's names."""
    g = torch.Generator().manual_seed(seed)
    shapes = wan21.weights.shapes(config)
    return {k: (0.3 * torch.randn(shape, generator=g) + 0.1).to(dtype) for k, shape in shapes.items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.fixture(scope="module")
def transformer():
    """Diffusers' class."""
    return pytest.importorskip("diffusers").WanTransformer3DModel


@pytest.fixture
def tiny_wan(monkeypatch):
    """--size wan1.3b is a tiny network."""
    tiny = dataclasses.replace(SIZES["wan1.3b"], dim=48, ffn_dim=96, num_heads=4, num_layers=2, freq_dim=32,
                               text_dim=12, text_len=6)
    monkeypatch.setitem(SIZES, "wan1.3b", tiny)
    return tiny


# -- layouts ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shard", [10e9, 20e3], ids=["single", "sharded"])
def test_round_trip_is_bit_exact(tmp_path, shard):
    """Bug: a tensor under another's name, dropped between two shards, cast, or taken from a layout by mistake; a path
    that is not understood."""
    weights = random_weights(dtype=torch.bfloat16)
    weights["blocks.1.norm3.bias"] = weights["blocks.1.norm3.bias"].float()  # dtypes are each tensor's own
    official, diffusers, own = tmp_path / "official", tmp_path / "diffusers", tmp_path / "own"
    wan21.weights.write_official(official, weights, TINY, shard)
    wan21.weights.write_diffusers(diffusers, wan21.weights.read_weights(official)[0], TINY, shard)
    wan21.weights.write_own(own, wan21.weights.read_weights(diffusers)[0], {"stage": "bidirectional", "saved": 1.5})
    file = MODEL if shard > 1e6 else MODEL + ".index.json"
    for layout, paths in {"official": [official, official / file],
                          "diffusers": [diffusers, diffusers / "transformer", diffusers / "transformer" / file],
                          "own": [own / "bidirectional.safetensors", own / "bidirectional_raw.safetensors"]}.items():
        for path in paths:
            got, about = wan21.weights.read_weights(path)
            assert equal(got, weights)
            assert about == ({"stage": "bidirectional", "saved": 1.5, "layout": "own"} if layout == "own" else
                             {"layout": layout, "part": ""})
    if shard < 1e6:
        files = sorted(official.glob("*.safetensors"))
        assert files[0].name == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors" and len(files) == 3
        index = json.loads((official / file).read_text())
        assert index["metadata"]["total_size"] == sum(w.nbytes for w in weights.values())
        for f in files:
            assert sum(w.nbytes for w in load_file(f).values()) <= shard
            assert equal(wan21.weights.read_weights(f)[0], weights)  # a shard stands for its folder
    assert json.loads((official / "config.json").read_text()) == {
        "_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 24, "eps": 1e-06, "ffn_dim": 48,
        "freq_dim": 16, "in_dim": 3, "model_type": "t2v", "num_heads": 2, "num_layers": 2, "out_dim": 3, "text_len": 3}


def configured(folder):
    config = json.loads((folder / "transformer" / "config.json").read_text())
    return {k: v for k, v in config.items() if not k.startswith("_")}


def prediction(net, x, t, text):
    """Of diffusers' network as CausalWan's: x `b f c h w`, t `b f`, a timestep for every token."""
    per_token = (1000 * t).repeat_interleave(x.shape[3] * x.shape[4] // 4, 1)
    return net(x.transpose(1, 2), per_token, text, return_dict=False)[0].transpose(1, 2)


@torch.no_grad()
def test_diffusers_predicts_what_we_predict(tmp_path, transformer):
    """Bug: norms that trade places the wrong way, shift as scale, q as k, another order of time or text layers: names
    that go there and back unharmed and mean something else."""
    torch.manual_seed(0)
    wan21.weights.write_diffusers(tmp_path, random_weights(), TINY)
    ours, _ = wan21.weights.load(TINY, tmp_path)
    theirs = transformer.from_pretrained(tmp_path, subfolder="transformer")
    assert set(theirs.state_dict()) == set(load_file(tmp_path / "transformer" / MODEL))  # else it drew some at random
    x, t, text = torch.randn(2, 4, 3, 4, 6), torch.rand(2, 4), torch.randn(2, 3, 5)
    close(prediction(theirs, x, t, text), ours(x, t, text))
    t = t[:, :1].expand(2, 4)
    close(theirs(x.transpose(1, 2), 1000 * t[:, 0], text).sample.transpose(1, 2), ours(x, t, text))


@torch.no_grad()
def test_we_predict_what_diffusers_predicts(tmp_path, transformer):
    """Bug: files that only our own writer makes can be read: diffusers shards by other rules, and keeps some tensors in
    float32 beside bfloat16."""
    torch.manual_seed(0)
    wan21.weights.write_diffusers(tmp_path / "config", random_weights(), TINY)
    theirs = transformer(**configured(tmp_path / "config"))
    for p in theirs.parameters():
        p.normal_(0.1, 0.3)
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="30KB")
    assert (tmp_path / "transformer" / f"{MODEL}.index.json").is_file()
    ours, about = wan21.weights.load(TINY, tmp_path)
    assert about == {"layout": "diffusers", "part": ""}
    x, t, text = torch.randn(2, 4, 3, 4, 6), torch.rand(2, 4), torch.randn(2, 3, 5)
    close(ours(x, t, text), prediction(theirs, x, t, text))

    mixed = transformer.from_pretrained(tmp_path, subfolder="transformer", torch_dtype=torch.bfloat16)
    mixed.save_pretrained(tmp_path / "mixed")
    ours, _ = wan21.weights.load(TINY, tmp_path / "mixed", dtype=torch.bfloat16)
    read = wan21.weights.read_weights(tmp_path / "mixed")[0]
    assert equal(ours.state_dict(), {k: w.bfloat16() for k, w in read.items()})
    assert ours(x, t, text).isfinite().all()


def prefixed(weights, prefix, below=""):
    """Names as FSDP, torch.compile and checkpointing leave them: a prefix, and something in the middle."""
    return {prefix + k.replace(".self_attn", f".{below}self_attn"): v for k, v in weights.items()}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_public_checkpoints(tmp_path, old):
    """Bug: raw weights where there are averaged ones; a wrapper's prefix left in a name, at its start or its middle; a
    file from before zips; nothing but the keys the author thought of."""
    raw, ema = random_weights(seed=1), random_weights(seed=2)
    cases = {
        "generator_ema": {"generator": prefixed(raw, "model."), "critic": raw, "step": 3, "generator_ema": prefixed(
            ema, "model._fsdp_wrapped_module.", "_checkpoint_wrapped_module._orig_mod.")},
        "generator": {"generator": prefixed(ema, "model._orig_mod."), "model": raw},
        "model": {"model": prefixed(ema, "module."), "state_dict": raw},
        "state_dict": {"state_dict": prefixed(ema, "generator.model."), "epoch": 1},
        "": prefixed(ema, "model.diffusion_model."),
    }
    for part, held in cases.items():
        path = tmp_path / f"{part or 'flat'}.pt"
        torch.save(held, path, _use_new_zipfile_serialization=not old)
        got, about = wan21.weights.read_weights(path)
        assert equal(got, ema) and about == {"layout": "pt", "part": part}
    for part in ("generator", "critic"):
        got, about = wan21.weights.read_weights(tmp_path / "generator_ema.pt", part)
        assert equal(got, raw) and about["part"] == part
    with pytest.raises(ValueError, match="generator, critic, .*, expected target: change --part"):
        wan21.weights.read_weights(tmp_path / "generator_ema.pt", "target")
    with pytest.raises(ValueError, match="with step, expected a generator"):
        torch.save({"step": 3}, tmp_path / "none.pt")
        wan21.weights.read_weights(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="two tensors for patch_embedding"):
        torch.save(ema | prefixed(raw, "module."), tmp_path / "two.pt")
        wan21.weights.read_weights(tmp_path / "two.pt")
    save_file(prefixed(ema, "model.diffusion_model."), tmp_path / "any_name.safetensors")
    assert equal(wan21.weights.read_weights(tmp_path / "any_name.safetensors")[0], ema)
    with pytest.raises(ValueError, match="--part critic"):
        wan21.weights.read_weights(tmp_path / "any_name.safetensors", "critic")


class Malice:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, old):
    """Bug: weights_only=False, by design or as a fallback: a download takes over the machine."""
    path, mark = tmp_path / "evil.pt", tmp_path / "mark"
    torch.save({"generator": random_weights(), "args": Malice(mark)}, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match="evil.pt.*pickled code.*state dict"):
        wan21.weights.read_weights(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Malice(mark)))
    assert mark.exists()  # it would have


# -- damage -----------------------------------------------------------------------------------------------------------

def test_damaged_files_are_named(tmp_path):
    """Bug: half a download that loads, or that raises what nobody can read."""
    weights = random_weights()
    wan21.weights.write_official(tmp_path / "single", weights, TINY)
    wan21.weights.write_official(tmp_path / "many", weights, TINY, 20e3)
    torch.save(weights, tmp_path / "zip.pt")
    torch.save(weights, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    shard = sorted((tmp_path / "many").glob("*.safetensors"))[1]
    for file, source in {tmp_path / "single" / MODEL: tmp_path / "single", shard: tmp_path / "many",
                         tmp_path / "many" / f"{MODEL}.index.json": tmp_path / "many",
                         tmp_path / "zip.pt": tmp_path / "zip.pt", tmp_path / "legacy.pt": tmp_path / "legacy.pt"
                         }.items():
        whole = file.read_bytes()
        for n in (0, 3, 100, len(whole) // 2, len(whole) - 5):
            file.write_bytes(whole[:n])
            with pytest.raises(ValueError, match=f"{file}.*(damaged|truncated).*|damaged.*{file}.*(again|trust)"):
                wan21.weights.read_weights(source)
        file.unlink()
        with pytest.raises(ValueError, match=f"got.*{source}.*expected.*(change|download)"):
            wan21.weights.read_weights(source)
        file.write_bytes(whole)
        assert equal(wan21.weights.read_weights(source)[0], weights)
    held = load_file(shard)
    save_file({k: v for k, v in held.items() if k != min(held)}, shard)
    with pytest.raises(ValueError, match=f"{shard} without {min(held)}"):
        wan21.weights.read_weights(tmp_path / "many")
    with pytest.raises(ValueError, match="nowhere.*expected"):
        wan21.weights.read_weights(tmp_path / "nowhere")


def test_what_does_not_fit_is_listed(tmp_path, tiny_wan):
    """Bug: an i2v or another size's file that is loaded in part; a message of a thousand names, or without what to do.
    """
    def refused(weights):
        save_file(weights, tmp_path / MODEL)
        with pytest.raises(ValueError, match="^got .*do not fit") as e:
            wan21.weights.load(TINY, tmp_path)
        return str(e.value)

    weights = random_weights()
    short = {k: v for k, v in weights.items() if not k.startswith("blocks.1.")}
    said = refused(short | {"head.modulation": torch.zeros(1, 3, 24), "extra": torch.zeros(1)})
    assert f"{len(weights) - len(short) + 2} tensors do not fit" in said and said.count("got none") == 4
    assert "blocks.1.cross_attn.k.bias: got none, expected (24,), " in said and "--size" in said
    assert "(extra: got (1,), expected none ...)" in refused(weights | {"extra": torch.zeros(1)})
    assert "k_img" in refused(weights | {"blocks.0.cross_attn.k_img.weight": torch.zeros(24, 24)})
    assert "expected (24, 3, 1, 2, 2)" in refused(weights | {"patch_embedding.weight": torch.zeros(24, 8, 1, 2, 2)})
    assert "change --size to wan1.3b" in refused(random_weights(tiny_wan))


@pytest.mark.parametrize("shard", [10e9, 20e3], ids=["single", "sharded"])
def test_a_failed_write_loses_nothing(tmp_path, monkeypatch, shard):
    """Bug: weights written over others, or a folder that looks complete and is not, after a full disk."""
    old, new = random_weights(seed=1), random_weights(seed=2)
    for name in ("official", "diffusers"):
        write, folder = getattr(wan21.weights, f"write_{name}"), tmp_path / name
        write(folder, old, TINY, shard)
        with pytest.raises(ValueError, match="exists already.*change OUT"):
            write(folder, new, TINY, shard)
        assert equal(wan21.weights.read_weights(folder)[0], old)
    wan21.weights.write_own(tmp_path / "c", old, {"stage": "salt"})
    (tmp_path / "c" / "salt_raw.safetensors").unlink()
    with pytest.raises(ValueError, match="salt.safetensors, which exists already"):
        wan21.weights.write_own(tmp_path / "c", new, {"stage": "salt"})
    assert equal(wan21.weights.read_weights(tmp_path / "c" / "salt.safetensors")[0], old)

    real, written = files.save_file, []

    def full_disk(tensors, path, metadata):
        if written or shard > 1e6:
            Path(path).write_bytes(b"half")
            raise files.SafetensorError("I/O error: No space left on device (os error 28)")
        written.append(path)
        real(tensors, path, metadata)

    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        wan21.weights.write_official(tmp_path / "d", new, TINY, shard)
    assert list((tmp_path / "d").iterdir()) == []
    monkeypatch.undo()
    wan21.weights.write_official(tmp_path / "d", new, TINY, shard)
    assert equal(wan21.weights.read_weights(tmp_path / "d")[0], new)


# -- the command ------------------------------------------------------------------------------------------------------

def test_training_starts_from_converted_weights(tmp_path, tiny_wan, capsys):
    """Bug: a record that train.py does not take for a finished stage's, the wrong stage's or size's; weights that are
    cast, or lost on the way."""
    weights, run = random_weights(tiny_wan), tmp_path / "run"
    wan21.weights.write_official(tmp_path / "wan", weights, tiny_wan, 20e3)
    more = "--frames 6 --height 4 --width 6 --batch 2 --teacher-forcing-steps 1 --device cpu".split()
    convert.main([str(tmp_path / "wan"), str(run), "--layout", "own", "--size", "wan1.3b", *more])
    assert "official in" in capsys.readouterr().out
    cfg = config.parse(["--size", "wan1.3b", "--data", "random", "--out", str(run), *more])
    assert stage.is_finished(cfg, "bidirectional") and equal(stage.load_finished(cfg, "bidirectional", "_raw"), weights)
    for name in ("bidirectional", "teacher_forcing"):  # the first is done, and its settings are those of `more`
        train.main(dataclasses.replace(cfg, stage=name))
    assert "bidirectional: already trained" in capsys.readouterr().out
    trained, about = read_tensors(run / "teacher_forcing.safetensors")
    assert about["step"] == 1 and not equal(trained, weights)
    for name, w in weights.items():  # one step of Adam at a warm-up's first learning rate
        assert (trained[name] - w).abs().max() < 1e-5, name
    assert equal(read_tensors(run / "bidirectional.safetensors")[0], weights)


def test_converted_students_are_recorded_as_such(tmp_path, tiny_wan, monkeypatch):
    """Bug: a student sampled as a teacher, or with another chunk than it was trained for; a second copy that needs hard
    links; a run written over; the averaged weights of --part generator; a dtype that is not the one asked for."""
    raw, ema, run = random_weights(tiny_wan, 1), random_weights(tiny_wan, 2), tmp_path / "run"
    flat = torch.cat([w.flatten() for w in ema.values()]).split([w.numel() for w in ema.values()])
    ema = {k: x.view(w.shape) for (k, w), x in zip(ema.items(), flat)}  # FSDP's parameters share one storage
    torch.save({"generator": prefixed(raw, "model."), "generator_ema": prefixed(ema, "model.")}, tmp_path / "cf.pt")
    words = [str(tmp_path / "cf.pt"), str(run), "--stage", "causal_cd"]

    def no_links(*_):
        raise OSError("no links here")

    with monkeypatch.context() as m:
        m.setattr(os, "link", no_links)
        convert.main([*words, "--chunk", "1", "--first-steps", "2"])
    for suffix in ("", "_raw"):
        got, about = read_tensors(run / f"causal_cd{suffix}.safetensors")
        assert equal(got, ema)
        assert {k: about[k] for k in ("stage", "size", "causal", "few_step", "solver")} == {
            "stage": "causal_cd", "size": "wan1.3b", "causal": True, "few_step": True, "solver": "cm"}
        assert about["saved"] > 1e9 and about["source"] == {"path": str(tmp_path / "cf.pt"), "layout": "pt",
                                                            "part": "generator_ema"}
        assert (about["config"]["chunk"], about["config"]["first_steps"], about["config"]["shift"]) == (1, 2, 5.0)
        assert about["config"].keys() == {f.name for f in dataclasses.fields(config.Config)}
    with pytest.raises(ValueError, match="exists already"):
        convert.main([*words, "--part", "generator"])
    assert equal(read_tensors(run / "causal_cd.safetensors")[0], ema)

    words[1] = str(tmp_path / "bf16")
    convert.main([*words, "--part", "generator", "--dtype", "bf16"])
    half = {k: w.bfloat16() for k, w in raw.items()}
    assert equal(read_tensors(tmp_path / "bf16" / "causal_cd.safetensors")[0], half)
    ours = str(tmp_path / "bf16" / "causal_cd.safetensors")
    for layout in ("official", "diffusers"):  # and out again
        convert.main([ours, str(tmp_path / layout), "--layout", layout])
        got, about = wan21.weights.read_weights(tmp_path / layout)
        assert equal(got, half) and about["layout"] == layout
    convert.main([ours, str(tmp_path / "fp32"), "--layout", "official", "--dtype", "fp32"])
    assert equal(wan21.weights.read_weights(tmp_path / "fp32")[0], {k: w.float() for k, w in half.items()})
    for wrong, expected in ((["--stage", "cd"], "--stage cd"),
                            (["--layout", "official", "--chunk", "1"], "--chunk"), (["--size", "toy"], "wan1.3b")):
        with pytest.raises(ValueError, match=expected):
            convert.main([str(tmp_path / "cf.pt"), str(tmp_path / "no"), *wrong])
    with pytest.raises(ValueError, match="file of this project"):
        convert.main([ours, str(tmp_path / "no")])
    assert not (tmp_path / "no").exists()


# -- cameras ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def tiny_camera(tiny_wan, monkeypatch):
    """--size wan1.3b_camera is the same tiny network with cameras, and heads wide enough for them."""
    monkeypatch.setitem(SIZES, "wan1.3b", dataclasses.replace(tiny_wan, num_heads=3))
    monkeypatch.setitem(SIZES, "wan14b", dataclasses.replace(tiny_wan, num_heads=3, dim=96))
    monkeypatch.setitem(SIZES, "wan1.3b_camera", dataclasses.replace(tiny_wan, num_heads=3, camera="frame"))
    return SIZES["wan1.3b_camera"]


MORE = "--frames 3 --height 4 --width 6 --batch 2 --accum 1 --device cpu --teacher-forcing-steps 1 --chunk 1".split()


def some_cameras(g, frames=3):
    """Rows `2 f 18` of cameras that turn and move at random."""
    skew = torch.randn(2, frames, 3, 3, generator=g)
    viewmats = torch.eye(4).repeat(2, frames, 1, 1)
    viewmats[..., :3, :3], viewmats[..., :3, 3] = torch.linalg.matrix_exp(skew - skew.mT), skew[..., 0]
    return row_of(viewmats, 0.5 + torch.rand(2, frames, 3, 3, generator=g))


@torch.no_grad()
@pytest.mark.parametrize("layout", ["official", "own", "diffusers", "pt"])
def test_cameras_start_from_a_text_to_video_model(tmp_path, tiny_camera, capsys, layout):
    """Bug: a start that is not the text-to-video model: prope_o that is random, or of its weight alone, or another
    tensor that is changed; a network that the stages do not take; a model of our own that is refused."""
    weights, src, run = random_weights(SIZES["wan1.3b"]), tmp_path / "src", tmp_path / "run"
    g = torch.Generator().manual_seed(0)
    if layout == "own":
        wan21.weights.write_own(src, weights, {"stage": "bidirectional", "size": "wan1.3b", "saved": 1.5})
        src = src / "bidirectional.safetensors"
    elif layout == "pt":
        src = tmp_path / "src.pt"
        torch.save({"generator": prefixed(weights, "model.")}, src)
    else:
        getattr(wan21.weights, f"write_{layout}")(src, weights, SIZES["wan1.3b"])
    convert.main([str(src), str(run), "--size", "wan1.3b_camera", *MORE])
    assert "with cameras" in capsys.readouterr().out
    assert not (run / "bidirectional.safetensors").exists()  # which would not be trained, and teach DMD no cameras
    ours, about = wan21.weights.load(tiny_camera, run / "start.safetensors")
    t2v = wan21.weights.load(SIZES["wan1.3b"], src)[0]
    assert about["size"] == "wan1.3b_camera"
    new = {k: w for k, w in ours.state_dict().items() if "prope_o" in k}
    assert len(new) == 2 * 2 and not any(w.any() for w in new.values())
    assert equal({k: w for k, w in ours.state_dict().items() if k not in new}, weights)
    x, text = torch.randn(2, 3, 16, 4, 6, generator=g), torch.randn(2, 6, 12, generator=g)
    t = torch.rand(2, 3, generator=g)
    want = t2v(x, t, text)
    for rows in (some_cameras(g), 100 * some_cameras(g)):
        assert torch.equal(ours(x, t, Condition(text, rows)), want) and want.std() > 0.1
    for w in new.values():
        w.normal_(generator=g)
    assert (ours(x, t, Condition(text, some_cameras(g))) - want).abs().max() > 0.1


def test_a_stage_starts_from_them(tmp_path, tiny_camera):
    """Bug: a teacher that never learns cameras, or is trained from scratch; prope_o that no gradient reaches; weights
    that train.py takes for another size's."""
    weights = random_weights(SIZES["wan1.3b"])
    wan21.weights.write_official(tmp_path / "wan", weights, SIZES["wan1.3b"])
    to = [str(tmp_path / "wan"), str(tmp_path / "run"), "--size", "wan1.3b_camera", *MORE]
    with pytest.raises(ValueError, match="teacher_forcing without cameras, expected a bidirectional"):
        convert.main([*to, "--stage", "teacher_forcing"])
    convert.main(to)
    flags = ["--size", "wan1.3b_camera", "--data", "random", "--out", str(tmp_path / "run"), *MORE]
    for name in ("bidirectional", "teacher_forcing"):
        train.main(config.parse([*flags, "--stage", name, "--bidirectional-steps", "3"]))
        trained, about = read_tensors(tmp_path / "run" / f"{name}.safetensors")
        assert about["size"] == "wan1.3b_camera" and trained["blocks.1.self_attn.prope_o.weight"].any()
        close(trained["blocks.0.ffn.0.weight"], weights["blocks.0.ffn.0.weight"], 0.05)


def test_public_camera_models(tmp_path, tiny_camera, capsys):
    """Bug: the prope_o of minWM's files lost, renamed or set to zero; cameras that are found by --size alone, or taken
    for a text-to-video model's; a layout that has no place for them."""
    weights = random_weights(tiny_camera)
    assert {"blocks.0.self_attn.prope_o.weight", "blocks.1.self_attn.prope_o.bias"} <= weights.keys()
    torch.save({"generator_ema": prefixed(weights, "model.")}, tmp_path / "walk.pt")
    convert.main([str(tmp_path / "walk.pt"), str(tmp_path / "run"), "--stage", "causal_cd", "--chunk", "1"])
    assert "with cameras" not in capsys.readouterr().out  # none were added
    got, about = read_tensors(tmp_path / "run" / "causal_cd.safetensors")
    assert equal(got, weights) and about["size"] == "wan1.3b_camera"
    convert.main([str(tmp_path / "walk.pt"), str(tmp_path / "official"), "--layout", "official"])
    assert equal(wan21.weights.read_weights(tmp_path / "official")[0], weights)
    for size in ((), ("--size", "wan1.3b_camera")):
        with pytest.raises(ValueError, match="sees cameras, .*--layout to official"):
            convert.main([str(tmp_path / "walk.pt"), str(tmp_path / "no"), "--layout", "diffusers", *size])
    with pytest.raises(ValueError, match="prope_o.*change --size to wan1.3b_camera"):
        convert.main([str(tmp_path / "walk.pt"), str(tmp_path / "no"), "--size", "wan1.3b"])
    with pytest.raises(ValueError, match="file of this project"):
        convert.main([str(tmp_path / "run" / "causal_cd.safetensors"), str(tmp_path / "no")])
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("lost, n", [("norm3.bias", 1), ("self_attn.o.bias", 2), ("self_attn.prope_o.bias", 1)])
def test_only_cameras_are_made_up(tmp_path, tiny_camera, lost, n):
    """Bug: other missing tensors, or half of a prope_o, filled with zeros."""
    weights = random_weights(tiny_camera if "prope_o" in lost else SIZES["wan1.3b"])
    save_file({k: w for k, w in weights.items() if k != f"blocks.0.{lost}"}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"of which {n} tensors .*blocks.0.{lost}: got none"):
        convert.main([str(tmp_path / "x.safetensors"), str(tmp_path / "no"), "--size", "wan1.3b_camera"])
    with pytest.raises(ValueError, match=r"of which \d+ tensors .*: change --size to wan14b"):
        save_file(random_weights(SIZES["wan14b"]), tmp_path / "x.safetensors")
        convert.main([str(tmp_path / "x.safetensors"), str(tmp_path / "no"), "--size", "wan1.3b_camera"])


# -- memory -----------------------------------------------------------------------------------------------------------

LARGE = dict(dim=1024, ffn_dim=4096, num_heads=8, num_layers=3, text_dim=64)  # 232 MB in float32
SHARD = 30e6
MEASURE = """
import gc, json, sys, threading, time
from pathlib import Path
import torch
import wan21.weights
from huggingface_hub import split_torch_state_dict_into_shards
from model import WanConfig

def anonymous():  # bytes that are no file's: what a second copy would take
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

def most(work):  # beyond what there was
    gc.collect()
    peak, done, before = [0], threading.Event(), anonymous()
    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], anonymous() - before)
            time.sleep(0.001)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    made = work()
    done.set()
    thread.join()
    return max(peak[0], anonymous() - before)

folder, config = Path(sys.argv[1]), WanConfig(**json.loads(sys.argv[2]))
torch.zeros(10).bfloat16(), wan21.weights.shapes(config)  # what the first call imports is not counted
split_torch_state_dict_into_shards({"x": torch.zeros(1)})
for path in ("official", "public.pt"):
    for dtype in (None, torch.bfloat16):
        print(path, dtype, most(lambda: wan21.weights.load(config, folder / path, dtype=dtype)))
weights = wan21.weights.read_weights(folder / "official")[0]
print("write", most(lambda: wan21.weights.write_official(folder / "bf16", weights, config, 30e6, torch.bfloat16)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file() or "RssAnon" not in Path("/proc/self/status").read_text(),
                    reason="needs Linux to tell anonymous memory from a mapped file's")
def test_loading_takes_no_second_copy(tmp_path):
    """Bug: the whole file read into memory beside the network, or cast as a whole: 57 GB twice for the 14B model."""
    weights, config = random_weights(WanConfig(**LARGE)), WanConfig(**LARGE)
    wan21.weights.write_official(tmp_path / "official", weights, config, SHARD)
    torch.save({"generator": {"x": torch.zeros(1)}, "generator_ema": prefixed(weights, "model.")},
               tmp_path / "public.pt")
    size = sum(w.nbytes for w in weights.values())
    del weights
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back, and hides nothing of the next case
    ran = subprocess.run([sys.executable, "-c", MEASURE, tmp_path, json.dumps(LARGE)], cwd=ROOT, text=True, timeout=100,
                         capture_output=True, env=os.environ | at_once)
    assert ran.returncode == 0, ran.stderr
    peaks = {line.rsplit(" ", 1)[0]: int(line.rsplit(" ", 1)[1]) for line in ran.stdout.splitlines()}
    assert size > 200e6 and len(peaks) == 5
    for case, peak in peaks.items():
        network = size / 2 if case.endswith("bfloat16") else 0  # not cast, it is the mapped file
        assert peak <= network + 1.2 * SHARD, f"{case}: {peak / 1e6:.0f} MB beside a network of {network / 1e6:.0f} MB"
        assert peak >= 0.95 * network, f"{case}: {peak / 1e6:.0f} MB, so this test sees nothing"
