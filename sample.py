"""Sample a model: prompts in, videos out, chunk by chunk.

    python sample.py                                      # the newest student in runs/, all prompts of the toy world
    python sample.py --prompt "red ball" --at 32 "blue bar" --frames 64 --seed 1 --out ball.webp
    python sample.py --weights runs/toy/teacher_forcing.safetensors --steps 40 --solver euler
    python sample.py --size wan1.3b --weights Wan2.1-T2V-1.3B --prompt "a red fox runs through snow"
    python sample.py --weights student.pt --wan Wan2.1-T2V-1.3B --prompt "a red fox" --image fox.png --out fox.mp4
    python sample.py --weights student.pt --wan Wan2.1-T2V-1.3B --prompt-embeds prompts.safetensors --out videos
    python sample.py --weights walk.pt --wan Wan2.1-T2V-1.3B --prompt "a street" --trajectory "w*12,j*8"

--weights takes every layout that wan21/weights.py reads. Steps, solver, chunk, window and shift default to what a
checkpoint of train.py was trained for. Wan's own weights default to whole clips in 50 guided steps, as Wan samples
them, and public .pt files to few-step students that generate chunk by chunk; if yours is neither, `python -m
tools.convert --stage ...` records what it is. A setting that departs from these gives a warning with what to expect.

Frames are latent frames: images of the toy world; of Wan, n latent frames are 1 + 4 (n - 1) frames of video. Clips
longer than those of training slide a window over the past: the first --sink frames and the last ones, --window frames
in all, so memory and time per chunk stay constant. Positions are then counted inside the window, or (--positions
absolute) from the start of the clip, as they are for clips of a student that was trained with a window.

A network with cameras (--size wan1.3b_camera) follows --trajectory, a path in words that wan21/trajectory.py explains:
frame 0 of the clip, given or not, is where it starts. Without one the camera stands still. In the room, a world, the
prompt is the path.

A sample depends on its prompt, its seed and the settings, not on what is sampled beside it; sample k of a prompt has
seed --seed + k.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import wan21.text
import wan21.vae
import wan21.weights
from cluster.files import printable, run_command
from config import STAGES
from fast.attention import BACKENDS
from fast.network import Fast
from flowmap import SOLVERS, Condition, Guided, words_and_rows
from model import SIZES
from rollout import grids, rollout_with_prompts
from wan21.clips import FORMATS, Sample, given_latents, latent_shape, latents_only, samples_of, writing
from wan21.errors import need, say
from wan21.families import FAMILIES
from wan21.settings import newest_student, trained_for, with_defaults
from wan21.trajectory import check_length, paths_of, walked
from worlds import WORLDS, draws


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    add = p.add_argument_group("what").add_argument
    add("--weights", type=Path, help="a file of train.py, or Wan's, or a public .pt, or a folder of them (default: the "
                                     "newest student in runs/, or else one of assets/)")
    add("--part", default="", help="which network of a .pt that holds several (default: the averaged one)")
    add("--size", choices=tuple(SIZES), help="of the network (default: as recorded, or found by shape)")
    add("--prompt", nargs="+", help='each in quotes: "red ball" (default: all of the toy world)')
    add("--prompts", type=Path, metavar="FILE", help="a text file, one prompt a line, in place of --prompt")
    add("--prompt-embeds", type=Path, metavar="FILE", help="a file of tools.encode_prompts (default: all its prompts)")
    add("--at", nargs=2, action="append", default=[], metavar=("FRAME", "PROMPT"),
        help="continue with another prompt at this frame, or at the next chunk boundary")
    add("--negative-prompt", help="what guidance leads away from (default: Wan's)")
    add("--image", type=Path, help="an image to start from: the first frame")
    add("--continue", type=Path, dest="clip", metavar="CLIP", help="a video, or --format latents, to continue")
    add("--trajectory", metavar="PATH", help='the path of the camera, a step per latent frame, as in "w*8,j*4": w s a '
                                             "d u dn move it, j l i k turn it (default: it stands still)")
    add("--samples", type=int, default=1, help="of each prompt (default: 1)")
    add("--seed", type=int, default=0, help="of the noise of the first sample (default: 0)")
    add("--frames", type=int, help="latent frames to generate (default: as trained, or to the end of a path; 24 for "
                                   "the toy)")
    add("--height", type=int, help="of the video, pixels (default: as trained)")
    add("--width", type=int, help="of the video, pixels (default: as trained)")
    add = p.add_argument_group("how").add_argument
    add("--steps", type=int, help="denoising steps per chunk (default: 2 for a student of the toy, 4 for one of Wan, "
                                  "40 for a teacher, 50 for Wan)")
    add("--first-steps", type=int, help="minimum steps of the first chunk (default: as trained)")
    add("--chunk", type=int, help="frames per chunk; all --frames for a bidirectional model (default: as trained)")
    add("--window", type=int, help="frames that a frame may see, itself included (default: the length trained on)")
    add("--sink", type=int, help="of these, the first frames of the clip (default: as trained, or 1)")
    add("--positions", choices=("relative", "absolute"),
        help="of frames, counted inside the window or from the start of the clip (default: as in training, as far as "
             "its clips went, then relative)")
    add("--keep", choices=("latest", "poses"), default="latest",
        help="the frames that the window holds: the latest, or, with cameras, those that cover the poses seen")
    add("--solver", choices=SOLVERS, help="default: cm for a student, euler for a teacher")
    add("--shift", type=float, help="timestep shift (default: as trained)")
    add("--guidance", type=float, help="guidance w (default: 1, none, for a student; as recorded for a teacher)")
    add = p.add_argument_group("where").add_argument
    add("--out", type=Path, help="a file for all clips side by side, which is replaced, or a folder with a file per "
                                 "clip, where existing ones stay (default: sample.webp, for Wan sample.mp4)")
    add("--format", choices=tuple(FORMATS), help="of files in a folder (default: mp4, or webp without an encoder)")
    add("--vbench", action="store_true", help="name files as VBench expects: PROMPT-0.mp4, PROMPT-1.mp4")
    add("--wan", type=Path, help="folder of Wan's text encoder and VAE (default: that of --weights)")
    add("--preview", action="store_true", help="draw latents without the VAE: small and blurred, but at once")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--text-device", help="cpu, for a GPU without 11 GB for the text encoder (default: --device)")
    add("--precision", choices=("fp32", "bf16"), help="of network and VAE (default: bf16 for Wan on a GPU, else fp32)")
    add("--compile", action="store_true", help="torch.compile the blocks, for every shape anew")
    add("--attention", choices=tuple(BACKENDS), default="", help="its kernel (default: the fastest, measured)")
    add("--batch", type=int, help="clips at a time (default: 12 of the toy world, 1 of Wan)")
    return p.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# What to sample

def with_stage(metadata: dict) -> dict:
    """The metadata of weights with what the table of stages knows besides: not every stage sees only --window frames,
    and some have one K, --rollout-steps."""
    stage, c = STAGES.get(str(metadata.get("stage"))), metadata.get("config")
    if metadata["layout"] != "own" or stage is None or not isinstance(c, dict):
        return metadata
    one_k = {"mixed_steps": [c.get("rollout_steps", 4)]} if "one_k" in dict(stage.settings) else {}
    return metadata | {"config": c | one_k | ({} if stage.windowed else {"window": 0})}


def prompts_of(args, world) -> tuple[list[str], list[tuple[int, str]]]:
    """The prompts, and the changes of prompt on the way, (frame, prompt) in order."""
    need(args, bool(args.prompt) + bool(args.prompts) < 2, "prompt prompts", "one of them")
    prompts = args.prompt or (world.prompts if world else [])
    if args.prompts:
        prompts = wan21.text.read_prompts(args.prompts)
    elif args.prompt_embeds and not args.prompt:
        prompts = wan21.text.read_prompt_embeds(args.prompt_embeds)[0]
    for prompt in (*prompts, *(prompt for _, prompt in args.at)):
        if prompt.encode(errors="ignore").decode() != prompt or "\0" in prompt:  # bytes of another encoding
            raise ValueError(f"got the prompt {prompt!r}, expected text in UTF-8")
    if not prompts:
        raise ValueError("got no prompt, expected some: give --prompt, --prompts or --prompt-embeds")
    for frame, _ in args.at:
        if not frame.isdecimal() or len(frame) > 9 or int(frame) < 1:
            raise ValueError(f"got --at {frame}, expected the number of a frame after the first: change --at")
    switches = sorted((int(frame), prompt) for frame, prompt in args.at)
    if len(dict(switches)) < len(switches):
        raise ValueError(f"got --at twice at one frame ({args.at}), expected another frame for each")
    return prompts, switches


def texts_of(args, config, world, prompts: list[str]) -> tuple[dict[str, Tensor], Tensor]:
    """The embedding `l d` of each prompt, and that of the negative prompt (unused without guidance)."""
    null = torch.zeros(1, config.text_dim)
    if world:
        return {prompt: words_and_rows(world.embed([world.parse(prompt)]))[0][0] for prompt in prompts}, null
    guided, negative = args.guidance != 1, args.negative_prompt
    if args.prompt_embeds:
        asked = prompts + [negative] * (guided and negative is not None)
        texts = wan21.text.read_embeddings(args.prompt_embeds, asked)
        if guided:
            null = wan21.text.read_null(args.prompt_embeds) if negative is None else texts[negative]
        for text in (*texts.values(), null):
            need(args, text.shape[1] == config.text_dim and len(text) <= config.text_len, "prompt_embeds",
                 f"embeddings of at most {config.text_len} tokens of width {config.text_dim}, not {tuple(text.shape)}")
        return texts, null
    say(f"text encoder of {args.wan}")
    encoder = wan21.text.load_text_encoder(args.wan, args.text_device)

    def encode(prompt):
        return encoder.encode([prompt])[0].float().cpu()

    return {prompt: encode(prompt) for prompt in prompts}, (
        encode(wan21.text.NEGATIVE_PROMPT if negative is None else negative) if guided else null)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling

def decoder(args, config, world, vae, side_by_side: int) -> tuple[Callable[[Tensor], Tensor], float]:
    """A function from the next chunk x0 `b n c h w` to its frames, bytes `b f h w 3`, for one batch; and how many of
    them make a second. side_by_side: clips that share an image."""
    family = FAMILIES[config.family]
    if latents_only(args):
        return lambda x0: torch.empty(len(x0), 0, 1, 1, 3, dtype=torch.uint8), family.fps
    if world:
        return lambda x0: torch.from_numpy(world.draw(x0.float(), 8 if side_by_side > 2 else 20)), family.fps
    if args.preview:
        return lambda x0: wan21.vae.preview(x0, family), family.fps / family.frames_per_latent
    return wan21.vae.StreamDecoder(vae).decode, family.fps


def sample_batch(args, config, world, net, vae, given, rows, texts, switches, batch: list[Sample]) -> str:
    """Generate a batch of clips and write them as they come. Returns how much that was, and how fast. rows: for each
    prompt what is told of all frames, those given among them, besides words; or None."""
    groups = [(sample.path, [sample]) for sample in batch] if batch[0].path else [(args.out, batch)]
    sizes = [len(group) for _, group in groups]

    def text(prompts):
        words = wan21.text.pad_text([texts[prompt] for prompt in prompts], config.text_len)
        told = words if rows is None else Condition(words, torch.stack([rows[prompt] for prompt in prompts]))
        return told.to(args.device)

    def noise(i, k):
        shape = (args.chunk, *latent_shape(args, config))
        return draws.noises([sample.seed for sample in batch], shape, i, k).to(args.device)

    prompts = [(0, text([sample.prompt for sample in batch]))]
    prompts += [(frame, text([prompt] * len(batch))) for frame, prompt in switches]
    grid, first_grid = grids(args.steps, args.shift, args.first_steps)
    frames_given = 0 if given is None else len(given)
    window = min(args.window, max(frames_given + args.frames, args.sink + args.chunk)) if args.window else args.window
    cache = net.new_cache(window, args.sink, args.positions == "relative", args.keep)
    given = None if given is None else given.to(args.device).expand(len(batch), *given.shape)
    rollout = rollout_with_prompts(net, noise, prompts, grid, chunk=args.chunk, frames=args.frames, given=given,
                                   cache=cache, first_grid=first_grid, solver=args.solver)
    decode, fps = decoder(args, config, world, vae, sizes[0])
    made, first = 0, 0.0
    unit = "latent frames" if latents_only(args) else "frames"
    name = printable(batch[0].prompt[:30]) if len(batch) == 1 else f"{len(batch)} clips"
    with ExitStack() as files, tqdm(total=frames_given + args.frames, unit="frame", desc=name) as bar:
        adders = [files.enter_context(writing(path, fps, group, texts)) for path, group in groups]
        start = time.perf_counter()
        for x0 in rollout:
            if not x0.isfinite().all():
                raise ValueError(f"got non-finite frames from {args.weights}, expected finite ones: change --weights, "
                                 "--guidance or --precision")
            frames = decode(x0)
            for add, *chunk in zip(adders, x0.split(sizes), frames.split(sizes)):
                add(*chunk)
            made += frames.shape[1] or x0.shape[1]
            bar.update(x0.shape[1])
            if bar.n > frames_given and not first:
                first = time.perf_counter() - start
    return f"{len(batch)} x {made} {unit} in {time.perf_counter() - start:.1f} s, the first after {first:.2f} s"


@torch.no_grad()
def main(args) -> list[Path]:
    """Write the clips; returns the files."""
    args.weights = args.weights or newest_student([*(args.prompt or ()), *(prompt for _, prompt in args.at)])
    weights, metadata = wan21.weights.read_weights(args.weights, args.part)  # mapped, not read yet
    size = args.size or metadata.get("size") or wan21.weights.size_of(weights, args.weights)
    if not isinstance(size, str) or size not in SIZES:
        raise ValueError(f"got {args.weights} of size {str(size)[:40]}, expected one of {', '.join(SIZES)}: change "
                         "--weights, or give --size")
    config, family, metadata = SIZES[size], FAMILIES[SIZES[size].family], with_stage(metadata)
    wan21.weights.check_fit(config, weights, args.weights)
    trained = trained_for(metadata, size)
    world = WORLDS.get(trained["world"])
    prompts, switches = prompts_of(args, world)
    asked = [*prompts, *(prompt for _, prompt in switches)]
    paths = paths_of(args, config, world, asked)
    along = min(map(len, paths.values()), default=0)
    args = with_defaults(args, metadata, size, along)
    samples = samples_of(args, prompts)
    if not samples:
        return []
    dtype, vae = torch.bfloat16 if args.precision == "bf16" else torch.float32, None
    encodes = args.image or args.clip and args.clip.suffix != ".safetensors"
    if not world and not args.preview and (encodes or not latents_only(args)):
        vae = wan21.vae.load_vae(args.wan, args.device, dtype, family)
    given = given_latents(args, config, world, vae)
    frames_given = 0 if given is None else len(given)
    check_length(args, along, frames_given)
    rows, last = walked(paths, config, asked, frames_given + args.frames), frames_given + args.frames - args.chunk
    if switches and switches[-1][0] > last:
        raise ValueError(f"got --at {switches[-1][0]}, expected at most {last}, where the last chunk starts: change "
                         "--at or --frames")
    asked = [sample.prompt for sample in samples] + [prompt for _, prompt in switches]
    texts, null = texts_of(args, config, world, asked)
    say(f"network of {args.weights}")
    net = wan21.weights.load(config, args.weights, args.device, dtype, args.part)[0].eval().requires_grad_(False)
    net = Fast(net, args.attention, args.compile)
    if args.guidance != 1:
        net = Guided(net, wan21.text.pad_text([null], config.text_len)[0].to(args.device), args.guidance)
    grid, first_grid = grids(args.steps, args.shift, args.first_steps)
    times = [round(t, 4) for t in grid.tolist()]
    print(f"{args.weights} ({trained['stage']}): steps at t = {times[:8]}"
          f"{' ...' * (args.steps > 8)}, {len(times)} in all, {len(first_grid)} in the first chunk, {args.solver}, "
          f"guidance {args.guidance}, chunks of {args.chunk}, window {args.window or 'of all'}, sink {args.sink}, "
          f"{args.height} x {args.width} pixels, {args.precision}")
    for start in range(0, len(samples), args.batch):
        batch = samples[start : start + args.batch]
        done = sample_batch(args, config, world, net, vae, given, rows, texts, switches, batch)
        print(f"{batch[0].path if len(batch) == 1 and batch[0].path else args.out}: {done}")
    return [sample.path for sample in samples] if samples[0].path else [args.out]


if __name__ == "__main__":
    run_command(lambda: main(parse()), "stopped; finished clips are kept")
