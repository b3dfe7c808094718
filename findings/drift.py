"""Does causal DMD drift, and why (CF++ Sec. 3.4)?

In a world that adds up (bumps.py) a bias of the mean increment grows: at frame i it is (1 - .95^i) / .05 times as
large, while the spread of the world's frames grows more slowly. What biases the increment? The guided teacher does:
guidance makes the likelier bump likelier still, for any student. And a student that cannot bend cannot make two bumps;
there DMD and causal CD choose differently.

Causal CD is solved for its optimum, timestep by timestep; DMD starts there and is trained by gradient descent with an
exact critic. In brackets the same on quadrature nodes in place of random numbers. The teacher takes 48 Euler steps.
"""

import torch

from baselines.causal import trajectory
from findings.bumps import (BOTH, CD_GRID, WIDTH, causal_cd, causal_dmd, drift, inside, nodes, one_step, pieces,
                            random_numbers, teacher_velocity)

CLAIM = "CF++ Fig. 5: frames of causal DMD are sharper than those of causal CD at first, then they drift"
ACROSS = {"drift": "frame", "near": "guidance", "inside": "guidance"}
QUANTITIES = {"drift": "drift of the mean, in standard deviations of the world",
              "near": "share of increments within two standard deviations of a bump",
              "inside": "share of frame 21 within two standard deviations of the world's"}
PANELS, RANGE = ("none", "guidance"), (-0.3, 4.0)
FRAMES, KNOTS, UPDATES = (1, 8, 21, 60), {"affine": 2, "bends": 25}, 200


def cells(fast):
    forms = ["affine"] if fast else ["teacher", *KNOTS]
    return [{"form": form, "guidance": w} for form in forms for w in ((3.0,) if fast else (1.0, 3.0, 4.0))]


def rows_of(student: str, w: float, increments, exact) -> list[dict]:
    """increments: `s n` of each seed, exact: `1 n`, or None where they are not known."""
    def about(d):
        mean, variance = d.mean(1), d.var(1)
        near = sum(((d - bump).abs() < 2 * WIDTH).double().mean(1) for bump in BOTH)
        return *(drift(mean, frame) for frame in FRAMES), near, inside(mean, variance, 21)

    names = [("drift", {"frame": frame}) for frame in FRAMES] + [("near", {}), ("inside", {})]
    predicted = [None] * len(names) if exact is None else [value.item() for value in about(exact)]
    return [{"student": student, "guidance": w} | of | {"quantity": name, "measured": m.tolist(), "predicted": p}
            for (name, of), m, p in zip(names, about(increments), predicted)]


def measure(cell, seeds, fast):
    form, w, z = cell["form"], cell["guidance"], pieces(4000)[0]
    if form == "teacher":
        velocity = teacher_velocity(w)
        noise = torch.stack([torch.randn(20_000, generator=torch.Generator().manual_seed(seed)).double()
                             for seed in seeds])
        made, exact = (trajectory(lambda y, t: velocity(y, torch.full_like(y, t)), x, CD_GRID, len(CD_GRID))[:, -1]
                       for x in (noise, z[None]))
        return rows_of("teacher", w, made, exact)
    updates, n = 5 if fast else UPDATES, KNOTS[form]
    cd, exact = causal_cd(random_numbers(seeds), len(seeds), w, n), causal_cd(nodes(55, 1), 1, w, n)
    dmd = causal_dmd(random_numbers(seeds), cd, w, updates)
    rows = rows_of(f"CD, {form}", w, one_step(cd, z), one_step(exact, z))
    exact = one_step(causal_dmd(nodes(25, 12), exact, w, updates), z) if form == "affine" else None
    return rows + rows_of(f"DMD, {form}", w, one_step(dmd, z), exact)
