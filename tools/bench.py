"""How fast a rollout is: frames per second, the wait for the first chunk and for the later ones, memory, and the share
of the card's speed that is used. With random weights, without VAE and text encoder.

    python -m tools.bench --out results/rollout_toy_cpu.json
    python -m tools.bench --size room
    python -m tools.bench --size wan1.3b --device cuda --out results/rollout_wan1.3b.json
    python -m tools.bench --size wan1.3b --device cuda --compile --ways plain --rollouts 3x4x21

A clip is generated in several ways from the same noise:

    plain   the network of model.py; a chunk is committed to the cache in one forward with the next chunk's first step
    apart   the same, with a forward of its own for every commit
    fast    the inference path of fast/network.py

All noise is drawn before a clock starts. The ways take turns in every round, so that a slow minute of the machine meets
all of them; the first round warms up. In its turn a way generates the clip twice: at full speed, with one wait at the
end, for frames per second (pixel frames of the whole clip, the first chunk among them); and waiting for every chunk, as
a viewer does, for the seconds of a chunk: the first, and the median (p50) and 95th percentile (p95) of the others.

Look first at what says whether to believe the numbers. `error` is the relative difference of a way's velocity from that
of the plain network in fp32, behind a window that has slid; `rounding` is the plain network's own, not compiled.
`difference` is that of a way's clips from the first way's, `repeat` that between its own clips, both relative to the
largest value. An error beyond BOUND, or twice that of rounding, or a graph that was compiled while a clock ran, fails
the command, after its numbers are written.

The work of a rollout is the FLOPs of its forwards (cluster/flops.py), the same for all ways. Work per second is shown
as a fraction of two speeds: of one matrix product of this network, measured in the same run, and of the data sheet's.
"""

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from cluster.files import check_device, read_json, run_command, write_json
from cluster.flops import PEAK, forward_flops
from fast.network import Fast
from flowmap import Condition
from model import SIZES, Cache, CausalWan
from rollout import Chunk, grids, stream
from tools.card import Attentions, calibrate, clocked, compiled, gigabytes, sync
from wan21.families import FAMILIES
from wan21.trajectory import rows_of, viewmats_of
from worlds.draws import noises

WAYS = ("plain", "apart", "fast")
# chunk, steps, latent frames, window (None: the frames of training): of a world that is drawn, of real video
TOY = [(1, steps, 48, None) for steps in (1, 2, 4)]
WAN = [(1, 1, 21, None), (1, 2, 21, None), (1, 4, 21, None), (3, 4, 21, None), (3, 4, 120, None)]
SHIFT, FIRST_STEPS, SINK = 5.0, 4, 1
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of `error`, ours. Behind one chunk, bf16 rounds the velocity of random weights by .007 (toy) to .08 (30 layers x 768).
BOUND = {"fp32": 1e-4, "bf16": 0.3}


# ---------------------------------------------------------------------------------------------------------------------
# Settings

def parse(argv=None):
    p = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=tuple(SIZES), default="toy", help="of the network (default: toy)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    p.add_argument("--precision", choices=tuple(PRECISIONS), help="(default: bf16 on a GPU, fp32 on a CPU)")
    p.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help=f"(default: {' '.join(WAYS)})")
    p.add_argument("--rollouts", nargs="+", metavar="CxKxF", help="chunks of C latent frames in K steps, F frames in "
                   "all (default: 1x1, 1x2 and 1x4; with a Wan size 3x4, too, and once 120 frames)")
    p.add_argument("--compile", action="store_true", help="torch.compile the blocks, with static shapes")
    p.add_argument("--rounds", type=int, default=5, help="after the one that warms up (default: 5)")
    p.add_argument("--height", type=int, help="of a latent frame (default: that of the network's family)")
    p.add_argument("--width", type=int, help="of a latent frame (default: that of the network's family)")
    p.add_argument("--out", type=Path, help="a .json for the numbers")
    return p.parse_args(argv)


def check(args):
    """ValueError for a flag that could only fail later, after an hour of measuring."""
    if not 1 <= args.rounds <= 1000:
        raise ValueError(f"got --rounds {args.rounds}, expected 1 to 1000")
    check_device(args.device)
    if not all(2 <= n <= 1000 and n % 2 == 0 for n in (args.height, args.width)):
        raise ValueError(f"got --height {args.height} --width {args.width}, expected even numbers from 2 to 1000")
    if args.out:
        ours = args.out.suffix == ".json" and args.out.is_file() and "rows" in read_json(args.out, "our own")
        if args.out.exists() and not ours:
            raise ValueError(f"got --out {args.out}, which is not of this command, expected a new name: change --out")
        try:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=args.out.parent).close()
        except OSError as e:
            raise ValueError(f"got --out {args.out} ({e}), expected a place to write: change --out") from e


def settings_of(args, family) -> list[tuple[int, int, int, int]]:
    """Chunk, steps, latent frames and window of the rollouts to measure. ValueError for what can be no rollout."""
    settings = TOY if family.world else WAN
    if args.rollouts:
        if not all(re.fullmatch(r"\d{1,4}x\d{1,4}x\d{1,4}", text) for text in args.rollouts):
            raise ValueError(f"got --rollouts {' '.join(args.rollouts)}, expected chunk x steps x frames, as in 3x4x21")
        settings = [(*map(int, text.split("x")), None) for text in args.rollouts]
    settings = [(*rollout, window or family.sampling["frames"]) for *rollout, window in settings]
    for chunk, steps, frames, window in settings:
        if not (0 < chunk <= window - SINK and 0 < steps <= 1000 and frames >= 2 * chunk and frames % chunk == 0):
            raise ValueError(f"got --rollouts {chunk}x{steps}x{frames}, expected chunks of 1 to {window - SINK} "
                             "frames, 1 to 1000 steps, and frames that make two chunks or more")
    return settings


# ---------------------------------------------------------------------------------------------------------------------
# Measuring

def inputs(c, shape, chunk, num_chunks, grid, first_grid, device) -> dict:
    """What `stream` is given for one clip, all of it drawn, and on the device."""
    noise = {(i, k): noises([0], (chunk, *shape), i, k).to(device)
             for i in range(num_chunks) for k in range(len(grid if i else first_grid))}
    text = noises([0], (c.text_len, c.text_dim), 1).to(device)
    if c.row_width:
        frames, rows = chunk * num_chunks, noises([0], (chunk * num_chunks, c.row_width), 2)
        if c.camera:
            rows[0, :, c.row_dim :] = rows_of(viewmats_of(f"w*{frames},l*{frames}"))[::2][:frames]
        text = Condition(text, rows.to(device))
    return dict(noise=lambda i, k: noise[i, k], text=text, grid=grid, first_grid=first_grid, num_chunks=num_chunks)


@torch.no_grad()
def chunks(net, given, window, way) -> Iterator[Chunk]:
    cache = net.new_cache(window=window, sink=SINK, relative=True)
    yield from stream(net, cache=cache, fused=way != "apart", **given)


def turn(net, given, window, way, device) -> dict:
    """A clip generated twice: seconds of the whole, seconds of every chunk, memory, and the clip x0 `b f c h w`."""
    made, cuda = [], device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)  # the weights of all ways, and the noise
    measured = {"seconds": clocked(lambda: made.extend(chunks(net, given, window, way)), device)}
    measured["cache_gb"] = gigabytes(made[-1].cache)
    if cuda:
        measured["peak_gb"] = gigabytes(net) + (torch.cuda.max_memory_allocated(device) - before) / 1e9
    measured["clip"] = torch.cat([chunk.x0 for chunk in made], dim=1).cpu()
    made.clear()
    sync(device)
    stamps = [time.perf_counter()]
    for _ in chunks(net, given, window, way):
        sync(device)
        stamps.append(time.perf_counter())
    return measured | {"chunk_s": [b - a for a, b in zip(stamps, stamps[1:])]}


def rounds_of(ways, given, window, rounds, device) -> tuple[dict[str, list[dict]], int]:
    """The turns of every way, first the one that warms up; and how many graphs were compiled during the others."""
    turns = {way: [] for way in ways}
    for i in range(1 + rounds):
        if i == 1:
            graphs = compiled()[0]
        for way, net in ways.items():
            turns[way].append(turn(net, given, window, way, device))
    return turns, compiled()[0] - graphs


def flops_of(c, given, window) -> float:
    """FLOPs of a rollout with fused commits, by a network that only counts them."""
    flops = 0.0

    def counting(x, t, text, *, cache, clean=None):
        nonlocal flops
        flops += forward_flops(c, x.shape, cache=cache, clean=clean)
        if clean is not None:
            cache.write([clean[..., 0, 0]], [clean[..., 0, 0]], clean.shape[1])
        return x

    with torch.no_grad():
        for _ in stream(counting, cache=Cache(1, window, SINK), **given):
            pass
    return flops


def relative(got: Tensor, wanted: Tensor, norm=float("inf")) -> float:
    """||got - wanted|| / ||wanted||, by default of the largest values."""
    return (torch.linalg.vector_norm((got - wanted).float(), norm) / torch.linalg.vector_norm(wanted, norm)).item()


def networks(args, c, shape, setting, device) -> tuple[dict, dict]:
    """The network of each way; and of each its gigabytes, attention kernels, and `error` in chunks as the setting's."""
    chunk, *_ = setting
    given, window = inputs(c, shape, chunk, 4, *grids(1, SHIFT, 1), device), SINK + 2 * chunk

    def velocity(net, way):
        return list(chunks(net, given, window, way))[-1].v

    net = CausalWan(c).init_weights(0).eval().requires_grad_(False)
    g = torch.Generator().manual_seed(1)
    for name, p in net.named_parameters():
        if name == "head.head.weight" or name.endswith("prope_o.weight"):  # which start at zero
            torch.nn.init.normal_(p, std=0.02, generator=g)
    wanted = velocity(net.to(device), "plain")
    net = net.to(PRECISIONS[args.precision])
    rounding = relative(velocity(net, "plain"), wanted, 2)
    ways, about = {way: Fast(net) if way == "fast" else net for way in args.ways}, {}  # Fast: after net.to
    for way, network in ways.items():
        with Attentions() as called:
            velocity(network, way)
        about[way] = {"weights_gb": gigabytes(network), "attention": sorted(called.names or {"math"}),
                      "rounding": rounding}
    if args.compile:
        torch._dynamo.config.automatic_dynamic_shapes = False  # one graph for each shape
        if "fast" in ways:
            ways["fast"] = Fast(net, compiled=True)
        net.compile_blocks()
    for way, network in ways.items():
        about[way]["error"] = relative(velocity(network, way), wanted, 2)
    return ways, about


# ---------------------------------------------------------------------------------------------------------------------
# Report

COLUMNS = {  # of the table: a row's key, and how it is written
    "frames/s": ("frames_per_second", "{:.1f}"), "range": ("frames_per_second_range", "{0[0]:.1f}-{0[1]:.1f}"),
    "first, s": ("first_chunk_s", "{:.4f}"), "p50, s": ("chunk_s_p50", "{:.4f}"), "p95, s": ("chunk_s_p95", "{:.4f}"),
    "of GEMM": ("mfu_of_gemm", "{:.1%}"), "of peak": ("mfu_of_peak", "{:.1%}"), "cache, GB": ("cache_gb", "{:.2g}"),
    "peak, GB": ("peak_gb", "{:.3g}"), "difference": ("difference", "{:.0e}"), "repeat": ("repeat", "{:.0e}")}


def show(row: dict):
    """Print a row of the table; {} is its head."""
    cells = [form.format(row[key]) if key in row else "-" for key, form in COLUMNS.values()] if row else COLUMNS
    print(f"{row.get('rollout', 'rollout'):10}{row.get('way', 'way'):6}", *map("{:>10}".format, cells), flush=True)


def spread(name: str, values: list[float]) -> dict:
    return {name: statistics.median(values), f"{name}_range": [min(values), max(values)]}


def numbers_of(turns: list[dict], first_way: list[dict], frames: int, flops: float, speeds: dict) -> dict:
    """Of one way, whose clips have so many pixel frames: medians and ranges over its turns but the first."""
    warm_up, *timed = turns
    later = torch.tensor([seconds for t in timed for seconds in t["chunk_s"][1:]])
    tflops = flops / statistics.median(t["seconds"] for t in timed) / 1e12
    return {**spread("frames_per_second", [frames / t["seconds"] for t in timed]),
            **spread("first_chunk_s", [t["chunk_s"][0] for t in timed]),
            "chunk_s_p50": later.quantile(0.5).item(), "chunk_s_p95": later.quantile(0.95).item(), "tflops": tflops,
            **{f"mfu_of_{name}": tflops / speed for name, speed in speeds.items()},
            **{name: max(t[name] for t in timed) for name in ("cache_gb", "peak_gb") if name in warm_up},
            "difference": max(relative(t["clip"], first_way[0]["clip"]) for t in turns),
            "repeat": max(relative(t["clip"], warm_up["clip"]) for t in timed)}


def main(args) -> list[dict]:
    """Measure every rollout in every way; returns a row for each. ValueError for flags that cannot be and, when all is
    written, for numbers that are not to be believed."""
    c, device, began = SIZES[args.size], torch.device(args.device), time.perf_counter()
    family, cuda = FAMILIES[c.family], device.type == "cuda"
    args.height, args.width = args.height or family.sampling["height"], args.width or family.sampling["width"]
    args.precision = args.precision or ("bf16" if cuda else "fp32")
    check(args)
    settings, shape, rows = settings_of(args, family), (c.in_dim, args.height, args.width), []
    if cuda:
        torch.cuda.set_device(device.index or 0)
    card = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads"
    ways, about = networks(args, c, shape, settings[0], device)
    tokens = (args.height // c.patch_size[1]) * (args.width // c.patch_size[2])
    speed = calibrate(c, tokens * max(chunk for chunk, *_ in settings),
                      tokens * max(min(frames, window) for _, _, frames, window in settings),
                      PRECISIONS[args.precision], device)
    peak = next((rate / 1e12 for name, rate in PEAK.items() if name in card and args.precision == "bf16"), None)
    speeds = {"gemm": speed["gemm_tflops"]} | ({"peak": peak} if peak else {})
    print(f"{args.size}, {args.precision}, {card}, torch {torch.__version__}. Without VAE and text encoder.")
    print("; ".join(f"{name}: {value}" for name, value in speed.items() if value))
    for way, told in about.items():
        print(f"{way}: " + ", ".join(f"{name} {value}" for name, value in told.items()))
    show({})
    for chunk, steps, frames, window in settings:
        given = inputs(c, shape, chunk, frames // chunk, *grids(steps, SHIFT, FIRST_STEPS), device)
        flops, (turns, graphs) = flops_of(c, given, window), rounds_of(ways, given, window, args.rounds, device)
        for way in ways:
            rows.append({"rollout": f"{chunk}x{steps}x{frames}", "chunk": chunk, "steps": steps, "frames": frames,
                         "window": window, "way": way, "commit": "apart" if way == "apart" else "fused",
                         **numbers_of(turns[way], turns[args.ways[0]], 1 + (frames - 1) * family.frames_per_latent,
                                      flops, speeds), "graphs_compiled_while_timed": graphs})
            show(rows[-1])
    if args.compile:
        print("torch.compile: {} graphs in {:.1f} s".format(*compiled()))
    if args.out:
        write_json(args.out, {
            "command": sys.argv, "size": args.size, "shape": shape, "device": args.device, "card": card,
            "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
            "precision": args.precision, "compile": args.compile, "graphs_and_compile_s": compiled(),
            "rounds": args.rounds, "without": "VAE, text encoder", "ways": about,
            "calibration": speed | {"peak_tflops": peak}, "seconds": time.perf_counter() - began, "rows": rows}, True)
    bound = min(BOUND[args.precision], max(2 * about[args.ways[0]]["rounding"], BOUND["fp32"]))
    wrong = [f"an error of {told['error']:.1e} in {way}" for way, told in about.items() if not told["error"] <= bound]
    wrong += [f"{row['graphs_compiled_while_timed']} graphs compiled while clocks ran ({row['rollout']})"
              for row in rows if row["graphs_compiled_while_timed"]]
    if wrong:
        raise ValueError(f"got {'; '.join(wrong)}, expected errors up to {bound:.1e} and no such graph: do not "
                         "believe the numbers above, or change --ways, --precision or --compile")
    return rows


if __name__ == "__main__":
    run_command(lambda: main(parse()), "stopped; nothing was written")
