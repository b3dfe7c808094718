"""tools/bench.py and tools/card.py: what is measured is what is said to be."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import close
from test_train import config, logged
from torch.nn.attention import SDPBackend, sdpa_kernel

import train
from cluster import flops
from flowmap import Condition
from model import SIZES, CausalWan
from rollout import grids
from tools import bench, card

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def run(tmp_path, words="", rollouts="2x2x6", **changes):
    """Rows and file of the command; changes are of its arguments."""
    out = tmp_path / "speed.json"
    args = bench.parse([*f"--rounds 2 --device cpu --rollouts {rollouts} {words}".split(), "--out", str(out)])
    vars(args).update(changes)
    return bench.main(args), json.loads(out.read_text())


@pytest.fixture(scope="module")
def toy():
    """A network, and what a rollout of three chunks of two frames is given."""
    net = CausalWan(SIZES["toy"]).init_weights(0).requires_grad_(False)
    return net, bench.inputs(net.config, (3, 10, 10), 2, 3, *grids(2, 5.0, 4), CPU)


def test_ways_take_turns_at_the_same_clip(tmp_path):
    """Bug: ways that are not of the same clip, a warm-up that counts, a range that does not hold its median."""
    turns, real = [], bench.turn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "turn", lambda *of: turns.append((of[3], real(*of))) or turns[-1][1])
        rows, told = run(tmp_path)
    assert [way for way, _ in turns] == ["plain", "apart", "fast"] * 3
    assert told["rows"] == rows and [row["commit"] for row in rows] == ["fused", "apart", "fused"]
    for row, mine in zip(rows, (turns[i::3] for i in range(3))):
        rates = [6 / t["seconds"] for _, t in mine[1:]]
        assert row["frames_per_second_range"] == [min(rates), max(rates)]
        for name in ("frames_per_second", "first_chunk_s"):
            low, high = row[f"{name}_range"]
            assert 0 < low <= row[name] <= high
        assert row["difference"] < 1e-5 and row["repeat"] < 1e-5
        assert row["mfu_of_gemm"] == pytest.approx(row["tflops"] / told["calibration"]["gemm_tflops"])
    assert told["ways"]["fast"]["attention"] == ["flash_attention_for_cpu"]


def test_real_video_has_four_frames_per_latent(tmp_path):
    """Bug: latent frames that are sold as frames."""
    turns, real = [], bench.turn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "turn", lambda *of: turns.append(real(*of)) or turns[-1])
        (row,), told = run(tmp_path, "--size wan_tiny --height 2 --width 2 --ways plain --rounds 1 --precision bf16",
                           "1x1x3")
    assert row["frames_per_second"] == (1 + 4 * 2) / turns[1]["seconds"]
    assert 1e-4 < told["ways"]["plain"]["error"] < 0.05 and told["without"].startswith("VAE")


def test_clocks_wait_once_for_a_clip_and_once_for_every_chunk(toy, monkeypatch):
    """Bug: noise that is drawn while a clock runs, a wait inside the throughput, chunks that are not waited for."""
    net, given = toy
    seen, stream = [], bench.stream

    def watched(*args, **kwargs):
        for chunk in stream(*args, **kwargs):
            seen.append("chunk")
            yield chunk

    monkeypatch.setattr(bench, "stream", watched)
    monkeypatch.setattr(bench, "noises", None)
    for module in (bench, card):
        monkeypatch.setattr(module, "sync", lambda device: seen.append("sync"))
    monkeypatch.setattr(card.time, "perf_counter", lambda: seen.append("clock") or time.monotonic())
    measured = bench.turn(net, given, 8, "plain", CPU)
    assert seen == ["sync", "clock", *["chunk"] * 3, "clock", "sync", "clock", *["chunk", "sync", "clock"] * 3]
    assert len(measured["chunk_s"]) == 3 and measured["clip"].shape == (1, 6, 3, 10, 10)


@pytest.mark.parametrize("size, shape", [("toy", (3, 10, 10)), ("room", (3, 16, 24))])
@pytest.mark.parametrize("window", [3, 8])
def test_flops_are_those_that_the_network_counts(size, shape, window):
    """Bug: a utilisation of other work than what is done, such as without the window or the commits."""
    net = CausalWan(SIZES[size]).init_weights(0).requires_grad_(False)
    given = bench.inputs(net.config, shape, 1, 6, *grids(2, 5.0, 4), CPU)
    flops.count(net)
    before = flops.done
    list(bench.chunks(net, given, window, "plain"))
    assert bench.flops_of(net.config, given, window) == flops.done - before > 0


class Twisted(torch.nn.Module):
    """A fast path that is wrong by a little."""

    def __init__(self, net, by):
        super().__init__()
        self.net, self.by, self.new_cache, self.append = net, by, net.new_cache, net.append

    def forward(self, *args, **kwargs):
        return self.by * self.net(*args, **kwargs)


@pytest.mark.parametrize("precision, by", [("fp32", 1.001), ("bf16", 1.05), ("bf16", float("nan"))])
def test_a_wrong_way_fails_after_its_numbers_are_written(tmp_path, monkeypatch, precision, by):
    """Bug: a fast path that is fast because it computes something else, and a table that does not say so."""
    monkeypatch.setattr(bench, "Fast", lambda net: Twisted(net, by))
    changes = dict(ways=["plain", "fast"], precision=precision, rounds=1)  # the true fast path passes, see above
    with pytest.raises(ValueError, match="got an error of .* in fast, expected errors up to .*--ways"):
        run(tmp_path, "", "1x1x2", **changes)
    assert [row["way"] for row in json.loads((tmp_path / "speed.json").read_text())["rows"]] == ["plain", "fast"]


def test_an_error_in_the_cameras_is_seen(monkeypatch):
    """Bug: heads of cameras that start at zero, so that a fast path that forgets cameras looks right."""
    class Forgetful(Twisted):
        def forward(self, x, t, text, **kwargs):
            rows, first = text.rows.clone(), SIZES["room"].row_dim  # of the cameras in a row
            rows[..., first:] = rows[:, :1, first:]
            return self.net(x, t, Condition(text.words, rows), **kwargs)

    args, setting = bench.parse("--size room --ways plain fast --precision fp32".split()), (1, 1, 2, 8)
    errors = []
    for fast in (bench.Fast, lambda net: Forgetful(net, 1)):
        monkeypatch.setattr(bench, "Fast", fast)
        errors.append(bench.networks(args, SIZES["room"], (3, 16, 24), setting, CPU)[1]["fast"]["error"])
    assert errors[0] < bench.BOUND["fp32"] < errors[1]


def test_graphs_that_are_compiled_while_clocks_run(tmp_path, monkeypatch):
    """Bug: seconds of the compiler in frames per second; shapes that were meant to be static and are not."""
    def quickly(net):
        for block in net.blocks:
            block.before = torch.compile(block.before, backend="eager")

    monkeypatch.setattr(CausalWan, "compile_blocks", quickly)
    with torch._dynamo.config.patch(automatic_dynamic_shapes=True):  # and as it was afterwards
        (row,), told = run(tmp_path, "--compile --ways plain", "1x1x4")
        assert row["graphs_compiled_while_timed"] == 0 and not torch._dynamo.config.automatic_dynamic_shapes
        graphs, seconds = told["graphs_and_compile_s"]
        assert graphs >= 2 and seconds > 0
        real = bench.turn

        def forgetful(*args):
            torch._dynamo.reset()
            return real(*args)

        monkeypatch.setattr(bench, "turn", forgetful)
        with pytest.raises(ValueError, match=r"[1-9]\d* graphs compiled while clocks ran \(1x1x4\)"):
            run(tmp_path, "--compile --ways plain", "1x1x4")


@pytest.mark.parametrize("rollout", ["3x4", "0x1x8", "1x0x8", "4x1x6", "8x1x16", "1x1x1", "-1x1x4", "1x1x99999"])
def test_rollouts_that_cannot_be(tmp_path, rollout):
    with pytest.raises(ValueError, match="got --rollouts .*, expected"):
        run(tmp_path, "", f"1x1x4 {rollout}".replace(" -", " +"))
    assert not list(tmp_path.iterdir())


def test_rounds_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="got --rounds 0, expected"):
        run(tmp_path, rounds=0)


# -- the card ---------------------------------------------------------------------------------------------------------

def test_speed_is_work_per_second():
    """Bug: a rate of all calls together, or of none."""
    assert 100 < card.per_second(lambda: time.sleep(0.004), 1, CPU) <= 250


def test_calibration_is_of_the_shapes_it_names():
    """Bug: TFLOP/s of other work than was done; a kernel's name that the call does not have."""
    told = card.calibrate(SIZES["toy"], 8, 32, torch.float32, CPU)
    assert told["gemm"] == [8, 128, 512] and told["attention"] == [8, 32, 8, 16] and told["nvidia_smi"] == {}
    assert {"flash", "math"} == told["attention_tflops"].keys() and min(told["attention_tflops"].values()) > 0
    assert 0 < told["gemm_tflops"] < 10 and 0.1 < told["copy_gb_per_s"] < 2000
    q = torch.randn(1, 8, 2, 16)
    for kernel, names in ((SDPBackend.MATH, set()), (SDPBackend.FLASH_ATTENTION, {"flash_attention_for_cpu"})):
        with torch.no_grad(), sdpa_kernel([kernel]), card.Attentions() as called:
            F.scaled_dot_product_attention(q, q, q)
        assert called.names == names
        with torch.inference_mode(), sdpa_kernel([kernel]), card.Attentions() as called:
            F.scaled_dot_product_attention(q, q, q)
        assert called.names == names


def test_memory_counts_every_storage_once(toy):
    """Bug: views that count as copies, a list inside a dict that is not looked into."""
    net, given = toy
    x = torch.zeros(1000)
    assert card.gigabytes({"a": [x, x[10:]], "b": SimpleNamespace(of=(x.view(10, 100),))}, x) == 4000 / 1e9
    assert card.gigabytes(net) == sum(4 * p.numel() for p in net.parameters()) / 1e9
    cache = list(bench.chunks(net, given, 8, "plain"))[-1].cache
    frames, tokens = len(cache.frames), 4
    assert card.gigabytes(cache) == frames * tokens * 128 * 2 * 4 * net.config.num_layers / 1e9


def test_nvidia_smi_is_asked_while_the_card_works(tmp_path, monkeypatch):
    """Bug: clocks of a card at rest; an error message that is taken for a driver's version."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))
    worked, program = [], tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\nsleep 0.2; echo "$1, 1980, 1980, 3201, 690.12, 700.00, 61"\n')
    program.chmod(0o755)
    told = card.nvidia_smi(lambda: worked.append(time.sleep(0.01)), torch.device("cuda"))
    assert told["driver_version"] == "--id=GPU-12-34" and told["clocks.sm"] == "1980" and len(worked) > 3
    program.write_text("#!/bin/sh\necho No devices were found; exit 6\n")
    assert card.nvidia_smi(lambda: None, torch.device("cuda")) == {}


# -- on a GPU ---------------------------------------------------------------------------------------------------------

@needs_gpu
def test_a_rollout_on_cuda_is_that_of_the_cpu():
    """Bug: other numbers on a GPU than those that all other tests are about. In fp32 but for the patch embedding, which
    cuDNN computes in TF32."""
    clips = []
    for device in (CPU, torch.device("cuda"), torch.device("cuda")):
        net = CausalWan(SIZES["toy"]).init_weights(0).requires_grad_(False)
        torch.nn.init.normal_(net.head.head.weight, std=0.02, generator=torch.Generator().manual_seed(1))
        given = bench.inputs(net.config, (3, 10, 10), 2, 3, *grids(2, 5.0, 4), device)
        clips.append(torch.cat([chunk.x0.cpu() for chunk in bench.chunks(net.to(device), given, 8, "plain")], dim=1))
    close(clips[1], clips[0], 5e-3)
    assert torch.equal(clips[1], clips[2])


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bench_on_cuda(tmp_path, precision):
    """Bug: a way that errs beyond rounding; a peak that is less than what is held."""
    rows, told = run(tmp_path, f"--size wan_tiny --height 8 --width 12 --precision {precision}", "1x2x6 3x4x9",
                     device="cuda")
    assert told["calibration"]["attention_tflops"] and told["ways"]["plain"]["attention"]
    for row in rows:
        assert row["peak_gb"] > row["cache_gb"] > 0


@needs_gpu
def test_an_update_of_every_stage_on_cuda_is_that_of_the_cpu(tmp_path):
    """Bug: a loss that depends on the device."""
    one = dict(bidirectional_steps=1, teacher_forcing_steps=1, trajectory_steps=1, dmd_steps=1)
    for device in ("cpu", "cuda"):
        train.main(config(tmp_path / device, device=device, **one))
    lines, wanted = logged(tmp_path / "cuda"), logged(tmp_path / "cpu")
    assert len(lines) == len(wanted) >= 4
    for got, want in zip(lines, wanted):
        assert got == pytest.approx(want, rel=0.02, abs=1e-3)
