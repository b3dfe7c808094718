"""What stage 3 starts from, on pixels: five kinds of stage 2, and what each becomes (CF++ Tab. 2, Fig. 5; Salt Tab. 5).

What initialisation.py, drift.py and cache.py ask in exact worlds is asked again in the toy world, of students that
train.py trains: all of stage 2 for the same number of clips through a network, data among them (AR diffusion is the
start of the others, and pays nothing); stage 3 with one student for each of 1, 2 and 4 steps. Nothing exact is known of
them, so `predicted` is None. The runs are in recipe.ROOT.

Compute is counted in clips through a network; a backward is two, the two streams of teacher forcing are two clips, and
guidance is a second one. 900 updates of causal CD, the recipe's, take 900 x 16 x 2 x (3 + 1 + 2) = 172,800. Either ODE
pays 98,304 of them for its trajectories, those of the bidirectional teacher have one stream.
"""

from config import STAGES
from findings.recipe import beside, clips, settings_of, trained
from worlds import WORLDS
from worlds.draws import EVALUATE, generator

WORLD = WORLDS["toy"]
CLAIM = "CF++ Tab. 2, Fig. 5, Salt Tab. 5 on pixels: five starts of stage 3, their drift, caches of few steps"
ACROSS = {"render_error": "start", "motion": "start", "motion_w1": "start", "long": "frame", "cache": "steps"}
QUANTITIES = {"render_error": "render error; the world's variance is 1",
              "motion": "motion, over the world's",
              "motion_w1": "distance (W1) of speeds and of turning angles to the world's",
              "long": "clips of 64 frames in a window of 8: this frame and the three before it",
              "cache": "frames 6 to 8, made in 4 steps (AR diffusion: 16), behind 5 frames of so many steps"}
PANELS, RANGE = ("none", "stage"), (0, 0.08)
SEEDS = (0, 1, 2)
METRICS = ("render_error", "motion", "motion_w1")
CLIPS, LONG_CLIPS, FRAMES, MANY = 256, 32, (8, 16, 32, 64), 16  # MANY: steps of AR diffusion
CLIPS_THROUGH, DMD_UPDATES = 172_800, 60  # of stage 2; of stage 3, short, so that the start is still seen
STARTS = {  # name -> stage, settings
    "bidirectional ODE": ("bidirectional_ode", dict(trajectories=1024, trajectory_steps=1552)),
    "AR diffusion": ("teacher_forcing", {}),
    "causal ODE": ("causal_ode", dict(trajectories=512, trajectory_steps=776)),
    "causal DMD": ("causal_dmd", dict(dmd_steps=190)),
    "causal CD": ("causal_cd", {})}
GUIDED = {  # student -> stage, settings, steps of the clips that are watched for long
    "AR diffusion, w 1.5": ("teacher_forcing", dict(guidance=1.5), MANY),
    "AR diffusion, w 3": ("teacher_forcing", dict(guidance=3.0), MANY),
    "causal CD, w 1.5": ("causal_cd", {}, 4),
    "causal DMD, w 1": ("causal_dmd", dict(dmd_steps=190), 4),
    "causal DMD, w 1.5": ("causal_dmd", dict(dmd_steps=190, score_guidance=1.5), 4)}
CACHES = {"AR diffusion": (1, 2, 4, 8, MANY), "causal CD": (1, 2, 4, 8), "causal CD, stage 3 of 4 steps": (1, 2, 4, 8)}


def run_of(seed, fast, stage, changes):
    """The run that has a stage with these settings."""
    recipe = trained(settings_of("toy", seed, fast), ("bidirectional", "teacher_forcing"))
    if not changes or stage == "teacher_forcing":
        cfg = settings_of("toy", seed, fast, **changes)
    else:
        name = "_".join([stage, *(f"{k}{v}" for k, v in changes.items())])
        cfg = beside(recipe, settings_of(name, seed, fast, **changes), ("bidirectional", "teacher_forcing"))
    return trained(cfg, (stage,))


def stage_three(seed, fast, start, steps):
    """The run of the student of so many steps that starts from one of STARTS."""
    stage, changes = STARTS[start]
    before, name = run_of(seed, fast, stage, changes), f"stage3_{stage}_{steps}"
    cfg = settings_of(name, seed, fast, **changes | dict(init=stage, rollout_steps=steps, dmd_steps=DMD_UPDATES))
    return trained(beside(before, cfg, {"bidirectional", "teacher_forcing", stage}), ("causal_forcing_pp",))


def cells(fast):
    starts = [{"start": start, "stage": 2} for start in STARTS]
    starts += [{"start": start, "stage": 3, "steps": steps} for start in STARTS for steps in (1, 2, 4)]
    if fast:
        return [starts[-3], {"student": "causal DMD, w 1.5"}, {"network": "causal CD"}]
    return starts + [{"student": student} for student in GUIDED] + [{"network": network} for network in CACHES]


def measure(cell, seeds, fast):
    found = of_start if "start" in cell else of_long_clips if "student" in cell else of_cache
    of_seeds = [found(cell, seed, fast) for seed in seeds]
    return [cell | dict(key) | {"measured": [of[key] for of in of_seeds], "predicted": None} for key in of_seeds[0]]


def labels_of(n):
    return WORLD.draw_labels(n, 8, generator(EVALUATE, 1, 6))


def of_start(cell, seed, fast):
    """A student of stage 2, or of stage 3 by where it started. As the two functions below: settings -> a number."""
    start, labels = cell["start"], labels_of(8 if fast else CLIPS)
    cfg, student = run_of(seed, fast, *STARTS[start]), STARTS[start][0]
    if cell["stage"] == 3:
        cfg, student = stage_three(seed, fast, start, cell["steps"]), "causal_forcing_pp"
    measured = {steps: WORLD.measure(clips(cfg, student, [(8, steps)], labels), labels)
                for steps in ((cell["steps"],) if "steps" in cell else (1, 2, 4))}
    return {(("steps", steps), ("quantity", name)): of[name] for steps, of in measured.items() for name in METRICS}


def of_long_clips(cell, seed, fast):
    (stage, changes, steps), labels = GUIDED[cell["student"]], labels_of(4 if fast else LONG_CLIPS)
    frames, steps = (FRAMES[:1], 2) if fast else (FRAMES, steps)
    x = clips(run_of(seed, fast, stage, changes), stage, [(frames[-1], steps)], labels, window=8)
    measured = {frame: WORLD.measure(x[:, frame - 4 : frame], labels) for frame in frames}
    return {(("of", name), ("frame", frame), ("quantity", "long")): of[name]
            for name in ("render_error", "contrast", "motion") for frame, of in measured.items()}


def of_cache(cell, seed, fast):
    (start, _, later), labels = cell["network"].partition(","), labels_of(8 if fast else CLIPS)
    cfg, stage = run_of(seed, fast, *STARTS[start]), STARTS[start][0]
    if later:
        cfg, stage = stage_three(seed, fast, start, 4), "causal_forcing_pp"
    last = 4 if fast or STAGES[stage].few_step else MANY
    measured = {steps: WORLD.measure(clips(cfg, stage, [(5, steps), (3, last)], labels)[:, 5:], labels)
                for steps in CACHES[cell["network"]][: 1 if fast else None]}
    return {(("of", name), ("steps", steps), ("quantity", "cache")): of[name]
            for name in ("render_error", "contrast", "motion") for steps, of in measured.items()}
