"""The settings of sample.py: what weights were trained for, what was asked for, and what to expect where they differ.

`args` is what sample.parse returns.
"""

from functools import partial
from importlib.util import find_spec
from pathlib import Path

from cluster.files import check_device, metadata_of
from model import SIZES, check_window
from wan21 import video
from wan21.errors import flag_of, need, say
from wan21.families import FAMILIES
from wan21.trajectory import check_length
from worlds import WORLDS

RANGES = [  # names of numbers, their minimum and maximum: beyond it is a typing error, or would fill a machine
    ("steps first_steps samples batch", 1, 10**4), ("frames chunk window", 1, 10**6), ("seed", 0, 2**62),
    ("sink", 0, 10**6), ("height width", 1, 10**4), ("shift", 1e-6, 1e6), ("guidance", -1e3, 1e3)]
RECORDED = {  # settings that a checkpoint of train.py records, and their types
    **dict.fromkeys("first_steps sink window chunk frames height width".split(), int),
    "guidance": float | int, "shift": float | int, "mixed_steps": list | tuple}

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SHIPPED = [ASSETS / "room.safetensors", ASSETS / "toy.safetensors"]  # made by tools/ship.py


def newest_student(prompts=()) -> Path:
    """The autoregressive student last trained, of any run; without one, the first of those that come with this project
    whose world knows the words of all prompts."""
    found = {path: metadata_of(path) for path in Path("runs").glob("*/*.safetensors") if not path.stem.endswith("_raw")}
    saved = {path: metadata["saved"] for path, metadata in found.items() if metadata.get("causal")
             and metadata.get("few_step") and isinstance(metadata.get("saved"), float | int)}
    if saved:
        return max(saved, key=saved.get)
    shipped = [path for path in SHIPPED if path.exists()]
    if not shipped:
        raise ValueError("got no student in runs/, expected one: run `python train.py` first, or give --weights")
    fitting = [path for path in shipped if knows(WORLDS[metadata_of(path)["config"]["world"]], prompts)]
    path = fitting[0] if fitting else shipped[-1]  # whose world says which words it knows
    say(f"no student in runs/ yet: using {path}, which comes with this project")
    return path


def knows(world, prompts) -> bool:
    """Whether a world has words for all prompts."""
    try:
        return all(world.parse(prompt) is not None for prompt in prompts)
    except ValueError:
        return False


def trained_for(metadata: dict, size: str) -> dict:
    """The settings that weights were trained for, as they record them or as is usual for their layout."""
    family, layout = FAMILIES[SIZES[size].family], metadata["layout"]
    if layout == "pt":
        return family.published(size, student=True) | {"world": family.world}
    if layout != "own" or metadata.get("stage") in ("bidirectional", "start") and "source" in metadata:  # converted
        return family.published(size) | {"world": family.world}
    c = metadata.get("config")
    if not {"stage", "causal", "few_step", "solver"} <= metadata.keys() or not isinstance(c, dict) or not all(
            isinstance(c.get(name), kind) for name, kind in RECORDED.items()):
        raise ValueError("got no record of a finished stage, expected train.py's STAGE.safetensors: change --weights")
    student, causal, world = metadata["few_step"], metadata["causal"], family.world and c.get("world", family.world)
    if world and world not in WORLDS:
        raise ValueError(f"got weights that were trained on the world {str(world)[:40]}, expected one of "
                         f"{', '.join(WORLDS)}: change --weights")
    steps = c["mixed_steps"][0] if family.student_steps not in c["mixed_steps"][1:] else family.student_steps
    return {**{name: metadata[name] for name in ("stage", "causal", "few_step", "solver")},
            **{name: c[name] for name in ("shift", "frames", "window", "height", "width", "mixed_steps")},
            "steps": steps if student else 40, "world": world, "guidance": 1.0 if student else c["guidance"],
            "first_steps": c["first_steps"] if student and causal else 1, "sink": c["sink"] if c["window"] else 1,
            "chunk": c["chunk"] if causal else c["frames"]}


def with_defaults(args, metadata: dict, size: str, along: int = 0):
    """Fill what was not given from the record of the weights; check the numbers; warn where they depart from it. along:
    frames of the path that clips follow, 0 if they follow none."""
    family, trained = FAMILIES[SIZES[size].family], trained_for(metadata, size)
    world, pixels = WORLDS.get(trained["world"]), family.pixels_per_latent
    left = along and along - bool(args.image)  # frames on the path to make
    expected = {name: trained[name] for name in ("steps", "first_steps", "chunk", "solver", "shift", "guidance")}
    expected |= {"window": trained["window"] or trained["frames"], "sink": trained["sink"],
                 "height": trained["height"] * pixels, "width": trained["width"] * pixels}
    if not trained["causal"] and args.chunk is None:  # the whole clip at once
        args.frames = expected["chunk"] = args.frames or left or trained["frames"] - bool(args.image)
        expected["window"] = None
    need(args, args.chunk is None or args.chunk >= 1, "chunk", "a number from 1")

    def fill(defaults: dict):
        vars(args).update({name: value for name, value in defaults.items() if getattr(args, name) is None})

    slides = args.window is None and expected["window"] is not None
    fill(expected)
    if slides:  # at least over the previous chunk, however short the clips of training were
        args.window = expected["window"] = max(args.window, args.sink + args.chunk)
    fill({"frames": left // args.chunk * args.chunk or family.rollout_frames or (
              trained["frames"] - bool(args.image)) // args.chunk * args.chunk,
          "batch": len(world.prompts) if world else 1, "text_device": args.device,
          "wan": args.weights if args.weights.is_dir() else args.weights.parent,
          "precision": "bf16" if args.device.startswith("cuda") and not world else "fp32",
          "out": Path("sample.mp4" if not world and ".mp4" in video.formats() else "sample.webp")})
    in_training = trained["window"] and args.frames <= trained["frames"] and not (args.image or args.clip)
    fill({"positions": "absolute" if in_training else "relative"})
    check(args, family, world)
    check_length(args, along, int(bool(args.image)))
    warn(args, trained, expected, "were trained" if metadata["layout"] == "own" else "are usually trained")
    return args


def check(args, family, world) -> None:
    """ValueError for settings that cannot be."""
    expect = partial(need, args)
    for names, low, high in RANGES:
        for name in names.split():
            value = getattr(args, name)
            expect(value is None or low <= value <= high, name, f"a number from {low:g} to {high:g}")
    for name in ("device", "text_device"):
        check_device(getattr(args, name), flag_of(name))
    expect(args.frames % args.chunk == 0, "frames chunk", "a multiple of the chunk")
    expect(not (args.image and args.clip), "image clip", "one of --image and --continue")
    multiple = family.pixel_multiple
    expect(args.height % multiple == args.width % multiple == 0, "height width", f"multiples of {multiple}")
    if world:
        _, h, w = world.latent_shape
        expect((args.height, args.width) == (h, w), "height width", f"{h} x {w}, the size of the world")
        expect(args.negative_prompt is None, "negative_prompt", "none: the world knows only the empty prompt")
    expect(not args.preview or world or family.rgb, "preview", "none: it is not known for latents of this size")
    check_window(args.window, args.sink, args.chunk)
    expect(args.device != "cpu" or args.attention in ("", "flash", "math"), "attention", "flash or math on a CPU")
    expect(args.attention != "flash3" or find_spec("flash_attn_interface"), "attention",
           "another, as the package flash_attn_interface is missing")


def warn(args, trained: dict, expected: dict, made: str) -> None:
    """A warning for every setting that the weights were not trained for, with what to expect of it."""
    causal, student, weights = trained["causal"], trained["few_step"], f"the weights ({trained['stage']})"
    changed = {name for name, value in expected.items() if getattr(args, name) != value}
    made_for = expected | {"frames": trained["frames"]}
    if student:
        made_for["steps"] = ", ".join(map(str, trained["mixed_steps"]))
    for name, applies, expect in (
            ("chunk", not causal and args.chunk < args.frames, "noise, as they need the whole clip at once. If they "
             "were trained chunk by chunk, say so: `python -m tools.convert ... --stage causal_cd` (or salt ...)"),
            ("frames", not causal and args.frames > trained["frames"], "repetition and blur"),
            ("solver", "solver" in changed and (student or args.solver == "cm"),  # all but cm solve the teacher's ODE
             "other motion, and at larger scale blur: students are trained for cm, teachers for euler"),
            ("guidance", "guidance" in changed and student, "distorted images: a student has learned its teacher's"),
            ("guidance", "guidance" in changed and not student, "duller images or, above it, garish ones"),
            ("shift", "shift" in changed, "errors at timesteps that the network has not seen"),
            ("first_steps", "first_steps" in changed, "another first frame, and other frames after it"),
            ("height", "height" in changed, "worse images"), ("width", "width" in changed, "worse images"),
            ("steps", student and args.steps not in (1, *trained["mixed_steps"]), "errors at timesteps between these"),
            ("steps", not student and args.steps < 8, "a blur: this is a multi-step teacher"),
            ("chunk", causal and "chunk" in changed, "frames that jump at chunk boundaries"),
            ("window", causal and "window" in changed, "errors at positions that the network has not seen, or motion "
             "that forgets its past"),
            ("sink", causal and trained["window"] and "sink" in changed, "a past of another kind than in training")):
        if applies:
            say(f"warning: {flag_of(name)} {getattr(args, name)}, but {weights} {made} for {made_for[name]}; expect "
                f"{expect}")
    if not causal and args.chunk == args.frames and (args.image or args.clip):
        say(f"warning: a start is given, but {weights} never saw a clean past; expect a jump where it ends")
    if args.negative_prompt and args.guidance == 1:
        say("warning: --negative-prompt changes nothing without --guidance")
