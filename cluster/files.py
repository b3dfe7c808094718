"""Every file that this project writes, and its own files read back.

A file is written under another name, NAME.writing, brought to the disk to its last byte, and only then renamed to NAME:
a crash or a full disk leaves the old file as it was, never half of the new one. A file of tensors is a .safetensors
whose header holds JSON metadata under the key "about", with a checksum of the tensors that is verified when they are
read. Nothing that is read is ever run as code.
"""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import sys
import tempfile
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CHECKSUM = "crc32_of_all_tensors"  # a key of the metadata
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # error numbers of a full disk


# ---------------------------------------------------------------------------------------------------------------------
# Writing

@contextmanager
def replacing(path: Path, fresh: Path | None = None) -> Iterator[Path]:
    """A name to write to, NAME.writing or `fresh`. The file becomes `path` when the context ends, and is removed when
    the context ends with an error. OSError, with the path and what to do, if the disk is full or not writable.
    """
    path = Path(path)
    fresh = fresh or path.with_name(path.name + ".writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield fresh
        with open(fresh, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(fresh, path)
        sync(path.parent)
    except (OSError, SafetensorError) as e:
        lack = "space" if is_full(e) else "permission or place"
        raise OSError(f"got no {lack} to write {path} ({reason(e)}), expected some: free some space, or change --out. "
                      "Earlier files are unchanged") from e
    finally:
        if fresh.is_file():
            fresh.unlink()


def is_full(e: Exception) -> bool:
    """Whether an error says that there is no space on the disk."""
    return getattr(e, "errno", None) in FULL or any(f"os error {n}" in str(e) for n in FULL)


def reason(e: Exception) -> str:
    return getattr(e, "strerror", None) or str(e)


def sync(folder: Path) -> None:
    """Make what was created or renamed in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str, one_of_many=False) -> None:
    """Write a text file. one_of_many: other processes may write it at the same time; the last one's text stays."""
    path = Path(path)
    with replacing(path, path.with_name(f"{path.name}.{os.getpid()}.writing") if one_of_many else None) as fresh:
        fresh.write_text(text, encoding="utf-8")


def write_json(path: Path, content, one_of_many=False) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False), one_of_many)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict | None = None, checked=True) -> None:
    """Write a safetensors file, in the tensors' dtypes. metadata: JSON for its header, to which a checksum of all
    tensors is added if `checked`; None writes a plain file for other programs."""
    held = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    if len({v.data_ptr() for v in held.values()}) < len(held):  # safetensors refuses tensors that share memory
        held = {k: v.clone() for k, v in held.items()}
    if metadata is not None and checked:
        metadata = metadata | {CHECKSUM: checksum(*(held[k] for k in sorted(held)))}
    header = {"format": "pt"} if metadata is None else {"about": json.dumps(metadata)}
    with replacing(path) as fresh:
        fresh.touch()
        mode = fresh.stat().st_mode
        save_file(held, fresh, header)
        fresh.chmod(mode)  # safetensors makes files that nobody else can read


# ---------------------------------------------------------------------------------------------------------------------
# Reading

def read_json(path: Path, expected: str) -> dict:
    """A JSON object. ValueError, which says what was expected, for anything else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"it is {str(content)[:40]}")
        return content
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise ValueError(f"got a missing or damaged {path} ({type(e).__name__}: {reason(e)}), expected {expected}"
                         ) from e


def header_of(f) -> dict:
    """The metadata of an open safetensors file, {} if it has none. ValueError if it is no JSON object."""
    try:
        metadata = json.loads((f.metadata() or {}).get("about", "{}"))
    except RecursionError as e:
        raise ValueError("its header is nested too deep") from e
    if not isinstance(metadata, dict):
        raise ValueError(f"its header's `about` is {str(metadata)[:40]}, no JSON object")
    return metadata


def read_tensors(path: Path, header_only: bool = False) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a safetensors file, mapped from it, and its metadata. ValueError if the file is missing, damaged,
    or does not match its checksum."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"got no file {path}, expected a .safetensors file: train it, or change --weights or --out")
    try:
        with safe_open(path, "pt") as f:
            metadata = header_of(f)
            tensors = {} if header_only else {k: f.get_tensor(k) for k in f.keys()}
        recorded = metadata.pop(CHECKSUM, None)
        if tensors and recorded is not None and checksum(*(tensors[k] for k in sorted(tensors))) != recorded:
            raise ValueError("its bytes are not those that were written")
        return tensors, metadata
    except (SafetensorError, OSError, ValueError, MemoryError) as e:
        raise ValueError(f"got a damaged or truncated file {path} ({e}), expected a complete .safetensors file: "
                         "change --weights or --out, or move it away and train its stage again") from e


def metadata_of(path: Path) -> dict:
    """The metadata of a safetensors file; its tensors are not read."""
    return read_tensors(path, header_only=True)[1]


def checksum(*tensors: Tensor) -> int:
    """zlib.crc32 over the bytes of tensors, one after the other, as a file holds them."""
    crc = 0
    for x in tensors:
        crc = zlib.crc32(x.detach().cpu().flatten().contiguous().view(torch.uint8).numpy(), crc)
    return crc


def check_finite(tensors: dict[str, Tensor], path) -> None:
    """ValueError that names the tensors that are not floating point, or not finite."""
    def fault(x):
        if not x.is_floating_point():
            return str(x.dtype).removeprefix("torch.")
        if x.layout != torch.strided or x.is_meta:
            return "sparse, or without numbers"
        x = x.float() if x.dtype.itemsize == 1 else x  # torch has no aminmax of float8
        return "" if x.numel() == 0 or torch.stack(x.aminmax()).isfinite().all() else "not finite"  # takes no memory

    wrong = [f"{name} ({why})" for name, x in tensors.items() if (why := fault(x))]
    if wrong:
        raise ValueError(f"got {path} with {len(wrong)} tensors that are no finite numbers ({', '.join(wrong[:3])}), "
                         "expected weights of a network: change the file, or make it again")


# ---------------------------------------------------------------------------------------------------------------------
# Folders

@contextmanager
def in_use(folder: Path):
    """Keep other runs out of a folder for as long as the context lasts. ValueError if another run is using it.

    This locks the file `.in_use` in the folder; the system releases the lock when the process ends, however it ends.
    On a file system without locks nobody is kept out.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".in_use", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as e:
        raise ValueError(f"got --out {folder} ({reason(e)}), expected a folder to write in: change --out") from e
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            who = os.read(handle, 200).decode(errors="replace").strip()
            raise ValueError(f"got --out {folder}, which is in use by {who or 'another process'}, expected a free "
                             "folder: wait for that process, stop it, or change --out") from e
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def tidy(folder: Path, beginnings: list[str]) -> None:
    """Remove the half-written files of killed processes whose names begin so. Call it only inside `in_use`."""
    for path in Path(folder).glob("*.writing"):
        if path.is_file() and path.name.startswith(tuple(beginnings)):
            path.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Commands

def check_device(device: str, flag: str = "--device") -> None:
    if device != "cpu" and not (re.fullmatch(r"cuda(:\d+)?", device) and torch.cuda.is_available()):
        raise ValueError(f"got {flag} {device}, expected cpu, or cuda where there is a GPU")


def run_command(main: Callable, stopped: str, *errors: type) -> None:
    """Run a command to its end. An expected error (ValueError, OSError, `errors`) is told in one line, exit code 1;
    Ctrl-C and SIGTERM end it with the message `stopped` and exit code 0."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt
    try:
        main()
    except (ValueError, OSError, *errors) as e:
        sys.exit(f"{type(e).__name__}: {printable(str(e))}")
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
    except Exception as e:
        first_line = printable((str(e).strip() or "-").splitlines()[0])[:300]
        if isinstance(e, torch.OutOfMemoryError) or "allocate memory" in str(e):
            sys.exit(f"OutOfMemoryError: {first_line}\nexpected less: a smaller --batch, --frames, --height or "
                     "--width, more --accum, or --checkpointing")
        sys.exit(f"unexpected {type(e).__name__}: {first_line}\nIf flags and files are as README says, this is an "
                 f"error in the code. {keep_traceback()}")


def keep_traceback() -> str:
    """Write the traceback of the current error to a file, as the command may have run for hours. Returns where."""
    path = Path(tempfile.gettempdir()) / f"traceback-{os.getpid()}.txt"
    try:
        write_text(path, traceback.format_exc())
    except OSError:
        return traceback.format_exc()
    return f"Its traceback: {path}"


def printable(text: str) -> str:
    """A text from outside without control characters, which a terminal would obey."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]", lambda m: repr(m[0])[1:-1], text)
