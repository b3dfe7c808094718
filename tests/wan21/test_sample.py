"""Sampling as its users do it, on a tiny Wan of random weights in the files of the release: what comes out is held
against the same clip computed by hand."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from conftest import close
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tiny_wan import WIDTH, write_text_encoder, write_vae  # noqa: E402

import sample  # noqa: E402
import wan21.text  # noqa: E402
import wan21.vae  # noqa: E402
import wan21.weights  # noqa: E402
from flowmap import Guided, euler, schedule  # noqa: E402
from fast.network import Fast  # noqa: E402
from model import SIZES, CausalWan  # noqa: E402
from rollout import grids, recache, stream  # noqa: E402
from wan21.families import FAMILIES  # noqa: E402
from worlds import draws, latent_folder  # noqa: E402

FOX, BALL = "a fox runs through the snow", "a red ball , a dog"
SIZE = ("--height", 64, "--width", 48)


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A folder as Wan2.1-T2V-1.3B, and a public student's .pt beside it. The names of sizes are those of real Wan."""
    folder, patch = tmp_path_factory.mktemp("Wan2.1-T2V-1.3B"), pytest.MonkeyPatch()
    config = dataclasses.replace(SIZES["wan1.3b"], dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16,
                                 text_dim=WIDTH, text_len=12)
    patch.setitem(SIZES, "wan1.3b", config)
    net = CausalWan(config).init_weights(0)
    torch.nn.init.normal_(net.head.head.weight, std=0.2)
    wan21.weights.write_official(folder, net.state_dict(), config)
    torch.save({"generator_ema": {f"model.{k}": v for k, v in net.state_dict().items()}}, folder / "student.pt")
    write_text_encoder(folder)
    write_vae(folder)
    yield folder
    patch.undo()


@pytest.fixture
def net(wan):
    return wan21.weights.load(SIZES["wan1.3b"], wan)[0].eval().requires_grad_(False)


def run(*words):
    return sample.main(sample.parse([str(word) for word in words]))


def student(wan, *words):
    return run("--weights", wan / "student.pt", "--steps", 2, "--first-steps", 2, *SIZE, *words)


def text_of(wan, *prompts):
    encoder = wan21.text.load_text_encoder(wan)
    return wan21.text.pad_text([encoder.encode([prompt])[0].float() for prompt in prompts], 12)


def noise_of(seed, frames):
    return lambda i, k: draws.noises([seed], (frames, 16, 8, 6), i, k)


def pictures_in(folder):
    return torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]))


def latents_in(path):
    return latent_folder.read_shard(path)[0]["latents"][None]


@torch.no_grad()
def by_hand(net, text, seed, chunks, chunk=3, steps=2, cache=None, before=0):
    grid, noise = schedule(steps, 5.0), noise_of(seed, chunk)
    return torch.cat([c.x0 for c in stream(net, lambda i, k: noise(before + i, k), text, grid, num_chunks=chunks,
                                           cache=cache)], 1)


def test_whole_clips_of_wans_own_weights(wan, net, tmp_path, capsys):
    """Bug: Wan's weights sampled as if they were a student's: chunk by chunk, without guidance, with the CM solver; a
    negative prompt that is not Wan's. Against Euler steps over the whole clip, and the VAE's own decoding."""
    (folder,) = run("--size", "wan1.3b", "--weights", wan, "--prompt", FOX, "--steps", 8, "--frames", 3, *SIZE,
                    "--out", tmp_path / "clips", "--format", "png")
    text, negative = text_of(wan, FOX, wan21.text.NEGATIVE_PROMPT).split(1)
    x, guided, times = noise_of(0, 3)(0, 0), Guided(net, negative[0], 6.0), [*schedule(8, 8.0).tolist(), 0.0]
    with torch.no_grad():
        for t, s in zip(times, times[1:]):
            x = euler(x, guided(x, torch.full((1, 3), t), text), t, s)
        decoded = wan21.vae.StreamDecoder(wan21.vae.load_vae(wan)).decode(x)[0]
    pictures = pictures_in(folder)
    assert pictures.shape == (1 + 4 * 2, 64, 48, 3)
    assert (pictures.int() - decoded.int()).abs().max() <= 1
    assert "--steps 8" not in capsys.readouterr().err


def test_a_public_student_goes_chunk_by_chunk(wan, net, tmp_path, capsys):
    """Bug: other defaults for a .pt than those of the public students; pictures that are not those of the latents."""
    out = tmp_path / "fox.safetensors"
    assert student(wan, "--prompt", FOX, "--frames", 6, "--seed", 3, "--out", out) == [out]
    x0 = by_hand(net, text_of(wan, FOX), 3, chunks=2)
    close(latents_in(out), x0, 1e-5)
    said = capsys.readouterr()
    assert "cm, guidance 1.0, chunks of 3, window 21" in said.out and "[1.0, 0.8333]" in said.out
    assert re.search(r"--steps 2.*a public student.*usually trained for 4;", said.err) and "--first-steps" in said.err
    (folder,) = student(wan, "--prompt", FOX, "--frames", 6, "--seed", 3, "--out", tmp_path / "png", "--format", "png")
    whole = wan21.vae.StreamDecoder(wan21.vae.load_vae(wan)).decode(latents_in(out))[0]
    assert torch.equal(pictures_in(folder), whole)
    (picture,) = student(wan, "--prompt", FOX, "--frames", 6, "--preview", "--out", tmp_path / "fox.webp")
    with Image.open(picture) as image:
        assert (image.n_frames, image.size) == (6, (24, 32))  # a picture per latent frame


BASE = dict(seed=0, frames=6, chunk=3, steps=2, first_steps=2, shift=5.0, solver="cm", guidance=1.0, window=21, sink=1,
            negative_prompt=wan21.text.NEGATIVE_PROMPT, positions="relative", height=64, width=48)


@torch.no_grad()
def in_two_halves(net, wan, seed, frames, chunk, steps, first_steps, shift, solver, guidance, window, sink,
                  negative_prompt, positions, height, width):
    """A clip of FOX as the flags ask for it: one cache for the prompt, one for the negative prompt."""
    halves = [(text, net.new_cache(window, sink, positions == "relative"))
              for text in text_of(wan, FOX, negative_prompt).split(1)]
    made = []
    for i in range(frames // chunk):
        times = [*schedule(max(steps, first_steps) if i == 0 else steps, shift).tolist(), 0.0]
        x = draws.noises([seed], (chunk, 16, height // 8, width // 8), i, 0)
        for k, (t, s) in enumerate(zip(times, times[1:])):
            cond, uncond = (net(x, torch.full((1, chunk), t), text, cache=cache) for text, cache in halves)
            v = uncond + guidance * (cond - uncond)
            if solver == "cm" and s > 0:
                eps = draws.noises([seed], (chunk, 16, height // 8, width // 8), i, k + 1)
                x = (1 - s) * (x - t * v) + s * eps
            else:
                x = x - (t - s) * v
        made.append(x)
        for text, cache in halves:
            net.append(cache, x, text)
    return torch.cat(made, 1)


SLIDES = dict(frames=15, window=6)


@pytest.mark.parametrize("beside, flag", [
    ({}, dict(seed=7)), ({}, dict(frames=9)), ({}, dict(chunk=2)), ({}, dict(steps=4)), ({}, dict(first_steps=4)),
    ({}, dict(shift=3.0)), ({}, dict(solver="euler")), ({}, dict(height=32, width=96)), ({}, dict(guidance=2.5)),
    (dict(guidance=2.5), dict(negative_prompt=BALL)), (dict(frames=15), dict(window=6)), (SLIDES, dict(sink=2)),
    (SLIDES, dict(sink=0)), (SLIDES, dict(positions="absolute")), (SLIDES, dict(guidance=2.5))], ids=str)
def test_flags_of_a_rollout_do_what_they_say(wan, net, tmp_path, beside, flag):
    """Bug: a flag that is read and not used, that changes another thing, or that is used in the first chunk alone."""
    given = {k: BASE[k] for k in ("frames", "steps", "first_steps", "height", "width")} | beside | flag
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    run("--weights", wan / "student.pt", "--prompt", FOX, *words, "--out", tmp_path / "fox.safetensors")
    want, without = (in_two_halves(net, wan, **BASE | beside | changes) for changes in (flag, {}))
    close(latents_in(tmp_path / "fox.safetensors"), want, 2e-5)
    assert want.shape != without.shape or (want - without).abs().max() > 1e-3


def test_flags_of_files_and_devices(wan, tmp_path, monkeypatch):
    """Bug: a part, a folder, a precision or a device that is read and not used, or used for another network."""
    averaged = torch.load(wan / "student.pt")["generator_ema"]
    torch.save({"generator_ema": averaged, "generator": {k: 0.9 * v for k, v in averaged.items()}}, tmp_path / "two.pt")
    for name in ("google", "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"):
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        (tmp_path / "elsewhere" / name).symlink_to(wan / name)
    asked, made_fast = {}, []

    def spied(where, name):
        real = getattr(where, name)

        def call(*args, **how):
            asked[name] = args
            return real(*args, **how)
        monkeypatch.setattr(where, name, call)

    for where, name in ((wan21.text, "load_text_encoder"), (wan21.vae, "load_vae"), (wan21.weights, "load")):
        spied(where, name)
    monkeypatch.setattr(sample, "Fast", lambda net, *how: made_fast.append(how) or Fast(net))
    words = ("--prompt", FOX, "--steps", 1, "--first-steps", 1, "--frames", 3, *SIZE)
    made = {}
    for part in ("", "generator", "generator_ema"):
        run("--weights", tmp_path / "two.pt", "--wan", tmp_path / "elsewhere", *words, "--out",
            tmp_path / "x.safetensors", *(("--part", part) if part else ()))
        made[part] = latents_in(tmp_path / "x.safetensors")
    assert torch.equal(made[""], made["generator_ema"]) and not torch.equal(made[""], made["generator"])
    assert asked["load_text_encoder"] == (tmp_path / "elsewhere", "cpu") and "load_vae" not in asked
    run("--weights", wan / "student.pt", *words, "--compile", "--attention", "math", "--precision", "bf16",
        "--format", "webp", "--out", tmp_path / "clips")
    assert asked["load_vae"] == (wan, "cpu", torch.bfloat16, FAMILIES["wan2.1"]) and asked["load"][3] is torch.bfloat16
    assert made_fast == 3 * [("", False)] + [("math", True)] and next((tmp_path / "clips").glob("*.webp"))

    class Asked(Exception):
        pass

    def stop(folder, device="cpu", *_):
        raise Asked(device)

    monkeypatch.setattr(wan21.text, "load_text_encoder", stop)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device, text_device in (("cuda:1", None), ("cuda:1", "cpu"), ("cpu", "cuda:0")):
        flags = ("--device", device, *(("--text-device", text_device) if text_device else ()))
        with pytest.raises(Asked, match=text_device or device):
            run("--weights", wan / "student.pt", *words, *flags, "--preview", "--out", tmp_path / "x.webp")


OWN = dict(first_steps=8, window=0, sink=0, mixed_steps=(2, 4, 8), guidance=3.0, chunk=2, frames=6, shift=4.0,
           height=10, width=10)
TOY = dict(first_steps=8, chunk=2, solver="cm", shift=4.0, guidance=1.0, window=6, sink=1, height=10, width=10, steps=2,
           frames=24, batch=12, precision="fp32", samples=1, seed=0, positions="relative")


@pytest.mark.parametrize("size, kind, recorded, given, expected", [
    ("toy", "student", {}, "", TOY), ("toy", "student", dict(window=4, sink=2), "", TOY | dict(window=4, sink=2)),
    ("toy", "student", dict(window=4, sink=2), "--frames 6",
     TOY | dict(window=4, sink=2, frames=6, positions="absolute")),
    ("toy", "student", dict(window=3, sink=0), "--chunk 4", TOY | dict(window=4, sink=0, chunk=4)),
    ("toy", "student", {}, "--sink 5", TOY | dict(window=7, sink=5)),
    ("toy", "teacher", {}, "", TOY | dict(first_steps=1, solver="euler", guidance=3.0, steps=40)),
    ("toy", "bidirectional", {}, "", TOY | dict(first_steps=1, solver="euler", guidance=3.0, steps=40, window=None,
                                                chunk=6, frames=6)),
    ("toy", "dmd4", {}, "", TOY | dict(first_steps=1, window=None, chunk=6, frames=6)),
    ("wan1.3b", "student", dict(height=60, width=104, chunk=3, frames=21), "",
     TOY | dict(steps=4, chunk=3, window=21, height=480, width=832, frames=21, batch=1)),
    ("wan1.3b", "student", dict(height=60, width=104, chunk=3, frames=21), "--image x.png",
     TOY | dict(steps=4, chunk=3, window=21, height=480, width=832, frames=18, batch=1))])
def test_defaults_are_those_of_training(tmp_path, size, kind, recorded, given, expected):
    """Bug: a checkpoint sampled with another chunk, window, sink, shift, solver, guidance, first chunk or positions
    than it was trained for."""
    causal, few_step = kind in ("student", "teacher"), kind in ("student", "dmd4")
    about = dict(layout="own", stage=kind, causal=causal, few_step=few_step, solver="cm" if few_step else "euler",
                 size=size, config=OWN | recorded)
    args = sample.parse(f"--weights {tmp_path}/x.safetensors --device cpu {given}".split())
    args = sample.with_defaults(args, about, size)
    assert {name: getattr(args, name) for name in expected} == expected


def test_the_first_chunk_has_its_extra_steps(wan, net, tmp_path):
    """Bug: a first chunk of as few steps as the others (CF++ Sec. 4)."""
    out, text, (grid, first_grid) = tmp_path / "fox.safetensors", text_of(wan, FOX), grids(2, 5.0, 4)
    run("--weights", wan / "student.pt", "--steps", 2, *SIZE, "--prompt", FOX, "--frames", 6, "--out", out)
    with torch.no_grad():
        chunks = stream(net, noise_of(0, 3), text, grid, num_chunks=2, first_grid=first_grid)
        want = torch.cat([c.x0 for c in chunks], 1)
    close(latents_in(out), want, 1e-5)


def test_settings_that_a_checkpoint_has_recorded():
    """Bug: a whole-clip student with a first chunk's extra steps, which would be all its steps; a student of a window
    sampled with another sink; converted Wan weights sampled as a teacher of train.py; 14B as 1.3B."""
    config = dict(first_steps=4, window=0, sink=0, mixed_steps=(2, 4, 8), guidance=3.0, chunk=3, frames=21, shift=5.0,
                  height=60, width=104)

    def of(size="wan1.3b", layout="own", stage="dmd4", causal=True, few_step=True, source=None, **changes):
        about = dict(layout=layout, stage=stage, causal=causal, few_step=few_step, solver="cm", size=size,
                     config=config | changes)
        return sample.trained_for(about | ({"source": source} if source else {}), size)

    assert of()["first_steps"] == 4 and of()["sink"] == 1 and of()["chunk"] == 3 and of()["guidance"] == 1
    assert of(causal=False)["first_steps"] == 1 and of(causal=False)["chunk"] == 21
    assert of(window=4, sink=0)["sink"] == 0 and of(window=4, sink=2)["sink"] == 2
    teacher = of(stage="bidirectional", causal=False, few_step=False)
    assert (teacher["steps"], teacher["guidance"], teacher["first_steps"]) == (40, 3.0, 1)
    converted = of(stage="bidirectional", causal=False, few_step=False, source={"layout": "official"})
    assert converted == of(layout="official") == of(layout="diffusers")
    assert (converted["steps"], converted["shift"], converted["guidance"]) == (50, 8.0, 6.0)
    assert (of("wan14b", "official")["shift"], of("wan14b", "official")["guidance"]) == (5.0, 5.0)


def test_what_the_table_of_stages_tells_of_weights():
    """Bug: a stage that sees the whole past sampled with the --window of the run; a student of one K, --rollout-steps,
    taken for one of --mixed-steps; weights of another world asked for the toy's prompts."""
    config = dict(first_steps=4, window=4, sink=1, mixed_steps=[2, 4, 8], rollout_steps=1, guidance=3.0, chunk=1,
                  frames=8, shift=5.0, height=10, width=10)

    def of(stage, **changes):
        metadata = dict(layout="own", stage=stage, causal=True, few_step=True, solver="cm", config=config | changes)
        return sample.trained_for(sample.with_stage(metadata), "toy")

    assert (of("salt")["window"], of("salt")["mixed_steps"], of("salt")["steps"]) == (4, [2, 4, 8], 2)
    assert (of("causal_cd")["window"], of("causal_cd")["sink"]) == (0, 1)
    for stage in ("self_forcing", "naive_sc"):
        assert (of(stage)["window"], of(stage)["mixed_steps"], of(stage)["steps"]) == (4, [1], 1)
    assert of("salt")["world"] == "toy" and of("salt", world="toy")["world"] == "toy"
    with pytest.raises(ValueError, match="the world mars, expected one of toy"):
        of("salt", world="mars")


def test_a_window_that_must_be_given_room(wan, tmp_path):
    """Bug: the default sink and a larger chunk do not fit the default window, and that is an error."""
    out = tmp_path / "x.safetensors"
    student(wan, "--prompt", FOX, "--chunk", 21, "--frames", 42, "--out", out)
    assert latents_in(out).shape[1] == 42
    run("--weights", wan, "--prompt", FOX, "--steps", 1, "--chunk", 21, *SIZE, "--out", out)
    assert latents_in(out).shape[1] == 21


def test_a_sample_depends_on_its_seed_and_prompt_alone(wan, tmp_path):
    """Bug: noise drawn for a batch, so that another batch size or order of prompts gives other clips; samples of a
    prompt that are equal."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{FOX}\n\n{BALL}\n")
    for batch in (1, 3):
        student(wan, "--prompts", prompts, "--samples", 2, "--frames", 3, "--batch", batch, "--format", "latents",
                "--out", tmp_path / str(batch), "--seed", 5)
    names = sorted(path.name for path in (tmp_path / "1").glob("*.safetensors"))
    assert names == ["0000_a-fox-runs-through-the-snow_seed5.safetensors",
                     "0000_a-fox-runs-through-the-snow_seed6.safetensors",
                     "0001_a-red-ball-a-dog_seed5.safetensors", "0001_a-red-ball-a-dog_seed6.safetensors"]
    alone = {name: latents_in(tmp_path / "1" / name) for name in names}
    for name in names:
        close(latents_in(tmp_path / "3" / name), alone[name], 1e-5)
    student(wan, "--prompt", BALL, "--frames", 3, "--seed", 6, "--out", tmp_path / "ball.safetensors")
    close(latents_in(tmp_path / "ball.safetensors"), alone[names[3]], 1e-5)
    first, second = alone[names[0]], alone[names[1]]
    assert (first - second).abs().max() > 0.1 and (first - alone[names[2]]).abs().max() > 1e-3


def test_image_to_video_and_going_on(wan, net, tmp_path):
    """Bug: a first picture that is noised, not committed, left out of the clip, or decoded apart from what follows; a
    clip that goes on from other latents or with other noise than said."""
    rgb = np.random.default_rng(0).integers(0, 255, (64, 48, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(tmp_path / "fox.png")
    text, vae = text_of(wan, FOX), wan21.vae.load_vae(wan)
    clip = tmp_path / "clip.safetensors"
    words = ("--prompt", FOX, "--frames", 6, "--image", tmp_path / "fox.png")
    student(wan, *words, "--out", clip)
    latent = wan21.vae.encode(vae, torch.from_numpy(rgb)[None, None])
    with torch.no_grad():
        cache = net.new_cache()
        net.append(cache, latent, text)
        want = torch.cat([latent, by_hand(net, text, 0, 2, cache=cache, before=1)], 1)
    close(latents_in(clip), want, 1e-5)
    (folder,) = student(wan, *words, "--out", tmp_path / "png", "--format", "png")
    assert torch.equal(pictures_in(folder), wan21.vae.StreamDecoder(vae).decode(latents_in(clip))[0])

    longer = tmp_path / "longer.safetensors"
    student(wan, "--prompt", FOX, "--frames", 3, "--continue", folder, "--out", longer)  # from its pictures
    assert latents_in(longer).shape[1] == 7 + 3
    for path in sorted(folder.glob("*.png"))[:-7]:  # 7 pictures are left, of which the VAE takes the last 5
        path.unlink()
    student(wan, "--prompt", FOX, "--frames", 3, "--continue", folder, "--out", longer)
    close(latents_in(longer)[:, :2], wan21.vae.encode(vae, pictures_in(folder)[None, 2:]), 1e-5)


def test_a_clip_that_is_continued_is_the_one_that_never_stopped(wan, tmp_path):
    """Bug: noise that starts again, another window, a first chunk with its extra steps in the middle."""
    halves, straight = [tmp_path / f"{i}.safetensors" for i in (0, 1)], tmp_path / "straight.safetensors"
    words = ("--prompt", FOX, "--window", 9)
    student(wan, *words, "--frames", 9, "--out", halves[0])
    student(wan, *words, "--frames", 9, "--continue", halves[0], "--out", halves[1])
    student(wan, *words, "--frames", 18, "--out", straight)
    close(latents_in(halves[1]), latents_in(straight), 1e-4)


def test_whole_clips_from_a_picture_or_clip(wan, tmp_path, capsys):
    """Bug: a window in which the new part sees only the sink of what it goes on from; no frame left to make. The first
    given frame must matter, and the last, and more so."""
    Image.fromarray(np.zeros((64, 48, 3), dtype=np.uint8)).save(tmp_path / "black.png")
    words = ("--weights", wan, "--prompt", FOX, "--steps", 8, *SIZE, "--guidance", 1)
    run(*words, "--image", tmp_path / "black.png", "--out", tmp_path / "a.safetensors")
    assert latents_in(tmp_path / "a.safetensors").shape[1] == 21
    assert "never saw a clean past" in capsys.readouterr().err
    g, clips = torch.Generator().manual_seed(0), []
    clip = torch.randn(21, 16, 8, 6, generator=g)
    for change in (None, 0, 20):
        changed = clip.clone()
        if change is not None:
            changed[change] += 1
        shard = [{"latents": changed, "text": torch.zeros(1, 4), "caption": ""}]
        latent_folder.write_shard(tmp_path / "given.safetensors", shard)
        run(*words, "--frames", 4, "--continue", tmp_path / "given.safetensors", "--out", tmp_path / "b.safetensors")
        clips.append(latents_in(tmp_path / "b.safetensors")[:, 21:])
    first, last = ((c - clips[0]).abs().mean() for c in clips[1:])
    assert first > 1e-3 and last > 0.3 * first


def test_another_prompt_on_the_way_in_a_sliding_window(wan, net, tmp_path):
    """Bug: --at, --window, --sink or --positions that do not reach the rollout."""
    made = {}
    for name in ("relative", "absolute"):
        out = tmp_path / f"{name}.safetensors"
        student(wan, "--prompt", FOX, "--at", 10, BALL, "--frames", 18, "--window", 9, "--sink", 2, "--positions", name,
                "--out", out)
        made[name] = latents_in(out)
        texts, cache, history = text_of(wan, FOX, BALL).split(1), net.new_cache(9, 2, name == "relative"), []
        grid = schedule(2, 5.0)
        with torch.no_grad():
            for i in range(6):  # the border at or after frame 10 is 12
                if i == 4:
                    cache = recache(net, cache, history, texts[1])
                (new,) = stream(net, lambda _, k, i=i: noise_of(0, 3)(i, k), texts[i >= 4], grid, num_chunks=1,
                                cache=cache, commit_last=True)
                history.append((3 * i, new.x0))
        close(made[name], torch.cat([x for _, x in history], 1), 1e-4)
    assert (made["relative"] - made["absolute"])[:, 9:].abs().max() > 1e-3


def test_prompts_on_the_way_may_come_in_any_order(wan, tmp_path):
    """Bug: a change of prompt that wipes out another which is given after it."""
    changes, made = {"early": ("--at", 3, BALL), "late": ("--at", 6, "the moon")}, {}
    for names in (("early", "late"), ("late", "early"), ("early",), ("late",)):
        words = [word for name in names for word in changes[name]]
        student(wan, "--prompt", FOX, "--frames", 9, *words, "--out", tmp_path / "x.safetensors")
        made[names] = latents_in(tmp_path / "x.safetensors")
    both = made["early", "late"]
    assert torch.equal(made["late", "early"], both) and torch.equal(made["early",][:, :6], both[:, :6])
    assert all((made[one][:, 6:] - both[:, 6:]).abs().max() > 1e-3 for one in (("early",), ("late",)))


def test_prompt_embeds_need_no_text_encoder(wan, tmp_path):
    """Bug: an embedding cut, padded or rounded otherwise, or that of another prompt."""
    (tmp_path / "prompts.txt").write_text(f"{BALL}\n{FOX}\n")
    embeds = tmp_path / "embeds" / "0.safetensors"
    wan21.text.encode_prompts(tmp_path / "prompts.txt", embeds, wan)
    for negative in ((), ("--negative-prompt", BALL)):
        for i, words in enumerate([(), ("--prompt-embeds", embeds, "--wan", tmp_path)]):
            student(wan, "--prompt", FOX, "--frames", 3, "--guidance", 2.0, *negative, *words, "--out",
                    tmp_path / f"{i}{len(negative)}.safetensors")
        close(*(latents_in(tmp_path / f"{i}{len(negative)}.safetensors") for i in (1, 0)), 1e-5)
    assert (latents_in(tmp_path / "00.safetensors") - latents_in(tmp_path / "02.safetensors")).abs().max() > 1e-3
    files = student(wan, "--prompt-embeds", embeds, "--frames", 3, "--format", "latents", "--out", tmp_path / "all")
    assert [latent_folder.read_shard(path)[0]["caption"] for path in files] == [BALL, FOX]
    with pytest.raises(ValueError, match="no embedding of 1 prompts, 'a dog' for one.*--prompt-embeds"):
        student(wan, "--prompt", "a dog", "--prompt-embeds", embeds)


def test_vbench_names_and_going_on_after_a_stop(wan, tmp_path, monkeypatch):
    """Bug: names that VBench does not find; a stop that loses finished clips or leaves a half one under its name; a
    second run that makes again what is there."""
    words = ("--prompt", FOX, BALL, "--samples", 2, "--frames", 6, "--vbench", "--out", tmp_path / "videos")
    real, calls = Fast.__call__, []

    def stopped(*args, **how):
        calls.append(1)
        if len(calls) == 4 + 4 + 3:  # in the third clip's second chunk: a chunk is two forwards
            raise KeyboardInterrupt
        return real(*args, **how)

    monkeypatch.setattr(Fast, "__call__", stopped)
    with pytest.raises(KeyboardInterrupt):
        student(wan, *words, "--preview")
    names = [f"{prompt}-{i}" for prompt in (FOX, BALL) for i in (0, 1)]
    there = {path.name: path.read_bytes() for path in (tmp_path / "videos").iterdir()}
    assert set(there) == {f"{names[0]}.mp4", f"{names[1]}.mp4", f"{names[2]}-unfinished.mp4", "sample.json"}
    monkeypatch.setattr(Fast, "__call__", real)
    assert len(student(wan, *words, "--preview")) == 2
    made = {path.name for path in (tmp_path / "videos").glob("*.mp4")}
    assert made == {f"{name}.mp4" for name in names} | {f"{names[2]}-unfinished.mp4"}  # which is never replaced
    for name in names[:2]:
        assert (tmp_path / "videos" / f"{name}.mp4").read_bytes() == there[f"{name}.mp4"]
    assert student(wan, *words, "--preview") == []
    with pytest.raises(ValueError, match="--frames 3, expected .* were made with .6., or another --out"):
        student(wan, *words, "--preview", "--frames", 3)
    with pytest.raises(ValueError, match="--seed 1, expected .* .0.,"):
        student(wan, *words, "--preview", "--seed", 1)


@pytest.mark.parametrize("words, message", [
    (("--prompt", FOX, "--chunk", 3, "--frames", 6), "--chunk 3.*usually trained for 21; expect noise"),
    (("--prompt", FOX, "--frames", 3, "--solver", "cm"), "--solver cm.*usually trained for euler"),
    (("--prompt", FOX, "--frames", 3, "--guidance", 1), "--guidance 1.*usually trained for 6.0"),
    (("--prompt", FOX, "--frames", 3, "--steps", 2), "--steps 2.*multi-step teacher"),
])
def test_a_mismatch_is_a_warning_that_says_what_to_expect(wan, tmp_path, capsys, words, message):
    """Bug: somebody's blur or noise without a word of why."""
    run("--weights", wan, "--steps", 8, *SIZE, *words, "--preview", "--out", tmp_path / "x.webp")
    assert re.search(f"warning: {message}", capsys.readouterr().err)


@pytest.mark.parametrize("words, message", [
    ((), "got no prompt, expected some: give --prompt"),
    (("--prompt", FOX, "--prompts", "x.txt"), "--prompt .*--prompts x.txt, expected one of them"),
    (("--prompts", "none.txt"), "none.txt, which cannot be read.*change --prompts"),
    (("--prompt", FOX, "--out", "x.gif"), "--out x.gif, expected a name that ends in"),
    (("--prompt", FOX, BALL), "--out sample.mp4, --batch 1, expected a folder for 2 clips"),
    (("--prompt", FOX, "--vbench"), "--out sample.mp4, expected a folder"),
    (("--prompt", FOX, FOX, "--vbench", "--out", "x"), "each once"),
    (("--prompt", FOX * 9, "--vbench", "--out", "x"), "the name of a file"),
    (("--prompt", FOX, "--at", 40, BALL), "got --at 40, expected at most 18.*--frames"),
    (("--prompt", FOX, "--text-device", "tpu"), "--text-device tpu"),
    (("--prompt", FOX, "--vbench", "--out", "x", "--format", "png"), "--format png, expected mp4"),
    (("--prompt", f"{FOX} / {BALL}", "--vbench", "--out", "x"), "the name of a file"),
    (("--prompt", FOX, "--at", "0", BALL), "got --at 0, expected"),
    (("--prompt", FOX, "--at", "x", BALL), "got --at x, expected"),
    (("--prompt", FOX, "--frames", 4), "--frames 4, --chunk 3, expected a multiple"),
    (("--prompt", FOX, "--height", 20), "--height 20.*multiples of 16"),
    (("--prompt", FOX, "--window", 2), "--window at least"),
    (("--prompt", FOX, "--samples", 0), "--samples 0, expected a number from 1"),
    (("--prompt", FOX, "--batch", 0), "--batch 0, expected a number from 1"),
    (("--prompt", FOX, "--chunk", 0), "--chunk 0, expected a number from 1"),
    (("--prompt", FOX, "--image", "a", "--continue", "b"), "one of --image and --continue"),
    (("--prompt", FOX, "--wan", "nowhere"), "nowhere.*--wan"),
    (("--prompt", FOX, "--continue", "none.safetensors"), "got no readable none.safetensors.*change --continue"),
    (("--prompt", FOX, "--image", "none.png"), "none.png.*change --image"),
    (("--prompt", FOX, "--weights", "none.pt"), "got no file none.pt.*--weights"),
    (("--prompt", FOX, "--image", "none.png", "--preview"), "none.png"),
    (("--prompt", FOX, "--part", "critic"), "critic.*--part"),
    (("--prompt", FOX, "--size", "wan14b"), "change --size to wan1.3b"),
    (("--prompt", FOX, "--device", "tpu"), "--device tpu"),
    (("--prompt", FOX, "--attention", "cudnn"), "--attention cudnn, expected flash or math on a CPU"),
])
def test_bad_input_is_named(wan, tmp_path, monkeypatch, words, message):
    """Bug: a traceback from deep inside, or an error after the hour that it took to get there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Fast, "__call__", None)  # nothing may be sampled before
    with pytest.raises(ValueError, match=message):
        student(wan, *words)


def test_clips_to_go_on_from_must_fit(wan, tmp_path):
    """Bug: latents of another size or of nothing that fail inside the network."""
    path = tmp_path / "clip.safetensors"
    fits = {"latents": torch.zeros(3, 16, 8, 6)}
    for clips in ([{"latents": torch.zeros(3, 16, 4, 4)}], [{}], [fits, fits]):
        latent_folder.write_shard(path, [{"text": torch.zeros(1, 4), "caption": "a", **clip} for clip in clips])
        with pytest.raises(ValueError, match="clip.safetensors with .*expected one.*16, 8, 6.*--continue"):
            student(wan, "--prompt", FOX, "--continue", path)
