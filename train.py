"""Train a few-step autoregressive video model through every stage of Salt and Causal Forcing++.

    python train.py                          # the toy recipe: four stages on a laptop, about 15 minutes on 2 CPU cores
    python train.py --stage causal_cd        # one stage; it starts from what the stages before left in --out
    python train.py --stage self_forcing     # a baseline of the papers: baselines.py lists them
    python train.py --longer 3 --out runs/long            # the same recipe, three times as long
    python train.py --stage evaluate --eval-seed 1        # measure again what a run left, on other prompts and seeds
    python train.py --help                   # every flag

    torchrun --nproc_per_node 2 train.py                  # the same on 2 ranks: gloo on CPUs, nccl on GPUs
    torchrun --nproc_per_node 8 train.py --size wan1.3b --stage teacher_forcing --data latents --out runs/wan --accum 8
    torchrun --nnodes 4 --nproc_per_node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --max-restarts 3 train.py \
        --size wan1.3b --stage salt --data prompts --out runs/wan --accum 2
    python train.py --size wan1.3b --data random --plan   # what it would need; nothing is allocated

The four stages of the recipe are in stages.py, every other method in baselines.py, the papers' settings in presets.py,
all that knows of ranks in fsdp.py, the measuring in evaluate.py; this file is the config and the loop.

A run leaves in --out: STAGE.safetensors (EMA weights, official names) and STAGE_raw.safetensors, sheets of pictures,
config.json, metrics.jsonl, and STAGE.state/, checkpoints from which a stopped or killed run goes on, step for step as
if it had never stopped, on the same number of ranks or another: every random draw is a function of (seed, kind of
stage, step, index in the batch). What is written replaces the old only when it is complete.
"""

import argparse
import json
import re
import signal
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import data
import evaluate
import flops
import fsdp
import plan
import presets
from baselines import STAGES
from files import about_of, in_use, is_full, read_json, run_command, tidy, write_tensors, write_text
from flowmap import schedule
from model import SIZES
from stages import RECIPE, folder, is_finished, path_of, record_of


def flag(default, help, affects="bidirectional"):
    """A setting; affects: the kinds of stage (stages.KINDS) whose weights depend on it, "each" that a stage may have
    for itself, or "none". Every stage depends on what its teachers depend on."""
    return field(default=default, metadata={"help": help, "affects": affects})


@dataclass
class Config:
    """Every setting of a run; each is also a command-line flag of the same name."""

    size: str = flag("toy", "the network: toy, toy_large, wan_tiny, wan1.3b, wan14b")
    preset: str = flag("", "settings of a method at Wan's size: self_forcing, causal_forcing, causal_forcing_pp, salt, "
                           "sc_dmd (presets.py)", "none")
    stage: str = flag("all", "one of the recipe, bidirectional teacher_forcing causal_cd salt; all of these; a "
                             "baseline (see baselines.py); or evaluate", "none")
    out: str = flag("runs/toy", "folder for checkpoints, metrics and pictures", "none")
    seed: int = flag(0, "of weights, data, noise and every other draw")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda", "none")
    longer: float = flag(1.0, "multiply the steps of every stage")
    save_every: int = flag(100, "steps between checkpoints, from which a stopped run resumes", "none")
    keep: int = flag(2, "checkpoints to keep of each stage", "none")
    sheet_every: int = flag(50, "updates between pictures of what a DMD stage makes, and of its scores", "none")
    stop_after: str = flag("", "stop (resumably) after so many updates, 200, or after a time, 90s 30m 8h", "none")
    skip_nonfinite: int = flag(0, "updates with a non-finite loss or gradient to leave out before giving up", "none")

    frames: int = flag(8, "latent frames per clip")
    height: int = flag(data.SIZE, "rows of a latent frame")
    width: int = flag(data.SIZE, "columns of a latent frame")
    data: str = flag("", "folder of latents and prompts (data.LatentFolder); random: noise; else the toy world", "none")
    bad_data: str = flag("stop", "at a damaged sample in --data: stop, or skip to the next", "none")
    chunk: int = flag(1, "frames per autoregressive chunk")
    batch: int = flag(16, "clips per update, over all ranks", "each")
    accum: int = flag(1, "forward and backward passes that a rank splits its share of the batch into", "none")

    precision: str = flag("fp32", "fp32, or bf16: compute in bf16, with fp32 weights, reductions and losses", "each")
    checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, more time", "none")
    compile: bool = flag(False, "torch.compile the blocks", "none")
    gather: str = flag("forward", "gather weights for every forward, or (update) keep them until a backward", "none")
    shard_over: int = flag(0, "ranks that share one copy of the weights; 0: those of a node", "none")
    check_ranks: bool = flag(False, "compare the ranks before every forward, to find the first that differs", "none")
    timeout: float = flag(600.0, "seconds to wait for another rank before stopping", "none")
    plan: bool = flag(False, "print what --stage needs, memory, FLOPs and GPUs, and stop", "none")
    gpu_memory: float = flag(80.0, "GB of memory of a GPU, for --plan", "none")
    teacher_size: str = flag("", "size of DMD's teacher, if not --size", "dmd")
    teacher_out: str = flag("", "folder with DMD's teacher of --teacher-size", "none")

    clip_norm: float = flag(1.0, "largest gradient norm", "each")
    lr_schedule: str = flag("decay", "constant, or decay: 20 updates of warm-up, then to a tenth over the last half",
                            "each")
    ema_ramp: bool = flag(True, "let the decay of an average grow with the step, so that its start is forgotten",
                           "each")
    train_shift: float = flag(3.0, "timestep shift of the times in flow matching")
    prompt_dropout: float = flag(0.1, "share of clips trained with the empty prompt, for guidance")
    teacher_betas: tuple = flag((0.9, 0.95), "AdamW's betas of both teachers")
    ema: float = flag(0.99, "decay of the averaged weights of both teachers")

    bidirectional_steps: int = flag(5000, "updates of stage bidirectional")
    bidirectional_lr: float = flag(4e-3, "learning rate")

    teacher_forcing_steps: int = flag(1000, "updates of stage teacher_forcing", "teacher_forcing")
    teacher_forcing_lr: float = flag(3e-3, "learning rate", "teacher_forcing")
    teacher_forcing_weight: str = flag("flat", "weight of its loss by t: flat, or bell, 0 at t = 0 and 1 (CF's code)",
                                       "teacher_forcing")

    # distillation along the teacher's trajectories: causal_cd; bidirectional_ode, causal_ode, pcm, scfm
    shift: float = flag(5.0, "timestep shift of inference grids (CF++: 5)", "trajectory dmd")
    guidance: float = flag(1.5, "teacher guidance w in v_u + w (v_c - v_u)", "trajectory")
    trajectory_steps: int = flag(900, "updates of a distillation along trajectories", "trajectory")
    trajectory_lr: float = flag(1e-3, "learning rate", "trajectory")
    trajectory_grid: int = flag(48, "times of the teacher's trajectory (CF++: 48)", "trajectory")
    trajectory_betas: tuple = flag((0.9, 0.95), "AdamW's betas", "trajectory")
    trajectory_ema: float = flag(0.95, "decay of the target network theta-", "trajectory")
    trajectories: int = flag(1024, "stored trajectories of causal_ode and bidirectional_ode", "trajectory")
    phases: int = flag(4, "phases of pcm, and its sampling steps", "trajectory")
    shortcut_grid: int = flag(32, "times of the dense grid of scfm and dmd4_scfm, a power of two", "trajectory dmd")

    # distribution matching: salt, and every method with a critic
    init: str = flag("", "stage whose weights the student starts from; the method's own if not given", "dmd")
    dmd_steps: int = flag(200, "generator updates of a DMD stage", "dmd")
    dmd_lr: float = flag(4e-4, "learning rate of the generator", "dmd")
    critic_lr: float = flag(8e-4, "learning rate of the critic", "dmd")
    critic_steps: int = flag(4, "critic updates per generator update", "dmd")
    dmd_betas: tuple = flag((0.0, 0.999), "AdamW's betas of generator and critic", "dmd")
    dmd_ema: float = flag(0.95, "decay of the generator's averaged weights", "dmd")
    dmd_ema_start: int = flag(0, "generator updates before the average starts; until then it is a copy", "dmd")
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
    lambda_rcm: float = flag(1.0, "weight of the consistency loss in rcm, in units of rCM's own", "dmd")

    eval_clips: int = flag(256, "clips behind each row of the table", "none")
    eval_seed: int = flag(0, "prompts and noise of the table; settings were chosen on 0, README reports 1", "none")
    teacher_eval_steps: int = flag(40, "sampling steps of the multi-step teachers", "none")

    def steps_of(self, kind: str) -> int:
        return max(1, round(getattr(self, f"{kind}_steps") * self.longer))


ABOVE_0, BELOW_1 = 1e-12, 1 - 1e-12
RANGES = [  # flags, their least, their most: beyond it is a slip of the hand, or would fill a machine
    ("save_every sheet_every keep", 1, 10**9), ("batch accum eval_clips trajectories phases", 1, 10**6),
    ("bidirectional_steps teacher_forcing_steps trajectory_steps dmd_steps", 1, 10**9),
    ("frames", 3, 1000), ("chunk", 1, 1000), ("height width", 1, 1000), ("critic_steps", 1, 99),
    ("mixed_steps rollout_steps first_steps train_grid teacher_eval_steps", 1, 1000),
    ("trajectory_grid shortcut_grid", 2, 10**5), ("seed eval_seed", 0, 2**63 - 1),
    ("skip_nonfinite shard_over dmd_ema_start window sink", 0, 10**9),
    ("longer shift train_shift score_shift clip_norm timeout gpu_memory critic_lr bidirectional_lr "
     "teacher_forcing_lr trajectory_lr dmd_lr", ABOVE_0, 1e9),
    ("lambda_sc lambda_align lambda_gan lambda_scfm lambda_rcm align_margin", 0.0, 1e9),
    ("guidance score_guidance", -1e3, 1e3), ("align_warmup align_prob mixed_probs", 0.0, 1.0),
    ("align_depth", ABOVE_0, 1.0), ("ema trajectory_ema dmd_ema prompt_dropout", 0.0, BELOW_1),
    ("teacher_betas trajectory_betas dmd_betas", 0.0, BELOW_1)]


def demand(cfg, ok, names, expected):
    """ValueError, naming what was got for these flags and what was expected, unless all is ok."""
    if not ok:
        got = ", ".join(f"--{name.replace('_', '-')} {getattr(cfg, name)}"[:200] for name in names.split())
        raise ValueError(f"got {got}, expected {expected}")


def check_numbers(cfg: Config):
    """ValueError for a number that cannot be, before anything is done with it."""
    need = partial(demand, cfg)
    for names, low, high in RANGES:
        kind = "a whole number" if isinstance(low, int) else "a number"
        least = "above 0" if low == ABOVE_0 else f"from {low:g} on"
        most = "below 1" if high == BELOW_1 else f"up to {high:g}"
        for name in names.split():
            values = getattr(cfg, name)
            need(all(low <= x <= high for x in (values if isinstance(values, tuple) else (values,))), name,
                 f"{kind} {least}, {most}")
    need(re.fullmatch(r"(0*[1-9]\d{0,8}[smh]?)?", cfg.stop_after), "stop_after", "a number of updates, or a time such "
         "as 30m")
    need(cfg.out and len(cfg.out) < 3000 and cfg.out.isprintable(), "out", "the name of a folder")


def check(cfg: Config):
    """ValueError for a setting that could only fail later."""
    need = partial(demand, cfg)
    check_numbers(cfg)

    def power_of_two(n):
        return n > 0 and n & (n - 1) == 0

    need(cfg.size in SIZES, "size", f"one of {', '.join(SIZES)}")
    need(cfg.teacher_size in ("", *SIZES), "teacher_size", f"one of {', '.join(SIZES)}")
    need(cfg.teacher_size in ("", cfg.size) or cfg.teacher_out, "teacher_size teacher_out",
         "the folder of a run that trained a teacher of this size")
    if cfg.teacher_size:
        ours, theirs = SIZES[cfg.size], SIZES[cfg.teacher_size]
        need((ours.in_dim, ours.text_dim, ours.text_len) == (theirs.in_dim, theirs.text_dim, theirs.text_len),
             "teacher_size size", "networks of the same latents and texts")
    patch, channels = SIZES[cfg.size].patch_size, SIZES[cfg.size].in_dim
    need(cfg.height % patch[1] == 0 and cfg.width % patch[2] == 0, "height width size",
         f"multiples of the patch, {patch[1]} x {patch[2]}")
    need(cfg.data or channels == 3 and cfg.height == cfg.width == data.SIZE, "data size height width",
         f"a folder of latents: only clips of 3 x {data.SIZE} x {data.SIZE} can be drawn from the toy world")
    need(not cfg.plan or cfg.stage == "all" or cfg.stage in STAGES and not cfg.stage.endswith("_ode"), "plan stage",
         "the recipe or a stage that makes no trajectories first")
    need(cfg.bad_data in ("stop", "skip"), "bad_data", "stop or skip")
    need(cfg.precision in ("fp32", "bf16"), "precision", "fp32 or bf16")
    need(cfg.gather in ("forward", "update"), "gather", "forward or update")
    need(cfg.batch % (cfg.accum * fsdp.world()) == 0, "batch accum",
         f"a batch that divides into equal parts for {fsdp.world()} ranks")
    need(cfg.stage in (*STAGES, "all", "evaluate"), "stage", f"one of {', '.join(STAGES)}, all, evaluate")
    need(cfg.stage != "evaluate" or not cfg.data, "stage data", "no --data: only runs of the toy world can be measured")
    need(cfg.init == "" or cfg.init in STAGES, "init", f"one of {', '.join(STAGES)}")
    need(cfg.init == "" or cfg.stage in STAGES and STAGES[cfg.stage].kind == "dmd", "init stage",
         "a DMD stage, which starts from it")
    need(cfg.device == "cpu" or cfg.device == "cuda" and torch.cuda.is_available(), "device",
         "cpu, or cuda where there is a GPU")
    need(not Path(cfg.out).is_file(), "out", "a folder, not a file")
    need(cfg.lr_schedule in ("constant", "decay"), "lr_schedule", "constant or decay")
    need(cfg.teacher_forcing_weight in ("flat", "bell"), "teacher_forcing_weight", "flat or bell")
    for name in ("teacher_betas", "trajectory_betas", "dmd_betas"):
        need(len(getattr(cfg, name)) == 2, name, "two numbers")
    need(cfg.frames % cfg.chunk == 0, "frames chunk", "frames that are a multiple of the chunk")
    need(all(b == 2 * a for a, b in zip(cfg.mixed_steps, cfg.mixed_steps[1:]))
         and cfg.mixed_steps[-1] % 4 == 0, "mixed_steps",
         "each K twice the one before, so that the grids nest, and the last a multiple of 4")
    need(cfg.mixed_steps[-1] % cfg.first_steps == 0, "first_steps mixed_steps",
         "first steps that divide the largest K")
    need(power_of_two(cfg.rollout_steps) and power_of_two(cfg.first_steps), "rollout_steps first_steps",
         "powers of two, so that the grids nest")
    need(len(cfg.mixed_steps) == len(cfg.mixed_probs) and abs(sum(cfg.mixed_probs) - 1) < 1e-6,
         "mixed_steps mixed_probs", "one probability each, summing to 1")
    need(cfg.stage != "naive_sc" or cfg.rollout_steps > 1, "stage rollout_steps", "at least 2 steps, for a triple")
    need(power_of_two(cfg.shortcut_grid) and cfg.shortcut_grid > 1, "shortcut_grid", "a power of two")
    need(cfg.trajectory_grid % (4 * cfg.phases) == 0, "trajectory_grid phases",
         "a multiple of 4 and of the phases, so that the students' times lie on it")
    need(cfg.train_grid > 3 and cfg.train_grid % 2 == 0, "train_grid", "an even number, at least 4")
    need(cfg.sc_through in ("both", "direct", "composed"), "sc_through", "both, direct or composed")
    need(cfg.align_features in ("teacher", "critic"), "align_features", "teacher or critic")
    need(cfg.window == 0 or cfg.window >= cfg.sink + cfg.chunk, "window sink chunk",
         "a window that holds the sink and a chunk, or 0")


# ---------------------------------------------------------------------------------------------------------------------
# The loop: resume, update, log, save

def states_of(cfg, stage) -> Path:
    """The folder of a stage's checkpoints."""
    return path_of(cfg, stage).with_suffix(".state")


def record(cfg, line: dict):
    with open(Path(cfg.out) / "metrics.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")


def forget_after(cfg, stage, step):
    """Drop the metrics of steps that a stopped run made after its last save: they will be made again."""
    path = Path(cfg.out) / "metrics.jsonl"
    if path.exists() and not path.is_file():
        raise ValueError(f"got {path}, which is no file, expected the metrics of a run: move it away, or change --out")
    if path.exists():
        kept = [line for line in readable_lines(path) if line.get("stage") != stage or line.get("step", -1) < step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def readable_lines(path) -> list[dict]:
    """The JSON objects of a file of lines; a line that a crash has cut or a disk has spoilt is none."""
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        with suppress(ValueError, RecursionError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def start_of(cfg, stage) -> str | None:
    """The stage whose weights a stage starts from."""
    return cfg.init if cfg.init and STAGES[stage].kind == "dmd" else STAGES[stage].start


def kinds_behind(cfg, stage) -> set[str]:
    """The kinds of a stage and of all that it starts from."""
    start = start_of(cfg, stage)
    return {STAGES[stage].kind} | (kinds_behind(replace(cfg, init=""), start) if start else set())


def same_settings(cfg, stage, path, was: dict, of_another=False):
    """A stage's weights belong to the settings that made them, its own and those of the stages before. of_another: they
    are read by another stage, which may differ in what each has for itself, and where both have their presets' own."""
    kinds = kinds_behind(cfg, stage) | (set() if of_another else {"each"})
    own_now, own_then = (presets.settings_of(cfg.size, *of) if of_another else {}
                         for of in ((cfg.stage, cfg.preset), (stage, was.get("preset", ""))))
    for f in fields(Config):
        now, then, usual_now, usual_then = (json.loads(json.dumps(x)) for x in (
            getattr(cfg, f.name), was.get(f.name, f.default), own_now.get(f.name), own_then.get(f.name)))
        if set(f.metadata["affects"].split()) & kinds and now != then and (now, then) != (usual_now, usual_then):
            name = "--" + f.name.replace("_", "-")
            raise ValueError(f"got {name} {now}, expected {then}, with which {path} was trained: change {name}, or "
                             "give another --out (with copies of the stages to keep, if you like)")


def check_finished(cfg, stage):
    """ValueError if the weights that are there are not those that this command would train."""
    path = path_of(cfg, stage)
    about, raw = record_of(path), record_of(path_of(cfg, stage, "_raw"))
    if {about.get("stage"), raw.get("stage")} != {stage}:
        raise ValueError(f"got {path} of stage {about.get('stage')} and raw weights of {raw.get('stage')}, expected "
                         f"{stage}: restore them, or change --out")
    same_settings(cfg, stage, path, about["config"])
    if "source" not in about and about.get("data", "") != data_digest(cfg):
        raise ValueError(f"got --data {cfg.data or 'of the toy world'} with other clips than {path} was trained on, "
                         "expected the same: change --data or --out")


def check_what_is_read(cfg, stage):
    """ValueError if a stage would start or learn from weights that were trained with other settings."""
    start, teacher = start_of(cfg, stage), "" if cfg.teacher_out else STAGES[stage].teacher
    for other in {start, teacher} - {None, ""}:
        path = path_of(cfg, other)
        about = about_of(path) if path.is_file() else {"source": "nowhere"}  # whose absence is told where it is read
        if "source" not in about and isinstance(about.get("config"), dict):  # convert records others' weights
            same_settings(replace(cfg, init=""), other, path, about["config"], of_another=True)


@contextmanager
def stopping_gently():
    """Yields a list that Ctrl-C or SIGTERM fills, so that the update in hand is finished and saved. Only a second
    Ctrl-C stops at once: a second SIGTERM comes where a scheduler and torchrun both send one."""
    asked = []

    def ask(number, _):
        if number == signal.SIGINT and number in asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_stage(cfg, stage, most=sys.maxsize, until=float("inf")) -> int:
    """Train one stage to its end, for `most` updates, or until a time. Returns the number of updates made; `most` if
    it was asked to stop."""
    steps, weights, states = cfg.steps_of(STAGES[stage].kind), path_of(cfg, stage), states_of(cfg, stage)
    if fsdp.on_rank_0(lambda: is_finished(cfg, stage)):
        fsdp.on_rank_0(lambda: check_finished(cfg, stage))
        say(f"{stage}: already trained, in {weights}")
        return 0
    about = {"stage": stage, "size": cfg.size, "step": 0, "seconds": 0.0, "nonfinite": 0, "config": asdict(cfg),
             "data": data_digest(cfg)}  # first: a wrong --data should not cost the time to load a model
    fsdp.clear(states)
    if checkpoint := fsdp.newest_intact(states):
        found = fsdp.on_rank_0(lambda: fsdp.about_checkpoint(checkpoint))
        if found["stage"] != stage or not 0 <= found["step"] <= steps:
            raise ValueError(f"got {checkpoint} of stage {found['stage']} and step {found['step']}, expected one of "
                             f"{stage}, up to step {steps}: move it away, or change --out")
        same_settings(cfg, stage, states, found["config"])
        if found["data"] != about["data"]:
            raise ValueError(f"got --data {cfg.data} with other clips than {states} was trained on, expected the same: "
                             "change --data or --out")
        about = found
    fsdp.on_rank_0(lambda: check_what_is_read(cfg, stage))
    training = STAGES[stage].begin(cfg, start_of(cfg, stage))
    tensors = fsdp.state_of(training)
    if checkpoint:
        fsdp.load(checkpoint, tensors)
    first, last, start, before = about["step"], min(steps, about["step"] + most), time.monotonic(), about["seconds"]
    stop = False
    fsdp.agree(f"{stage} from step {first} to {last}, data {about['data'] or 'of the toy world'}")
    fsdp.on_rank_0(lambda: forget_after(cfg, stage, first))
    fsdp.on_rank_0(lambda: write_text(Path(cfg.out) / "config.json", json.dumps(asdict(cfg), indent=1)))
    meter = flops.Meter(cfg)
    bar = tqdm(total=steps, initial=first, desc=stage, mininterval=1, smoothing=0.05, disable=fsdp.rank() > 0)
    with bar, stopping_gently() as asked_to_stop:
        for step in range(first, last):
            meter.start()
            try:
                metrics = training.update(step)
            except ValueError as e:  # damaged data
                raise ValueError(f"stage {stage}, step {step}, rank {fsdp.rank()}: {e}") from e
            except FloatingPointError as e:
                about["nonfinite"] += 1
                metrics = {"left_out": str(e)}
                if about["nonfinite"] > cfg.skip_nonfinite:
                    raise ValueError(f"stage {stage}, step {step}: {e}, with another --out, or leave such updates out "
                                     f"with --skip-nonfinite. What was saved last is kept in {states}") from e
            metrics = readable(metrics) | meter.stop() | counters(cfg, stage, step, about["nonfinite"])
            stop = fsdp.any_rank(asked_to_stop or time.monotonic() > until, "whether to stop")
            bar.update()
            if fsdp.rank() == 0:
                record(cfg, {"stage": stage, "step": step, **metrics})
                if training.pictures and (step + 1) % cfg.sheet_every == 0:
                    data.sheet({k: x[:4] for k, x in training.pictures.items()},
                               Path(cfg.out) / f"{stage}_sheets" / f"{step + 1:06d}")
            if (step + 1) % cfg.save_every == 0 or step + 1 == last or stop:
                about |= {"step": step + 1, "seconds": before + time.monotonic() - start}
                about |= {k: v for k, v in metrics.items() if k.endswith("_updates")}
                fsdp.save(states, step + 1, tensors, about, cfg.keep)
                bar.set_postfix({k: f"{v:.3g}" for k, v in list(metrics.items())[:3] if isinstance(v, float)})
            if stop:
                break
    if about["step"] == steps:
        export(cfg, stage, training, about)
    return most if stop else about["step"] - first


def export(cfg, stage, training, about: dict):
    """Write what a finished stage is for: single files with official names, the raw weights first, then the EMA's."""
    about |= {k: getattr(STAGES[stage], k) for k in ("causal", "few_step", "solver")}
    about |= {"saved": time.time(), **training.cost}
    for net, kind in (("net", "_raw"), ("ema", "")):
        whole = fsdp.whole_weights(training.nets[net])
        fsdp.on_rank_0(lambda whole=whole, kind=kind: write_tensors(path_of(cfg, stage, kind), whole, about))


def counters(cfg, stage, step, nonfinite) -> dict:
    """How much was done and left out, by name."""
    done, counted = step + 1 - nonfinite, {"nonfinite": nonfinite}
    if STAGES[stage].kind == "dmd":
        counted |= {"generator_updates": done, "critic_updates": done * cfg.critic_steps}
    if cfg.bad_data == "skip" and cfg.data not in ("", "random"):
        counted["bad_samples"] = sum(fsdp.everyone(folder(cfg).skipped, "how many samples were bad"))
    return counted


def readable(metrics: dict) -> dict:
    """Metrics as JSON numbers and lists; of sums, counts and squares, which parts of a batch can be averaged over, come
    the critic's loss by quarter of t and the standard deviation of chunks."""
    plain = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in metrics.items()}
    if "critic_t_sum" in plain:
        sums_and_counts = zip(plain.pop("critic_t_sum"), plain.pop("critic_t_count"))
        plain["critic_by_t"] = [s / n if n else None for s, n in sums_and_counts]
        squares_and_means = zip(plain.pop("chunk_square"), plain["chunk_mean"])
        plain["chunk_std"] = [max(0.0, square - mean**2) ** 0.5 for square, mean in squares_and_means]
    return plain


def data_digest(cfg) -> str:
    return cfg.data if cfg.data in ("", "random") else folder(cfg).digest()


def say(text: str):
    if fsdp.rank() == 0:
        print(text, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def main(cfg: Config) -> list[dict]:
    """Run what the config asks for. Returns the rows of the table (none if stopped before its end, or without the toy
    world, where nothing can be measured)."""
    check_numbers(cfg)
    if cfg.plan:
        check(cfg)
        for line in plan.table(cfg):
            print(line, flush=True)
        return []
    with fsdp.setup(cfg.device, cfg.precision, cfg.shard_over, cfg.timeout, cfg.check_ranks):
        check(cfg)
        same_on_all_ranks(cfg)
        if cfg.stage == "evaluate" and not fsdp.on_rank_0(lambda: evaluate.finished_stages(cfg)):
            raise ValueError(f"got --out {cfg.out}, expected a folder with a trained stage: change --out, or train")
        try:
            with alone_in(cfg.out):
                return run(cfg)
        except OSError as e:
            if is_full(e):
                raise OSError(f"got no space in {cfg.out} ({e}), expected some more: free it, or change --out. What "
                              "was saved before is as it was") from e
            raise


def same_on_all_ranks(cfg):
    """RankError if a rank was started with another flag."""
    flags = fsdp.everyone(asdict(cfg), "the flags")
    for name, here in flags[0].items():
        if other := [(r, there[name]) for r, there in enumerate(flags) if there[name] != here]:
            name = name.replace("_", "-")
            raise fsdp.RankError(f"ranks disagree: got --{name} {here} on rank 0 and --{name} {other[0][1]} on rank "
                                 f"{other[0][0]}, expected the same on every rank: start all with the same flags")


def check_folder(out):
    """ValueError if a folder holds files that a run would replace and that no run has left."""
    path, metrics = out / "config.json", out / "metrics.jsonl"
    foreign = path.exists() and not {"stage", "seed", "out"} <= read_json(path, "that of a run: change --out").keys()
    if metrics.is_file() and metrics.stat().st_size and not any("stage" in line for line in readable_lines(metrics)):
        path, foreign = metrics, True
    if foreign:
        raise ValueError(f"got --out {out} with a {path.name} that no run has left, expected a folder of a run, or a "
                         "new one: change --out")


@contextmanager
def alone_in(out):
    """Keep other runs out of a folder."""
    with ExitStack() as stack:
        fsdp.on_rank_0(lambda: stack.enter_context(in_use(out)), f"entering {out}")
        fsdp.on_rank_0(lambda: check_folder(Path(out)))
        fsdp.on_rank_0(lambda: tidy(out, [*STAGES, "config.json", "metrics.jsonl", "table_seed", "sheet"]))
        yield


def run(cfg: Config) -> list[dict]:
    stages = RECIPE if cfg.stage == "all" else (cfg.stage,)
    if cfg.stage == "evaluate":
        stages = evaluate.finished_stages(cfg)
        cfg = evaluate.as_trained(cfg, stages[-1])
    say(f"settings: {json.dumps(asdict(cfg))}")
    for k in cfg.mixed_steps:
        say(f"times of {k} steps: {[round(t, 4) for t in schedule(k, cfg.shift).tolist()]}")

    if cfg.size == "wan1.3b" and not cfg.teacher_size and any(STAGES[stage].windowed for stage in stages):
        say(f"DMD's teacher is of --size {cfg.size}; the papers' is of 14B: --teacher-size wan14b --teacher-out FOLDER")

    most, until = budget(cfg.stop_after)
    rows = []
    if not cfg.data:
        rows = [fsdp.on_rank_0(lambda: evaluate.the_world(cfg))]
        fsdp.on_rank_0(lambda: evaluate.print_rows(rows))
    for stage in stages:
        if cfg.stage != "evaluate":
            most -= run_stage(cfg, stage, most, until)
            if most == 0 or not fsdp.on_rank_0(lambda stage=stage: is_finished(cfg, stage)):
                say(f"stopped; the same command goes on from {states_of(cfg, stage)}")
                return []
        if not cfg.data:
            rows += fsdp.on_rank_0(lambda stage=stage: evaluate.report(cfg, stage))
    if not cfg.data:
        fsdp.on_rank_0(lambda: evaluate.draw_sheet(cfg, evaluate.finished_stages(cfg), "sheet"))
        say("")
        fsdp.on_rank_0(lambda: evaluate.print_rows(rows))
    return rows


def budget(stop_after: str) -> tuple[int, float]:
    """--stop-after as a number of updates and a time to stop at."""
    if stop_after and stop_after[-1] in "smh":
        return sys.maxsize, time.monotonic() + int(stop_after[:-1]) * {"s": 1, "m": 60, "h": 3600}[stop_after[-1]]
    return int(stop_after or 0) or sys.maxsize, float("inf")


def parse(argv=None) -> Config:
    """The command line's settings; what it does not give is the preset's, or Config's default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in fields(Config):
        many = isinstance(f.default, tuple)
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(f.default, bool) else {
            "type": type(f.default[0] if many else f.default), "metavar": "X", "nargs": "+" if many else None}
        parser.add_argument(f"--{f.name.replace('_', '-')}", **kind,
                            help=f"{f.metadata['help']} (default: {f.default})".replace("%", "%%"))
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()}
    preset = presets.settings_of(*(given.get(name, getattr(Config, name)) for name in ("size", "stage", "preset")))
    return Config(**preset | given)


if __name__ == "__main__":
    run_command(lambda: main(parse()), "stopped; the same command goes on from what was saved last", fsdp.RankError)
