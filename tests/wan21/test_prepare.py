"""From videos to latents: every clip under its own caption, and the same bytes however often it was cut short."""

import json
import re
import signal
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import model
import stage
import wan21.text
import wan21.video
from cameras import ROW
from tools import prepare
from worlds import latent_folder
from worlds.draws import GROUPS, Draw

SHAPE, TEXT = (2, 4, 2, 2), (6, 3)  # of 5 frames of 16 x 16
HOW = dict(frames=5, height=16, width=16, shard=4, workers=2)


def prepared(videos, captions, out, encode_clip, encode_text, part=(0, 1), **how):
    """What the command does, without Wan."""
    words = ["--videos", videos, "--captions", captions, "--out", out, "--wan", "none", "--part", *part]
    words += [word for name, value in how.items() for word in (f"--{name}", value)]
    return prepare.prepare(prepare.parse(map(str, words)), encode_clip, encode_text)


def encode_clip(pixels):
    """Fake latents that tell the clip: its mean brightness, and how it changes."""
    x = torch.from_numpy(pixels).float().mean((1, 2, 3))
    return (torch.stack([x[0], x[-1]])[:, None, None, None] / 256).expand(SHAPE).clone()


def encode_text(caption):
    """Fake text that tells the caption."""
    return torch.tensor([list(caption.encode()[-3:])] * (len(caption) % TEXT[0] + 1)).float()


def clip(folder, name, level, n=5, size=16):
    """A folder of n pictures; the brightness of frame j is level + j."""
    (folder / name).mkdir(parents=True)
    for j in range(n):
        Image.new("L", (size, size), level + j).save(folder / name / f"{j}.png")


def captions(path, rows):
    path.write_text("video,caption\n" + "".join(f'{name},"{caption}"\n' for name, caption in rows))
    return path


@pytest.fixture
def films(tmp_path):
    """films(n): a folder of n clips and its captions, both for `prepare`; a second call adds the rest."""
    def make(n):
        folder = tmp_path / "films"
        for i in range(n):
            if not (folder / f"v{i}").exists():
                clip(folder, f"v{i}", 10 * i)
        return folder, captions(tmp_path / "captions.csv", [(f"v{i}", f"clip {i:03d}") for i in range(n)])
    return make


def files(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def pairs(folder):
    """{caption: (brightness of the first frame, last three letters of the caption that the text was made of)}"""
    stored = latent_folder.LatentFolder(folder, SHAPE, TEXT)
    x0, text = stored.clips(range(len(stored)), 0)
    order = latent_folder.permutation(len(stored), 0, 0).tolist()
    return {stored.captions[i]: (round(256 * x[0, 0, 0, 0].item()), bytes(t[0].int().tolist()).decode())
            for i, x, t in zip(order, x0, text)}


def test_every_clip_has_its_caption(tmp_path, films):
    """Bug: clips and captions shifted against each other, a folder that training does not read, text in float32."""
    counts = prepared(*films(10), tmp_path / "out", encode_clip, encode_text, **HOW)
    assert counts == {"clips": 10}
    assert pairs(tmp_path / "out") == {f"clip {i:03d}": (10 * i, f"{i:03d}") for i in range(10)}
    assert set(files(tmp_path / "out")) == {f"0000{k}.safetensors" for k in range(3)} | {
        "null.safetensors", "empty.safetensors", "prepare.json"}
    with safe_open(tmp_path / "out" / "00000.safetensors", "pt") as f:
        assert {f.get_slice(name).get_dtype() for name in f.keys()} == {"BF16"}
        assert len(f.keys()) == 8
    with safe_open(tmp_path / "out" / "null.safetensors", "pt") as f:
        assert torch.equal(f.get_tensor("text"), encode_text(wan21.text.NEGATIVE_PROMPT).bfloat16())
    with safe_open(tmp_path / "out" / "empty.safetensors", "pt") as f:
        assert torch.equal(f.get_tensor("text"), encode_text("").bfloat16())


def test_training_reads_it(tmp_path, films, monkeypatch):
    """Bug: a folder that LatentFolder reads and train.py does not."""
    prepared(*films(3), tmp_path / "out", encode_clip, encode_text, **HOW)
    config = model.WanConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=2, in_dim=4, text_dim=3, text_len=6)
    monkeypatch.setitem(model.SIZES, "small", config)
    cfg = SimpleNamespace(size="small", frames=2, height=2, width=2, data=str(tmp_path / "out"), bad_data="stop",
                          world="", seed=0, batch=2, prompt_dropout=0, row_dropout=0, device="cpu")
    source = stage.source_of(cfg)
    x0, text = Draw(cfg, source, GROUPS[0], 0, slice(None)).clips()
    assert x0.shape == (2, *SHAPE) and text.shape == (2, *TEXT)
    assert source.null_text[0].tolist() == list(wan21.text.NEGATIVE_PROMPT.encode()[-3:])


KILLED = """
import os, signal
import conftest  # which knows the tests' folders
from cluster import files
from test_prepare import HOW, encode_clip, encode_text, prepared

def killed(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def encode(pixels, seen=[]):
    seen.append(1)
    return killed() if len(seen) == {clip} else encode_clip(pixels)

if not {clip}:
    save_file, files.save_file = files.save_file, lambda x, path, about: (
        killed(open(path, "wb").write(b"half a file")) if "00001" in str(path) else save_file(x, path, about))
prepared({videos!r}, {captions!r}, {out!r}, encode, encode_text, **HOW)
"""


@pytest.mark.parametrize("at", [7, 0], ids=["encoding", "writing"])
def test_killed_and_run_again(python, tmp_path, films, at):
    """Bug: a half shard that counts as finished, finished shards made again, clips lost or doubled by a kill -9."""
    where = films(10)
    (where[0] / "v5" / "4.png").unlink()  # one too short, in the shard that is killed
    prepared(*where, tmp_path / "straight", encode_clip, encode_text, **HOW)
    script = KILLED.format(clip=at, videos=str(where[0]), captions=str(where[1]), out=str(tmp_path / "out"))
    done = python("-c", script)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "out" / "00000.safetensors").exists()
    assert not (tmp_path / "out" / "00001.safetensors").exists()
    encoded = []
    prepared(*where, tmp_path / "out", lambda x: encoded.append(1) or encode_clip(x), encode_text, **HOW)
    assert len(encoded) == 5  # of shards 1 and 2; shard 0 stays
    assert files(tmp_path / "out") == files(tmp_path / "straight")


def test_a_second_run_has_nothing_to_do(tmp_path, films, capsys):
    """Bug: bad clips tried again each time, a shard without a good one tried for ever, encoders loaded for nothing."""
    where = films(9)
    for i in (1, 8):
        (where[0] / f"v{i}" / "4.png").unlink()  # v8 is all of the last shard
    first = prepared(*where, tmp_path / "out", encode_clip, encode_text, **HOW)
    assert first == {"clips": 7, "too short": 2} and not (tmp_path / "out" / "00002.safetensors").exists()
    before = files(tmp_path / "out")
    assert prepared(*where, tmp_path / "out", None, None, **HOW) == first
    assert files(tmp_path / "out") == before
    assert "7 clips in 2 shards, skipped: 2 too short" in capsys.readouterr().out


def test_new_videos_make_new_shards(tmp_path, films):
    """Bug: a new video that is never encoded, that moves the others to other shards, or that doubles them."""
    prepared(*films(6), tmp_path / "out", encode_clip, encode_text, **HOW)
    before = files(tmp_path / "out")
    counts = prepared(*films(9), tmp_path / "out", encode_clip, encode_text, **HOW)
    after = files(tmp_path / "out")
    assert counts["clips"] == 9 and set(after) - set(before) == {"00002.safetensors"}
    assert all(after[name] == before[name] for name in before if name != "prepare.json")
    assert pairs(tmp_path / "out") == {f"clip {i:03d}": (10 * i, f"{i:03d}") for i in range(9)}


@pytest.mark.parametrize("name, value", [("frames", 1), ("height", 32), ("width", 32), ("fps", 8), ("shard", 5)])
def test_other_settings_are_refused(tmp_path, films, name, value):
    """Bug: clips of two sizes, lengths or speeds in one folder."""
    where = films(2)
    prepared(*where, tmp_path / "out", encode_clip, encode_text, **HOW)
    before = files(tmp_path / "out")
    with pytest.raises(ValueError, match=f"got --{name} {value}.*, as in .*another --out"):
        prepared(*where, tmp_path / "out", encode_clip, encode_text, **HOW | {name: value})
    assert files(tmp_path / "out") == before


def test_parts_make_the_whole(tmp_path, films):
    """Bug: a shard that no part makes, or that depends on which part makes it."""
    where = films(14)
    prepared(*where, tmp_path / "whole", encode_clip, encode_text, **HOW)
    made = []
    for part in ((1, 2), (0, 2)):
        before = files(tmp_path / "out") if made else {}
        made.append(prepared(*where, tmp_path / "out", encode_clip, encode_text, **HOW, part=part)["clips"])
        after = files(tmp_path / "out")
        assert all(after[name] == before[name] for name in before)
    assert made == [6, 8] and files(tmp_path / "out") == files(tmp_path / "whole")
    with pytest.raises(ValueError, match="--part .*from 0 to N - 1"):
        prepared(*where, tmp_path / "out", encode_clip, encode_text, **HOW, part=(2, 2))


def test_a_part_without_a_good_clip_does_not_stop(tmp_path, films):
    """Bug: one GPU's process fails since its few clips are bad, though the others' are good, or fails for none."""
    where = films(8)
    for i in range(4):
        (where[0] / f"v{i}" / "4.png").unlink()
    assert prepared(*where, tmp_path / "out", encode_clip, encode_text, **HOW, part=(0, 2)) == {
        "too short": 4, "clips": 0}
    assert prepared(*where, tmp_path / "out", encode_clip, encode_text, **HOW, part=(1, 2)) == {"clips": 4}
    assert prepared(*where, tmp_path / "out", encode_clip, encode_text, **HOW, part=(2, 3)) == {"clips": 0}


def test_workers_keep_the_order(tmp_path, films, monkeypatch):
    """Bug: clips in the order in which they happen to be read; a folder's worth of videos read at once."""
    where, read, held, most = films(12), wan21.video.read, [], []
    lock = threading.Lock()

    def slow(path, **how):
        time.sleep(0.03 * (int(path.name[1:]) % 3 == 0))
        with lock:
            held.append(path)
            most.append(len(held))
        return read(path, **how)

    def encode(pixels):
        time.sleep(0.01)
        with lock:
            held.pop()
        return encode_clip(pixels)

    prepared(*where, tmp_path / "one", encode_clip, encode_text, **HOW | {"workers": 1})
    monkeypatch.setattr(wan21.video, "read", slow)
    prepared(*where, tmp_path / "out", encode, encode_text, **HOW | {"workers": 3})
    assert files(tmp_path / "out") == files(tmp_path / "one") and 3 <= max(most) <= 5


def test_bad_inputs_are_named_counted_and_left_out(tmp_path, films, capsys):
    """Bug: one bad file of a hundred thousand ends the run, or vanishes without a word."""
    where = films(3)
    clip(where[0], "short", 100, n=4)
    (where[0] / "broken.png").write_text("no picture")
    (where[0] / "empty").mkdir()
    clip(where[0], "nan", 200)
    clip(where[0], "deep/er", 100)
    clip(where[0], "silent", 100)
    with open(where[1], "a") as f:
        f.write("short,a\nbroken.png,b\nempty,c\nnan,d\nlost,e\nsilent,\n")
        f.write("./deep/er,a dinner\n" * 2)

    def encode(pixels):
        return encode_clip(pixels) * (np.nan if pixels[0, 0, 0, 0] == 200 else 1)

    counts = prepared(*where, tmp_path / "out", encode, encode_text, **HOW)
    assert counts == {"clips": 4, "too short": 1, "unreadable": 2, "not finite": 1}
    assert set(pairs(tmp_path / "out")) == {"clip 000", "clip 001", "clip 002", "a dinner"}
    out, err = capsys.readouterr()
    assert "1 x video without a caption: silent" in err
    assert "1 x caption without a video: lost" in err
    for line in ("(too short): short: got ", "(unreadable): broken.png: got ", "(unreadable): empty: got ",
                 "(not finite): nan: "):
        assert f"skipped {line}" in err
    assert "skipped: 1 not finite, 1 too short, 2 unreadable" in out
    kept = [x for file in (tmp_path / "out").glob("*.skipped.json") for x in json.loads(file.read_text())]
    assert sorted(name for name, _, _ in kept) == ["broken.png", "empty", "nan", "short"]


def test_nothing_of_use(tmp_path, films):
    """Bug: an empty folder that looks like a success; hours of work for captions that all fail the same way."""
    where = films(2)
    with pytest.raises(ValueError, match="only clips that were skipped .2 too short.*--frames"):
        prepared(*where, tmp_path / "a", encode_clip, encode_text, **HOW | {"frames": 9})
    with pytest.raises(ValueError, match="only clips that were skipped"):  # and again
        prepared(*where, tmp_path / "a", encode_clip, encode_text, **HOW | {"frames": 9})

    with pytest.raises(ValueError, match="no video in .* with a caption.*--videos or --captions"):
        prepared(where[0], captions(tmp_path / "none.csv", [("x", "y")]), tmp_path / "c", None, None, **HOW)
    with pytest.raises(ValueError, match="no folder .*--videos"):
        prepared(tmp_path / "none", where[1], tmp_path / "c", None, None, **HOW)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("how, said", [
    (dict(frames=8), "--frames 8, expected 4 k . 1"),
    (dict(height=24), "--height 24, --width 16, expected multiples of 16"),
    (dict(workers=0), "--workers 0, expected more than 0"),
])
def test_settings_that_the_vae_cannot_take(tmp_path, films, how, said):
    """Bug: frames that the VAE drops in silence, latents that the network cannot cut into patches."""
    with pytest.raises(ValueError, match=said):
        prepared(*films(1), tmp_path / "out", encode_clip, encode_text, **HOW | how)


def test_a_folder_of_others_stays_as_it_is(tmp_path, films):
    """Bug: shards of another making mixed with new ones; a damaged list taken for an empty one."""
    where = films(2)
    latent_folder.write_shard(tmp_path / "out" / "mine.safetensors", [{"text": torch.zeros(TEXT), "caption": "x"}])
    with pytest.raises(ValueError, match="with latents but without prepare.json.*--out"):
        prepared(*where, tmp_path / "out", encode_clip, encode_text, **HOW)
    prepared(*where, tmp_path / "b", encode_clip, encode_text, **HOW)
    (tmp_path / "b" / "prepare.json").write_text('{"settings": {}')
    with pytest.raises(ValueError, match="prepare.json, which cannot be read"):
        prepared(*where, tmp_path / "b", encode_clip, encode_text, **HOW)
    assert (tmp_path / "b" / "prepare.json").read_text() == '{"settings": {}'


def test_a_deleted_shard_is_made_again(tmp_path, films):
    """Bug: a repaired video stays on the list of the bad ones."""
    where = films(3)
    (where[0] / "v1" / "4.png").unlink()
    prepared(*where, tmp_path / "out", encode_clip, encode_text, **HOW)
    Image.new("L", (16, 16), 14).save(where[0] / "v1" / "4.png")
    (tmp_path / "out" / "00000.safetensors").unlink()
    assert prepared(*where, tmp_path / "out", encode_clip, encode_text, **HOW) == {"clips": 3}
    assert not list((tmp_path / "out").glob("*.skipped.json")) and len(pairs(tmp_path / "out")) == 3


def test_a_null_that_is_there_is_kept(tmp_path, films):
    """Bug: another negative prompt, written beforehand, is overwritten."""
    latent_folder.write_null(tmp_path / "out" / "null.safetensors", torch.ones(2, 3))
    prepared(*films(1), tmp_path / "out", encode_clip, encode_text, **HOW)
    assert latent_folder.LatentFolder(tmp_path / "out", SHAPE, TEXT).null_text.sum() == 6


def test_without_av_nothing_is_skipped(tmp_path, films, monkeypatch):
    """Bug: a missing package marks every video as unreadable, for good."""
    where = films(1)
    (where[0] / "a.mp4").touch()
    with open(where[1], "a") as f:
        f.write("a.mp4,a movie\n")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match="no package av.*requirements-wan.txt"):
        prepared(*where, tmp_path / "out", encode_clip, encode_text, **HOW)
    assert not list((tmp_path / "out").glob("0*"))


def test_captions_in_every_format(tmp_path):
    """Bug: commas and line breaks within a caption, a byte order mark, rare line breaks in JSON; a row without a video
    that shifts the others."""
    want = [("a.mp4", 'a "big", red cat'), ("b/c.mp4", "two\nlines"), ("d.mp4", "sep\u2028arated")]
    (tmp_path / "a.csv").write_text('\ufeffvideo,n,caption\na.mp4,1,"a ""big"", red cat"\n./b/c.mp4,2,"two\nlines"\n '
                                    'd.mp4,3,sep\u2028arated\n', encoding="utf-8")
    lines = [json.dumps({"video": v, "caption": c}, ensure_ascii=False) for v, c in want]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    for name in ("a.csv", "a.jsonl"):
        assert prepare.read_captions(tmp_path / name) == want, name
    for name, content in (("b.csv", "file,text\na.mp4,x\n"), ("b.jsonl", '{"video": "a.mp4", "caption": "x"}\n{"video'),
                          ("c.jsonl", '{"video": "a.mp4", "caption": "x"}\n{"caption": "x"}')):
        (tmp_path / name).write_text(content)
        row = 1 if name == "b.csv" else 2
        with pytest.raises(ValueError, match=f"{name}, which cannot be read at row {row} .*--captions"):
            prepare.read_captions(tmp_path / name)
    (tmp_path / "d.csv").write_bytes(b"video,caption\na.mp4,\xff\xfe\n")
    for name in ("d.csv", "none.csv", "a.txt"):
        with pytest.raises(ValueError, match=f"{name}.*--captions"):
            prepare.read_captions(tmp_path / name)


def test_many_names_are_not_all_printed(tmp_path, films, capsys):
    """Bug: a list of captions of which few videos are there floods the terminal."""
    where = films(1)
    with open(where[1], "a") as f:
        f.writelines(f"lost{i},x\n" for i in range(30))
    prepared(*where, tmp_path / "out", encode_clip, encode_text, **HOW)
    err = capsys.readouterr().err
    assert "30 x caption without a video: lost0, lost1, lost2, " in err and "lost19 ..." in err


# -- cameras ----------------------------------------------------------------------------------------------------------

def walk(n, start=0):
    """World-to-camera matrices of n frames, float64 `n 4 4`: frame j is turned by j / 10 about the axis y and stands at
    (start + j, 0, 2 j)."""
    angle = torch.arange(n).double() / 10
    made = torch.eye(4).double().repeat(n, 1, 1)
    made[:, 0, 0] = made[:, 2, 2] = angle.cos()
    made[:, 0, 2], made[:, 2, 0] = angle.sin(), -angle.sin()
    at = torch.stack([start + torch.arange(n), torch.zeros(n), 2 * torch.arange(n)], 1).double()
    made[:, :3, 3:] = -made[:, :3, :3] @ at[..., None]
    return made


def intrinsics(fx, fy):
    return torch.tensor([[fx, 0, 0.5], [0, fy, 0.5], [0, 0, 1]]).double()


def write_cameras(path, viewmats, Ks):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, viewmats=viewmats.numpy(), Ks=Ks.numpy(), frames=3)
    else:
        save_file({"viewmats": viewmats.contiguous(), "Ks": Ks.contiguous()}, path)


def walked(path, rows):
    path.write_text("video,caption,cameras\n" + "".join(",".join(row) + "\n" for row in rows))
    return path


NINE = HOW | {"frames": 9}  # of which three latents are made


def encode_three(pixels):
    return torch.zeros(3, *SHAPE[1:]) + pixels[0, 0, 0, 0] / 256


def test_a_latent_frame_has_the_camera_of_its_last_frame(tmp_path):
    """Bug: the cameras of frames 0, 1, 2 or of every third one; poses relative to the origin of the world, or turned
    the wrong way; another clip's cameras; a world too large for float32; one K for all frames that
    is taken for one frame's; cameras that training does not get."""
    films, files_of = tmp_path / "films", ("v0.npz", "deep/v1.safetensors")
    for i, start, Ks in ((0, 0, intrinsics(0.6, 1.2)), (1, 10**7, intrinsics(0.6, 1.2).repeat(11, 1, 1))):
        clip(films, f"v{i}", 50 * i, n=11)
        Ks[..., 0, 0] += i
        write_cameras(films / files_of[i], walk(11, start), Ks)
    where = walked(tmp_path / "a.csv", [(f"v{i}", f"clip {i:03d}", files_of[i]) for i in (0, 1)])
    assert prepared(films, where, tmp_path / "out", encode_three, encode_text, **NINE) == {"clips": 2}
    with safe_open(tmp_path / "out" / "00000.safetensors", "pt") as f:
        for i in range(2):
            assert f.get_tensor(f"{i}.latents")[0, 0, 0, 0] == 50 * i / 256
            got, want = f.get_tensor(f"{i}.viewmats"), torch.stack([
                walk(9)[j] @ torch.linalg.inv(walk(9)[0]) for j in (0, 4, 8)])
            assert got.dtype == torch.float32 and torch.equal(got[0], torch.eye(4))
            assert torch.allclose(got.double(), want, atol=1e-5)
            assert torch.allclose(f.get_tensor(f"{i}.Ks").double(), intrinsics(0.6 + i, 1.2).repeat(3, 1, 1))
    source = stage.open_source(str(tmp_path / "out"), "", (3, *SHAPE[1:]), TEXT, ROW)
    rows = source.clips([0], 0)[1].rows
    assert torch.allclose(rows[0, 2, :16].view(4, 4).double(), want[2], atol=1e-5) and rows.shape == (1, 3, ROW)
    assert prepared(films, where, tmp_path / "out", None, None, **NINE) == {"clips": 2}  # nothing to do


@pytest.mark.parametrize("w, h, fx, fy", [(16, 16, 0.5, 0.5), (32, 16, 1.0, 0.5), (64, 32, 1.0, 0.5),
                                          (16, 24, 0.5, 0.75)])
def test_focal_lengths_are_those_of_what_is_left_of_a_frame(tmp_path, w, h, fx, fy):
    """Bug: a focal length in widths of the whole frame, of which only the middle is left; both corrected where one side
    is cut, or for a scale without a cut."""
    films = tmp_path / "films"
    for j in range(5):
        (films / "v").mkdir(parents=True, exist_ok=True)
        Image.new("L", (w, h), j).save(films / "v" / f"{j}.png")
    write_cameras(films / "v.npz", walk(5), intrinsics(0.5, 0.5))
    where = walked(tmp_path / "a.csv", [("v", "clip 000", "v.npz")])
    prepared(films, where, tmp_path / "out", encode_clip, encode_text, **HOW)
    with safe_open(tmp_path / "out" / "00000.safetensors", "pt") as f:
        assert torch.allclose(f.get_tensor("0.Ks"), intrinsics(fx, fy).float().repeat(2, 1, 1))


def test_bad_cameras_are_named_counted_and_left_out(tmp_path, capsys):
    """Bug: a video that is trained with another's cameras, with none, with a wrong matrix's; one bad file that ends the
    run."""
    films, rows = tmp_path / "films", []
    viewmats, Ks, bad = walk(5), intrinsics(0.5, 0.5), {
        "good": lambda v, K: (v, K), "few": lambda v, K: (v[:4], K), "few_Ks": lambda v, K: (v, K.repeat(4, 1, 1)),
        "scaled": lambda v, K: (v * torch.tensor([2, 2, 2, 1]).double(), K), "pixels": lambda v, K: (v, K * 500),
        "transposed": lambda v, K: (v.mT, K), "nan": lambda v, K: (v + float("nan"), K),
        "row": lambda v, K: (v[:, :3], K)}
    for i, (name, change) in enumerate(bad.items()):
        clip(films, name, 10 * i)
        write_cameras(films / f"{name}.npz", *change(viewmats, Ks))
        rows.append((name, f"clip {i:03d}", f"{name}.npz"))
    for name, cameras in (("broken", "broken.npz"), ("other", "other.safetensors"), ("none", ""), ("lost", "lost.npz"),
                          ("rate", "rate.npz")):
        clip(films, name, 10)
        rows.append((name, "a", cameras))
    (films / "broken.npz").write_text("no cameras")
    save_file({"viewmats": viewmats}, films / "other.safetensors")
    np.savez(films / "rate.npz", viewmats=viewmats.repeat(2, 1, 1).numpy(), Ks=Ks.numpy(), fps=30)
    counts = prepared(films, walked(tmp_path / "a.csv", rows), tmp_path / "out", encode_clip, encode_text, **HOW)
    assert counts == {"clips": 1, "bad cameras": 10} and set(pairs(tmp_path / "out")) == {"clip 000"}
    err = capsys.readouterr().err
    assert "1 x video without cameras: none" in err and "1 x file of cameras that is not there: lost" in err
    for line in ("few: got .*few.npz, .* cameras of 4 frames", "few_Ks: .*", "scaled: .*not rigid", "pixels: .*focal",
                 "transposed: .*not rigid", "nan: .*non-finite", "row: .*shapes .*5, 3, 4", "broken: .*broken.npz",
                 "other: .*Ks", "rate: .* 30 frames a second"):
        assert re.search(rf"skipped \(bad cameras\): {line}", err), line


def test_all_clips_of_a_folder_have_cameras_or_none(tmp_path, films):
    """Bug: a folder that training refuses, found after hours of encoding."""
    folder, where = films(2)
    for i in range(3):
        write_cameras(folder / f"v{i}.npz", walk(5), intrinsics(0.5, 0.5))
    rows = [(f"v{i}", f"clip {i:03d}", f"v{i}.npz") for i in range(2)]
    prepared(folder, where, tmp_path / "out", encode_clip, encode_text, **HOW)
    prepared(folder, walked(tmp_path / "b.csv", rows), tmp_path / "with", encode_clip, encode_text, **HOW)
    for out, captions_of, said in (("out", tmp_path / "b.csv", "with"), ("with", where, "without")):
        before = files(tmp_path / out)
        with pytest.raises(ValueError, match=f".csv {said} cameras, expected .*{out}, .*--captions or --out"):
            prepared(folder, captions_of, tmp_path / out, encode_clip, encode_text, **HOW)
        assert files(tmp_path / out) == before
    films(3)
    walked(tmp_path / "b.csv", [*rows, ("v2", "clip 002", "v2.npz")])
    assert prepared(folder, tmp_path / "b.csv", tmp_path / "with", encode_clip, encode_text, **HOW) == {"clips": 3}


def test_the_column_of_cameras(tmp_path):
    """Bug: a file outside --videos; a column of nothing taken for cameras; a number for a name."""
    (tmp_path / "a.csv").write_text("cameras,video,caption\n a.npz,a.mp4,x\n,b.mp4,y\n")
    (tmp_path / "a.jsonl").write_text('{"video": "a.mp4", "caption": "x", "cameras": "./a.npz"}\n'
                                      '{"video": "b.mp4", "caption": "y"}')
    for name in ("a.csv", "a.jsonl"):
        assert prepare.read_captions(tmp_path / name) == [("a.mp4", "x", "a.npz"), ("b.mp4", "y", "")]
    (tmp_path / "b.csv").write_text("video,caption,cameras\na.mp4,x,\n")
    assert prepare.read_captions(tmp_path / "b.csv") == [("a.mp4", "x")]
    for cameras in ("../a.npz", "/a.npz", 3):
        (tmp_path / "c.jsonl").write_text(json.dumps({"video": "a.mp4", "caption": "x", "cameras": cameras}))
        with pytest.raises(ValueError, match="c.jsonl, which cannot be read at row 1 .*--captions"):
            prepare.read_captions(tmp_path / "c.jsonl")
    (tmp_path / "d.jsonl").write_text('{"video": "a.mp4", "cameras": "a.npz"}')
    with pytest.raises(ValueError, match="d.jsonl, which cannot be read at row 1"):
        prepare.read_captions(tmp_path / "d.jsonl")


class Encoder:
    """Text that tells a clip's number, the negative prompt and the empty one."""

    def encode(self, prompts):
        (prompt,) = prompts
        return [torch.tensor([[float(prompt[-3:]) if prompt.startswith("clip") else 0.0,
                               float(prompt == wan21.text.NEGATIVE_PROMPT), float(prompt == "")]])]


def test_with_wans_vae(tmp_path, films, monkeypatch):
    """Bug: pixels given to the VAE in another order or range, latents not normalised, texts given to other clips."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    vae.save_pretrained(tmp_path / "wan" / "vae")
    where = films(3)
    Image.new("RGB", (16, 16), (250, 90, 10)).save(where[0] / "v2" / "0.png")
    captions(where[1], [("v0", "clip 000"), ("v2", "clip\n002"), ("v1", "")])
    monkeypatch.setattr(wan21.text, "load_text_encoder", lambda *_: Encoder())
    words = ["--videos", str(where[0]), "--captions", str(where[1]), "--out", str(tmp_path / "out"), "--wan",
             str(tmp_path / "wan"), "--frames", "5", "--height", "16", "--width", "16", "--device", "cpu"]
    assert prepare.main(words) == {"clips": 2}
    with safe_open(tmp_path / "out" / "00000.safetensors", "pt") as f:
        for i in range(2):
            x = torch.from_numpy(wan21.video.read(where[0] / f"v{2 * i}")).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
            mean = torch.tensor(vae.config.latents_mean).view(1, 16, 1, 1, 1)
            std = torch.tensor(vae.config.latents_std).view(1, 16, 1, 1, 1)
            with torch.no_grad():
                want = (vae.eval().encode(x).latent_dist.mode() - mean) / std
            got = f.get_tensor(f"{i}.latents")
            assert torch.allclose(got.float(), want[0].transpose(0, 1), atol=0.02) and got.shape == (2, 16, 2, 2)
            assert f.get_tensor(f"{i}.text").tolist() == [[2 * i, 0, 0]]
    folder = latent_folder.LatentFolder(tmp_path / "out", (2, 16, 2, 2), (1, 3))
    assert folder.null_text.tolist() == [[0, 1, 0]] and folder.empty_text.tolist() == [[0, 0, 1]]
