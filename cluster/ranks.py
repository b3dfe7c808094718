"""The ranks: the processes that torchrun starts, one for each GPU, and how they stay in step.

Each rank computes its slices of the global batch. What is drawn depends on (seed, step, index in the global batch)
alone, so ranks need not talk about draws. But if one rank ever took another path than the rest, all would wait for
each other for ever, or continue with mixed-up weights. Therefore `check_in_sync`: each rank tells the others what it
is about to do and which forwards it has run since the last time; if two ranks differ, or one does not answer within
--timeout seconds, all stop with a message. This happens once or twice per optimizer step: where a rollout is drawn,
and where metrics are averaged. With --check-ranks it happens before every forward, at the price of waiting for the
slowest rank each time; the message then names the first forward that differs.

A rank that stalls between two checks leaves the others waiting in a collective of FSDP. Under gloo that ends in a
message, too. Under nccl (untested) its watchdog may end the job instead, and only --check-ranks is sure to name the
rank. Without torchrun an fp32 run has no ranks at all, and the functions here do nothing.
"""

import ctypes
import hashlib
import os
import sys
import time
import uuid
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.rendezvous import rendezvous as torch_rendezvous


@dataclass
class Control:
    """How ranks exchange everything but tensors: over gloo, beside the backend that carries the gradients."""

    group: dist.ProcessGroup
    store: dist.Store
    mesh: dist.DeviceMesh
    timeout: float  # seconds
    every_forward: bool  # check before each forward
    networks: int = 0  # sharded so far
    announced: int = 0  # calls of `announce` so far
    last: str = "the start"  # what the last of them announced
    forwards: int = 0  # checksum of the forwards that this rank has run since the last check


control: Control | None = None  # of this process, set by `setup`; None: there are no ranks


class RankError(RuntimeError):
    """Ranks that disagree, or a rank that does not answer."""


def keep_freed_memory():
    """Keep the memory that tensors on a CPU leave for the next ones. By default, glibc gives it back to the system many
    times in every update, and to get it again costs a page fault for each 4 KiB."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: smaller blocks are parts of the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which is not made smaller


@contextmanager
def setup(device: str, precision: str, shard_group_size: int, timeout: float, every_forward: bool = False):
    """Join the other ranks for as long as the context lasts. Without torchrun: one rank, and for fp32 none at all.

    shard_group_size: how many ranks share one copy of the weights; 0: the ranks of a node, so that each node holds a
    copy (HSDP). timeout: seconds after which a silent rank counts as lost. every_forward: check before each forward.
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
            store, me, size = next(torch_rendezvous("env://", timeout=patience))
            store.set_timeout(patience)
            store = rendezvous(store, me, size, timeout)
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        # nccl gets twice the time: its watchdog kills a process without a message, so gloo should time out first
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=me, world_size=size,
                                timeout=2 * patience if cuda else patience)
        shards = shard_group_size or min(size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
        if size % shards:
            raise ValueError(f"got {size} ranks and --shard-group-size {shards}, expected a divisor of {size}: change "
                             "--shard-group-size")
        mesh = init_device_mesh("cuda" if cuda else "cpu", (size // shards, shards),
                                mesh_dim_names=("copies", "shards"))
        control = Control(dist.new_group(backend="gloo", timeout=patience), store, mesh, timeout, every_forward)
        yield
    except RuntimeError as e:
        lost = isinstance(e, RankError)
        if not lost and is_lost(e):  # in setup itself, or in a forward or backward
            lost, e = True, explain_timeout(e, timeout)
        if lost and cuda:  # an orderly exit would make nccl wait for the lost rank
            print(f"RankError: {e}", file=sys.stderr, flush=True)
            os._exit(1)
        raise e
    finally:
        control = None
        if dist.is_initialized():
            dist.destroy_process_group()


def rendezvous(store: dist.Store, me: int, size: int, timeout: float) -> dist.Store:
    """A part of the store that only this attempt of a job uses.

    When torchrun restarts the ranks it keeps the store, and in it the addresses of the dead ranks: a new rank that
    reads such an address cannot connect (pytorch issue 135712). torchrun's TORCHELASTIC_RESTART_COUNT does not help, as
    it can differ between nodes. So each rank stores a new random name, and rank 0 publishes the list of the names until
    every rank has confirmed the same list; a hash of that list then names the part.
    """
    name, end = uuid.uuid4().hex, time.time() + timeout
    store.set(f"answer {me}", "")
    store.set(f"name {me}", name)
    while time.time() < end:
        if me == 0:
            store.set("names", b" ".join(store.multi_get([f"name {r}" for r in range(size)])))
        names = store.get("names").decode()
        if names.split()[me : me + 1] == [name]:
            store.set(f"answer {me}", names)
            if me == 0 and set(store.multi_get([f"answer {r}" for r in range(size)])) == {names.encode()}:
                store.set("met", names)
            if store.check(["met"]) and store.get("met").decode() == names:
                return dist.PrefixStore(hashlib.sha256(names.encode()).hexdigest(), store)
        time.sleep(0.02)
    raise dist.DistStoreError(f"not all of {size} ranks answered")


def rank() -> int:
    return dist.get_rank() if control else 0


def world() -> int:
    """The number of ranks."""
    return dist.get_world_size() if control else 1


def my_slices(batch: int, accum: int) -> list[slice]:
    """The slices of the global batch that this rank computes, one after the other: `accum` of equal size."""
    size = batch // (world() * accum)
    first = rank() * accum * size
    return [slice(first + i * size, first + (i + 1) * size) for i in range(accum)]


# ---------------------------------------------------------------------------------------------------------------------
# In step

def announce(what: str) -> None:
    """Record in the store what this rank is about to do, for `missing_ranks`; no rank waits."""
    control.announced, control.last = control.announced + 1, what
    control.store.set(f"rank {rank()}", f"{control.announced} {what}")


def note(what: str) -> None:
    """Remember a forward until the next check; with every_forward that is now."""
    if world() == 1:
        return
    if control.every_forward:
        check_in_sync(what)
    else:
        announce(what)
    control.forwards = zlib.crc32(what.encode(), control.forwards)


def check_in_sync(what: str) -> None:
    """Wait for all ranks. RankError on every rank if one is about to do something else, does not come, or has run other
    forwards since the last check."""
    all_gather(None, what)


def all_gather(x, what: str) -> list:
    """x of every rank, in their order. what: what x is; the ranks are checked as by check_in_sync."""
    if world() == 1:
        return [x]
    before, gathered = control.last, [None] * world()
    try:
        announce(what)
        dist.all_gather_object(gathered, (what, control.forwards, before, x), group=control.group)
    except RuntimeError as e:
        raise explain_timeout(e, control.timeout) from e
    control.forwards = 0
    if len({(what, forwards) for what, forwards, *_ in gathered}) > 1:
        lines = "".join(f"\n  rank {r}: {what} (after: {before})" for r, (what, _, before, _) in enumerate(gathered))
        raise RankError(f"ranks disagree on what comes next:{lines}\nexpected the same on every rank, now and in all "
                        "forwards since the last check: start them with the same code, flags, --data and --out "
                        "(--check-ranks: name the first forward that differs)")
    return [x for *_, x in gathered]


def any_rank(x: bool, what: str) -> bool:
    return any(all_gather(bool(x), what))


def check_same_flags(flags: dict) -> None:
    """RankError if a rank was started with another flag."""
    everyone = all_gather(flags, "the flags")
    for name, here in everyone[0].items():
        for r, theirs in enumerate(everyone):
            if theirs[name] != here:
                flag = "--" + name.replace("_", "-")
                raise RankError(f"ranks disagree: got {flag} {here} on rank 0 and {flag} {theirs[name]} on rank {r}, "
                                "expected the same on every rank: start all with the same flags")


def on_rank_0(work: Callable, what: str = "work of rank 0 alone"):
    """Run work() on rank 0 alone; every rank returns its result or raises its error."""
    check_in_sync(what)
    result, error = None, None
    if rank() == 0:
        try:
            result = work()
        except (OSError, ValueError) as e:
            error = e
    result, error = all_gather((result, error), f"{what}, done")[0]
    if error:
        raise error
    return result


def mean(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean over ranks of every tensor, in one message."""
    if world() == 1:
        return metrics
    mine = {k: v.detach().double().cpu() for k, v in metrics.items()}
    gathered = all_gather(mine, f"the mean of {', '.join(metrics)}")
    return {k: torch.stack([of_rank[k] for of_rank in gathered]).mean(0).to(v.dtype) for k, v in metrics.items()}


def is_lost(e: Exception) -> bool:
    """Whether an error says that another rank has died or does not answer; gloo has no type of its own for that."""
    return isinstance(e, dist.DistError) or "gloo" in str(e)


def explain_timeout(e: Exception, timeout: float) -> RankError:
    """What an error of `is_lost` means for the user."""
    why = f"got no answer within {timeout:g} s" if "timed out" in str(e).lower() else "lost the connection to a rank"
    if control is None:
        return RankError(f"got no meeting of all ranks: this one {why} ({e}), expected all to start: see their logs "
                         "(a longer --timeout waits longer)")
    return RankError(f"rank {rank()} {why}, at: {control.last}. {missing_ranks()}: see its log (a longer --timeout "
                     "waits longer; --check-ranks compares ranks before every forward)")


def missing_ranks() -> str:
    """Which ranks are behind this one, and what they last announced."""
    behind = []
    try:
        for r in range(world()):
            known = control.store.check([f"rank {r}"])
            n, what = control.store.get(f"rank {r}").decode().split(" ", 1) if known else (0, "the start")
            if int(n) < control.announced:
                behind.append(f"rank {r} was last seen at: {what}")
    except RuntimeError:
        return "The rank that keeps the addresses of all is gone, too"
    return ("; ".join(behind) or "all ranks have come this far") + ". One has died, has stalled or runs another forward"
