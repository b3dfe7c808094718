"""Videos and images on disk, read and written as bytes `f h w 3`.

    frames = read("cat.mp4", frames=81, height=480, width=832, fps=16)

    with writer("cat.mp4", fps=16) as write:
        for block in blocks:  # any number of frames at a time; memory stays constant, except for WebP
            write(block)

Read: whatever FFmpeg decodes, through PyAV; GIF, animated WebP and PNG, and still images, which are clips of one frame,
through Pillow; a folder of images, one a frame, in the order of their names (2 before 10). Frames are returned as they
are meant to be seen: turned as the file says, pixels square, transparency on black. HDR is not tone-mapped.

Write: NAME.mp4 (H.264, by PyAV), NAME.webp (animated), or, without suffix, a folder of 00000.png, 00001.png ... The
file appears under its name when it is finished; until then it is NAME.writing. If an exception, such as Ctrl-C, ends
the writing early, the file is finished too, with the frames that have arrived.

Time. With `fps`, the frame at k / fps seconds is the nearest one that the file has (of two equally near the later); a
frame that is shown for longer than 1 / fps is returned several times, as it is in a WebP or GIF that stores a frame
that repeats once. Folders know no times: their frames are taken as they are.
"""

import importlib.util
import itertools
import re
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cluster.files import replacing
from wan21.errors import optional_packages, reading

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}  # read by Pillow
CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg,h264,hevc,ivf,wtv,mxf,nut,"
              "rm,gif,apng,webp_pipe,png_pipe,jpeg_pipe")  # by FFmpeg's names; playlists are not among them
MARK = "made by sample.py of few-step autoregressive video diffusion"  # in every file, which says that it is ours
TIE = 1e-3  # seconds; containers round times to milliseconds, which must not decide which frame is nearest


class Unreadable(ValueError):
    """A video that is damaged, or none."""


class TooShort(ValueError):
    """A video with fewer frames than asked for."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading

def read(path, frames=None, height=None, width=None, fps=None) -> np.ndarray:
    """The first `frames` frames of a file or folder (None: all), uint8 `f h w 3`; the rest is not decoded.

    height, width: pixels, both or none; frames are scaled to cover them (Lanczos) and cut to their centre.
    fps: frames per second of what is returned; None: every frame that the file has.
    Unreadable, naming the path, if it cannot be read or holds no frame; TooShort if it has fewer than `frames`."""
    path = Path(path)
    if not (path.is_file() or path.is_dir()):  # nor a pipe, which would be waited for
        raise Unreadable(f"got no file or folder {path}, expected a video or image")
    decode = _folder if path.is_dir() else _images if path.suffix.lower() in IMAGES else _movie
    complete = "a complete video or images of one size: replace or remove it"
    with reading(path, complete, Exception, error=Unreadable):  # decoders raise anything
        timed = decode(path)
        chosen = _resampled(timed, fps) if fps else (frame for _, frame in timed if frame)
        images = [frame() if height is None else ImageOps.fit(frame(), (width, height), Image.Resampling.LANCZOS)
                  for frame in itertools.islice(chosen, frames)]
    if not images:
        raise Unreadable(f"got {path} without any frame, expected {complete}")
    if len(sizes := {image.size for image in images}) > 1:
        raise Unreadable(f"got {path} with frames of width and height {sizes}, expected {complete}")
    if len(images) < (frames or 0):
        raise TooShort(f"got {path} with {len(images)} frames{f' at {fps} fps' if fps else ''}, expected {frames} or "
                       "more: change --frames or --fps, or remove it")
    return np.stack([np.asarray(image) for image in images])


def natural(name: str) -> list:
    """A sort key that takes the numbers in a name as numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def pyav():
    """The package av. ValueError if it is missing."""
    with optional_packages():
        import av
        return av


# Decoders yield (seconds or None, a function that returns the frame as an RGB image), as most frames may not be wanted.
# Those that know times end with (seconds of the end, None).

def _folder(path):
    for file in sorted(path.iterdir(), key=lambda file: natural(file.name)):
        if file.suffix.lower() in IMAGES and not file.name.startswith("."):
            yield None, partial(_still, file)


def _images(path):
    with _opened(path) as image:
        count, milliseconds = getattr(image, "n_frames", 1), 0
        if count == 1:
            yield None, partial(_still, path)
            return
        for i in range(count):
            image.seek(i)
            image.load()  # a WebP knows its duration only now
            yield milliseconds / 1000, partial(_upright, image.copy())
            milliseconds += image.info.get("duration") or 100  # a GIF that says 0 is shown at 10 fps by browsers
        yield milliseconds / 1000, None


def _still(path):
    with _opened(path) as image:
        return _upright(image)


def _opened(path):
    image = Image.open(path)
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # a small file can hold them
        raise OSError(f"it has {image.width * image.height / 1e6:.0f} million pixels")
    return image


def _movie(path):
    # by its full path, as FFmpeg takes "http:..." for an address; and no format that names other files or addresses
    only = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    with pyav().open(f"file:{path.resolve()}", options=only) as file:
        stream = file.streams.video[0]
        rate, aspect, seconds = float(stream.average_rate or 16), stream.sample_aspect_ratio or 1, 0
        for i, frame in enumerate(file.decode(stream)):
            seconds = i / rate if frame.time is None else frame.time
            yield seconds, partial(_square, frame, aspect)
        yield seconds + 1 / rate, None


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
    start, n = None, 0
    for (seconds, frame), (after, _) in itertools.pairwise(itertools.chain(timed, [(None, None)])):
        if seconds is None:
            yield frame
        elif after is not None:
            start = seconds if start is None else start
            change = after - start - min(after - seconds, 1 / fps) / 2
            while n / fps < change - TIE:
                yield frame
                n += 1


# ---------------------------------------------------------------------------------------------------------------------
# Writing

def formats() -> list[str]:
    """What `writer` can write here: ".webp", "" (a folder of PNG), and ".mp4" if there is PyAV."""
    return [".webp", ""] + [".mp4"] * (importlib.util.find_spec("av") is not None)


@contextmanager
def writer(path, fps=16):
    """A context that returns write(frames), uint8 `f h w 3`, and leaves .mp4, .webp or PNGs in a folder at `path`.

    For mp4, the last row or column of frames of odd height or width is doubled, since colour has half the resolution.
    An existing file is replaced once the new one is finished. Without any frame nothing is written. ValueError if PyAV
    is missing; OSError if there is such a folder."""
    path = Path(path)
    if path.suffix == ".mp4":
        pyav()
    size, put, file = None, None, ExitStack()

    def write(frames):
        nonlocal size, put
        size = size or frames.shape[1:3]
        assert frames.dtype == np.uint8 and frames.shape[1:] == (*size, 3), (frames.dtype, frames.shape, size)
        if put is None and len(frames):
            open_ = {".mp4": _mp4, ".webp": _webp, "": _png}[path.suffix]
            place = file.enter_context(replacing(path)) if path.suffix else path
            put, finish = open_(place, Fraction(fps).limit_denominator(1001), *size)
            file.callback(finish)
        for frame in frames:
            put(frame)

    try:
        yield write
    finally:
        file.close()  # finishes and renames the file, whatever has ended the context


# A format is a function of path, fps, h, w that returns put(frame), frame uint8 `h w 3`, and finish().

def _mp4(path, fps, h, w):
    av = pyav()
    file = av.open(str(path), "w", format="mp4")
    file.metadata["comment"] = MARK
    # CRF 18 is "visually lossless" by FFmpeg's H.264 encoding guide
    stream = file.add_stream("libx264", rate=fps, options={"crf": "18"})
    stream.height, stream.width, stream.pix_fmt = h + h % 2, w + w % 2, "yuv420p"
    codec = stream.codec_context  # 1 is BT.709, and the range 16 to 235: it tells the player what `put` does
    codec.color_primaries = codec.color_trc = codec.colorspace = codec.color_range = 1

    def put(frame):
        even = np.pad(frame, [(0, h % 2), (0, w % 2), (0, 0)], mode="edge")
        image = av.VideoFrame.from_ndarray(even, format="rgb24")
        file.mux(stream.encode(image.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")))

    def finish():
        file.mux(stream.encode())
        file.close()

    return put, finish


def _webp(path, fps, h, w):
    images = []

    def finish():
        ends = [round(1000 * i / fps) for i in range(len(images) + 1)]  # whole milliseconds, without a drift
        exif = Image.Exif()
        exif[0x0131] = MARK  # Software
        images[0].save(path, "webp", save_all=True, append_images=images[1:], loop=0, quality=80, exif=exif,
                       duration=[after - before for before, after in zip(ends, ends[1:])])

    return lambda frame: images.append(Image.fromarray(frame)), finish


def _png(path, fps, h, w):
    fresh, number = path.with_name(f"{path.name}.writing"), itertools.count()
    fresh.mkdir(parents=True, exist_ok=True)
    for old in fresh.glob("[0-9]*.png"):  # of a run that was killed
        old.unlink()
    return lambda frame: Image.fromarray(frame).save(fresh / f"{next(number):05d}.png"), lambda: fresh.rename(path)
