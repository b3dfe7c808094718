"""A trained student of a world as it comes with this project: in bf16, with the record of how it was made, and what it
can do.

    python -m tools.ship runs/room/salt.safetensors assets/room.safetensors --command "python train.py --world room"

play.py and sample.py use assets/ where there is no run of one's own. What was measured here of the file in bf16, a test
measures again.
"""

import argparse
from dataclasses import fields, replace
from pathlib import Path

import torch

import evaluate
from cluster.files import check_finite, metadata_of, read_tensors, run_command, write_tensors
from config import STAGES, Config
from model import SIZES
from wan21.weights import load
from worlds import WORLDS

STEPS, CLIPS, SEED = 2, 8, 1  # of what is measured: steps, clips, evaluation seed


def parse(argv=None):
    p = argparse.ArgumentParser(prog="python -m tools.ship", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("src", type=Path, help="a student that train.py left")
    p.add_argument("out", type=Path, help="the file to write")
    p.add_argument("--command", required=True, help="that trained it, to be recorded")
    p.add_argument("--commit", default="", help="of the code that trained it, to be recorded")
    return p.parse_args(argv)


@torch.no_grad()
def measured(path: Path) -> dict[str, float]:
    """The world's measures of a student's clips, and what else the world asks of it."""
    metadata = metadata_of(path)
    known = {f.name for f in fields(Config)}
    cfg = Config(**{name: value for name, value in metadata["config"].items() if name in known})
    cfg, stage = replace(cfg, device="cpu", eval_clips=CLIPS, eval_seed=SEED), metadata["stage"]
    config = SIZES[metadata["size"]]
    if STAGES[stage].windowed:
        config = replace(config, window=cfg.window or None, sink=cfg.sink)
    net = load(config, path, dtype=torch.float32)[0].eval().requires_grad_(False)
    _, labels, noise = evaluate.evaluation_set(cfg, CLIPS)
    clips = evaluate.generate(cfg, stage, net, STEPS, labels, noise)
    asked = evaluate.ask(cfg, stage, net, STEPS, "", first=False)
    found = WORLDS[cfg.world].measure(clips, labels) | asked
    return {name: value for name, value in found.items() if isinstance(value, float)}


def main(argv=None) -> dict:
    args = parse(argv)
    weights, metadata = read_tensors(args.src)
    stage = STAGES.get(metadata.get("stage"))
    if not (stage and stage.causal and stage.few_step and metadata["config"]["world"]):
        raise ValueError(f"got {args.src}, expected a causal few-step student of a world, as stage salt leaves it")
    metadata["config"] |= {"out": f"runs/{metadata['config']['world']}"}
    weights = {name: w.to(torch.bfloat16) for name, w in weights.items()}
    check_finite(weights, args.src)
    made = {"command": args.command, "commit": args.commit, "steps": STEPS, "clips": CLIPS, "eval_seed": SEED}
    write_tensors(args.out, weights, metadata | {"made": made})
    made["measured"] = measured(args.out)
    write_tensors(args.out, weights, metadata | {"made": made})
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, " + ", ".join(
        f"{name} {value:.4f}" for name, value in made["measured"].items()))
    return made


if __name__ == "__main__":
    run_command(main, "stopped; run the same command again")
