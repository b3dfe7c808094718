"""The settings of a run, the papers' values of them at Wan's size, and the table of all stages.

    Config      every setting, with the toy's default; those with a help text are flags of train.py
    STAGES      every method that can be trained: what it starts from, what teaches it by DMD, how it is sampled
    PRESETS     settings of the papers' methods at Wan's size, each value with its source
    parse       the command line's Config;   check    ValueError for settings that could only fail later

A preset replaces defaults of Config; a flag of the command line replaces a value of the preset. Without --preset it is
that of the --stage (PRESET_OF_STAGE), else `salt`. Give all stages of a run the same one: it sets the chunk, and a
stage refuses to start from weights of another.

Sources:  CF++ arXiv 2605.15141, Sec. 4;  Salt arXiv 2604.03118, Sec. B;  CF code of Causal Forcing (thu-ml/Causal-
Forcing, commit 1fc7bbc);  SF code of Self Forcing (guandeh17/Self-Forcing, commit 33593df);  ours: nobody says.
Iterations of CF, SF and CF++ are critic updates, of which every fifth comes with a generator update; we count generator
updates. We read Salt's iterations in the same way, as it builds on this code.

What differs from the papers all the same, besides docs/differences.md:
  - DMD's teacher is of --size unless --teacher-size wan14b --teacher-out FOLDER are given. Autoregressive students have
    a teacher of 14B in Salt, CF++, CF and SF.
  - DMD's critic is of --size: 1.3B as in CF and SF. CF++ says that both score models are 14B.
  - The critic's updates come before the generator's. In CF and SF the generator is first.
  - Causal ODE draws a time for every chunk, CF one for the clip.
  - Salt's autoregressive students start from `causal_cd` (--init causal_ode: the start of Causal Forcing, on which Salt
    builds). Its generator's learning rate is printed as "2 x 1075", perhaps 2e-5; ours is CF's, 2e-6. Its batch and
    number of updates are CF++'s.
  - SF publishes neither the training of its start nor the number of trajectories: these are CF's. Its script solves
    them at shift 8, and it trains at 5; here both are --shift.
  - CF++ leaves w(t) of CD open (Eq. 3): 1, as in CF.
"""

import argparse
import json
import re
import sys
import time
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch

from model import SIZES
from wan21 import errors
from wan21.families import FAMILIES
from worlds import WORLDS

# ---------------------------------------------------------------------------------------------------------------------
# Settings

def flag(default, help, group="bidirectional"):
    """A setting that is a flag of train.py. group: the hyperparameter groups (worlds.draws.GROUPS) whose weights depend
    on it; "each": every stage may have its own value; "none". A stage depends on what its teachers depend on, too."""
    return field(default=default, metadata={"help": help, "group": group})


def setting(default, group="bidirectional"):
    """A setting that only presets and code change."""
    return field(default=default, metadata={"help": "", "group": group})


@dataclass
class Config:
    """Every setting of a run."""

    size: str = flag("toy", f"the network: {', '.join(SIZES)}")
    preset: str = flag("", "settings of a method at Wan's size: self_forcing, causal_forcing, causal_forcing_pp, salt, "
                           "sc_dmd (config.py)", "none")
    stage: str = flag("all", "one of the recipe, bidirectional teacher_forcing causal_cd salt; all of these; a "
                             "baseline (see STAGES in config.py); or evaluate", "none")
    out: str = flag("runs/toy", "folder for checkpoints, metrics and images", "none")
    seed: int = flag(0, "of weights, data, noise and every other draw")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda", "none")
    train_longer: float = flag(1.0, "multiply the updates of every stage")
    save_every: int = flag(100, "updates between checkpoints, from which a stopped run resumes", "none")
    keep: int = setting(2, "none")  # checkpoints of each stage
    sheet_every: int = flag(50, "updates between images of what a DMD stage generates, and of its scores", "none")
    stop_after: str = flag("", "stop (resumably) after so many updates, 200, or after a time, 90s 30m 8h", "none")
    skip_nonfinite: int = flag(0, "updates with a non-finite loss or gradient to skip before giving up", "none")

    world: str = flag("toy", "the world that clips are drawn from, where --data gives none")
    data: str = flag("", "folder of latents and prompts (worlds/latent_folder.py); or random: noise", "none")
    bad_data: str = flag("stop", "at a damaged sample in --data: stop, or skip to the next", "none")
    frames: int = flag(8, "latent frames per clip")
    height: int = flag(10, "rows of a latent frame")
    width: int = flag(10, "columns of a latent frame")
    chunk: int = flag(1, "frames per autoregressive chunk")
    batch: int = flag(16, "clips per update, over all ranks", "each")
    accum: int = flag(1, "forward and backward passes in which a rank computes its part of the batch", "none")

    precision: str = flag("fp32", "fp32, or bf16: compute in bf16, with fp32 weights, reductions and losses", "each")
    checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, more time", "none")
    compile: bool = flag(False, "torch.compile the blocks", "none")
    reshard_after_forward: bool = flag(True, "gather weights for every forward, or keep them until a backward", "none")
    shard_group_size: int = flag(0, "ranks that share one copy of the weights; 0: those of a node", "none")
    check_ranks: bool = flag(False, "compare the ranks before every forward, to find the first that differs", "none")
    timeout: float = flag(600.0, "seconds to wait for another rank before stopping", "none")
    teacher_size: str = flag("", "size of DMD's teacher, if not --size", "dmd")
    teacher_out: str = flag("", "folder with DMD's teacher of --teacher-size", "none")

    clip_norm: float = setting(1.0, "each")  # largest gradient norm
    lr_schedule: str = flag("decay", "constant, or decay: 20 updates of warm-up, then to a tenth over the last half",
                            "each")
    ema_ramp: bool = setting(True, "each")  # let the decay of an average grow with the step: its start is forgotten
    train_shift: float = flag(3.0, "timestep shift of the timesteps in flow matching")
    prompt_dropout: float = flag(0.1, "fraction of clips trained with the empty prompt, for guidance")
    row_dropout: float = setting(0.0)  # fraction of clips of which the network is told no rows, for mixed data
    teacher_betas: tuple = setting((0.9, 0.95))  # AdamW's, of both teachers
    ema: float = setting(0.99)  # decay of the averaged weights of both teachers

    bidirectional_steps: int = flag(5000, "updates of stage bidirectional")
    bidirectional_lr: float = flag(4e-3, "learning rate")
    bidirectional_weight: str = setting("flat")  # of the loss by t: flat, bell or data (flowmap.py)

    teacher_forcing_steps: int = flag(1000, "updates of stage teacher_forcing", "teacher_forcing")
    teacher_forcing_lr: float = flag(3e-3, "learning rate", "teacher_forcing")
    teacher_forcing_weight: str = setting("flat", "teacher_forcing")  # as bidirectional_weight

    # distillation along the teacher's trajectories: causal_cd; bidirectional_ode, causal_ode, pcm, scfm
    shift: float = flag(5.0, "timestep shift of inference and training grids (CF++: 5)", "trajectory dmd")
    guidance: float = flag(1.5, "teacher guidance w in v_u + w (v_c - v_u)", "trajectory")
    trajectory_steps: int = flag(900, "updates of a distillation along trajectories", "trajectory")
    trajectory_lr: float = flag(1e-3, "learning rate", "trajectory")
    trajectory_grid: int = setting(48, "trajectory")  # timesteps of the teacher's trajectory (CF++: 48)
    trajectory_betas: tuple = setting((0.9, 0.95), "trajectory")  # AdamW's
    trajectory_ema: float = setting(0.95, "trajectory")  # decay of the target network theta-
    trajectories: int = flag(1024, "stored trajectories of causal_ode and bidirectional_ode", "trajectory")

    # distribution matching: salt, and every method with a critic
    init: str = flag("", "start a DMD stage from the weights of this stage, not from those of the usual one", "dmd")
    dmd_steps: int = flag(200, "generator updates of a DMD stage", "dmd")
    dmd_lr: float = flag(4e-4, "learning rate of the generator", "dmd")
    critic_lr: float = flag(8e-4, "learning rate of the critic", "dmd")
    critic_weight: str = setting("flat", "dmd")  # of the critic's loss, as bidirectional_weight
    critic_steps: int = flag(4, "critic updates per generator update", "dmd")
    dmd_betas: tuple = setting((0.0, 0.999), "dmd")  # AdamW's, of generator and critic
    dmd_ema: float = setting(0.95, "dmd")  # decay of the generator's averaged weights
    dmd_ema_start: int = setting(0, "dmd")  # generator updates before the average starts; until then it is a copy
    score_shift: float = flag(2.0, "timestep shift of the timesteps at which DMD compares scores", "dmd")
    score_guidance: float = flag(1.0, "guidance w of DMD's teacher", "dmd")
    train_grid: int = setting(8, "dmd")  # timesteps of SC-DMD's grid (Salt: 8)
    rollout_steps: int = flag(4, "steps K of students with one fixed K: self_forcing, causvid, ...", "dmd")
    mixed_steps: tuple = flag((2, 4, 8), "rollout lengths K of salt and mixed_sc (Salt Sec. 3.3)", "dmd")
    mixed_probs: tuple = flag((0.2, 0.4, 0.4), "their probabilities (Salt Sec. B)", "dmd")
    first_steps: int = flag(4, "minimum steps of the first chunk (CF++ Sec. 4); 1: as many as the others", "dmd")
    window: int = flag(0, "how many frames attention sees in salt, causvid and other stage-3 students: with 4 and a "
                          "sink of 1 the first frame, the two before and itself (LongLive); 0: all", "dmd")
    sink: int = flag(0, "how many frames of the window are the first ones of the clip", "dmd")
    lambda_sc: float = flag(0.2, "weight of self-consistency, at the largest K (Salt: 0.2)", "dmd")
    sc_through: str = flag("both", "endpoints of L_SC that carry gradient: both, direct, or composed, which reaches v "
                                   "at ts and at tm", "dmd")
    lambda_align: float = flag(0.5, "weight of alignment, at the smaller K (ours; VideoREPA's TRD weight)", "dmd")
    align_warmup: float = flag(0.25, "fraction of the stage before alignment starts (Salt: 600 iterations)", "dmd")
    align_prob: float = flag(0.5, "its probability in later updates of K < 8 (ours; Salt: 'stochastically')", "dmd")

    eval_clips: int = flag(256, "clips behind each row of the table", "none")
    eval_seed: int = flag(0, "prompts and noise of the table; settings were chosen on 0, docs report 1", "none")

    def steps_of(self, group: str) -> int:
        return max(1, round(getattr(self, f"{group}_steps") * self.train_longer))


# ---------------------------------------------------------------------------------------------------------------------
# Stages. `method` names the function that trains it, where that is not its own name, and `settings` what the stage sets
# for itself: five methods are Salt without some of its parts, two of them rows of Salt's Table 5. A row may set only
# what that function alone reads (ROW_MAY_SET); the loop and evaluation read the flags.

ROW_MAY_SET = {"one_k", "lambda_sc", "lambda_align", "train_grid"}


@dataclass(frozen=True)
class Stage:
    group: str  # of GROUPS: --GROUP-steps, --GROUP-lr, ...
    start: str | None  # the stage whose weights it starts from
    teacher: str = ""  # of DMD: the stage whose weights are the teacher, and the critic's start
    causal: bool = False  # samples chunk by chunk
    few_step: bool = True  # a student: 1, 2, 4 steps without guidance
    solver: str = "cm"  # that samples it
    windowed: bool = False  # sees only --window frames
    method: str = ""  # the function that trains it; "": that of its own name
    settings: tuple = ()  # (name, value) of what for_stage replaces


def whole_clip(group="dmd", solver="cm", method="", **settings):
    """A student of the bidirectional teacher that makes all frames at once."""
    return Stage(group, "bidirectional", "bidirectional" if group == "dmd" else "", solver=solver, method=method,
                 settings=tuple(settings.items()))


def stage_two(group, start, teacher=""):
    """An autoregressive student to start stage 3 from."""
    return Stage(group, start, teacher, causal=True)


def stage_three(method="", start="causal_cd", **settings):
    """An autoregressive student that learns from the bidirectional teacher."""
    return Stage("dmd", start, "bidirectional", causal=True, windowed=True, method=method,
                 settings=tuple(settings.items()))


RECIPE = ("bidirectional", "teacher_forcing", "causal_cd", "salt")
STAGES = {
    "bidirectional": Stage("bidirectional", None, few_step=False, solver="euler"),
    "teacher_forcing": Stage("teacher_forcing", "bidirectional", causal=True, few_step=False, solver="euler"),
    "causal_cd": stage_two("trajectory", start="teacher_forcing"),
    "salt": stage_three(),

    # baselines/whole_clip.py and consistency.py: not autoregressive (Salt Tab. 1, 2, 4, A.1)
    "dmd4": whole_clip(method="sc_dmd", train_grid=4, lambda_sc=0.0),
    "dmd8": whole_clip(method="sc_dmd", train_grid=8, lambda_sc=0.0),
    "dmd16": whole_clip(method="sc_dmd", train_grid=16, lambda_sc=0.0),
    "dmd4_backward": whole_clip(method="dmd_backward", train_grid=4),
    "dmd8_backward": whole_clip(method="dmd_backward", train_grid=8),
    "dmd16_backward": whole_clip(method="dmd_backward", train_grid=16),
    "sc_dmd": whole_clip(),
    "sc_dmd_gan": whole_clip(),
    "scfm": whole_clip("trajectory", solver="euler"),
    "dmd4_scfm": whole_clip(),
    "pcm": whole_clip("trajectory", solver="euler"),
    "rcm": whole_clip(),

    # baselines/causal.py: stage 2 (CF++ Tab. 2), and CausVid
    "bidirectional_ode": stage_two("trajectory", start="bidirectional"),
    "causal_ode": stage_two("trajectory", start="teacher_forcing"),
    "causal_dmd": stage_two("dmd", start="teacher_forcing", teacher="teacher_forcing"),
    "causvid": stage_three(start="bidirectional_ode"),

    # Salt with settings (CF++ Tab. 1, Salt Tab. 2, 5). one_k: rollouts of --rollout-steps alone
    "self_forcing":      stage_three("salt", start="bidirectional_ode", one_k=True, lambda_sc=0.0, lambda_align=0.0),
    "causal_forcing":    stage_three("salt", start="causal_ode",        one_k=True, lambda_sc=0.0, lambda_align=0.0),
    "causal_forcing_pp": stage_three("salt", start="causal_cd",         one_k=True, lambda_sc=0.0, lambda_align=0.0),
    "naive_sc":          stage_three("salt", start="causal_cd",         one_k=True,                lambda_align=0.0),
    "mixed_sc":          stage_three("salt", start="causal_cd",                                    lambda_align=0.0),
}


def for_stage(cfg: Config, stage: str) -> Config:
    """The settings with what a stage sets for itself."""
    own = dict(STAGES[stage].settings)
    if own.pop("one_k", False):
        own |= {"mixed_steps": (cfg.rollout_steps,), "mixed_probs": (1.0,)}
    return replace(cfg, **own)


# ---------------------------------------------------------------------------------------------------------------------
# The papers' values at Wan's size

WAN = dict(  # height and width are the family's
    frames=21,  # CF++: 81 frames of pixels
    batch=64,  # CF++
    precision="bf16", checkpointing=True,  # CF, SF: mixed_precision, gradient_checkpointing
    clip_norm=10.0,  # CF, SF: max_grad_norm_generator, max_grad_norm_critic
    prompt_dropout=0.0,  # CF, SF: no prompt is dropped; guidance leads away from the negative prompt
    lr_schedule="constant",  # CF, SF: no scheduler
    save_every=20,  # ours
    # both teachers; `bidirectional` is Wan itself, which is only trained again to learn cameras
    bidirectional_lr=1e-5,  # ours
    teacher_forcing_steps=20_000,  # CF++
    teacher_forcing_lr=2e-6,  # CF: lr
    teacher_forcing_weight="bell",  # CF: scheduler.training_weight
    teacher_betas=(0.0, 0.999),  # CF: beta1, beta2
    train_shift=5.0,  # CF: timestep_shift
    ema=0.0,  # CF: raw weights (ema_start_step 2,000,000,000)
    # few-step initialisation
    shift=5.0,  # CF++: t = 1, .9375, .8333, .625; CF: timestep_shift
    trajectory_grid=48,  # CF++
    guidance=3.0,  # CF: guidance_scale of causal CD, in the form v_u + w (v_c - v_u)
    trajectory_steps=5000,  # CF++
    trajectory_lr=2e-6,  # CF: lr
    trajectory_betas=(0.0, 0.999),  # CF: beta1, beta2 of causal CD
    trajectory_ema=0.99,  # CF: ema_weight, of theta-, from the first update on
    ema_ramp=False,  # CF, SF: the decay is the same in every update
    # distribution matching
    dmd_steps=200,  # CF++: 1,000 iterations
    critic_steps=5,  # CF, SF: dfake_gen_update_ratio
    dmd_lr=2e-6, critic_lr=4e-7,  # CF, SF: lr, lr_critic; Salt: the critic's
    dmd_betas=(0.0, 0.999),  # CF, SF: beta1, beta2
    dmd_ema=0.99, dmd_ema_start=40,  # CF, SF: ema_weight; ema_start_step 200 iterations
    score_shift=5.0,  # CF, SF: timestep_shift
    score_guidance=4.0,  # CF, SF: guidance_scale 3.0, in the form v_c + g (v_c - v_u)
)

RECIPES = {  # what the recipe of a world changes of Config's defaults, which are the toy's; all ours
    "room": dict(
        world="room", out="runs/room", frames=16, height=16, width=24, batch=8, eval_clips=32,
        prompt_dropout=0.0, guidance=1.0,  # there are no words
        bidirectional_weight="data", teacher_forcing_weight="data", critic_weight="data",
        bidirectional_steps=12000, bidirectional_lr=2.5e-3, teacher_forcing_steps=3000, teacher_forcing_lr=2e-3,
    ),
}

ODE = dict(  # of stages that regress on trajectories of a teacher, in place of the values of causal CD above
    guidance=6.0,  # CF, SF: guidance_scale of the scripts that make trajectories
    trajectories=6_000,  # CF: ODE6KCausal. CF++ Tab. 2 makes one for each of its 80,000 videos
    trajectory_betas=(0.9, 0.999),  # CF: causal_ode_*.yaml
    trajectory_ema=0.0,  # CF: trainer/ode.py has no average
)

PRESETS = {
    "self_forcing": WAN | dict(
        chunk=3, rollout_steps=4,  # SF: num_frame_per_block, denoising_step_list
        dmd_steps=120,  # SF: 600 iterations (README)
    ),
    "causal_forcing": WAN | dict(
        chunk=3, rollout_steps=4,  # CF: causal_forcing_dmd_chunkwise.yaml; --chunk 1: its frame-wise one
    ),
    "causal_forcing_pp": WAN | dict(
        chunk=1,  # CF++: frame-wise
        rollout_steps=4,  # CF++: one student for each of 4, 2 and 1 steps: --rollout-steps 2, --rollout-steps 1
        first_steps=4,  # CF++: the first latent frame keeps 4 steps
    ),
    "salt": WAN | dict(
        chunk=3,  # Salt: chunk-wise, on Causal Forcing
        mixed_steps=(2, 4, 8), mixed_probs=(0.2, 0.4, 0.4), lambda_sc=0.2,  # Salt
        first_steps=1,  # Salt: nothing is said of a longer first chunk, so it has K steps as all others
        align_warmup=0.6,  # Salt: 600 iterations; ours: of CF++'s 1,000
    ),
    "sc_dmd": WAN | dict(  # Salt's students that are not autoregressive: dmd4, dmd8, sc_dmd, ...
        batch=16, train_grid=8,  # Salt
        dmd_steps=480,  # Salt: 2,400 iterations
        dmd_lr=1e-5, critic_lr=1e-5,  # Salt: one learning rate, "1 x 1075" in the scan
        shift=12.0,  # Salt A.1: of the 4-step inference schedule; ours: of the training grid, too
        # ours: all that Salt does not say is as for autoregressive students: critic_steps, EMA, scores, clipping
    ),
}

PRESET_OF_STAGE = {  # the preset of a stage if none is given; of the others: salt
    **dict.fromkeys(("dmd4", "dmd8", "dmd16", "dmd4_backward", "dmd8_backward", "dmd16_backward", "sc_dmd",
                     "sc_dmd_gan", "scfm", "dmd4_scfm", "pcm", "rcm"), "sc_dmd"),
    **dict.fromkeys(("bidirectional_ode", "causvid", "self_forcing"), "self_forcing"),
    **dict.fromkeys(("causal_ode", "causal_forcing"), "causal_forcing"),
    **dict.fromkeys(("causal_dmd", "causal_forcing_pp"), "causal_forcing_pp"),
}


def preset_of(size: str, stage: str, preset: str) -> dict:
    """What --size, --stage and --preset change of Config's defaults. ValueError for a preset that does not fit."""
    family = FAMILIES[SIZES[size].family] if size in SIZES else None
    if family is None or family.world:
        if preset:
            raise ValueError(f"got --preset {preset} with --size {size}, expected none: presets are for Wan's latents, "
                             "a world has one recipe")
        return RECIPES.get(family.world, {}) if family else {}
    preset = preset or PRESET_OF_STAGE.get(stage, "salt")
    if preset not in PRESETS:
        raise ValueError(f"got --preset {preset}, expected one of {', '.join(PRESETS)}")
    shape = {"world": "", **{name: family.sampling[name] for name in ("height", "width")}}
    return PRESETS[preset] | shape | (ODE if stage.endswith("_ode") else {}) | {"preset": preset}


# ---------------------------------------------------------------------------------------------------------------------
# Settings that cannot be

ABOVE_0, BELOW_1 = 1e-12, 1 - 1e-12
RANGES = [  # settings, minimum, maximum: beyond it is a slip of the hand, or would fill a machine
    ("save_every sheet_every keep", 1, 10**9), ("batch accum eval_clips trajectories", 1, 10**6),
    ("bidirectional_steps teacher_forcing_steps trajectory_steps dmd_steps", 1, 10**9),
    ("frames", 3, 1000), ("chunk", 1, 1000), ("height width", 1, 1000), ("critic_steps", 1, 99),
    ("mixed_steps rollout_steps first_steps train_grid", 1, 1000), ("trajectory_grid", 2, 10**5),
    ("seed eval_seed", 0, 2**63 - 1), ("skip_nonfinite shard_group_size dmd_ema_start window sink", 0, 10**9),
    ("train_longer shift train_shift score_shift clip_norm timeout critic_lr bidirectional_lr teacher_forcing_lr "
     "trajectory_lr dmd_lr", ABOVE_0, 1e9),
    ("lambda_sc lambda_align", 0.0, 1e9), ("guidance score_guidance", -1e3, 1e3),
    ("align_warmup align_prob mixed_probs", 0.0, 1.0), ("ema trajectory_ema dmd_ema prompt_dropout", 0.0, BELOW_1),
    ("row_dropout teacher_betas trajectory_betas dmd_betas", 0.0, BELOW_1)]
CHOICES = {"size": SIZES, "teacher_size": ("", *SIZES), "stage": (*STAGES, "all", "evaluate"), "init": ("", *STAGES),
           "world": ("", *WORLDS), "bad_data": ("stop", "skip"), "precision": ("fp32", "bf16"),
           "lr_schedule": ("constant", "decay"), "sc_through": ("both", "direct", "composed"),
           **dict.fromkeys(("bidirectional_weight", "teacher_forcing_weight", "critic_weight"),
                           ("flat", "bell", "data"))}


def option(name: str) -> str:
    """How a setting is changed: by its flag, or in this file."""
    is_flag = Config.__dataclass_fields__[name].metadata["help"]
    return "--" + name.replace("_", "-") if is_flag else f"{name} (config.py)"


def check_numbers(cfg: Config):
    """ValueError for a number that cannot be, before anything is done with it."""
    need = partial(errors.need, cfg, flag_of=option)
    for names, low, high in RANGES:
        number = "a whole number" if isinstance(low, int) else "a number"
        minimum = "above 0" if low == ABOVE_0 else f"from {low:g} on"
        maximum = "below 1" if high == BELOW_1 else f"up to {high:g}"
        for name in names.split():
            values = getattr(cfg, name)
            need(all(low <= x <= high for x in (values if isinstance(values, tuple) else (values,))), name,
                 f"{number} {minimum}, {maximum}")
    need(re.fullmatch(r"(0*[1-9]\d{0,8}[smh]?)?", cfg.stop_after), "stop_after", "a number of updates, or a time such "
         "as 30m")
    need(cfg.out and len(cfg.out) < 3000 and cfg.out.isprintable(), "out", "the name of a folder")


def check(cfg: Config, ranks: int = 1):
    """ValueError for settings that would only fail later, given the number of ranks."""
    need = partial(errors.need, cfg, flag_of=option)
    check_numbers(cfg)
    for name, choices in CHOICES.items():
        need(getattr(cfg, name) in choices, name, f"one of {', '.join(filter(None, choices))}")

    def power_of_two(n):
        return n > 0 and n & (n - 1) == 0

    c, teacher = SIZES[cfg.size], SIZES[cfg.teacher_size or cfg.size]
    need(cfg.teacher_size in ("", cfg.size) or cfg.teacher_out, "teacher_size teacher_out",
         "the folder of a run that trained a teacher of this size")
    need(all(getattr(c, name) == getattr(teacher, name) for name in ("in_dim", "text_dim", "text_len", "row_width")),
         "teacher_size size", "networks of the same latents, texts and rows")
    need(cfg.height % c.patch_size[1] == 0 and cfg.width % c.patch_size[2] == 0, "height width size",
         f"multiples of the patch, {c.patch_size[1]} x {c.patch_size[2]}")
    need(cfg.data or cfg.world and WORLDS[cfg.world].latent_shape == (c.in_dim, cfg.height, cfg.width),
         "data world size height width", "a world of clips of this size, or else --data FOLDER, or --data random")
    need(cfg.row_dropout == 0 or c.row_width, "row_dropout size", "0 for a network that is told no rows")
    need(cfg.batch % (cfg.accum * ranks) == 0, "batch accum",
         f"a batch that divides into equal parts for {ranks} ranks")
    need(cfg.stage != "evaluate" or not cfg.data, "stage data", "no --data: only runs of a world can be measured")
    need(cfg.init == "" or cfg.stage in STAGES and STAGES[cfg.stage].group == "dmd", "init stage",
         "a DMD stage, which starts from it")
    need(cfg.device == "cpu" or cfg.device == "cuda" and torch.cuda.is_available(), "device",
         "cpu, or cuda where there is a GPU")
    need(not Path(cfg.out).is_file(), "out", "a folder, not a file")
    for name in ("teacher_betas", "trajectory_betas", "dmd_betas"):
        need(len(getattr(cfg, name)) == 2, name, "two numbers")
    need(cfg.frames % cfg.chunk == 0, "frames chunk", "frames that are a multiple of the chunk")
    need(all(b == 2 * a for a, b in zip(cfg.mixed_steps, cfg.mixed_steps[1:])) and cfg.mixed_steps[-1] % 4 == 0
         and power_of_two(cfg.mixed_steps[0]), "mixed_steps",
         "powers of two, each K twice the one before, so that the grids nest, and the last a multiple of 4")
    need(cfg.mixed_steps[-1] % cfg.first_steps == 0, "first_steps mixed_steps",
         "first steps that divide the largest K")
    need(power_of_two(cfg.rollout_steps) and power_of_two(cfg.first_steps), "rollout_steps first_steps",
         "powers of two, so that the grids nest")
    need(len(cfg.mixed_steps) == len(cfg.mixed_probs) and abs(sum(cfg.mixed_probs) - 1) < 1e-6,
         "mixed_steps mixed_probs", "one probability each, summing to 1")
    need(cfg.stage != "naive_sc" or cfg.rollout_steps > 1, "stage rollout_steps", "at least 2 steps, for a triple")
    need(cfg.trajectory_grid % 16 == 0, "trajectory_grid", "a multiple of 16")  # students' timesteps lie on it
    need(cfg.train_grid > 3 and cfg.train_grid % 2 == 0, "train_grid", "an even number, at least 4")
    need(cfg.window >= cfg.sink + cfg.chunk or cfg.window == cfg.sink == 0, "window sink chunk",
         "a window that holds the sink and a chunk, or no window and no sink")


# ---------------------------------------------------------------------------------------------------------------------
# Settings that weights were trained with

# what older runs have recorded: settings under other names; settings that are constants of the code now
NAMES_BEFORE = {"train_longer": "longer"}
FORMER = {"phases": (4, "trajectory"), "shortcut_grid": (32, "trajectory dmd"), "align_margin": (0.1, "dmd"),
          "align_features": ("teacher", "dmd"), "align_depth": (0.5, "dmd"), "lambda_gan": (0.03, "dmd"),
          "lambda_scfm": (1.0, "dmd"), "lambda_rcm": (1.0, "dmd")}


def start_of(cfg, stage) -> str | None:
    """The stage whose weights a stage starts from."""
    return cfg.init if cfg.init and STAGES[stage].group == "dmd" else STAGES[stage].start


def groups_behind(cfg, stage) -> set[str]:
    """The hyperparameter groups of a stage and of all that it starts from."""
    start = start_of(cfg, stage)
    return {STAGES[stage].group} | (groups_behind(replace(cfg, init=""), start) if start else set())


def recorded(then: dict, name: str, default):
    """A setting in what a run has recorded, under its name of today or of then."""
    return then.get(name, then.get(NAMES_BEFORE.get(name), default))


def same_settings(cfg, stage, path, then: dict, of_another=""):
    """ValueError unless weights were made with these settings, of their stage and of the stages before it. of_another:
    the stage that reads them, if another; then settings of group "each" and of its own group may differ (causal_dmd as
    the start of stage 3), and one that has its preset's value in both."""
    groups, free = groups_behind(cfg, stage) | {"each"}, {"each", STAGES[of_another].group} if of_another else set()

    def matters(of_groups):
        return groups & set(of_groups.split()) and not free >= set(of_groups.split())

    own_now, own_then = (preset_of(cfg.size, *of) if of_another else {}
                         for of in ((cfg.stage, cfg.preset), (stage, then.get("preset", ""))))
    for name, (value, of_groups) in FORMER.items():
        if then.get(name, value) != value and matters(of_groups):
            raise ValueError(f"got {path}, trained with {name} {then[name]}, which is {value} now, expected the "
                             "same: change the constant in the code, or --out")
    for f in fields(Config):
        default = cfg.world if f.name == "world" else f.default  # of older runs, which have recorded no world
        now, before, usual_now, usual_before = (json.loads(json.dumps(x)) for x in (
            getattr(cfg, f.name), recorded(then, f.name, default), own_now.get(f.name), own_then.get(f.name)))
        if matters(f.metadata["group"]) and now != before and (now, before) != (usual_now, usual_before):
            raise ValueError(f"got {option(f.name)} {now}, expected {before}, with which {path} was trained: change "
                             f"{option(f.name)}, or give another --out (with copies of the stages to keep, if you "
                             "like)")


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def budget(stop_after: str) -> tuple[int, float]:
    """--stop-after as a number of updates and a time to stop at."""
    if stop_after and stop_after[-1] in "smh":
        return sys.maxsize, time.monotonic() + int(stop_after[:-1]) * {"s": 1, "m": 60, "h": 3600}[stop_after[-1]]
    return int(stop_after or 0) or sys.maxsize, float("inf")


def parse(argv=None, description="") -> Config:
    """The command line's settings; what it does not give is the preset's, or Config's default."""
    return config_of(vars(parser(description).parse_args(argv)))


def parser(description="", prog="python train.py") -> argparse.ArgumentParser:
    """Every flag of Config, none of which has a default: see config_of."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                    allow_abbrev=False, argument_default=argparse.SUPPRESS, prog=prog,
                                    usage="%(prog)s [flags]   (--help lists them)")
    for f in fields(Config):
        if not f.metadata["help"]:
            continue
        many = isinstance(f.default, tuple)
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(f.default, bool) else {
            "type": type(f.default[0] if many else f.default), "metavar": "X", "nargs": "+" if many else None}
        default = "" if f.default == "" else f" (default: {f.default})"
        flags.add_argument(option(f.name), **kind, help=f"{f.metadata['help']}{default}".replace("%", "%%"))
    return flags


def config_of(given: dict) -> Config:
    """Config's defaults, over them the preset's or the world's values, over them what was given. A world without a size
    has the first size that is made for it."""
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    made_for = [size for size, c in SIZES.items() if FAMILIES[c.family].world == given.get("world", "toy")]
    given = {"size": made_for[0] if made_for else Config.size} | given
    preset = preset_of(*(given.get(name, getattr(Config, name)) for name in ("size", "stage", "preset")))
    return Config(**preset | given)
