"""How fast a rollout is: frames per second, the wait for the first chunk, peak memory. With random weights, without VAE
and text encoder. A finished chunk is committed to the cache in one forward with the next chunk's first step ("fused")
or in a forward of its own ("apart").

    python -m tools.bench --out results/rollout_toy_cpu.json
    python -m tools.bench --size room
    python -m tools.bench --size wan1.3b --device cuda --out results/rollout_wan1.3b.json
    python -m tools.bench --size wan1.3b --device cuda --compile

Both ways alternate within a round; the first round warms up, and of the others the median and the range are reported.
So is the difference of the two ways' clips, relative to the largest value: look at that first, then at the times.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from cluster.files import read_json, run_command, write_json
from flowmap import Condition
from model import SIZES, CausalWan, check_device
from rollout import grids, stream
from wan21.families import FAMILIES
from worlds.draws import noises

# chunk, steps, latent frames, window (None: the frames of training): of a world that is drawn, of real video
TOY = [(1, steps, 48, None) for steps in (1, 2, 4)]
WAN = [(1, 1, 21, 21), (1, 2, 21, 21), (1, 4, 21, 21), (3, 4, 21, 21), (3, 4, 120, 21)]


def parse(argv=None):
    p = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=tuple(SIZES), default="toy", help="of the network (default: toy)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    p.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    p.add_argument("--rounds", type=int, default=5, help="after the one that warms up (default: 5)")
    p.add_argument("--height", type=int, help="of a latent frame (default: that of the network's family)")
    p.add_argument("--width", type=int, help="of a latent frame (default: that of the network's family)")
    p.add_argument("--out", type=Path, help="a .json for the numbers")
    return p.parse_args(argv)


@torch.no_grad()
def rollout(net, shape, chunk, steps, frames, window, fused) -> tuple[dict, torch.Tensor]:
    """One rollout of one clip: its measurements, and the last chunk."""
    c, device = net.config, next(net.parameters()).device
    text = noises([0], (c.text_len, c.text_dim), 1).to(device)
    if c.row_width:
        text = Condition(text, noises([0], (frames, c.row_width), 2).to(device))
    grid, first_grid = grids(steps, 5.0, 4)
    cache, cuda = net.new_cache(window=window, sink=1, relative=True), device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start, stamps = time.perf_counter(), []
    for generated in stream(net, lambda i, k: noises([0], (chunk, *shape), i, k).to(device), text, grid,
                            num_chunks=frames // chunk, first_grid=first_grid, cache=cache, fused=fused):
        last = generated.x0
        if cuda:
            torch.cuda.synchronize()
        stamps.append(time.perf_counter() - start)
    # without the first chunk: it takes longer, and the first latent frame of Wan covers a single frame
    shown = (frames - chunk) * FAMILIES[c.family].frames_per_latent
    memory = {"memory_gb": torch.cuda.max_memory_allocated() / 1e9} if cuda else {}
    return {"frames_per_second": shown / (stamps[-1] - stamps[0]), "first_chunk_s": stamps[0],
            "last_chunk_s": stamps[-1] - stamps[-2], **memory}, last


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


def main(args) -> list[dict]:
    """Measure every setting; returns a row for each setting and way."""
    config = SIZES[args.size]
    family = FAMILIES[config.family]
    args.height, args.width = args.height or family.sampling["height"], args.width or family.sampling["width"]
    check(args)
    net = CausalWan(config).init_weights(0).eval().requires_grad_(False)
    torch.nn.init.normal_(net.head.head.weight, std=0.02)
    net = net.to(args.device, torch.bfloat16 if args.device.startswith("cuda") else torch.float32)
    if args.compile:
        net.compile_blocks()
    shape, rows = (config.in_dim, args.height, args.width), []
    for chunk, steps, frames, window in TOY if family.world else WAN:
        window = window or family.sampling["frames"]
        measured, last = {"fused": [], "apart": []}, {}
        for _ in range(1 + args.rounds):
            for way, runs in measured.items():
                numbers, last[way] = rollout(net, shape, chunk, steps, frames, window, way == "fused")
                runs.append(numbers)
        difference = ((last["fused"] - last["apart"]).abs().max() / last["apart"].abs().max()).item()
        for way, (_, *runs) in measured.items():  # the first round warms up
            row = {"chunk": chunk, "steps": steps, "frames": frames, "window": window, "commit": way,
                   "difference": difference}
            for name in runs[0]:
                values = [run[name] for run in runs]
                row |= {name: statistics.median(values), f"{name}_range": [min(values), max(values)]}
            rows.append(row)
            memory = f", {row['memory_gb']:.1f} GB" if "memory_gb" in row else ""
            print(f"chunk {chunk}, {steps} steps, {frames} frames, {way}: {row['frames_per_second']:.1f} frames/s, "
                  f"first chunk {row['first_chunk_s']:.3f} s, last {row['last_chunk_s']:.3f} s{memory}, difference "
                  f"{difference:.1e}", flush=True)
    if args.out:
        card = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} threads"
        write_json(args.out, {"size": args.size, "device": args.device, "card": card, "torch": torch.__version__,
                              "compile": args.compile, "rounds": args.rounds, "shape": shape, "rows": rows}, True)
    return rows


if __name__ == "__main__":
    run_command(lambda: main(parse()), "stopped; nothing was written")
