"""On pixels, too: students of the toy world that make the whole clip at once, by DMD alone and with L_SC.

DMD trains every timestep of its grid as a one-step generator by itself, on noised real clips. A sampler then walks down
the grid, through states that the student made. Salt says that DMD so trained gets worse with a denser grid and with
more steps, and that L_SC helps. Here that is measured with and without guidance of the teacher, by the Euler and by the
CM solver.

Nothing exact is known of a trained network, so `predicted` is None everywhere. ROOT has a folder for each training seed
and guidance, as `python train.py --stage STAGE --seed S --score-guidance W --out ROOT/seedS_wW` leaves it; a stage that
is finished there is not trained again.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from statistics import mean

import evaluate
import train
from cluster.files import replacing
from cluster.run_folder import alone_in
from config import STAGES, Config
from findings import markdown
from stage import is_finished, path_of

CLAIM = "Salt Tab. 4, Fig. 1, 5, A.1, on the clips of the toy world (two hours: it trains every student)"
QUANTITIES = {
    "render_error": "render error (the world's variance is 1)",
    "brightness": "mean pixel minus the world's (in the world's standard deviations)",
    "contrast": "contrast / the world's",
    "motion": "motion / the world's",
    "from_2_steps": "difference to the clip of 2 steps (in the world's standard deviations)",
    "from_4_steps": "difference to the clip of 4 steps (in the world's standard deviations)",
    "defect": "semigroup defect along the 4-step path",
    "jump_brightness": "brightness of one jump from noised real clips, minus the world's",
    "jump_contrast": "contrast of one jump from noised real clips / the world's",
}
ACROSS = dict.fromkeys(QUANTITIES, "steps") | {"jump_brightness": "timestep", "jump_contrast": "timestep"}
PANELS = ("score_guidance", "solver")
SEEDS = (1, 2, 3)  # the toy's settings were chosen on 0
ROOT = Path("runs/findings/pixels")


def cells(fast) -> list[dict]:
    if fast:
        return [{"stage": "dmd4", "score_guidance": 1.0}, {"stage": "sc_dmd", "score_guidance": 3.0}]
    return [{"stage": stage, "score_guidance": w} for w in (1.0, 3.0) for stage in ("dmd4", "dmd8", "dmd16", "sc_dmd")]


def measure(cell, seeds, fast) -> list[dict]:
    """Rows of one stage at one guidance, EMA weights, on prompts and noise of evaluation seed 1."""
    of_seeds = [rows_of(config_of(cell, seed, fast), cell["stage"]) for seed in seeds]
    found = []
    for solver, steps in of_seeds[0]:
        settings = cell | {"solver": solver, "steps": steps}
        for quantity in QUANTITIES:
            values = [value_of(rows[solver, steps], quantity) for rows in of_seeds]
            if None not in values:
                found.append(settings | {"quantity": quantity, "measured": values, "predicted": None})
    jumps = [rows["cm", 1]["by_level"] for rows in of_seeds]
    for name in ("brightness", "contrast"):
        for i, t in list(enumerate(jumps[0]["t"]))[::2]:
            found.append(cell | {"timestep": round(t, 3), "quantity": f"jump_{name}",
                                 "measured": [jump[name][i] for jump in jumps], "predicted": None})
    return found


def config_of(cell, seed, fast) -> Config:
    w = cell["score_guidance"]
    cfg = Config(seed=seed, stage=cell["stage"], score_guidance=w, out=str(ROOT / f"seed{seed}_w{w:g}"), eval_seed=1)
    small = dict(out=str(ROOT / "fast" / f"seed{seed}_w{w:g}"), train_longer=1e-3, eval_clips=8)
    return replace(cfg, **small) if fast else cfg


def rows_of(cfg, stage) -> dict:
    """Rows of the table of a stage's EMA weights, by solver and steps; it is trained before, if that is still to do."""
    if not is_finished(cfg, stage):
        with alone_in(cfg.out, STAGES):
            share_teacher(cfg)
            train.run_stage(cfg, "bidirectional")
            train.run_stage(cfg, stage)
    train.check_finished(cfg, stage)
    rows = {(r["solver"], r["steps"]): r for r in evaluate.report(cfg, stage) if r["weights"] == "ema"}
    one_step = rows[STAGES[stage].solver, 1]  # the same by every solver
    return {(solver, 1): one_step for solver in ("euler", "cm")} | rows


def share_teacher(cfg):
    """Copy the teacher of another guidance, on which it does not depend, if there is one and none here."""
    out = Path(cfg.out)
    for other in sorted(out.parent.glob(f"seed{cfg.seed}_w*")):
        there = replace(cfg, out=str(other))
        if not is_finished(cfg, "bidirectional") and is_finished(there, "bidirectional"):
            for suffix in ("_raw", ""):  # in the order in which a stage leaves them
                with replacing(path_of(cfg, "bidirectional", suffix)) as fresh:
                    shutil.copyfile(path_of(there, "bidirectional", suffix), fresh)


def value_of(row, quantity) -> float | None:
    """A quantity of a row of the table; None where the row has none."""
    if quantity == "defect":
        return row["defect"] if (row["solver"], row["steps"]) == ("euler", 4) else None
    if quantity.startswith("from_"):
        return row["agreement"].get(f"{quantity.split('_')[1]}-{row['steps']}")
    return row.get(quantity)


def summary(rows) -> str:
    """Render error and contrast of the students, each at its own number of steps (Salt Fig. 1), and all at 4 steps."""
    rows = [r for r in rows if "steps" in r]
    values = {(r["score_guidance"], r["solver"], r["stage"], r["steps"], r["quantity"]): r["measured"] for r in rows}
    regimes = list(dict.fromkeys((r["score_guidance"], r["solver"]) for r in rows))
    own = {"dmd4": 4, "dmd8": 8, "dmd16": 16}

    def entry(*key):
        if (*key, "render_error") not in values:
            return ""
        return f"{mean(values[*key, 'render_error']):.4f}, {mean(values[*key, 'contrast']):.3f}"

    def in_seeds(after, before):
        if not {(*after, "render_error"), (*before, "render_error")} <= values.keys():
            return ""
        worse = [x > y for x, y in zip(values[*after, "render_error"], values[*before, "render_error"])]
        return f"in {sum(worse)} of {len(worse)} seeds"

    by_k = [[f"{w:g}", solver, *(entry(w, solver, stage, k) for stage, k in own.items()),
             in_seeds((w, solver, "dmd16", 16), (w, solver, "dmd4", 4))] for w, solver in regimes]
    at_4 = [[f"{w:g}", solver, *(entry(w, solver, stage, 4) for stage in ("dmd4", "dmd8", "sc_dmd")),
             in_seeds((w, solver, "dmd8", 4), (w, solver, "dmd4", 4)),
             in_seeds((w, solver, "sc_dmd", 4), (w, solver, "dmd4", 4))] for w, solver in regimes]
    return "\n\n".join((
        "**Each student at its own number of steps** (render error, contrast)",
        markdown(["score_guidance", "solver", "dmd4, 4 steps", "dmd8, 8", "dmd16, 16", "dmd16 worse than dmd4"], by_k),
        "**All at 4 steps** (render error, contrast)",
        markdown(["score_guidance", "solver", "dmd4", "dmd8", "sc_dmd", "dmd8 worse than dmd4",
                  "sc_dmd worse than dmd4"], at_4)))
