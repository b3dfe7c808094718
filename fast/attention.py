"""Which of PyTorch's attention kernels is the fastest here: measured once for each shape, not guessed.

    with using(fastest(device, dtype, b, nh, dh, queries, keys)): ...

BACKENDS are their names. A GPU offers several, and which one wins depends on the card, the shape and the version.
flash is FlashAttention-2, flash3 is FlashAttention-3, where its package `flash_attn_interface` is installed. A CPU has
one, which PyTorch calls flash, too; model.attention does without it for short sequences. They differ by rounding: name
one (--attention) for clips that are the same to the last bit.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, restore_flash_attention_impl, sdpa_kernel

from model import attention

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
            "flash3": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
ROUNDS = 5  # of measuring, after two that warm up


@contextmanager
def using(name: str) -> Iterator[None]:
    """Attention runs on this backend; on another one where it cannot, for some shape. math can do all."""
    others = [] if name == "math" else [BACKENDS[other] for other in ("cudnn", "flash", "efficient", "math")]
    if name == "flash3":
        activate_flash_attention_impl("FA3")
    try:
        with sdpa_kernel(list(dict.fromkeys([BACKENDS[name], *others])), set_priority=True):
            yield
    finally:
        if name == "flash3":
            restore_flash_attention_impl()


def seconds(name: str, q, k, v) -> float:
    """The shortest of ROUNDS calls; infinite where the backend cannot compute this."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    try:
        with using(name), sdpa_kernel(BACKENDS[name]), torch.cuda.device(q.device), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # why another kernel cannot do this
            for _ in range(2 + ROUNDS):
                start.record()
                attention(q, k, v)
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / 1000)
    except RuntimeError:
        return float("inf")
    return min(times[2:])


@cache
def measured(device, dtype, b: int, nh: int, dh: int, queries: int, keys: int) -> dict[str, float]:
    """Seconds of each backend that the card offers for q `b queries nh dh` and k, v `b keys nh dh`."""
    names = ["cudnn", "flash", "efficient"] + ["flash3"] * (find_spec("flash_attn_interface") is not None)
    q, k, v = (torch.randn(b, n, nh, dh, device=device, dtype=dtype) for n in (queries, keys, keys))
    times = {name: seconds(name, q, k, v) for name in names}
    return {name: time for name, time in times.items() if time < float("inf")} or {"math": float("inf")}


def fastest(device, dtype, b: int, nh: int, dh: int, queries: int, keys: int) -> str:
    """The name of the backend for this shape. keys is rounded up to a power of two, so that few shapes are measured."""
    if device.type != "cuda":
        return "flash"
    times = measured(device, dtype, b, nh, dh, queries, 1 << (keys - 1).bit_length())
    return min(times, key=times.get)
