import dataclasses
import functools
import json
import os
import socket
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors gain nothing by threads, which wait for each other

import pytest  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / folder) for folder in ("", "recipe", "wan21", "cluster"))]
GOLDEN = Path(os.environ.get("GOLDEN_DIR", ROOT.parent / "shared" / "golden"))

import evaluate  # noqa: E402
import forks  # noqa: E402
import wan21.weights  # noqa: E402
from model import SIZES, CausalWan, WanConfig  # noqa: E402

AS_SHIPPED = dict(SIZES)
wan21.weights.shapes = functools.cache(wan21.weights.shapes)  # 30 blocks take a while, on the meta device as well


@pytest.fixture(scope="module")
def small():
    """For tests of all but size: narrow networks of two blocks, and teachers that are measured in three steps."""
    with pytest.MonkeyPatch.context() as patch:
        for size, dim in (("toy", 16), ("room", 32)):  # a head that knows cameras has at least 16 channels
            patch.setitem(SIZES, size, dataclasses.replace(SIZES[size], dim=dim, ffn_dim=dim, num_heads=2, num_layers=2,
                                                           freq_dim=16))
        patch.setattr(evaluate, "TEACHER_STEPS", 3)
        yield


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """start(*words, cwd=ROOT, **env) -> forks.Program: what `python WORDS` does, started at once, with networks of the
    sizes that they have here."""
    server, logs = forks.open_server(), tmp_path_factory.mktemp("logs")
    count = iter(range(10**6))

    def start(*words, cwd=ROOT, **env):
        sizes = {size: {k: v for k, v in dataclasses.asdict(SIZES[size]).items() if v != getattr(shipped, k)}
                 for size, shipped in AS_SHIPPED.items() if SIZES[size] != shipped}
        return forks.start(server, words, logs / str(next(count)), cwd, env | {"SIZES": json.dumps(sizes)})

    yield start
    server.stdin.close()
    assert server.wait(timeout=60) == 0


@pytest.fixture(scope="session")
def python(start):
    """python(*words, cwd=ROOT, **env) -> subprocess.CompletedProcess, the same at its end."""
    return lambda *words, **how: start(*words, **how).ended()


def wait_for(condition):
    """Until it holds, at most a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "nothing has come for a minute"
        time.sleep(0.05)


def launch(ranks) -> list[dict]:
    """What a launcher such as torchrun puts into the environment of each rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [{"RANK": r, "LOCAL_RANK": r, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": port} for r in range(ranks)]


@pytest.fixture
def golden():
    """golden(case): the tensors of a case of the official implementations' numbers; skips where they are not at
    hand."""
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden data at {GOLDEN} (set GOLDEN_DIR)")
    return lambda case: load_file(next(GOLDEN.glob(f"{case}*.safetensors")))


@pytest.fixture
def golden_net(golden):
    """golden_net("W0", **config): the tiny network of the golden cases."""
    def make(weights, **changes):
        net = CausalWan(WanConfig(dim=96, ffn_dim=192, num_heads=4, num_layers=3, freq_dim=64, text_dim=48, text_len=32,
                                  **changes))
        net.load_state_dict(golden(f"A_weights_{weights}"))
        return net
    return make


@pytest.fixture
def tiny():
    """tiny(**config): a small network whose every weight is random, so that nothing is hidden behind a zero; but with
    cameras prope_o is zero, as at the start of a training."""
    def make(**changes):
        config = WanConfig(**{**dict(dim=24, ffn_dim=48, num_heads=2, num_layers=2, in_dim=3, patch_size=(1, 2, 2),
                                     freq_dim=16, text_dim=5, text_len=3), **changes})
        net = CausalWan(config).init_weights(0)
        torch.nn.init.normal_(net.head.head.weight, std=0.3)
        return net
    return make


def close(got, want, tolerance=2e-5):
    """max|got - want| <= tolerance max|want|."""
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


def close_norm(got, want, tolerance=1e-4):
    """||got - want|| <= tolerance ||want||, for gradients."""
    error = ((got - want).norm() / want.norm()).item()
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"
