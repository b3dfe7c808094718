"""Does L_SC lower the semigroup defect (Salt A.1, Eq. 14-16)?

Measured on each interval of the 4-step path, tm from T^(8). 0 means that Euler steps compose, which is not what a good
one-step student does: the perfect DMD or consistency student, which this world knows for guidance 1, has a defect of
its own, shown as the prediction of DMD-8.
"""

from findings.mixture import Ring, defects, regimes, student_of

CLAIM = "Salt A.1: SC-DMD has a smaller semigroup defect than DMD, .0111 against .0135, most so at high noise"
ACROSS = "interval"
QUANTITIES = {"defect": "semigroup defect (Salt Eq. 16), a fraction of the squared displacement"}
PANELS = ("shift", "guidance")
SHOWN = {"updates": 600}
NAMES = ("DMD-8", "SC-DMD 0.2", "SC-DMD 0.4", "SC-DMD 1")


def cells(fast):
    return [{"student": name} | regime for regime in regimes(fast, updates=(600,)) for name in NAMES]


def measure(cell, seeds, fast):
    net, world, shift = student_of(cell["student"], seeds, cell, fast), Ring(), cell["shift"]
    measured = [[*path, sum(path) / 4] for path in defects(net, world, shift)]  # of each seed
    predicted = [None] * 5
    if cell["student"] == "DMD-8" and cell["guidance"] == 1:
        (path,) = defects(world.perfect_student, world, shift)
        predicted = [*path, sum(path) / 4]
    return [cell | {"interval": i, "quantity": "defect", "measured": list(of_seeds), "predicted": p}
            for i, of_seeds, p in zip((1, 2, 3, 4, "mean"), zip(*measured), predicted)]
