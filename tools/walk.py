"""How long a model of the room remembers: true frames of a whole turn, then a long walk, whose frames are compared with
the truth where the given ones determine them (worlds/room.py), by their distance in time.

    python -m tools.walk --weights assets/room.safetensors --frames 256 --out results/room_walk_cpu.json

Every way to bound the cache walks the same paths, from the same noise: all frames (as far as they go, positions that
the network has never seen among them), the latest of a window, a sink as long as the turn, and the window that covers
the poses seen (cameras.covering). An error of 1 is the world's variance; two other rooms differ by about 1.5.
"""

import argparse
import statistics
from importlib.util import find_spec
from pathlib import Path

import torch

from cluster.files import metadata_of, replacing, run_command, write_json
from fast.network import Fast
from flowmap import schedule
from model import SIZES
from rollout import rollout_with_prompts
from wan21.weights import load
from worlds import room
from worlds.draws import EVALUATE, generator, noises

TURN = room.TURNS  # frames that are given
WAYS = {  # window (0: all), sink, positions counted inside the window, which frames stay
    "all frames": (0, 0, False, "latest"),
    "16, latest": (16, 0, True, "latest"),
    "16, latest, sink 1": (16, 1, True, "latest"),
    "16, latest, sink 1, absolute": (16, 1, False, "latest"),
    "32, latest, sink 1": (32, 1, True, "latest"),
    "16, sink 12: the turn": (16, TURN, True, "latest"),
    "16, poses": (16, 1, True, "poses"),
}


def parse(argv=None):
    p = argparse.ArgumentParser(prog="python -m tools.walk", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", type=Path, required=True, help="a causal student of the room")
    p.add_argument("--frames", type=int, default=128, help="of a walk, the turn among them (default: 128)")
    p.add_argument("--paths", type=int, default=4, help="(default: 4)")
    p.add_argument("--rooms", type=int, default=16, help="in which each path is walked (default: 16)")
    p.add_argument("--steps", type=int, default=2, help="denoising steps per frame (default: 2)")
    p.add_argument("--out", type=Path, help="a .json for the numbers")
    p.add_argument("--figure", type=Path, help="a .png for their curves; needs matplotlib")
    return p.parse_args(argv)


def spans(frames: int) -> list[tuple[int, int]]:
    """The frames behind the turn, in spans that double."""
    ends = [TURN, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
    return [(a, b) for a, b in zip(ends, ends[1:]) if b <= frames]


def walks(path: int, rooms: int, frames: int) -> torch.Tensor:
    """Labels of one random walk behind a whole turn, in so many rooms."""
    labels = room.drawn(torch.rand(rooms, room.numbers(frames), generator=generator(EVALUATE, 6, path)), frames)
    actions = labels[:1, 11:].long().expand(rooms, -1).clone()
    actions[:, 1 : TURN + 1] = room.LEFT
    return room.label_of(labels[:, :3], labels[:, 3:11], actions, room.LEFT)


@torch.no_grad()
def errors(net, grid, path: int, way: tuple, args) -> list[float]:
    """The mean error in every span, where the turn determines a column; nan where it determines none."""
    labels, (window, sink, relative, keep) = walks(path, args.rooms, args.frames), way
    rooms, poses, _ = room.read(labels)
    real, text = room.render(rooms, poses), room.Room().embed(labels)
    cache = net.new_cache(window or args.frames, sink, relative, keep)
    x = torch.cat(list(rollout_with_prompts(
        net, lambda i, k: noises(range(args.rooms), (1, *real.shape[2:]), EVALUATE, 7, path, i, k), [(0, text)],
        grid, chunk=1, frames=args.frames - TURN, given=real[:, :TURN], cache=cache)), dim=1)
    error, known = (x - real).square().mean((2, 3)), room.known(rooms, poses, TURN)[0]
    return [error[:, a:b][known[:, a:b]].mean().item() for a, b in spans(args.frames)]


def draw(found: dict[str, list[float]], ends: list[tuple[int, int]], path: Path) -> None:
    """Every way's errors over the frames of a walk."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, ax = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    for (name, errors), marker in zip(found.items(), "osv^Dxd"):
        ax.plot([(a + b - 1) / 2 for a, b in ends], errors, marker=marker, markersize=4, linewidth=1, label=name)
    ax.set(xscale="log", xlabel="frame (0 to 11 are given: a whole turn)", ylabel="error where the turn determines it",
           ylim=(0, None))
    ax.set_xticks([a for a, _ in ends], [str(a) for a, _ in ends])
    ax.minorticks_off()
    ax.legend(fontsize=8)
    with replacing(path) as fresh:
        figure.savefig(fresh, format="png", dpi=80)
    pyplot.close(figure)


def main(argv=None) -> dict:
    """Print and return way -> mean error over the paths in every span of frames."""
    args = parse(argv)
    metadata = metadata_of(args.weights)
    config = SIZES.get(metadata.get("size"))
    c = metadata.get("config", {})
    is_student = metadata.get("causal") and metadata.get("few_step") and c.get("chunk") == 1
    if config is None or config.family != "room" or not is_student:
        raise ValueError(f"got {args.weights}, expected a causal student of the room, frame by frame: change --weights")
    if not (16 <= args.frames <= 512 and args.paths > 0 and args.rooms > 0 and args.steps > 0):
        raise ValueError(f"got --frames {args.frames} --paths {args.paths} --rooms {args.rooms} --steps {args.steps}, "
                         "expected 16 to 512 frames, and at least one of the others")
    if args.figure and not find_spec("matplotlib"):
        raise ValueError("got --figure without matplotlib, expected it: pip install matplotlib")
    net = Fast(load(config, args.weights, dtype=torch.float32)[0].eval().requires_grad_(False))
    grid = schedule(args.steps, c["shift"])
    print(f"{'frames':<30}" + "".join(f"{f'{a}-{b - 1}':>9}" for a, b in spans(args.frames)))
    found = {}
    for name, way in WAYS.items():
        by_path = [errors(net, grid, path, way, args) for path in range(args.paths)]
        found[name] = [statistics.fmean(e for e in of if e == e) for of in zip(*by_path)]
        print(f"{name:<30}" + "".join(f"{e:>9.4f}" for e in found[name]), flush=True)
    if args.figure:
        draw(found, spans(args.frames), args.figure)
    if args.out:
        write_json(args.out, {"weights": metadata["stage"], "steps": args.steps, "frames": args.frames,
                              "paths": args.paths, "rooms": args.rooms, "spans": spans(args.frames), "errors": found},
                   True)
    return found


if __name__ == "__main__":
    run_command(main, "stopped; nothing was written")
