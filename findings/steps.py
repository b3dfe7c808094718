"""Do more steps make a DMD student worse (Salt Fig. 1)?

Three students, trained on grids of 4, 8 and 16 timesteps, each sampled at its own number of steps: from noised data, or
from states of their own (backward simulation), by the Euler and by the CM solver. A student of noised data whose levels
were each perfect would have the standard deviation that gaussian.gain says: with the Euler solver too much of it, the
more the more steps, with the CM solver the right one. The prediction is measured on this student (guidance 1); but for
the noise of its finite samples it is (gain - 1) times the data's width.
"""

from findings import gaussian
from findings.mixture import SIGNS, Ring, contrast, error, ratio, regime_map, regimes, samples, student_of
from flowmap import schedule

CLAIM = "Salt Fig. 1: DMD students of 4, 8, 16 steps get worse with more steps (over-exposed, details lost)"
ACROSS = "steps"
QUANTITIES = {"error": "sliced W2 distance to the teacher's samples (data variance is 1)",
              "contrast": "standard deviation within a label / the teacher's"}
PANELS = ("shift", "guidance")
SHOWN = {"updates": 600}


def cells(fast):
    return [{"states": states, "steps": k} | regime for regime in regimes(fast)
            for states in ("noised data", "own states") for k in (4, 8, 16)
            if states == "noised data" or regime["updates"] <= 600]  # own states take twice the time


def measure(cell, seeds, fast):
    name = f"DMD-{cell['steps']}" + (", own states" if cell["states"] == "own states" else "")
    net, world, rows = student_of(name, seeds, cell, fast), Ring(), []
    for solver in ("euler", "cm"):
        x = samples(net, world, solver, cell["steps"], cell["shift"])
        predicted = (None, None)
        if cell["states"] == "noised data" and cell["guidance"] == 1:
            perfect = samples(world.perfect_student, world, solver, cell["steps"], cell["shift"])
            grid = schedule(cell["steps"], cell["shift"])
            predicted = (*error(perfect, world, 1.0), gaussian.gain(gaussian.perfect_slope, world.width, grid, solver))
        for (quantity, measure_of), prediction in zip((("error", error), ("contrast", contrast)), predicted):
            rows.append(cell | {"solver": solver, "quantity": quantity, "predicted": prediction,
                                "measured": measure_of(x, world, cell["guidance"])})
    return rows


def summary(rows):
    def from_4_to_16(entry):
        at = {row["steps"]: row["measured"] for row in entry}
        return ratio(at[16], at[4]) if {4, 16} <= at.keys() else ""

    rows = [row for row in rows if row["quantity"] == "error"]
    return (f"**Error of the 16-step student / error of the 4-step student** {SIGNS}\n\n"
            + regime_map(rows, ("updates", "states", "solver"), from_4_to_16))
