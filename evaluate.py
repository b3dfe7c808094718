"""Measure and draw what a run on a world left: every stage on the same prompts and noise.

A row of the table is a finished stage, its weights (EMA or raw), a solver and a number of steps; its columns are the
world's metrics (worlds/toy.py, worlds/room.py) and the semigroup defect. Students that make the whole clip at once are
also asked, with their EMA weights, whether different numbers of steps lead from one noise to one clip (Salt Fig. 5),
and how bright one jump leaves a noised real clip. All of it runs in one process, on whole networks.
"""

import json
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from cluster.files import metadata_of, replacing, write_text
from config import STAGES, recorded
from flowmap import add_noise, sample, schedule, squared_error, to_x0
from model import SIZES, CausalWan
from rollout import joined, rollout_with_prompts
from sc_loss import path_defects
from stage import frozen, guide, is_finished, load_finished, path_of, record_of, rollout, video_shape
from wan21.weights import check_fit
from worlds import WORLDS
from worlds.draws import EVALUATE, noises
from worlds.toy import enlarged

TEACHER_STEPS = 40  # sampling steps of the multi-step teachers


def network(cfg, stage, suffix="") -> CausalWan:
    """A finished stage's network, frozen, whole."""
    config = SIZES[cfg.size]
    if STAGES[stage].windowed:
        config = replace(config, window=cfg.window or None, sink=cfg.sink)
    weights, net = load_finished(cfg, stage, suffix), CausalWan(config)
    check_fit(config, weights, path_of(cfg, stage, suffix))
    net.load_state_dict(weights)
    return frozen(net.to(cfg.device))


def as_trained(cfg, stage):
    """cfg with every setting that shaped a finished stage as it was then."""
    then = record_of(path_of(cfg, stage))["config"]
    shaped = {f.name: recorded(then, f.name, getattr(cfg, f.name)) for f in fields(cfg)
              if f.metadata["group"] != "none"}
    shaped = {k: tuple(v) if isinstance(v, list) else v for k, v in shaped.items()}
    for name, value in shaped.items():
        if not alike(value, getattr(cfg, name)):
            raise ValueError(f"got {path_of(cfg, stage)} with the setting {name} {str(value)[:40]}, expected such as "
                             f"{getattr(cfg, name)}: change --out, or train the stage again")
    if shaped["world"] not in ("", *WORLDS):
        raise ValueError(f"got {path_of(cfg, stage)}, trained on the world {shaped['world']}, expected one of "
                         f"{', '.join(WORLDS)}: change --out")
    return replace(cfg, **shaped)


def alike(a, b) -> bool:
    """Whether two settings are of one kind: numbers, texts, yes or no, or lists of such."""
    if isinstance(b, tuple):
        return isinstance(a, tuple) and len(a) > 0 and all(alike(x, b[0]) for x in a)
    kinds = (bool, int | float, str)
    return next(isinstance(a, kind) for kind in kinds if isinstance(b, kind))


@torch.no_grad()
def generate(cfg, stage, net, steps, labels, noise, solver="", given=None) -> Tensor:
    """Clips as this stage's model samples them. labels `b ...`; noise `b K f c h w` as in rollout.shared_noise. solver:
    of a student that makes the whole clip at once; "": its own. given: true first frames `b n c h w` to continue; n is
    a multiple of the chunk of a causal model."""
    text, how, grid = WORLDS[cfg.world].embed(labels).to(cfg.device), STAGES[stage], schedule(steps, cfg.shift)
    if not how.few_step:
        net, noise = guide(cfg, net, cfg.guidance), noise[:, :1]
    if how.causal and how.few_step and given is None:  # a first chunk with a grid of its own
        return joined(rollout(cfg, net, text, noise, steps))
    if how.causal:
        return continued(cfg, net, text, grid, noise, given, how.solver)
    stride = max(1, noise.shape[1] // steps)  # the grids nest: equal timesteps get equal noise

    def velocity(x, t):
        if given is None:
            return net(x, t, text)
        x, t = torch.cat([given, x[:, given.shape[1]:]], 1), torch.full(x.shape[:2], t, device=x.device)
        t[:, : given.shape[1]] = 0
        return net(x, t, text)

    x = sample(velocity, noise[:, ::stride], grid, solver or how.solver)
    return x if given is None else torch.cat([given, x[:, given.shape[1]:]], 1)


def continued(cfg, net, text, grid, noise, given, solver) -> Tensor:
    """Clips of a causal model that begin with given frames, or with none."""
    stride = max(1, noise.shape[1] // len(grid))

    def own(i, k):
        return noise[:, k * stride, i * cfg.chunk : (i + 1) * cfg.chunk]

    frames = cfg.frames - (0 if given is None else given.shape[1])
    made = rollout_with_prompts(net, own, [(0, text)], grid, chunk=cfg.chunk, frames=frames, given=given, solver=solver)
    return torch.cat(list(made), dim=1)


def evaluation_set(cfg, clips):
    """Real clips, labels and noise that no training ever draws: noise for twice as many steps as the largest K, every
    second one for K steps."""
    real, labels = WORLDS[cfg.world].clips(range(clips), cfg.frames, EVALUATE, cfg.eval_seed, 0)
    shape = max(cfg.mixed_steps), *video_shape(cfg)
    noise, between = (noises(range(clips), shape, EVALUATE, cfg.eval_seed, of) for of in (1, 2))
    noise = torch.stack([noise, between], dim=2).flatten(1, 2)
    return real.to(cfg.device), labels, noise.to(cfg.device)


def row(cfg, stage, weights, solver, steps, nfe, x, labels, sample_seconds, metadata, defect=0.0, asked=None) -> dict:
    asked = asked or {}
    return {"stage": stage, "weights": weights, "solver": solver, "steps": steps, "nfe": nfe,
            **WORLDS[cfg.world].measure(x, labels), **asked, "defect": defect, "sample_seconds": sample_seconds,
            "train_seconds": metadata.get("seconds", 0), "saved": metadata.get("saved"),
            "data_seconds": metadata.get("data_seconds", 0), "data_bytes": metadata.get("data_bytes", 0),
            "clips": cfg.eval_clips, "eval_seed": cfg.eval_seed, "teacher_steps": TEACHER_STEPS}


@torch.no_grad()
def composition(cfg, stage, net, real, labels, noise) -> float:
    """Mean semigroup defect along the 4-step path (Salt Eq. 14-16, A.1), behind the clean past where there is one."""
    text = WORLDS[cfg.world].embed(labels).to(cfg.device)
    layout = {"chunk": cfg.chunk, "clean": real} if STAGES[stage].causal else {}
    defects = path_defects(lambda x, t: net(x, t, text, **layout), noise[:, 0], schedule(4, cfg.shift),
                           schedule(8, cfg.shift))
    return sum(defects) / len(defects)


def agreement(x: Tensor, steps: int, fewer: dict[int, Tensor], real: Tensor) -> dict[str, float]:
    """Root mean square difference of samples x of so many steps and those of fewer (steps -> clips), from the same
    noise, in units of the standard deviation of real clips (Salt Fig. 5)."""
    return {f"{k}-{steps}": (squared_error(x, y).sqrt() / real.std()).item() for k, y in fewer.items() if k > 1}


@torch.no_grad()
def by_level(cfg, net, real, labels, noise) -> dict[str, list[float]]:
    """Brightness and contrast of what a student makes in one jump of noised real clips, at every time t of the 16-step
    grid, in which the grids of training lie."""
    world, grid = WORLDS[cfg.world], schedule(16, cfg.shift).tolist()
    text, light = world.embed(labels).to(cfg.device), []
    for t in grid:
        x_t = add_noise(real, noise[:, 0], t)
        light.append(world.light(to_x0(x_t, net(x_t, t, text), t)))
    return {"t": grid, **{name: [of[name] for of in light] for name in ("brightness", "contrast")}}


def evaluate(cfg, stage) -> list[dict]:
    """Table rows of a finished stage: EMA and raw weights at 1, 2 and 4 steps, teachers also at their full number,
    students that make the whole clip at once also at 8 and 16 steps and by another solver."""
    cfg, how = as_trained(cfg, stage), STAGES[stage]
    real, labels, noise = evaluation_set(cfg, cfg.eval_clips)
    metadata, rows = metadata_of(path_of(cfg, stage)), []
    for weights, suffix in (("ema", ""), ("raw", "_raw")):
        net = network(cfg, stage, suffix)
        sampled = net if how.few_step else guide(cfg, net, cfg.guidance)
        defect = composition(cfg, stage, sampled, real[:256], labels[:256], noise[:256])
        made = {}  # solver -> steps -> clips
        for solver, steps in rows_shown(cfg, stage, weights):
            began = time.time()
            parts = zip(labels.split(256), noise.split(256))
            x = torch.cat([generate(cfg, stage, net, steps, some, z, solver) for some, z in parts])
            nfe = steps if how.few_step or cfg.guidance == 1 else 2 * steps  # guidance runs the network twice
            seconds = time.time() - began
            asked = ask(cfg, stage, net, steps, solver, first=not rows) if weights == "ema" else {}
            rows.append(row(cfg, stage, weights, solver, steps, nfe, x, labels, seconds, metadata, defect, asked))
            if weights == "ema" and whole_clip_student(stage):
                fewer = made.setdefault(solver, {})
                rows[-1]["agreement"] = agreement(x, steps, fewer, real)
                fewer[steps] = x
                if steps == 1:
                    rows[-1]["by_level"] = by_level(cfg, net, real[:256], labels[:256], noise[:256])
    return rows


@torch.no_grad()
def ask(cfg, stage, net, steps, solver, first: bool) -> dict:
    """What the world asks of a model beyond clips of its own: to continue true ones, and, in the first row of a causal
    model that makes frame by frame, to jump from noise to each frame behind its true past."""
    world, n, jumps = WORLDS[cfg.world], min(32, cfg.eval_clips), first and STAGES[stage].causal and cfg.chunk == 1

    def make(labels, of, given=None):
        shape = max(cfg.mixed_steps), *video_shape(cfg)
        noise = noises(range(len(labels)), shape, EVALUATE, cfg.eval_seed, 3, of).to(cfg.device)
        return generate(cfg, stage, net, steps, labels, noise, solver, None if given is None else given.to(noise))

    def jump(labels, real):
        text, real = world.embed(labels).to(cfg.device), real.to(cfg.device)
        eps = noises(range(n), video_shape(cfg), EVALUATE, cfg.eval_seed, 4).to(cfg.device)
        return to_x0(eps, net(eps, 1.0, text, chunk=cfg.chunk, clean=real), 1.0)

    return world.ask(n, cfg.frames, cfg.chunk, make, jump if jumps else None, cfg.eval_seed)


def whole_clip_student(stage) -> bool:
    return STAGES[stage].few_step and not STAGES[stage].causal


def steps_shown(cfg, stage) -> tuple:
    """The numbers of steps at which a stage is measured, and drawn."""
    if not STAGES[stage].few_step:
        return TEACHER_STEPS, 4, 2, 1
    if STAGES[stage].causal:
        return 1, 2, 4
    return tuple(k for k in (1, 2, 4, 8, 16) if 2 * max(cfg.mixed_steps) % k == 0)


def rows_shown(cfg, stage, weights) -> list[tuple[str, int]]:
    """The solver and the number of steps of each row of a stage's EMA or raw weights."""
    own, steps = STAGES[stage].solver, steps_shown(cfg, stage)
    if weights == "raw":
        steps = [k for k in steps if k < 16] if STAGES[stage].few_step else steps[:1]
    rows = [(own, k) for k in steps]
    if weights == "ema" and whole_clip_student(stage):  # in one step all solvers are the same
        rows += [("euler" if own == "cm" else "cm", k) for k in steps if k > 1]
    return rows


def known_rows(cfg, stage) -> list[dict]:
    """Rows of an earlier evaluation of the very same weights with the same settings."""
    saved = record_of(path_of(cfg, stage))["saved"]
    same = {"stage": stage, "saved": saved, "clips": cfg.eval_clips, "teacher_steps": TEACHER_STEPS}
    rows = [r for r in table(cfg) if all(r.get(k) == v for k, v in same.items())]
    return rows if all(printable_row(cfg, r) for r in rows) else []


def printable_row(cfg, r) -> bool:
    """Whether a row holds all that is shown: an older version's, or one that somebody has edited, may not."""
    try:
        return bool(printed(cfg, r))
    except (KeyError, IndexError, TypeError, ValueError):
        return False


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


def printed(cfg, r) -> dict[str, str]:
    """A row as it is printed, header -> text; the world gives its own columns."""
    return {"stage": f"{r['stage']:<16}", "weights": f"{r['weights']:<7}", "solver": f"{r['solver']:<6}",
            "steps": f"{r['steps']:>5}", "NFE": f"{r['nfe']:>4} |", **WORLDS[cfg.world].columns(r),
            "defect": f"{r['defect']:>7.4f} |", "sample s": f"{r['sample_seconds']:>8.1f}",
            "train s": f"{r['train_seconds']:>7.0f}"}


def print_rows(cfg, rows, header=True):
    for i, r in enumerate(rows):
        texts = printed(cfg, r)
        if header and i == 0:
            left = ("stage", "weights", "solver")
            heads = [f"{k} |".rjust(len(v)) if v.endswith("|") else k.ljust(len(v)) if k in left else k.rjust(len(v))
                     for k, v in texts.items()]
            print(" ".join(heads))
        print(" ".join(texts.values()))
    sys.stdout.flush()


def print_whole_clip_students(rows):
    """The second table: what is asked only of students that make the whole clip at once."""
    differences = {}  # stage, solver -> pair of numbers of steps -> difference
    for r in rows:
        if r.get("agreement"):
            differences.setdefault((r["stage"], r["solver"]), {}).update(r["agreement"])
    if differences:
        print(f"\n{'stage':<16} {'solver':<6} | {'2 and 4':>8} {'4 and 8':>8} {'2 and 8':>8} steps from one noise "
              "differ by (the world's standard deviation: 1)")
    for (stage, solver), of in differences.items():
        print(f"{stage:<16} {solver:<6} | {of['2-4']:>8.4f} {of['4-8']:>8.4f} {of['2-8']:>8.4f}")
    for r in rows:
        if levels := r.get("by_level"):
            print(f"\n{r['stage']}: jump from t".ljust(29) + " ".join(f"{t:>6.3f}" for t in levels["t"]))
            for name in ("brightness", "contrast"):
                print(f"{name:<28}" + " ".join(f"{x:>6.3f}" for x in levels[name]))
    sys.stdout.flush()


def report_world(cfg) -> list[dict]:
    """The row of real clips, printed: what a perfect model would reach."""
    rows = [the_world(cfg)]
    print_rows(cfg, rows)
    return rows


def the_world(cfg) -> dict:
    real, labels, _ = evaluation_set(cfg, cfg.eval_clips)
    return row(cfg, "the world", "", "", 0, 0, real, labels, 0, {})


def report(cfg, stage) -> list[dict]:
    """The rows of a finished stage: known ones, or fresh ones, which are added to the table of --out and drawn."""
    rows, path = known_rows(cfg, stage), table_path(cfg)
    if not rows:
        rows = evaluate(cfg, stage)
        old = [r for r in table(cfg) if r["stage"] != stage and printable_row(cfg, r)]
        old = old if any(r["stage"] == "the world" for r in old) else [the_world(cfg), *old]
        write_text(path, json.dumps(old + rows, indent=1))
        draw_stages(cfg, {stage: steps_shown(as_trained(cfg, stage), stage)}, stage)
    print_rows(cfg, rows, header=False)
    return rows


def report_all(cfg, rows):
    """Draw all autoregressive stages side by side, teachers at 1, 2 and all steps and students at 2, and print the
    whole table."""
    shown = {stage: (2,) if STAGES[stage].few_step else (1, 2, TEACHER_STEPS) for stage in finished_stages(cfg)
             if STAGES[stage].causal}
    draw_stages(cfg, shown, "sheet", scale=10)
    print()
    print_rows(cfg, rows)
    print_whole_clip_students(rows)


def finished_stages(cfg) -> list[str]:
    return [stage for stage in STAGES if is_finished(cfg, stage)]


# ---------------------------------------------------------------------------------------------------------------------
# Images

def draw_stages(cfg, stages: dict[str, tuple], name, scale=5):
    """Clips of finished stages, each at so many steps, from the same six noises."""
    real, labels, _ = evaluation_set(cfg, 6)
    rows = {"the world": real}
    for stage, numbers_of_steps in stages.items():
        was = as_trained(cfg, stage)
        noise = evaluation_set(was, 6)[2]  # with as many steps as its own K
        net = network(was, stage)
        for steps in sorted(numbers_of_steps):
            rows[f"{stage} {steps}"] = generate(was, stage, net, steps, labels, noise)
    draw_clips(cfg, rows, Path(cfg.out) / name, scale)


def draw_clips(cfg, rows: dict[str, Tensor], path: Path, scale=5) -> None:
    """Clips of several models on the same prompts and noise, `label -> b f c h w`, as path.png and path.webp.

    The PNG shows the frames of the first two clips side by side, the WebP all clips, playing.
    """
    def labelled(strips):  # label -> bytes (h w 3); all of one size
        h, w, _ = next(iter(strips.values())).shape
        page = Image.new("RGB", (110 + w, (h + 4) * len(strips)), "white")
        for i, (label, strip) in enumerate(strips.items()):
            page.paste(Image.fromarray(strip), (110, i * (h + 4)))
            ImageDraw.Draw(page).text((4, i * (h + 4) + h // 2 - 6), label, fill="black")
        return page

    draw = WORLDS[cfg.world].draw if cfg.world else three_channels
    frames = {label: np.pad(draw(x, scale), [(0, 0)] * 2 + [(0, 2), (0, 2), (0, 0)]) for label, x in rows.items()}
    still = {label: rearrange(x[:2], "b f h w c -> h (b f w) c") for label, x in frames.items()}
    playing = [labelled({label: rearrange(x[:, i], "b h w c -> h (b w) c") for label, x in frames.items()})
               for i in range(next(iter(frames.values())).shape[1])]
    with replacing(path.with_suffix(".png")) as fresh:
        labelled(still).save(fresh, "png")
    with replacing(path.with_suffix(".webp")) as fresh:
        playing[0].save(fresh, "webp", save_all=True, append_images=playing[1:], duration=200, loop=0, quality=90)


def three_channels(x: Tensor, scale: int) -> np.ndarray:
    """Three channels of latents `... c h w` as bytes `... h w 3`, enlarged: a first look."""
    return enlarged(x[..., :3, :, :] * 0.25 + 0.5, scale)
