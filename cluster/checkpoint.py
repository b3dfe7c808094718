"""Checkpoints that any number of ranks can write and read, with DCP as torch has it.

A checkpoint is a folder named by its step. It is written as STEP.writing, with the hashes of all its files, and
renamed when it is complete; then it is read back, and only after that are older ones removed. So there is always an
intact one to resume from: `newest_intact` finds it by the hashes, and warns of each damaged one that it passes over.
DCP's index is a pickle; it is read by an unpickler that allows nothing but what DCP itself writes, so a stranger's
checkpoint cannot run code.
"""

import hashlib
import json
import pickle
import re
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta

from cluster import ranks
from cluster.files import read_json, sync, write_text


def state_of(training) -> dict[str, Tensor]:
    """Every tensor that a stage changes, by name: networks and optimizers."""
    tensors = {f"{name}.{k}": v for name, net in training.nets.items() for k, v in net.state_dict().items()}
    for name, optimizer in training.optimizers.items():
        if not optimizer.state:
            start_moments(optimizer)
        for i, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{name}.{i}.{k}": v for k, v in moments.items()}
    return tensors


@torch.no_grad()
def start_moments(optimizer):
    """Make an optimizer's moments, all zero, before its first step, so that a checkpoint can be read into them."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()  # with learning rate 0 and no gradient: it moves nothing
    optimizer.zero_grad(set_to_none=True)
    for moments in optimizer.state.values():
        for v in moments.values():
            v.zero_()


def save(folder: Path, step: int, tensors: dict[str, Tensor], metadata: dict, keep: int) -> None:
    """Write a checkpoint; once it has been read back and found intact, remove all but the newest `keep`.

    tensors: name -> plain tensor or DTensor; metadata: JSON. Every rank must call it. OSError, on every rank, if it
    cannot be written; older checkpoints are unchanged then.
    """
    fresh, final = folder / f"{step:08d}.writing", folder / f"{step:08d}"
    unharmed = "check the disk, or change --out. Older checkpoints are as they were"

    clear(folder, f"saving {final}")
    try:
        with all_ranks() as who:
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(fresh), **who)
    except (CheckpointException, OSError, RuntimeError) as e:
        if ranks.is_lost(e):
            raise
        clear(folder)
        why = "; ".join(f"{x[0]}" for x in e.failures.values()) if isinstance(e, CheckpointException) else e
        raise OSError(f"got no space or permission to write the checkpoint {fresh} ({why}), expected some: free some "
                      f"space, or {unharmed}") from e

    def describe():
        ends = {}
        for part in Reader(fresh).read_metadata().storage_data.values():
            ends[part.relative_path] = max(part.offset + part.length, ends.get(part.relative_path, 0))
        for name, end in ends.items():
            if not (fresh / name).exists():
                raise OSError(f"got no {name} of another rank in {fresh}, expected a folder that all ranks share: "
                              "change --out")
            if (fresh / name).stat().st_size < end:
                raise OSError(f"got {fresh / name} shorter than was written, expected all of it: {unharmed}")
        write_text(fresh / "about.json", json.dumps(metadata))

    def finish(found):
        write_text(fresh / "sha256.json", json.dumps(found))
        if final.exists():  # it was found damaged when this run started; keep it, the user may want to look at it
            final.rename(next(p for i in range(10**6) if not (p := folder / f"{step:08d}.damaged{i}").exists()))
        fresh.rename(final)
        sync(folder)

    def remove_older():
        for path in [path for path in checkpoints(folder) if int(path.name) <= step][:-keep]:  # newer ones are damaged
            shutil.rmtree(path)

    try:
        ranks.on_rank_0(describe, f"describing {final}")
        found = hashes(fresh)
        ranks.on_rank_0(lambda: finish(found), f"finishing {final}")
    except OSError:
        clear(folder)
        raise
    if reason := damage(final):
        raise OSError(f"got {reason} in the checkpoint {final} just written, expected what was written: {unharmed}")
    ranks.on_rank_0(remove_older, f"pruning {folder}")


def clear(folder: Path, what="removing half-written checkpoints") -> None:
    """Remove what killed and failed saves have left in a folder. what: the operation that this is part of."""
    def remove():
        for path in folder.glob("*.writing"):
            if re.fullmatch(r"\d{8,}\.writing", path.name) and path.is_dir():
                shutil.rmtree(path)

    ranks.on_rank_0(remove, what)


@contextmanager
def all_ranks():
    """The arguments that tell DCP who takes part; without its warning that one process saves alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield {"process_group": ranks.control and ranks.control.group, "no_dist": ranks.control is None}


class Reader(dcp.FileSystemReader):
    """DCP's reader, except that the index (.metadata, a pickle) may name only what DCP itself writes about tensors."""

    NAMES = {
        "torch.distributed.checkpoint.metadata": ("Metadata", "TensorStorageMetadata", "ChunkStorageMetadata",
                                                  "TensorProperties", "MetadataIndex", "StorageMeta",
                                                  "_MEM_FORMAT_ENCODING"),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch": ("Size", "float32", "bfloat16", "float16", "float64", "int64"),
        "torch.serialization": ("_get_layout",),
        "pathlib": ("Path", "PosixPath", "PurePosixPath"),
    }

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if name not in Reader.NAMES.get(module.replace("pathlib._local", "pathlib"), ()):
                raise pickle.UnpicklingError(f"it holds {module}.{name}, which no checkpoint needs")
            return super().find_class(module, name)

    def read_metadata(self, *args, **kwargs):
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as f:
                metadata = self.Unpickler(f).load()
            if not all(Path(part.relative_path).name == str(part.relative_path)
                       for part in metadata.storage_data.values()):
                raise ValueError("it names files of other folders")
        except OSError:
            raise
        except Exception as e:  # damaged bytes make the unpickler fail in any way there is
            raise ValueError(f"got a checkpoint {path} that cannot be read ({e}), expected one of this project: change "
                             "--out, or move it away") from e
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def metadata_of(path: Path) -> dict:
    """The metadata that a checkpoint was saved with."""
    expected = "what train.py left there: move the checkpoint away, or change --out"
    metadata = read_json(path / "about.json", expected)
    types = {"stage": str, "step": int, "config": dict, "seconds": float | int, "nonfinite": int, "data": str}
    if wrong := [name for name, type_ in types.items() if not isinstance(metadata.get(name), type_)]:
        raise ValueError(f"got {path / 'about.json'} without {', '.join(wrong)} as they should be, expected {expected}")
    return metadata


def load(path: Path, tensors: dict[str, Tensor]) -> None:
    """Read a checkpoint into tensors, in place, whatever number of ranks wrote it. ValueError if it holds others."""
    ranks.on_rank_0(lambda: bool(Reader(path).read_metadata()))  # for its own message instead of DCP's
    try:
        with all_ranks() as who:
            dcp.load(tensors, storage_reader=Reader(path), **who)
    except (CheckpointException, RuntimeError, ValueError) as e:
        if ranks.is_lost(e):
            raise
        why = str(e).strip().splitlines()[-1][:200] if str(e).strip() else type(e).__name__
        raise ValueError(f"got other tensors in {path} than this stage has ({why}), expected the same: change --out or "
                         "--size, or move the checkpoint away to train the stage again") from e


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint in a folder whose hashes are right, None if there is no checkpoint. A damaged one stays
    where it is, with a warning. ValueError if all are damaged."""
    damaged = []
    for path in ranks.on_rank_0(lambda: checkpoints(folder)[::-1], f"looking into {folder}"):
        reason = damage(path)
        if not reason:
            return path
        if ranks.rank() == 0:
            print(f"warning: the checkpoint {path} is damaged ({reason}); trying the one before", file=sys.stderr)
        damaged.append(f"{path} ({reason})")
    if damaged:
        raise ValueError(f"got only damaged checkpoints, {', '.join(damaged)}, expected an intact one: move {folder} "
                         "away to train this stage from its start, or change --out")
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("*") if re.fullmatch("[0-9]{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, by its recorded hashes; None if nothing."""
    try:
        recorded = ranks.on_rank_0(lambda: read_json(folder / "sha256.json", "the hashes of its files"))
    except ValueError as e:
        return str(e)
    found = hashes(folder)
    wrong = sorted(name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name))
    return f"{', '.join(wrong)}: missing, truncated or changed" if wrong else None


def hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file in a folder, or why it cannot be read; the ranks divide the files among them."""
    def sha256(path):
        try:
            with open(path, "rb") as f:
                return hashlib.file_digest(f, "sha256").hexdigest()
        except OSError as e:
            return str(e)

    files = ranks.on_rank_0(lambda: sorted(path for path in folder.iterdir() if path.name != "sha256.json"))
    mine = files[ranks.rank() :: ranks.world()]
    with ThreadPoolExecutor() as pool:
        of_mine = dict(zip((path.name for path in mine), pool.map(sha256, mine)))
    return {name: found for some in ranks.all_gather(of_mine, f"hashes of {folder}") for name, found in some.items()}
