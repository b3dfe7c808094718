"""Caches of few steps, mixed steps and alignment where structure can be lost (Salt Tab. 5): 25 tokens a frame.

The quilts of torus.py have four quarters, of which the prompt tells one: three colours, and where they are, stand in
the past alone, and a frame that has lost them is a bad past for the next. So the first question is the premise: are
frames worse behind a cache that was made in fewer steps? Then the rows of Salt's Table 5, each a stage 3 from the same
causal CD, one of them also with --first-steps 1. All are sampled with 4 steps for the first frame. (What alignment
aligns here is measured in alignment.py.)

The networks are train.py's, of 2 x 2 pixels a token. Nothing exact is known of them, so `predicted` is None. The runs
are in recipe.ROOT.
"""

from dataclasses import replace

from config import STAGES
from findings.recipe import beside, clips, settings_of, trained
from findings.torus import QUILTS as WORLD
from model import SIZES
from worlds.draws import EVALUATE, generator

SIZES["toy_fine"] = replace(SIZES["toy"], dim=64, ffn_dim=256, num_heads=4, patch_size=(1, 2, 2))
CLAIM = "Salt Tab. 5, 25 tokens a frame: naive L_SC hurts, mixed steps rescue it, alignment adds; caches of few steps"
ACROSS = {"render_error": "steps", "kept": "steps", "motion": "steps", "cache": "steps"}
QUANTITIES = {"render_error": "render error; the world's variance is 1",
              "kept": "share of the quarters that keep their colour, without the one in the prompt",
              "motion": "speed, over the world's",
              "cache": "frames 6 to 8, as frame 1 made in 4 steps (AR diffusion: 16), behind 4 of so many steps"}
PANELS, RANGE = ("none", "none"), (0, 0.1)
SEEDS = (0,)
CLIPS, STEPS, MANY = 256, (1, 2, 4, 8), 16
FIXED = dict(world="quilts", size="toy_fine", bidirectional_steps=4000, trajectory_steps=600, dmd_steps=120)
STUDENTS = {  # name -> stage, settings
    "causal CD": ("causal_cd", {}),
    "K = 4": ("causal_forcing_pp", {}),
    "naive L_SC": ("naive_sc", {}),
    "mixed": ("mixed_sc", dict(lambda_sc=0.0)),
    "mixed + L_SC": ("mixed_sc", {}),
    "mixed + L_SC + alignment": ("salt", {}),
    "mixed + L_SC, --first-steps 1": ("mixed_sc", dict(first_steps=1))}
CACHES = {"AR diffusion": (1, 2, 4, 8, MANY), "causal CD": STEPS, "K = 4": STEPS, "mixed + L_SC": STEPS}
BEFORE = ("bidirectional", "teacher_forcing", "causal_cd")


def run_of(seed, fast, stage, changes):
    """The run that has a stage with these settings."""
    first = trained(settings_of("quilts", seed, fast, **FIXED), BEFORE)
    if stage in BEFORE:
        return first
    name = "_".join(["quilts", stage, *(f"{k}{v}" for k, v in changes.items())])
    return trained(beside(first, settings_of(name, seed, fast, **FIXED | changes), BEFORE), (stage,))


def cells(fast):
    cells = [{"student": student} for student in STUDENTS] + [{"network": network} for network in CACHES]
    return [cells[5], cells[-1]] if fast else cells


def measure(cell, seeds, fast):
    of_seeds = [(of_student if "student" in cell else of_cache)(cell, seed, fast) for seed in seeds]
    return [cell | dict(key) | {"measured": [of[key] for of in of_seeds], "predicted": None} for key in of_seeds[0]]


def labels_of(n):
    return WORLD.draw_labels(n, 8, generator(EVALUATE, 1, 6))


def of_student(cell, seed, fast):
    """Clips of a student. As the function below: settings -> a number."""
    (stage, changes), labels = STUDENTS[cell["student"]], labels_of(8 if fast else CLIPS)
    cfg = replace(run_of(seed, fast, stage, changes), first_steps=4)
    measured = {steps: WORLD.measure(clips(cfg, stage, [(8, steps)], labels), labels)
                for steps in STEPS[: 1 if fast else None]}
    return {(("steps", steps), ("quantity", name)): of[name] for steps, of in measured.items()
            for name in ("render_error", "kept", "motion")}


def of_cache(cell, seed, fast):
    """The last three frames of clips whose first is made as well as can be, and four behind it in a number of steps."""
    network, labels = cell["network"], labels_of(8 if fast else CLIPS)
    stage, changes = STUDENTS.get(network, ("teacher_forcing", {}))
    cfg, last = run_of(seed, fast, stage, changes), 4 if fast or STAGES[stage].few_step else MANY
    measured = {steps: WORLD.measure(clips(cfg, stage, [(1, last), (4, steps), (3, last)], labels), labels, since=5)
                for steps in CACHES[network][: 1 if fast else None]}
    return {(("of", name), ("steps", steps), ("quantity", "cache")): of[name]
            for name in ("render_error", "kept", "motion") for steps, of in measured.items()}
