"""Safe with a user's files: nothing overwritten that was not made here, nothing run that was read, one clear line for
every mistake. What a crash or a full disk does to training is in test_faults.py."""

import dataclasses
import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import socket
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, wait_for
from PIL import Image
from test_train import TINY, config

import evaluate
import sample
import stage
import train
import wan21.text
import wan21.video
import wan21.weights
from cluster import checkpoint, files
from cluster.files import metadata_of, read_tensors, write_tensors
from fast.network import Fast
from model import SIZES, CausalWan
from tools import convert, plan, prepare
from worlds import latent_folder

pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture(scope="module")
def weights():
    """Weights of a toy network."""
    return CausalWan(SIZES["toy"]).init_weights(0).state_dict()


@pytest.fixture
def student(tmp_path, weights):
    """student(name, **changes): a finished causal_cd, with changes to its weights or its metadata."""
    def write(path=tmp_path / "runs" / "causal_cd.safetensors", change=lambda w: w, **metadata):
        cfg = dataclasses.asdict(train.Config(frames=4, chunk=1))
        known = {"stage": "causal_cd", "size": "toy", "config": cfg, "saved": 1.0, "causal": True, "few_step": True,
                 "solver": "cm"}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, change({k: v.clone() for k, v in weights.items()}), known | metadata)
        return path
    return write


def sampled(*words):
    return sample.main(sample.parse([str(word) for word in (*words, "--device", "cpu")]))


# -- whose folder, whose settings -------------------------------------------------------------------------------------

HOLD = """
import sys, time
from cluster.files import in_use
with in_use(sys.argv[1]):
    print("in", flush=True)
    time.sleep(600)
"""


def test_two_runs_on_one_folder(start, tmp_path):
    """Bug: two runs that write into each other's files, both with exit code 0; a lock that outlives who held it."""
    other = start("-c", HOLD, tmp_path)
    wait_for(lambda: other.out.read_text() == "in\n")
    with pytest.raises(ValueError, match=f"--out .*in use by process {other.pid} on .*--out"):
        train.main(config(tmp_path, stage="bidirectional"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".in_use"]
    os.kill(other.pid, signal.SIGKILL)
    other.ended()
    train.main(config(tmp_path, stage="bidirectional"))
    assert (tmp_path / "bidirectional.safetensors").exists()


def test_weights_of_another_seed_or_setting_are_not_read(tmp_path):
    """Bug: a stage of seed 1 that starts from, or learns from, weights of seed 0; a start of another shift."""
    train.main(config(tmp_path, stage="bidirectional"))
    for changes, message in ((dict(seed=1), "--seed 1, expected 0, with which .*bidirectional.safetensors"),
                             (dict(train_shift=2.0), "--train-shift 2.0, expected 3.0")):
        with pytest.raises(ValueError, match=message):
            train.main(config(tmp_path, stage="teacher_forcing", **changes))
    train.main(config(tmp_path, stage="teacher_forcing", batch=2, dmd_lr=1.0))  # each stage may have its own batch
    with pytest.raises(ValueError, match="--trajectory-lr|--teacher-forcing-lr 9.0, expected .*teacher_forcing"):
        train.main(config(tmp_path, stage="causal_cd", teacher_forcing_lr=9.0))
    assert not (tmp_path / "causal_cd.state").exists()


def test_stage_three_has_other_settings_than_the_dmd_it_starts_from(tmp_path):
    """Bug: stage 3 that starts from causal_dmd only with its learning rate and as many updates; a start of another
    teacher."""
    def stage(name, **changes):
        train.main(config(tmp_path, stage=name, critic_steps=1, **changes))

    for name in ("bidirectional", "teacher_forcing"):
        stage(name)
    stage("causal_dmd", dmd_lr=1e-4, dmd_steps=2)
    stage("causal_forcing_pp", init="causal_dmd", dmd_lr=2e-4, dmd_steps=1)
    assert (tmp_path / "causal_forcing_pp.safetensors").exists()
    with pytest.raises(ValueError, match="--teacher-forcing-lr 9.0, expected .*causal_dmd"):
        stage("mixed_sc", init="causal_dmd", teacher_forcing_lr=9.0)
    with pytest.raises(ValueError, match="--shift 3.0, expected 5.0, .*causal_dmd"):
        stage("mixed_sc", init="causal_dmd", shift=3.0)


def test_size_changed_in_an_unfinished_run(tmp_path):
    """Bug: twenty lines of torch's about every tensor."""
    train.main(config(tmp_path, stage="bidirectional", stop_after="1"))
    with pytest.raises(ValueError, match="^got --size toy_large, expected toy, with which .*change --size[^\n]*$"):
        train.main(config(tmp_path, stage="bidirectional", size="toy_large"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two stages, the second of them stopped after two updates."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train.main(config(out, stop_after="5"))
    return out


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def change_metadata(checkpoint, **changes):
    """Change about.json of a checkpoint, and the hash beside it."""
    text = json.dumps(json.loads((checkpoint / "about.json").read_text()) | changes)
    (checkpoint / "about.json").write_text(text)
    hashes = json.loads((checkpoint / "sha256.json").read_text())
    hashes["about.json"] = hashlib.sha256(text.encode()).hexdigest()
    (checkpoint / "sha256.json").write_text(json.dumps(hashes))


@pytest.mark.parametrize("changes, why", [
    (dict(stage="bidirectional"), "of stage bidirectional and step 2, expected one of teacher_forcing"),
    (dict(step=10**6), "step 1000000, expected .* up to step 3"), (dict(step=-4), "step -4, expected"),
    (dict(step="one"), "without step"), (dict(step=1.5), "without step"), (dict(config=[]), "without config"),
    (dict(seconds=None), "without seconds")])
def test_checkpoints_of_another_kind(run, changes, why):
    """Bug: bidirectional's tensors exported as teacher_forcing's; TypeErrors of Python's."""
    change_metadata(checkpoint.newest_intact(run / "teacher_forcing.state"), **changes)
    with pytest.raises(ValueError, match=why):
        train.main(config(run, stage="teacher_forcing"))


def test_a_finished_stage_is_that_of_its_name_and_data(run):
    """Bug: renamed weights taken for another stage's; other --data that changes nothing, without a word."""
    for suffix in ("", "_raw"):
        shutil.copy(run / f"bidirectional{suffix}.safetensors", run / f"teacher_forcing{suffix}.safetensors")
    with pytest.raises(ValueError, match="teacher_forcing.safetensors of stage bidirectional"):
        train.main(config(run, stage="teacher_forcing"))
    with pytest.raises(ValueError, match="--data random with other clips than .*bidirectional.safetensors"):
        train.main(config(run, stage="bidirectional", data="random"))
    with pytest.raises(ValueError, match="--data random, expected no --data"):
        train.main(config(run, stage="evaluate", data="random"))
    write_tensors(run / "bidirectional.safetensors", {"x": torch.ones(1)}, {})
    with pytest.raises(ValueError, match="without the settings it was trained with"):
        train.main(config(run, stage="bidirectional"))


def test_what_a_user_has_put_into_a_run_stays(run):
    """Bug: folders named as checkpoints or half-written ones deleted; the newest checkpoint forgotten as "1" sorts
    behind it; notes.writing swept away."""
    states = run / "teacher_forcing.state"
    kept = [states / "0" / "thesis.txt", states / "thesis.writing" / "thesis.txt", run / "notes.writing"]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("years of work")
    shutil.copytree(checkpoint.checkpoints(states)[0], states / "1")
    (states / "\u00b2").mkdir()
    train.main(config(run, stage="teacher_forcing", keep=1))
    assert all(path.read_text() == "years of work" for path in kept)
    assert [path.name for path in checkpoint.checkpoints(states)] == ["00000003"] and (states / "1").is_dir()


@pytest.mark.parametrize("name, content", [("config.json", '{"my": "own"}'), ("config.json", "text"),
                                           ("metrics.jsonl", "my notes\n"), ("metrics.jsonl", '{"my": "own"}\n')])
def test_a_folder_of_somebodys_own(tmp_path, name, content):
    """Bug: --out in a project's folder, whose config.json is then the run's."""
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}"):
        train.main(config(tmp_path, stage="bidirectional"))
    assert (tmp_path / name).read_text() == content


def test_a_lock_that_is_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "run" / ".in_use").symlink_to(tmp_path / "thesis.txt")
    with pytest.raises(ValueError, match="--out"):
        train.main(config(tmp_path / "run", stage="bidirectional"))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_trajectories_of_a_teacher_that_was_trained_again(tmp_path):
    """Bug: a student that regresses on the old teacher's trajectories."""
    cfg = config(tmp_path, trajectories=2, trajectory_grid=16, batch=2)
    for name in ("bidirectional", "teacher_forcing", "causal_ode"):
        train.run_stage(cfg, name)
    path = tmp_path / "teacher_forcing.safetensors"
    tensors, metadata = read_tensors(path)
    write_tensors(path, tensors, metadata | {"saved": metadata["saved"] + 1})
    for name in tmp_path.glob("causal_ode*.safetensors"):
        name.unlink()
    shutil.rmtree(tmp_path / "causal_ode.state")
    with pytest.raises(ValueError, match="made with teacher_saved .*expected the same: change --out, or move"):
        train.run_stage(cfg, "causal_ode")


# -- files that sample.py reads and writes ----------------------------------------------------------------------------

def test_samples_replace_nothing_but_samples(tmp_path, student):
    """Bug: --out that is the weights, another stage's, the image or the clip to start from, or somebody's video."""
    weights = student()
    image, theirs = tmp_path / "fox.webp", tmp_path / "holiday.webp"
    for path in (image, theirs):
        Image.new("RGB", (10, 10), "red").save(path)
    words = ("--weights", weights, "--prompt", "red ball", "--frames", 2)
    clip, = sampled(*words, "--out", tmp_path / "clip.safetensors")
    before = {path: path.read_bytes() for path in (weights, image, theirs, clip)}
    (tmp_path / "dir.webp").mkdir()
    (tmp_path / "loop.webp").symlink_to(tmp_path / "loop.webp")
    with pytest.raises((ValueError, OSError)):
        sampled(*words, "--out", tmp_path / "loop.webp" / "x.webp")
    for out, more in ((weights, ()), (image, ("--image", image)), (clip, ("--continue", clip)), (theirs, ()),
                      (student(tmp_path / "salt.safetensors"), ()), (tmp_path / "dir.webp", ())):
        with pytest.raises(ValueError, match=f"--out {out}, expected "):
            sampled(*words, *more, "--out", out)
    assert all(path.read_bytes() == content for path, content in before.items())
    for name in ("own.webp", "own.mp4", "clip.safetensors"):  # its own it does
        for seed in (0, 1):
            sampled(*words, "--seed", seed, "--out", tmp_path / name)


def test_samples_replace_no_data_and_no_unfinished_clip(tmp_path, student, monkeypatch):
    """Bug: latents or embeddings of another command taken for a sample; NAME-unfinished of somebody, or of a longer
    try, replaced."""
    words = ("--weights", student(), "--prompt", "red ball", "--frames", 4)
    latent_folder.write_shard(tmp_path / "0.safetensors", [{"text": torch.ones(1, 4), "caption": ""}])
    before = (tmp_path / "0.safetensors").read_bytes()
    with pytest.raises(ValueError, match="--out .*0.safetensors, expected a new name"):
        sampled(*words, "--out", tmp_path / "0.safetensors")
    assert (tmp_path / "0.safetensors").read_bytes() == before
    (tmp_path / "x-unfinished.webp").mkdir()
    (tmp_path / "x-unfinished.webp" / "notes.txt").write_text("years of work")
    real, calls = Fast.__call__, []

    def stopped(*args, **how):
        calls.append(1)
        if len(calls) % 8 == 0:
            raise KeyboardInterrupt
        return real(*args, **how)

    monkeypatch.setattr(Fast, "__call__", stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            sampled(*words, "--out", tmp_path / "x.webp")
    assert {path.name for path in tmp_path.iterdir()} >= {
        "x-unfinished.webp", "x-unfinished1.webp", "x-unfinished2.webp"}
    assert (tmp_path / "x-unfinished.webp" / "notes.txt").read_text() == "years of work"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("words, why", [
    (("--negative-prompt", "x"), "--negative-prompt x, expected none"), (("--at", "1" * 5000, "blue bar"), "--at 111"),
    (("--at", 2, "blue bar", "--at", 2, "green ball"), "--at twice at one frame"),
    (("--prompt", "a fox \udcff"), "expected text in UTF-8"), (("--samples", 10**6), "--samples 1000000, expected")])
def test_prompts_that_cannot_be(tmp_path, student, words, why):
    with pytest.raises(ValueError, match=why):
        sampled("--weights", student(), "--prompt", "red ball", "--frames", 4, "--out", tmp_path / "v", *words)


def test_a_folder_with_somebodys_sample_json(tmp_path, student):
    (tmp_path / "sample.json").write_text('{"my": "notes"}')
    with pytest.raises(ValueError, match="sample.json, which sample.py has not written"):
        sampled("--weights", student(), "--prompt", "red ball", "--frames", 2, "--out", tmp_path, "--format", "webp")
    assert (tmp_path / "sample.json").read_text() == '{"my": "notes"}'


@pytest.mark.parametrize("metadata", [dict(size="toy_v2"), dict(size=["toy"]), dict(config=3)])
def test_records_that_cannot_be(tmp_path, student, metadata):
    with pytest.raises(ValueError, match="change --weights"):
        sampled("--weights", student(**metadata), "--prompt", "red ball", "--out", tmp_path / "x.webp")


def test_a_folder_of_samples_keeps_no_stale_clip(tmp_path, student):
    """Bug: a clip taken for that of another prompt with the same first 60 characters, or of weights that were trained
    again since."""
    weights, out = student(), tmp_path / "clips"
    words = ("--weights", weights, "--frames", 2, "--format", "latents", "--out", out)
    sampled(*words, "--prompt", "red ball")
    (name,) = [path.name for path in out.glob("*.safetensors")]
    record = json.loads((out / "sample.json").read_text())
    assert record["prompts"] == {name: "red ball"} and record["weights_digest"] == wan21.weights.digest(weights)
    (out / "sample.json").write_text(json.dumps(record | {"prompts": {name: "red  ball"}}))
    with pytest.raises(ValueError, match="of the prompt 'red  ball', expected of 'red ball'"):
        sampled(*words, "--prompt", "red ball")
    (out / "sample.json").write_text(json.dumps(record))
    assert sampled(*words, "--prompt", "red ball") == []
    student(change=lambda w: {k: v + 0.1 for k, v in w.items()})
    with pytest.raises(ValueError, match="--weights .*the very weights that the clips"):
        sampled(*words, "--prompt", "red ball", "blue bar")


def test_two_at_a_time_in_one_new_folder(start, tmp_path, student):
    """Bug: FileNotFoundError, as both write sample.json."""
    words = [ROOT / "sample.py", "--weights", student(), "--frames", 2, "--format", "latents", "--out",
             tmp_path / "clips", "--device", "cpu"]
    both = [run.ended() for run in [start(*words, "--seed", seed) for seed in (0, 100)]]
    assert [run.returncode for run in both] == [0, 0], both
    assert len(list((tmp_path / "clips").glob("*.safetensors"))) == 24


def change_one(name, value):
    """A change of weights: the first number of one tensor, or its dtype."""
    def change(w):
        w[name].flatten()[0] = value
        return w
    return change


@pytest.mark.parametrize("change, why", [
    (change_one("blocks.0.ffn.0.weight", float("nan")), "blocks.0.ffn.0.weight .not finite"),
    (change_one("head.head.bias", float("inf")), "head.head.bias .not finite"),
    (lambda w: w | {"head.head.bias": torch.ones(75, dtype=torch.int32)}, "head.head.bias .int32")])
def test_weights_that_are_no_finite_numbers(tmp_path, student, change, why):
    """Bug: noise or black frames from damaged weights, without a word."""
    path = student(change=change)
    with pytest.raises(ValueError, match=why):
        sampled("--weights", path, "--prompt", "red ball", "--frames", 2, "--out", tmp_path / "x.webp")
    with pytest.raises(ValueError, match=why):
        convert.main([str(path), str(tmp_path / "out"), "--layout", "diffusers"])
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_in_what_a_stage_left(tmp_path, student):
    """Bug: weights that are not what was trained, trained on, sampled and converted."""
    path = student()
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    cfg = config(path.parent)
    for read in (lambda: stage.load_finished(cfg, "causal_cd"), lambda: wan21.weights.read_weights(path)):
        with pytest.raises(ValueError, match="causal_cd.safetensors .its bytes are not those that were written"):
            read()
    assert metadata_of(path)["stage"] == "causal_cd"  # the header is intact


# -- what strangers send ----------------------------------------------------------------------------------------------

class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_strangers_checkpoint_runs_nothing(tmp_path):
    """Bug: DCP's .metadata is a pickle, and its hash lies beside it: resuming somebody's run runs somebody's code."""
    train.main(config(tmp_path / "run", stage="bidirectional", stop_after="1"))
    (saved,) = checkpoint.checkpoints(tmp_path / "run" / "bidirectional.state")
    intact = (saved / ".metadata").read_bytes()
    hashes = json.loads((saved / "sha256.json").read_text())

    def plant(content):
        (saved / ".metadata").write_bytes(content)
        recorded = hashes | {".metadata": hashlib.sha256(content).hexdigest()}
        (saved / "sha256.json").write_text(json.dumps(recorded))

    metadata = checkpoint.Reader(saved).read_metadata()
    first = next(iter(metadata.storage_data.values()))
    first.relative_path = "../../other"
    for content, why in ((pickle.dumps(Payload(tmp_path / "run me")), r"posix.mkdir, which no checkpoint needs"),
                         (pickle.dumps(metadata), "files of other folders"), (b"junk", "cannot be read")):
        plant(content)
        with pytest.raises(ValueError, match=why):
            train.main(config(tmp_path / "run", stage="bidirectional"))
    assert not (tmp_path / "run me").exists()
    plant(intact)
    train.main(config(tmp_path / "run", stage="bidirectional"))


def test_a_strangers_pt_runs_nothing_and_torchs_advice_is_not_passed_on(tmp_path):
    """Bug: an error that ends with how to run the code in the file all the same."""
    torch.save({"model": Payload(tmp_path / "run me")}, tmp_path / "evil.pt")
    with pytest.raises(ValueError) as e:
        wan21.weights.read_weights(tmp_path / "evil.pt")
    assert "mkdir" in str(e.value) and "weights_only" not in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "run me").exists()


def test_names_of_videos_are_no_addresses_and_playlists_no_videos(tmp_path, monkeypatch):
    """Bug: a file called http:/127.0.0.1/x.mp4 that is fetched from there; a playlist that names other files."""
    pytest.importorskip("av")
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        names = [f"http:/127.0.0.1:{port}/x.mp4", f"tcp:/127.0.0.1:{port}/x.mp4"]
        playlists = {"list.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:{port}/a.ts\n",
                     "concat.mp4": f"ffconcat version 1.0\nfile {tmp_path / 'secret.mp4'}\n",
                     "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:{port}/a.ts\n"}
        with wan21.video.writer(tmp_path / "secret.mp4") as write:
            write(np.zeros((3, 16, 16, 3), dtype=np.uint8))
        for name in names + list(playlists):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(playlists.get(name, "no video"))
            with pytest.raises(ValueError, match="which cannot be read"):
                wan21.video.read(name)
        with pytest.raises(TimeoutError):
            server.accept()
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(ValueError, match="got no file or folder pipe.mp4"):
        wan21.video.read("pipe.mp4")
    assert len(wan21.video.read("secret.mp4")) == 3


@pytest.mark.parametrize("name, content, why", [
    ("a.csv", "video,caption\na.mp4,a fox, red\n", "more cells than columns"),
    ("a.csv", "video,caption\n,a fox\n", "no name"), ("a.csv", f"video,caption\n{'x' * 300},a\n", "no name"),
    ("a.csv", "video,caption,caption\na.mp4,a,b\n", "its columns are"),
    ("a.jsonl", '{"video": "a.mp4", "caption": "\\ud83d"}\n', "row 1"),
    ("a.csv", 'video,caption\na.mp4,"an unclosed quote\nb.mp4,a dog\n', "row 1"),
    ("a.csv", "video,caption\n../a.mp4,a dog\n", "'../a.mp4' is outside --videos"),
    ("a.csv", "video,caption\n/etc/a.mp4,a dog\n", "outside --videos"),
    ("a.jsonl", '{"video": "a.mp4", "caption": ["a", "dog"]}\n', "row 1"),
    ("a.jsonl", '{"video": "a.mp4", "caption": 3}\n', "row 1"),
    ("a.jsonl", "[" * 100_000, "row 1")])
def test_captions_that_are_none(tmp_path, name, content, why):
    """Bug: rows swallowed by a quote, lists as text, videos from elsewhere, a traceback of ten thousand lines."""
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}, which cannot be read at .*{why}|{why}"):
        prepare.read_captions(tmp_path / name)


def header(path, metadata):
    """A .safetensors with this text as its metadata."""
    files.save_file({"0.text": torch.zeros(1, 4)}, path, {"about": metadata})
    return path


@pytest.mark.parametrize("metadata", ["[]", "3", "null", '"x"', "{}", "[" * 50_000, '{"stage": "salt", "causal": true}',
                                      '{"captions": 3, "crc32": 3}', '{"captions": ["a"], "crc32": [{}]}', "{"])
def test_headers_of_strangers(tmp_path, metadata):
    """Bug: a TypeError or KeyError of Python's in place of what is wrong with which file."""
    path = header(tmp_path / "x.safetensors", metadata)
    for read in (lambda: sampled("--weights", path, "--prompt", "red ball", "--out", tmp_path / "x.webp"),
                 lambda: latent_folder.read_shard(path),
                 lambda: latent_folder.LatentFolder(tmp_path, (4, 3, 5, 5), (2, 16)),
                 lambda: wan21.text.read_prompt_embeds(path),
                 lambda: convert.main([str(path), str(tmp_path / "out")])):
        with pytest.raises(ValueError, match="x.safetensors|checkpoint|sample|fit|size|Size") as e:
            read()
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("content", ["null", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 50_000,
                                     '{"weight_map": {"a": "../../x.safetensors"}}'])
def test_indexes_of_strangers(tmp_path, content):
    (tmp_path / f"{wan21.weights.NAME}.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="index.json"):
        wan21.weights.read_weights(tmp_path)


@pytest.mark.parametrize("name, content", [("sha256.json", "null"), ("about.json", "{}"), ("about.json", "[]")])
def test_checkpoints_with_odd_records(tmp_path, name, content):
    """Bug: AttributeError: 'NoneType' has no attribute 'keys'."""
    train.main(config(tmp_path, stage="bidirectional", stop_after="1"))
    (saved,) = checkpoint.checkpoints(tmp_path / "bidirectional.state")
    hashes = json.loads((saved / "sha256.json").read_text())
    (saved / name).write_text(content)
    if name != "sha256.json":
        hashes[name] = hashlib.sha256(content.encode()).hexdigest()
        (saved / "sha256.json").write_text(json.dumps(hashes))
    with pytest.raises(ValueError, match=name):
        train.main(config(tmp_path, stage="bidirectional"))


@pytest.mark.parametrize("name, value", [("frames", "four"), ("mixed_steps", ["x"]), ("mixed_steps", []),
                                         ("chunk", None)])
def test_settings_of_another_kind_in_a_record(run, name, value):
    path = run / "bidirectional.safetensors"
    tensors, metadata = read_tensors(path)
    write_tensors(path, tensors, metadata | {"config": metadata["config"] | {name: value}})
    with pytest.raises(ValueError, match=f"bidirectional.safetensors with the setting {name} "):
        train.main(config(run, stage="evaluate"))


@pytest.mark.parametrize("content", ["null", "{}", "[3]", "[" * 50_000, '[{"stage": "bidirectional"}]'])
def test_tables_of_older_runs(tmp_path, content):
    """Bug: KeyError for a column that an older version did not have."""
    cfg = config(tmp_path, stage="bidirectional", bidirectional_steps=1, eval_clips=2)
    train.run_stage(cfg, "bidirectional")
    (tmp_path / "table_seed0.json").write_text(content)
    if content.startswith('[{"'):
        assert len(evaluate.report(cfg, "bidirectional")) == 5
    else:
        with pytest.raises(ValueError, match="damaged .*table_seed0.json"):
            evaluate.report(cfg, "bidirectional")


def test_metrics_with_spoilt_lines(tmp_path):
    train.main(config(tmp_path, stage="bidirectional", stop_after="2"))
    with open(tmp_path / "metrics.jsonl", "ab") as f:
        f.write(b'\xff\xfe{"stage"\n[1]\n' + b"[" * 10_000 + b"\n")
    train.main(config(tmp_path, stage="bidirectional"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2]


# -- no space ---------------------------------------------------------------------------------------------------------

def full(monkeypatch):
    """From now on the disk is full."""
    def write(tensors, path, *_):
        path.write_bytes(b"half")
        raise files.SafetensorError("I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(files, "save_file", write)


def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path, monkeypatch, weights):
    """Bug: a traceback of the library below, NAME.writing that takes what space there is."""
    write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {})
    full(monkeypatch)
    prompt = {"text": torch.ones(1, 4), "caption": ""}
    for write in (lambda: write_tensors(tmp_path / "a.safetensors", weights, {}),
                  lambda: latent_folder.write_shard(tmp_path / "b.safetensors", [prompt]),
                  lambda: latent_folder.write_null(tmp_path / "null.safetensors", torch.ones(1, 4)),
                  lambda: wan21.weights.write_official(tmp_path / "wan", weights, SIZES["toy"])):
        with pytest.raises(OSError, match="^got no space to write .*free some space, or change --out[^\n]*$"):
            write()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a.safetensors"]
    assert torch.equal(read_tensors(tmp_path / "a.safetensors")[0]["x"], torch.ones(2))


@pytest.mark.parametrize("suffix", [".mp4", ".webp"])
def test_a_video_on_a_full_disk(python, tmp_path, suffix):
    if suffix == ".mp4":
        pytest.importorskip("av")
    script = f"""
import resource, sys
import numpy as np, wan21.video
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
try:
    with wan21.video.writer({str(tmp_path / ('x' + suffix))!r}) as write:
        write(np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), dtype=np.uint8))
except OSError as e:
    sys.exit(f"OSError: {{e}}")
"""
    ran = python("-c", script)
    assert ran.returncode == 1 and ran.stderr.splitlines()[-1].startswith("OSError: got no space"), ran.stderr
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_embeddings_are_not_lost_on_a_full_disk(tmp_path, monkeypatch):
    """Bug: an hour of embeddings lost because the file at its end did not fit."""
    encoded = []

    class Encoder:
        def encode(self, prompts):
            encoded.extend(prompts)
            return [torch.full((2, 4), float(len(prompt))) for prompt in prompts]

    monkeypatch.setattr(wan21.text, "load_text_encoder", lambda *_: Encoder())
    (tmp_path / "prompts.txt").write_text("\n".join("abcdefg"[:i] for i in range(1, 8)))
    out, real = tmp_path / "out" / "0.safetensors", files.save_file

    def full_at_the_end(tensors, path, *rest):
        if path.name == "0.safetensors.writing":
            raise files.SafetensorError("No space left on device (os error 28)")
        return real(tensors, path, *rest)

    monkeypatch.setattr(files, "save_file", full_at_the_end)
    with pytest.raises(OSError, match="no space"):
        wan21.text.encode_prompts(tmp_path / "prompts.txt", out, tmp_path, batch=2)
    assert len(encoded) == 7 + 2  # and the two of null and empty
    monkeypatch.setattr(files, "save_file", real)
    assert wan21.text.encode_prompts(tmp_path / "prompts.txt", out, tmp_path, batch=2) == 7 and len(encoded) == 9
    assert [s["text"][0, 0].item() for s in latent_folder.read_shard(out)] == [1, 2, 3, 4, 5, 6, 7]
    assert {path.name for path in out.parent.iterdir()} == {"0.safetensors", "null.safetensors", "empty.safetensors"}


def test_a_failed_save_leaves_nothing_half(tmp_path, monkeypatch):
    """Bug: NAME.writing of a save that failed fills the disk, so that the next start fails, too."""
    monkeypatch.setattr(checkpoint, "write_text", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError):
        train.main(config(tmp_path, stage="bidirectional"))
    assert not list(tmp_path.rglob("*.writing"))


# -- one clear line ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words", [
    "--accum 0", "--train-longer inf", "--train-longer nan", "--frames 1000000000",
    "--seed 12345678901234567890123", "--lambda-sc nan", "--shift inf", "--guidance nan", "--dmd-lr inf", "--batch 0",
    "--height 0", "--width -5", "--chunk 0", "--mixed-steps 0", "--rollout-steps 0",
    "--eval-clips 0", "--align-prob 2", "--timeout inf",
    "--first-steps 0", "--window -1", "--sink -1", "--critic-steps 0", "--save-every 0",
    "--lambda-align -1", "--stop-after 0", "--out ",
    "--eval-clips 1000000000", "--precision bf16 --timeout inf", "--precision bf16 --shard-group-size -1"])
def test_numbers_that_cannot_be(tmp_path, words):
    """Bug: ZeroDivisionError, a machine that is full, ranks that "disagree: nan and nan"."""
    flag = [word for word in words.split(" ") if word.startswith("--")][-1]
    given = ["--out", str(tmp_path / "new"), "--device", "cpu", *words.split(" ")]
    with pytest.raises(ValueError, match=f"got .*{flag} .*expected") as e:
        train.main(train.parse(given))
    assert "\n" not in str(e.value) and not (tmp_path / "new").exists()


@pytest.mark.parametrize("name, value", [("trajectory_grid", 0), ("train_grid", 0), ("ema", float("nan")), ("keep", 0),
                                         ("clip_norm", float("nan")), ("dmd_betas", (float("nan"), 0.9))])
def test_numbers_that_cannot_be_without_a_flag(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"got .*{name.replace('_', '.')} .*expected"):
        train.main(config(tmp_path / "new", **{name: value}))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("words", ["--frames 1000000000", "--gpu-memory nan"])
def test_numbers_that_cannot_be_in_a_plan(words):
    with pytest.raises(ValueError, match=f"got .*{words.split()[0]} .*expected"):
        plan.main(*plan.parse(words.split()))


@pytest.mark.parametrize("words", ["--steps 100000000", "--shift inf", "--guidance nan", "--height 0", "--height -16",
                                   "--samples -1", "--seed -1", "--sink -1", "--frames 0", "--window 0"])
def test_numbers_that_cannot_be_in_sampling(tmp_path, student, words):
    with pytest.raises(ValueError, match=f"{words.split()[0]} "):
        sample.main(sample.parse(f"--device cpu --weights {student()} --out {tmp_path}/x.webp {words}".split()))


@pytest.mark.parametrize("words", [
    "tools.bench --device cuda", "tools.bench --out /proc/x.json", "tools.bench --out student.pt",
    "tools.bench --rounds 100000", "tools.bench --height 3 --size wan_tiny",
    "tools.encode_prompts p.txt o.safetensors --wan . --device cuda",
    "tools.prepare --videos . --captions c.csv --out o --wan . --device cuda",
    "tools.convert student.pt o --stage causal_cd --chunk 5", "tools.convert student.pt o --stage nonsense",
    "train.py --teacher-size wan1.3b --teacher-out .", "train.py --size nonsense", "train.py --size wan1.3b --height 0",
    "sample.py --weights . --prompt x", "sample.py --weights no.pt --out .", "train.py --stage evaluate --out nowhere"])
def test_commands_that_cannot_be(python, tmp_path, words):
    """Bug: a traceback; an error after the time that it took to get there; a file that was left."""
    net = CausalWan(dataclasses.replace(SIZES["wan_tiny"]))
    torch.save(net.init_weights(0).state_dict() if "student" in words else {}, tmp_path / "student.pt")
    before = sorted(tmp_path.iterdir())
    command, *flags = words.split()
    program = ["-m", command] if command.startswith("tools.") else [ROOT / command]
    ran = python(*program, *flags, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert ran.returncode == 1 and "Traceback" not in ran.stderr, ran.stderr
    assert ran.stderr.splitlines()[-1].startswith(("ValueError: got", "OSError: got")), ran.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_vbench_names_of_odd_prompts(tmp_path, student):
    """Bug: files without a name, in other folders, or with a newline in it; escapes that the terminal obeys."""
    for prompt in ("", "a\nb", "a\x1b[2Jb", "../up"):
        args = sample.parse(["--weights", str(student()), "--vbench", "--out", str(tmp_path / "v"), "--device", "cpu"])
        args = sample.with_defaults(args, wan21.weights.read_weights(args.weights)[1], "toy")
        with pytest.raises(ValueError, match="name of a file"):
            sample.samples_of(args, [prompt])
    assert files.printable("a\x1b[2J\tb\x9b") == "a\\x1b[2J\\tb\\x9b"


def test_a_huge_image(tmp_path):
    """Bug: half a gigabyte of memory for a file of a few kilobytes."""
    Image.new("1", (12_000, 12_000)).save(tmp_path / "huge.png")
    with pytest.raises(ValueError, match="huge.png, which cannot be read .*144 million pixels"):
        wan21.video.read(tmp_path / "huge.png")


@pytest.mark.parametrize("name, damage", [("00000.safetensors", lambda b: b[:-10]),
                                          ("00000.skipped.json", lambda b: b"[3")])
def test_a_damaged_shard_of_prepare(tmp_path, name, damage):
    """Bug: a truncated shard that counts as finished."""
    (tmp_path / name).write_bytes(b"")
    if name.endswith("safetensors"):
        latent_folder.write_shard(tmp_path / name, [{"text": torch.ones(1, 4), "caption": ""}])
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=f"{name}.*delete it"):
        prepare.finished(tmp_path, 0, [("a.mp4", "a")])


@pytest.mark.parametrize("command", ["train", "sample"])
def test_sigterm_ends_every_command_with_code_0(start, tmp_path, student, command):
    """Bug: a scheduler's SIGTERM outside of an update that ends in code -15, without a word of how to resume."""
    flags = [w for k, v in {**TINY, "bidirectional_steps": 1, "eval_clips": 100_000, "out": tmp_path / "run"}.items()
             for w in (f"--{k.replace('_', '-')}", str(v))]
    words = {"train": ["train.py", "--stage", "bidirectional", *flags],  # it will be measuring for long
             "sample": ["sample.py", "--weights", student(), "--prompt", "red ball", "--frames", 100_000, "--out",
                        tmp_path / "long.safetensors", "--device", "cpu"]}[command]
    run = start(ROOT / words[0], *words[1:])
    wait_for(run.out.read_text)  # the settings, or the steps: past the imports
    time.sleep(1.0)
    os.kill(run.pid, signal.SIGTERM)
    ended = run.ended()
    assert ended.returncode == 0 and ended.stderr.splitlines()[-1].startswith("stopped"), ended
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("error, said", [
    ("RuntimeError('mat1 and mat2 cannot be multiplied')", "unexpected RuntimeError: mat1 and mat2 cannot"),
    ("torch.OutOfMemoryError('CUDA out of memory. Tried')", "OutOfMemoryError: CUDA out of memory")])
def test_the_traceback_of_an_error_in_the_code_is_kept(python, tmp_path, error, said):
    """Bug: hours of a run, and then no word of the line where somebody's change has failed."""
    script = ("import torch\nfrom cluster.files import run_command\n"
              f"def my_change():\n    raise {error}\nrun_command(my_change, 'stopped')")
    ran = python("-c", script, TMPDIR=tmp_path)
    assert ran.returncode == 1 and ran.stderr.startswith(said) and len(ran.stderr.splitlines()) == 2
    if said.startswith("unexpected"):
        (kept,) = tmp_path.iterdir()
        assert str(kept) in ran.stderr and "in my_change" in kept.read_text()
