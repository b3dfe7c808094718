"""What L_SC costs, and which sampler its student wants.

DMD from noised real data asks each timestep for the slope with which one jump gives the data; L_SC asks for slopes with
which steps compose (gaussian.py). A student of DMD has the right contrast under CM, and too much under Euler, the more
the more steps. With L_SC the contrast under Euler hardly depends on the steps any more, and under CM there is too
little. The price is paid at one step: with lambda the contrast rises there, because DMD, which wants each jump to give
the data, gets its compromise from a composing student of larger scale (chords.py). With guidance L_SC also keeps the
mean from being pushed again at each step, at the price of a larger push at the first.

The affine world: DMD and SC-DMD on 8 timesteps, critic of the pool, each timestep with parameters of its own; the
number behind SC-DMD is lambda. DMD starts as the composing student, so that it has to leave its start. The composing
student is not trained but sampled by flowmap.sample.
"""

from statistics import mean as average

from findings import markdown
from findings.affine import MEAN, VARIANCE, sample_law, train
from findings.gaussian import composing_slope, gain, perfect_slope, sampled_gain
from flowmap import schedule

CLAIM = "Salt, appendix Tab. 1: lambda .2 is best, .4 and 1 trade quality for semantics. Here: they trade contrast"
ACROSS = "steps"
QUANTITIES = {"contrast": "std of the samples / std of the data", "offset": "mean of the samples - mean of the data"}
PANELS = ("guidance", "solver")
STEPS, SHIFT, STD = (1, 2, 4, 8), 5.0, VARIANCE**0.5
LAMBDAS = {"DMD": 0.0, "SC-DMD 0.2": 0.2, "SC-DMD 1": 1.0, "SC-DMD 5": 5.0}
SLOPES = {"DMD": perfect_slope, "composing": composing_slope}  # known without guidance


def cells(fast):
    plain, guided = ([{"student": student, "guidance": w} for student in LAMBDAS] for w in (1.0, 4.0))
    composing = [{"student": "composing", "guidance": 1.0}]
    return plain[:2] + composing + guided[:1] if fast else plain + composing + guided


def measure(cell, seeds, fast):
    student, grid, rows = cell["student"], schedule(8, SHIFT).double(), []
    slope = SLOPES.get(student) if cell["guidance"] == 1 else None
    if student in LAMBDAS:
        params = train(seeds, 8, guidance=cell["guidance"], lambda_sc=LAMBDAS[student], updates=20 if fast else None,
                       start=composing_slope if student == "DMD" else perfect_slope)
    for solver in ("cm", "euler"):
        for steps in STEPS:
            path, settings = schedule(steps, SHIFT).double(), {**cell, "solver": solver, "steps": steps}
            if student in LAMBDAS:
                mean, variance = sample_law(params, grid, path, solver)
                contrast = (variance.sqrt() / STD).tolist()
                if cell["guidance"] > 1:
                    rows.append({**settings, "quantity": "offset", "measured": (mean - MEAN).tolist(),
                                 "predicted": None})
            else:
                contrast = [sampled_gain(slope, STD, path, solver, seed) for seed in seeds]
            rows.append({**settings, "quantity": "contrast", "measured": contrast,
                         "predicted": gain(slope, STD, path, solver) if slope else None})
    return rows


def summary(rows):
    """For each student and number of steps, the solver whose contrast is nearer to that of one step of DMD."""
    contrast = {(row["guidance"], row["student"], row["solver"], row["steps"]): average(row["measured"])
                for row in rows if row["quantity"] == "contrast"}
    body = []
    for w, student in dict.fromkeys(key[:2] for key in contrast):
        target, entries = contrast[w, "DMD", "cm", 1], []
        for steps in STEPS[1:]:
            errors = {solver: contrast[w, student, solver, steps] - target for solver in ("cm", "euler")}
            nearer, other = sorted(errors, key=lambda solver: abs(errors[solver]))
            entries.append(f"{nearer} ({errors[nearer]:+.2f}, {other} {errors[other]:+.2f})")
        body.append([f"{w:g}", student, *entries])
    return ("**Which solver keeps the contrast of the 1-step DMD student**\n\n"
            + markdown(["guidance", "student", "nearer at 2 steps", "4", "8"], body))
