"""What a few-step student should start from before asymmetric DMD (CF++ Tab. 2).

Everything here is the walk of increments.py. Five students after stage 2, at equal compute: bidirectional ODE, the
autoregressive diffusion model as it is (stage 1), causal ODE, causal DMD, causal CD. From each of them stage 3, a short
asymmetric DMD on rollouts of the student's own, once for 1, 2 and 4 steps a chunk.

Compute is counted in clips through the network; a backward is two. An update of CD takes 5 of them for a clip: teacher,
average, student, backward. ODE takes 3, and 48 for a trajectory, one for every 4 clips trained on, as in the paper (80
thousand for 320 thousand): 15. DMD takes 17.5 with two updates of the critic, at 2.5 forwards for a clip to learn from.
"""

from functools import lru_cache

import torch

from baselines.whole_clip import backward_simulation
from config import Config
from dmd import critic_loss, dmd_loss, score_times
from findings.increments import (BATCH, EVALUATION, FRAMES, SHIFT, START_UPDATES, TRAINING, WIDTH, Nets, Student, Walk,
                                 bidirectional_teacher, causal_cd, causal_teacher, generators, measured, normal, ode,
                                 real, regress, rollout, started, teacher_forcing, trajectories)
from findings.mixture import descend, optimizer
from flowmap import flow_matching_loss, per_frame, schedule, to_x0
from stage import lr_factor
from worlds.draws import generator

CLAIM = "CF++ Tab. 2: of five ways to start stage 3 causal CD is best, and bidirectional ODE hardly moves"
ACROSS = "start"
QUANTITIES = {"error": "distance (W1) of the steps of the walk to the world's, whose size is 1",
              "motion": "mean size of a step / the world's",
              "variety": "both futures: twice the share of steps at the rarer one",
              "kept": "variance of the first frame in one jump / the world's"}
PANELS = ("chunk", "stage")
STARTS = ("bidirectional ODE", "AR diffusion", "causal ODE", "causal DMD", "causal CD")
COMPUTE = 240_000  # clips through the network, for each seed, in stage 2
STAGE_3_UPDATES, DMD_LR, CRITIC_LR, CRITIC_STEPS, SCORE_SHIFT = 100, 1e-3, 2e-3, 2, 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Distribution matching, in stage 2 and in stage 3

class Critic(Nets):
    """A score model of whole clips, all frames at one time."""

    def __init__(self, seeds):
        super().__init__(seeds, FRAMES, 1, FRAMES, 128)

    def forward(self, x, t, text):
        return self.mlp(x.flatten(1), per_frame(t, x)[:, :1]).reshape(x.shape)


def score_model(seeds, n: int, updates: int) -> Critic:
    """What the critic of stage 3 starts from: flow matching on whole clips."""
    net = Critic(seeds)

    def loss_of(gens):
        x0 = real(n, gens)
        t = torch.cat([torch.rand(BATCH, 1, generator=g) for g in gens]).expand(x0.shape[:2])
        return flow_matching_loss(net, x0, None, t, normal(x0, gens))[0]
    return regress(net, loss_of, seeds, updates)


def match(net: Student, critic, generated, teacher, seeds, updates: int) -> Student:
    """DMD of generated(generators) -> clips x0, and the layout in which score models see them."""
    critic, gens_of_critic, done = started(critic), generators(seeds, TRAINING, 1), 0
    critic_opt = optimizer(critic)

    def scored(loss, gens, x0, *models, **layout):
        t = torch.cat([score_times(BATCH, x0.shape[1], SCORE_SHIFT, g) for g in gens])
        return loss(*models, t, normal(x0, gens), **layout)[0]

    def loss_of(gens):
        nonlocal done
        for _ in range(CRITIC_STEPS):
            with torch.no_grad():
                x0, layout = generated(gens_of_critic)
            loss = scored(critic_loss, gens_of_critic, x0, critic, x0, None, **layout)
            descend(critic_opt, loss, seeds, CRITIC_LR * lr_factor(Config(), done, updates))
        done += 1
        x0, layout = generated(gens)
        return scored(dmd_loss, gens, x0, x0, None, critic, teacher, **layout)
    return regress(net, loss_of, seeds, updates, DMD_LR)


def causal_dmd(start: Student, seeds, n: int, updates: int) -> Student:
    net, grid, shared = started(start), schedule(4, SHIFT), generator(TRAINING)

    def generated(gens):
        clean, exit_step = real(n, gens), int(torch.randint(4, (), generator=shared))
        layout = {"chunk": 1, "clean": clean}
        return backward_simulation(net, normal(clean, gens, 4), grid, exit_step, None, **layout), layout
    return match(net, start, generated, causal_teacher(n), seeds, updates)


def asymmetric_dmd(start: Student, critic: Critic, seeds, n: int, updates: int, steps: int) -> Student:
    """Stage 3, for one number of steps."""
    net, shared, like = started(start), generator(TRAINING), torch.zeros(len(seeds) * BATCH, FRAMES // n, n, 1, 1)

    def generated(gens):
        exit_step, first_exit = (int(torch.randint(k, (), generator=shared)) for k in (steps, 4))
        return rollout(net, normal(like, gens, 4), steps, exit_step, first_exit), {}
    return match(net, critic, generated, bidirectional_teacher(Walk(FRAMES)), seeds, updates)


# ---------------------------------------------------------------------------------------------------------------------
# The finding

@lru_cache(maxsize=1)
def stage_1(seeds: tuple, n: int, updates: int) -> tuple[Student, Critic]:
    return teacher_forcing(seeds, n, updates), score_model(seeds, n, updates)


def stage_2(name: str, start: Student, seeds, n: int, compute: int) -> Student:
    clips = compute // BATCH
    if name == "AR diffusion":
        return start
    if name == "causal CD":
        return causal_cd(start, seeds, n, clips // 5)
    if name == "causal DMD":
        return causal_dmd(start, seeds, n, 2 * clips // 35)
    return ode(start, seeds, n, clips // 15, compute // 60, bidirectional=name == "bidirectional ODE")


def variance_kept(walk: Walk, n: int, pairs: int) -> float:
    """Of E[x_0^1 | noise of the first chunk], over that of the first frame, for the ends x_0 of the whole clip's ODE:
    the covariance of two ends with this noise in common. For steps that are normal it is sum_{j <= n} R_1j^2 / S_11,
    S the covariance of a clip and R its root."""
    noise = torch.randn(2, pairs, walk.n, generator=generator(EVALUATION, 1))
    noise[1, :, :n] = noise[0, :, :n]
    ends = trajectories(bidirectional_teacher(walk), noise.flatten(0, 1)[..., None, None, None])[:, -1, 0, 0, 0, 0]
    a, b = ends.chunk(2)
    return ((a * b).mean() / (walk.distance**2 + walk.width**2)).item()


@torch.no_grad()
def first_frame(net: Student, n: int, b: int = 4000) -> list[float]:
    """Variance of the first frame in one jump from noise, over the world's."""
    noise = torch.randn(b, 1, n, 1, 1, generator=generator(EVALUATION)).repeat(net.seeds, 1, 1, 1, 1)
    x0 = to_x0(noise, net(noise, 1.0, None, clean=torch.zeros_like(noise)), 1.0)[:, 0, 0, 0, 0]
    return (x0.unflatten(0, (net.seeds, b)).var(1) / (1 + WIDTH**2)).tolist()


def predicted_first_frame(name: str, n: int, pairs: int) -> float | None:
    """Of a student that does what its loss asks for; not known for DMD."""
    if name == "AR diffusion":
        return 0.0  # one jump is the mean of all futures
    if name != "causal DMD":
        return variance_kept(Walk(FRAMES if name == "bidirectional ODE" else n), n, pairs)


def cells(fast):
    return [{"start": name, "chunk": n} for n in ((1,) if fast else (1, 3)) for name in STARTS]


def measure(cell, seeds, fast):
    name, n, rows = cell["start"], cell["chunk"], []
    start, critic = stage_1(tuple(seeds), n, 4 if fast else START_UPDATES)
    student, updates = stage_2(name, start, seeds, n, 35 * BATCH if fast else COMPUTE), 1 if fast else STAGE_3_UPDATES
    for stage in (2, 3):
        for steps in (1, 2, 4):
            net = student if stage == 2 else asymmetric_dmd(student, critic, seeds, n, updates, steps)
            rows += [cell | {"stage": stage, "steps": steps, "quantity": quantity, "measured": of, "predicted": None}
                     for quantity, of in measured(net, n, steps, 100 if fast else 2000).items()
                     if quantity == "error" or n == 1 and steps != 2]
    return rows + [cell | {"stage": 2, "steps": 1, "quantity": "kept", "measured": first_frame(student, n),
                           "predicted": predicted_first_frame(name, n, 200 if fast else 20_000)}]
