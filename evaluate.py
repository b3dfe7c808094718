"""Measure and draw what a run of the toy world left: every stage on the same prompts and noise.

A row of the table is a finished stage, its weights (EMA or raw) and a number of steps; its columns are data.measure's
metrics and the semigroup defect. All of it runs in one process, on whole networks.
"""

import json
import sys
import time
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

import data
from baselines import STAGES
from files import about_of, write_text
from flowmap import Guided, sample, schedule
from model import SIZES, CausalWan, load_weights
from rollout import stream
from sc_loss import path_defects
from stages import (
    EVALUATE,
    WORLD,
    finished,
    frozen,
    is_finished,
    null_text,
    path_of,
    record_of,
    self_rollout,
    video_shape,
)


def network(cfg, stage, kind="") -> CausalWan:
    """A finished stage's network, frozen, whole."""
    config = SIZES[cfg.size]
    if STAGES[stage].windowed:
        config = replace(config, window=cfg.window or None, sink=cfg.sink)
    path = path_of(cfg, stage, kind)
    return frozen(load_weights(CausalWan(config), finished(cfg, stage, kind), path).to(cfg.device))


def as_trained(cfg, stage):
    """cfg with every setting that shaped a finished stage as it was then."""
    then = record_of(path_of(cfg, stage))["config"]
    shaped = {f.name: then[f.name] for f in fields(cfg) if f.metadata["affects"] != "none" and f.name in then}
    shaped = {k: tuple(v) if isinstance(v, list) else v for k, v in shaped.items()}
    for name, value in shaped.items():
        if not alike(value, getattr(cfg, name)):
            raise ValueError(f"got {path_of(cfg, stage)} with the setting {name} {str(value)[:40]}, expected such as "
                             f"{getattr(cfg, name)}: change --out, or train the stage again")
    return replace(cfg, **shaped)


def alike(a, b) -> bool:
    """Whether two settings are of one kind: numbers, texts, yes or no, or lists of such."""
    if isinstance(b, tuple):
        return isinstance(a, tuple) and len(a) > 0 and all(alike(x, b[0]) for x in a)
    kinds = (bool, int | float, str)
    return next(isinstance(a, kind) for kind in kinds if isinstance(b, kind))


@torch.no_grad()
def generate(cfg, stage, net, steps, prompts, noise) -> Tensor:
    """Clips as this stage's model samples them. prompts `b`; noise `b K f c h w` as in rollout.shared_noise."""
    text, how, grid = data.embed(prompts).to(cfg.device), STAGES[stage], schedule(steps, cfg.shift)
    if how.causal and how.few_step:
        return self_rollout(cfg, net, text, noise, steps)[0]
    if not how.few_step:
        net, noise = Guided(net, null_text(cfg), cfg.guidance), noise[:, :1]
    if how.causal:
        chunks = stream(net, lambda i, k: noise[:, 0, i * cfg.chunk : (i + 1) * cfg.chunk], text, grid,
                        chunks=cfg.frames // cfg.chunk, solver=how.solver)
        return torch.cat([c.x0 for c in chunks], dim=1)
    stride = max(1, noise.shape[1] // steps)  # the grids nest: equal times get equal noise
    return sample(lambda x, t: net(x, torch.full(x.shape[:2], t, device=x.device), text), noise[:, ::stride], grid,
                  how.solver)


def evaluation_set(cfg, clips):
    """Real clips, prompts and noise that no training ever draws."""
    real, prompts = data.clips(range(clips), cfg.frames, EVALUATE, cfg.eval_seed, 0)
    noise = data.noises(range(clips), (max(cfg.mixed_steps), *video_shape(cfg)), EVALUATE, cfg.eval_seed, 1)
    return real.to(cfg.device), prompts, noise.to(cfg.device)


@lru_cache(maxsize=2)
def world_motion(frames: int) -> tuple[Tensor, Tensor]:
    """Speeds and turns of the world, what those of generated clips are compared with."""
    return data.motion(data.tracks(range(4096), frames, WORLD)[0])


def row(cfg, stage, weights, steps, nfe, x, prompts, sample_seconds, about, defect=0.0) -> dict:
    measured = data.measure(x, prompts, world_motion(cfg.frames))
    return {"stage": stage, "weights": weights, "steps": steps, "nfe": nfe, **measured,
            "defect": defect,
            "sample_seconds": sample_seconds, "train_seconds": about.get("seconds", 0), "saved": about.get("saved"),
            "data_seconds": about.get("data_seconds", 0), "data_bytes": about.get("data_bytes", 0),
            "clips": cfg.eval_clips, "eval_seed": cfg.eval_seed, "teacher_eval_steps": cfg.teacher_eval_steps}


@torch.no_grad()
def composition(cfg, stage, net, real, prompts, noise) -> float:
    """Mean semigroup defect along the 4-step path (Salt Eq. 14-16, A.1), behind the clean past where there is one."""
    text = data.embed(prompts).to(cfg.device)
    layout = {"chunk": cfg.chunk, "clean": real} if STAGES[stage].causal else {}

    def velocity(x, t):
        return net(x, torch.full(x.shape[:2], t, device=x.device), text, **layout)

    defects = path_defects(velocity, noise[:, 0], schedule(4, cfg.shift), schedule(8, cfg.shift))
    return sum(defects) / len(defects)


def evaluate(cfg, stage) -> list[dict]:
    """Table rows of a finished stage: EMA and raw weights at 1, 2 and 4 steps, teachers also at their full number."""
    cfg, how = as_trained(cfg, stage), STAGES[stage]
    real, prompts, noise = evaluation_set(cfg, cfg.eval_clips)
    about, rows = about_of(path_of(cfg, stage)), []
    for weights, kind in (("ema", ""), ("raw", "_raw")):
        net = network(cfg, stage, kind)
        sampled = net if how.few_step else Guided(net, null_text(cfg), cfg.guidance)
        defect = composition(cfg, stage, sampled, real[:256], prompts[:256], noise[:256])
        for steps in steps_shown(cfg, stage):
            start = time.time()
            parts = zip(prompts.split(256), noise.split(256))
            x = torch.cat([generate(cfg, stage, net, steps, p, z) for p, z in parts])
            nfe = steps if how.few_step else 2 * steps  # guidance runs the network twice
            rows.append(row(cfg, stage, weights, steps, nfe, x, prompts, time.time() - start, about, defect))
            if weights == "raw" and not how.few_step:
                break
    return rows


def steps_shown(cfg, stage) -> tuple:
    if not STAGES[stage].few_step:
        return cfg.teacher_eval_steps, 4, 2, 1
    return (1, 2, 4) if STAGES[stage].causal else tuple(k for k in (1, 2, 4, 8) if max(cfg.mixed_steps) % k == 0)


def known_rows(cfg, stage) -> list[dict]:
    """Rows of an earlier evaluation of the very same weights with the same settings."""
    saved = record_of(path_of(cfg, stage))["saved"]
    same = {"stage": stage, "saved": saved, "clips": cfg.eval_clips, "teacher_eval_steps": cfg.teacher_eval_steps}
    rows = [r for r in table(cfg) if all(r.get(k) == v for k, v in same.items())]
    return rows if all(printable_row(r) for r in rows) else []


def printable_row(r) -> bool:
    """Whether a row holds all that is shown: an older version's, or one that somebody has edited, may not."""
    numbers = "steps nfe quality drift semantic dynamics distance defect sample_seconds train_seconds".split()
    return isinstance(r.get("weights"), str) and all(isinstance(r.get(name), float | int) for name in numbers) and len(
        [x for x in r.get("quality_by_frame") or [] if isinstance(x, float | int)]) > 2


def table(cfg) -> list[dict]:
    """The rows of the table in --out. ValueError if it is no such table."""
    path = table_path(cfg)
    try:
        rows = json.loads(path.read_text()) if path.exists() else []
        if not (isinstance(rows, list) and all(isinstance(r, dict) and "stage" in r for r in rows)):
            raise ValueError("it is no list of rows")
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"got a damaged {path} ({e}), expected the table of an earlier run: move it away, or change "
                         "--out") from e
    return rows


def table_path(cfg) -> Path:
    return Path(cfg.out) / f"table_seed{cfg.eval_seed}.json"


def print_rows(rows, header=True):
    if header:
        print(f"{'stage':<16} {'weights':<7} {'steps':>5} {'NFE':>4} | {'quality':>8} {'frame 3':>8} {'last':>8} "
              f"{'drift':>6} {'semantic':>8} {'dynamics':>8} {'distance':>8} {'defect':>7} | {'sample s':>8} "
              f"{'train s':>8}")
    for r in rows:
        q, semantic = r["quality_by_frame"], 100 * r["semantic"]
        print(f"{r['stage']:<16} {r['weights']:<7} {r['steps']:>5} {r['nfe']:>4} | {r['quality']:>8.4f} {q[2]:>8.4f} "
              f"{q[-1]:>8.4f} {r['drift']:>6.2f} {semantic:>7.1f}% {r['dynamics']:>8.2f} {r['distance']:>8.3f} "
              f"{r['defect']:>7.4f} | {r['sample_seconds']:>8.1f} {r['train_seconds']:>8.0f}")
    sys.stdout.flush()


def draw_sheet(cfg, stages, name):
    """Pictures of finished stages at 1, 2, 4 steps (teachers also at their full number) on the same six clips."""
    real, prompts, _ = evaluation_set(cfg, 6)
    rows = {"the world": real}
    for stage in stages:
        was = as_trained(cfg, stage)
        noise = evaluation_set(was, 6)[2]  # with as many steps as its own K
        net = network(was, stage)
        for steps in sorted(steps_shown(was, stage)):
            rows[f"{stage} {steps}"] = generate(was, stage, net, steps, prompts, noise)
    data.sheet(rows, Path(cfg.out) / name)


def report(cfg, stage) -> list[dict]:
    """The rows of a finished stage: known ones, or fresh ones, which are added to the table of --out and drawn."""
    rows, path = known_rows(cfg, stage), table_path(cfg)
    if not rows:
        rows = evaluate(cfg, stage)
        old = table(cfg) or [the_world(cfg)]
        write_text(path, json.dumps([r for r in old if r["stage"] != stage] + rows, indent=1))
        draw_sheet(cfg, [stage], stage)
    print_rows(rows, header=False)
    return rows


def the_world(cfg) -> dict:
    """The row of real clips: what a perfect model would reach."""
    real, prompts, _ = evaluation_set(cfg, cfg.eval_clips)
    return row(cfg, "the world", "", 0, 0, real, prompts, 0, {})


def finished_stages(cfg) -> list[str]:
    return [stage for stage in STAGES if is_finished(cfg, stage)]
