"""Why a student of a guided teacher goes further with more steps.

Guided DMD moves the mean of the samples away from that of the data, by D. From noised real data each timestep learns to
add D once. In sampling by the CM solver a timestep starts from what the earlier ones made, to which D is added already,
and adds D again: d_k = D + r_k d_{k-1} (gaussian.guidance_chain). r_k is the part of the offset that the noise leaves,
and a larger shift makes it smaller. At the low-noise end it tends to sqrt(S_w / S), so with very many steps the offset
ends at D / (1 - sqrt(S_w / S)).

The offset of the samples' mean from that of the data, in units of the 1-step student's. Each student is trained on the
grid that it is sampled on. The prediction knows D and S_w of the 1-step student, and supposes a critic that knows the
timestep: then all timesteps make the same distribution. If such a student learns from its own states, its samples
themselves are what DMD asks for, and the prediction is 1. A critic that sees the pool of all timesteps
(pooled_critic.py) has no exact prediction. A student that has but one shift for all timesteps has to find a compromise.
"""

from findings.affine import MEAN, VARIANCE, sample_law, train
from findings.gaussian import guidance_chain
from flowmap import schedule

CLAIM = "Salt Fig. 1: DMD students get worse with more steps (over-exposed). Here: guidance is added at each step"
ACROSS = "steps"
QUANTITIES = {"overshoot": "offset of the mean / offset of the 1-step student"}
PANELS = ("student", "shift")
LINES = (("free", "told the timestep", "noised real"), ("free", "pooled", "noised real"),
         ("free", "told the timestep", "own states"), ("shift", "pooled", "noised real"),
         ("shift", "pooled", "own states"))


def cells(fast):
    return [{"student": student, "critic": critic, "inputs": inputs, "shift": shift}
            for shift in ((5.0,) if fast else (5.0, 12.0)) for student, critic, inputs in LINES]


def measure(cell, seeds, fast):
    pooled, own_states, rows = cell["critic"] == "pooled", cell["inputs"] == "own states", []
    for steps in (1, 2, 4) if fast else (1, 2, 4, 8, 16):
        grid = schedule(steps, cell["shift"]).double()
        params = train(seeds, steps, shift=cell["shift"], guidance=4.0, form=cell["student"], own_states=own_states,
                       pooled=pooled, updates=20 if fast else None)
        mean, variance = sample_law(params, grid, grid, "cm")
        if steps == 1:
            first, guided_variance = mean - MEAN, variance.mean().item()
        predicted = None
        if cell["student"] == "free" and not pooled:
            predicted = 1.0 if own_states else guidance_chain(grid, VARIANCE, guided_variance)
        rows.append({**cell, "steps": steps, "quantity": "overshoot", "measured": ((mean - MEAN) / first).tolist(),
                     "predicted": predicted})
    return rows
