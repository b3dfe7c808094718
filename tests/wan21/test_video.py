"""Videos: every frame that is written comes back, in its place and time, and no half file ever appears."""

import os
import struct
import sys
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

import wan21.video

av = pytest.importorskip("av")


def ramp(n, h=32, w=48):
    """Frames `n h w 3` whose gray tells their number: 8 i + 4."""
    return np.broadcast_to((8 * np.arange(n) + 4).astype(np.uint8)[:, None, None, None], (n, h, w, 3))


def numbers(frames):
    """The inverse of ramp; fails if a frame is none of it."""
    level = (frames.mean((1, 2, 3)) - 4) / 8
    assert abs(level - level.round()).max() < 0.25, level
    return level.round().astype(int).tolist()


def save(path, frames, fps=16):
    with wan21.video.writer(path, fps) as write:
        write(frames)
    return path


def scene(n=5, h=32, w=48):
    """Smooth, coloured, different left and right, top and bottom; moving."""
    y, x, t = np.mgrid[:h, :w, :n].astype(float)
    channels = [255 * x / w, 255 * y / h, 128 + 100 * np.sin(t / 2 + x / 9)]
    return np.stack(channels, -1).transpose(2, 0, 1, 3).astype(np.uint8)


@pytest.mark.parametrize("name, error", [("a.mp4", 4), ("b.webp", 4), ("frames", 0)])
def test_round_trip(tmp_path, name, error):
    """Bug: a frame lost at the encoder's end or between blocks, frames out of order, colours in the wrong matrix or
    range, a wrong rate, a leftover under another name."""
    frames = ramp(30)
    with wan21.video.writer(tmp_path / "new" / name, fps=16) as write:
        for block in np.split(frames, [1, 5, 5, 12]):
            write(block)
    back = wan21.video.read(tmp_path / "new" / name, fps=16)
    assert back.dtype == np.uint8 and back.shape == frames.shape and numbers(back) == list(range(30))
    assert numbers(wan21.video.read(tmp_path / "new" / name, frames=3)) == [0, 1, 2]
    assert os.listdir(tmp_path / "new") == [name]

    colours = scene()
    back = wan21.video.read(save(tmp_path / f"colours{name}", colours))
    assert back.shape == colours.shape and abs(back.astype(float) - colours).mean() <= error


def test_mp4_says_its_colours_and_rate(tmp_path):
    """Bug: pictures that a player shows too pale or too green, since it must guess matrix and range; a wrong speed."""
    with av.open(str(save(tmp_path / "a.mp4", ramp(8), fps=24))) as file:
        about = file.streams.video[0].codec_context
        assert (about.colorspace, about.color_range, about.color_primaries, about.color_trc) == (1, 1, 1, 1)
        assert about.name == "h264" and about.pix_fmt == "yuv420p" and file.streams.video[0].average_rate == 24
        luma = next(file.decode(video=0)).to_ndarray()[:32]
    assert abs(luma.mean() - (16 + 4 * 219 / 255)) < 1.5  # gray 4 in the range 16 to 235
    with av.open(str(save(tmp_path / "red.mp4", np.full((1, 32, 32, 3), (255, 0, 0), np.uint8)))) as file:
        luma = next(file.decode(video=0)).to_ndarray()[:32]
    assert abs(luma.mean() - (16 + 0.2126 * 219)) < 2  # BT.709's weight of red; BT.601's is .299


def test_odd_sizes_keep_every_pixel(tmp_path):
    """Bug: an odd height or width that the encoder refuses, or that loses or darkens the last row."""
    frames = ramp(3, 33, 47)
    back = wan21.video.read(save(tmp_path / "a.mp4", frames))
    assert back.shape == (3, 34, 48, 3) and abs(back.astype(int) - np.pad(frames, [(0, 0), (0, 1), (0, 1), (0, 0)],
                                                                          mode="edge")).max() < 4


@pytest.mark.parametrize("suffix", [".mp4", ".webp"])
def test_resampling_takes_the_nearest_frame(tmp_path, suffix):
    """Bug: every n-th frame, a drift over the clip, the frame before instead of the nearest, ties by rounding."""
    path = save(tmp_path / f"a{suffix}", ramp(30), fps=30)
    assert numbers(wan21.video.read(path, fps=16)) == [int(k * 30 / 16 + 0.5) for k in range(16)]
    assert numbers(wan21.video.read(path, fps=60))[:7] == [0, 0, 1, 1, 2, 2, 3]
    assert numbers(wan21.video.read(path, fps=15, frames=4)) == [0, 2, 4, 6]
    assert numbers(wan21.video.read(path)) == list(range(30))
    assert numbers(wan21.video.read(save(tmp_path / f"b{suffix}", ramp(24), fps=24), fps=16)) == [
        int(k * 1.5 + 0.5) for k in range(16)]


def test_frames_with_their_own_times(tmp_path):
    """Bug: durations of an animation ignored, a GIF that starts late, a repeated frame that counts once."""
    images = [Image.fromarray(frame) for frame in ramp(4)]
    for name in ("a.gif", "a.png"):
        images[0].save(tmp_path / name, save_all=True, append_images=images[1:], duration=[100, 300, 100, 200])
        assert numbers(wan21.video.read(tmp_path / name, fps=10)) == [0, 1, 1, 1, 2, 3, 3]
    still = ramp(4)[[0, 0, 0, 2, 2, 3]]
    assert numbers(wan21.video.read(save(tmp_path / "b.webp", still), fps=16)) == [0, 0, 0, 2, 2, 3]


def test_times_that_are_not_exact():
    """Bug: a cut whose first time is 100 s gives its first frame 1600 times; which of two equally near frames is taken
    depends on how the container rounded their times."""
    late = [(i / 24 + 0.0004 * (i > 0), i) for i in range(24)]
    assert list(wan21.video._resampled([*late, (1, None)], 16)) == [int(k * 1.5 + 0.5) for k in range(16)]
    timed = [*((100 + i / 30, i) for i in range(30)), (101, None)]
    assert list(wan21.video._resampled(timed, 15)) == list(range(0, 30, 2))


def test_only_what_is_needed_is_decoded(tmp_path, monkeypatch):
    """Bug: an hour is decoded, or converted, for the first second."""
    decoded = []
    real = wan21.video._movie
    monkeypatch.setattr(wan21.video, "_movie", lambda path: (decoded.append(1) or item for item in real(path)))
    monkeypatch.setattr(wan21.video, "_square", lambda frame, aspect: converted.append(1) or frame.to_image())
    converted = []
    path = save(tmp_path / "a.mp4", ramp(30), fps=30)
    assert len(wan21.video.read(path, frames=5, fps=10)) == 5 and len(decoded) <= 15 and len(converted) == 5


@pytest.mark.parametrize("name", ["a.mp4", "frames"])
def test_cover_and_centre(tmp_path, name):
    """Bug: stretched pictures, black bars, a crop of the corner, height and width exchanged."""
    x = np.zeros((2, 40, 120, 3), np.uint8)
    x[:, :, 40:80] = 255  # the centre is white
    back = wan21.video.read(save(tmp_path / name, x), height=20, width=20)
    assert back.shape == (2, 20, 20, 3) and back.min() > 230
    wide = wan21.video.read(tmp_path / name, height=20, width=60)
    assert wide.shape == (2, 20, 60, 3) and wide[:, :, :18].max() < 15 and wide[:, :, 22:38].min() > 240


def test_a_folder_in_natural_order(tmp_path):
    """Bug: 10 before 2; a hidden file or a text taken for a picture."""
    for i, frame in enumerate(ramp(12)):
        Image.fromarray(frame).save(tmp_path / f"frame{i}.png")
    (tmp_path / "captions.txt").write_text("a cat")
    (tmp_path / "._frame0.png").write_text("")
    assert numbers(wan21.video.read(tmp_path)) == list(range(12))
    assert numbers(wan21.video.read(tmp_path, fps=16, frames=5)) == list(range(5))


def test_pictures_of_every_kind(tmp_path):
    """Bug: transparency becomes white or noise, palettes become numbers, 16 bits become white, EXIF is ignored."""
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[...] = (200, 100, 50, 128)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert abs(wan21.video.read(tmp_path / "a.png")[0].astype(int) - (100, 50, 25)).max() <= 1
    Image.fromarray(np.full((4, 6), 70, np.uint8)).save(tmp_path / "b.png")
    assert (wan21.video.read(tmp_path / "b.png") == 70).all()
    Image.fromarray(np.full((4, 6), 70 * 257, np.uint16)).save(tmp_path / "c.png")
    assert (wan21.video.read(tmp_path / "c.png") == 70).all()
    Image.new("RGB", (6, 4), (10, 200, 30)).quantize(4).save(tmp_path / "d.gif")
    assert wan21.video.read(tmp_path / "d.gif").shape == (1, 4, 6, 3)
    assert (wan21.video.read(tmp_path / "d.gif") == (10, 200, 30)).all()
    turned = Image.new("RGB", (60, 40), "black")
    turned.paste("white", (0, 0, 30, 40))  # left half; 6: shown turned clockwise, so the left side is up
    exif = Image.Exif()
    exif[274] = 6
    turned.save(tmp_path / "e.jpg", exif=exif)
    shown = wan21.video.read(tmp_path / "e.jpg")[0]
    assert shown.shape == (60, 40, 3) and shown[:25].min() > 240 and shown[35:].max() < 15


def test_a_turned_movie_stands_upright(tmp_path):
    """Bug: a telephone's movie lies on its side, or stands on its head."""
    x = np.zeros((3, 32, 64, 3), np.uint8)
    x[:, :, :32] = 255
    path = save(tmp_path / "a.mp4", x)
    content, one = path.read_bytes(), 1 << 16
    straight = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    at = content.index(straight, content.index(b"tkhd"))
    path.write_bytes(content[:at] + clockwise + content[at + 36:])
    shown = wan21.video.read(path)
    assert shown.shape == (3, 64, 32, 3) and shown[:, :28].min() > 230 and shown[:, 36:].max() < 25


def test_pixels_that_are_not_square(tmp_path):
    """Bug: DVD and TV recordings come out too narrow."""
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2)
        file.mux(stream.encode(av.VideoFrame.from_ndarray(ramp(1, 32, 32)[0].copy(), format="rgb24")))
        file.mux(stream.encode())
    assert wan21.video.read(tmp_path / "a.mp4").shape == (1, 32, 64, 3)


def test_what_cannot_be_read(tmp_path):
    """Bug: a traceback, a clip that is too short, or a half-read file, instead of one line that names the file."""
    for name in ("text.mp4", "empty.mp4", "text.png", "empty.gif"):
        (tmp_path / name).write_text("" if "empty" in name else "no picture, moving or not")
        with pytest.raises(ValueError, match=f"{name}, which cannot be read .*expected a complete"):
            wan21.video.read(tmp_path / name)
    whole = save(tmp_path / "whole.mp4", ramp(20)).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="cut.mp4, which cannot be read"):
        wan21.video.read(tmp_path / "cut.mp4")
    Image.fromarray(scene()[0]).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-200])
    with pytest.raises(ValueError, match="cut.png, which cannot be read"):
        wan21.video.read(tmp_path / "cut.png")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none without any frame"):
        wan21.video.read(tmp_path / "none")
    with pytest.raises(ValueError, match="no file or folder .*missing.mp4"):
        wan21.video.read(tmp_path / "missing.mp4")
    with pytest.raises(wan21.video.TooShort, match="whole.mp4 with 10 frames at 8 fps, expected 11 .*--frames"):
        wan21.video.read(tmp_path / "whole.mp4", frames=11, fps=8)
    Image.new("RGB", (8, 8)).save(tmp_path / "none" / "1.png")
    Image.new("RGB", (8, 9)).save(tmp_path / "none" / "2.png")
    with pytest.raises(ValueError, match="none with frames of .*8, 9.*expected .* of one size"):
        wan21.video.read(tmp_path / "none")
    assert len(wan21.video.read(tmp_path / "none", height=4, width=4)) == 2


@pytest.mark.parametrize("name", ["a.mp4", "a.webp", "frames"])
def test_an_interrupt_keeps_what_has_arrived(tmp_path, name):
    """Bug: Ctrl-C after an hour of sampling leaves nothing, a file that no player opens, or is swallowed."""
    with pytest.raises(KeyboardInterrupt):
        with wan21.video.writer(tmp_path / name, fps=16) as write:
            write(ramp(20)[:7])
            assert not (tmp_path / name).exists()
            write(ramp(20)[7:12])
            raise KeyboardInterrupt
    assert numbers(wan21.video.read(tmp_path / name)) == list(range(12)) and os.listdir(tmp_path) == [name]
    with pytest.raises(KeyboardInterrupt):
        with wan21.video.writer(tmp_path / f"none{name}"):
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["a.mp4", "a.webp"])
def test_the_old_file_stays_until_the_new_one_is_finished(tmp_path, name, monkeypatch):
    """Bug: a film is lost since the disk is full when it is to be replaced."""
    save(tmp_path / name, ramp(5))

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        save(tmp_path / name, ramp(9))
    assert numbers(wan21.video.read(tmp_path / name)) == list(range(5))
    monkeypatch.undo()
    assert numbers(wan21.video.read(save(tmp_path / name, ramp(9)))) == list(range(9))


def test_frames_of_a_killed_run_do_not_mix(tmp_path):
    """Bug: the longer, killed run's last frames follow the shorter, finished one's; an old folder is overwritten."""
    (tmp_path / "a.writing").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.writing" / "00007.png")
    assert numbers(wan21.video.read(save(tmp_path / "a", ramp(3)))) == [0, 1, 2]
    with pytest.raises(OSError, match="not empty"):
        save(tmp_path / "a", ramp(4))
    assert numbers(wan21.video.read(tmp_path / "a")) == [0, 1, 2]


def test_blocks_that_do_not_fit(tmp_path):
    """Bug: floats cut to bytes, or a block of another size, which the encoder would stretch."""
    with wan21.video.writer(tmp_path / "a.mp4") as write:
        write(ramp(2))
        for wrong in (ramp(2) / 255, ramp(2, 32, 50), ramp(2)[..., :1]):
            with pytest.raises(AssertionError):
                write(wrong)
    assert len(wan21.video.read(tmp_path / "a.mp4")) == 2


def test_without_av(tmp_path, monkeypatch):
    """Bug: without PyAV, a traceback after an hour of sampling."""
    monkeypatch.setitem(sys.modules, "av", None)  # import av fails
    assert wan21.video.formats() == [".webp", ""]
    with pytest.raises(ValueError, match="package av.*requirements-wan.txt"):
        save(tmp_path / "a.mp4", ramp(2))
    (tmp_path / "b.mp4").touch()
    with pytest.raises(ValueError, match="no package av.*requirements-wan.txt"):
        wan21.video.read(tmp_path / "b.mp4")
