"""Is shortcut flow matching (SCFM) far worse than DMD, and its hybrid with DMD worse still (Salt, appendix Tab. 1)?

SCFM asks a step to go where two half steps go, and the smallest step to go where the teacher goes: regression with a
target that learns, on a dense grid of 32 timesteps. Salt's reason against the hybrid: DMD trains 4 timesteps, so the
composed branch passes through others that nobody matches to the data. Where it could turn bad, and is looked for here:
more weight on the shortcuts, sampling steps that DMD never trains (8 steps), labels of two narrow bumps, whose mean a
regression could learn, a guided teacher, a weak teacher, and few or many updates.
"""

from findings import markdown
from findings.mixture import SIGNS, Ring, error, ratio, samples, student_of

CLAIM = "Salt, appendix Tab. 1: at 4 steps SCFM is far worse than DMD-4, the naive hybrid DMD + SCFM worse still"
ACROSS = "steps"
QUANTITIES = {"error": "sliced W2 distance to the teacher's samples (data variance is 1)"}
PANELS = ("world", "guidance")
SHOWN = {"updates": 600, "shift": 5.0}
NAMES = ("DMD-4", "SC-DMD 0.2", "SCFM", "DMD-4 + 0.1 SCFM", "DMD-4 + 1 SCFM", "DMD-4 + 10 SCFM")
WORLDS = {"one bump a label": Ring(), "two bumps a label": Ring(bumps=8, labels=4, width=0.15),
          "one bump, weak teacher": Ring()}


def cells(fast):
    if fast:
        return [{"student": name, "world": "one bump a label", "shift": 5.0, "guidance": 1.0, "updates": 10}
                for name in NAMES]
    one_bump = [("one bump a label", *of) for of in ((5.0, 150), (5.0, 600), (5.0, 2400), (1.0, 600))]
    others = [(world, 5.0, 600) for world in list(WORLDS)[1:]]
    settings = [(world, shift, w, updates) for world, shift, updates in one_bump + others for w in (1.0, 4.0)]
    return [{"student": name, "world": world, "shift": shift, "guidance": w, "updates": updates}
            for world, shift, w, updates in settings for name in NAMES]


def measure(cell, seeds, fast):
    world, weak = WORLDS[cell["world"]], ", weak teacher" if "weak" in cell["world"] else ""
    net = student_of(cell["student"] + weak, seeds, cell, fast, world)
    return [cell | {"solver": solver, "steps": k, "quantity": "error", "predicted": None,
                    "measured": error(samples(net, world, solver, k, cell["shift"]), world, cell["guidance"])}
            for solver in ("euler", "cm") for k in (1, 2, 4, 8)]


def summary(rows):
    keys, others = ("world", "shift", "guidance", "updates", "solver"), (*NAMES[2:], "SC-DMD 0.2")
    body = []
    for setting in dict.fromkeys(tuple(row[k] for k in keys) for row in rows):
        of = {row["student"]: row["measured"] for row in rows
              if tuple(row[k] for k in keys) == setting and row["steps"] == 4}
        body.append([*(f"{x:g}" if isinstance(x, float) else str(x) for x in setting),
                     *(ratio(of[name], of["DMD-4"]) for name in others)])
    return f"**Error at 4 steps / error of DMD-4** {SIGNS}\n\n" + markdown([*keys, *others], body)
