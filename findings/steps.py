"""Do more steps make a DMD student worse (Salt Fig. 1)?

Three students, trained on grids of 4, 8 and 16 timesteps, each sampled at its own number of steps: from noised data, or
from states of their own (backward simulation), by the Euler and by the CM solver. A student of noised data whose levels
were each perfect would have the standard deviation that gaussian.gain says: with the Euler solver too much of it, the
more the more steps, with the CM solver the right one. For data of one Gaussian a label (guidance 1), that makes a
sliced Wasserstein distance of (gain - 1) times the data's width.
"""

from findings import gaussian
from findings.mixture import Ring, contrast, error, ratio, regime_map, regimes, samples, student_of
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
        grid, perfect = schedule(cell["steps"], cell["shift"]), (None, None)
        if cell["states"] == "noised data" and cell["guidance"] == 1:
            gain = gaussian.gain(gaussian.perfect_slope, world.width, grid, solver)
            perfect = (abs(gain - 1) * world.width, gain)
        of = cell | {"solver": solver}
        rows.append(of | {"quantity": "error", "measured": error(x, world, cell["guidance"]), "predicted": perfect[0]})
        rows.append(of | {"quantity": "contrast", "measured": contrast(x, world, cell["guidance"]),
                          "predicted": perfect[1]})
    return rows


def summary(rows):
    def from_4_to_16(entry):
        at = {row["steps"]: row["measured"] for row in entry}
        return ratio(at[16], at[4]) if {4, 16} <= at.keys() else "-"

    rows = [row for row in rows if row["quantity"] == "error"]
    return ("**Error of the 16-step student / error of the 4-step student** (+ worse, - better, = within two standard "
            "errors)\n\n" + regime_map(rows, ("updates", "states", "solver"), from_4_to_16))
