"""Do samples of 2, 4 and 8 steps from the same noise agree (Salt Fig. 5)?

With the Euler solver a student makes of a noise z one point for each number of steps K. For the perfect DMD student of
Gaussian data the map is x = m + gain_K s z (gaussian.gain), so two numbers of steps differ by |gain_K - gain_K'| s for
each coordinate, root mean square. L_SC asks for the same point at every K. The CM solver adds fresh noise at every step
but the first: its samples differ however good the student is (the grids share their noise where they share timesteps).
"""

from findings import gaussian
from findings.mixture import Ring, regimes, same_noise, samples, student_of
from flowmap import schedule

CLAIM = "Salt Fig. 5: from the same noise, samples of 2, 4, 8 steps agree far better under SC-DMD than under DMD"
ACROSS = "pair"
QUANTITIES = {"distance": "root mean square distance of the two points in the plane (data variance is 1 a coordinate)"}
PANELS = ("shift", "guidance")
SHOWN = {"updates": 600, "solver": "euler"}
NAMES = ("DMD-8", "SC-DMD 0.2", "SC-DMD 0.4", "SC-DMD 1")


def cells(fast):
    return [{"student": name} | regime for regime in regimes(fast, updates=(600,)) for name in NAMES]


def measure(cell, seeds, fast):
    net, world, rows = student_of(cell["student"], seeds, cell, fast), Ring(), []
    exact = cell["student"] == "DMD-8" and cell["guidance"] == 1
    for solver in ("euler", "cm"):
        made = {k: samples(net, world, solver, k, cell["shift"]) for k in (2, 4, 8)}
        for a, b in ((2, 4), (4, 8), (2, 8)):
            grids = schedule(a, cell["shift"]), schedule(b, cell["shift"])
            predicted = gaussian.same_noise_difference(world.width, *grids, 2) if exact and solver == "euler" else None
            rows.append(cell | {"solver": solver, "pair": f"{a} and {b}", "quantity": "distance",
                                "measured": same_noise(made[a], made[b]), "predicted": predicted})
    return rows
