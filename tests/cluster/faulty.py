"""Runs of train.py with a fault in them, for test_faults.py.

    FAULT="kill:at=stage.update_ema:call=4:rank=1" python tests/cluster/faulty.py --stage bidirectional ...

A fault is a KIND of FAULTS and where it happens: before (when=after: after) the calls number call=3, or call=3,4,5, of
the function at=MODULE.NAME, on rank=1 (on each, if not given); arg=TEXT counts only the calls whose first argument ends
so. It happens in the first attempt of a torchrun job alone. Several faults are separated by spaces. MODULE is the one
where the function is defined, as train.py runs as a script and imports it afterwards. SETTINGS is a JSON object of
settings that have no flag.
"""

import json
import os
import pkgutil
import resource
import runpy
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def flip(path):
    """Change one bit in the middle of a file."""
    content = bytearray(Path(path).read_bytes())
    content[len(content) // 2] ^= 4
    Path(path).write_bytes(content)


def elsewhere(*_):
    """Go to another folder, as if --out were on a disk of this rank's own."""
    Path("elsewhere").mkdir(exist_ok=True)
    os.chdir("elsewhere")


def another_forward(net, x0, text, t, *_):
    """One that the other ranks do not run."""
    import torch
    with torch.no_grad():
        net(x0, t, text)


def in_backward(work):
    """work(gradient) in the backward pass of a loss."""
    return lambda result: (result[0].register_hook(work), result)[1]


FAULTS = {  # called with the function's arguments; with when=after, with its result, for which it returns another
    "kill": lambda *_: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda *_: os.kill(os.getpid(), signal.SIGTERM),
    "stall": lambda *_: time.sleep(6),
    "stall_backward": in_backward(lambda _: time.sleep(6)),
    "full": lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY)),
    "flip": lambda folder: flip(folder / "__0_0.distcp"),
    "elsewhere": elsewhere,
    "nan": lambda result: (result[0] * float("nan"), *result[1:]),
    "nan_backward": in_backward(lambda gradient: gradient * float("nan")),
    "other_exit": lambda drawn: 1 if drawn == 0 else 0,
    "forward": another_forward,
}


def plant(kind, at, call="1", rank="", arg="", when="before"):
    """Make a function fail as FAULT says."""
    if rank not in ("", os.environ.get("RANK", "0")) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    owner, name = pkgutil.resolve_name(at.rpartition(".")[0]), at.rpartition(".")[2]
    real, counted = getattr(owner, name), []

    def function(*args, **kwargs):
        meant = str(args[0] if args else "").endswith(arg)
        counted.extend([1] * meant)
        now = meant and str(len(counted)) in call.split(",")
        if now and when == "before":
            FAULTS[kind](*args)
        result = real(*args, **kwargs)
        return FAULTS[kind](result) if now and when == "after" else result

    setattr(owner, name, function)


def train(flags):
    """What `python train.py FLAGS` does."""
    for fault in os.environ.get("FAULT", "").split():
        kind, *how = fault.split(":")
        plant(kind, **dict(x.split("=") for x in how))
    import config
    import forks
    forks.resize()
    settings, config_of = json.loads(os.environ.get("SETTINGS", "{}")), config.config_of
    config.config_of = lambda given: replace(config_of(given), **settings)
    sys.argv = [str(ROOT / "train.py"), *flags]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    train(sys.argv[1:])
