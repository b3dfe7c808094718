"""Train a few-step autoregressive video model through every stage of Salt and Causal Forcing++.

    python train.py                          # the toy recipe: four stages on a laptop, about 20 minutes on 2 CPU cores
    python train.py --stage causal_cd        # one stage; it starts from what the stages before left in --out
    python train.py --longer 3 --out runs/long            # the same recipe, three times as long
    python train.py --stage evaluate --eval-seed 1        # measure again what a run left, on other prompts and seeds
    python train.py --help                   # every flag

    stage            trains                            from              by
    bidirectional    the teacher, sees the whole clip  scratch           flow matching
    teacher_forcing  the autoregressive teacher        bidirectional     flow matching, clean past     CF++ Stage 1
    causal_cd        the few-step student              teacher_forcing   causal consistency            CF++ Eq. 3
    salt             the final student                 causal_cd         Salt Eq. 13, CF++ Stage 3

A run leaves in --out: STAGE.safetensors (EMA weights, official names) and STAGE_raw.safetensors, sheets of pictures,
config.json, metrics.jsonl, and STAGE.state.safetensors, from which a stopped run goes on, step for step as if it had
never stopped: every random draw is a function of (seed, stage, step, index in the batch). What is written replaces
the old only when it is complete; nothing is pickled.
"""

import argparse
import copy
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import align
import data
import dmd
import sc_loss
from causal_cd import causal_cd_loss, draw_index
from flowmap import Guided, flow_matching_loss, sample, schedule, warp
from model import SIZES, CausalWan, about_of, load_weights, read_tensors, write_tensors
from rollout import grids, shared_noise, stream

STAGES = ("bidirectional", "teacher_forcing", "causal_cd", "salt")
FEW_STEP = ("causal_cd", "salt")


def flag(default, help, affects="bidirectional"):
    """A setting; affects: the first stage whose weights depend on it, or "none"."""
    return field(default=default, metadata={"help": help, "affects": affects})


@dataclass
class Config:
    """Every setting of a run; each is also a command-line flag of the same name."""

    size: str = flag("toy", "the network: toy")
    stage: str = flag("all", f"one of {', '.join(STAGES)}; all of them; or evaluate", "none")
    out: str = flag("runs/toy", "folder for checkpoints, metrics and pictures", "none")
    seed: int = flag(0, "of weights, data, noise and every other draw")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda", "none")
    longer: float = flag(1.0, "multiply the steps of every stage")
    save_every: int = flag(100, "steps between saves of the state a stopped run resumes from", "none")
    stop_after: int = flag(0, "stop (resumably) after this many updates in this process; 0: never", "none")

    frames: int = flag(8, "latent frames per clip")
    chunk: int = flag(1, "frames per autoregressive chunk")
    clip_norm: float = flag(1.0, "largest gradient norm")
    train_shift: float = flag(3.0, "timestep shift of the times in flow matching")
    prompt_dropout: float = flag(0.1, "share of clips trained without their prompt, for guidance")
    ema: float = flag(0.99, "decay of the averaged weights of both teachers")

    bidirectional_steps: int = flag(5000, "updates of stage bidirectional")
    bidirectional_batch: int = flag(16, "clips per update")
    bidirectional_lr: float = flag(4e-3, "learning rate")

    teacher_forcing_steps: int = flag(1000, "updates of stage teacher_forcing", "teacher_forcing")
    teacher_forcing_batch: int = flag(16, "clips per update", "teacher_forcing")
    teacher_forcing_lr: float = flag(3e-3, "learning rate", "teacher_forcing")

    shift: float = flag(5.0, "timestep shift of inference grids (CF++: 5)", "causal_cd")
    guidance: float = flag(1.5, "teacher guidance w in v_u + w (v_c - v_u)", "causal_cd")
    causal_cd_steps: int = flag(900, "updates of stage causal_cd", "causal_cd")
    causal_cd_batch: int = flag(16, "clips per update", "causal_cd")
    causal_cd_lr: float = flag(1e-3, "learning rate", "causal_cd")
    causal_cd_grid: int = flag(48, "times of the consistency grid (CF++: 48)", "causal_cd")
    causal_cd_ema: float = flag(0.95, "decay of the target network theta-", "causal_cd")

    salt_steps: int = flag(200, "generator updates of stage salt", "salt")
    salt_batch: int = flag(16, "clips per rollout", "salt")
    salt_lr: float = flag(4e-4, "learning rate of the generator", "salt")
    critic_lr: float = flag(8e-4, "learning rate of the critic", "salt")
    score_shift: float = flag(2.0, "timestep shift of the times at which DMD compares scores", "salt")
    score_guidance: float = flag(1.0, "guidance w of DMD's teacher", "salt")
    critic_steps: int = flag(4, "critic updates per generator update", "salt")
    salt_ema: float = flag(0.95, "decay of the generator's averaged weights", "salt")
    mixed_steps: tuple = flag((2, 4, 8), "rollout lengths K (Salt Sec. 3.3)", "salt")
    mixed_probs: tuple = flag((0.2, 0.4, 0.4), "their probabilities (Salt Sec. B)", "salt")
    first_steps: int = flag(4, "least steps of the first chunk (CF++ Sec. 4)", "salt")
    lambda_sc: float = flag(0.2, "weight of self-consistency, at the largest K (Salt: 0.2)", "salt")
    lambda_align: float = flag(0.5, "weight of alignment, at the smaller K (ours; VideoREPA's TRD weight)", "salt")
    align_warmup: float = flag(0.25, "share of the stage before alignment starts (Salt: 600 iterations)", "salt")
    align_prob: float = flag(0.5, "share of later updates that use it (ours; Salt: 'stochastically')", "salt")
    align_margin: float = flag(0.1, "margin delta of alignment (VideoREPA: 0.1)", "salt")

    eval_clips: int = flag(256, "clips behind each row of the table", "none")
    eval_seed: int = flag(0, "prompts and noise of the table; settings were chosen on 0, README reports 1", "none")
    teacher_eval_steps: int = flag(40, "sampling steps of the multi-step teachers", "none")

    def steps_of(self, stage: str) -> int:
        return max(1, round(getattr(self, f"{stage}_steps") * self.longer))


def check(cfg: Config):
    """ValueError for a setting that could only fail later."""
    def need(ok, name, expected):
        if not ok:
            got = ", ".join(f"--{n.replace('_', '-')} {getattr(cfg, n)}" for n in name.split())
            raise ValueError(f"got {got}, expected {expected}")

    need(cfg.size == "toy", "size", "toy")
    need(cfg.stage in (*STAGES, "all", "evaluate"), "stage", f"one of {', '.join(STAGES)}, all, evaluate")
    need(cfg.device == "cpu" or cfg.device.startswith("cuda") and torch.cuda.is_available(), "device",
         "cpu, or cuda where there is a GPU")
    need(not Path(cfg.out).is_file(), "out", "a folder, not a file")
    need(cfg.seed >= 0, "seed", "a number >= 0")
    need(cfg.eval_seed >= 0, "eval_seed", "a number >= 0")
    need(cfg.chunk > 0 and cfg.frames % cfg.chunk == 0 and cfg.frames > 2, "frames chunk",
         "at least 3 frames, a multiple of the chunk")
    need(cfg.mixed_steps[0] > 0 and all(b == 2 * a for a, b in zip(cfg.mixed_steps, cfg.mixed_steps[1:]))
         and cfg.mixed_steps[-1] % 4 == 0, "mixed_steps",
         "each K twice the one before, so that the grids nest, and the last a multiple of 4")
    need(cfg.first_steps > 0 and cfg.mixed_steps[-1] % cfg.first_steps == 0, "first_steps mixed_steps",
         "first steps that divide the largest K")
    need(len(cfg.mixed_steps) == len(cfg.mixed_probs) and min(cfg.mixed_probs) >= 0
         and abs(sum(cfg.mixed_probs) - 1) < 1e-6, "mixed_steps mixed_probs", "one probability each, summing to 1")
    need(1 <= cfg.critic_steps < 100, "critic_steps", "1 to 99")
    for name in ("ema", "causal_cd_ema", "salt_ema", "prompt_dropout"):
        need(0 <= getattr(cfg, name) < 1, name, "at least 0 and below 1")
    for name in ("longer", "shift", "train_shift", "score_shift", "clip_norm", "save_every", "eval_clips",
                 "teacher_eval_steps", "causal_cd_grid", "critic_lr",
                 *(f"{s}_{x}" for s in STAGES for x in ("steps", "batch", "lr"))):
        need(getattr(cfg, name) > 0, name, "a positive number")


# ---------------------------------------------------------------------------------------------------------------------
# Random draws: functions of (what for, seed, stage, step, which of several), and for a sample of its index in the batch

STEER, DROP, PROMPTS, NOISE, RENOISE, CLIPS, WORLD, EVALUATE = range(8)  # what a draw is for


def draws(cfg, stage, step, purpose=STEER, which=0) -> torch.Generator:
    """The generator of draws that are made once for a batch: times, K, exit step, which losses."""
    return data.generator(purpose, cfg.seed, STAGES.index(stage), step, which)


def noise_like(cfg, stage, step, shape, purpose=NOISE, which=0) -> Tensor:
    """Noise `b *shape`, b the stage's batch; sample i has its own generator."""
    key = (purpose, cfg.seed, STAGES.index(stage), step, which)
    return data.noises(range(getattr(cfg, f"{stage}_batch")), shape, *key).to(cfg.device)


def batch(cfg, stage, step) -> tuple[Tensor, Tensor]:
    """Clips `b f c h w` never seen before and their text `b l d`, some of it dropped."""
    size = getattr(cfg, f"{stage}_batch")
    key = (CLIPS, cfg.seed, STAGES.index(stage))
    x0, prompts = data.clips(range(step * size, (step + 1) * size), cfg.frames, *key)
    kept = torch.rand(size, 1, 1, generator=draws(cfg, stage, step, DROP)) >= cfg.prompt_dropout
    return x0.to(cfg.device), (data.embed(prompts) * kept).to(cfg.device)


def prompts_only(cfg, step, which) -> Tensor:
    """Text of random prompts: Salt needs no video."""
    g = draws(cfg, "salt", step, PROMPTS, which)
    return data.embed(torch.randint(len(data.PROMPTS), (cfg.salt_batch,), generator=g)).to(cfg.device)


# ---------------------------------------------------------------------------------------------------------------------
# The stages. Each returns what it trains and update(step) -> metrics, the algorithm box of its paper.

@dataclass
class Training:
    nets: dict  # name -> network; "net" is the one trained for, "ema" its average
    optimizers: dict  # name -> optimizer of nets[name]
    update: Callable[[int], dict]  # step -> metrics


def build(cfg, weights: dict | None = None, seed=0) -> CausalWan:
    net = CausalWan(SIZES[cfg.size]).init_weights(seed)
    if weights:
        load_weights(net, weights, "the checkpoint")
    return net.to(cfg.device)


def frozen(net):
    return net.requires_grad_(False).eval()


def adamw(net, lr, betas=(0.9, 0.95)):
    return torch.optim.AdamW(net.parameters(), lr=lr, betas=betas, weight_decay=0.01)


def descend(cfg, net, optimizer, loss, lr, flag) -> Tensor:
    """One step of an optimizer. Returns the gradient norm; FloatingPointError, naming the lr's flag, if not finite."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.clip_norm)
    if not torch.isfinite(norm):
        raise FloatingPointError(f"got a non-finite loss or gradient, expected a finite one: try a smaller {flag}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return norm


@torch.no_grad()
def average(ema, net, decay, step):
    """ema <- decay ema + (1 - decay) net, with a smaller decay at first, so that the start is forgotten."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


def warm_then_decay(step, steps):
    """Learning-rate factor: 20 steps of warm-up, constant, then linear to a tenth over the last half."""
    return min(1, (step + 1) / 20) * min(1, 0.1 + 1.8 * (1 - step / steps))


def null_text(cfg):
    c = SIZES[cfg.size]
    return torch.zeros(c.text_len, c.text_dim, device=cfg.device)


def diffusion(cfg, stage, net, causal: bool) -> Training:
    """Flow matching: a bidirectional model, or with causal=True an autoregressive one by teacher forcing."""
    ema, optimizer, steps = frozen(copy.deepcopy(net)), adamw(net, 0), cfg.steps_of(stage)

    def update(step):
        x0, text = batch(cfg, stage, step)
        eps = noise_like(cfg, stage, step, x0.shape[1:])
        u = torch.rand(len(x0), cfg.frames // cfg.chunk, generator=draws(cfg, stage, step))  # a time per chunk
        if not causal:
            u[::2] = u[::2, :1]  # one time for the whole clip, as in sampling; the other half teaches faster (ours)
        u = u.repeat_interleave(cfg.chunk, 1)
        layout = {"chunk": cfg.chunk, "clean": x0} if causal else {}
        loss, metrics = flow_matching_loss(net, x0, text, warp(u, cfg.train_shift).to(x0), eps, **layout)
        lr = getattr(cfg, f"{stage}_lr") * warm_then_decay(step, steps)
        metrics["grad_norm"] = descend(cfg, net, optimizer, loss, lr, f"--{stage}-lr".replace("_", "-"))
        average(ema, net, cfg.ema, step)
        return metrics

    return Training({"net": net, "ema": ema}, {"net": optimizer}, update)


def bidirectional(cfg) -> Training:
    return diffusion(cfg, "bidirectional", build(cfg, seed=cfg.seed), causal=False)


def teacher_forcing(cfg) -> Training:
    return diffusion(cfg, "teacher_forcing", build(cfg, finished(cfg, "bidirectional")), causal=True)


def causal_cd(cfg) -> Training:
    weights, steps = finished(cfg, "teacher_forcing"), cfg.steps_of("causal_cd")
    teacher = Guided(frozen(build(cfg, weights)), null_text(cfg), cfg.guidance)
    net, ema = build(cfg, weights), frozen(build(cfg, weights))
    optimizer, grid = adamw(net, 0), schedule(cfg.causal_cd_grid, cfg.shift)

    def update(step):
        x0, text = batch(cfg, "causal_cd", step)
        eps = noise_like(cfg, "causal_cd", step, x0.shape[1:])
        index = draw_index(len(x0), cfg.frames, cfg.chunk, len(grid), draws(cfg, "causal_cd", step))
        loss, metrics = causal_cd_loss(net, ema, teacher, x0, text, grid, index, eps, cfg.chunk)
        lr = cfg.causal_cd_lr * warm_then_decay(step, steps)
        metrics["grad_norm"] = descend(cfg, net, optimizer, loss, lr, "--causal-cd-lr")
        average(ema, net, cfg.causal_cd_ema, step)
        return metrics

    return Training({"net": net, "ema": ema}, {"net": optimizer}, update)


def self_rollout(cfg, net, text, noise, steps, exit_step, triple=None) -> tuple[Tensor, list[Tensor]]:
    """Roll out a clip; with a triple (tm, te), also the self-consistency loss of every chunk. noise: `b K f c h w`."""
    grid, first_grid = grids(steps, cfg.shift, cfg.first_steps)
    x0, sc = [], []
    for chunk in stream(net, shared_noise(noise, cfg.chunk, steps, len(first_grid)), text, grid,
                        chunks=cfg.frames // cfg.chunk, first_grid=first_grid, exit_step=exit_step):
        x0.append(chunk.x0)
        if triple:
            def velocity(x, t, past=chunk.cache):
                return net(x, torch.full(x.shape[:2], t, device=x.device), text, cache=past)
            sc.append(sc_loss.sc_loss(velocity, chunk.x_t, chunk.v, chunk.t, *triple)[0])
    return torch.cat(x0, dim=1), sc


def salt(cfg) -> Training:
    """Salt's autoregressive training: asymmetric DMD on rollouts of the student, of K = 2, 4 or 8 steps (Salt Eq. 13),

        min L_DMD + lambda_sc L_SC 1[K = 8] + lambda_align L_align 1[K in {2, 4}]

    L_SC where the exit step leaves room for a triple: everywhere but at the last time of the grid. L_align after a
    warm-up, in a random share of the updates, at the time and with the noise at which DMD compares its scores.
    """
    weights = finished(cfg, "bidirectional")
    teacher, critic = frozen(build(cfg, weights)), build(cfg, weights)
    weights = finished(cfg, "causal_cd")
    net, ema = build(cfg, weights), frozen(build(cfg, weights))
    real = Guided(teacher, null_text(cfg), cfg.score_guidance)
    optimizer, critic_optimizer = adamw(net, 0, (0.0, 0.999)), adamw(critic, 0, (0.0, 0.999))
    updates, densest, shape = cfg.steps_of("salt"), max(cfg.mixed_steps), video_shape(cfg)
    train_grid = schedule(densest, cfg.shift)  # T_train, all of it supervised by DMD
    infer_grid = schedule(densest // 2, cfg.shift)  # T^(K) of Eq. 9: ends that leave room for a time in between

    def features(x_t, t, text):
        return teacher(x_t, t, text, until=len(teacher.blocks) // 2)

    def draw_rollout(step, which):
        """K, exit step, prompts, noise, and the time and noise at which scores are compared. which = 0: generator's."""
        g = draws(cfg, "salt", step, STEER, which)
        k = cfg.mixed_steps[int(torch.multinomial(torch.tensor(cfg.mixed_probs), 1, generator=g))]
        exit_step = int(torch.randint(k, (), generator=g))
        text = prompts_only(cfg, step, which)
        noise = noise_like(cfg, "salt", step, (densest, *shape), NOISE, which)
        t = dmd.score_times(cfg.salt_batch, cfg.frames, cfg.score_shift, g).to(cfg.device)
        eps = noise_like(cfg, "salt", step, shape, RENOISE, which)
        return k, exit_step, text, noise, t, eps, g

    def update(step):
        decay = warm_then_decay(step, updates)
        for i in range(cfg.critic_steps):
            k, exit_step, text, noise, t, eps, _ = draw_rollout(step, which=1 + i)
            with torch.no_grad():
                x0, _ = self_rollout(cfg, net, text, noise, k, exit_step)
            loss, critic_metrics = dmd.critic_loss(critic, x0, text, t, eps)
            critic_norm = descend(cfg, critic, critic_optimizer, loss, cfg.critic_lr * decay, "--critic-lr")

        k, exit_step, text, noise, t, eps, g = draw_rollout(step, which=0)
        triple = None
        if k == densest and cfg.lambda_sc > 0:
            triple = sc_loss.draw_triple(train_grid[exit_step].item(), train_grid, infer_grid, g)
        x0, sc = self_rollout(cfg, net, text, noise, k, exit_step, triple)
        loss, dmd_metrics = dmd.dmd_loss(x0, text, critic, real, t, eps)
        metrics = critic_metrics | dmd_metrics | {"K": k, "exit_step": exit_step, "critic_grad_norm": critic_norm}
        if sc:
            metrics["sc"] = torch.stack(sc).mean()
            loss = loss + cfg.lambda_sc * metrics["sc"]
        aligned = torch.rand((), generator=g) < cfg.align_prob
        if k < densest and step >= cfg.align_warmup * updates and aligned and cfg.lambda_align > 0:
            with torch.no_grad():  # the next denser schedule, from the same noise, at the same fraction of its steps
                x_ref, _ = self_rollout(cfg, net, text, noise, 2 * k, 2 * exit_step + 1)
            alignment, align_metrics = align.align_loss(features, x0, x_ref, text, t, eps, cfg.align_margin)
            loss, metrics = loss + cfg.lambda_align * alignment, metrics | align_metrics
        metrics["grad_norm"] = descend(cfg, net, optimizer, loss, cfg.salt_lr * decay, "--salt-lr")
        average(ema, net, cfg.salt_ema, step)
        return metrics | {"generator_updates": step + 1, "critic_updates": (step + 1) * cfg.critic_steps}

    return Training({"net": net, "ema": ema, "critic": critic}, {"net": optimizer, "critic": critic_optimizer}, update)


BEGIN = {"bidirectional": bidirectional, "teacher_forcing": teacher_forcing, "causal_cd": causal_cd, "salt": salt}


# ---------------------------------------------------------------------------------------------------------------------
# The loop: resume, update, log, save

def video_shape(cfg) -> tuple:
    return cfg.frames, SIZES[cfg.size].in_dim, data.SIZE, data.SIZE


def path_of(cfg, stage, kind="") -> Path:
    return Path(cfg.out) / f"{stage}{kind}.safetensors"


def is_finished(cfg, stage) -> bool:
    """The raw weights are written first, so the EMA's file says that both are there."""
    ema, raw = path_of(cfg, stage), path_of(cfg, stage, "_raw")
    if ema.exists() and not raw.exists():
        raise ValueError(f"got {ema} without {raw}, expected both: restore it, or delete the first to train again")
    return ema.exists()


def finished(cfg, stage, kind="") -> dict[str, Tensor]:
    """The weights that a finished stage left in --out; ValueError if they are missing, damaged or another's."""
    path = path_of(cfg, stage, kind)
    if not path.is_file():
        raise ValueError(f"got no file {path}, expected the checkpoint of stage {stage}: run `python train.py --stage "
                         f"{stage} --out {cfg.out}` first, or change --out")
    weights, about = read_tensors(path)
    if about.get("stage") != stage or about.get("size") != cfg.size:
        raise ValueError(f"got {path} of stage {about.get('stage')} and size {about.get('size')}, expected stage "
                         f"{stage} and size {cfg.size}: change --out or --size")
    return weights


def save_state(path, training: Training, about: dict):
    tensors = {f"{name}.{k}": v for name, net in training.nets.items() for k, v in net.state_dict().items()}
    for name, optimizer in training.optimizers.items():
        for i, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{name}.{i}.{k}": v for k, v in moments.items()}
    write_tensors(path, tensors, about)


def load_state(path, training: Training) -> dict:
    tensors, about = read_tensors(path)
    for name, net in training.nets.items():
        load_weights(net, {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}, path)
    for name, optimizer in training.optimizers.items():
        state = {}
        for key, v in tensors.items():
            if key.startswith(f"optimizer.{name}."):
                i, k = key.split(".")[2:]
                state.setdefault(int(i), {})[k] = v
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return about


def record(cfg, line: dict):
    with open(Path(cfg.out) / "metrics.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")


def write_text(path: Path, text: str):
    """Replace a text file by a complete new one."""
    fresh = path.with_name(path.name + ".writing")
    with open(fresh, "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(fresh, path)


def forget_after(cfg, stage, step):
    """Drop the metrics of steps that a stopped run made after its last save: they will be made again."""
    path = Path(cfg.out) / "metrics.jsonl"
    if path.exists():
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if line["stage"] != stage or line["step"] < step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def same_settings(cfg, stage, path, was: dict):
    """A stage's weights belong to the settings that made them, its own and those of the stages before."""
    for f in fields(Config):
        now, then = (json.loads(json.dumps(x)) for x in (getattr(cfg, f.name), was.get(f.name)))
        if f.metadata["affects"] in STAGES[: STAGES.index(stage) + 1] and now != then:
            name = "--" + f.name.replace("_", "-")
            raise ValueError(f"got {name} {now}, expected {then}, with which {path} was trained: change {name}, or "
                             "give another --out (with copies of the stages to keep, if you like)")


@contextmanager
def stopping_gently():
    """Yields a list that the first Ctrl-C or SIGTERM fills, so that the update in hand is finished and saved."""
    asked, signals = [], (signal.SIGINT, signal.SIGTERM)

    def ask(number, _):
        asked.append(number)
        restore()

    def restore():
        for number in signals:
            signal.signal(number, before[number])

    before = {number: signal.signal(number, ask) for number in signals}
    try:
        yield asked
    finally:
        restore()


def run_stage(cfg, stage, most: int) -> int:
    """Train one stage to its end, or for `most` updates. Returns the number of updates made."""
    steps, state_path = cfg.steps_of(stage), path_of(cfg, stage, ".state")
    if is_finished(cfg, stage):
        same_settings(cfg, stage, path_of(cfg, stage), about_of(path_of(cfg, stage))["config"])
        print(f"{stage}: already trained, in {path_of(cfg, stage)}")
        return 0
    training = BEGIN[stage](cfg)
    about = {"stage": stage, "size": cfg.size, "step": 0, "seconds": 0.0, "config": asdict(cfg)}
    if state_path.exists():
        about = load_state(state_path, training)
        same_settings(cfg, stage, state_path, about["config"])
    forget_after(cfg, stage, about["step"])
    write_text(Path(cfg.out) / "config.json", json.dumps(asdict(cfg), indent=1))
    first, last = about["step"], min(steps, about["step"] + most)
    start, before = time.time(), about["seconds"]
    bar = tqdm(total=steps, initial=first, desc=stage, mininterval=1, smoothing=0.05)
    with bar, stopping_gently() as asked_to_stop:
        for step in range(first, last):
            try:
                metrics = {k: float(torch.as_tensor(v).detach()) for k, v in training.update(step).items()}
            except FloatingPointError as e:
                raise ValueError(f"stage {stage}, step {step}: {e}, with another --out. The state last saved is kept "
                                 f"in {state_path}") from e
            record(cfg, {"stage": stage, "step": step, **metrics})
            bar.update()
            if (step + 1) % cfg.save_every == 0 or step + 1 == last or asked_to_stop:
                about |= {"step": step + 1, "seconds": before + time.time() - start}
                save_state(state_path, training, about)
                bar.set_postfix({k: f"{v:.3g}" for k, v in list(metrics.items())[:3]})
            if asked_to_stop:
                break
    if about["step"] == steps:
        about |= {"solver": "cm" if stage in FEW_STEP else "euler", "saved": time.time()}
        write_tensors(path_of(cfg, stage, "_raw"), training.nets["net"].state_dict(), about)
        write_tensors(path_of(cfg, stage), training.nets["ema"].state_dict(), about)
    return about["step"] - first


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: every stage on the same prompts and noise

@torch.no_grad()
def generate(cfg, stage, net, steps, prompts, noise) -> Tensor:
    """Clips as this stage's model samples them. prompts `b`; noise `b K f c h w` as in rollout.shared_noise."""
    text = data.embed(prompts).to(cfg.device)
    if stage in FEW_STEP:
        return self_rollout(cfg, net, text, noise, steps, steps - 1)[0]
    net, grid = Guided(net, null_text(cfg), cfg.guidance), schedule(steps, cfg.shift)
    if stage == "bidirectional":
        return sample(lambda x, t: net(x, torch.full(x.shape[:2], t, device=x.device), text), noise, grid)
    chunks = stream(net, lambda i, k: noise[:, 0, i * cfg.chunk : (i + 1) * cfg.chunk], text, grid,
                    chunks=cfg.frames // cfg.chunk, solver="euler")
    return torch.cat([c.x0 for c in chunks], dim=1)


def evaluation_set(cfg, clips):
    """Real clips, prompts and noise that no training ever draws."""
    real, prompts = data.clips(range(clips), cfg.frames, EVALUATE, cfg.eval_seed, 0)
    noise = data.noises(range(clips), (max(cfg.mixed_steps), *video_shape(cfg)), EVALUATE, cfg.eval_seed, 1)
    return real.to(cfg.device), prompts, noise.to(cfg.device)


def row(cfg, stage, weights, steps, nfe, x, prompts, sample_seconds, about) -> dict:
    world = data.motion(data.tracks(range(4096), cfg.frames, WORLD)[0])
    return {"stage": stage, "weights": weights, "steps": steps, "nfe": nfe, **data.measure(x, prompts, world),
            "sample_seconds": sample_seconds, "train_seconds": about.get("seconds", 0), "saved": about.get("saved"),
            "clips": cfg.eval_clips, "eval_seed": cfg.eval_seed, "teacher_eval_steps": cfg.teacher_eval_steps}


def evaluate(cfg, stage) -> list[dict]:
    """Table rows of a finished stage: EMA and raw weights at 1, 2 and 4 steps, teachers also at their full number."""
    _, prompts, noise = evaluation_set(cfg, cfg.eval_clips)
    about, rows = about_of(path_of(cfg, stage)), []
    for weights, kind in (("ema", ""), ("raw", "_raw")):
        net = frozen(build(cfg, finished(cfg, stage, kind)))
        for steps in steps_shown(cfg, stage):
            start = time.time()
            parts = zip(prompts.split(256), noise.split(256))
            x = torch.cat([generate(cfg, stage, net, steps, p, z) for p, z in parts])
            nfe = steps if stage in FEW_STEP else 2 * steps  # guidance runs the network twice
            rows.append(row(cfg, stage, weights, steps, nfe, x, prompts, time.time() - start, about))
            if weights == "raw" and stage not in FEW_STEP:
                break
    return rows


def steps_shown(cfg, stage) -> tuple:
    return (1, 2, 4) if stage in FEW_STEP else (cfg.teacher_eval_steps, 4, 2, 1)


def known_rows(cfg, stage) -> list[dict]:
    """Rows of an earlier evaluation of the very same weights with the same settings."""
    path, saved = table_path(cfg), about_of(path_of(cfg, stage))["saved"]
    rows = json.loads(path.read_text()) if path.exists() else []
    same = {"stage": stage, "saved": saved, "clips": cfg.eval_clips, "teacher_eval_steps": cfg.teacher_eval_steps}
    return [r for r in rows if all(r[k] == v for k, v in same.items())]


def table_path(cfg) -> Path:
    return Path(cfg.out) / f"table_seed{cfg.eval_seed}.json"


def print_rows(rows, header=True):
    if header:
        print(f"{'stage':<16} {'weights':<7} {'steps':>5} {'NFE':>4} | {'quality':>8} {'frame 3':>8} {'last':>8} "
              f"{'drift':>6} {'semantic':>8} {'dynamics':>8} {'distance':>8} | {'sample s':>8} {'train s':>8}")
    for r in rows:
        q, semantic = r["quality_by_frame"], 100 * r["semantic"]
        print(f"{r['stage']:<16} {r['weights']:<7} {r['steps']:>5} {r['nfe']:>4} | {r['quality']:>8.4f} {q[2]:>8.4f} "
              f"{q[-1]:>8.4f} {r['drift']:>6.2f} {semantic:>7.1f}% {r['dynamics']:>8.2f} {r['distance']:>8.3f} | "
              f"{r['sample_seconds']:>8.1f} {r['train_seconds']:>8.0f}")
    sys.stdout.flush()


def draw_sheet(cfg, stages, name):
    """Pictures of finished stages at 1, 2, 4 steps (teachers also at their full number) on the same six clips."""
    real, prompts, noise = evaluation_set(cfg, 6)
    rows = {"the world": real}
    for stage in stages:
        net = frozen(build(cfg, finished(cfg, stage)))
        for steps in sorted(steps_shown(cfg, stage)):
            rows[f"{stage} {steps}"] = generate(cfg, stage, net, steps, prompts, noise)
    data.sheet(rows, Path(cfg.out) / name)


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def main(cfg: Config) -> list[dict]:
    """Run what the config asks for. Returns the rows of the table (empty if stopped before its end)."""
    check(cfg)
    stages = STAGES if cfg.stage == "all" else (cfg.stage,)
    if cfg.stage == "evaluate":
        stages = [stage for stage in STAGES if is_finished(cfg, stage)]
        if not stages:
            raise ValueError(f"got --out {cfg.out}, expected a folder with a trained stage: change --out, or train")
        then = about_of(path_of(cfg, stages[-1]))["config"]
        trained = {f.name: then[f.name] for f in fields(Config) if f.metadata["affects"] != "none"}
        cfg = replace(cfg, **{k: tuple(v) if isinstance(v, list) else v for k, v in trained.items()})
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    print("settings:", json.dumps(asdict(cfg)))
    for k in cfg.mixed_steps:
        print(f"times of {k} steps:", [round(t, 4) for t in schedule(k, cfg.shift).tolist()])

    left = cfg.stop_after or sys.maxsize
    real, prompts, _ = evaluation_set(cfg, cfg.eval_clips)
    rows = [row(cfg, "the world", "", 0, 0, real, prompts, 0, {})]
    print_rows(rows)
    for stage in stages:
        if cfg.stage != "evaluate":
            done = run_stage(cfg, stage, left)
            left -= done
            if left == 0 or not is_finished(cfg, stage):
                print(f"stopped; the same command goes on from {path_of(cfg, stage, '.state')}")
                return []
        known = known_rows(cfg, stage)
        rows += known or evaluate(cfg, stage)
        print_rows([r for r in rows if r["stage"] == stage], header=False)
        if not known:
            old = json.loads(table_path(cfg).read_text()) if table_path(cfg).exists() else []
            fresh = {r["stage"] for r in rows}
            write_text(table_path(cfg), json.dumps(rows + [r for r in old if r["stage"] not in fresh], indent=1))
            draw_sheet(cfg, [stage], stage)
    draw_sheet(cfg, [s for s in STAGES if is_finished(cfg, s)], "sheet")
    print()
    print_rows(rows)
    return rows


def parse(argv=None) -> Config:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    for f in fields(Config):
        many = isinstance(f.default, tuple)
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=f.default, nargs="+" if many else None,
                            type=type(f.default[0] if many else f.default), metavar="X",
                            help=f"{f.metadata['help']} (default: {f.default})".replace("%", "%%"))
    values = vars(parser.parse_args(argv))
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


if __name__ == "__main__":
    try:
        main(parse())
    except ValueError as e:
        sys.exit(f"ValueError: {e}")
