"""What every stage is made of: networks, the weights that finished stages leave, updates, and the round of DMD.

A stage is a function method(cfg, start) -> Training, in train.py and baselines/: the networks, their optimizers, and
update(step) -> metrics. It reads as the algorithm box of its paper, from the draws to the loss:

    regression(cfg, group, net, ema, loss_of)                         loss_of(draw) -> loss, metrics
    alternate(cfg, net, ema, critic, generator_step, critic_step)     each of them step(draw) -> loss, metrics

draw (worlds/draws.py) holds all that is random in one pass over a slice of the batch. The loop, the files of a run and
the command line are train.py's. cfg is config.Config.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cluster import flops, fsdp, ranks
from cluster.files import check_finite, metadata_of, read_tensors
from fast.network import Fast
from flowmap import Guided
from model import SIZES, CausalWan
from rollout import Chunk, grids, shared_noise, stream
from wan21.weights import check_fit
from worlds.draws import Draw
from worlds.sources import open_source


@dataclass
class Training:
    nets: dict  # name -> network; "net" is the one trained for, "ema" its average
    optimizers: dict  # name -> optimizer
    update: Callable[[int], dict]  # step -> metrics
    cost: dict = field(default_factory=dict)  # what was spent before the first update: data_seconds, data_bytes
    images: dict = field(default_factory=dict)  # label -> clips of the last update, to look at


# ---------------------------------------------------------------------------------------------------------------------
# Clips, prompts, and the weights that finished stages leave in --out

def video_shape(cfg) -> tuple:
    return cfg.frames, SIZES[cfg.size].in_dim, cfg.height, cfg.width


def source_of(cfg):
    """Where the clips and prompts of a run come from (worlds/sources.py)."""
    c = SIZES[cfg.size]
    return open_source(cfg.data, cfg.world, video_shape(cfg), (c.text_len, c.text_dim), c.row_width,
                       cfg.bad_data)


START = "start"  # weights that tools/convert.py left for stage bidirectional to start from


def path_of(cfg, stage, suffix="") -> Path:
    return Path(cfg.out) / f"{stage}{suffix}.safetensors"


def is_finished(cfg, stage) -> bool:
    """The raw weights are written first, so the EMA's file says that both are there."""
    ema, raw = path_of(cfg, stage), path_of(cfg, stage, "_raw")
    if ema.exists() and not raw.exists():
        raise ValueError(f"got {ema} without {raw}, expected both: restore it, or delete the first to train again")
    return ema.exists()


def record_of(path) -> dict:
    """What train.py has recorded in the weights of a finished stage. ValueError if it is not all there."""
    metadata = metadata_of(path)
    if not (isinstance(metadata.get("config"), dict) and isinstance(metadata.get("saved"), float | int)
            and isinstance(metadata.get("seconds", 0), float | int)):
        raise ValueError(f"got {path} without the settings it was trained with, expected a file that train.py left: "
                         "change --out, or train the stage again")
    return metadata


def load_finished(cfg, stage, suffix="") -> dict[str, Tensor]:
    """The weights that a finished stage left in --out; ValueError if they are missing, damaged or another's."""
    path = path_of(cfg, stage, suffix)
    if dry_run(cfg):
        return {}
    if not path.is_file():
        raise ValueError(f"got no file {path}, expected the checkpoint of stage {stage}: run `python train.py --stage "
                         f"{stage} --out {cfg.out}` first, or change --out")
    weights, metadata = read_tensors(path)
    check_finite(weights, path)
    if metadata.get("stage") != stage or metadata.get("size") != cfg.size:
        raise ValueError(f"got {path} of stage {metadata.get('stage')} and size {metadata.get('size')}, expected stage "
                         f"{stage} and size {cfg.size}: change --out or --size")
    chunk = metadata.get("config", {}).get("chunk", cfg.chunk)
    if metadata.get("causal") and chunk != cfg.chunk:
        raise ValueError(f"got {path}, trained in chunks of {chunk}, expected {cfg.chunk} as in this stage: change "
                         "--chunk, --preset or --out")
    return weights


# ---------------------------------------------------------------------------------------------------------------------
# Networks

def build(cfg, weights: dict | None = None, seed=0, windowed=False, size="", dtype=torch.float32) -> CausalWan:
    """A network on its device and its ranks, with weights or to be trained from scratch. windowed: its rollouts see
    --window frames, --sink of them the first of the clip (LongLive)."""
    config = SIZES[size or cfg.size]
    if windowed:
        config = replace(config, window=cfg.window or None, sink=cfg.sink)
    if dry_run(cfg):  # which has the weights in the forward's precision alone
        dtype = low_precision(cfg)
    with torch.device("meta"):
        net = flops.count(CausalWan(config).to(dtype))
    net.checkpointing = bool(cfg.checkpointing)
    if weights:
        check_fit(config, weights, "the checkpoint")
    if cfg.compile:
        net.compile_blocks()
    if dry_run(cfg):
        return net
    net = fsdp.shard(net, cfg.precision, cfg.reshard_after_forward).to_empty(device=cfg.device)
    fsdp.load(net, weights.items() if weights else net.random_weights(seed))
    return net


def dry_run(cfg) -> bool:
    """tools/plan.py runs a stage without numbers, to see what it needs."""
    return cfg.device == "meta"


def low_precision(cfg):
    return torch.bfloat16 if cfg.precision == "bf16" else torch.float32


def frozen(net):
    return net.requires_grad_(False).eval()


def student_and_average(cfg, weights, windowed=False, seed=0) -> tuple[CausalWan, CausalWan]:
    """The network that a stage trains, and the average of its weights (EMA), both from the same start."""
    how = dict(seed=seed, windowed=windowed)
    return build(cfg, weights, **how), frozen(build(cfg, weights, **how))


def build_teacher(cfg, weights, **size) -> CausalWan:
    """Frozen, inference only: without gradients, and in --precision alone."""
    return frozen(build(cfg, weights, dtype=low_precision(cfg), **size))


def score_models(cfg, stage) -> tuple:
    """The teacher of DMD, of --teacher-size from --teacher-out where these are given, and the critic, of the student's
    size. Both start from the weights of `stage`."""
    size, out = cfg.teacher_size or cfg.size, cfg.teacher_out or cfg.out
    teacher = build_teacher(cfg, load_finished(replace(cfg, size=size, out=out), stage), size=size)
    return teacher, build(cfg, load_finished(cfg, stage))


def for_rollouts(cfg, net):
    """The same network for rollouts without gradient: as fast/network.py computes it, where this rank has all weights
    (fp32 without torchrun) and nothing is compiled. If you change model.py's layers but not fast/, return net here."""
    return net if dry_run(cfg) or ranks.control or cfg.compile else flops.count(Fast(net))


def guide(cfg, net, w):
    """The network with guidance w; itself where w is 1."""
    return net if w == 1 else Guided(net, source_of(cfg).null_text.to(cfg.device), w)


# ---------------------------------------------------------------------------------------------------------------------
# Updates

def adamw(net, betas):
    fused = not next(net.parameters()).is_meta  # one kernel for all weights; it does not know the meta device
    return torch.optim.AdamW(net.parameters(), lr=0, betas=betas, weight_decay=0.01, fused=fused)


def optimizer_step(cfg, net, optimizer, loss_of: Callable, lr, flag) -> dict:
    """One step of an optimizer on the mean over the batch of loss_of(batch_slice) -> (loss, metrics), slice by slice.

    Returns the mean metrics and grad_norm; FloatingPointError, before anything has changed, if one is not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    seen = []
    for batch_slice in ranks.my_slices(cfg.batch, cfg.accum):
        loss, metrics = loss_of(batch_slice)
        (loss / cfg.accum).backward()
        seen.append({k: torch.as_tensor(v).detach() for k, v in ({"loss": loss} | metrics).items()})
    metrics = {k: torch.stack([m[k].float() for m in seen]).mean(0) for k in seen[0]}
    metrics["grad_norm"] = fsdp.full_tensor(torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.clip_norm))
    here, metrics = metrics, ranks.mean(metrics)
    if not all_finite(metrics):
        bad = ranks.all_gather(next((k for k, v in here.items() if not v.isfinite().all()), ""), "what is not finite")
        where = ", ".join(f"{name} on rank {rank}" for rank, name in enumerate(bad) if name not in ("", "grad_norm"))
        where = where or "grad_norm, which is over all ranks"
        raise FloatingPointError(f"got a non-finite {where}, expected finite numbers: try a smaller {flag}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    fsdp.reshard(net)
    return metrics


def all_finite(metrics) -> bool:
    return all(v.isfinite().all() for v in metrics.values())


@torch.no_grad()
def update_ema(ema, net, decay):
    """ema <- decay ema + (1 - decay) net."""
    fsdp.reshard(ema)
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


def ema_decay(cfg, decay, step, start=0) -> float:
    """The decay after update `step`: 0, which copies, before update `start`; with ema_ramp smaller at first, so that
    the start is forgotten (a decay of .99 keeps 45 % of it over 80 updates)."""
    if step < start:
        return 0.0
    return min(decay, (1 + step) / (10 + step)) if cfg.ema_ramp else decay


def lr_factor(cfg, step, steps) -> float:
    """Of the learning rate: 1, or (--lr-schedule decay) 20 steps of warm-up, constant, linear to a tenth over the last
    half."""
    if cfg.lr_schedule == "constant":
        return 1.0
    return min(1, (step + 1) / 20) * min(1, 0.1 + 1.8 * (1 - step / steps))


def regression(cfg, group, net, ema, loss_of, cost=None) -> Training:
    """Train net on loss_of(draw) -> (loss, metrics), and average it: every stage but those of DMD."""
    trajectory, steps, source = group == "trajectory", cfg.steps_of(group), source_of(cfg)
    optimizer = adamw(net, cfg.trajectory_betas if trajectory else cfg.teacher_betas)
    decay = cfg.trajectory_ema if trajectory else cfg.ema

    def update(step):
        lr = getattr(cfg, f"{group}_lr") * lr_factor(cfg, step, steps)
        metrics = optimizer_step(cfg, net, optimizer, lambda s: loss_of(Draw(cfg, source, group, step, s)), lr,
                                 f"--{group}-lr".replace("_", "-"))
        update_ema(ema, net, ema_decay(cfg, decay, step))
        return metrics

    return Training({"net": net, "ema": ema}, {"net": optimizer}, update, cost or {})


def alternate(cfg, net, ema, critic, generator_step, critic_step, head=None) -> Training:
    """The round of every DMD method: `critic_steps` times the critic learns what the generator makes, then the
    generator takes one step against the difference of the scores.

    generator_step(draw) -> loss, metrics, with the metrics of dmd.dmd_loss and the clips x0 it generated among them.
    critic_step(draw) -> loss, metrics; draw.which is 1, 2, ... head: a discriminator that is trained with the critic.
    """
    trained = torch.nn.ModuleList([critic] if head is None else [critic, head])
    optimizer, critic_optimizer = adamw(net, cfg.dmd_betas), adamw(trained, cfg.dmd_betas)
    updates, source, images = cfg.steps_of("dmd"), source_of(cfg), {}

    def generator_loss_of(step, batch_slice):
        loss, metrics = generator_step(Draw(cfg, source, "dmd", step, batch_slice))
        x0 = metrics.pop("x0").detach()
        images.update(generator=x0, teacher=metrics.pop("x0_real"), critic=metrics.pop("x0_fake"))
        return loss, metrics | clip_statistics(x0, cfg.chunk)

    def critic_loss_of(step, which, batch_slice):
        return critic_step(Draw(cfg, source, "dmd", step, batch_slice, which))

    def update(step):
        factor = lr_factor(cfg, step, updates)
        for which in range(1, 1 + cfg.critic_steps):
            critic_metrics = optimizer_step(cfg, trained, critic_optimizer, partial(critic_loss_of, step, which),
                                            cfg.critic_lr * factor, "--critic-lr")
        metrics = optimizer_step(cfg, net, optimizer, partial(generator_loss_of, step), cfg.dmd_lr * factor, "--dmd-lr")
        update_ema(ema, net, ema_decay(cfg, cfg.dmd_ema, step, cfg.dmd_ema_start))
        metrics |= {k: int(v) for k, v in metrics.items() if k in ("K", "exit_step", "first_exit")}
        metrics |= {k if k.startswith("critic") else f"critic_{k}": v for k, v in critic_metrics.items()}
        return metrics

    nets = {"net": net, "ema": ema, "critic": critic} | ({} if head is None else {"head": head})
    return Training(nets, {"net": optimizer, "critic": critic_optimizer}, update, images=images)


def clip_statistics(x0: Tensor, chunk: int) -> dict:
    """Of clips `b f c h w`: mean and mean square of every chunk, mean |difference| of neighbouring frames."""
    x0 = x0.float()
    x = x0.unflatten(1, (-1, chunk)).transpose(0, 1).flatten(1)  # (chunks, all of it)
    motion = x0.diff(dim=1).abs().mean((0, 2, 3, 4))
    return {"chunk_mean": x.mean(1), "chunk_square": x.square().mean(1), "frame_difference": motion}


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts

def rollout(cfg, net, text, noise, steps, exit_step=None, first_exit=None) -> Iterator[Chunk]:
    """The chunks of a student's clip of `steps` steps a chunk. noise: `b K f c h w`; exit steps as in `stream`."""
    grid, first_grid = grids(steps, cfg.shift, cfg.first_steps)
    return stream(net, shared_noise(noise, cfg.chunk, steps, len(first_grid)), text, grid,
                  num_chunks=cfg.frames // cfg.chunk, first_grid=first_grid, exit_step=exit_step,
                  first_exit=first_exit)
