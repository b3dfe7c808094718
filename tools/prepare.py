"""Videos and captions to a folder of latents and text embeddings (worlds/latent_folder.py), which train.py reads.

    python -m tools.prepare --videos clips --captions captions.csv --out latents --wan Wan2.1-T2V-1.3B
    python -m tools.prepare ... --part 0 4 --device cuda:0        # on each of four GPUs its own part
    python train.py --size wan1.3b --stage teacher_forcing --data latents --out runs/wan --accum 64

Captions: a .csv with the columns `video` and `caption`, or a .jsonl with {"video": ..., "caption": ...} a line; a video
is a file, or a folder of images, by its name relative to --videos (wan21/video.py tells what can be read). Of each, the
first --frames frames at --fps are taken, scaled to cover --height x --width, and cut to their centre. (These flags of
train.py are sizes of latents, those here of the video.)

Cameras, for networks that are told them: a third column `cameras` names a file of each video's, relative to --videos,
a .npz or .safetensors with

    viewmats    n 4 4          world to camera, by OpenCV's axes (x right, y down, z forward); any world's coordinates
    Ks          n 3 3 or 3 3   focal lengths, in units of the width and height of the video's own frames
    fps         (if you like)  how many of these frames make a second; a file of another --fps is then refused

for each of the frames that are taken, at --fps. A latent frame gets the camera of the last of its frames: latent frame
i that of frame 4 i. Poses are written relative to the first, and focal lengths corrected for what is cut off. The unit
of length stays: worlds/latent_folder.py says which one to choose.

The list of clips is cut into shards of --shard clips once, and kept in prepare.json together with the settings:

    00000.safetensors, ...     a shard of a LatentFolder, bf16 (cameras: float32)
    00000.skipped.json, ...    the clips of the shard that were skipped, and why; the shard holds only the others
    null.safetensors           the negative prompt's embedding, what guidance leads away from
    empty.safetensors          the empty prompt's, for --prompt-dropout
    prepare.json               {"settings": {...}, "shards": [[[video, caption], ...], ...]}; cameras come third

The same command again makes what is missing: a killed run loses the shard that it was working on. New videos make new
shards (add them while no part runs). A deleted shard is made again; if all of its clips were skipped, delete its
.skipped.json to try them again.
"""

import argparse
import csv
import json
import sys
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from cluster.files import check_device, metadata_of, read_json, run_command, write_json
from wan21 import text, vae, video
from wan21.errors import need, reading, say
from wan21.vae import WAN21
from worlds import latent_folder

NAMED = 20  # names of one kind in a message, at most


class BadCameras(ValueError):
    """A file of cameras that is damaged, does not fit its video, or holds none."""


REASONS = {video.TooShort: "too short", video.Unreadable: "unreadable", BadCameras: "bad cameras",
           FloatingPointError: "not finite"}  # why a clip is skipped


def parse(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m tools.prepare", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    usual, pixels = WAN21.sampling, WAN21.pixels_per_latent
    p.add_argument("--videos", type=Path, required=True, help="folder with the videos")
    p.add_argument("--captions", type=Path, required=True, help=".csv or .jsonl of video, caption and, if any, cameras")
    p.add_argument("--out", type=Path, required=True, help="folder for the latents, train.py's --data")
    p.add_argument("--wan", type=Path, required=True, help="folder with Wan's VAE and text encoder")
    p.add_argument("--frames", type=int, default=1 + WAN21.frames_per_latent * (usual["frames"] - 1),
                   help="frames of video per clip, 4 k + 1 (default: %(default)s)")
    for name in ("height", "width"):
        p.add_argument(f"--{name}", type=int, default=usual[name] * pixels,
                       help="pixels, a multiple of 16 (default: %(default)s)")
    p.add_argument("--fps", type=float, default=WAN21.fps, help="frames per second (default: %(default)s, Wan's)")
    p.add_argument("--shard", type=int, default=64, help="clips per file (default: 64)")
    p.add_argument("--workers", type=int, default=4, help="threads that read videos (default: 4; a clip takes 97 MB)")
    p.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every N-th shard from I on")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return p.parse_args(argv)


def main(argv=None) -> Counter:
    """`prepare` with Wan's VAE and text encoder, each loaded when it is first needed."""
    args = parse(argv)
    check_device(args.device)
    load_vae = cache(partial(vae.load_vae, args.wan, args.device))
    load_text_encoder = cache(partial(text.load_text_encoder, args.wan, args.device))
    return prepare(args, lambda frames: vae.encode(load_vae(), torch.from_numpy(frames)[None])[0],
                   lambda caption: load_text_encoder().encode([caption])[0])


def prepare(args, encode_clip, encode_text) -> Counter:
    """Encode every captioned video into args.out, or what is missing there; see this file's docstring.

    args: what `parse` returns. encode_clip: bytes `f h w 3` -> latents `f c h w`. encode_text: a caption -> `l d`.
    Returns the number of clips in the shards of this part ("clips"), and of those skipped, by reason. ValueError if the
    settings are not those of args.out, if no video has a caption, or if every clip is skipped."""
    expect, k, multiple = partial(need, args), WAN21.frames_per_latent, WAN21.pixel_multiple
    expect(args.frames > 0 and args.frames % k == 1, "frames", f"{k} k + 1, as the VAE needs them")
    expect(args.height > 0 and args.width > 0 and args.height % multiple == args.width % multiple == 0, "height width",
           f"multiples of {multiple}")
    for name in ("fps", "shard", "workers"):
        expect(0 < getattr(args, name) <= 10**6, name, "more than 0 and no more than 10^6")
    first, parts = args.part
    expect(0 <= first < parts, "part", "I N, with I from 0 to N - 1")
    shards = shards_of(args, matched(args.videos, read_captions(args.captions)))
    mine = range(first, len(shards), parts)
    todo = [k for k in mine if not finished(args.out, k, shards[k])]
    clips = [clip for k in todo for clip in shards[k]]
    paths = [args.videos / name for name, *_ in clips]
    if any(path.is_file() and path.suffix.lower() not in video.IMAGES for path in paths):
        video.pyav()  # its absence is no reason to skip every video
    for name, prompt in (("null.safetensors", text.NEGATIVE_PROMPT), ("empty.safetensors", "")):
        if first == 0 and not (args.out / name).exists():
            latent_folder.write_null(args.out / name, encode_text(prompt).bfloat16())

    with (ThreadPoolExecutor(args.workers) as pool,
          tqdm(total=len(clips), desc="clips", unit="clip", file=sys.stderr) as bar):
        loaded = ahead(pool, partial(load, args), clips, args.workers + 1)
        for k in todo:
            samples, skipped = [], []
            for name, caption, *_ in shards[k]:
                future = next(loaded)
                try:
                    frames, cameras = future.result()
                    sample = {"latents": encode_clip(frames).bfloat16(), "text": encode_text(caption).bfloat16()}
                    if not all(x.isfinite().all() for x in sample.values()):
                        raise FloatingPointError("got non-finite latents or text")
                    samples.append(sample | cameras | {"caption": caption})
                except tuple(REASONS) as e:
                    skipped.append([name, REASONS[type(e)], str(e)])
                    bar.write(f"skipped ({REASONS[type(e)]}): {name}: {e}", file=sys.stderr)
                bar.update()
            list_of_skipped = shard_of(args.out, k).with_suffix(".skipped.json")
            if skipped:  # before the shard, which is what says that all is done
                write_json(list_of_skipped, skipped)
            else:
                list_of_skipped.unlink(missing_ok=True)  # of an earlier try
            if samples:
                latent_folder.write_shard(shard_of(args.out, k), samples)
    return report(args.out, shards, mine)


def load(args, clip) -> tuple[np.ndarray, dict[str, Tensor]]:
    """The frames of a clip, bytes `f h w 3`, and, if it has cameras, viewmats and Ks of its latent frames."""
    path = args.videos / clip[0]
    frames = video.read(path, frames=args.frames, height=args.height, width=args.width, fps=args.fps)
    if len(clip) == 2:
        return frames, {}
    h, w = video.read(path, frames=1).shape[1:3]
    scale = max(args.height / h, args.width / w)  # by which frames grow to cover what is cut out of them
    viewmats, Ks = read_cameras(args.videos / clip[2], args.frames, args.fps)
    return frames, {"viewmats": viewmats, "Ks": cut(Ks, w * scale / args.width, h * scale / args.height)}


def read_cameras(path: Path, frames: int, fps: float) -> tuple[Tensor, Tensor]:
    """viewmats `f 4 4`, relative to the first, and Ks `f 3 3`, float32, of the latent frames of a clip of so many
    frames, from a file with those of every frame. BadCameras, naming the file, if they are too few, none, or of another
    number of frames a second, where it has its `fps`."""
    expected = f"viewmats and Ks of {frames} frames, {fps:g} a second, see tools/prepare.py"
    with reading(path, expected, Exception, error=BadCameras):
        if path.suffix == ".safetensors":
            held = load_file(path)
        else:
            with np.load(path) as file:  # never pickled objects, which could run code
                held = dict(file)
        viewmats, Ks = (torch.as_tensor(held[name]).double() for name in ("viewmats", "Ks"))
        Ks = Ks.expand(len(viewmats), 3, 3) if Ks.ndim == 2 else Ks
        if len(viewmats) < frames or len(Ks) < frames:
            raise ValueError(f"it has cameras of {len(viewmats)} frames")
        if "fps" in held and float(held["fps"]) != fps:
            raise ValueError(f"its cameras are those of {float(held['fps']):g} frames a second")
        viewmats, Ks = viewmats[:frames], Ks[:frames]
        if not (viewmats.isfinite().all() and Ks.isfinite().all()):
            raise ValueError("it has non-finite values")
        if fault := latent_folder.fault_of(viewmats, Ks):
            raise ValueError(f"it has {fault}")
    k = WAN21.frames_per_latent  # the first latent frame is one frame, each other one the next k
    viewmats, Ks = viewmats[::k], Ks[::k]
    return (viewmats @ torch.linalg.inv(viewmats[0])).float(), Ks.float()


def cut(Ks: Tensor, x: float, y: float) -> Tensor:
    """Ks `f 3 3` of frames that were x times as wide and y times as high before their centre was cut out."""
    return torch.tensor([[x, 0, (1 - x) / 2], [0, y, (1 - y) / 2], [0, 0, 1]]) @ Ks


def ahead(pool, function, items, n):
    """The futures of function(item) for each item, in order; the pool computes up to n of them in advance."""
    waiting, items = deque(), iter(items)
    while True:
        while len(waiting) < n and (item := next(items, None)) is not None:
            waiting.append(pool.submit(function, item))
        if not waiting:
            return
        yield waiting.popleft()


def read_captions(path) -> list[tuple[str, ...]]:
    """(video, caption) of each row of a .csv or .jsonl file, or (video, caption, cameras) if any row names a file of
    cameras. ValueError, with the row, if it is not one."""
    path, rows = Path(path), []
    if path.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"got {path}, expected a name that ends in .csv or .jsonl: change --captions")
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            if path.suffix == ".csv":
                found = csv.DictReader(f, strict=True)
                columns = found.fieldnames or []
                if columns.count("video") != 1 or columns.count("caption") != 1 or columns.count("cameras") > 1:
                    raise ValueError(f"its columns are {columns}, by the first row")
            else:
                found = (json.loads(line) for line in f if line.strip())
            for row in found:
                if not (isinstance(row, dict) and isinstance(row.get("video"), str) and isinstance(
                        row.get("caption", 0), str | None) and isinstance(row.get("cameras"), str | None)):
                    raise ValueError(f"it is {str(row)[:80]}")
                if None in row:
                    raise ValueError(f"it has more cells than columns, {row[None]}")
                name, caption, cameras = (row.get(key) or "" for key in ("video", "caption", "cameras"))
                (name + caption + cameras).encode()  # JSON can hold halves of characters
                rows.append((name_in(name, "video"), caption.strip(), cameras.strip() and name_in(cameras, "file")))
    except (OSError, csv.Error, ValueError, RecursionError) as e:
        raise ValueError(f"got {path}, which cannot be read at row {len(rows) + 1} ({e}), expected `video` and "
                         "`caption` in every row, in UTF-8: change --captions") from e
    return rows if any(cameras for *_, cameras in rows) else [row[:2] for row in rows]


def name_in(text: str, what: str) -> str:
    """The name of a file inside --videos, relative to it. ValueError if it is none."""
    name = PurePosixPath(text.strip())
    inside = not name.is_absolute() and ".." not in name.parts and name != PurePosixPath(".")
    if not inside or "\0" in str(name) or max(len(part.encode()) for part in name.parts) > 255:
        raise ValueError(f"the {what} {str(name)[:200]!r} is outside --videos, or no name")
    return name.as_posix()


def matched(videos: Path, rows) -> list[tuple[str, ...]]:
    """The rows that have video, caption and, if others have them, cameras, each once; the others are named on stderr.
    """
    if not videos.is_dir():
        raise ValueError(f"got no folder {videos}, expected one with the videos: change --videos")
    names = {name for row in rows for name in (row[0], *row[2:]) if name}
    missing = {name for name in names if not (videos / name).exists()}
    there = [row for row in rows if row[0] not in missing]
    silent, blind = ({row[0] for row in there if not row[i]} for i in (1, -1))
    for what, some in (("video without a caption", silent), ("video without cameras", blind - silent),
                       ("caption without a video", {row[0] for row in rows} & missing),
                       ("file of cameras that is not there", {row[2] for row in rows if row[2:]} & missing)):
        if some:
            named, more = sorted(some, key=video.natural)[:NAMED], " ..." if len(some) > NAMED else ""
            say(f"warning: {len(some)} x {what}: {', '.join(named)}{more}")
    rows = [row for row in dict.fromkeys(there) if all(row) and not missing & {*row[2:]}]
    if not rows:
        raise ValueError(f"got no video in {videos} with a caption, expected some: change --videos or --captions")
    return rows


def shards_of(args, clips) -> list[list[tuple[str, ...]]]:
    """The shards of prepare.json, and new ones for clips that are not among them; the file is brought up to date."""
    path, shards, n = args.out / "prepare.json", [], args.shard
    settings = {name: getattr(args, name) for name in ("frames", "height", "width", "fps", "shard")}
    if path.exists():
        expected = "the list that an earlier run left: restore it, or change --out"
        with reading(path, expected, KeyError, TypeError, ValueError):
            old = read_json(path, expected)
            before, shards = old["settings"], [[tuple(clip) for clip in shard] for shard in old["shards"]]
            there = {name: before[name] for name in settings}
        for name, value in settings.items():
            need(args, value == there[name], name, f"{there[name]}, as in {args.out}, or another --out")
    elif any(file.name not in ("null.safetensors", "empty.safetensors") for file in args.out.glob("*.safetensors")):
        raise ValueError(f"got {args.out} with latents but without {path.name}, expected a new folder: change --out")
    known = {clip for shard in shards for clip in shard}
    if len({len(clip) for clip in (*known, *clips)}) > 1:
        raise ValueError(f"got {args.captions} {'without' if len(clips[0]) == 2 else 'with'} cameras, expected them in "
                         f"all clips of {args.out}, or in none: change --captions or --out")
    new = [clip for clip in clips if clip not in known]
    shards += [new[i:i + n] for i in range(0, len(new), n)]
    if new:
        write_json(path, {"settings": settings, "shards": shards}, one_of_many=True)
    return shards


def shard_of(out: Path, k: int) -> Path:
    return out / f"{k:05d}.safetensors"


def skipped_of(out: Path, k: int) -> list:
    """[video, reason, message] of each clip that a shard skips."""
    path = shard_of(out, k).with_suffix(".skipped.json")
    with reading(path, "the list of skipped clips: delete it and its shard, which are then made again", ValueError,
                 TypeError):
        skipped = json.loads(path.read_text()) if path.exists() else []
        return [[str(name), str(reason), str(message)] for name, reason, message in skipped]


def finished(out: Path, k: int, clips) -> bool:
    """Whether a shard is there, of the length that its header tells, or all of its clips were skipped."""
    shard = shard_of(out, k)
    if not shard.exists():
        return len(skipped_of(out, k)) == len(clips)
    with reading(shard, "a complete shard: delete it, and it is made again", ValueError):
        return "captions" in metadata_of(shard)


def report(out: Path, shards, mine) -> Counter:
    """Count and print what the shards of this part hold; ValueError if no part's shards hold a clip."""
    counts = Counter(reason for k in mine for _, reason, _ in skipped_of(out, k))
    skipped = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items())) or "none"
    counts["clips"] = sum(len(shards[k]) for k in mine) - counts.total()
    if all(len(skipped_of(out, k)) == len(clips) for k, clips in enumerate(shards)):
        raise ValueError(f"got only clips that were skipped ({skipped}), expected others: see *.skipped.json; "
                         "change --frames, --fps or --videos")
    there = sum(shard_of(out, k).exists() for k in mine)
    print(f"{out}: {counts['clips']} clips in {there} shards, skipped: {skipped}")
    return counts


if __name__ == "__main__":
    run_command(main, "stopped; what is finished is kept, and the same command continues")
