"""What alignment aligns: how far apart a rollout and its reference are, in pixels and in token relations.

L_align (Salt Eq. 12) has no gradient where two relations, |R_K - R_2K|, differ by less than the margin. Measured is the
share of pairs of tokens beyond it: between rollouts of K and of 2 K steps from the same noise, with the exits that
train.salt gives them, at the times at which training compares; and, for comparison, between two clips that have
nothing but what is told of them in common. Then how large its gradient is beside DMD's.

Nothing exact is known of a trained network, so `predicted` is None. The runs are in recipe.ROOT, that of the room as
`python train.py --world room --seed S --out ROOT/room_seedS` leaves it; the critic is in the checkpoints of `salt`.
Toy, room and quilts (quilts.py) have 4, 6 and 25 tokens a frame.
"""

from collections import defaultdict
from functools import partial
from itertools import product
from statistics import mean

import torch

import train
from align import align_loss, relations, trd_loss
from cluster import checkpoint
from config import RECIPE
from dmd import dmd_loss, score_times
from findings import quilts
from findings.recipe import settings_of, trained
from flowmap import add_noise
from rollout import joined
from stage import guide, rollout, score_models, source_of, video_shape
from worlds.draws import EVALUATE, NOISE, RENOISE, Draw

CLAIM = "Salt Tab. 5: alignment with a rollout of twice as many steps helps, at 2 steps most. Here: with another clip"
ACROSS = {"share": "block", "by_time": "t", "by_frame": "frame", "size": "of"}
QUANTITIES = {"share": "share of pairs of tokens beyond the margin",
              "by_time": "the same after the teacher's middle block, by the time t at which clips are compared",
              "by_frame": "rms difference of the pixels of a frame (the world's variance is 1)",
              "size": "teacher's middle block: mean difference of R, L_align, and norms of gradients by the weights"}
PANELS = ("features", "network")
RANGE = (0, 0.6)
SEEDS = (0,)
MARGIN, TIMES, FRAMES = 0.1, (0.1, 0.3, 0.5, 0.7, 0.9), (1, 2, 4, 8, 16)  # the margin is trd_loss's


def cells(fast):
    return [{"network": network} for network in ("toy", "room", "quilts")][: 1 if fast else None]


def measure(cell, seeds, fast):
    of_seeds = []
    for seed in seeds:
        if cell["network"] == "quilts":
            cfg = quilts.run_of(seed, fast, "salt", {})
        else:
            cfg = trained(settings_of(cell["network"], seed, fast, world=cell["network"]), RECIPE)
        of_seeds.append(distances(cfg, fast))
    return [cell | dict(key) | {"measured": [of[key] for of in of_seeds], "predicted": None} for key in of_seeds[0]]


def distances(cfg, fast) -> dict:
    """Of the student at the end of its training, over further updates: settings, as items -> a mean."""
    training, found = train.begin(cfg, "salt"), defaultdict(list)
    checkpoint.load(checkpoint.newest_intact(train.states_of(cfg, "salt")), checkpoint.state_of(training))
    net, critic, (teacher, _) = training.nets["net"], training.nets["critic"], score_models(cfg, "bidirectional")

    def note(rollouts, values):
        for key, value in values.items():
            found["rollouts", rollouts, *key].append(float(value))

    for k in cfg.mixed_steps[:-1]:
        for update, exits in list(enumerate(exits_of(cfg, k)))[: 1 if fast else None]:
            draw = Draw(cfg, source_of(cfg), "dmd", cfg.steps_of("dmd") + update, slice(0, cfg.batch))
            text, x_low, x_ref, another = rollouts_of(cfg, net, draw, k, *exits)
            times = score_times(cfg.batch, cfg.frames, cfg.score_shift, draw.g)
            how = text, times, draw.noise_like(x_low, RENOISE), teacher
            against, is_first = f"{k} against {2 * k} steps", k == cfg.mixed_steps[0]
            note(against, differences(x_low.detach(), x_ref, *how, *([cfg.chunk, net] if is_first else [])))
            note(against, gradients(cfg, net, critic, x_low, x_ref, *how))
            if is_first:
                note("another clip", differences(x_low.detach(), another(), *how))
    return {tuple(zip(key[::2], key[1::2])): mean(values) for key, values in found.items()}


def exits_of(cfg, k):
    """Every pair of exits, of all chunks and of the first one, that train.salt may draw for k steps."""
    if k < cfg.first_steps:
        return product(range(k), range(cfg.first_steps))
    return ((exit_step, exit_step) for exit_step in range(k))


def rollouts_of(cfg, net, draw, k, exit_step, first_exit):
    """As in train.salt: text, a rollout of k steps with gradient, its reference; and another() from other noise."""
    text, shape = draw.prompts(), (max(*cfg.mixed_steps, cfg.first_steps), *video_shape(cfg))
    longer_first = max(2 * k, cfg.first_steps) // max(k, cfg.first_steps)
    denser = 2 * k, 2 * exit_step + 1, longer_first * (first_exit + 1) - 1

    @torch.no_grad()
    def reference(purpose=NOISE):
        return joined(rollout(cfg, net, text, draw.noise(*shape, purpose=purpose), *denser))

    x_low = joined(rollout(cfg, net, text, draw.noise(*shape), k, exit_step, first_exit))
    return text, x_low, reference(), partial(reference, EVALUATE)


@torch.no_grad()
def differences(x_low, x_ref, text, t, eps, teacher, chunk=None, student=None) -> dict:
    """How far two clips are apart, in pixels and in relations: settings -> number. With a student by its own features,
    too, behind the past that it has made itself, and by t."""
    middle, found = len(teacher.blocks) // 2, {}

    def tokens(net, block, t):
        for x in (x_low, x_ref):
            past = {} if net is teacher else {"chunk": chunk, "clean": x}
            yield net(add_noise(x, eps, t), t, text, num_blocks=block, **past)

    for features, net in {"teacher": teacher, "student": student}.items():
        for block in range(1, 1 + len(net.blocks)) if net else ():
            found["quantity", "share", "features", features, "block", block] = share(*tokens(net, block, t))
    for at in TIMES if student else ():
        found["quantity", "by_time", "t", at] = share(*tokens(teacher, middle, torch.full_like(t, at)))
    for frame in FRAMES[:-1] if x_low.shape[1] < FRAMES[-1] else FRAMES:
        apart = x_low[:, frame - 1] - x_ref[:, frame - 1]
        found["quantity", "by_frame", "frame", frame] = apart.square().mean().sqrt()
    low, ref = tokens(teacher, middle, t)
    found["quantity", "size", "of", "R"] = (relations(low) - relations(ref)).abs().mean()
    found["quantity", "size", "of", "L_align"] = trd_loss(low, ref)
    return found


def share(z_low, z_ref):
    """Of pairs of different tokens, how many have relations that differ by more than the margin. z: `b f s d`."""
    beyond, s = (relations(z_low) - relations(z_ref)).abs() > MARGIN, z_low.shape[2]
    return beyond.float().mean() * s / (s - 1)  # a token's relation to itself is always 1


def gradients(cfg, net, critic, x_low, x_ref, text, t, eps, teacher) -> dict:
    """Norms of the two losses' gradients by the student's weights: settings -> number."""
    def features(x_t, t, text):
        return teacher(x_t, t, text, num_blocks=len(teacher.blocks) // 2)

    l_dmd, _ = dmd_loss(x_low, text, critic, guide(cfg, teacher, cfg.score_guidance), t, eps)
    l_align, _ = align_loss(features, x_low, x_ref, text, t, eps)
    found = {}
    for name, loss in (("L_DMD", l_dmd), ("lambda L_align", cfg.lambda_align * l_align)):
        grads = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        found["quantity", "size", "of", f"grad of {name}"] = torch.nn.utils.get_total_norm(grads)
    return found
