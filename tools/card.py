"""What a card can do: clocks that wait for it, and its speed at the three things that a rollout is made of, a matrix
product, attention, and moving memory, in the shapes of a network. tools/bench.py compares rollouts with these numbers.
"""

import shutil
import statistics
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from fast.attention import BACKENDS, using


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clocked(run: Callable, device) -> float:
    """Seconds of run(), by the GPU's own clock where there is one. It waits for the device before and at the end."""
    sync(device)
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    sync(device)
    return start.elapsed_time(end) / 1000


def per_second(run: Callable, work: float, device) -> float:
    """Work per second, where run() does `work`: the median of five series of calls, behind a warm-up."""
    run()
    calls = max(1, int(0.02 / clocked(run, device)))
    return work * calls / statistics.median(clocked(lambda: [run() for _ in range(calls)], device) for _ in range(5))


def calibrate(c, tokens: int, seen: int, dtype, device) -> dict:
    """Speeds in the shapes of a network with config c.

    tokens: queries, those of a chunk. seen: keys, those of its past and its own. Returns TFLOP/s of a product
    `tokens dim` x `dim ffn_dim` and of attention in each of PyTorch's kernels that runs here, and GB/s of a copy within
    memory, what is read and what is written both counted.
    """
    def filled(*shape):
        return torch.randn(shape, dtype=dtype, device=device)

    x, weight, heads, kernels = filled(tokens, c.dim), filled(c.ffn_dim, c.dim), (c.num_heads, c.dim // c.num_heads), {}
    q, k, v = (filled(1, n, *heads).transpose(1, 2) for n in (tokens, seen, seen))
    for name, kernel in BACKENDS.items():
        if (name == "flash3" and (device.type != "cuda" or not find_spec("flash_attn_interface"))
                or name == "math" and 4 * c.num_heads * tokens * seen > 2e9):  # it writes all scores to memory
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a kernel that does not run here, all the reasons
            try:
                with using(name), sdpa_kernel(kernel):  # it alone
                    kernels[name] = per_second(lambda: F.scaled_dot_product_attention(q, k, v),
                                               4 * tokens * seen * c.dim, device) / 1e12
            except RuntimeError:
                pass
    source = torch.zeros(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {"gemm": [tokens, c.dim, c.ffn_dim], "attention": [tokens, seen, *heads], "attention_tflops": kernels,
            "gemm_tflops": per_second(lambda: F.linear(x, weight), 2 * tokens * c.dim * c.ffn_dim, device) / 1e12,
            "copy_gb_per_s": per_second(lambda: target.copy_(source), 2 * source.nbytes, device) / 1e9,
            "nvidia_smi": nvidia_smi(lambda: clocked(lambda: F.linear(x, weight), device), device)}


def nvidia_smi(work: Callable, device) -> dict:
    """Driver, clocks (MHz), power (W) and temperature (C) while work() is repeated: clocks at rest say little. Empty
    without a GPU or the program."""
    if device.type != "cuda" or not shutil.which("nvidia-smi"):
        return {}
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    card = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    with subprocess.Popen(["nvidia-smi", card, f"--query-gpu={fields}", "--format=csv,noheader,nounits"], text=True,
                          stdout=subprocess.PIPE) as asked:
        while asked.poll() is None:
            work()
        told = asked.stdout.read().strip().split(", ")
    return dict(zip(fields.split(","), told)) if asked.returncode == 0 else {}


class Attentions(TorchDispatchMode):
    """Within this context, the names of PyTorch's fused attention kernels that are called; none where it is computed by
    matrix products ("math", and short sequences on a CPU)."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.scaled_dot_product_attention.default:  # in inference mode: not yet which kernel
            with self:
                return op.decompose(*args, **(kwargs or {}))
        if "scaled_dot_product" in op.name() and not op.name().endswith("_math"):
            self.names.add(op.name().removeprefix("aten::_scaled_dot_product_"))
        return op(*args, **(kwargs or {}))


def compiled() -> tuple[int, float]:
    """How many graphs torch.compile has made in this process, and the seconds that it took."""
    utils = sys.modules.get("torch._dynamo.utils")
    if utils is None:
        return 0, 0.0
    return utils.counters["stats"]["unique_graphs"], utils.calculate_time_spent().get("entire_frame_compile", 0.0)


def gigabytes(*objects) -> float:
    """Memory of all tensors that objects hold, in attributes, lists and dicts, however deep; each storage once."""
    storages, seen, todo = {}, set(), list(objects)
    while todo:
        x = todo.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, Tensor):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, dict):
            todo += x.values()
        elif isinstance(x, (list, tuple)):
            todo += x
        elif hasattr(x, "__dict__") and not isinstance(x, (type, types.FunctionType, types.ModuleType)):
            todo += vars(x).values()
    return sum(storages.values()) / 1e9
