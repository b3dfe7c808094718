"""Weights from one layout to another (wan21/weights.py lists the layouts).

    python -m tools.convert Wan2.1-T2V-1.3B runs/wan --size wan1.3b       # Wan's own; train.py then starts from them:
    python train.py --size wan1.3b --stage teacher_forcing --data latents --out runs/wan --accum 64
    python -m tools.convert causal_forcing.pt runs/wan --stage causal_cd --chunk 3      # a public student
    python -m tools.convert Wan2.1-T2V-1.3B runs/walk --size wan1.3b_camera     # to be trained to follow cameras
    python -m tools.convert runs/wan/salt.safetensors FOLDER --layout diffusers --dtype bf16    # for other programs

OUT is a folder: with --layout own the --out folder of train.py. Flags of train.py may then follow SRC and OUT: they are
recorded as the settings that the weights were trained with (frames, chunk, steps, guidance), which sampling uses and
later stages are checked against.

A text-to-video model becomes one with cameras by --size: by prope_o of zeros, with which it gives what it gave. As it
has still to learn cameras, it is written as OUT/start.safetensors, from which train.py --stage bidirectional starts.
"""

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

import config
from cluster.files import check_finite, run_command
from model import SIZES
from stage import START
from wan21 import weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse(argv=None) -> argparse.Namespace:
    """The command line; what is left of it for config.parse is `flags`."""
    p = argparse.ArgumentParser(prog="python -m tools.convert", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("src", type=Path, help="a file or folder in any layout")
    p.add_argument("out", type=Path, help="folder to write to")
    p.add_argument("--layout", choices=("own", "official", "diffusers"), default="own", help="(default: own)")
    p.add_argument("--size", choices=tuple(SIZES), help="the network, as in train.py (default: found by shape)")
    p.add_argument("--stage", default="bidirectional", help="own: the stage of train.py that the weights stand for; "
                   "its flags --chunk, --frames ... may follow, to be recorded (default: bidirectional)")
    p.add_argument("--part", default="", help="of a .pt, the network to take (default: the averaged one)")
    p.add_argument("--dtype", choices=tuple(DTYPES), default="", help="cast to (default: as in the file)")
    args, args.flags = p.parse_known_args(argv)
    return args


def record(args, size: str) -> dict:
    """What train.py records of a stage that it has finished, for one that was trained elsewhere."""
    if args.stage not in config.STAGES:
        raise ValueError(f"got --stage {args.stage}, expected one of {', '.join(config.STAGES)}")
    cfg = config.parse([*args.flags, "--size", size, "--stage", args.stage, "--out", str(args.out)])
    config.check(replace(cfg, data="random", device="cpu", accum=1))
    stage = config.STAGES[args.stage]
    return {"stage": args.stage, "size": size, "step": 0, "seconds": 0.0, "nonfinite": 0, "config": asdict(cfg),
            "data": "", "causal": stage.causal, "few_step": stage.few_step, "solver": stage.solver,
            "saved": time.time()}


def main(argv=None) -> None:
    args = parse(argv)
    if args.flags and args.layout != "own":
        raise ValueError(f"got {' '.join(args.flags)}, expected no such flag with --layout {args.layout}")
    tensors, found = weights.read_weights(args.src, args.part)
    size = args.size or found.get("size") or weights.size_of(tensors, args.src)
    given, tensors = tensors, weights.with_cameras(SIZES[size], tensors)
    adds_cameras = tensors.keys() != given.keys()
    if adds_cameras and (args.stage != "bidirectional" or found.get("causal")):
        raise ValueError(f"got {args.src} of stage {found.get('stage', args.stage)} without cameras, expected a "
                         "bidirectional model: train it with cameras first, then the other stages")
    weights.check_fit(SIZES[size], tensors, args.src)
    check_finite(tensors, args.src)
    metadata = record(args, size) | {"source": {"path": str(args.src), **found}}
    metadata |= {"stage": START} if adds_cameras else {}
    if args.layout == found["layout"] == "own" and not adds_cameras:
        raise ValueError(f"got {args.src}, a file of this project, expected another's with --layout own: copy it")
    dtype = DTYPES[args.dtype] if args.dtype else None
    for name in tensors if dtype else ():  # one at a time: what is written is cast a shard at a time
        check_finite({name: tensors[name].to(dtype)}, f"{args.src} as {dtype}")
    if args.layout == "own":
        weights.write_own(args.out, tensors, metadata, dtype)
    else:
        write = weights.write_official if args.layout == "official" else weights.write_diffusers
        write(args.out, tensors, SIZES[size], dtype=dtype)
    count = sum(w.numel() for w in tensors.values())
    print(f"{args.out}: {count / 1e9:.3g} billion weights, {found['layout']} {found.get('part', '')}".rstrip()
          + f" in {args.src}, now {args.layout}" + ", with cameras" * adds_cameras)


if __name__ == "__main__":
    run_command(main, "stopped; run the same command again")
