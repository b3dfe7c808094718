"""Clips of eight times the length that students were trained on: what they may remember, and where that leads.

A student of 8-frame clips makes 64. Past the eighth frame it is told of more frames than it ever was, unless its memory
is a window of the latest ones; a sink keeps the first frame in the window. RoPE tells two frames their distance and
nothing else, so to a window without a sink it is all one whether positions are counted from the start of the clip or
inside the window. To a sink it is not: counted from the start, it is further away than any frame was in training.

Nothing exact is known of a trained network, so `predicted` is None. ROOT has a folder for each training seed, as
`python train.py --seed S --out ROOT/toy_seedS` leaves it; a stage that is finished there is not trained again.
"""

from pathlib import Path

import torch

import train
from cluster.run_folder import alone_in
from config import RECIPE, STAGES, Config, config_of
from evaluate import network
from rollout import grids, joined, stream
from stage import is_finished, video_shape
from worlds import WORLDS
from worlds.draws import EVALUATE, generator, noises

CLAIM = "Salt Tab. 3, LongLive: students make clips many times as long as in training; a short window and a sink help"
ACROSS = {"render_error": "frame", "at_the_end": "of"}
QUANTITIES = {"render_error": "render error, this frame and three before",
              "at_the_end": "contrast and motion over the world's, share of clips that show their prompt, same frames"}
PANELS = ("of", "student")
RANGE = (0.02, 0.05)
SEEDS = (0,)
ROOT = Path("runs/findings/recipe")
FRAMES, CLIPS = (8, 16, 32, 64), 64
METRICS = {"contrast": "contrast", "motion": "motion", "prompt": "prompt_accuracy"}
MEMORIES = [  # the window, and where the position of a sink of one frame is counted from
    ("all", "none"), (8, "none"), (4, "none"), (8, "relative"), (8, "absolute"), (4, "relative")]
ASKED = {"causal_cd": MEMORIES[:2], "salt": MEMORIES}


def cells(fast):
    cells = [{"student": student, "window": window, "sink": sink}
             for student, memories in ASKED.items() for window, sink in memories]
    return cells[-2:] if fast else cells


def measure(cell, seeds, fast):
    frames, world = FRAMES[:2] if fast else FRAMES, WORLDS["toy"]
    memory = dict(window=frames[-1] if cell["window"] == "all" else cell["window"], sink=int(cell["sink"] != "none"),
                  relative=cell["sink"] == "relative")
    labels, made, rows = world.draw_labels(4 if fast else CLIPS, frames[-1], generator(EVALUATE, 1, 6)), [], []
    for seed in seeds:
        cfg = recipe("toy", seed, fast)
        trained(cfg, RECIPE)
        made.append(long_clips(cfg, cell["student"], memory, labels, frames[-1]))
    for frame in frames:
        found = [world.measure(x[:, frame - 4 : frame], labels) for x in made]
        rows.append({"quantity": "render_error", "frame": frame, "measured": [of["render_error"] for of in found]})
        rows += [{"quantity": "at_the_end", "of": f"{word} at {frame}", "measured": [of[name] for of in found]}
                 for word, name in METRICS.items() if frame in (frames[0], frames[-1])]
    return [cell | row | {"predicted": None} for row in rows]


@torch.no_grad()
def long_clips(cfg, student, memory, labels, frames):
    """Clips `b frames c h w` of a student's EMA weights at 2 steps; memory: what model.Cache keeps."""
    net, (grid, first_grid) = network(cfg, student), grids(2, cfg.shift, cfg.first_steps)

    def noise(i, k):
        return noises(range(len(labels)), (1, *video_shape(cfg)[1:]), EVALUATE, cfg.eval_seed, 7, i, k)

    return joined(stream(net, noise, WORLDS["toy"].embed(labels), grid, num_chunks=frames, first_grid=first_grid,
                         cache=net.new_cache(**memory)))


def recipe(name, seed, fast, **changes) -> Config:
    """The settings of a run of the recipe, in its folder of ROOT."""
    small = dict(train_longer=1e-3, batch=2, critic_steps=1) if fast else {}
    out = ROOT / ("fast" * fast) / f"{name}_seed{seed}"
    return config_of({"seed": seed, "eval_seed": 1, "out": str(out), **changes, **small})


def trained(cfg, stages):
    """Train the stages that are not finished."""
    for stage in stages:
        if not is_finished(cfg, stage):
            with alone_in(cfg.out, STAGES):
                train.run_stage(cfg, stage)
            if not is_finished(cfg, stage):
                raise KeyboardInterrupt  # it has been asked to stop, and has saved
        train.check_finished(cfg, stage)
