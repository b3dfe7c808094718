"""Latent folders: every sample comes back exactly, in an order known in advance, and no damage gets through."""

import json
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from cameras import ROW
from cluster import files
from cluster.files import write_tensors
from config import Config
from flowmap import Condition
from worlds import draws, latent_folder, sources

SHAPE, TEXT = (4, 2, 3, 5), (6, 7)  # f c h w, l d
COUNTS = (5, 4, 3)  # samples in the shards a, b and c


def sample(i, frames=4, dtype=torch.float32):
    """Random latents and text, with the number i as the first value of both."""
    shapes = (frames, *SHAPE[1:]), (i % TEXT[0] + 1, TEXT[1])
    x0, text = (draws.noises([i], shape, 1)[0].to(dtype) for shape in shapes)
    x0[0, 0, 0, 0] = text[0, 0] = i
    return {"latents": x0, "text": text, "caption": f"clip {i}"}


def write(path, change=lambda i, s: s, counts=COUNTS, **how):
    """A folder of samples 0, 1, ..., each passed through `change`; returns the samples."""
    made = [change(i, sample(i, **how)) for i in range(sum(counts))]
    rest = list(made)
    for name, n in zip("abc", counts):
        latent_folder.write_shard(path / f"{name}.safetensors", rest[:n])
        rest = rest[n:]
    return made


def camera(i, frames=4):
    """Cameras of sample i: random turns, translations and focal lengths."""
    turn = torch.linalg.qr(draws.noises([i], (frames, 3, 3), 2)[0])[0]
    viewmats, Ks = torch.eye(4).repeat(frames, 1, 1), torch.eye(3).repeat(frames, 1, 1)
    viewmats[:, :3, :3] = turn * torch.linalg.det(turn)[:, None, None]
    viewmats[:, :3, 3] = draws.noises([i], (frames, 3), 3)[0]
    Ks[:, (0, 1), (0, 1)] = 0.3 + draws.noises([i], (frames, 2), 4)[0].abs()
    Ks[:, :2, 2] = 0.5
    return {"viewmats": viewmats, "Ks": Ks}


def numbers(x):
    return x.flatten(1)[:, 0].int().tolist()


def flip(path, tensor):
    """Change one bit of a tensor's last value; the file stays well-formed."""
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    end = json.loads(content[8:8 + header])[tensor]["data_offsets"][1]
    content[8 + header + end - 3] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def prompt(i, s):
    return {k: v for k, v in s.items() if k != "latents"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_round_trip(tmp_path, dtype):
    """Bug: rounding, frames or texts of another sample, padding that is not zero, a transposed or a shared tensor."""
    def awkward(i, s):  # a view, one in another memory order, and one text for two clips
        turned = s["latents"].transpose(-1, -2).contiguous().transpose(-1, -2)
        return s | {"latents": turned, "text": text if i in (1, 2) else s["text"]}

    text = torch.arange(42.0).view(TEXT).to(dtype)[1:4]
    made = write(tmp_path, awkward, dtype=dtype)
    folder = latent_folder.LatentFolder(tmp_path, SHAPE, TEXT)
    assert len(folder) == 12 and folder.has_latents and folder.captions == [f"clip {i}" for i in range(12)]
    x0, padded = folder.clips(range(12), 3)
    assert x0.dtype == padded.dtype == torch.float32 and x0.shape == (12, *SHAPE) and padded.shape == (12, *TEXT)
    assert torch.equal(folder.texts(range(12), 3), padded)
    for i, got_x0, got_text in zip(numbers(x0), x0, padded):
        want, n = made[i], len(made[i]["text"])
        assert torch.equal(got_x0, want["latents"].float())
        assert torch.equal(got_text[:n], want["text"].float()) and (got_text[n:] == 0).all()


def test_format_is_the_documented_one(tmp_path):
    """Bug: write_shard and LatentFolder agree with each other, but not with the docstring that converters follow."""
    made = [sample(i, dtype=torch.float16) for i in range(2)]
    crc = [zlib.crc32(s["latents"].numpy().tobytes() + s["text"].numpy().tobytes()) for s in made]
    tensors = {f"{i}.{kind}": s[kind] for i, s in enumerate(made) for kind in ("latents", "text")}
    about = {"captions": ["clip 0", "clip 1"], "crc32": crc}
    save_file(tensors, tmp_path / "other.safetensors", {"about": json.dumps(about)})
    x0, _ = latent_folder.LatentFolder(tmp_path, SHAPE, TEXT).clips(range(2), 0)
    assert sorted(numbers(x0)) == [0, 1]
    latent_folder.write_shard(tmp_path / "ours.safetensors", made)
    ours = load_file(tmp_path / "ours.safetensors")
    assert ours.keys() == tensors.keys() and all(torch.equal(ours[k], tensors[k]) for k in ours)
    with latent_folder.safe_open(tmp_path / "ours.safetensors", "pt") as f:
        assert json.loads(f.metadata()["about"]) == about


def test_an_epoch_is_a_permutation(tmp_path):
    """Bug: drawing with replacement, one order for all epochs or all seeds, or the order of the disk."""
    write(tmp_path)
    folder = latent_folder.LatentFolder(tmp_path, SHAPE, TEXT)
    orders = [numbers(folder.texts(range(12 * e, 12 * e + 12), *key)) for e in range(3) for key in ((0,), (1,), (0, 0))]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len({tuple(order) for order in orders + [list(range(12))]}) == 10
    assert numbers(folder.clips(range(6, 18), 0)[0]) == orders[0][6:] + orders[3][:6]  # across the end of an epoch


def test_ranks_share_no_sample(tmp_path):
    """Bug: ranks that shuffle for themselves, so that some samples come twice in an epoch and others never."""
    write(tmp_path)
    seen = []
    for rank in range(3):
        folder = latent_folder.LatentFolder(tmp_path, SHAPE, TEXT)  # each rank opens its own
        seen.append([i for step in range(2) for i in
                     numbers(folder.clips(range(step * 6 + rank * 2, step * 6 + rank * 2 + 2), 5)[0])])
    assert sorted(sum(seen, [])) == list(range(12))


def test_resume_in_an_epoch_equals_straight(tmp_path):
    """Bug: an order that depends on what was drawn before, so that a resumed run sees other samples."""
    write(tmp_path)
    straight = latent_folder.LatentFolder(tmp_path, SHAPE, TEXT)
    want = [straight.clips(range(5 * step, 5 * step + 5), 7) for step in range(8)]
    resumed = latent_folder.LatentFolder(tmp_path, SHAPE, TEXT)
    for step in (4, 5, 6, 7, 1):
        torch.rand(3)  # what else a run draws
        resumed.texts([100], 8)
        got = resumed.clips(torch.arange(5 * step, 5 * step + 5), 7)
        assert all(torch.equal(a, b) for a, b in zip(got, want[step]))


@pytest.mark.parametrize("kind, stored, message", [
    ("latents", torch.zeros(3, 2, 3, 5), r"shape \(3, 2, 3, 5\), expected \(4, 2, 3, 5\) or longer: change --frames"),
    ("latents", torch.zeros(4, 3, 3, 5), r"shape .* expected .* change .*--size"),
    ("latents", torch.zeros(4, 2, 4, 5), r"shape .* expected .* change .*--height"),
    ("latents", torch.zeros(4, 2, 3, 6), r"shape .* expected .* change .*--width"),
    ("latents", torch.zeros(2, 4, 3, 5), r"shape .* expected .* change"),
    ("latents", torch.zeros(1, 4, 2, 3, 5), r"shape .* expected .* change .*--data"),
    ("latents", torch.zeros(4, 2, 3, 5).byte(), "dtype U8, expected one of .*BF16.*: change --data"),
    ("text", torch.zeros(7, 7), r"shape \(7, 7\), expected \(6, 7\) or shorter: change --size or --data"),
    ("text", torch.zeros(6, 8), r"shape \(6, 8\), expected \(6, 7\) or shorter: change --size or --data"),
    ("text", torch.zeros(7), r"shape \(7,\), expected"),
    ("text", torch.tensor(1.0), r"shape \(\), expected"),
    ("text", torch.zeros(6, 7).long(), "dtype I64, expected one of"),
])
@pytest.mark.parametrize("on_bad", ["stop", "skip"])
def test_what_does_not_fit_is_named_at_opening(tmp_path, kind, stored, message, on_bad):
    """Bug: a wrong size found hours later, taken for damage and skipped, or broadcast without a word."""
    write(tmp_path, lambda i, s: s | {kind: stored} if i == 7 else s)
    with pytest.raises(ValueError, match=rf"{kind} of sample 2 in \S*b.safetensors of {message}"):
        latent_folder.LatentFolder(tmp_path, SHAPE, TEXT, on_bad)


def test_longer_clips_are_cut(tmp_path):
    """Bug: the last frames, or frames apart, instead of the first ones."""
    made = write(tmp_path, frames=6)
    x0, _ = latent_folder.LatentFolder(tmp_path, SHAPE, TEXT).clips(range(12), 0)
    assert all(torch.equal(x, made[i]["latents"][:4]) for i, x in zip(numbers(x0), x0))


def nan_in(kind):
    return lambda i, s: s | {kind: s[kind].index_fill(0, torch.tensor(0), float("nan"))} if i == 7 else s


@pytest.mark.parametrize("damage, change", [
    (lambda path: flip(path, "2.latents"), lambda i, s: s),
    (lambda path: flip(path, "2.text"), lambda i, s: s),
    (lambda path: None, nan_in("latents")),
    (lambda path: None, nan_in("text")),
], ids=["latents flipped", "text flipped", "latents nan", "text nan"])
def test_damaged_sample(tmp_path, capsys, damage, change):
    """Bug: training on a damaged clip, silently; or a replacement from elsewhere, so that a run cannot be repeated."""
    write(tmp_path / "good")
    write(tmp_path / "bad", change)
    damage(tmp_path / "bad" / "b.safetensors")
    order = numbers(latent_folder.LatentFolder(tmp_path / "good", SHAPE, TEXT).texts(range(60), 0))
    for draw in (lambda f, p: f.texts(p, 0), lambda f, p: f.clips(p, 0)[0]):
        with pytest.raises(ValueError, match=r"sample 2 of \S*b.safetensors .*--bad-data skip"):
            draw(latent_folder.LatentFolder(tmp_path / "bad", SHAPE, TEXT), range(12))
        capsys.readouterr()
        folder = latent_folder.LatentFolder(tmp_path / "bad", SHAPE, TEXT, "skip")
        want = [i if i != 7 else order[p + 1 if (p + 1) % 12 else p - 11] for p, i in enumerate(order)]
        assert numbers(draw(folder, range(60))) == want and 7 not in want
        assert folder.skipped == 5 and len(folder) == 12
        assert capsys.readouterr().err.count("sample 2 of") == 1


def test_replacement_wraps_around_its_epoch(tmp_path):
    """Bug: a bad sample in the last place of an epoch is replaced from the next epoch, or not at all."""
    write(tmp_path / "good")
    last = numbers(latent_folder.LatentFolder(tmp_path / "good", SHAPE, TEXT).texts(range(12), 0))
    for at in ((11,), (10, 11), (11, 0)):
        bad = [last[p] for p in at]
        write(tmp_path / "bad", lambda i, s, bad=bad: nan_in("text")(7, s) if i in bad else s)
        folder = latent_folder.LatentFolder(tmp_path / "bad", SHAPE, TEXT, "skip")
        assert numbers(folder.texts([11], 0)) == [last[1 if 0 in at else 0]] and folder.skipped == (2 if 0 in at else 1)


def without_metadata(path):
    save_file(load_file(path), path)


def short(captions, crcs):
    return lambda path: save_file(load_file(path), path, {"about": json.dumps({"captions": ["one"] * captions,
                                                                              "crc32": [0] * crcs})})


@pytest.mark.parametrize("damage", [truncate, lambda path: path.write_bytes(b""), without_metadata, short(3, 4),
                                    short(4, 3), short(3, 3),
                                    lambda path: path.write_bytes(b"\xff" + path.read_bytes()[1:])],
                         ids=["truncated", "empty", "no metadata", "a caption short", "a crc32 short",
                              "both short", "header"])
def test_damaged_shard(tmp_path, capsys, damage):
    """Bug: a shard cut short by a full disk that stops a run without a name, or is skipped without a word."""
    write(tmp_path)
    damage(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"shard \S*b.safetensors .*--bad-data skip"):
        latent_folder.LatentFolder(tmp_path, SHAPE, TEXT)
    folder = latent_folder.LatentFolder(tmp_path, SHAPE, TEXT, "skip")
    assert capsys.readouterr().err.count("b.safetensors") == 1
    assert folder.captions == [f"clip {i}" for i in (0, 1, 2, 3, 4, 9, 10, 11)] and len(folder) == 8
    assert sorted(numbers(folder.clips(range(8), 0)[0])) == [0, 1, 2, 3, 4, 9, 10, 11]


def test_nothing_to_read(tmp_path):
    """Bug: an endless search for an intact sample, or a division by zero samples."""
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(ValueError, match="no readable sample in .*: change --data"):
            latent_folder.LatentFolder(path, SHAPE, TEXT)
    latent_folder.write_null(tmp_path / "null.safetensors", torch.ones(2, 7))
    write(tmp_path, counts=(2,))
    truncate(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="no readable sample in .*: change --data"):
        latent_folder.LatentFolder(tmp_path, SHAPE, TEXT, "skip")
    write(tmp_path, lambda i, s: nan_in("text")(7, s), counts=(2,))
    folder = latent_folder.LatentFolder(tmp_path, SHAPE, TEXT, "skip")
    with pytest.raises(ValueError, match="only damaged samples in .*: change --data"):
        folder.clips([0], 0)
    assert folder.skipped == 2  # each once
    with pytest.raises(ValueError, match="change --bad-data"):
        latent_folder.LatentFolder(tmp_path, SHAPE, TEXT, "ignore")


def test_prompts_only(tmp_path):
    """Bug: a folder of prompts that cannot be read, or that gives empty clips to a stage that needs video."""
    made = write(tmp_path, prompt)
    folder = latent_folder.LatentFolder(tmp_path, SHAPE, TEXT)
    text = folder.texts(range(12), 0)
    assert not folder.has_latents and sorted(numbers(text)) == list(range(12))
    assert all(torch.equal(t[:len(made[i]["text"])], made[i]["text"]) for i, t in zip(numbers(text), text))
    with pytest.raises(ValueError, match=rf"{tmp_path}, expected latents: this stage needs video: change --data"):
        folder.clips([0], 0)
    latent_folder.write_shard(tmp_path / "d.safetensors", [sample(12)])
    with pytest.raises(ValueError, match=r"d.safetensors with latents, expected all .* or none: change --data"):
        latent_folder.LatentFolder(tmp_path, SHAPE, TEXT)
    with pytest.raises(ValueError, match="one kind"):
        latent_folder.write_shard(tmp_path / "e.safetensors", [prompt(0, sample(0)), sample(1)])


def opened(path, row_width=ROW, on_bad="stop", shape=SHAPE):
    return sources.Folder(path, shape, TEXT, row_width, on_bad)


@pytest.mark.parametrize("change", [lambda i, s: s, prompt], ids=["clips", "prompts"])
@pytest.mark.parametrize("frames", [4, 6])
def test_cameras_come_back(tmp_path, change, frames):
    """Bug: the cameras of another clip, of its last frames, transposed, or without their focal lengths; a folder of
    paths that are to be walked without them; words that differ where there are cameras; cameras given to a network that
    knows none."""
    made = write(tmp_path, lambda i, s: change(i, s) | camera(i, frames), frames=frames)
    held = latent_folder.read_shard(tmp_path / "a.safetensors")
    assert all(torch.equal(held[3][kind], made[3][kind]) for kind in ("viewmats", "Ks"))
    folder, words_only = opened(tmp_path), opened(tmp_path, 0)
    cfg = Config(batch=12, frames=4, prompt_dropout=0, device="cpu")
    draw = draws.Draw(cfg, folder, "bidirectional", 0, slice(None))
    asked = [(None, draw.prompts()), *([draw.clips()] if folder.has_latents else [])]
    for x0, text in asked:
        assert text.words.shape == (12, *TEXT) and text.rows.shape == (12, 4, ROW) and text.rows.dtype == torch.float32
        for i, rows in zip(numbers(text.words), text.rows):
            assert torch.equal(rows[:, :16].view(4, 4, 4), made[i]["viewmats"][:4])
            assert torch.equal(rows[:, 16:], made[i]["Ks"][:4, (0, 1), (0, 1)])
        assert x0 is None or numbers(x0) == numbers(text.words)
    assert torch.equal(words_only.texts(range(12), 0), folder.texts(range(12), 0).words)
    latent_folder.write_null(tmp_path / "empty.safetensors", torch.ones(2, 7))
    dropped = folder.with_empty_words(text, torch.zeros(12, 1, 1, dtype=bool))
    assert torch.equal(dropped.rows, text.rows) and torch.equal(dropped.words[5], folder.empty_text)


def test_cameras_are_in_the_documented_format(tmp_path):
    """Bug: cameras that no checksum covers, or one in another order than the docstring's; a shard from before cameras
    that cannot be read."""
    made = [sample(i) | camera(i) for i in range(2)]
    latent_folder.write_shard(tmp_path / "ours.safetensors", made)
    held = load_file(tmp_path / "ours.safetensors")
    assert held.keys() == {f"{i}.{kind}" for i in range(2) for kind in ("latents", "text", "viewmats", "Ks")}
    with latent_folder.safe_open(tmp_path / "ours.safetensors", "pt") as f:
        assert json.loads(f.metadata()["about"])["crc32"] == [zlib.crc32(b"".join(
            s[kind].numpy().tobytes() for kind in ("latents", "text", "viewmats", "Ks"))) for s in made]
    before = opened(tmp_path).digest()
    made[1]["viewmats"][2, 0, 3] += 1
    latent_folder.write_shard(tmp_path / "ours.safetensors", made)
    assert opened(tmp_path).digest() != before
    flip(tmp_path / "ours.safetensors", "1.viewmats")
    with pytest.raises(ValueError, match=r"sample 1 of \S*ours.safetensors .*crc32.*--bad-data skip"):
        opened(tmp_path).clips(range(2), 0)
    with pytest.raises(ValueError, match="sample 1"):  # whoever looks at them or not
        opened(tmp_path, 0).clips(range(2), 0)


@pytest.mark.parametrize("kind, stored, message", [
    ("viewmats", torch.eye(4).repeat(3, 1, 1), r"shape \(3, 4, 4\), expected \(4, 4, 4\) or longer: change --frames"),
    ("viewmats", torch.eye(3).repeat(4, 1, 1), r"shape \(4, 3, 3\), expected \(4, 4, 4\)"),
    ("viewmats", torch.eye(4), r"shape \(4, 4\), expected \(4, 4, 4\)"),
    ("viewmats", torch.eye(4).repeat(13, 1, 1), "13 frames, expected one for each latent frame"),  # of the video's
    ("Ks", torch.eye(3).repeat(5, 1, 1), "5 frames, expected one for each latent frame"),
    ("Ks", torch.eye(3).repeat(3, 1, 1), r"shape \(3, 3, 3\), expected \(4, 3, 3\) or longer"),
    ("Ks", torch.ones(4, 4), r"shape \(4, 4\), expected \(4, 3, 3\)"),
    ("Ks", torch.eye(3).repeat(4, 1, 1).int(), "dtype I32, expected one of"),
])
def test_cameras_that_do_not_fit_are_named_at_opening(tmp_path, kind, stored, message):
    """Bug: a camera for every frame of video where one for every latent frame is wanted, matrices of another shape, or
    an error for a network that never asks for them."""
    write(tmp_path, lambda i, s: s | camera(i) | ({kind: stored} if i == 7 else {}))
    with pytest.raises(ValueError, match=rf"{kind} of sample 2 in \S*b.safetensors of {message}"):
        opened(tmp_path, on_bad="skip")
    if stored.is_floating_point():
        assert opened(tmp_path, 0).clips(range(12), 0)[1].shape == (12, *TEXT)


def spoilt(kind, *at, value=None, factor=1.0):
    """Sample 7 with an element, or a slice, of its cameras changed in frame 3."""
    def change(i, s):
        made = s | camera(i)
        if i == 7:
            x = made[kind][3]
            x[at] = x[at] * factor if value is None else value
        return made
    return change


R = slice(0, 3), slice(0, 3)


@pytest.mark.parametrize("change, message", [
    (spoilt("viewmats", 3, 3, value=0), "not rigid"), (spoilt("viewmats", 3, 0, value=0.5), "not rigid"),
    (spoilt("viewmats", *R, factor=1.1), "not rigid"), (spoilt("viewmats", *R, factor=-1), "not rigid"),
    (spoilt("viewmats", 0, 1, value=3.0), "not rigid"), (spoilt("viewmats", 1, 3, value=float("nan")), "non-finite"),
    (spoilt("Ks", 0, 0, value=970.0), "focal lengths .* units of the image's width and height"),
    (spoilt("Ks", 1, 1, value=0.0), "focal lengths")],
    ids=["zero", "last row", "scaled", "mirrored", "skewed", "nan", "pixels", "no focal length"])
def test_cameras_that_are_none(tmp_path, capsys, change, message):
    """Bug: training on a camera-to-world matrix with its translation in the last row, on scaled or mirrored axes, or on
    focal lengths in pixels; a sample without a name."""
    write(tmp_path, change)
    with pytest.raises(ValueError, match=rf"sample 2 of \S*b.safetensors .*{message}.*--bad-data skip"):
        opened(tmp_path).texts(range(12), 0)
    if message != "non-finite":
        with pytest.raises(ValueError, match=rf"b.safetensors .*sample 2 has .*{message}.*at frame 3"):
            latent_folder.read_shard(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"x.safetensors .*sample 0 has .* of shapes \(2, 4, 4\) and \(\)"):
        odd = {"viewmats": torch.eye(4).repeat(2, 1, 1), "Ks": torch.tensor(1.0)}
        latent_folder.write_shard(tmp_path / "x" / "x.safetensors", [prompt(0, sample(0)) | odd])
        latent_folder.read_shard(tmp_path / "x" / "x.safetensors")
    folder = opened(tmp_path, on_bad="skip")
    assert 7 not in numbers(folder.clips(range(12), 0)[0]) and folder.skipped == 1
    assert sorted(numbers(opened(tmp_path, 0).clips(range(12), 0)[0])) == list(range(12))  # not asked for


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rounded_cameras_are_cameras(tmp_path, dtype):
    """Bug: a bound for rotations that those stored in few bits cannot keep."""
    write(tmp_path, lambda i, s: s | {kind: x.to(dtype) for kind, x in camera(i).items()})
    assert opened(tmp_path).texts(range(12), 0).rows.shape == (12, 4, ROW)


def test_cameras_are_everywhere_or_nowhere(tmp_path):
    """Bug: a network that is told cameras of some clips alone, or of none; rows that a folder cannot know, of zeros."""
    made = write(tmp_path)
    assert not isinstance(opened(tmp_path, 0).texts([0], 0), Condition)
    with pytest.raises(ValueError, match=rf"{tmp_path} without cameras, expected .*: change --data or --size"):
        opened(tmp_path)
    for open_ in (opened, lambda path, width: sources.open_source(str(path), "", SHAPE, TEXT, width)):
        with pytest.raises(ValueError, match="--data .* 23 numbers of each frame, expected .*18.*--size"):
            open_(tmp_path, 23)
    with pytest.raises(ValueError, match="without cameras"):
        sources.open_source(str(tmp_path), "", SHAPE, TEXT, ROW)
    half = [sample(12) | {"viewmats": camera(12)["viewmats"]}]
    for mixed in ([made[0], made[1] | camera(1)], half):
        with pytest.raises(ValueError, match="cameras and some without"):
            latent_folder.write_shard(tmp_path / "d.safetensors", mixed)
    latent_folder.write_shard(tmp_path / "d.safetensors", [sample(12) | camera(12)])
    for width in (0, ROW):
        with pytest.raises(ValueError, match=r"d.safetensors with cameras, expected all .* or none: change --data"):
            opened(tmp_path, width)
    held = load_file(tmp_path / "d.safetensors")
    with latent_folder.safe_open(tmp_path / "d.safetensors", "pt") as f:
        about = f.metadata()
    save_file({k: v for k, v in held.items() if k != "0.Ks"}, tmp_path / "d.safetensors", about)
    with pytest.raises(ValueError, match="d.safetensors .*do not make samples 0 to n-1"):
        opened(tmp_path, 0)


def test_null_text(tmp_path):
    """Bug: the file of the empty prompt drawn as a sample, demanded where nobody asks, or its lack a bare traceback."""
    write(tmp_path)
    null = tmp_path / "null.safetensors"
    with pytest.raises(ValueError, match=r"null.safetensors .*expected the embedding `l d` .*latent_folder.write_null"):
        _ = latent_folder.LatentFolder(tmp_path, SHAPE, TEXT).null_text
    latent_folder.write_null(null, torch.full((2, 7), 3.0, dtype=torch.bfloat16))
    folder = latent_folder.LatentFolder(tmp_path, SHAPE, TEXT)
    assert len(folder) == 12 and folder.null_text.dtype == torch.float32
    assert torch.equal(folder.null_text, torch.cat([torch.full((2, 7), 3.0), torch.zeros(4, 7)]))
    for wrong, message in ((torch.ones(2, 8), r"text in \S*null.safetensors of shape \(2, 8\)"),
                           (torch.full((2, 7), float("inf")), "null.safetensors .*non-finite")):
        latent_folder.write_null(null, wrong)
        with pytest.raises(ValueError, match=message):
            _ = latent_folder.LatentFolder(tmp_path, SHAPE, TEXT).null_text


def test_a_write_cut_short_leaves_the_old_shard(tmp_path, monkeypatch):
    """Bug: a converter killed while it writes leaves half a shard under the shard's name."""
    def killed(tensors, path, *_):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    write(tmp_path)
    monkeypatch.setattr(files, "save_file", killed)
    for name in "ad":
        with pytest.raises(KeyboardInterrupt):
            latent_folder.write_shard(tmp_path / f"{name}.safetensors", [sample(0)])
    folder = latent_folder.LatentFolder(tmp_path, SHAPE, TEXT)
    assert sorted(numbers(folder.clips(range(12), 0)[0])) == list(range(12))


def test_digest_tells_folders_apart(tmp_path):
    """Bug: ranks that draw from different copies of the data without noticing."""
    def digest(name, *args, on_bad="stop", spoil=lambda path: None, **how):
        write(tmp_path / name, *args, **how)
        spoil(tmp_path / name)
        return latent_folder.LatentFolder(tmp_path / name, SHAPE, TEXT, on_bad).digest()

    assert digest("one") == digest("two")  # the place of the folder does not matter
    others = [digest("fewer", counts=(5, 4)), digest("dtype", dtype=torch.bfloat16),
              digest("value", lambda i, s: s | {"text": s["text"] + (i == 7)}),
              digest("renamed", spoil=lambda path: (path / "c.safetensors").rename(path / "d.safetensors")),
              digest("cut", on_bad="skip", spoil=lambda path: truncate(path / "b.safetensors"))]
    assert len({digest("one"), *others}) == 6


MEMORY = """
import sys
from worlds import draws, latent_folder

def megabytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024

latent_folder.LatentFolder(sys.argv[1], (4, 2, 3, 5), (6, 7)).clips(range(3), 0)  # whatever is set up on first use
resident, peak = megabytes("VmRSS"), megabytes("VmHWM")
folder = latent_folder.LatentFolder(sys.argv[2], (64, 16, 32, 64), (6, 7))
opened = megabytes("VmRSS")
folder.clips([0], 0)
print(opened - resident, megabytes("VmRSS") - opened, megabytes("VmHWM") - peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory as Linux reports it")
def test_files_are_memory_mapped(tmp_path):
    """Bug: opening a folder, or drawing one sample, reads whole shards: terabytes of latents do not fit in memory."""
    write(tmp_path / "small")
    clip = {"latents": torch.ones(64, 16, 32, 64).bfloat16(), "text": torch.ones(6, 7), "caption": ""}  # 4 MB
    latent_folder.write_shard(tmp_path / "big" / "a.safetensors", [clip] * 32)  # 128 MB
    done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path / "small", tmp_path / "big"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    opened, drawn, peak = map(float, done.stdout.split())
    assert opened < 4 and drawn < 32 and peak < 48, f"MB: {opened} by opening, {drawn} by a draw, {peak} at most"


def test_files_have_the_usual_permissions(tmp_path):
    """Bug: latents and weights that colleagues on a cluster cannot read, as safetensors makes them."""
    (tmp_path / "usual").touch()
    latent_folder.write_shard(tmp_path / "a.safetensors", [{"text": torch.zeros(1, 4), "caption": ""}])
    write_tensors(tmp_path / "b.safetensors", {"x": torch.zeros(1)}, {})
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
