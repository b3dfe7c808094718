"""From one process to a cluster: FSDP2, DTensor and DCP as torch has them. All of this project that knows of ranks.

    setup()          join the other ranks, if torchrun started us
    shard(net)       spread a network's weights over them
    save(), load()   a checkpoint that any number of ranks can read, verified by hashes, never on top of an older one

Every rank holds a slice of each weight, its gradient and its optimizer state (fp32), and gathers a block's weights just
before it needs them (in bf16, if --precision says so); gradients are averaged in fp32. A rank computes its own part of
the global batch. What it draws depends on (seed, step, index in the global batch) alone, so ranks need not talk about
draws; but if one ever took another path than the rest, all would wait for each other for ever, or go on with mixed-up
weights. So ranks `agree`: each says what it is about to do, and if two differ, or one says nothing for --timeout
seconds, all stop with a message. They do so once or twice per optimizer step: where a rollout is drawn, and where
metrics are averaged, which also compares all forwards since then. With --check-ranks they agree before every forward: a
wait for the slowest rank each time, but the message then names the first forward that differs. (A rank that stalls
between two agreements is missed in a collective of FSDP. Under gloo that ends in a message, too; under nccl, untested,
it may be its watchdog that stops the job, and then only --check-ranks is sure to name the rank.)

A plain `python train.py` in fp32 has no ranks: then shard leaves the network whole, and the rest does nothing.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor

from files import read_json, sync, write_text


@dataclass
class Control:
    """How ranks talk about other things than tensors: over gloo, beside whatever carries the gradients."""

    group: dist.ProcessGroup
    store: dist.Store
    mesh: dist.DeviceMesh
    timeout: float  # seconds
    every_forward: bool  # agree before each
    announced: int = 0  # by `announce`, so far
    networks: int = 0  # sharded so far
    last: str = "the start"  # what the last of them was about
    forwards: int = 0  # checksum of all that this rank has run since it last agreed


control: Control | None = None  # of this process; None: there are no ranks


class RankError(RuntimeError):
    """Ranks that disagree, or one that does not answer."""


@contextmanager
def setup(device: str, precision: str, shard_over: int, timeout: float, every_forward: bool = False):
    """Join the other ranks for as long as the context lasts. Without torchrun one rank, and for fp32 none at all.

    shard_over: how many ranks share one copy of the weights; 0: all ranks of a node, so that several nodes hold a copy
    each (HSDP). timeout: seconds after which a rank that says nothing counts as lost. every_forward: agree before each.
    """
    global control
    launched, cuda = "RANK" in os.environ, device.startswith("cuda")
    if control or not launched and precision == "fp32":
        yield
        return
    if cuda and int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count():
        raise ValueError(f"got more ranks than this node's {torch.cuda.device_count()} GPUs, expected one each: change "
                         "--nproc_per_node, or give --device cpu")
    patience = timedelta(seconds=timeout)
    store, me, size = dist.HashStore(), 0, 1
    try:
        if launched:
            store, me, size = next(rendezvous("env://", timeout=patience))
            store.set_timeout(patience)
            store = roll_call(store, me, size, timeout)
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        # nccl gets twice the time: its watchdog kills a process without a word, so let gloo, which can tell, be first
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=me, world_size=size,
                                timeout=2 * patience if cuda else patience)
        shard_over = shard_over or min(size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
        if size % shard_over:
            raise ValueError(f"got {size} ranks and --shard-over {shard_over}, expected a divisor of {size}: change "
                             "--shard-over")
        mesh = init_device_mesh("cuda" if cuda else "cpu", (size // shard_over, shard_over),
                                mesh_dim_names=("copies", "shards"))
        control = Control(dist.new_group(backend="gloo", timeout=patience), store, mesh, timeout, every_forward)
        yield
    except RuntimeError as e:
        lost = isinstance(e, RankError)
        if not lost and is_lost(e):  # while they meet, or in a forward or backward
            lost, e = True, in_vain(e, timeout)
        if lost and cuda:  # to leave in order, nccl would wait for the rank that is lost
            print(f"RankError: {e}", file=sys.stderr, flush=True)
            os._exit(1)
        raise e
    finally:
        control = None
        if dist.is_initialized():
            dist.destroy_process_group()


def roll_call(store: dist.Store, me: int, size: int, timeout: float) -> dist.Store:
    """A part of the store that only this attempt of a job knows.

    torchrun keeps its store when it restarts the ranks (its TORCHELASTIC_RESTART_COUNT can differ between nodes, so it
    is no help), and with it the addresses of the dead: who finds one before it is replaced calls in vain (pytorch issue
    135712). So each rank brings a new name, and rank 0 reads them out until all who are on the roll have answered.
    """
    name, end = uuid.uuid4().hex, time.time() + timeout
    store.set(f"answer {me}", "")
    store.set(f"name {me}", name)
    while time.time() < end:
        if me == 0:
            store.set("roll", b" ".join(store.multi_get([f"name {r}" for r in range(size)])))
        roll = store.get("roll").decode()
        if roll.split()[me : me + 1] == [name]:
            store.set(f"answer {me}", roll)
            if me == 0 and set(store.multi_get([f"answer {r}" for r in range(size)])) == {roll.encode()}:
                store.set("met", roll)
            if store.check(["met"]) and store.get("met").decode() == roll:
                return dist.PrefixStore(hashlib.sha256(roll.encode()).hexdigest(), store)
        time.sleep(0.02)
    raise dist.DistStoreError(f"not all of {size} ranks answered")


def rank() -> int:
    return dist.get_rank() if control else 0


def world() -> int:
    return dist.get_world_size() if control else 1


def my_parts(batch: int, accum: int) -> list[slice]:
    """The parts of the global batch that this rank computes, one after the other: `accum` slices of equal size."""
    size = batch // (world() * accum)
    first = rank() * accum * size
    return [slice(first + i * size, first + (i + 1) * size) for i in range(accum)]


# ---------------------------------------------------------------------------------------------------------------------
# Networks

def shard(net: nn.Module, precision: str, gather: str) -> nn.Module:
    """Spread a network that may still be on the meta device over the ranks, block by block, then the rest.

    precision: bf16 computes in bf16, with fp32 weights and reductions behind it. gather: "forward" drops a block's
    gathered weights after each forward, "update" keeps them until a backward, or until they change.
    """
    if control is None:
        return net
    control.networks += 1
    name = f"{type(net).__name__} number {control.networks}"
    policy = MixedPrecisionPolicy(torch.bfloat16 if precision == "bf16" else None, torch.float32,
                                  cast_forward_inputs=False)  # times stay in float32
    mesh = control.mesh if control.mesh.size(0) > 1 else control.mesh["shards"]
    for module in [*getattr(net, "blocks", []), net]:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=gather == "forward")

    def say(net, args, layout):
        known = {k: tuple(v.shape) if isinstance(v, Tensor) else v if isinstance(v, int) else "" for k, v in
                 layout.items()}
        shapes = [tuple(x.shape) for x in args if isinstance(x, Tensor)]
        note(f"{name} on {shapes} {known}, {'with' if torch.is_grad_enabled() else 'without'} gradient")

    net.register_forward_pre_hook(say, prepend=True, with_kwargs=True)
    return net


@torch.no_grad()
def fill(net: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy whole tensors, one at a time, into a network: each rank takes its slice."""
    own = net.state_dict()
    for name, w in weights:
        if isinstance(own[name], DTensor):
            p = own[name]
            w = distribute_tensor(w.to(p.device, p.dtype), p.device_mesh, p.placements, src_data_rank=None)
        own[name].copy_(w)


def whole(x: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole_weights(net: nn.Module) -> dict[str, Tensor]:
    """All weights of a network in CPU memory on rank 0, nothing on the others. Every rank must call it."""
    weights = {}
    for name, p in net.state_dict().items():
        full = whole(p.detach())
        if rank() == 0:
            weights[name] = full.cpu()
    return weights


def forget_gathered(*nets: nn.Module) -> None:
    """Drop gathered weights (gather="update"): the slices that they were gathered from change now."""
    for net in nets:
        for module in net.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


# ---------------------------------------------------------------------------------------------------------------------
# What ranks tell each other

def announce(what: str) -> None:
    """Write down what this rank is about to do, without waiting for anyone: `late` reads it."""
    control.announced, control.last = control.announced + 1, what
    control.store.set(f"rank {rank()}", f"{control.announced} {what}")


def note(what: str) -> None:
    """Remember a forward until ranks next agree, which is now if --check-ranks is given."""
    if world() == 1:
        return
    if control.every_forward:
        agree(what)
    else:
        announce(what)
    control.forwards = zlib.crc32(what.encode(), control.forwards)


def agree(what: str) -> None:
    """Wait for all ranks; RankError on every one if one is about to do something else, does not come, or has run other
    forwards since ranks last agreed."""
    if world() == 1:
        return
    before, mine = control.last, torch.tensor([zlib.crc32(what.encode(), control.forwards)])
    control.forwards = 0
    heard = [torch.empty_like(mine) for _ in range(world())]
    try:
        announce(what)
        dist.all_gather(heard, mine, group=control.group)
    except RuntimeError as e:
        raise in_vain(e, control.timeout) from e
    if len({h.item() for h in heard}) > 1:
        lines = "".join(f"\n  rank {r}: {said}" for r, said in enumerate(heard_from_all(f"{what} (after: {before})")))
        raise RankError(f"ranks disagree on what comes next:{lines}\nexpected the same on every rank, now and in all "
                        "forwards since they last agreed: start them with the same code, flags, --data and --out "
                        "(--check-ranks: name the first forward that differs)")


def is_lost(e: Exception) -> bool:
    """Whether an error says that another rank has died or does not answer. gloo has no type for that."""
    return isinstance(e, dist.DistError) or "gloo" in str(e)


def in_vain(e: Exception, timeout: float) -> RankError:
    """What to say of an error of is_lost."""
    why = f"waited {timeout:g} s in vain" if "timed out" in str(e).lower() else "lost the connection to another rank"
    if control is None:
        return RankError(f"got no meeting of all ranks: this one {why} ({e}); expected all to start: see their logs "
                         "(--timeout: the patience)")
    return RankError(f"rank {rank()} {why}, at: {control.last}. {late()}")


def late() -> str:
    """Which ranks are behind this one, and where they were last seen."""
    def seen(r):
        known = control.store.check([f"rank {r}"])
        n, what = control.store.get(f"rank {r}").decode().split(" ", 1) if known else (0, "the start")
        return int(n), what

    try:
        behind = [f"rank {r} was last seen at: {what}" for r in range(world())
                  for n, what in [seen(r)] if n < control.announced]
    except RuntimeError:
        return "The rank that keeps their addresses is gone, too: see the logs of the other ranks"
    return "; ".join(behind or ["all ranks had come there"]) + (". One has died, stalled or run another forward since: "
                                                                "see its log (--timeout: the patience; --check-ranks: "
                                                                "compare ranks before every forward)")


def heard_from_all(x) -> list:
    """x of every rank, in their order."""
    gathered = [None] * world()
    dist.all_gather_object(gathered, x, group=control.group)
    return gathered


def everyone(x, what: str) -> list:
    """x of every rank, in their order. what: what x is."""
    agree(what)
    return heard_from_all(x) if world() > 1 else [x]


def any_rank(x: bool, what: str) -> bool:
    return any(everyone(bool(x), what))


def on_rank_0(work: Callable, what: str = "what rank 0 does alone"):
    """Run work() on rank 0 alone; every rank returns its result or raises its error."""
    agree(what)
    result, error = None, None
    if rank() == 0:
        try:
            result = work()
        except (OSError, ValueError) as e:
            error = e
    if world() > 1:
        heard = [result, error]
        dist.broadcast_object_list(heard, src=0, group=control.group)
        result, error = heard
    if error:
        raise error
    return result


def mean(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean over ranks of every tensor, in one message."""
    if world() == 1:
        return metrics
    agree(f"the mean of {', '.join(metrics)}")
    flat = torch.cat([v.detach().double().cpu().flatten() for v in metrics.values()])
    dist.all_reduce(flat, group=control.group)
    flat = (flat / world()).split([v.numel() for v in metrics.values()])
    return {k: x.to(v.dtype).view(v.shape) for (k, v), x in zip(metrics.items(), flat)}


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: FOLDER/00000100/ holds DCP's files, about.json (step, counters, settings) and sha256.json, the hash of
# each of them. It is written as 00000100.writing and renamed when all of it is on disk, so a killed save never looks
# like a whole one.

def state_of(training) -> dict:
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


def save(folder: Path, step: int, tensors: dict[str, Tensor], about: dict, keep: int) -> None:
    """Write a checkpoint; then, once it was read back and found intact, forget all but the newest `keep`.

    tensors: name -> plain tensor or DTensor; about: JSON. Every rank must call it. OSError, on every rank, if it cannot
    be written; the older ones are as they were then.
    """
    fresh, final = folder / f"{step:08d}.writing", folder / f"{step:08d}"

    clear(folder, f"saving {final}")
    try:
        with quiet():
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(fresh), process_group=control and control.group,
                     no_dist=control is None)
    except (CheckpointException, OSError, RuntimeError) as e:
        if is_lost(e):
            raise
        clear(folder)
        why = "; ".join(f"{x[0]}" for x in e.failures.values()) if isinstance(e, CheckpointException) else e
        raise OSError(f"got no space or no right to write the checkpoint {fresh} ({why}); what was saved before is "
                      "as it was: free some space, or change --out") from e

    def describe():
        ends = {}
        for part in Reader(fresh).read_metadata().storage_data.values():
            ends[part.relative_path] = max(part.offset + part.length, ends.get(part.relative_path, 0))
        if elsewhere := sorted(part for part in ends if not (fresh / part).exists()):
            raise OSError(f"got no {', '.join(elsewhere)} of other ranks in {fresh}, expected a folder that all ranks "
                          "share: change --out")
        if short := sorted(part for part, end in ends.items() if (fresh / part).stat().st_size < end):
            raise OSError(f"got {', '.join(short)} in {fresh} shorter than was written, expected all of it: check the "
                          "disk, or change --out. Older checkpoints are as they were")
        write_text(fresh / "about.json", json.dumps(about))

    def finish(found):
        write_text(fresh / "sha256.json", json.dumps(found))
        if final.exists():  # found damaged when this run started; it is kept, for who may want to look
            final.rename(next(p for i in range(10**6) if not (p := folder / f"{step:08d}.damaged{i}").exists()))
        fresh.rename(final)
        sync(folder)

    def prune(reason):
        if reason:
            raise OSError(f"got {reason} in the checkpoint {final} just written, expected what was written: check the "
                          "disk, or change --out. Older checkpoints are as they were")
        older = [path for path in checkpoints(folder) if int(path.name) <= step]  # any newer one is a damaged one
        for path in older[:-keep]:
            shutil.rmtree(path)

    try:
        on_rank_0(describe, f"describing {final}")
        found = hashes(fresh)
        on_rank_0(lambda: finish(found), f"finishing {final}")
    except OSError:
        clear(folder)
        raise
    reason = damage(final)
    on_rank_0(lambda: prune(reason), f"pruning {folder}")


def clear(folder: Path, what="clearing checkpoints away") -> None:
    """Remove what killed and failed saves have left in a folder. what: that this is part of."""
    def tidy():
        for path in folder.glob("*.writing"):
            if re.fullmatch(r"\d{8,}\.writing", path.name) and path.is_dir():
                shutil.rmtree(path)

    on_rank_0(tidy, what)


class Reader(dcp.FileSystemReader):
    """DCP's, but for one thing: its .metadata is a pickle, which could run anything when it is read. Here it may hold
    what DCP writes of tensors, by name, and nothing else."""

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


def about_checkpoint(path: Path) -> dict:
    """What `save` was told about a checkpoint."""
    expected = "what train.py left there: move the checkpoint away, or change --out"
    about = read_json(path / "about.json", expected)
    kinds = {"stage": str, "step": int, "config": dict, "seconds": float | int, "nonfinite": int, "data": str}
    if wrong := [name for name, kind in kinds.items() if not isinstance(about.get(name), kind)]:
        raise ValueError(f"got {path / 'about.json'} without {', '.join(wrong)} as they should be, expected {expected}")
    return about


def load(path: Path, tensors: dict[str, Tensor]) -> None:
    """Read a checkpoint into tensors, in place, from whatever number of ranks it was written by. ValueError if it holds
    other tensors."""
    on_rank_0(lambda: bool(Reader(path).read_metadata()))  # its own error, in place of DCP's about it
    try:
        with quiet():
            dcp.load(tensors, storage_reader=Reader(path), process_group=control and control.group,
                     no_dist=control is None)
    except (CheckpointException, RuntimeError, ValueError) as e:
        if is_lost(e):
            raise
        why = str(e).strip().splitlines()[-1][:200] if str(e).strip() else type(e).__name__
        raise ValueError(f"got other tensors in {path} than this stage has ({why}), expected the same: change --out or "
                         "--size, or move the checkpoint away to train the stage again") from e


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint in a folder whose hashes are right, None if there is none at all. A damaged one is named,
    left where it is, and the one before is taken. ValueError if all are damaged."""
    damaged = []
    for path in on_rank_0(lambda: checkpoints(folder)[::-1], f"looking into {folder}"):
        reason = damage(path)
        if not reason:
            return path
        if rank() == 0:
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


def hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file in a folder, or why it cannot be read; each rank reads its share of them."""
    def sha256(path):
        try:
            with open(path, "rb") as f:
                return hashlib.file_digest(f, "sha256").hexdigest()
        except OSError as e:
            return str(e)

    files = on_rank_0(lambda: sorted(path for path in folder.iterdir() if path.name != "sha256.json"))
    mine = files[rank() :: world()]
    with ThreadPoolExecutor() as pool:
        of_mine = dict(zip((path.name for path in mine), pool.map(sha256, mine)))
    return {name: found for share in everyone(of_mine, f"hashes of {folder}") for name, found in share.items()}


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, by its recorded hashes; None if nothing."""
    try:
        recorded = on_rank_0(lambda: read_json(folder / "sha256.json", "the hashes of its files"))
    except ValueError as e:
        return str(e)
    found = hashes(folder)
    wrong = sorted(name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name))
    return f"{', '.join(wrong)}: missing, truncated or changed" if wrong else None


@contextmanager
def quiet():
    """Without DCP's remark that one process saves alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
