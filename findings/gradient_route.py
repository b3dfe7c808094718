"""Where the gradient of L_SC has to go.

Salt's Eq. 8 compares a direct endpoint, which depends on v(x_ts, ts), with a composed one, which depends on
v(x_tm, tm) as well, and does not say which of them learns. In the affine world with guidance the first, noisy timesteps
push the mean once and the later ones push it again (guidance_per_step.py). L_SC asks for a velocity that is constant
along the path: the later timesteps should no longer push. For this the gradient has to reach v(x_tm), as with "both"
and "composed". With "direct" the early timesteps copy the push of the later ones instead, and the samples go further
than without L_SC; with a large lambda and shared parameters they run away. With "composed" alone nothing holds v(x_ts)
for L_SC, and there the samples lose their variance.

SC-DMD on 8 timesteps, w = 4, critic of the pool. A student "line" shares parameters over time (form of affine.py); in a
student "free" each timestep has its own.
"""

from findings.affine import sample_law, train
from flowmap import schedule

CLAIM = "Salt Eq. 8 does not say which endpoint of L_SC carries the gradient"
ACROSS = "steps"
QUANTITIES = {"mean": "mean of the samples (data: 0.4)", "variance": "variance of the samples (data: 0.84)"}
PANELS = ("student", "solver")
RANGE = (1.2, 2.6)  # what runs away is in the table


def cells(fast):
    routes = [("none", 0.0)] + [(to, weight) for weight in (0.2, 1.0) for to in ("both", "composed", "direct")]
    return [{"student": student, "gradient": to, "lambda": weight} for student in ("line", "free")
            for to, weight in (routes[:2] if fast else routes)]


def measure(cell, seeds, fast):
    params = train(seeds, 8, guidance=4.0, form=cell["student"], lambda_sc=cell["lambda"],
                   through="both" if cell["gradient"] == "none" else cell["gradient"], updates=20 if fast else None)
    return [{**cell, "solver": solver, "steps": steps, "quantity": quantity, "measured": values.tolist(),
             "predicted": None}
            for solver in ("cm", "euler") for steps in (1, 2, 4, 8)
            for quantity, values in zip(QUANTITIES, sample_law(params, schedule(8, 5.0).double(),
                                                               schedule(steps, 5.0).double(), solver))]
