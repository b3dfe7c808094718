"""Sample a trained model: prompts in, an animated picture out, chunk by chunk.

    python sample.py                                      # the newest student in runs/, all prompts of the toy world
    python sample.py --prompt "red ball" --steps 2 --frames 64 --seed 1 --out ball.webp
    python sample.py --checkpoint runs/toy/teacher_forcing.safetensors --steps 40 --solver euler

Steps, solver, chunk, window and shift default to what the checkpoint was trained for, and a mismatch is a warning
that says what to expect. Clips longer than those of training slide a window over the past: the first --sink frames
and the last ones up to --window frames in all, with positions counted inside the window, so that memory and time per
chunk stay flat.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from einops import rearrange
from tqdm import tqdm

import data
from flowmap import Guided
from model import SIZES, CausalWan, about_of, check_window, load_weights, read_tensors
from rollout import grids, stream


def newest_student() -> Path:
    """The autoregressive student last trained, of any run."""
    found = {path: about_of(path) for path in Path("runs").glob("*/*.safetensors")
             if not path.stem.endswith("_raw")}
    found = {path: about for path, about in found.items() if about.get("causal") and about.get("few_step")}
    if not found:
        raise ValueError("got no student in runs/, expected runs/*/salt.safetensors or runs/*/causal_cd.safetensors: "
                         "run `python train.py` first, or give --checkpoint")
    return max(found, key=lambda path: found[path]["saved"])


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", type=Path, help="a file that train.py left (default: the newest student in runs/)")
    p.add_argument("--prompt", nargs="+", default=data.PROMPTS, help='each in quotes: "red ball" (default: all)')
    p.add_argument("--steps", type=int, help="denoising steps per chunk (default: 2 for a student, 40 for a teacher)")
    p.add_argument("--first-steps", type=int, help="least steps of the first chunk (default: as trained)")
    p.add_argument("--chunk", type=int, help="frames per chunk (default: as trained)")
    p.add_argument("--frames", type=int, default=24, help="frames of the clip (default: 24)")
    p.add_argument("--window", type=int, help="frames a frame may see, with itself (default: the length trained on)")
    p.add_argument("--sink", type=int, default=1, help="of these, the first frames of the clip (default: 1)")
    p.add_argument("--solver", choices=("cm", "euler"), help="default: cm for a student, euler for a teacher")
    p.add_argument("--shift", type=float, help="timestep shift (default: as trained)")
    p.add_argument("--guidance", type=float, help="guidance w (default: none for a student, as recorded for a teacher)")
    p.add_argument("--seed", type=int, default=0, help="of the noise; clip i of a seed does not depend on the others")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    p.add_argument("--out", type=Path, default=Path("sample.webp"), help="the animated picture (default: sample.webp)")
    return p.parse_args(argv)


def with_defaults(args, about: dict):
    """Fill what was not given from the checkpoint's record; warn where what was given departs from it."""
    if not about.get("size", "toy").startswith("toy"):
        raise ValueError(f"got a checkpoint of size {about['size']}, expected a toy one: only its latents can be drawn "
                         "yet: change --checkpoint")
    if "causal" not in about:
        raise ValueError("got no finished stage's checkpoint, expected a file STAGE.safetensors that train.py left: "
                         "change --checkpoint")
    if not about["causal"]:
        raise ValueError(f"got a checkpoint of stage {about['stage']}, expected an autoregressive one "
                         "(teacher_forcing, causal_cd, salt, ...): change --checkpoint")
    student, c = about["few_step"], about["config"]
    trained = {"steps": 2 if student else 40, "first_steps": c["first_steps"] if student else 1, "chunk": c["chunk"],
               "solver": about["solver"], "shift": c["shift"], "guidance": 1.0 if student else c["guidance"],
               "window": c["window"] or c["frames"]}
    expect = {"solver": "other motion, and at larger scale blur: students are made for cm, teachers for euler",
              "guidance": "distorted pictures: a student has its teacher's guidance in it already",
              "chunk": "frames that jump at the borders of chunks",
              "shift": "errors at times it has not seen", "first_steps": "another first frame, and all that follow"}
    given = {name: getattr(args, name) for name in trained if getattr(args, name) is not None}
    for name, value in trained.items():
        setattr(args, name, given.get(name, value))
    if args.shift <= 0 or args.seed < 0:
        raise ValueError(f"got --shift {args.shift} and --seed {args.seed}, expected a shift above 0 and a seed of at "
                         "least 0")
    if args.device != "cpu" and not (args.device.startswith("cuda") and torch.cuda.is_available()):
        raise ValueError(f"got --device {args.device}, expected cpu, or cuda where there is a GPU")
    if args.steps < 1 or args.first_steps < 1:
        raise ValueError(f"got --steps {args.steps} and --first-steps {args.first_steps}, expected at least 1")
    if args.out.suffix != ".webp":
        raise ValueError(f"got --out {args.out}, expected a name that ends in .webp")
    if args.chunk < 1 or args.frames < 1 or args.frames % args.chunk:
        raise ValueError(f"got --frames {args.frames} and --chunk {args.chunk}, expected a multiple of the chunk")
    check_window(args.window, args.sink, args.chunk)
    for name in given.keys() & expect.keys():
        if given[name] != trained[name]:
            print(f"warning: --{name.replace('_', '-')} {given[name]}, but the checkpoint ({about['stage']}) was "
                  f"trained for {trained[name]}; expect {expect[name]}", file=sys.stderr)
    if student and args.steps not in (1, *c["mixed_steps"]):
        print(f"warning: --steps {args.steps}, but the checkpoint was trained for {c['mixed_steps']}; expect errors "
              "at the times between", file=sys.stderr)
    if args.window != trained["window"]:
        print(f"warning: --window {args.window}, but the checkpoint was trained on {trained['window']} frames; expect "
              "errors at positions it has never seen, or motion that forgets its past", file=sys.stderr)
    if not student and args.steps < 8:
        print(f"warning: --steps {args.steps} of a multi-step teacher; expect a blur. Its students do this well",
              file=sys.stderr)
    return args


@torch.no_grad()
def main(args) -> Path:
    """Write the animated picture; returns its path."""
    prompts = torch.tensor([data.parse_prompt(prompt) for prompt in args.prompt])
    checkpoint = args.checkpoint or newest_student()
    weights, about = read_tensors(checkpoint)
    args = with_defaults(args, about)
    config = SIZES[about["size"]]
    net = load_weights(CausalWan(config), weights, checkpoint).to(args.device).eval()
    if args.guidance != 1:
        net = Guided(net, torch.zeros(config.text_len, config.text_dim), args.guidance)
    grid, first_grid = grids(args.steps, args.shift, args.first_steps)
    times = [round(t, 4) for t in grid.tolist()]
    print(f"{checkpoint} ({about['stage']}): {args.steps} steps at t = {times}, first chunk {len(first_grid)} steps, "
          f"{args.solver}, window {args.window}, sink {args.sink}")

    def noise(i, k):
        shape = (args.chunk, config.in_dim, data.SIZE, data.SIZE)
        return data.noises(range(len(prompts)), shape, args.seed, i, k).to(args.device)

    chunks, start, latency = [], time.time(), None
    cache = net.new_cache(window=args.window, sink=args.sink, relative=True)
    bar = tqdm(total=args.frames, unit="frame", desc="frames")
    for chunk in stream(net, noise, data.embed(prompts).to(args.device), grid, chunks=args.frames // args.chunk,
                        first_grid=first_grid, solver=args.solver, cache=cache):
        chunks.append(chunk.x0.cpu())
        latency = latency or time.time() - start
        bar.update(args.chunk)
    bar.close()
    x = torch.cat(chunks, dim=1)
    if not x.isfinite().all():
        raise ValueError(f"got non-finite frames from {checkpoint}, expected finite ones: change --checkpoint or "
                         "--guidance")
    clips = data.pixels(x, scale=8 if len(prompts) > 2 else 20)
    columns = next(n for n in (6, 5, 4, 3, 2, 1) if len(clips) % n == 0)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    data.save_webp(args.out, rearrange(clips, "(r c) f h w rgb -> f (r h) (c w) rgb", c=columns))
    print(f"{args.out}: {len(prompts)} clips of {args.frames} frames, first chunk after {latency:.2f} s, "
          f"{len(prompts) * args.frames / (time.time() - start):.1f} frames per second")
    return args.out


if __name__ == "__main__":
    try:
        main(parse())
    except ValueError as e:
        sys.exit(f"ValueError: {e}")
