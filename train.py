"""Train a few-step autoregressive video model through every stage of Salt and Causal Forcing++.

    python train.py                          # the toy recipe: four stages on a laptop, about 20 minutes on 2 CPU cores
    python train.py --stage causal_cd        # one stage; it starts from what the stages before left in --out
    python train.py --stage self_forcing     # a baseline of the papers: baselines.py lists them
    python train.py --longer 3 --out runs/long            # the same recipe, three times as long
    python train.py --stage evaluate --eval-seed 1        # measure again what a run left, on other prompts and seeds
    python train.py --help                   # every flag

The four stages of the recipe are in stages.py, every other method in baselines.py; this file is the config, the loop
and the measuring.

A run leaves in --out: STAGE.safetensors (EMA weights, official names) and STAGE_raw.safetensors, sheets of pictures,
config.json, metrics.jsonl, and STAGE.state.safetensors, from which a stopped run goes on, step for step as if it had
never stopped: every random draw is a function of (seed, kind of stage, step, index in the batch). What is written
replaces the old only when it is complete; nothing is pickled.
"""

import argparse
import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import data
from baselines import BASELINES
from flowmap import Guided, sample, schedule
from model import about_of, load_weights, read_tensors, write_tensors
from rollout import stream
from sc_loss import path_defects
from stages import (
    EVALUATE,
    KINDS,
    RECIPE,
    WORLD,
    Training,
    build,
    finished,
    frozen,
    null_text,
    path_of,
    self_rollout,
    video_shape,
)

STAGES = RECIPE | BASELINES


def flag(default, help, affects="bidirectional"):
    """A setting; affects: the kinds of stage (stages.KINDS) whose weights depend on it, or "none". Every stage depends
    on what its teachers depend on."""
    return field(default=default, metadata={"help": help, "affects": affects})


@dataclass
class Config:
    """Every setting of a run; each is also a command-line flag of the same name."""

    size: str = flag("toy", "the network: toy")
    stage: str = flag("all", "one of the recipe, bidirectional teacher_forcing causal_cd salt; all of these; a "
                             "baseline (see baselines.py); or evaluate", "none")
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

    # distillation along the teacher's trajectories: causal_cd; bidirectional_ode, causal_ode, pcm, scfm
    shift: float = flag(5.0, "timestep shift of inference grids (CF++: 5)", "trajectory dmd")
    guidance: float = flag(1.5, "teacher guidance w in v_u + w (v_c - v_u)", "trajectory dmd")
    trajectory_steps: int = flag(900, "updates of a distillation along trajectories", "trajectory")
    trajectory_batch: int = flag(16, "clips per update", "trajectory")
    trajectory_lr: float = flag(1e-3, "learning rate", "trajectory")
    trajectory_grid: int = flag(48, "times of the teacher's trajectory (CF++: 48)", "trajectory")
    trajectory_ema: float = flag(0.95, "decay of the target network theta-", "trajectory")
    trajectories: int = flag(1024, "stored trajectories of causal_ode and bidirectional_ode", "trajectory")
    phases: int = flag(4, "phases of pcm, and its sampling steps", "trajectory")
    shortcut_grid: int = flag(32, "times of the dense grid of scfm and dmd4_scfm, a power of two", "trajectory dmd")

    # distribution matching: salt, and every method with a critic
    init: str = flag("", "stage whose weights the student starts from; the method's own if not given", "dmd")
    dmd_steps: int = flag(200, "generator updates of a DMD stage", "dmd")
    dmd_batch: int = flag(16, "clips per update", "dmd")
    dmd_lr: float = flag(4e-4, "learning rate of the generator", "dmd")
    critic_lr: float = flag(8e-4, "learning rate of the critic", "dmd")
    critic_steps: int = flag(4, "critic updates per generator update", "dmd")
    dmd_ema: float = flag(0.95, "decay of the generator's averaged weights", "dmd")
    score_shift: float = flag(2.0, "timestep shift of the times at which DMD compares scores", "dmd")
    score_guidance: float = flag(1.0, "guidance w of DMD's teacher", "dmd")
    train_grid: int = flag(8, "times of SC-DMD's grid (Salt: 8)", "dmd")
    rollout_steps: int = flag(4, "steps K of students with one fixed K: self_forcing, causvid, ...", "dmd")
    mixed_steps: tuple = flag((2, 4, 8), "rollout lengths K of salt and mixed_sc (Salt Sec. 3.3)", "dmd")
    mixed_probs: tuple = flag((0.2, 0.4, 0.4), "their probabilities (Salt Sec. B)", "dmd")
    first_steps: int = flag(4, "least steps of the first chunk (CF++ Sec. 4); 1: as many as the others", "dmd")
    window: int = flag(0, "frames that a frame of a stage-3 student sees, itself included (LongLive); 0: all", "dmd")
    sink: int = flag(0, "of these, how many are the first of the clip", "dmd")
    lambda_sc: float = flag(0.2, "weight of self-consistency, at the largest K (Salt: 0.2)", "dmd")
    sc_through: str = flag("both", "branches of L_SC that carry gradient: both, direct or composed", "dmd")
    lambda_align: float = flag(0.5, "weight of alignment, at the smaller K (ours; VideoREPA's TRD weight)", "dmd")
    align_warmup: float = flag(0.25, "share of the stage before alignment starts (Salt: 600 iterations)", "dmd")
    align_prob: float = flag(0.5, "share of later updates that use it (ours; Salt: 'stochastically')", "dmd")
    align_margin: float = flag(0.1, "margin delta of alignment (VideoREPA: 0.1)", "dmd")
    align_features: str = flag("teacher", "network whose features alignment compares: teacher or critic", "dmd")
    align_depth: float = flag(0.5, "depth of those features, 1: after its last block", "dmd")
    lambda_gan: float = flag(0.03, "weight of sc_dmd_gan's discriminator (ours)", "dmd")
    lambda_scfm: float = flag(1.0, "weight of the shortcut loss in dmd4_scfm (ours)", "dmd")
    lambda_rcm: float = flag(1.0, "weight of the consistency loss in rcm, DMD's being 1 (ours)", "dmd")

    eval_clips: int = flag(256, "clips behind each row of the table", "none")
    eval_seed: int = flag(0, "prompts and noise of the table; settings were chosen on 0, README reports 1", "none")
    teacher_eval_steps: int = flag(40, "sampling steps of the multi-step teachers", "none")

    def steps_of(self, kind: str) -> int:
        return max(1, round(getattr(self, f"{kind}_steps") * self.longer))


def check(cfg: Config):
    """ValueError for a setting that could only fail later."""
    def need(ok, name, expected):
        if not ok:
            got = ", ".join(f"--{n.replace('_', '-')} {getattr(cfg, n)}" for n in name.split())
            raise ValueError(f"got {got}, expected {expected}")

    def power_of_two(n):
        return n > 0 and n & (n - 1) == 0

    need(cfg.size == "toy", "size", "toy")
    need(cfg.stage in (*STAGES, "all", "evaluate"), "stage", f"one of {', '.join(STAGES)}, all, evaluate")
    need(cfg.init == "" or cfg.init in STAGES, "init", f"one of {', '.join(STAGES)}")
    need(cfg.init == "" or cfg.stage in STAGES and STAGES[cfg.stage].kind == "dmd", "init stage",
         "a DMD stage, which starts from it")
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
    need(power_of_two(cfg.rollout_steps) and power_of_two(cfg.first_steps), "rollout_steps first_steps",
         "powers of two, so that the grids nest")
    need(len(cfg.mixed_steps) == len(cfg.mixed_probs) and min(cfg.mixed_probs) >= 0
         and abs(sum(cfg.mixed_probs) - 1) < 1e-6, "mixed_steps mixed_probs", "one probability each, summing to 1")
    need(1 <= cfg.critic_steps < 100, "critic_steps", "1 to 99")
    need(cfg.stage != "naive_sc" or cfg.rollout_steps > 1, "stage rollout_steps", "at least 2 steps, for a triple")
    need(power_of_two(cfg.shortcut_grid) and cfg.shortcut_grid > 1, "shortcut_grid", "a power of two")
    need(cfg.trajectory_grid % (4 * cfg.phases) == 0, "trajectory_grid phases",
         "a multiple of 4 and of the phases, so that the students' times lie on it")
    need(cfg.train_grid > 3 and cfg.train_grid % 2 == 0, "train_grid", "an even number, at least 4")
    need(cfg.sc_through in ("both", "direct", "composed"), "sc_through", "both, direct or composed")
    need(cfg.align_features in ("teacher", "critic"), "align_features", "teacher or critic")
    need(0 < cfg.align_depth <= 1, "align_depth", "above 0 and at most 1")
    need(cfg.sink >= 0 and (cfg.window == 0 or cfg.window >= cfg.sink + cfg.chunk), "window sink chunk",
         "a window that holds the sink and a chunk, or 0")
    for name in ("ema", "trajectory_ema", "dmd_ema", "prompt_dropout"):
        need(0 <= getattr(cfg, name) < 1, name, "at least 0 and below 1")
    for name in ("longer", "shift", "train_shift", "score_shift", "clip_norm", "save_every", "eval_clips",
                 "teacher_eval_steps", "trajectories", "phases", "critic_lr",
                 *(f"{s}_{x}" for s in KINDS for x in ("steps", "batch", "lr"))):
        need(getattr(cfg, name) > 0, name, "a positive number")


# ---------------------------------------------------------------------------------------------------------------------
# The loop: resume, update, log, save

def is_finished(cfg, stage) -> bool:
    """The raw weights are written first, so the EMA's file says that both are there."""
    ema, raw = path_of(cfg, stage), path_of(cfg, stage, "_raw")
    if ema.exists() and not raw.exists():
        raise ValueError(f"got {ema} without {raw}, expected both: restore it, or delete the first to train again")
    return ema.exists()


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


def start_of(cfg, stage) -> str | None:
    """The stage whose weights a stage starts from."""
    return cfg.init if cfg.init and STAGES[stage].kind == "dmd" else STAGES[stage].start


def kinds_behind(cfg, stage) -> set[str]:
    """The kinds of a stage and of all that it starts from."""
    start = start_of(cfg, stage)
    return {STAGES[stage].kind} | (kinds_behind(replace(cfg, init=""), start) if start else set())


def same_settings(cfg, stage, path, was: dict):
    """A stage's weights belong to the settings that made them, its own and those of the stages before."""
    for f in fields(Config):
        now, then = (json.loads(json.dumps(x)) for x in (getattr(cfg, f.name), was.get(f.name, f.default)))
        if set(f.metadata["affects"].split()) & kinds_behind(cfg, stage) and now != then:
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
    steps, state_path = cfg.steps_of(STAGES[stage].kind), path_of(cfg, stage, ".state")
    if is_finished(cfg, stage):
        same_settings(cfg, stage, path_of(cfg, stage), about_of(path_of(cfg, stage))["config"])
        print(f"{stage}: already trained, in {path_of(cfg, stage)}")
        return 0
    training = STAGES[stage].begin(cfg, start_of(cfg, stage))
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
        about |= {k: getattr(STAGES[stage], k) for k in ("causal", "few_step", "solver")}
        about |= {"saved": time.time(), **training.cost}
        write_tensors(path_of(cfg, stage, "_raw"), training.nets["net"].state_dict(), about)
        write_tensors(path_of(cfg, stage), training.nets["ema"].state_dict(), about)
    return about["step"] - first


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: every stage on the same prompts and noise

def as_trained(cfg, stage) -> Config:
    """cfg with every setting that shaped a finished stage as it was then."""
    then = about_of(path_of(cfg, stage))["config"]
    shaped = {f.name: then[f.name] for f in fields(Config) if f.metadata["affects"] != "none" and f.name in then}
    return replace(cfg, **{k: tuple(v) if isinstance(v, list) else v for k, v in shaped.items()})


@torch.no_grad()
def generate(cfg, stage, net, steps, prompts, noise) -> Tensor:
    """Clips as this stage's model samples them. prompts `b`; noise `b K f c h w` as in rollout.shared_noise."""
    text, how, grid = data.embed(prompts).to(cfg.device), STAGES[stage], schedule(steps, cfg.shift)
    if how.causal and how.few_step:
        return self_rollout(cfg, net, text, noise, steps, steps - 1)[0]
    if not how.few_step:
        net, noise = Guided(net, null_text(cfg), cfg.guidance), noise[:, :1]
    if how.causal:
        chunks = stream(net, lambda i, k: noise[:, 0, i * cfg.chunk : (i + 1) * cfg.chunk], text, grid,
                        chunks=cfg.frames // cfg.chunk, solver=how.solver)
        return torch.cat([c.x0 for c in chunks], dim=1)
    stride = max(1, noise.shape[1] // steps)  # the grids nest: equal times get equal noise
    return sample(lambda x, t: net(x, torch.full(x.shape[:2], t, device=x.device), text), noise[:, ::stride], grid,
                  how.solver)


def evaluation_set(cfg, clips):
    """Real clips, prompts and noise that no training ever draws."""
    real, prompts = data.clips(range(clips), cfg.frames, EVALUATE, cfg.eval_seed, 0)
    noise = data.noises(range(clips), (max(cfg.mixed_steps), *video_shape(cfg)), EVALUATE, cfg.eval_seed, 1)
    return real.to(cfg.device), prompts, noise.to(cfg.device)


@lru_cache(maxsize=2)
def world_motion(frames: int) -> tuple[Tensor, Tensor]:
    """Speeds and turns of the world, what those of generated clips are compared with."""
    return data.motion(data.tracks(range(4096), frames, WORLD)[0])


def row(cfg, stage, weights, steps, nfe, x, prompts, sample_seconds, about, defect=0.0) -> dict:
    measured = data.measure(x, prompts, world_motion(cfg.frames))
    return {"stage": stage, "weights": weights, "steps": steps, "nfe": nfe, **measured,
            "defect": defect,
            "sample_seconds": sample_seconds, "train_seconds": about.get("seconds", 0), "saved": about.get("saved"),
            "data_seconds": about.get("data_seconds", 0), "data_bytes": about.get("data_bytes", 0),
            "clips": cfg.eval_clips, "eval_seed": cfg.eval_seed, "teacher_eval_steps": cfg.teacher_eval_steps}


@torch.no_grad()
def composition(cfg, stage, net, real, prompts, noise) -> float:
    """Mean semigroup defect along the 4-step path (Salt Eq. 14-16, A.1), behind the clean past where there is one."""
    text = data.embed(prompts).to(cfg.device)
    layout = {"chunk": cfg.chunk, "clean": real} if STAGES[stage].causal else {}

    def velocity(x, t):
        return net(x, torch.full(x.shape[:2], t, device=x.device), text, **layout)

    defects = path_defects(velocity, noise[:, 0], schedule(4, cfg.shift), schedule(8, cfg.shift))
    return sum(defects) / len(defects)


def evaluate(cfg, stage) -> list[dict]:
    """Table rows of a finished stage: EMA and raw weights at 1, 2 and 4 steps, teachers also at their full number."""
    cfg, how = as_trained(cfg, stage), STAGES[stage]
    real, prompts, noise = evaluation_set(cfg, cfg.eval_clips)
    about, rows = about_of(path_of(cfg, stage)), []
    for weights, kind in (("ema", ""), ("raw", "_raw")):
        net = frozen(build(cfg, finished(cfg, stage, kind), windowed=how.windowed))
        sampled = net if how.few_step else Guided(net, null_text(cfg), cfg.guidance)
        defect = composition(cfg, stage, sampled, real[:256], prompts[:256], noise[:256])
        for steps in steps_shown(cfg, stage):
            start = time.time()
            parts = zip(prompts.split(256), noise.split(256))
            x = torch.cat([generate(cfg, stage, net, steps, p, z) for p, z in parts])
            nfe = steps if how.few_step else 2 * steps  # guidance runs the network twice
            rows.append(row(cfg, stage, weights, steps, nfe, x, prompts, time.time() - start, about, defect))
            if weights == "raw" and not how.few_step:
                break
    return rows


def steps_shown(cfg, stage) -> tuple:
    if not STAGES[stage].few_step:
        return cfg.teacher_eval_steps, 4, 2, 1
    return (1, 2, 4) if STAGES[stage].causal else tuple(k for k in (1, 2, 4, 8) if max(cfg.mixed_steps) % k == 0)


def known_rows(cfg, stage) -> list[dict]:
    """Rows of an earlier evaluation of the very same weights with the same settings."""
    path, saved = table_path(cfg), about_of(path_of(cfg, stage))["saved"]
    rows = json.loads(path.read_text()) if path.exists() else []
    same = {"stage": stage, "saved": saved, "clips": cfg.eval_clips, "teacher_eval_steps": cfg.teacher_eval_steps}
    return [r for r in rows if all(r[k] == v for k, v in same.items()) and "defect" in r]


def table_path(cfg) -> Path:
    return Path(cfg.out) / f"table_seed{cfg.eval_seed}.json"


def print_rows(rows, header=True):
    if header:
        print(f"{'stage':<16} {'weights':<7} {'steps':>5} {'NFE':>4} | {'quality':>8} {'frame 3':>8} {'last':>8} "
              f"{'drift':>6} {'semantic':>8} {'dynamics':>8} {'distance':>8} {'defect':>7} | {'sample s':>8} "
              f"{'train s':>8}")
    for r in rows:
        q, semantic = r["quality_by_frame"], 100 * r["semantic"]
        print(f"{r['stage']:<16} {r['weights']:<7} {r['steps']:>5} {r['nfe']:>4} | {r['quality']:>8.4f} {q[2]:>8.4f} "
              f"{q[-1]:>8.4f} {r['drift']:>6.2f} {semantic:>7.1f}% {r['dynamics']:>8.2f} {r['distance']:>8.3f} "
              f"{r['defect']:>7.4f} | {r['sample_seconds']:>8.1f} {r['train_seconds']:>8.0f}")
    sys.stdout.flush()


def draw_sheet(cfg, stages, name):
    """Pictures of finished stages at 1, 2, 4 steps (teachers also at their full number) on the same six clips."""
    real, prompts, noise = evaluation_set(cfg, 6)
    rows = {"the world": real}
    for stage in stages:
        was, how = as_trained(cfg, stage), STAGES[stage]
        net = frozen(build(was, finished(was, stage), windowed=how.windowed))
        for steps in sorted(steps_shown(was, stage)):
            rows[f"{stage} {steps}"] = generate(was, stage, net, steps, prompts, noise)
    data.sheet(rows, Path(cfg.out) / name)


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def main(cfg: Config) -> list[dict]:
    """Run what the config asks for. Returns the rows of the table (empty if stopped before its end)."""
    check(cfg)
    stages = RECIPE if cfg.stage == "all" else (cfg.stage,)
    if cfg.stage == "evaluate":
        stages = [stage for stage in STAGES if is_finished(cfg, stage)]
        if not stages:
            raise ValueError(f"got --out {cfg.out}, expected a folder with a trained stage: change --out, or train")
        cfg = as_trained(cfg, stages[-1])
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
    except KeyboardInterrupt:  # in the middle of measuring; updates are finished and saved first
        sys.exit("stopped while measuring; the same command measures again")
