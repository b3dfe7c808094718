"""Videos and captions to a folder of latents and text embeddings (data.LatentFolder), which train.py reads.

    python wan21.py prepare --videos clips --captions clips.csv --wan Wan2.1-T2V-1.3B --out latents
    python wan21.py prepare ... --part 0/4 --device cuda:0        # on each of four GPUs its own part
    python train.py --size wan1.3b --stage teacher_forcing --data latents --out runs/wan --accum 64

(train.py's --frames, --height and --width are sizes of latents.)

Captions: a .csv or .tsv with the columns `video` and `caption`, or a .jsonl with {"video": ..., "caption": ...} a line;
a video is a file, or a folder of pictures, by its name relative to --videos (video.read tells what can be read). Of
each the first --frames frames at --fps are taken, scaled to cover --height x --width, and cut to their centre.

The list of clips is cut into shards of --shard clips once, and kept in prepare.json together with the settings:

    00000.safetensors, ...     a shard of data.LatentFolder, bf16
    00000.skipped.json, ...    the shard's clips that were of no use, and why; the shard is so much smaller
    null.safetensors           the negative prompt's embedding, what guidance leads away from
    empty.safetensors          the empty prompt's, for --prompt-dropout
    prepare.json               {"settings": {...}, "shards": [[[video, caption], ...], ...]}

So a shard's content depends on neither the other shards nor what fails in them. The same command again does what is
missing: a killed run loses the shard it was at. Videos that came since make new shards (add them while no part runs).
A shard that is deleted is made again; delete its .skipped.json, too, to try again where nothing of it was of use.
"""

import argparse
import csv
import json
import sys
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path, PurePosixPath

import torch
from tqdm import tqdm

import data
import encoders
import video
from files import about_of, read_json, write_json
from model import check_device

NAMED = 20  # names at most of one kind in a message


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `prepare`; `run` takes what it parses."""
    parser.add_argument("--videos", type=Path, required=True, help="folder with the videos")
    parser.add_argument("--captions", type=Path, required=True, help=".csv, .tsv or .jsonl of video and caption")
    parser.add_argument("--out", type=Path, required=True, help="folder for the latents, train.py's --data")
    parser.add_argument("--wan", type=Path, required=True, help="folder with Wan 2.1's VAE and text encoder")
    parser.add_argument("--prompt-embeds", type=Path, nargs="+", default=[],
                        help="files of encode-prompts with every caption; no text encoder is loaded then")
    parser.add_argument("--frames", type=int, default=81, help="pixel frames a clip, 4 k + 1 (default: 81)")
    parser.add_argument("--height", type=int, default=480, help="pixels, a multiple of 16 (default: 480)")
    parser.add_argument("--width", type=int, default=832, help="pixels, a multiple of 16 (default: 832)")
    parser.add_argument("--fps", type=float, default=16, help="frames per second (default: 16, Wan's)")
    parser.add_argument("--shard", type=int, default=64, help="clips a file (default: 64)")
    parser.add_argument("--workers", type=int, default=4, help="threads that read videos; one more clip than this is "
                                                               "held ready, 97 MB each by default (default: 4)")
    parser.add_argument("--part", type=i_of_n, default=(0, 1), metavar="I/N",
                        help="every N-th shard only, from the I-th on: one process a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")


def i_of_n(text: str) -> tuple[int, int]:
    """'1/4' -> (1, 4)."""
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected I/N with I from 0 to N - 1, as 0/4")
    return int(i), int(n)


def run(args: argparse.Namespace) -> Counter:
    """The command: `prepare` with Wan's VAE and text encoder, each loaded when it is first needed."""
    check_device(args.device)

    @cache
    def vae():
        return encoders.load_vae(args.wan, args.device)

    @cache
    def text_encoder():
        return encoders.load_text_encoder(args.wan, args.device)

    texts = {}
    if args.prompt_embeds:  # whose captions are a line each
        texts[one_line(encoders.NEGATIVE_PROMPT)] = encoders.read_null(args.prompt_embeds[0])
        if args.prompt_embeds[0].with_name("empty.safetensors").exists():
            texts[""] = encoders.read_null(args.prompt_embeds[0], "empty.safetensors")
        for path in args.prompt_embeds:
            captions, embeds = encoders.read_prompt_embeds(path)
            texts |= zip(map(one_line, captions), embeds)
        if len(widths := {text.shape[1] for text in texts.values()}) > 1:
            raise ValueError(f"got embeddings of widths {sorted(widths)} in {', '.join(map(str, args.prompt_embeds))}, "
                             "expected those of one text encoder: change --prompt-embeds")
        lacking = [c for _, c in read_captions(args.captions) if c and one_line(c) not in texts]
        if lacking:
            raise ValueError(f"got no embedding of {len(lacking)} captions, {lacking[0]!r} for one, expected those of "
                             f"all of {args.captions}: encode them, too, or change --prompt-embeds")

    def encode_clip(frames):
        return encoders.encode(vae(), torch.from_numpy(frames)[None])[0]

    def encode_text(captions):
        return [texts.get(one_line(c)) for c in captions] if texts else text_encoder().encode(captions)

    return prepare(args.videos, args.captions, args.out, encode_clip, encode_text, encoders.NEGATIVE_PROMPT,
                   args.frames, args.height, args.width, args.fps, args.shard, args.workers, args.part)


def one_line(text: str) -> str:
    return " ".join(text.split())


def prepare(videos, captions, out, encode_clip, encode_text, negative, frames=81, height=480, width=832, fps=16,
            shard=64, workers=4, part=(0, 1)) -> Counter:
    """Encode every captioned video into `out`, or what is missing there; see this file's docstring.

    encode_clip: bytes `f h w 3` -> latents `f c h w`. encode_text: captions -> list of `l d`; ValueError if one cannot
    be encoded; None for the empty prompt where nobody knows it. negative: the negative prompt. The rest: the flags of
    the same names. Returns how many clips this part's shards hold ("clips"), and how many are left out, by reason.
    ValueError if the settings are not those of `out`, if nothing has both video and caption, or nothing is of use.
    """
    if frames % 4 != 1 or frames < 1:
        raise ValueError(f"got {frames} frames, expected 4 k + 1 as the VAE needs them, like "
                         f"{max(frames, 0) // 4 * 4 + 1}: change --frames")
    if height < 16 or width < 16 or height % 16 or width % 16:
        raise ValueError(f"got {height} x {width} pixels, expected multiples of 16, the VAE's 8 times the network's "
                         "patch of 2: change --height or --width")
    for name, value in (("fps", fps), ("shard", shard), ("workers", workers)):
        if not 0 < value <= 10**6:
            raise ValueError(f"got {name} {value}, expected more than 0 and no more than 10^6: change --{name}")
    videos, out = Path(videos), Path(out)
    if out.is_file():
        raise ValueError(f"got --out {out}, expected a folder, not a file: change --out")
    settings = {"frames": frames, "height": height, "width": width, "fps": float(fps), "shard": shard}
    shards = plan(out, settings, matched(videos, read_captions(captions)), part)
    mine = range(part[0], len(shards), part[1])
    todo = [k for k in mine if not finished(out, k, shards[k])]
    clips = [videos / name for k in todo for name, _ in shards[k]]
    if any(path.is_file() and path.suffix.lower() not in video.PICTURES for path in clips):
        video.pyav()  # its absence is no reason to skip every video
    for path, prompt in ((out / "null.safetensors", negative), (out / "empty.safetensors", "")):
        if part[0] == 0 and not path.exists() and (text := encode_text([prompt])[0]) is not None:
            data.write_null(path, text.bfloat16())

    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(clips), desc="clips", unit="clip", file=sys.stderr) as bar:
        load = partial(load_clip, frames=frames, height=height, width=width, fps=fps)
        loaded = ahead(pool, load, clips, workers + 1)
        for k in todo:
            texts, samples, skipped = encode_captions(encode_text, [caption for _, caption in shards[k]]), [], []
            for (name, caption), text in zip(shards[k], texts):
                pixels, why = next(loaded)
                if why is None and isinstance(text, ValueError):
                    why = "caption", str(text)
                if why is None:
                    latents, text = encode_clip(pixels).bfloat16(), text.bfloat16()
                    if not (latents.isfinite().all() and text.isfinite().all()):
                        why = "not finite", f"got non-finite latents or text for {name}"
                if why is None:
                    samples.append({"latents": latents, "text": text, "caption": caption})
                else:
                    skipped.append([name, *why])
                    bar.write(f"skipped ({why[0]}): {name}: {why[1]}", file=sys.stderr)
                bar.update()
            finish(out, k, samples, skipped)
    return report(out, shards, mine)


def load_clip(path, **how):
    """Pixels and None, or None and why not: a reason, to be counted, and a message."""
    try:
        return video.read(path, **how), None
    except video.TooShort as e:
        return None, ("too short", str(e))
    except ValueError as e:
        return None, ("unreadable", str(e))


def ahead(pool, function, items, n):
    """function(item) for each item, in order; up to n of them are computed by the pool before they are asked for."""
    waiting, items = deque(), iter(items)
    while True:
        while len(waiting) < n and (item := next(items, None)) is not None:
            waiting.append(pool.submit(function, item))
        if not waiting:
            return
        yield waiting.popleft().result()


def encode_captions(encode_text, captions, batch=8) -> list:
    """Embeddings `l d`, with the ValueError in place of one that cannot be had; the error itself if none can."""
    texts = []
    for start in range(0, len(captions), batch):
        some = captions[start:start + batch]
        try:
            texts += encode_text(some)
        except ValueError:  # of one, but which?
            for caption in some:
                try:
                    texts += encode_text([caption])
                except ValueError as e:
                    texts.append(e)
    if all(isinstance(text, ValueError) for text in texts):
        raise texts[0]
    return texts


# ---------------------------------------------------------------------------------------------------------------------
# What there is to do

def read_captions(path) -> list[tuple[str, str]]:
    """(video, caption) of each row of a .csv, .tsv or .jsonl file. ValueError, with the row, if it is not one."""
    path, rows = Path(path), []
    if path.suffix not in (".csv", ".tsv", ".jsonl", ".json"):
        raise ValueError(f"got {path}, expected a name that ends in .csv, .tsv or .jsonl: change --captions")
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            if path.suffix in (".csv", ".tsv"):
                found = csv.DictReader(f, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
                columns = found.fieldnames or ()
                if not {"video", "caption"} <= set(columns) or len(set(columns)) < len(columns):
                    raise ValueError(f"its columns are {found.fieldnames}, by the first row")
            else:
                found = (json.loads(line) for line in f if line.strip())
            for row in found:
                if not isinstance(row, dict) or not isinstance(row.get("video"), str) or not isinstance(
                        row.get("caption", 0), str | None):
                    raise ValueError(f"it is {str(row)[:80]}")
                if None in row:
                    raise ValueError(f"it has more cells than columns, {row[None]}: a comma outside of quotes?")
                (row["video"] + (row["caption"] or "")).encode()  # JSON can hold halves of characters
                name = PurePosixPath(row["video"].strip())
                inside = not name.is_absolute() and ".." not in name.parts and name != PurePosixPath(".")
                if not inside or "\0" in str(name) or max(len(part.encode()) for part in name.parts) > 255:
                    raise ValueError(f"the video {str(name)[:200]!r} is outside --videos, or no name")
                rows.append((name.as_posix(), (row["caption"] or "").strip()))
    except (OSError, csv.Error, ValueError, RecursionError) as e:
        raise ValueError(f"got {path}, which cannot be read at row {len(rows) + 1} ({e}), expected `video` and "
                         "`caption` in every row, in UTF-8: change --captions") from e
    return rows


def matched(videos: Path, rows) -> list[tuple[str, str]]:
    """The rows that have both video and caption, each once; the others, and videos without a row, are named on stderr.
    """
    if not videos.is_dir():
        raise ValueError(f"got no folder {videos}, expected one with the videos: change --videos")
    names = {name for name, _ in rows}
    missing = {name for name in names if not (videos / name).exists()}
    silent = {name for name, caption in rows if not caption} - missing
    for file in videos.rglob("*"):
        name, is_picture = file.relative_to(videos), file.suffix.lower() in video.PICTURES
        above = {parent.as_posix() for parent in name.parents}
        if (is_picture or file.suffix.lower() in video.MOVIES) and not names & {name.as_posix(), *above}:
            silent.add((name.parent if is_picture and len(above) > 1 else name).as_posix())  # a picture may be a frame
    for kind, some in (("video without a caption", silent), ("caption without a video", missing)):
        if some:
            named = sorted(some, key=video.natural)
            more = f" and {len(some) - NAMED} more" if len(some) > NAMED else ""
            print(f"warning: {len(some)} x {kind}: {', '.join(named[:NAMED])}{more}", file=sys.stderr)
    rows = [(name, caption) for name, caption in dict.fromkeys(rows) if caption and name not in missing]
    if not rows:
        raise ValueError(f"got no video in {videos} with a caption, expected names relative to that folder: change "
                         "--videos or --captions")
    return rows


def plan(out: Path, settings: dict, clips, part) -> list[list[tuple[str, str]]]:
    """The shards of prepare.json, and new ones for clips that are not among them; the file is brought up to date."""
    path, shards = out / "prepare.json", []
    if path.exists():
        try:
            old = read_json(path, "a list of clips")
            before, shards = old["settings"], [[(name, caption) for name, caption in shard] for shard in old["shards"]]
            if not isinstance(before, dict) or not all(isinstance(x, str) for shard in shards for pair in shard
                                                       for x in pair):
                raise TypeError("its settings are no object, or its clips no text")
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"got a damaged {path} ({type(e).__name__}: {e}), expected the list that an earlier run "
                             "left: restore it, or change --out") from e
        changed = [k for k in settings if settings[k] != before.get(k)]
        if changed:
            differ = ", ".join(f"{k} {settings[k]} (there: {before.get(k)})" for k in changed)
            raise ValueError(f"got {differ}, expected the settings of {out}: change --out or --{', --'.join(changed)}")
    elif any(file.name not in ("null.safetensors", "empty.safetensors") for file in out.glob("*.safetensors")):
        raise ValueError(f"got {out} with latents but without {path.name}, expected a new folder: change --out")
    known = {clip for shard in shards for clip in shard}
    if gone := len(known - set(clips)):
        print(f"warning: {gone} clips of {path} are no longer among the captions or videos: what is encoded stays",
              file=sys.stderr)
    new, n = [clip for clip in clips if clip not in known], settings["shard"]
    shards += [new[i:i + n] for i in range(0, len(new), n)]
    if new:
        write_json(path, {"settings": settings, "shards": shards}, one_of_many=True)
    return shards


# ---------------------------------------------------------------------------------------------------------------------
# What is done

def shard_path(out, k) -> Path:
    return out / f"{k:05d}.safetensors"


def skipped_of(out, k) -> list:
    """[video, reason, message] of each clip that was left out of a shard."""
    path = shard_path(out, k).with_suffix(".skipped.json")
    try:
        left_out = json.loads(path.read_text()) if path.exists() else []
        if not all(isinstance(x, str) for row in left_out for x in row):
            raise TypeError("it holds other things than text")
        return [[video, reason, message] for video, reason, message in left_out]
    except (ValueError, TypeError) as e:
        raise ValueError(f"got a damaged {path} ({e}), expected the list of what was left out: delete it and "
                         f"{shard_path(out, k).name}, which are then made again") from e


def finished(out, k, clips) -> bool:
    """Whether a shard is there, of the length that its header tells, or nothing of it was of use."""
    path = shard_path(out, k)
    if path.exists():
        try:
            return "captions" in about_of(path)
        except ValueError as e:
            raise ValueError(f"got the damaged shard {path}, expected a whole one: delete it, and it is made again "
                             f"({e})") from e
    return len(skipped_of(out, k)) == len(clips)


def finish(out, k, samples, skipped) -> None:
    """Write a shard; what was skipped goes first, as the shard is what says that all is done."""
    path = shard_path(out, k).with_suffix(".skipped.json")
    if skipped:
        write_json(path, skipped)
    else:
        path.unlink(missing_ok=True)  # of an earlier try
    if samples:
        data.write_shard(shard_path(out, k), samples)


def report(out, shards, mine) -> Counter:
    """Count and print what this part's shards hold; ValueError if there is not one clip in any part's."""
    counts = Counter(reason for k in mine for _, reason, _ in skipped_of(out, k))
    left_out = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items())) or "none"
    counts["clips"] = sum(len(shards[k]) for k in mine) - counts.total()
    if all(finished(out, k, clips) and not shard_path(out, k).exists() for k, clips in enumerate(shards)):
        raise ValueError(f"got no clip that is of use (left out: {left_out}), expected one at least: see the messages "
                         "above, and *.skipped.json; change --frames, --fps or --videos")
    print(f"{out}: {counts['clips']} clips in {sum(shard_path(out, k).exists() for k in mine)} shards, left out: "
          f"{left_out}")
    return counts
