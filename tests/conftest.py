import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors gain nothing by threads, which wait for each other

import pytest  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / folder) for folder in ("recipe", "wan21", "cluster"))]
GOLDEN = Path(os.environ.get("GOLDEN_DIR", ROOT.parent / "shared" / "golden"))

from model import CausalWan, WanConfig  # noqa: E402


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
    """tiny(**config): a small network whose every weight is random, so that nothing is hidden behind a zero."""
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
