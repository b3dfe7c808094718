"""Does a denser training grid help DMD, and does L_SC (Salt Tab. 4, and lambda of Tab. A.1)?

All students are sampled in 4 steps: DMD trained on 4 and on 8 timesteps, and SC-DMD on 8 with lambda .2, .4 and 1. The
4-step grid is half of the 8-step grid, so DMD-8 spends half of its samples on timesteps that are not visited; and its
critic has to follow twice as many distributions at once (pooled_critic). L_SC pulls every timestep towards the slope
that composes (chords, price), which is what Euler sampling needs and what CM sampling does not want.
"""

from findings.mixture import SIGNS, Ring, contrast, error, ratio, regime_map, regimes, samples, student_of

CLAIM = "Salt Tab. 4: at 4 steps DMD-8 is worse than DMD-4 and SC-DMD better than both; lambda .2 is best"
ACROSS = "student"
QUANTITIES = {"error": "sliced W2 distance to the teacher's samples, 4 steps (data variance is 1)",
              "contrast": "standard deviation within a label / the teacher's, 4 steps"}
PANELS = ("shift", "guidance")
SHOWN = {"updates": 600}
NAMES = ("DMD-4", "DMD-8", "SC-DMD 0.2", "SC-DMD 0.4", "SC-DMD 1")


def cells(fast):
    return [{"student": name} | regime for regime in regimes(fast) for name in NAMES]


def measure(cell, seeds, fast):
    net, world, rows = student_of(cell["student"], seeds, cell, fast), Ring(), []
    for solver in ("euler", "cm"):
        x, of = samples(net, world, solver, 4, cell["shift"]), cell | {"solver": solver}
        rows.append(of | {"quantity": "error", "measured": error(x, world, cell["guidance"]), "predicted": None})
        rows.append(of | {"quantity": "contrast", "measured": contrast(x, world, cell["guidance"]), "predicted": None})
    return rows


def summary(rows):
    def against(one, other):
        def entry(rows):
            of = {row["student"]: row["measured"] for row in rows}
            return ratio(of[one], of[other]) if {one, other} <= of.keys() else ""
        return entry

    rows = [row for row in rows if row["quantity"] == "error"]
    return "\n\n".join(
        f"**Error of {one} / error of {other}** {SIGNS}\n\n"
        + regime_map(rows, ("updates", "solver"), against(one, other))
        for one, other in (("DMD-8", "DMD-4"), ("SC-DMD 0.2", "DMD-8"), ("SC-DMD 0.2", "DMD-4"),
                           ("SC-DMD 1", "SC-DMD 0.2")))
