"""Why a few-step student has too much contrast at more steps, and for which sampler.

A perfect few-step student jumps from any noisy latent x_t straight to the end of its trajectory. The trajectory is
curved, and the jump is its chord. An Euler step goes a part of the way along the chord, leaves the trajectory outwards,
and the next jump starts there. More steps do not repair this: the std of the samples tends to twice that of the
data, whatever that is. The CM solver uses each jump to its end and noises again, so it stays right at every number of
steps. The composing student is right under Euler, and has too little contrast under CM. But L_SC = 0 for a composing
student of any scale, and the scale is left to DMD, which wants each jump to give the data: a large lambda makes the
contrast under Euler the same at all steps, and that is more than 1, at one step too.

Students on 16 timesteps, data N(0, std^2), no guidance, and a critic that knows the timestep. DMD starts as the
composing student and SC-DMD as the perfect one, so that each has to leave its start. `perfect` and `composing` are not
trained: there flowmap.sample meets the closed form. The number behind SC-DMD is lambda.
"""

from findings.affine import sample_law, train
from findings.gaussian import composing_slope, gain, perfect_slope, sampled_gain
from flowmap import schedule

CLAIM = "Salt Fig. 1: DMD students get worse with more steps (over-exposed, details lost). Here: their contrast grows"
ACROSS = "steps"
QUANTITIES = {"contrast": "std of the samples / std of the data"}
PANELS = ("shift", "solver")
SLOPES = {"perfect": perfect_slope, "composing": composing_slope, "DMD": perfect_slope}
LAMBDAS = {"DMD": 0.0, "SC-DMD 0.2": 0.2, "SC-DMD 1": 1.0, "SC-DMD 5": 5.0}


def cells(fast):
    closed = [("perfect", 0.1), ("perfect", 2.0), ("composing", 0.5)]
    trained = [(student, 0.5) for student in LAMBDAS]
    return [{"student": student, "std": std, "shift": shift} for shift in ((5.0,) if fast else (1.0, 5.0))
            for student, std in (closed[2:] + trained[:2] if fast else closed + trained)]


def measure(cell, seeds, fast):
    student, std, shift = cell["student"], cell["std"], cell["shift"]
    most = 4 if fast else 16
    grid, rows = schedule(most, shift).double(), []
    if student in LAMBDAS:
        params = train(seeds, most, shift=shift, mean=0.0, variance=std**2, pooled=False, lambda_sc=LAMBDAS[student],
                       start=composing_slope if student == "DMD" else perfect_slope, updates=20 if fast else None)
    for solver in ("euler", "cm"):
        for steps in (k for k in (1, 2, 4, 8, 16) if k <= most):
            path = schedule(steps, shift).double()
            if student in LAMBDAS:
                measured = (sample_law(params, grid, path, solver)[1].sqrt() / std).tolist()
            else:
                measured = [sampled_gain(SLOPES[student], std, path, solver, seed) for seed in seeds]
            predicted = gain(SLOPES[student], std, path, solver) if student in SLOPES else None
            rows.append({**cell, "solver": solver, "steps": steps, "quantity": "contrast", "measured": measured,
                         "predicted": predicted})
    return rows
