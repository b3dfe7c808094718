"""Drift on pixels in a world that adds up (CF++ Fig. 5), and causal ODE against causal CD there (CF++ Fig. 3).

The balls of torus.py mostly fly with the wind of their prompt, and no wall brings them back. Guidance makes the
likelier step likelier still, so that balls run ahead of the world's, further with every frame. Predicted is how far,
for frames that follow guided_way exactly.

The networks are train.py's. AR diffusion is the teacher, sampled in 32 steps; causal CD follows it with guidance,
causal DMD has it for its teacher, both are sampled in 4 steps. Then causal ODE by the number of stored trajectories, at
equal compute, counted as in stage_two.py: 900 updates of causal CD, the recipe's, are 172,800 clips through a network;
a stored trajectory takes 48 x 2 x 2, an update of causal ODE 16 x 2 x 3. The 190 updates of causal DMD are as many
without guidance. The runs are in recipe.ROOT.
"""

from config import STAGES, Config
from findings.recipe import beside, clips, settings_of, trained
from findings.torus import BALLS as WORLD
from findings.torus import along_the_world, come_along, guided_way
from worlds.draws import EVALUATE, generator
from worlds.toy import SPEED, speeds_and_turns

CLAIM = "CF++ Fig. 5, 3 on pixels, where history adds up: causal DMD drifts; causal CD at least level with causal ODE"
ACROSS = dict.fromkeys(("drift", "render_error", "motion"), "frame") | dict.fromkeys(
    ("stored", "stored_w1", "stored_drift"), "stored")
QUANTITIES = {"drift": "ahead of the world's balls, in standard deviations",
              "render_error": "render error of this frame and the three before; the world's variance is 1.5",
              "motion": "speed, over the world's, of the same frames",
              "stored": "render error by stored trajectories (CD: none); compute in clips through a network",
              "stored_w1": "the same: distance (W1) of speeds and of turning angles to the world's",
              "stored_drift": "the same: ahead of the world's balls at frame 8, in standard deviations"}
PANELS = ("none", "guidance")
SEEDS = (0,)
FRAMES, CLIPS, MANY = (4, 8, 16, 32, 64), 256, 32
FULL, QUARTER = 172_800, 43_200  # compute, in clips through a network
STORED = {FULL: (1, 10, 100), QUARTER: (1, 10)}
WATCHED = {  # (student, guidance) -> stage, settings
    ("AR diffusion", 1.0): ("teacher_forcing", dict(guidance=1.0)),
    ("AR diffusion", 1.5): ("teacher_forcing", {}),
    ("AR diffusion", 3.0): ("teacher_forcing", dict(guidance=3.0)),
    ("causal CD", 1.5): ("causal_cd", {}),
    ("causal CD", 3.0): ("causal_cd", dict(guidance=3.0)),
    ("causal DMD", 1.0): ("causal_dmd", dict(dmd_steps=190, score_guidance=1.0)),
    ("causal DMD", 1.5): ("causal_dmd", dict(dmd_steps=190, score_guidance=1.5)),
    ("causal DMD", 3.0): ("causal_dmd", dict(dmd_steps=190, score_guidance=3.0))}


def ode(stored: int, compute: int) -> dict:
    """Settings of causal ODE for so many clips through a network, its trajectories among them."""
    return dict(trajectories=stored, trajectory_steps=(compute - 192 * stored) // 96)


def run_of(seed, fast, stage, changes):
    """The run that has a stage with these settings."""
    fixed = dict(world="torus", bidirectional_steps=3000, teacher_forcing_steps=2000)
    teachers = trained(settings_of("torus", seed, fast, **fixed), ("bidirectional", "teacher_forcing"))
    cfg = settings_of("torus", seed, fast, **fixed | changes)
    if changes and stage != "teacher_forcing":
        name = "_".join(["torus", stage, *(f"{k}{v}" for k, v in changes.items())])
        cfg = beside(teachers, settings_of(name, seed, fast, **fixed | changes), ("bidirectional", "teacher_forcing"))
    return trained(cfg, (stage,))


def cells(fast):
    watched = [{"student": student, "guidance": w} for student, w in WATCHED]
    stored = [{"method": "causal ODE", "stored": n, "compute": compute} for compute in STORED for n in STORED[compute]]
    stored += [{"method": "causal CD", "stored": 0, "compute": compute} for compute in STORED]
    return [watched[3], stored[0]] if fast else watched + stored


def measure(cell, seeds, fast):
    found = of_long_clips if "student" in cell else of_stored
    of_seeds, exact = [found(cell, seed, fast) for seed in seeds], predicted(cell)
    return [cell | dict(key) | {"measured": [of[key] for of in of_seeds], "predicted": exact.get(key)}
            for key in of_seeds[0]]


def labels_of(n):
    return WORLD.draw_labels(n, 8, generator(EVALUATE, 1, 6))


def ahead(distance: float, frame: int) -> float:
    """Of the world's balls, in standard deviations of theirs; distance: along the wind, pixels, a mean over clips."""
    mean, std = along_the_world(frame)
    return round((distance - mean) / std, 9) or 0.0  # which is not -0


def predicted(cell) -> dict:
    """Settings -> a number. 0 without guidance."""
    way = guided_way(cell.get("guidance", Config.guidance), FRAMES[-1])
    if "student" in cell:
        return {(("frame", frame), ("quantity", "drift")): ahead(way[frame - 1].item(), frame) for frame in FRAMES}
    return {(("steps", steps), ("quantity", "stored_drift")): ahead(way[7].item(), 8) for steps in (1, 4)}


def of_long_clips(cell, seed, fast):
    """Clips of FRAMES[-1] frames in a window of 8. As the function below: settings -> a number."""
    stage, changes = WATCHED[cell["student"], cell["guidance"]]
    n, steps = (CLIPS, 4) if STAGES[stage].few_step else (CLIPS // 2, MANY)
    frames, steps, labels = (FRAMES[:2], 2, labels_of(4)) if fast else (FRAMES, steps, labels_of(n))
    x = clips(run_of(seed, fast, stage, changes), stage, [(frames[-1], steps)], labels, window=8)
    xy, _, distance = WORLD.track(x, labels)
    come, found = come_along(xy, labels).mean(0), {}
    for frame in frames:
        latest = slice(frame - 4, frame)
        for quantity, value in (("drift", ahead(come[frame - 1].item(), frame)),
                                ("render_error", distance[:, latest].mean().item()),
                                ("motion", speeds_and_turns(xy[:, latest])[0].mean().item() / SPEED)):
            found[("frame", frame), ("quantity", quantity)] = value
    return found


def of_stored(cell, seed, fast):
    """A student of causal ODE or causal CD in one step and in four."""
    compute, stored = cell["compute"], cell["stored"]
    if cell["method"] == "causal ODE":
        stage, changes = "causal_ode", ode(stored, compute)
    else:
        stage, changes = "causal_cd", {} if compute == FULL else dict(trajectory_steps=900 * compute // FULL)
    cfg, labels, found = run_of(seed, fast, stage, changes), labels_of(8 if fast else CLIPS), {}
    for steps in (1, 4):
        x = clips(cfg, stage, [(8, steps)], labels)
        measured, come = WORLD.measure(x, labels), come_along(WORLD.track(x, labels)[0], labels).mean(0)
        for quantity, value in (("stored", measured["render_error"]), ("stored_w1", measured["motion_w1"]),
                                ("stored_drift", ahead(come[7].item(), 8))):
            found[("steps", steps), ("quantity", quantity)] = value
    return found
