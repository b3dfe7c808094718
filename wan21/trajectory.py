"""A camera's path in words, for sample.py --trajectory: "w*8,j*4" is eight steps forward, then four turns to the left.

The grammar, its steps and its intrinsics are those of the public minWM (Wan21/wan_utils/camera_trajectory.py), whose
data set was walked in them. One step leads from a latent frame to the next:

    w s    forward, back            STEP
    a d    to the left, right       STEP
    u dn   up, down                 STEP
    j l    turn to the left, right  TURN
    i k    turn upwards, downwards  TURN

The first frame is seen from the origin, so "w*8,j*4" are 13 frames. A move is made as the camera stands: after "j*30",
"w" leads to what was on the left.

A world of this project whose frames are told more than words, the room, has its paths in its prompts.
"""

import math
import re

import torch
from torch import Tensor

from cameras import row_of
from wan21.errors import need

STEP, TURN = 0.08, math.radians(3)
FX, FY = 0.5050505, 0.89786756  # focal lengths in image widths and heights: 969.7 pixels of 1920 x 1080
LONGEST = 10**5  # steps; more are a typing error
KEYS = {  # turns about x and y, steps along x, y and z, by OpenCV's axes: x right, y down, z forward
    "w": (0, 0, 0, 0, 1), "s": (0, 0, 0, 0, -1), "a": (0, 0, -1, 0, 0), "d": (0, 0, 1, 0, 0), "u": (0, 0, 0, -1, 0),
    "dn": (0, 0, 0, 1, 0), "j": (0, -1, 0, 0, 0), "l": (0, 1, 0, 0, 0), "i": (1, 0, 0, 0, 0), "k": (-1, 0, 0, 0, 0)}

WALK = {"forward": "w", "back": "s", "left": "j", "right": "l"}  # the room's actions


def moved(key: str) -> Tensor:
    """What takes the coordinates of a camera to those of the camera one step later, float64 `4 4`."""
    rx, ry, x, y, z = KEYS[key]
    velocity = torch.tensor([[0, 0, ry * TURN, x * STEP], [0, 0, -rx * TURN, y * STEP],
                             [-ry * TURN, rx * TURN, 0, z * STEP], [0, 0, 0, 0]], dtype=torch.float64)
    return torch.linalg.matrix_exp(-velocity)


def viewmats_of(text: str) -> Tensor:
    """The world-to-camera matrices of a path, float32 `f 4 4`, the first the identity. ValueError if it is none."""
    steps = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([a-z]+)\*([1-9][0-9]{0,5})\s*", part)
        if not match or match[1] not in KEYS or len(steps) + int(match[2]) > LONGEST:
            raise ValueError(f"got {part[:40]!r} in --trajectory {text[:80]}, expected KEY*STEPS, as in w*8,j*4, with "
                             f"a key of {' '.join(KEYS)}, and at most {LONGEST} steps in all: change --trajectory")
        steps += [match[1]] * int(match[2])
    moves, poses = {key: moved(key) for key in set(steps)}, [torch.eye(4, dtype=torch.float64)]
    for key in steps:
        poses.append(moves[key] @ poses[-1])
    return torch.stack(poses).float()


def rows_of(viewmats: Tensor) -> Tensor:
    """The rows `f 18` (cameras.py) of these cameras and minWM's intrinsics."""
    intrinsics = torch.tensor([[FX, 0, 0.5], [0, FY, 0.5], [0, 0, 1]])
    return row_of(viewmats, intrinsics.expand(len(viewmats), 3, 3))


def step(view: Tensor, action: str) -> tuple[Tensor, Tensor]:
    """The camera, float64 `4 4`, that an action leads to (none, or one of WALK), and the row `18` of its frame."""
    view = moved(WALK[action]) @ view if action in WALK else view
    return view, rows_of(view[None].float())[0]


def paths_of(args, config, world, prompts: list[str]) -> dict[str, Tensor]:
    """The rows `f row_width` of all frames on each prompt's path: along --trajectory, or, in a world whose frames are
    told more than words, its own. {}: there is no path. args: what sample.parse returns."""
    need(args, args.trajectory is None or config.camera and not world, "trajectory",
         "none: the path of a world is its prompt" if world else "none: this network knows no cameras")
    if world and config.row_width:
        need(args, not args.at, "at", "none: a path cannot change on the way")
        return {prompt: world.embed([world.parse(prompt)]).rows[0] for prompt in prompts}
    return {} if args.trajectory is None else dict.fromkeys(prompts, rows_of(viewmats_of(args.trajectory)))


def check_length(args, along: int, given: int) -> None:
    """ValueError if clips with so many given frames are longer than their path, of `along` frames; 0: there is none."""
    need(args, not along or given + args.frames <= along, "frames", f"at most {along - given}, for a path of {along} "
         f"frames{f', of which {given} are given' if given else ''}: walk on in "
         f"{'the prompt' if args.trajectory is None else '--trajectory'}, or change --frames")


def walked(paths: dict[str, Tensor], config, prompts: list[str], frames: int) -> dict[str, Tensor] | None:
    """What the network is told of the first so many frames under each prompt, besides words, `f row_width`; without a
    path, of a camera that stands still. None if it is told nothing."""
    if not config.row_width:
        return None
    still = rows_of(torch.eye(4)[None]).expand(frames, -1)
    return {prompt: paths[prompt][:frames] for prompt in prompts} if paths else dict.fromkeys(prompts, still)
