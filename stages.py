"""The stages of the recipe, each as the algorithm box of its paper, and what they share: draws, networks, updates.

    stage            trains                            from              by
    bidirectional    the teacher, sees the whole clip  scratch           flow matching
    teacher_forcing  the autoregressive teacher        bidirectional     flow matching, clean past     CF++ Stage 1
    causal_cd        the few-step student              teacher_forcing   causal consistency            CF++ Eq. 3
    salt             the final student                 causal_cd         Salt Eq. 13, CF++ Stage 3

A stage is a function begin(cfg, start) -> Training: the networks, their optimizers, and update(step) -> metrics. The
loop, the files of a run and the command line are train.py's; the methods that the papers compare with are
baselines.py's, made of the same parts. cfg is train.Config.

Every random draw is a function of (seed, kind of stage, step, index in the batch), never of what was drawn before, so
a stopped run goes on as if it had never stopped, and methods of one kind meet the same noise. What is drawn for the
whole batch is drawn whole, and then `[part]` of it is used: a slice of the batch, all of it in one process, a share
where several ranks or --accum steps divide the work.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import align
import data
import dmd
import flops
import fsdp
import sc_loss
from causal_cd import causal_cd_loss, draw_index
from files import about_of, check_finite, read_tensors
from flowmap import Guided, bell_weight, flow_matching_loss, schedule, warp
from model import SIZES, CausalWan, check_weights
from rollout import grids, shared_noise, stream

KINDS = ("bidirectional", "teacher_forcing", "trajectory", "dmd")  # which settings a stage reads: --KIND-steps, ...


@dataclass
class Stage:
    begin: Callable  # begin(cfg, start) -> Training
    kind: str  # of KINDS
    start: str | None  # the stage whose weights it starts from
    causal: bool  # samples chunk by chunk
    few_step: bool  # a student: 1, 2, 4 steps without guidance
    solver: str  # that samples it: cm or euler
    windowed: bool = False  # sees only --window frames
    teacher: str = ""  # of DMD: the stage whose weights are the teacher, and the critic's start


@dataclass
class Training:
    nets: dict  # name -> network; "net" is the one trained for, "ema" its average
    optimizers: dict  # name -> optimizer
    update: Callable[[int], dict]  # step -> metrics
    cost: dict = field(default_factory=dict)  # what was spent before the first update: data_seconds, data_bytes
    pictures: dict = field(default_factory=dict)  # label -> clips of the last update, to look at


# ---------------------------------------------------------------------------------------------------------------------
# Random draws: functions of (what for, seed, kind, step, which of several), and for a sample of its index in the batch

# what a draw is for
STEER, DROP, PROMPTS, NOISE, RENOISE, CLIPS, WORLD, EVALUATE, TRIPLE, SHORTCUT, FIRST_EXIT = range(11)


def draws(cfg, kind, step, purpose=STEER, which=0) -> torch.Generator:
    """The generator of draws that are made once for a batch: times, K, exit step, which losses."""
    return data.generator(purpose, cfg.seed, KINDS.index(kind), step, which)


def noise_like(cfg, kind, step, part, shape, purpose=NOISE, which=0) -> Tensor:
    """Noise `b *shape` of a part of the batch; sample i has its own generator."""
    key = (purpose, cfg.seed, KINDS.index(kind), step, which)
    return data.noises(range(cfg.batch)[part], shape, *key).to(cfg.device)


def batch(cfg, kind, step, part) -> tuple[Tensor, Tensor]:
    """Clips `b f c h w` and their text `b l d`, some of it dropped where guidance is learned: a student of DMD is
    sampled without."""
    key, positions = (CLIPS, cfg.seed, KINDS.index(kind)), range(step * cfg.batch, (step + 1) * cfg.batch)[part]
    if cfg.data == "random":
        x0, text = data.noises(positions, video_shape(cfg), *key), random_texts(cfg, positions, *key)
    elif cfg.data:
        x0, text = folder(cfg).clips(positions, *key)
    else:
        x0, prompts = data.clips(positions, cfg.frames, *key)  # never seen before
        text = data.embed(prompts)
    x0, text = x0.to(cfg.device), text.to(cfg.device)
    dropout = 0 if kind == "dmd" else cfg.prompt_dropout
    if dropout > 0:
        kept = torch.rand(cfg.batch, 1, 1, generator=draws(cfg, kind, step, DROP))[part] >= dropout
        text = torch.where(kept.to(cfg.device), text, empty_text(cfg))
    return x0, text


def prompts_only(cfg, step, part, which) -> Tensor:
    """Text of random prompts: rollouts need no video."""
    if cfg.data:
        first = (step * (1 + cfg.critic_steps) + which) * cfg.batch
        positions, key = range(first, first + cfg.batch)[part], (PROMPTS, cfg.seed)
        text = random_texts(cfg, positions, *key) if cfg.data == "random" else folder(cfg).texts(positions, *key)
        return text.to(cfg.device)
    g = draws(cfg, "dmd", step, PROMPTS, which)
    return data.embed(torch.randint(len(data.PROMPTS), (cfg.batch,), generator=g)[part]).to(cfg.device)


def video_shape(cfg) -> tuple:
    return cfg.frames, SIZES[cfg.size].in_dim, cfg.height, cfg.width


def random_texts(cfg, positions, *key) -> Tensor:
    c = SIZES[cfg.size]
    return data.noises(positions, (c.text_len, c.text_dim), *key, 1)


def folder(cfg):
    """The clips and prompts of --data."""
    c = SIZES[cfg.size]
    return data.open_folder(cfg.data, video_shape(cfg), (c.text_len, c.text_dim), cfg.bad_data)


# ---------------------------------------------------------------------------------------------------------------------
# Networks, and the weights that finished stages leave in --out

def path_of(cfg, stage, kind="") -> Path:
    return Path(cfg.out) / f"{stage}{kind}.safetensors"


def is_finished(cfg, stage) -> bool:
    """The raw weights are written first, so the EMA's file says that both are there."""
    ema, raw = path_of(cfg, stage), path_of(cfg, stage, "_raw")
    if ema.exists() and not raw.exists():
        raise ValueError(f"got {ema} without {raw}, expected both: restore it, or delete the first to train again")
    return ema.exists()


def record_of(path) -> dict:
    """What train.py has recorded in the weights of a finished stage. ValueError if it is not all there."""
    about = about_of(path)
    if not (isinstance(about.get("config"), dict) and isinstance(about.get("saved"), float | int)
            and isinstance(about.get("seconds", 0), float | int)):
        raise ValueError(f"got {path} without the settings it was trained with, expected a file that train.py left: "
                         "change --out, or train the stage again")
    return about


def finished(cfg, stage, kind="") -> dict[str, Tensor]:
    """The weights that a finished stage left in --out; ValueError if they are missing, damaged or another's."""
    path = path_of(cfg, stage, kind)
    if dry_run(cfg):
        return {}
    if not path.is_file():
        raise ValueError(f"got no file {path}, expected the checkpoint of stage {stage}: run `python train.py --stage "
                         f"{stage} --out {cfg.out}` first, or change --out")
    weights, about = read_tensors(path)
    check_finite(weights, path)
    if about.get("stage") != stage or about.get("size") != cfg.size:
        raise ValueError(f"got {path} of stage {about.get('stage')} and size {about.get('size')}, expected stage "
                         f"{stage} and size {cfg.size}: change --out or --size")
    chunk = about.get("config", {}).get("chunk", cfg.chunk)
    if about.get("causal") and chunk != cfg.chunk:
        raise ValueError(f"got {path}, trained in chunks of {chunk}, expected {cfg.chunk} as in this stage: change "
                         "--chunk, --preset or --out")
    return weights


def build(cfg, weights: dict | None = None, seed=0, windowed=False, size="", dtype=torch.float32) -> CausalWan:
    """A network on its device and its ranks, with weights or to be trained from scratch. windowed: its rollouts see
    --window frames, --sink of them the first of the clip (LongLive)."""
    config = SIZES[size or cfg.size]
    if windowed:
        config = replace(config, window=cfg.window or None, sink=cfg.sink)
    if dry_run(cfg):  # on the meta device all is as in the forward
        dtype = low_precision(cfg)
    with torch.device("meta"):
        net = flops.count(CausalWan(config).to(dtype))
    net.checkpointing = bool(cfg.checkpointing)
    if weights:
        check_weights(net, weights, "the checkpoint")
    if cfg.compile:
        net.compile_blocks()
    if dry_run(cfg):
        return net
    net = fsdp.shard(net, cfg.precision, cfg.gather).to_empty(device=cfg.device)
    fsdp.fill(net, weights.items() if weights else net.random_weights(seed))
    return net


def dry_run(cfg) -> bool:
    """plan.py runs a stage without numbers, to see what it needs."""
    return cfg.device == "meta"


def low_precision(cfg):
    return torch.bfloat16 if cfg.precision == "bf16" else torch.float32


def build_teacher(cfg, weights, **size) -> CausalWan:
    """A network that is only asked, never trained: without gradients or fp32 weights behind it."""
    return frozen(build(cfg, weights, dtype=low_precision(cfg), **size))


def score_teacher(cfg, stage) -> CausalWan:
    """The teacher of DMD, of --teacher-size from --teacher-out if these are given."""
    size, out = cfg.teacher_size or cfg.size, cfg.teacher_out or cfg.out
    return build_teacher(cfg, finished(replace(cfg, size=size, out=out), stage), size=size)


def frozen(net):
    return net.requires_grad_(False).eval()


def guide(cfg, net, w):
    """The network with guidance w; itself where w is 1."""
    return net if w == 1 else Guided(net, null_text(cfg), w)


def null_text(cfg) -> Tensor:
    """What guidance leads away from, `l d`: the empty prompt in the toy world, the negative prompt for Wan."""
    return folder(cfg).null_text.to(cfg.device) if cfg.data not in ("", "random") else no_text(cfg)


def empty_text(cfg) -> Tensor:
    """The empty prompt `l d`, with which clips are trained whose prompt is dropped. Never the negative prompt: a model
    that learned good clips under that name would not be led away from them."""
    return folder(cfg).empty_text.to(cfg.device) if cfg.data not in ("", "random") else no_text(cfg)


def no_text(cfg):
    return torch.zeros(SIZES[cfg.size].text_len, SIZES[cfg.size].text_dim, device=cfg.device)


# ---------------------------------------------------------------------------------------------------------------------
# Updates

def adamw(net, betas):
    on_gpu = next(net.parameters()).is_cuda  # where one fused kernel needs no copies of the moments
    return torch.optim.AdamW(net.parameters(), lr=0, betas=betas, weight_decay=0.01, fused=on_gpu or None)


def descend(cfg, net, optimizer, loss_of: Callable, lr, flag) -> dict:
    """One step of an optimizer on the mean over the batch of loss_of(part) -> (loss, metrics), part by part.

    Returns the mean metrics and grad_norm; FloatingPointError, before anything has changed, if one is not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    seen = []
    for part in fsdp.my_parts(cfg.batch, cfg.accum):
        loss, metrics = loss_of(part)
        (loss / cfg.accum).backward()
        seen.append({k: torch.as_tensor(v).detach() for k, v in ({"loss": loss} | metrics).items()})
    metrics = {k: torch.stack([m[k].float() for m in seen]).mean(0) for k in seen[0]}
    metrics["grad_norm"] = fsdp.whole(torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.clip_norm))
    here, metrics = metrics, fsdp.mean(metrics)
    if not all_finite(metrics):
        bad = fsdp.everyone(next((k for k, v in here.items() if not v.isfinite().all()), ""), "what is not finite")
        where = ", ".join(f"{name} on rank {rank}" for rank, name in enumerate(bad) if name not in ("", "grad_norm"))
        where = where or "grad_norm, which is over all ranks"
        raise FloatingPointError(f"got a non-finite {where}, expected finite numbers: try a smaller {flag}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    fsdp.forget_gathered(net)
    return metrics


def all_finite(metrics) -> bool:
    return all(v.isfinite().all() for v in metrics.values())


@torch.no_grad()
def average(ema, net, decay):
    """ema <- decay ema + (1 - decay) net."""
    fsdp.forget_gathered(ema)
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


def ema_decay(cfg, decay, step, start=0) -> float:
    """The decay after update `step`: 0, which copies, before update `start`; with --ema-ramp smaller at first, so that
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


def regression(cfg, kind, net, ema, loss_of, cost=None) -> Training:
    """Train net on loss_of(step, part) -> (loss, metrics), and average it: every stage but those of DMD."""
    trajectory, steps = kind == "trajectory", cfg.steps_of(kind)
    optimizer = adamw(net, cfg.trajectory_betas if trajectory else cfg.teacher_betas)
    decay = cfg.trajectory_ema if trajectory else cfg.ema

    def update(step):
        lr = getattr(cfg, f"{kind}_lr") * lr_factor(cfg, step, steps)
        metrics = descend(cfg, net, optimizer, partial(loss_of, step), lr, f"--{kind}-lr".replace("_", "-"))
        average(ema, net, ema_decay(cfg, decay, step))
        return metrics

    return Training({"net": net, "ema": ema}, {"net": optimizer}, update, cost or {})


# ---------------------------------------------------------------------------------------------------------------------
# The recipe

def bidirectional(cfg, start) -> Training:
    """Flow matching on whole clips."""
    net, ema = build(cfg, seed=cfg.seed), frozen(build(cfg, seed=cfg.seed))

    def loss_of(step, part):
        x0, text = batch(cfg, "bidirectional", step, part)
        eps = noise_like(cfg, "bidirectional", step, part, x0.shape[1:])
        u = torch.rand(cfg.batch, cfg.frames // cfg.chunk, generator=draws(cfg, "bidirectional", step))
        u[::2] = u[::2, :1]  # one time for the clip, as in sampling; in the other half one per chunk, faster (ours)
        t = warp(u[part].repeat_interleave(cfg.chunk, 1), cfg.train_shift).to(x0.device)
        return flow_matching_loss(net, x0, text, t, eps)

    return regression(cfg, "bidirectional", net, ema, loss_of)


def teacher_forcing(cfg, start) -> Training:
    """CF++ Stage 1: flow matching of every chunk given its clean past."""
    weights = finished(cfg, start)
    net, ema = build(cfg, weights), frozen(build(cfg, weights))

    def loss_of(step, part):
        x0, text = batch(cfg, "teacher_forcing", step, part)
        eps = noise_like(cfg, "teacher_forcing", step, part, x0.shape[1:])
        u = torch.rand(cfg.batch, cfg.frames // cfg.chunk, generator=draws(cfg, "teacher_forcing", step))
        t = warp(u[part].repeat_interleave(cfg.chunk, 1), cfg.train_shift).to(x0.device)
        weight = bell_weight(t, cfg.train_shift) if cfg.teacher_forcing_weight == "bell" else None
        return flow_matching_loss(net, x0, text, t, eps, weight, chunk=cfg.chunk, clean=x0)

    return regression(cfg, "teacher_forcing", net, ema, loss_of)


def causal_cd(cfg, start) -> Training:
    """CF++ Stage 2, Eq. 3: consistency along the ODE of the autoregressive teacher, the net it starts from."""
    weights = finished(cfg, start)
    teacher = guide(cfg, build_teacher(cfg, weights), cfg.guidance)
    net, ema = build(cfg, weights), frozen(build(cfg, weights))
    grid = schedule(cfg.trajectory_grid, cfg.shift)

    def loss_of(step, part):
        x0, text = batch(cfg, "trajectory", step, part)
        eps = noise_like(cfg, "trajectory", step, part, x0.shape[1:])
        index = draw_index(cfg.batch, cfg.frames, cfg.chunk, len(grid), draws(cfg, "trajectory", step))[part]
        return causal_cd_loss(net, ema, teacher, x0, text, grid, index, eps, cfg.chunk)

    return regression(cfg, "trajectory", net, ema, loss_of)


# ---------------------------------------------------------------------------------------------------------------------
# Distribution matching on self-rollouts, and Salt

@dataclass
class Made:
    """What a generator made for a part of one update: clips x0 `b f c h w` (with gradient) and their text."""

    part: slice
    x0: Tensor
    text: Tensor
    terms: dict = field(default_factory=dict)  # further losses; "sc" is added with weight --lambda-sc
    layout: dict = field(default_factory=dict)  # how the score models look at the clips; nothing: whole, bidirectional
    drawn: dict = field(default_factory=dict)  # whole numbers worth logging: K, exit_step, first_exit
    noise: Tensor | None = None


def no_terms(*_):
    return {}


def distribution_matching(cfg, net, ema, teacher, critic, make, more_terms=no_terms, critic_terms=no_terms,
                          head=None) -> Training:
    """The round of every DMD method (Salt Eq. 4, 10, 13; CF++ Eq. 6, 7): `critic_steps` times the critic learns what
    the generator makes, then the generator takes one step against the difference of the scores.

    make(step, part, which, g) -> Made: which = 0 for the generator's step, 1, 2, ... for the critic's (without
    gradient); g for draws that are made once for the batch. more_terms(step, made, t, eps, g): further losses, by name,
    of the generator at the time and with the noise at which the scores are compared; critic_terms(step, which, made, t,
    eps): of the critic, and of the head on its features where there is one. A term NAME has the weight --lambda-NAME.
    """
    trained = torch.nn.ModuleList([critic] if head is None else [critic, head])
    optimizer, critic_optimizer = adamw(net, cfg.dmd_betas), adamw(trained, cfg.dmd_betas)
    real, updates, pictures = guide(cfg, teacher, cfg.score_guidance), cfg.steps_of("dmd"), {}

    def weighted(loss, terms):
        return loss + sum(getattr(cfg, f"lambda_{name}") * term for name, term in terms.items())

    def renoising(made, step, which, g):
        t = dmd.score_times(cfg.batch, cfg.frames, cfg.score_shift, g)[made.part].to(cfg.device)
        return t, noise_like(cfg, "dmd", step, made.part, made.x0.shape[1:], RENOISE, which)

    def critic_loss_of(step, which, part):
        g = draws(cfg, "dmd", step, STEER, which)
        with torch.no_grad():
            made = make(step, part, which, g)
        t, eps = renoising(made, step, which, g)
        loss, metrics = dmd.critic_loss(critic, made.x0, made.text, t, eps, **made.layout)
        return weighted(loss, critic_terms(step, which, made, t, eps)), metrics

    def generator_loss_of(step, part):
        g = draws(cfg, "dmd", step)
        made = make(step, part, 0, g)
        t, eps = renoising(made, step, 0, g)
        loss, metrics = dmd.dmd_loss(made.x0, made.text, critic, real, t, eps, **made.layout)
        terms = made.terms | more_terms(step, made, t, eps, g)
        pictures.update(generator=made.x0.detach(), teacher=metrics.pop("x0_real"), critic=metrics.pop("x0_fake"))
        return weighted(loss, terms), metrics | terms | made.drawn | clip_statistics(made.x0, cfg.chunk)

    def update(step):
        factor = lr_factor(cfg, step, updates)
        for which in range(1, 1 + cfg.critic_steps):
            critic_metrics = descend(cfg, trained, critic_optimizer, partial(critic_loss_of, step, which),
                                     cfg.critic_lr * factor, "--critic-lr")
        metrics = descend(cfg, net, optimizer, partial(generator_loss_of, step), cfg.dmd_lr * factor, "--dmd-lr")
        average(ema, net, ema_decay(cfg, cfg.dmd_ema, step, cfg.dmd_ema_start))
        metrics |= {k: int(v) for k, v in metrics.items() if k in ("K", "exit_step", "first_exit")}
        metrics |= {k if k.startswith("critic") else f"critic_{k}": v for k, v in critic_metrics.items()}
        return metrics

    nets = {"net": net, "ema": ema, "critic": critic} | ({} if head is None else {"head": head})
    return Training(nets, {"net": optimizer, "critic": critic_optimizer}, update, pictures=pictures)


def clip_statistics(x0: Tensor, chunk: int) -> dict:
    """Of clips `b f c h w`: mean and mean square of every chunk, mean |difference| of neighbouring frames."""
    x0 = x0.detach().float()
    x = x0.unflatten(1, (-1, chunk)).transpose(0, 1).flatten(1)  # (chunks, all of it)
    motion = x0.diff(dim=1).abs().mean((0, 2, 3, 4))
    return {"chunk_mean": x.mean(1), "chunk_square": x.square().mean(1), "frame_difference": motion}


def self_rollout(cfg, net, text, noise, steps, exit_step=None, first_exit=None, triple=None):
    """Roll out a clip x0 `b f c h w` of `steps` steps a chunk; exit steps as in `stream`. noise: `b K f c h w`.

    triple: times (ts, tm, te), for L_SC of every chunk that exits at ts (a first chunk may exit elsewhere). Returns x0
    and these losses, a list.
    """
    grid, first_grid = grids(steps, cfg.shift, cfg.first_steps)
    x0, sc = [], []
    for chunk in stream(net, shared_noise(noise, cfg.chunk, steps, len(first_grid)), text, grid,
                        chunks=cfg.frames // cfg.chunk, first_grid=first_grid, exit_step=exit_step,
                        first_exit=first_exit, fused=False):
        x0.append(chunk.x0)
        if triple and chunk.t == triple[0]:
            def velocity(x, t, past=chunk.cache):
                return net(x, torch.full(x.shape[:2], t, device=x.device), text, cache=past)
            sc.append(sc_loss.sc_loss(velocity, chunk.x_t, chunk.v, *triple, cfg.sc_through)[0])
    return torch.cat(x0, dim=1), sc


def rollout_length(lengths, probabilities, g) -> tuple[int, int]:
    """K of `lengths`, and an exit step below it, equal on all ranks."""
    k = lengths[int(torch.multinomial(torch.tensor(probabilities), 1, generator=g))]
    return k, int(torch.randint(k, (), generator=g))


def draw_first_exit(cfg, k, exit_step, step, which) -> int:
    """The exit step of the first chunk: where it has a grid of its own, any step of it, independently of the others
    (as in the public training code); else theirs."""
    if k >= cfg.first_steps:
        return exit_step
    return int(torch.randint(cfg.first_steps, (), generator=draws(cfg, "dmd", step, FIRST_EXIT, which)))


def rollouts(cfg, net, lengths, probabilities, with_sc: bool) -> Callable:
    """make(step, part, which, g) of methods that learn on their own rollouts (Self Forcing), of K = one of `lengths`.

    with_sc adds L_SC at the largest K (Salt Eq. 13), where the exit step leaves room for a triple of Eq. 9: T_train is
    the grid of the largest K, all of it supervised by DMD, T^(K) that of half as many steps.
    """
    longest = max(lengths)
    densest = max(longest, cfg.first_steps)
    train_grid, infer_grid = schedule(longest, cfg.shift), schedule(max(1, longest // 2), cfg.shift)

    def make(step, part, which, g):
        k, exit_step = rollout_length(lengths, probabilities, g)
        first_exit, triple = draw_first_exit(cfg, k, exit_step, step, which), None
        if which == 0 and with_sc and k == longest and cfg.lambda_sc > 0:
            ts = train_grid[exit_step].item()
            ends = sc_loss.draw_triple(ts, train_grid, infer_grid, draws(cfg, "dmd", step, TRIPLE))
            triple = ends and (ts, *ends)
        text = prompts_only(cfg, step, part, which)
        noise = noise_like(cfg, "dmd", step, part, (densest, *video_shape(cfg)), NOISE, which)
        if part == fsdp.my_parts(cfg.batch, cfg.accum)[0]:
            fsdp.agree(f"a rollout of {k} steps, exit {exit_step}, {first_exit} in the first chunk")
        x0, sc = self_rollout(cfg, net, text, noise, k, exit_step, first_exit, triple)
        terms = {"sc": torch.stack(sc).mean()} if sc else {}
        drawn = {"K": k, "exit_step": exit_step, "first_exit": first_exit}
        return Made(part, x0, text, terms, drawn=drawn, noise=noise)

    return make


def asymmetric(cfg, start) -> tuple:
    """Networks of asymmetric DMD (CF++ Stage 3): a causal student and its average; a bidirectional teacher; a critic,
    bidirectional too, of the student's size."""
    weights = finished(cfg, start)
    net, ema = build(cfg, weights, windowed=True), frozen(build(cfg, weights, windowed=True))
    return net, ema, score_teacher(cfg, "bidirectional"), build(cfg, finished(cfg, "bidirectional"))


def salt(cfg, start) -> Training:
    """Salt's autoregressive training: asymmetric DMD on rollouts of the student, of K = 2, 4 or 8 steps (Salt Eq. 13),

        min L_DMD + lambda_sc L_SC 1[K = 8] + lambda_align L_align 1[K in {2, 4}]

    L_align after a warm-up, in a random share of the updates, at the time and with the noise at which DMD compares its
    scores.
    """
    net, ema, teacher, critic = asymmetric(cfg, start)
    looker = teacher if cfg.align_features == "teacher" else critic

    def features(x_t, t, text):
        return looker(x_t, t, text, until=round(cfg.align_depth * len(looker.blocks)))

    def alignment(step, made, t, eps, g):
        chosen = torch.rand((), generator=g) < cfg.align_prob
        warm = step >= cfg.align_warmup * cfg.steps_of("dmd")
        k, exit_step, first_exit = (made.drawn[name] for name in ("K", "exit_step", "first_exit"))
        if k == max(cfg.mixed_steps) or not (chosen and warm and cfg.lambda_align > 0):
            return {}
        with torch.no_grad():  # the next denser schedule, from the same noise, at the same fraction of its steps
            longer_first = max(2 * k, cfg.first_steps) // max(k, cfg.first_steps)  # 1 or 2 times as many steps
            x_ref, _ = self_rollout(cfg, net, made.text, made.noise, 2 * k, 2 * exit_step + 1,
                                    longer_first * (first_exit + 1) - 1)
        return {"align": align.align_loss(features, made.x0, x_ref, made.text, t, eps, cfg.align_margin)[0]}

    make = rollouts(cfg, net, cfg.mixed_steps, cfg.mixed_probs, with_sc=True)
    return distribution_matching(cfg, net, ema, teacher, critic, make, more_terms=alignment)


RECIPE = {
    "bidirectional": Stage(bidirectional, "bidirectional", None, causal=False, few_step=False, solver="euler"),
    "teacher_forcing": Stage(teacher_forcing, "teacher_forcing", "bidirectional", True, False, "euler"),
    "causal_cd": Stage(causal_cd, "trajectory", "teacher_forcing", True, True, "cm"),
    "salt": Stage(salt, "dmd", "causal_cd", True, True, "cm", windowed=True, teacher="bidirectional"),
}
