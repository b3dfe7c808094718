"""Moving pictures on disk, read and written as bytes `f h w 3`.

    frames = read("cat.mp4", frames=81, height=480, width=832, fps=16)

    with writer("cat.mp4", fps=16) as write:
        for block in blocks:  # any number of frames at a time; memory stays flat, but for WebP
            write(block)

Read: whatever FFmpeg decodes, through PyAV (the optional package `av`); GIF, animated WebP and PNG, and still pictures,
which are clips of one frame, through Pillow; a folder of pictures, a frame each, in the order of their names with
numbers taken as numbers (2 before 10). Pictures come out as they are meant to be seen: turned as the file says, pixels
square, transparency on black. HDR is not tone-mapped.

Write: NAME.mp4 (H.264, by PyAV or else by the program ffmpeg), NAME.webp (animated), or, without suffix, a folder
of 00000.png, 00001.png ... The file appears under its name when it is finished; until then it is NAME.writing. An
exception that ends the writing early, Ctrl-C say, finishes it too: the frames that have arrived are kept.

Time. With `fps`, the frame at k / fps seconds is the nearest one that the file has (of two equally near the later); a
frame that stays for longer than 1 / fps does so here. Folders know no times: their frames are taken as they are. WebP
and GIF keep a frame that repeats just once, to stay for longer: give fps to get it as often as it was written.
"""

import itertools
import os
import re
import shutil
import struct
import subprocess
import tempfile
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

PICTURES = {".png", ".apng", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}  # are read by Pillow
MOVIES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv", ".3gp"}
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, LookupError, RuntimeError, struct.error, MemoryError,
          Image.DecompressionBombError)  # what decoders raise for a broken file
CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg,h264,hevc,ivf,wtv,mxf,nut,"
              "rm,gif,apng,webp_pipe,png_pipe,jpeg_pipe")  # by FFmpeg's names; playlists are not among them
MARK = "made by sample.py of few-step autoregressive video diffusion"  # in every file, which says that it is ours
CRF = "18"  # H.264 quality, "visually lossless" by FFmpeg's H.264 encoding guide
TIE = 1e-3  # seconds; containers round times to milliseconds, which must not decide which frame is nearest


class TooShort(ValueError):
    """A video with fewer frames than asked for."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading

def read(path, frames=None, height=None, width=None, fps=None) -> np.ndarray:
    """The first `frames` frames of a file or folder (None: all), uint8 `f h w 3`; what follows them is not decoded.

    height, width: pixels, both or none; pictures are scaled to cover them (Lanczos) and cut to their centre.
    fps: frames per second of what is returned; None: every frame that the file has.
    ValueError, naming the path, if it cannot be read or holds no frame; TooShort if it has fewer than `frames`.
    """
    path = Path(path)
    if (height is None) != (width is None):
        raise ValueError(f"got height {height} and width {width}, expected both or none: change --height or --width")
    for name, value in (("frames", frames), ("height", height), ("width", width), ("fps", fps)):
        if value is not None and value <= 0:
            raise ValueError(f"got {name} {value}, expected more than 0: change --{name}")
    if not (path.is_file() or path.is_dir()):  # nor a pipe, which would be waited for
        raise ValueError(f"got no file or folder {path}, expected a video or picture")
    decode = _folder if path.is_dir() else _pictures if path.suffix.lower() in PICTURES else _movie
    if decode is _movie:
        pyav()
    try:
        timed = decode(path)
        chosen = _resampled(timed, fps) if fps else (frame for _, frame in timed if frame)
        images = [frame() if height is None else ImageOps.fit(frame(), (width, height), Image.Resampling.LANCZOS)
                  for frame in itertools.islice(chosen, frames)]
    except DAMAGE as e:
        raise ValueError(f"got {path}, which cannot be read ({type(e).__name__}: {e}), expected a complete video or "
                         "picture: replace or remove it") from e
    if not images:
        raise ValueError(f"got {path} without any frame, expected a video or pictures: replace or remove it")
    if len({image.size for image in images}) > 1:
        sizes = sorted({f"{image.height} x {image.width}" for image in images})
        raise ValueError(f"got {path} with frames of {', '.join(sizes)}, expected one size: give height and width")
    if len(images) < (frames or 0):
        raise TooShort(f"got {path} with {len(images)} frames{f' at {fps} fps' if fps else ''}, expected {frames} or "
                       "more: change --frames or --fps, or remove it")
    return np.stack([np.asarray(image) for image in images])


def natural(name: str) -> list:
    """A sort key that takes the numbers in a name as numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def pyav():
    """The package av. ValueError if it is missing."""
    try:
        import av
        return av
    except ImportError as e:
        raise ValueError("got no package av, expected it installed: pip install -r requirements-wan.txt") from e


# Decoders yield (seconds or None, a function that gives the frame as an RGB image): most frames may not be wanted.
# Those that know times end with (seconds of the end, None).

def _folder(path):
    for file in sorted(path.iterdir(), key=lambda file: natural(file.name)):
        if file.suffix.lower() in PICTURES and not file.name.startswith("."):
            with Image.open(file) as image:
                _check(image)
                yield None, partial(_upright, image)


def _pictures(path):
    with Image.open(path) as image:
        _check(image)
        count, milliseconds = getattr(image, "n_frames", 1), 0
        if count == 1:
            yield None, partial(_upright, image)
            return
        for i in range(count):
            image.seek(i)
            image.load()  # a WebP knows its duration only now
            yield milliseconds / 1000, partial(_upright, image.copy())
            milliseconds += image.info.get("duration") or 100  # a GIF that says 0 is shown at 10 fps by browsers
        yield milliseconds / 1000, None


def _check(image):
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # a small file can hold them
        raise OSError(f"it has {image.width * image.height / 1e6:.0f} million pixels")


def _movie(path):
    av = pyav()
    try:
        # by its whole name, as FFmpeg takes "http:..." for an address; and nothing that names other files or addresses
        with av.open(f"file:{path.resolve()}", options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
                     ) as file:
            if not file.streams.video:
                raise OSError("it has no video stream")
            stream = file.streams.video[0]
            rate, aspect, seconds = float(stream.average_rate or 16), stream.sample_aspect_ratio or 1, 0
            for i, frame in enumerate(file.decode(stream)):
                seconds = i / rate if frame.time is None else frame.time
                yield seconds, partial(_square, frame, aspect)
            yield seconds + 1 / rate, None
    except av.FFmpegError as e:
        raise OSError(e) from e


def _upright(image):
    """Pillow's image as RGB, turned as its EXIF data says, on black where it is transparent."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of gray, which convert would clip to 255
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba)
    return image.convert("RGB")


def _square(frame, aspect):
    """PyAV's frame as RGB, with square pixels where they are `aspect` times as wide as high, turned as it says."""
    image = frame.to_image()
    if aspect != 1:
        image = image.resize((max(1, round(image.width * aspect)), image.height), Image.Resampling.LANCZOS)
    quarters = round(frame.rotation / 90) % 4  # counterclockwise
    return Image.fromarray(np.rot90(np.asarray(image), quarters)) if quarters else image


def _resampled(timed, fps):
    """Of (seconds, frame), in order, what to show 0, 1/fps, 2/fps ... seconds after the first."""
    start, before, n = None, None, 0
    for seconds, frame in timed:
        if seconds is None:
            yield frame
            continue
        if before is None:
            start, before = seconds, (0, frame)
            continue
        seconds -= start
        change = seconds - min(seconds - before[0], 1 / fps) / 2
        while n / fps < change - TIE:
            yield before[1]
            n += 1
        before = seconds, frame


# ---------------------------------------------------------------------------------------------------------------------
# Writing

def formats() -> list[str]:
    """What `writer` can write here: ".mp4" (with PyAV or ffmpeg), ".webp", "" (a folder of PNG)."""
    return [".mp4"] * (_av_encodes() or shutil.which("ffmpeg") is not None) + [".webp", ""]


@contextmanager
def writer(path, fps=16):
    """A context that gives write(frames), frames uint8 `f h w 3`, and leaves .mp4, .webp or a folder of PNG at `path`.

    For mp4, frames of odd height or width get their last row or column twice, since colour has half the resolution.
    An existing file is replaced once the new one is finished. If an exception ends the context, what was written till
    then is finished and kept, and the exception goes on. Without any frame nothing appears.
    ValueError if the format cannot be written here, if the folder exists, and if frames do not fit.
    """
    path = Path(path)
    if path.suffix == ".mp4" and ".mp4" not in formats():
        raise ValueError(f"got {path}, but neither the package av nor the program ffmpeg, expected one of them: pip "
                         "install -r requirements-wan.txt, or change --out to .webp")
    if path.suffix not in formats():
        raise ValueError(f"got {path}, expected a name that ends in .mp4 or .webp, or a folder's, without suffix, for "
                         "PNG: change --out")
    if path.is_dir() and (path.suffix or any(path.iterdir())) or path.is_file() and not path.suffix:
        raise ValueError(f"got {path}, which exists, expected the name of a new folder or of a file: change --out")
    if fps <= 0:
        raise ValueError(f"got fps {fps}, expected more than 0: change --fps")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh, size, put, finish = path.with_name(path.name + ".writing"), None, None, None

    def write(frames):
        nonlocal size, put, finish
        frames = np.asarray(frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (*(size or frames.shape[1:3]), 3):
            raise ValueError(f"got frames {frames.dtype} {frames.shape}, expected uint8 (f, h, w, 3)"
                             f"{f' of h, w {size}' if size else ''}")
        if put is None and len(frames):
            size = frames.shape[1:3]
            open_ = {".mp4": _mp4 if _av_encodes() else _mp4_by_ffmpeg, ".webp": _webp, "": _png}[path.suffix]
            put, finish = open_(fresh, Fraction(fps).limit_denominator(1001), *size)
        try:
            for frame in frames:
                put(frame)
        except OSError as e:
            raise unwritable(e) from e

    def unwritable(e):
        return OSError(f"got no space or no right to write {path} ({e}), expected some: free some space, or change "
                       "--out")

    try:
        yield write
    finally:
        if finish is not None:
            try:
                finish()
                if path.suffix:
                    with open(fresh, "rb+") as f:
                        os.fsync(f.fileno())
                os.replace(fresh, path)
            except (OSError, SyntaxError) as e:  # PyAV's errors are of the first kind, too
                shutil.rmtree(fresh, ignore_errors=True)
                fresh.unlink(missing_ok=True)
                raise unwritable(e) from e


# A format is a function of path, fps, h, w that gives put(frame), frame uint8 `h w 3`, and finish().

def _av_encodes():
    with suppress(ValueError):
        return "libx264" in pyav().codecs_available
    return False


def _even(frame):
    return np.pad(frame, [(0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)], mode="edge")


def _mp4(path, fps, h, w):
    av = pyav()
    file = av.open(str(path), "w", format="mp4")
    file.metadata["comment"] = MARK
    stream = file.add_stream("libx264", rate=fps, options={"crf": CRF})
    stream.height, stream.width, stream.pix_fmt = h + h % 2, w + w % 2, "yuv420p"
    about = stream.codec_context  # 1 is BT.709, and for the range 16 to 235: for the player to know; done in put
    about.color_primaries = about.color_trc = about.colorspace = about.color_range = 1

    def put(frame):
        picture = av.VideoFrame.from_ndarray(_even(frame), format="rgb24")
        file.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")))

    def finish():
        file.mux(stream.encode())
        file.close()

    return put, finish


def _mp4_by_ffmpeg(path, fps, h, w):
    errors = tempfile.TemporaryFile()
    command = ["ffmpeg", "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{w + w % 2}x{h + h % 2}",
               "-r", str(fps), "-i", "-", "-vf", "scale=out_color_matrix=bt709:out_range=tv", "-c:v", "libx264",
               "-crf", CRF, "-pix_fmt", "yuv420p", "-colorspace", "bt709", "-color_primaries", "bt709",
               "-color_trc", "bt709", "-color_range", "tv", "-metadata", f"comment={MARK}", "-f", "mp4",
               str(path)]
    # a session of its own: Ctrl-C in the terminal must not end it before it has finished the file
    program = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=errors, start_new_session=True)

    def put(frame):
        try:
            program.stdin.write(_even(frame).tobytes())
        except BrokenPipeError:
            finish()  # which has its message

    def finish():
        with suppress(BrokenPipeError):
            program.stdin.close()
        if program.wait():
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip()
            raise ValueError(f"got exit status {program.returncode} of ffmpeg ({said}), expected it to write H.264: "
                             "pip install -r requirements-wan.txt, or change --out to .webp")

    return put, finish


def _webp(path, fps, h, w):
    images = []

    def finish():
        ends = [round(1000 * i / fps) for i in range(len(images) + 1)]  # whole milliseconds, but without a drift
        about = Image.Exif()
        about[0x0131] = MARK  # Software
        images[0].save(path, "webp", save_all=True, append_images=images[1:], loop=0, quality=80, exif=about,
                       duration=[after - before for before, after in zip(ends, ends[1:])])

    return lambda frame: images.append(Image.fromarray(frame)), finish


def _png(path, fps, h, w):
    path.mkdir(exist_ok=True)
    for old in path.glob("[0-9]*.png"):  # of a run that was killed
        old.unlink()
    number = itertools.count()
    return lambda frame: Image.fromarray(frame).save(path / f"{next(number):05d}.png"), lambda: None
