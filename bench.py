"""How fast a rollout is: pictures per second, the wait for the first chunk, peak memory. Random weights, no VAE, no
text encoder; a chunk's commit in one forward with the next chunk's first step (fused) and in one of its own (apart).

    python bench.py --out results/rollout_toy_cpu.json
    python bench.py --size wan1.3b --device cuda --out results/rollout_wan1.3b.json
    python bench.py --size wan1.3b --device cuda --compile

Both ways alternate within a round; the first round warms up, the medians of the others and their extremes are reported.
So is how far the two ways' clips lie apart, relative to the largest value: first see that, then the times.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

import data
from files import read_json, run_command, write_text
from model import SIZES, CausalWan, check_device
from rollout import grids, stream

# chunk, steps, latent frames, window
TOY = [(1, steps, 48, 8) for steps in (1, 2, 4)]
WAN = [(1, 1, 21, 21), (1, 2, 21, 21), (1, 4, 21, 21), (3, 4, 21, 21), (3, 4, 120, 21)]


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.add_argument("--size", choices=tuple(SIZES), default="toy", help="of the network (default: toy)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    p.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    p.add_argument("--rounds", type=int, default=5, help="after the one that warms up (default: 5)")
    p.add_argument("--height", type=int, default=60, help="of Wan's latents (default: 60)")
    p.add_argument("--width", type=int, default=104, help="of Wan's latents (default: 104)")
    p.add_argument("--out", type=Path, help="a .json for the numbers")
    return p.parse_args(argv)


@torch.no_grad()
def rollout(net, shape, chunk, steps, frames, window, fused) -> tuple[dict, torch.Tensor]:
    """One rollout of one clip: its measurements, and the last chunk."""
    c, device = net.config, next(net.parameters()).device
    text = data.noises([0], (c.text_len, c.text_dim), 1).to(device)
    grid, first_grid = grids(steps, 5.0, 4)
    cache, cuda = net.new_cache(window=window, sink=1, relative=True), device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start, stamps = time.perf_counter(), []
    for made in stream(net, lambda i, k: data.noises([0], (chunk, *shape), i, k).to(device), text, grid,
                      chunks=frames // chunk, first_grid=first_grid, cache=cache, fused=fused):
        x0 = made.x0
        if cuda:
            torch.cuda.synchronize()
        stamps.append(time.perf_counter() - start)
    per_latent = 1 if c.in_dim == 3 else 4  # pictures; of Wan's first latent frame, one
    return {"pictures_per_second": per_latent * (frames - chunk) / (stamps[-1] - stamps[0]),
            "first_chunk_s": stamps[0], "last_chunk_s": stamps[-1] - stamps[-2],
            "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None}, x0


def main(args) -> list[dict]:
    """Measure every setting; returns a row for each setting and way."""
    if not 1 <= args.rounds <= 1000:
        raise ValueError(f"got --rounds {args.rounds}, expected 1 to 1000")
    check_device(args.device)
    if not all(2 <= n <= 1000 and n % 2 == 0 for n in (args.height, args.width)):
        raise ValueError(f"got --height {args.height} --width {args.width}, expected even numbers from 2 to 1000")
    if args.out:  # before an hour of measuring
        if args.out.is_dir():
            raise ValueError(f"got --out {args.out}, a folder, expected the name of a file")
        if args.out.exists() and (args.out.suffix != ".json" or "rows" not in read_json(args.out, "our own")):
            raise ValueError(f"got --out {args.out}, which is none of ours, expected a new name: change --out")
        try:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=args.out.parent).close()
        except OSError as e:
            raise ValueError(f"got --out {args.out} ({e}), expected a place to write: change --out") from e
    config, toy = SIZES[args.size], SIZES[args.size].in_dim == 3
    net = CausalWan(config).init_weights(0).eval().requires_grad_(False)
    torch.nn.init.normal_(net.head.head.weight, std=0.02)
    net = net.to(args.device, torch.bfloat16 if args.device.startswith("cuda") else torch.float32)
    if args.compile:
        net.compile_blocks()
    shape, rows = (config.in_dim, data.SIZE, data.SIZE) if toy else (config.in_dim, args.height, args.width), []
    for chunk, steps, frames, window in TOY if toy else WAN:
        measured, last = {"fused": [], "apart": []}, {}
        for i in range(args.rounds + 1):
            for way, runs in measured.items():
                numbers, last[way] = rollout(net, shape, chunk, steps, frames, window, way == "fused")
                if i > 0:
                    runs.append(numbers)
        apart = ((last["fused"] - last["apart"]).abs().max() / last["apart"].abs().max()).item()
        for way, runs in measured.items():
            row = {"chunk": chunk, "steps": steps, "frames": frames, "window": window, "commit": way,
                   "difference": apart}
            for name in runs[0]:
                values = [run[name] for run in runs]
                if values[0] is not None:
                    row |= {name: statistics.median(values), f"{name}_range": [min(values), max(values)]}
            rows.append(row)
            memory = f", {row['memory_gb']:.1f} GB" if "memory_gb" in row else ""
            print(f"chunk {chunk}, {steps} steps, {frames} frames, {way}: {row['pictures_per_second']:.1f} pictures/s, "
                  f"first chunk {row['first_chunk_s']:.3f} s, last {row['last_chunk_s']:.3f} s{memory}, difference "
                  f"{apart:.1e}", flush=True)
    if args.out:
        card = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} threads"
        about = {"size": args.size, "device": args.device, "card": card, "torch": torch.__version__,
                 "compile": args.compile, "rounds": args.rounds, "shape": shape, "rows": rows}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.out, json.dumps(about, indent=1), one_of_many=True)
    return rows


if __name__ == "__main__":
    run_command(lambda: main(parse()), "stopped; nothing was written")
