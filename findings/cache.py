"""Is a cache made in few steps worse, and does a student of rollouts need mixed steps before L_SC helps (Salt Tab. 5)?

First the premise. Frame 8 is made in 4 steps behind 7 frames that the same network made in K, and compared with the
world's. "AR diffusion" is the network of CF++ Stage 1: its velocity is that of the ODE, given the past. "perfect" is a
few-step student whose jumps give the next frame exactly (gaussian.py). Neither is trained; rollout.stream rolls them
out.

Then the rows of Salt's Table 5, but for alignment, trained on their own rollouts: K = 4 alone; with L_SC on that one
grid ("naive"); mixed steps, K = 2, 4, 8 with probability .2, .4, .4, without and with L_SC on rollouts of 8. "naive
L_SC, less often" has it as often as mixed steps do, in 35 % of the updates and not in 75 %.
"""

import torch
from torch import Tensor

from findings import markdown
from findings.affine import CHANNELS, MEAN, VARIANCE
from findings.gaussian import perfect_slope
from findings.mixture import SIGNS, ratio
from findings.video import FRAMES, SHIFT, Student, exact_teacher, frame_laws, kl, params_of, sampled_law, train
from flowmap import sample, schedule
from rollout import joined, stream

CLAIM = "Salt Tab. 5: naive L_SC hurts, with mixed steps it helps; a cache made in fewer steps is worse"
ACROSS = "steps"
QUANTITIES = {"kl": "KL of clips to the teacher's, in nats for each channel",
              "behind": "KL of frame 8 to the world's, made in 4 steps behind 7 frames of K steps"}
PANELS, RANGE = ("guidance", "solver"), (0.0, 0.3)
SHOWN = {"first_steps": 1}
STEPS, LAMBDA, MIXED = (1, 2, 4, 8), 0.2, {2: 0.2, 4: 0.4, 8: 0.4}
NETS = {"AR diffusion": lambda s, t: (1 - t) * s**2 / (((1 - t) * s) ** 2 + t**2), "perfect": perfect_slope}
STUDENTS = {"K = 4": dict(lengths={4: 1.0}), "naive L_SC": dict(lengths={4: 1.0}, lambda_sc=LAMBDA),
            "naive L_SC, less often": dict(lengths={4: 1.0}, lambda_sc=LAMBDA, sc_share=0.35 / 0.75),
            "mixed": dict(lengths=MIXED), "mixed + L_SC": dict(lengths=MIXED, lambda_sc=LAMBDA)}
WORLD = torch.tensor([MEAN]).double(), torch.tensor([[VARIANCE]]).double()  # of one frame


def cells(fast):
    if fast:
        return [{"student": "perfect"}, {"student": "mixed + L_SC", "guidance": 1.0, "first_steps": 4}]
    regimes = [(w, 1, student) for w in (1.0, 4.0) for student in STUDENTS]
    regimes += [(1.0, 4, student) for student in STUDENTS if student.startswith("mixed")]
    return [{"student": net} for net in NETS] + [{"student": student, "guidance": w, "first_steps": first}
                                                 for w, first, student in regimes]


def teacher_law(w: float) -> tuple[Tensor, Tensor]:
    """Mean `f` and covariance `f f` of what the teacher makes, by 200 Heun steps: it is linear in its noise."""
    noise = torch.cat([torch.zeros(1, FRAMES), torch.eye(FRAMES)]).double()[:, None, :, None, None, None]
    teacher = exact_teacher(w)
    x = sample(lambda x, t: teacher(x, torch.full((len(x), 1), t).double()), noise, schedule(200, 1.0).double(), "heun")
    mean, rows = x[0].flatten(), x[1:].flatten(1) - x[0].flatten()
    return mean, rows.T @ rows


def behind(params, steps: int, solver: str) -> Tensor:
    """KL of the last frame, made in 4 steps behind frames made in `steps`; `s`."""
    mean, cov = sampled_law(params, steps, solver, 1)
    h, k, var = frame_laws(params, schedule(4, SHIFT), solver)[-1, ..., 1]
    m, v = h * mean[:, -2] + k, h**2 * cov[:, -2, -2] + var
    return kl((m[:, None], v[:, None, None]), WORLD)


def rolled_out(params, steps: int, solver: str, seed: int, clips: int) -> float:
    """The same of clips that are made."""
    g, net = torch.Generator().manual_seed(seed), Student(params)

    def more(cache, steps, frames):
        return joined(stream(net, lambda i, k: torch.randn(clips, 1, CHANNELS, 1, 1, generator=g, dtype=torch.float64),
                             None, schedule(steps, SHIFT), num_chunks=frames, solver=solver, cache=cache,
                             commit_last=True))

    with torch.no_grad():
        more(cache := net.new_cache(), steps, FRAMES - 1)
        last = more(cache, 4, 1)
    return kl((last.mean()[None], last.var()[None, None]), WORLD).item()


def measure(cell, seeds, fast):
    student, rows = cell["student"], []
    if student in NETS:
        params = params_of(NETS[student])
        return [cell | {"solver": solver, "steps": steps, "quantity": "behind",
                        "measured": [rolled_out(params, steps, solver, seed, 50 if fast else 500) for seed in seeds],
                        "predicted": round(behind(params[None], steps, solver).item(), 9)}
                for solver in ("cm", "euler") for steps in STEPS]
    first, w, target = cell["first_steps"], cell["guidance"], teacher_law(cell["guidance"])
    params = train(seeds, guidance=w, first_steps=first, **STUDENTS[student], **({"updates": 5} if fast else {}))
    for solver in ("cm", "euler") if w == 1 else ("cm",):
        for steps in STEPS:
            of = cell | {"solver": solver, "steps": steps, "predicted": None}
            law = sampled_law(params, steps, solver, first)
            rows.append(of | {"quantity": "kl", "measured": kl(law, target).tolist()})
    return rows + [{"student": student, "solver": "cm", "steps": steps, "quantity": "behind", "predicted": None,
                    "measured": behind(params, steps, "cm").tolist()} for steps in STEPS
                   if w == first == 1 and student in ("K = 4", "mixed + L_SC")]


def summary(rows):
    """Ratios of KL by the CM solver."""
    of = {(row["guidance"], row["first_steps"], row["student"], row["steps"]): row["measured"]
          for row in rows if row["quantity"] == "kl" and row["solver"] == "cm"}
    pairs = [("naive L_SC", "K = 4", 1), ("naive L_SC, less often", "K = 4", 1), ("mixed", "K = 4", 1),
             ("mixed + L_SC", "K = 4", 1), ("mixed + L_SC", "mixed", 1), ("mixed + L_SC", "naive L_SC, less often", 1),
             ("mixed + L_SC", "mixed", 4)]
    columns = [(w, steps) for w in (1.0, 4.0) for steps in STEPS[1:]]
    body = [[one, other, str(first), *(ratio(of[w, first, one, k], of[w, first, other, k])
                                       if {(w, first, one, k), (w, first, other, k)} <= of.keys() else "-"
                                       for w, k in columns)] for one, other, first in pairs]
    head = ["of", "against", "steps of the first frame", *(f"w {w:g}, {k} steps" for w, k in columns)]
    return f"**Ratio of KL, by the CM solver** {SIGNS}\n\n" + markdown(head, body)
