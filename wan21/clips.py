"""Clips on disk: what sample.py starts from, the files that it writes, and what goes into them, chunk after chunk.

Nothing is replaced that sample.py has not written: its clips say so inside (video.MARK). A folder of clips keeps their
settings in sample.json, with the prompt of every file, whose name holds only its beginning, so that the same command
generates what is missing and another command adds nothing that does not belong there.
"""

import os
import re
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from cluster.files import metadata_of, printable, read_json, write_json
from wan21 import video
from wan21.errors import flag_of, need, say
from wan21.families import FAMILIES
from wan21.vae import encode
from wan21.weights import digest, ends
from worlds import latent_folder

FORMATS = {"mp4": ".mp4", "webp": ".webp", "png": "", "latents": ".safetensors"}  # and their suffixes
FREE = {"prompt", "prompts", "samples", "seed", "out", "format", "vbench", "wan", "device", "text_device", "compile",
        "batch", "prompt_embeds"}  # arguments in which the clips of a folder may differ


@dataclass
class Sample:
    prompt: str
    seed: int
    path: Path | None = None  # its own file, if it has one


def samples_of(args, prompts: list[str]) -> list[Sample]:
    """All samples that are asked for and do not exist yet. ValueError if --out cannot be written, or would replace an
    input or a file that sample.py has not written."""
    out, expect = args.out, partial(need, args)
    suffixes = [suffix for suffix in FORMATS.values() if suffix in (".safetensors", *video.formats())]
    for path in filter(None, (args.weights, args.image, args.clip, args.prompts, args.prompt_embeds, args.wan)):
        expect(os.path.realpath(path) != os.path.realpath(out), "out", f"another place than that of {path}")
    samples = [Sample(prompt, args.seed + k) for prompt in prompts for k in range(args.samples)]
    if out.suffix:
        expect(not out.is_dir() and (not out.exists() or is_ours(out)), "out", "a new name, or that of a clip that "
               "sample.py has written, which would be replaced: change --out")
        expect(out.suffix in suffixes, "out", f"a name that ends in {' '.join(filter(None, suffixes))} (.mp4 needs "
               "requirements-wan.txt), or that of a folder, without ending")
        expect(len(samples) <= args.batch, "out batch", f"a folder for {len(samples)} clips, or all in one batch")
        expect(not args.vbench and not args.format, "out", "a folder for --vbench or --format")
    else:
        form = args.format or ("mp4" if args.vbench or ".mp4" in suffixes else "webp")
        expect(not args.vbench or form == "mp4", "format", "mp4 for --vbench")
        expect(FORMATS[form] in suffixes, "format", "another, as mp4 needs requirements-wan.txt")
    try:
        (out.parent if out.suffix else out).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ValueError(f"got --out {out} ({e}), expected a place for files: change --out") from e
    if out.suffix:
        return samples
    for i, sample in enumerate(samples):
        sample.path = out / f"{file_name(sample, *divmod(i, args.samples), args.vbench)}{FORMATS[form]}"
    if args.vbench and len(set(prompts)) < len(prompts):
        raise ValueError("got a prompt twice, expected each once: leave out --vbench")
    left = [sample for sample in samples if not sample.path.exists()]
    record_settings(args, samples, new=len(left) == len(samples))
    if len(left) < len(samples):
        print(f"{len(samples) - len(left)} of {len(samples)} clips are in {out} already and stay as they are")
    return left


def is_ours(path: Path) -> bool:
    """Whether a file is a clip, or latents, that sample.py wrote: it says so inside."""
    if path.suffix != ".safetensors":
        return video.MARK.encode() in ends(path)
    with suppress(ValueError):
        return metadata_of(path).get("made_by") == video.MARK
    return False


def file_name(sample: Sample, number: int, k: int, vbench: bool) -> str:
    """The name, without suffix, of the k-th sample of a prompt, by its number. vbench: as VBench expects it."""
    if not vbench:
        words = re.sub(r"\W+", "-", sample.prompt)[:60].encode()[:120].decode(errors="ignore").strip("-")
        return f"{number:04d}_{words}_seed{sample.seed}"
    name = f"{sample.prompt}-{k}"
    if (not sample.prompt.strip() or sample.prompt.startswith(".") or printable(name) != name
            or set("/\n") & set(name) or len(name.encode()) > 230):
        raise ValueError(f"got the prompt {sample.prompt!r}, expected the name of a file: leave out --vbench")
    return name


def record_settings(args, samples: list[Sample], new: bool) -> None:
    """Write sample.json, after a check that the clips of the folder have the same prompts and settings. ValueError,
    naming the setting, if they have others. new: none of the samples exists yet."""
    path = args.out / "sample.json"
    old = read_json(path, "what sample.py left there: move it away, or change --out") if path.exists() else {}
    if old and "weights" not in old:
        raise ValueError(f"got {path}, which sample.py has not written, expected its own or none: change --out")
    free = FREE - ({"seed"} if args.vbench else set())  # which the names of VBench do not tell
    settings = {name: str(value) for name, value in vars(args).items() if name not in free}
    for name in ("weights", "image", "clip"):
        if path_given := getattr(args, name):
            settings[f"{name}_digest"] = digest(path_given)
    for name, value in settings.items() if old and not new else ():
        flag = name.removesuffix("_digest")
        need(args, value == old.get(name, value), flag, f"the very {flag} that the clips in {args.out} were made with "
             f"({old.get(name)}), or another --out")
    prompts = old.get("prompts") if isinstance(old.get("prompts"), dict) else {}
    for sample in samples:
        made = prompts.get(sample.path.name, sample.prompt)
        if sample.path.exists() and made != sample.prompt:
            raise ValueError(f"got {sample.path} of the prompt {made!r}, expected of {sample.prompt!r}: change --out")
    prompts |= {sample.path.name: sample.prompt for sample in samples}
    write_json(path, settings | {"prompts": prompts}, one_of_many=True)


def latent_shape(args, config) -> tuple[int, int, int]:
    """c h w of a latent frame."""
    pixels = FAMILIES[config.family].pixels_per_latent
    return config.in_dim, args.height // pixels, args.width // pixels


def latents_only(args) -> bool:
    """Whether latents are written, not frames."""
    return args.format == "latents" or args.out.suffix == ".safetensors"


def given_latents(args, config, world, vae) -> Tensor | None:
    """What to start from, `f c h w`: the latent of --image, or those of --continue. ValueError if it does not fit."""
    path, name = args.image or args.clip, "image" if args.image else "clip"
    family, shape = FAMILIES[config.family], latent_shape(args, config)
    if path is None:
        return None
    try:
        if args.clip and path.suffix == ".safetensors":
            clips = [sample["latents"] for sample in latent_folder.read_shard(path) if "latents" in sample]
            if [clip.shape[1:] for clip in clips] != [shape]:
                raise ValueError(f"got {path} with clips of {[tuple(clip.shape) for clip in clips[:3]]}, expected one, "
                                 f"of frames of {shape}, by --height and --width")
            return clips[0]
        fps = family.fps if args.clip and not world else None
        frames = torch.from_numpy(video.read(path, 1 if args.image else None, args.height, args.width, fps))
    except ValueError as e:
        raise ValueError(f"{e}: change {flag_of(name)}") from e
    if world:
        return world.from_rgb(rearrange(frames, "f h w c -> f c h w") / 255)
    need(args, vae is not None, "preview", f"the VAE, to encode {path}: leave out --preview")
    skipped = (len(frames) - 1) % family.frames_per_latent  # the VAE takes 1 + 4 k frames; the last ones matter
    return encode(vae, frames[None, skipped:], family)[0].cpu()


@contextmanager
def writing(path: Path, fps: float, samples: list[Sample], texts: dict[str, Tensor]):
    """A function that adds the next chunk of some clips, x0 `b n c h w` and its frames, bytes `b f h w 3`, to one file:
    side by side, or as raw latents. If an exception ends the context, what was added is kept, as NAME-unfinished."""
    unfinished = path.with_name(f".{path.stem[:100]}-{os.getpid()}{path.suffix}")  # of this process alone
    latents, columns = [], next(n for n in (6, 5, 4, 3, 2, 1) if len(samples) % n == 0)

    def add(x0, frames):
        if path.suffix == ".safetensors":
            latents.append(x0.float().cpu())
        else:
            write(rearrange(frames, "(r c) f h w rgb -> f (r h) (c w) rgb", c=columns).cpu().numpy())

    try:
        with video.writer(unfinished, fps) as write:  # which leaves no file without frames
            try:
                yield add
            finally:
                if latents:
                    clips = zip(samples, torch.cat(latents, dim=1))
                    shard = [{"latents": x, "text": texts[s.prompt], "caption": s.prompt} for s, x in clips]
                    latent_folder.write_shard(unfinished, shard, video.MARK)
    except BaseException:
        if unfinished.exists():
            names = (path.with_name(f"{path.stem}-unfinished{i or ''}{path.suffix}") for i in range(10**6))
            kept = next(name for name in names if not name.exists())
            os.rename(unfinished, kept)
            say(f"kept what there is: {kept}")
        raise
    os.replace(unfinished, path)
