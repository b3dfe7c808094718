"""Paths in words: by hand, and what is no path; and a network sampled along one: every frame under its own camera."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from conftest import close
from PIL import Image

import sample
import wan21.settings
import wan21.text
import wan21.vae
import wan21.weights
from cameras import row_of
from flowmap import Condition, schedule
from model import SIZES, CausalWan
from rollout import stream
from wan21.trajectory import KEYS, paths_of, rows_of, viewmats_of
from worlds import WORLDS, draws, latent_folder

C, S = math.cos(math.radians(3)), math.sin(math.radians(3))


def test_a_path_by_hand():
    """Bug: camera-to-world matrices, degrees for radians, a first frame that has moved already, left for right, a step
    of another length: two steps forward, then one turn to the left; what lay ahead at z = 1.16 is then 1 ahead and to
    the right, at x > 0."""
    eye = torch.eye(4)
    ahead = [eye.clone() for _ in range(3)]
    ahead[1][2, 3], ahead[2][2, 3] = -0.08, -0.16
    turned = torch.tensor([[C, 0, S, 0], [0, 1, 0, 0], [-S, 0, C, 0], [0, 0, 0, 1]])
    close(viewmats_of("w*2,j*1"), torch.stack([*ahead, turned @ ahead[2]]), 1e-7)
    seen = viewmats_of("w*2,j*1")[-1] @ torch.tensor([0, 0, 1.16, 1])
    close(seen, torch.tensor([S, 0, C, 1]), 1e-6)
    close(viewmats_of("j*2, w*1")[-1], torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, -0.08], [0, 0, 0, 1]])
          @ turned @ turned, 1e-6)  # forward is where it looks
    assert torch.equal(viewmats_of("w*8,j*4")[0], eye) and len(viewmats_of("w*8,j*4")) == 13


@pytest.mark.parametrize("key, seen", [
    ("w", (0, 0, 0.92)), ("s", (0, 0, 1.08)), ("a", (0.08, 0, 1)), ("d", (-0.08, 0, 1)), ("u", (0, 0.08, 1)),
    ("dn", (0, -0.08, 1)), ("j", (S, 0, C)), ("l", (-S, 0, C)), ("i", (0, S, C)), ("k", (0, -S, C))])
def test_every_key_by_what_is_seen(key, seen):
    """Bug: up for down, left for right, forward for back: where, after a step, is what lay 1 ahead? (y is down.)"""
    close(viewmats_of(f"{key}*1")[1] @ torch.tensor([0.0, 0, 1, 1]), torch.tensor([*seen, 1.0]), 1e-6)


def test_steps_undo_each_other():
    """Bug: steps along the axes of the world; a rotation that is none."""
    for key, back in (("w", "s"), ("a", "d"), ("u", "dn"), ("j", "l"), ("i", "k")):
        close(viewmats_of(f"i*7,j*9,{key}*9,{back}*9")[[-1]], viewmats_of("i*7,j*9")[[-1]], 1e-6)
    long = viewmats_of(",".join(f"{key}*50" for key in KEYS))
    assert not latent_folder.fault_of(long, torch.eye(3).expand(len(long), 3, 3)) and len(long) == 501


@pytest.mark.parametrize("text", ["", "w", "w*", "w*0", "w*-1", "w*1.5", "x*3", "W*3", "w*3,", "w*3;j*2", "w*3 j*2",
                                  "w*1e3", "w*9999999", "w*60000,s*60000"])
def test_what_is_no_path_is_named(text):
    """Bug: a segment that is left out without a word, or a machine filled by a typing error."""
    with pytest.raises(ValueError, match=r"got .* in --trajectory .*expected KEY\*STEPS.* w s .* change --trajectory"):
        viewmats_of(text)


def test_rows_of_a_path():
    """Bug: intrinsics of another camera, in pixels, or exchanged."""
    rows, fx, fy = rows_of(viewmats_of("w*3,j*2")), 0.5050505, 0.89786756
    assert torch.equal(rows[:, :16].view(6, 4, 4), viewmats_of("w*3,j*2"))
    close(rows[:, 16:], torch.tensor([[fx, fy]]).expand(6, 2), 1e-7)
    assert (fx * 1920 / 969.7 - 1) ** 2 + (fy * 1080 / 969.7 - 1) ** 2 < 1e-9  # pixels of minWM's frames


# -- sampling ---------------------------------------------------------------------------------------------------------

FOX, BALL = "a fox", "a ball"
TEXTS = {FOX: torch.full((3, 8), 0.5), BALL: torch.linspace(-1, 1, 16).view(2, 8)}
PATH = "w*2,j*3,u*4,l*2"


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """A folder with a public student that sees cameras, walk.pt, a text-to-video one, plain.pt, and prompts, embedded.
    """
    folder, patch = tmp_path_factory.mktemp("walk"), pytest.MonkeyPatch()
    for size in ("wan1.3b", "wan1.3b_camera"):
        config = dataclasses.replace(SIZES[size], dim=48, ffn_dim=64, num_heads=3, num_layers=2, freq_dim=16,
                                     text_dim=8, text_len=4)
        patch.setitem(SIZES, size, config)
        net = CausalWan(config).init_weights(0)
        torch.nn.init.normal_(net.head.head.weight, std=0.2)
        for name, p in net.named_parameters():
            if "prope_o" in name:
                torch.nn.init.normal_(p, std=0.3)
        torch.save({"generator_ema": net.state_dict()}, folder / ("walk.pt" if config.camera else "plain.pt"))
    samples = [{"text": text, "caption": prompt} for prompt, text in TEXTS.items()]
    latent_folder.write_shard(folder / "prompts" / "0.safetensors", samples)
    latent_folder.write_null(folder / "prompts" / "null.safetensors", torch.ones(1, 8))
    yield folder
    patch.undo()


@pytest.fixture
def net(walk):
    return wan21.weights.load(SIZES["wan1.3b_camera"], walk / "walk.pt")[0].eval().requires_grad_(False)


def run(walk, out, *words, weights="walk.pt"):
    """The latents `1 f c h w` of a clip of FOX."""
    words = ("--weights", walk / weights, "--prompt", FOX, "--prompt-embeds", walk / "prompts" / "0.safetensors",
             *"--steps 2 --first-steps 2 --height 32 --width 32 --device cpu".split(), "--out", out, *words)
    (path,) = sample.main(sample.parse([str(word) for word in words]))
    return latent_folder.read_shard(path)[0]["latents"][None]


@torch.no_grad()
def by_hand(net, rows, frames, given=None, at=None, guidance=1.0, steps=2, chunk=3):
    """The clip of FOX, and from frame `at` on of BALL, with a new cache, and one for each half of the guidance, for
    every step. rows: `f 18` of the whole clip."""
    null, times = wan21.text.pad_text([torch.ones(1, 8)], 4), [*schedule(steps, 5.0).tolist(), 0.0]
    clip = torch.zeros(1, 0, 16, 4, 4) if given is None else given
    pieces = 0 if given is None else -(-given.shape[1] // chunk)
    for i in range(frames // chunk):
        first = clip.shape[1]
        words = wan21.text.pad_text([TEXTS[BALL if at is not None and first >= at else FOX]], 4)
        x = draws.noises([0], (chunk, 16, 4, 4), i + pieces, 0)
        for k, (t, s) in enumerate(zip(times, times[1:])):
            vs = []
            for text in (words, null):
                cache, done = net.new_cache(), 0
                for n in [first % chunk] * (first % chunk > 0) + [chunk] * (first // chunk):
                    net.append(cache, clip[:, done:done + n], Condition(text, rows[None, done:done + n]))
                    done += n
                told = Condition(text, rows[None, first:first + chunk])
                vs.append(net(x, torch.full((1, chunk), t), told, cache=cache))
            v = vs[1] + guidance * (vs[0] - vs[1])
            x = (1 - s) * (x - t * v) + (s * draws.noises([0], (chunk, 16, 4, 4), i + pieces, k + 1) if s else 0)
        clip = torch.cat([clip, x], 1)
    return clip


GIVEN = torch.randn(4, 16, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("words, how", [
    ((), dict(frames=12)), (("--frames", 6), dict(frames=6)),
    (("--frames", 6, "--guidance", 2.5), dict(frames=6, guidance=2.5)),
    (("--frames", 9, "--at", 3, BALL), dict(frames=9, at=3)), (("--frames", 6, "--continue"), dict(frames=6)),
    (("--frames", 6, "--at", 7, BALL, "--guidance", 2.5, "--continue"), dict(frames=6, at=7, guidance=2.5))], ids=str)
def test_every_frame_is_made_under_its_own_camera(walk, net, tmp_path, words, how):
    """Bug: cameras that begin again in each chunk, behind given frames, after a change of prompt or in the half that
    guidance adds; a path whose end is not walked by default."""
    if "--continue" in words:
        clip = {"latents": GIVEN, "text": TEXTS[FOX], "caption": ""}
        latent_folder.write_shard(tmp_path / "given.safetensors", [clip])
        words, how = (*words, tmp_path / "given.safetensors"), how | {"given": GIVEN[None]}
    got = run(walk, tmp_path / "x.safetensors", "--trajectory", PATH, *words)
    rows = row_of(viewmats_of(PATH), torch.tensor([[0.5050505, 0, 0], [0, 0.89786756, 0], [0, 0, 1]]).expand(12, 3, 3))
    want = by_hand(net, rows, **how)
    assert got.shape == want.shape
    close(got, want, 1e-4)
    for other in (rows[:1].expand(12, -1), rows.roll(1, 0)):  # what a bug would give
        assert (by_hand(net, other, **how) - want).abs().max() > 0.02


def test_a_path_matters_and_nothing_else_does(walk, net, tmp_path):
    """Bug: a path that is parsed and not walked; frames that depend on where the camera goes later; a camera that moves
    without a path, or that is none."""
    made = {name: run(walk, tmp_path / "x.safetensors", *(("--trajectory", path) if path else ()), "--frames", 6)
            for name, path in dict(one="w*5", again="w*5", longer="w*9", other="w*2,j*3", no=None).items()}
    assert torch.equal(made["one"], made["again"]) and torch.equal(made["one"], made["longer"])
    assert torch.equal(made["one"][:, :3], made["other"][:, :3])  # the first three cameras are the same
    for a, b in (("one", "other"), ("one", "no"), ("other", "no")):
        assert (made[a][:, 3:] - made[b][:, 3:]).abs().max() > 0.02
    close(made["no"], by_hand(net, rows_of(torch.eye(4).expand(6, 4, 4)), 6), 1e-4)


def test_an_image_is_seen_by_the_first_camera(walk, net, tmp_path, monkeypatch):
    """Bug: a path that begins behind the image, so that every frame has its neighbour's camera; a default length that
    leaves the image out."""
    Image.fromarray(np.full((32, 32, 3), 90, dtype=np.uint8)).save(tmp_path / "fox.png")
    first = GIVEN[None, :1]
    monkeypatch.setattr(wan21.vae, "load_vae", lambda *_: "vae")
    monkeypatch.setattr("wan21.clips.encode", lambda vae, frames, family: first)
    got = run(walk, tmp_path / "x.safetensors", "--trajectory", PATH, "--image", tmp_path / "fox.png")
    assert got.shape[1] == 1 + 9  # of the 12 frames of the path, 11 are left, which are three chunks
    close(got, by_hand(net, rows_of(viewmats_of(PATH)), 9, given=first), 1e-4)


def test_the_path_is_recorded(walk, tmp_path):
    """Bug: a folder of clips of which nobody knows the path, or of two paths in one."""
    words = ("--frames", 3, "--format", "latents")
    run(walk, tmp_path / "clips", *words, "--trajectory", "w*2")
    assert json.loads((tmp_path / "clips" / "sample.json").read_text())["trajectory"] == "w*2"
    with pytest.raises(ValueError, match=r"--trajectory w\*3, expected .* were made with .w\*2., or another --out"):
        run(walk, tmp_path / "clips", *words, "--trajectory", "w*3")


@pytest.mark.parametrize("words, message", [
    (("--trajectory", "w*3"), "got --frames 6, expected at most 4, for a path of 4 frames: walk on in --trajectory"),
    (("--trajectory", "w*5", "--image", "x.png"), "got --frames 6, expected at most 5, .* 6 frames, of which 1 are"),
    (("--trajectory", "w*8", "--continue", "GIVEN"), "got --frames 6, expected at most 5, .* 9 frames, of which 4 are"),
    (("--trajectory", "w*"), r"got 'w\*' in --trajectory"),
    (("--trajectory", ""), "got '' in --trajectory"),
    (("--trajectory", "w*9", "plain"), r"got --trajectory w\*9, expected none: this network knows no cameras"),
])
def test_paths_that_cannot_be(walk, tmp_path, monkeypatch, words, message):
    """Bug: a path that ends before the clip does, or that a network without cameras ignores in silence."""
    monkeypatch.setattr(CausalWan, "forward", None)  # nothing may be sampled before
    weights = "plain.pt" if words[-1] == "plain" else "walk.pt"
    clip = {"latents": GIVEN, "text": TEXTS[FOX], "caption": ""}
    latent_folder.write_shard(tmp_path / "given.safetensors", [clip])
    words = [tmp_path / "given.safetensors" if word == "GIVEN" else word for word in words if word != "plain"]
    with pytest.raises(ValueError, match=message):
        run(walk, tmp_path / "x.safetensors", "--frames", 6, *words, weights=weights)


@pytest.mark.parametrize("kind, words, frames", [
    ("student", "--image x.png", 18), ("student", "--trajectory w*12", 12),
    ("student", "--trajectory w*10 --image x.png", 9),
    ("student", "--trajectory w*12 --frames 6", 6), ("teacher", "--trajectory w*12", 13), ("teacher", "", 21),
    ("teacher", "--trajectory w*12 --image x.png", 12), ("student", "--trajectory w*12 --chunk 4", 12)])
def test_how_many_frames_a_path_makes(walk, kind, words, frames):
    """Bug: frames beyond the end of a path, or a chunk that is cut."""
    config = dict(first_steps=4, window=0, sink=0, mixed_steps=(4,), guidance=3.0, chunk=3, frames=21, shift=4.0,
                  height=60, width=104)
    about = dict(layout="own", stage=kind, causal=kind == "student", few_step=kind == "student", solver="euler",
                 config=config)
    args = sample.parse(["--weights", "x", "--device", "cpu", *words.split()])
    along = min(map(len, paths_of(args, SIZES["wan1.3b_camera"], None, [FOX, BALL]).values()), default=0)
    assert wan21.settings.with_defaults(args, about, "wan1.3b_camera", along).frames == frames


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A student of the room, small and random, as train.py leaves it."""
    config = dataclasses.replace(SIZES["room"], dim=32, ffn_dim=32, num_heads=2, num_layers=1, freq_dim=16)
    monkeypatch.setitem(SIZES, "room", config)
    net = CausalWan(config).init_weights(0).eval().requires_grad_(False)
    for p in (net.head.head.weight, net.blocks[0].self_attn.prope_o.weight):
        torch.nn.init.normal_(p, std=0.2)
    recorded = dict(first_steps=1, window=0, sink=0, mixed_steps=[2], guidance=1.0, chunk=1, frames=16, shift=5.0,
                    height=16, width=24, world="room")
    wan21.weights.write_own(tmp_path, net.state_dict(), dict(stage="salt", size="room", causal=True, few_step=True,
                                                             solver="cm", config=recorded, saved=1.0))
    return net


def stroll(folder, *words):
    return sample.main(sample.parse([*map(str, ("--weights", folder / "salt.safetensors", "--device", "cpu", *words))]))


@torch.no_grad()
def test_what_the_window_keeps(room, tmp_path):
    """Bug: --keep that is not heard, or the same whatever it says."""
    prompt, world, held, made = "left left left left none none none none", WORLDS["room"], {}, {}
    told = world.embed([world.parse(prompt)])
    for keep in ("latest", "poses"):
        stroll(tmp_path, "--prompt", prompt, "--steps", 1, "--window", 6, "--keep", keep, "--out",
               tmp_path / f"{keep}.safetensors")
        made[keep] = latent_folder.read_shard(tmp_path / f"{keep}.safetensors")[0]["latents"]
        cache = room.new_cache(6, 1, True, keep)
        want = torch.cat([c.x0 for c in stream(room, lambda i, k: draws.noises([0], (1, 3, 16, 24), i, k), told,
                                               schedule(1, 5.0), num_chunks=9, cache=cache)], 1)
        held[keep] = cache.frames
        close(made[keep][None], want, 1e-4)
    assert held["latest"] == [0, 3, 4, 5, 6, 7] and held["poses"] == [0, 2, 4, 5, 6, 7]
    assert (made["latest"] - made["poses"]).abs().max() > 0.01
    with pytest.raises(ValueError, match="'poses', expected latest, or .*change --keep"):
        CausalWan(dataclasses.replace(room.config, camera="unseen")).new_cache(4, keep="poses")


@torch.no_grad()
def test_in_the_room_the_prompt_is_the_path(room, tmp_path):
    """Bug: a room that is sampled without actions, with another prompt's, or beyond the end of the path."""
    prompts, world = ("forward left forward", "left left left left back"), WORLDS["room"]
    files = stroll(tmp_path, "--prompt", *prompts, "--steps", 1, "--format", "latents", "--out", tmp_path / "walks")
    for i, (path, prompt) in enumerate(zip(files, prompts, strict=True)):
        told = world.embed([world.parse(prompt)])
        want = torch.cat([c.x0 for c in stream(room, lambda i, k: draws.noises([0], (1, 3, 16, 24), i, k), told,
                                               schedule(1, 5.0), num_chunks=4, cache=room.new_cache(16, 1, True))], 1)
        got = latent_folder.read_shard(path)[0]["latents"]
        assert got.shape == (4, 3, 16, 24)  # the shorter path is of four frames
        close(got[None], want, 1e-4)
    assert (latent_folder.read_shard(files[0])[0]["latents"] - got).abs().max() > 0.1
    (clip,) = stroll(tmp_path, "--out", tmp_path / "all.webp")  # its two prompts, of 16 frames
    with Image.open(clip) as image:
        assert image.n_frames == 16
    for words, said in ((("--prompt", "left", "--frames", 3), "--frames 3, expected at most 2, .*on in the prompt"),
                        (("--prompt", "fly"), "'fly', expected actions"),
                        (("--trajectory", "w*15"), "w.15, expected none: the path of a world is its prompt"),
                        (("--prompt", "left left", "--at", 1, "left"), "expected none: a path cannot change")):
        with pytest.raises(ValueError, match=said):
            stroll(tmp_path, *words, "--out", tmp_path / "x.webp")
