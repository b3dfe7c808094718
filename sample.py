"""Sample a model: prompts in, moving pictures out, chunk by chunk.

    python sample.py                                      # the newest student in runs/, all prompts of the toy world
    python sample.py --prompt "red ball" --at 32 "blue bar" --frames 64 --seed 1 --out ball.webp
    python sample.py --weights runs/toy/teacher_forcing.safetensors --steps 40 --solver euler
    python sample.py --size wan1.3b --weights Wan2.1-T2V-1.3B --prompt "a red fox runs through snow"
    python sample.py --weights student.pt --wan Wan2.1-T2V-1.3B --prompt "a red fox" --image fox.png --out fox.mp4
    python sample.py --weights student.pt --wan Wan2.1-T2V-1.3B --prompt-embeds prompts.safetensors --out videos

--weights takes every layout that wan21.py reads. Steps, solver, chunk, window and shift default to what a checkpoint of
train.py was trained for; Wan's own weights to whole clips in 50 guided steps, as Wan samples them; public .pt files to
few-step students, chunk by chunk (if yours is none of these, `python wan21.py convert --stage ...` records what it is).
What departs from that is a warning that says what to expect.

Frames are latent frames: pictures of the toy world; of Wan, n latent frames are 1 + 4 (n - 1) pictures. Clips longer
than those of training slide a window over the past: the first --sink frames and the last ones up to --window frames in
all, so memory and time per chunk stay flat. Positions are counted inside the window, where training has been, or
(--positions absolute) from the start of the clip.

A sample depends on its prompt, its seed and the settings, not on what is sampled beside it; sample k of a prompt has
seed --seed + k.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

import data
import encoders
import video
import wan21
from files import about_of, printable, read_json, run_command, write_json
from flowmap import Guided
from model import SIZES, check_device, check_window
from rollout import grids, story

# What weights that record nothing are made for. Wan's own: generate.py of Wan2.1, and its README for the 1.3B model
# (but UniPC there); public students: Self Forcing's and Causal Forcing's configurations.
WAN = dict(stage="Wan 2.1", causal=False, few_step=False, solver="euler", steps=50, first_steps=1, chunk=21, shift=5.0,
           guidance=5.0, frames=21, mixed_steps=(), window=0, sink=1, height=60, width=104)
WAN_SMALL = WAN | dict(shift=8.0, guidance=6.0)
STUDENT = WAN | dict(stage="a public student", causal=True, few_step=True, solver="cm", steps=4, first_steps=4, chunk=3,
                     guidance=1.0, mixed_steps=(4,))
RANGES = [  # flags, their least, their most: beyond it is a slip of the hand, or would fill a machine
    ("steps first_steps samples batch", 1, 10**4), ("frames chunk window", 1, 10**6), ("seed", 0, 2**62),
    ("sink", 0, 10**6), ("height width", 1, 10**4), ("shift", 1e-6, 1e6), ("guidance", -1e3, 1e3)]
FORMATS = {"mp4": ".mp4", "webp": ".webp", "png": "", "latents": ".safetensors"}  # and their endings


def newest_student() -> Path:
    """The autoregressive student last trained, of any run."""
    found = {path: about_of(path) for path in Path("runs").glob("*/*.safetensors")
             if not path.stem.endswith("_raw")}
    found = {path: about for path, about in found.items() if about.get("causal") and about.get("few_step")
             and isinstance(about.get("saved"), float | int)}
    if not found:
        raise ValueError("got no student in runs/, expected runs/*/salt.safetensors or runs/*/causal_cd.safetensors: "
                         "run `python train.py` first, or give --weights")
    return max(found, key=lambda path: found[path]["saved"])


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    what = p.add_argument_group("what")
    what.add_argument("--weights", type=Path, help="a file that train.py left, or Wan 2.1's, or a public .pt, or a "
                                                   "folder of them (default: the newest student in runs/)")
    what.add_argument("--part", default="", help="of a .pt with several networks, which (default: the averaged one)")
    what.add_argument("--size", choices=tuple(SIZES), help="of the network (default: as recorded, or found by shape)")
    what.add_argument("--prompt", nargs="+", help='each in quotes: "red ball" (default: all of the toy world)')
    what.add_argument("--prompts", type=Path, metavar="FILE", help="prompts, one a line, in place of --prompt")
    what.add_argument("--prompt-embeds", type=Path, metavar="FILE", help="prompts already encoded by wan21.py "
                                                                         "encode-prompts (default: all of them)")
    what.add_argument("--at", nargs=2, action="append", default=[], metavar=("FRAME", "PROMPT"),
                      help="go on with another prompt at this frame, or at the next border of chunks")
    what.add_argument("--negative-prompt", help="what guidance leads away from (default: Wan's)")
    what.add_argument("--image", type=Path, help="a picture to start from: the first frame")
    what.add_argument("--continue", type=Path, dest="clip", metavar="CLIP", help="a clip to go on from: raw latents of "
                                                                                "--format latents, or a video")
    what.add_argument("--samples", type=int, default=1, help="of each prompt (default: 1)")
    what.add_argument("--seed", type=int, default=0, help="of the noise of the first sample (default: 0)")
    what.add_argument("--frames", type=int, help="latent frames to make (default: as trained; 24 on the toy)")
    what.add_argument("--height", type=int, help="of the picture, pixels (default: as trained, 480)")
    what.add_argument("--width", type=int, help="of the picture, pixels (default: as trained, 832)")
    how = p.add_argument_group("how")
    how.add_argument("--steps", type=int, help="denoising steps per chunk (default: 2 for a student of the toy, 4 for "
                                               "one of Wan, 40 for a teacher, 50 for Wan)")
    how.add_argument("--first-steps", type=int, help="least steps of the first chunk (default: as trained)")
    how.add_argument("--chunk", type=int, help="frames per chunk; all --frames for a bidirectional model (default: as "
                                               "trained)")
    how.add_argument("--window", type=int, help="frames a frame may see, with itself (default: the length trained on)")
    how.add_argument("--sink", type=int, help="of these, the first frames of the clip (default: as trained, or 1)")
    how.add_argument("--positions", choices=("relative", "absolute"), default="relative",
                     help="of frames, counted inside the window or from the start of the clip (default: relative)")
    how.add_argument("--solver", choices=("cm", "euler"), help="default: cm for a student, euler for a teacher")
    how.add_argument("--shift", type=float, help="timestep shift (default: as trained)")
    how.add_argument("--guidance", type=float, help="guidance w (default: 1, none, for a student; as recorded for a "
                                                    "teacher)")
    where = p.add_argument_group("where")
    where.add_argument("--out", type=Path, help="a file, all clips side by side, which is replaced, or a folder, a "
                       "file per clip, where those that are there stay (default: sample.webp, of Wan sample.mp4)")
    where.add_argument("--format", choices=tuple(FORMATS), help="of files in a folder (default: mp4, or webp where "
                                                                "mp4 cannot be written)")
    where.add_argument("--vbench", action="store_true", help="name files as VBench expects: PROMPT-0.mp4, PROMPT-1.mp4")
    where.add_argument("--wan", type=Path, help="folder of Wan 2.1's text encoder and VAE (default: that of --weights)")
    where.add_argument("--preview", action="store_true", help="draw latents without the VAE: small, blurred, at once")
    where.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    where.add_argument("--text-device", help="cpu, for cards without 11 GB for the text encoder (default: --device)")
    where.add_argument("--precision", choices=("fp32", "bf16"), help="of network and VAE (default: bf16 for Wan on a "
                                                                        "GPU, else fp32)")
    where.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    where.add_argument("--batch", type=int, help="clips at a time (default: 12 of the toy world, 1 of Wan)")
    return p.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# Settings

def lacking(config: dict) -> set:
    """What a checkpoint's settings should hold and do not."""
    kinds = dict.fromkeys("first_steps sink window chunk frames height width".split(), int)
    kinds |= {"guidance": float | int, "shift": float | int, "mixed_steps": list | tuple}
    return {name for name, kind in kinds.items() if not isinstance(config.get(name), kind)}


def trained_for(about: dict, size: str) -> dict:
    """The settings that weights were made for, as they record them or as is usual for their layout."""
    if about["layout"] == "pt":
        return STUDENT
    if about["layout"] != "own" or about.get("stage") == "bidirectional" and "source" in about:  # also when converted
        return WAN_SMALL if size == "wan1.3b" else WAN
    c = about.get("config")
    if not {"stage", "causal", "few_step", "solver"} <= about.keys() or not isinstance(c, dict) or lacking(c):
        raise ValueError("got no finished stage's checkpoint, expected a file STAGE.safetensors that train.py left: "
                         "change --weights")
    student = about["few_step"]
    few, causal = 2 if size.startswith("toy") else 4, about["causal"]
    return {"stage": about["stage"], "causal": causal, "few_step": student, "solver": about["solver"],
            "steps": few if student else 40, "first_steps": c["first_steps"] if student and causal else 1,
            "sink": c["sink"] if c["window"] else 1, "mixed_steps": c["mixed_steps"],
            "guidance": 1.0 if student else c["guidance"],
            "chunk": c["chunk"] if causal else c["frames"],
            **{name: c[name] for name in ("shift", "frames", "window", "height", "width")}}


def with_defaults(args, about: dict, size: str):
    """Fill what was not given from the record of the weights; warn where what was given departs from it."""
    trained, toy = trained_for(about, size), toy_world(SIZES[size])
    causal, student, pixels = trained["causal"], trained["few_step"], 1 if toy else 8  # per latent
    expected = {name: trained[name] for name in ("steps", "first_steps", "chunk", "solver", "shift", "guidance")}
    expected |= {"window": trained["window"] or trained["frames"], "sink": trained["sink"],
                 "height": trained["height"] * pixels, "width": trained["width"] * pixels}
    if not causal and args.chunk is None:  # a clip at once
        args.frames = expected["chunk"] = args.frames or trained["frames"] - bool(args.image)
        expected["window"] = None
    need(args.chunk is None or 1 <= args.chunk <= 10**6, args, "chunk", "a number from 1 to 1e+06")
    slides = args.window is None and expected["window"] is not None
    for name, value in expected.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if slides:  # at least over the chunk before, however short the training's clips were
        args.window = expected["window"] = max(args.window, args.sink + args.chunk)
    if args.frames is None:
        args.frames = 24 if toy else (trained["frames"] - bool(args.image)) // args.chunk * args.chunk
    defaults = {"batch": len(data.PROMPTS) if toy else 1, "text_device": args.device,
                "wan": args.weights if args.weights.is_dir() else args.weights.parent,
                "precision": "bf16" if args.device.startswith("cuda") and not toy else "fp32",
                "out": Path("sample.mp4" if not toy and ".mp4" in video.formats() else "sample.webp")}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)

    for names, low, high in RANGES:
        for name in names.split():
            value = getattr(args, name)
            need(value is None or low <= value <= high, args, name, f"a number from {low:g} to {high:g}")
    for name in ("device", "text_device"):
        check_device(getattr(args, name), f"--{name.replace('_', '-')}")
    need(args.frames % args.chunk == 0, args, "frames chunk", "a multiple of the chunk")
    need(not (args.image and args.clip), args, "image clip", "one of --image and --continue")
    need(toy or args.height % 16 == args.width % 16 == 0, args, "height width", "multiples of 16")
    need(not toy or (args.height, args.width) == (data.SIZE, data.SIZE), args, "height width",
         f"{data.SIZE} x {data.SIZE}, the size of the toy world")
    check_window(args.window, args.sink, args.chunk)

    def warn(name, expect, made_for=None):
        made = "were made" if about["layout"] == "own" else "are made as a rule"
        say(f"warning: --{name.replace('_', '-')} {getattr(args, name)}, but the weights ({trained['stage']}) {made} "
            f"for {made_for or expected[name]}; expect {expect}")

    if not causal and args.chunk < args.frames:
        warn("chunk", "noise, as they need the whole clip at once. If they were trained to go chunk by chunk, convert "
                      "them by `python wan21.py convert --stage causal_cd`, or salt, teacher_forcing ...")
    elif not causal and (args.image or args.clip):
        say(f"warning: a start is given, but the weights ({trained['stage']}) never saw a clean past; expect a jump "
            "where it ends")
    elif causal and args.chunk != expected["chunk"]:
        warn("chunk", "frames that jump at the borders of chunks")
    if not causal and args.frames > trained["frames"]:
        warn("frames", "repetition and blur", trained["frames"])
    for name, expect in {
            "solver": "other motion, and at larger scale blur: students are made for cm, teachers for euler",
            "guidance": "distorted pictures: a student has its teacher's guidance in it already" if student else
                        "duller pictures or, above it, garish ones",
            "shift": "errors at times it has not seen", "first_steps": "another first frame, and all that follow",
            "height": "worse pictures", "width": "worse pictures"}.items():
        if getattr(args, name) != expected[name]:
            warn(name, expect)
    if student and args.steps not in (1, *trained["mixed_steps"]):
        warn("steps", "errors at the times between", ", ".join(map(str, trained["mixed_steps"])))
    if not student and args.steps < 8:
        warn("steps", "a blur: this is a multi-step teacher. Its students do this well")
    if causal and args.window != expected["window"]:
        warn("window", "errors at positions it has never seen, or motion that forgets its past")
    need(not (args.negative_prompt is not None and toy), args, "negative_prompt", "none: the toy world knows just the "
         "empty prompt")
    if args.negative_prompt and args.guidance == 1:
        say("warning: --negative-prompt changes nothing without --guidance")
    if causal and trained["window"] and args.sink != expected["sink"]:
        warn("sink", "a past of another kind than in training")
    return args


def say(what: str):
    print(what, file=sys.stderr, flush=True)


def need(ok, args, names, expected):
    if not ok:
        got = ", ".join(f"--{'continue' if n == 'clip' else n.replace('_', '-')} {getattr(args, n)}"
                        for n in names.split())
        raise ValueError(f"got {got}, expected {expected}")


# ---------------------------------------------------------------------------------------------------------------------
# What to sample

@dataclass
class Sample:
    prompt: str
    seed: int
    path: Path | None = None  # its own file, if it has one


def check_out(args):
    """ValueError if --out would replace what this command reads, or a file that it has not made."""
    inputs = [args.weights, args.image, args.clip, args.prompts, args.prompt_embeds, args.wan]
    for path in filter(None, inputs):
        need(os.path.realpath(path) != os.path.realpath(args.out), args, "out", f"another place than that of {path}")
    if args.out.suffix:
        need(not args.out.is_dir(), args, "out", "a file, but there is a folder of that name: change --out")
        need(not args.out.exists() or is_ours(args.out), args, "out", "a new name, or that of a clip that sample.py "
             "has made, which would be replaced: move the file away, or change --out")
    else:
        need(not args.out.is_file(), args, "out", "a folder, but there is a file of that name: change --out")


def is_ours(path) -> bool:
    """Whether a file is a clip, or latents, that this project wrote: it says so inside."""
    if path.suffix == ".safetensors":
        try:
            return about_of(path).get("made_by") == video.MARK
        except ValueError:
            return False
    with open(path, "rb") as f:
        start = f.read(2**20)
        f.seek(max(0, path.stat().st_size - 2**20))
        return video.MARK.encode() in start + f.read()


def samples_of(args, prompts) -> list[Sample]:
    """All samples that are asked for and are not there yet."""
    check_out(args)
    found = [Sample(prompt, args.seed + k) for prompt in prompts for k in range(args.samples)]
    folder = args.out.parent if args.out.suffix else args.out
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ValueError(f"got --out {args.out} ({e}), expected a place for files: change --out") from e
    if args.out.suffix:
        need(args.out.suffix in (".mp4", ".webp", ".safetensors"), args, "out", "a name that ends in .mp4, .webp or "
             ".safetensors, or that of a folder, without ending")
        need(args.out.suffix in (*video.formats(), ".safetensors"), args, "out", "another format, or for .mp4 `pip "
             "install av`")
        need(len(found) <= args.batch, args, "out batch", f"a folder for {len(found)} clips, or all in one batch")
        need(not args.vbench and not args.format, args, "out", "a folder for --vbench or --format")
        return found
    need(not args.vbench or args.format in (None, "mp4"), args, "format", "mp4 for --vbench")
    form = args.format or ("mp4" if args.vbench or ".mp4" in video.formats() else "webp")
    for i, sample in enumerate(found):
        words = re.sub(r"\W+", "-", sample.prompt)[:60].encode()[:120].decode(errors="ignore").strip("-")
        name = f"{i // args.samples:04d}_{words}_seed{sample.seed}"
        if args.vbench:
            name = f"{sample.prompt}-{i % args.samples}"
            unfit = not sample.prompt.strip() or sample.prompt.startswith(".") or printable(name) != name
            if unfit or set("/\n") & set(name) or len(name.encode()) > 230 or prompts.count(sample.prompt) > 1:
                raise ValueError(f"got the prompt {sample.prompt!r}, expected one that can be the name of a file, and "
                                 "each once: change it, or leave out --vbench")
        sample.path = args.out / f"{name}{FORMATS[form]}"
    need(FORMATS[form] in (*video.formats(), ".safetensors"), args, "format", "another, or for mp4 `pip install av`")
    left = [sample for sample in found if not sample.path.exists()]
    same_settings(args, found, new=len(left) == len(found))
    if len(left) < len(found):
        print(f"{len(found) - len(left)} of {len(found)} clips are in {args.out} already and stay as they are")
    return left


def same_settings(args, samples, new: bool):
    """Clips are added to a folder only with the settings of those that are there: sample.json keeps them, with the
    prompt of every file, whose name holds but its beginning, and a digest of the weights."""
    path, free = args.out / "sample.json", {"prompt", "prompts", "samples", "seed", "out", "format", "vbench", "wan",
                                            "device", "text_device", "compile", "batch", "prompt_embeds"}
    free -= {"seed"} if args.vbench else set()  # which VBench's names do not tell
    now = {k: str(v) for k, v in vars(args).items() if k not in free} | {"weights_digest": wan21.digest(args.weights)}
    now |= {f"{name}_digest": wan21.digest(getattr(args, name)) for name in ("image", "clip") if getattr(args, name)}
    then = read_json(path, "what sample.py left there: move it away, or change --out") if path.exists() else {}
    if then and "weights" not in then:
        raise ValueError(f"got {path}, which sample.py has not written, expected its own or none: change --out")
    prompts = then.get("prompts") if isinstance(then.get("prompts"), dict) else {}
    if not new and then:
        for name in now:
            if name in ("weights", "weights_digest"):
                need(now[name] == then.get(name, now[name]), args, "weights", "the very weights that the clips in "
                     f"{args.out} were made with, {then.get('weights')}, or another --out")
            elif name.endswith("_digest"):
                need(now[name] == then.get(name, now[name]), args, name.removesuffix("_digest"), "the very file that "
                     f"the clips in {args.out} go on from, or another --out")
            else:
                need(now[name] == then.get(name), args, name, f"{then.get(name)}, as for the clips in {args.out}, or "
                     "another --out")
        for sample in samples:
            made = prompts.get(sample.path.name, sample.prompt)
            if sample.path.exists() and made != sample.prompt:
                raise ValueError(f"got --out {args.out} with {sample.path.name} of the prompt {made!r}, expected of "
                                 f"{sample.prompt!r}: change --out")
    prompts |= {sample.path.name: sample.prompt for sample in samples}
    write_json(path, now | {"prompts": prompts}, one_of_many=True)


def named(flag: str, read: Callable, *args, **how):
    """read(*args); to a ValueError the flag is added that would change it."""
    try:
        return read(*args, **how)
    except ValueError as e:
        raise ValueError(f"{e}: change {flag}") from e


def is_text(prompt: str) -> bool:
    """Whether a prompt can be written down: bytes of another encoding can not."""
    try:
        return bool(prompt.encode()) or not prompt
    except UnicodeEncodeError:
        return False


def prompts_of(args, toy) -> list[str]:
    need(bool(args.prompt) + bool(args.prompts) < 2, args, "prompt prompts", "one of them")
    prompts = args.prompt or (data.PROMPTS if toy else [])
    if args.prompts:
        prompts = named("--prompts", encoders.read_prompts, args.prompts)
    elif args.prompt_embeds and not args.prompt:
        prompts = encoders.read_prompt_embeds(args.prompt_embeds)[0]
    for prompt in (*prompts, *(prompt for _, prompt in args.at)):
        if not is_text(prompt) or "\0" in prompt:
            raise ValueError(f"got the prompt {prompt!r}, expected text in UTF-8: change --prompt or --prompts")
    if not prompts:
        raise ValueError("got no prompt, expected some: give --prompt, --prompts or --prompt-embeds")
    return prompts


def texts_of(args, config, prompts) -> tuple[dict[str, Tensor], Tensor]:
    """The embedding `l d` of each prompt, and of the negative prompt, or of none (of no use without guidance)."""
    nothing = torch.zeros(1, config.text_dim)
    if toy_world(config):
        return {prompt: data.embed([data.parse_prompt(prompt)])[0] for prompt in prompts}, nothing
    guided, given = args.guidance != 1, args.negative_prompt is not None
    negative = args.negative_prompt if given else encoders.NEGATIVE_PROMPT
    if args.prompt_embeds:
        texts = dict(zip(*encoders.read_prompt_embeds(args.prompt_embeds)))
        wanted = prompts + [negative] * (guided and given)
        for prompt in wanted:
            if prompt not in texts:
                raise ValueError(f"got the prompt {prompt!r}, expected one of the {len(texts)} in "
                                 f"{args.prompt_embeds}: encode it too, or leave out --prompt-embeds")
        if guided:
            nothing = texts[negative] if given else encoders.read_null(args.prompt_embeds)
        for text in (*texts.values(), *([nothing] if guided else ())):
            need(text.shape[1] == config.text_dim and len(text) <= config.text_len, args, "prompt_embeds",
                 f"embeddings of at most {config.text_len} tokens of width {config.text_dim}, not {tuple(text.shape)}")
        return {prompt: texts[prompt] for prompt in prompts}, nothing
    say(f"text encoder of {args.wan}")
    encoder = encoders.load_text_encoder(args.wan, args.text_device)
    texts = {prompt: encoder.encode([prompt])[0].float().cpu() for prompt in prompts}
    return texts, encoder.encode([negative])[0].float().cpu() if guided else nothing


def given_latents(args, config, vae) -> Tensor | None:
    """What to start from, `f c h w`: the latent of --image, or those of --continue."""
    path, flag = args.image or args.clip, "--image" if args.image else "--continue"
    if path is None:
        return None
    if path.suffix == ".safetensors":
        need(not args.image, args, "image", "a picture: --continue takes a clip of latents")
        return clip_in(path, (config.in_dim, *latent_size(args, config)))
    fps = 16 if args.clip and not toy_world(config) else None
    frames = torch.from_numpy(named(flag, video.read, path, frames=1 if args.image else None, height=args.height,
                                    width=args.width, fps=fps))
    if toy_world(config):
        return data.from_rgb(rearrange(frames, "f h w c -> f c h w") / 255)
    need(vae is not None, args, "preview", f"the VAE, to encode {path}: leave out --preview")
    left_out = (len(frames) - 1) % 4  # the VAE takes 1 + 4 k pictures; the last ones matter
    if left_out:
        say(f"{path}: {len(frames)} pictures at 16 per second; the first {left_out} are left out, for 1 + 4 k")
    return encoders.encode(vae, frames[None, left_out:])[0].cpu()


def clip_in(path, shape) -> Tensor:
    """The latents of the one clip in a file."""
    clips = [sample["latents"] for sample in named("--continue", data.read_shard, path) if "latents" in sample]
    if len(clips) != 1 or clips[0].shape[1:] != shape:
        got = ", ".join(str(tuple(clip.shape)) for clip in clips[:3]) or "no latents"
        raise ValueError(f"got {path} with {len(clips)} clips ({got}), expected one, of f frames of {shape}: change "
                         "--continue, --height or --width")
    return clips[0]


def latents_only(args) -> bool:
    return args.format == "latents" or args.out.suffix == ".safetensors"


def needs_vae(args, toy) -> bool:
    encodes = args.image or args.clip and args.clip.suffix != ".safetensors"
    return not toy and not args.preview and bool(encodes or not latents_only(args))


def whole_number(frame: str) -> int:
    if not frame.isdecimal() or len(frame) > 9 or int(frame) < 1:
        raise ValueError(f"got --at {frame}, expected the number of a frame after the first: change --at, or --prompt")
    return int(frame)


def toy_world(config) -> bool:
    return config.in_dim == 3


def latent_size(args, config) -> tuple[int, int]:
    return (args.height, args.width) if toy_world(config) else (args.height // 8, args.width // 8)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling

def decoder(args, config, vae, clips: int) -> tuple[Callable[[Tensor], Tensor], float]:
    """A function from the next chunk x0 `b n c h w` to its pictures, bytes `b f h w 3`, for one batch; and how many of
    them are a second. clips: that share a picture."""
    if latents_only(args):
        return lambda x0: torch.empty(len(x0), 0, 1, 1, 3, dtype=torch.uint8), 16
    if toy_world(config):
        return lambda x0: torch.from_numpy(data.pixels(x0.float(), scale=8 if clips > 2 else 20)), 5
    if args.preview:
        return encoders.preview, 4  # one picture per latent frame
    return encoders.StreamDecoder(vae).decode, 16


@contextmanager
def output(path: Path, fps: float, samples: list[Sample], texts: dict[str, Tensor]):
    """A function that adds the next chunk of some clips, x0 `b n c h w` and pictures `b f h w 3`, to one file: side by
    side, or as raw latents. If an exception ends the context, what was added is kept, as NAME-unfinished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem[:100]}-{os.getpid()}{path.suffix}")  # nobody else's, whoever else is here
    chunks, columns = [], next(n for n in (6, 5, 4, 3, 2, 1) if len(samples) % n == 0)
    try:
        if path.suffix == ".safetensors":
            try:
                yield lambda x0, pictures: chunks.append(x0.float().cpu())
            finally:
                clips = zip(samples, torch.cat(chunks, dim=1)) if chunks else ()
                shard = [{"latents": x, "text": texts[sample.prompt], "caption": sample.prompt} for sample, x in clips]
                if shard:
                    data.write_shard(unfinished, shard, video.MARK)
        else:
            with video.writer(unfinished, fps) as write:
                yield lambda x0, pictures: write(
                    rearrange(pictures, "(r c) f h w rgb -> f (r h) (c w) rgb", c=columns).cpu().numpy())
    except BaseException:
        if unfinished.exists():
            names = (path.with_name(f"{path.stem}-unfinished{i or ''}{path.suffix}") for i in range(10**6))
            kept = next(name for name in names if not name.exists())
            os.rename(unfinished, kept)
            say(f"kept what there is: {kept}")
        raise
    os.replace(unfinished, path)


def sample_batch(args, config, net, vae, given, texts, switches, batch: list[Sample]) -> str:
    """Generate a batch of clips and write them as they come. Returns how much that was, and how fast."""
    groups = [(sample.path, [sample]) for sample in batch] if batch[0].path else [(args.out, batch)]
    sizes = [len(group) for _, group in groups]

    def text(prompts):
        return encoders.pad_text([texts[prompt] for prompt in prompts], config.text_len).to(args.device)

    def noise(i, k):
        shape = (args.chunk, config.in_dim, *latent_size(args, config))
        return data.noises([sample.seed for sample in batch], shape, i, k).to(args.device)

    story_of = [(0, text([sample.prompt for sample in batch]))]
    story_of += [(frame, text([prompt] * len(batch))) for frame, prompt in switches]
    grid, first_grid = grids(args.steps, args.shift, args.first_steps)
    cache = net.new_cache(args.window, args.sink, args.positions == "relative")
    given = None if given is None else given.to(args.device).expand(len(batch), *given.shape)
    decode, fps = decoder(args, config, vae, sizes[0])
    frames_given, made, first = 0 if given is None else given.shape[1], 0, None
    unit = "latent frames" if latents_only(args) else "pictures"
    name = printable(batch[0].prompt[:30]) if len(batch) == 1 else f"{len(batch)} clips"
    with ExitStack() as files, tqdm(total=frames_given + args.frames, unit="frame", desc=name) as bar:
        adders = [files.enter_context(output(path, fps, group, texts)) for path, group in groups]
        start = time.perf_counter()
        for x0 in story(net, noise, story_of, grid, chunk=args.chunk, frames=args.frames, given=given, cache=cache,
                        first_grid=first_grid, solver=args.solver):
            if not x0.isfinite().all():
                raise ValueError(f"got non-finite frames from {args.weights}, expected finite ones: change --weights, "
                                 "--guidance or --precision")
            drawn = decode(x0)
            for add, x, some in zip(adders, x0.split(sizes), drawn.split(sizes)):
                add(x, some)
            made += drawn.shape[1] or x0.shape[1]
            bar.update(x0.shape[1])
            if bar.n > frames_given:
                now = time.perf_counter() - start, made
                first = first or now
                if now != first:
                    bar.set_postfix_str(f"{len(batch) * (made - first[1]) / (now[0] - first[0]):.1f} {unit} per second")
    then = f", then {bar.postfix}" if bar.postfix else ""
    return f"{len(batch)} x {made} {unit}, the first after {first[0]:.2f} s{then}"


@torch.no_grad()
def main(args) -> list[Path]:
    """Write the clips; returns the files."""
    args.weights = args.weights or newest_student()
    weights, about = wan21.read_weights(args.weights, args.part)  # mapped, not read yet
    size = args.size or about.get("size") or wan21.size_of(weights, args.weights)
    if not isinstance(size, str) or size not in SIZES:
        raise ValueError(f"got {args.weights} of size {str(size)[:40]}, expected one of {', '.join(SIZES)}: change "
                         "--weights, or give --size")
    config, toy = SIZES[size], toy_world(SIZES[size])
    wan21.check_fit(config, weights, args.weights)
    args = with_defaults(args, about, size)
    samples = samples_of(args, prompts_of(args, toy))
    switches = sorted((whole_number(frame), prompt) for frame, prompt in args.at)
    if len({frame for frame, _ in switches}) < len(switches):
        raise ValueError(f"got --at twice at one frame ({args.at}), expected another frame for each: change --at")
    if not samples:
        return []
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    vae = encoders.load_vae(args.wan, args.device, dtype) if needs_vae(args, toy) else None
    given = given_latents(args, config, vae)
    last = (0 if given is None else len(given)) + args.frames - args.chunk
    need(not switches or last > 0, args, "at", "none for a clip that is one chunk")
    if switches and switches[-1][0] > last:
        raise ValueError(f"got --at {switches[-1][0]}, expected at most {last}, where the last chunk starts: change "
                         "--at or --frames")
    texts, null = texts_of(args, config, [sample.prompt for sample in samples] + [prompt for _, prompt in switches])
    say(f"network of {args.weights}")
    net = wan21.load(config, args.weights, args.device, dtype, args.part)[0].eval().requires_grad_(False)
    if args.compile:
        net.compile_blocks()
    if args.guidance != 1:
        net = Guided(net, encoders.pad_text([null], config.text_len)[0].to(args.device), args.guidance)
    grid, first_grid = grids(args.steps, args.shift, args.first_steps)
    times = [round(t, 4) for t in grid.tolist()]
    print(f"{args.weights} ({trained_for(about, size)['stage']}): steps at t = {times[:8]}{' ...' * (args.steps > 8)}, "
          f"{len(times)} in all, {len(first_grid)} in the first chunk, {args.solver}, guidance {args.guidance}, chunks "
          f"of {args.chunk}, window {args.window or 'of all'}, sink {args.sink}, {args.height} x {args.width} pixels, "
          f"{args.precision}")
    for start in range(0, len(samples), args.batch):
        batch = samples[start : start + args.batch]
        done = sample_batch(args, config, net, vae, given, texts, switches, batch)
        print(f"{batch[0].path if len(batch) == 1 and batch[0].path else args.out}: {done}")
    return [sample.path for sample in samples] if samples[0].path else [args.out]


def sample_or_say(args):
    try:
        main(args)
    except torch.OutOfMemoryError as e:
        raise OSError(f"{e}\nexpected less: give --text-device cpu, or a smaller --window, --batch, --height or "
                      "--width") from e


if __name__ == "__main__":
    run_command(lambda: sample_or_say(parse()), "stopped; finished clips are kept")
