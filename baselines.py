"""Every method that the tables of Salt and Causal Forcing++ compare with, on the same parts, data and draws.

`python train.py --stage NAME`, once the stages that it starts from have been trained:

    not autoregressive: a few-step student of the bidirectional teacher, whole clips at once (Salt Tab. 1, 2, 4, A.1)
    dmd4, dmd8               DMD on a grid of 4 or 8 times, from noised real clips
    dmd4_backward, dmd8_...  the same from the student's own states (backward simulation; Salt Fig. 1)
    sc_dmd                   dmd8 + lambda_sc L_SC
    sc_dmd_gan               sc_dmd + a discriminator (Salt's 'Ours-alpha')
    scfm, dmd4_scfm          shortcut flow matching on a dense grid; the naive hybrid of dmd4 and it
    pcm                      consistency distillation in phases
    rcm                      continuous-time consistency + DMD

    autoregressive, stage 2: a student to start stage 3 from (CF++ Tab. 2; teacher_forcing itself is one, too)
    bidirectional_ode        regression on stored trajectories of the bidirectional teacher (CausVid, Self Forcing)
    causal_ode               the same of the autoregressive teacher (Causal Forcing; CF++ Eq. 1)
    causal_dmd               DMD behind the clean past, all three networks causal (CF++ Eq. 7)

    autoregressive, stage 3: asymmetric DMD (CF++ Tab. 1, Salt Tab. 2, 5). --init NAME starts from another stage 2,
    --rollout-steps, --first-steps and --chunk set the regime, --window and --sink LongLive's short memory
    causvid                  diffusion forcing on real clips, from bidirectional_ode
    self_forcing             self-rollouts, from bidirectional_ode
    causal_forcing           self-rollouts, from causal_ode
    causal_forcing_pp        self-rollouts, from causal_cd
    naive_sc                 causal_forcing_pp + L_SC on its one grid (Salt Tab. 5: worse; on the toy: no difference)
    mixed_sc                 mixed steps + L_SC: salt without alignment
"""

import json
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import dmd
import fsdp
import sc_loss
from causal_cd import draw_index, ode_loss, pcm_loss, rcm_loss, trajectory
from files import about_of, read_tensors, write_tensors
from flowmap import add_noise, like, renoise, schedule, to_x0, warp
from stages import (
    CLIPS,
    NOISE,
    RECIPE,
    SHORTCUT,
    TRIPLE,
    Made,
    Stage,
    Training,
    asymmetric,
    batch,
    build,
    build_teacher,
    distribution_matching,
    draws,
    finished,
    frozen,
    guide,
    noise_like,
    path_of,
    prompts_only,
    regression,
    rollouts,
    score_teacher,
    video_shape,
)

# ---------------------------------------------------------------------------------------------------------------------
# Not autoregressive: the student is bidirectional and makes the whole clip at once

def alike(cfg, start, teacher):
    """Student and its average (from stage start), teacher and critic (both from stage teacher), all of one layout."""
    weights = finished(cfg, start)
    net, ema = build(cfg, weights), frozen(build(cfg, weights))
    return net, ema, score_teacher(cfg, teacher), build(cfg, finished(cfg, teacher))


def clips_for(cfg, step, part, which):
    """Real clips for the generator's step (which = 0) and for each of the critic's (1, 2, ...)."""
    return batch(cfg, "dmd", step * (1 + cfg.critic_steps) + which, part)


def denoised(net, x_t, t, text, **layout) -> tuple[Tensor, Tensor]:
    """x_0 = x_t - t v and v. t: a float, or a time for every clip, `b`."""
    v = net(x_t, like(t, x_t[:, :, 0, 0, 0]).expand(x_t.shape[:2]), text, **layout)
    return to_x0(x_t, v, t), v


def from_noised_clips(cfg, net, grid, with_sc=False):
    """make(step, part, which, g): denoise noised real clips, each at its own time of the grid (as Salt; no backward
    simulation).

    with_sc adds L_SC from there: ts is that time, tm from the same grid, te from the grid of half as many steps.
    """
    infer_grid = grid[::2]

    def make(step, part, which, g):
        x0, text = clips_for(cfg, step, part, which)
        ts, terms = grid[torch.randint(len(grid), (cfg.batch,), generator=g)], {}
        x_t = add_noise(x0, noise_like(cfg, "dmd", step, part, x0.shape[1:], NOISE, which), ts[part])
        x0_made, v = denoised(net, x_t, ts[part], text)
        if with_sc and which == 0 and cfg.lambda_sc > 0:
            def velocity(x, t):
                return denoised(net, x, t, text)[1]
            tm, te = sc_loss.draw_triples(ts, grid, infer_grid, draws(cfg, "dmd", step, TRIPLE))
            terms["sc"] = sc_loss.sc_loss(velocity, x_t, v, ts[part], tm[part], te[part], cfg.sc_through)[0]
        return Made(part, x0_made, text, terms)

    return make


def simulated(net, noise: Tensor, grid: Tensor, exit_step: int, text, **layout) -> Tensor:
    """Backward simulation (DMD2): walk from noise to grid[exit_step] by the CM solver, without gradient, then denoise.

    noise: `b K f c h w`, K > exit_step. Returns x_0 `b f c h w`.
    """
    x, times = noise[:, 0], grid.tolist()
    with torch.no_grad():
        for k in range(exit_step):
            v = denoised(net, x, times[k], text, **layout)[1]
            x = renoise(x, v, times[k], times[k + 1], noise[:, k + 1])
    return denoised(net, x, times[exit_step], text, **layout)[0]


def from_own_states(cfg, net, grid):
    """make(step, part, which, g): denoise a state of the student's own path from noise (backward simulation on). One
    exit step for all clips, as in DMD2: it says how many forwards there are."""

    def make(step, part, which, g):
        exit_step = int(torch.randint(len(grid), (), generator=g))
        noise = noise_like(cfg, "dmd", step, part, (len(grid), *video_shape(cfg)), NOISE, which)
        text = prompts_only(cfg, step, part, which)
        return Made(part, simulated(net, noise, grid, exit_step, text), text, drawn={"exit_step": exit_step})

    return make


def dmd_on_grid(cfg, start, steps, make_from) -> Training:
    """DMD (arXiv 2311.18828, 2405.14867; Salt Eq. 4): every time of T^(steps) is trained as a one-step generator."""
    net, ema, teacher, critic = alike(cfg, start, "bidirectional")
    return distribution_matching(cfg, net, ema, teacher, critic, make_from(cfg, net, schedule(steps, cfg.shift)))


def sc_dmd(cfg, start) -> Training:
    """Salt Eq. 10: L_DMD + lambda_sc L_SC, both on the grid of --train-grid (8) times."""
    net, ema, teacher, critic = alike(cfg, start, "bidirectional")
    make = from_noised_clips(cfg, net, schedule(cfg.train_grid, cfg.shift), with_sc=True)
    return distribution_matching(cfg, net, ema, teacher, critic, make)


def sc_dmd_gan(cfg, start) -> Training:
    """Salt's 'Ours-alpha': SC-DMD, and a discriminator on the features of the critic's middle block (as in DMD2)."""
    net, ema, teacher, critic = alike(cfg, start, "bidirectional")
    head = dmd.Discriminator(critic.config.dim).init_weights(cfg.seed).to(cfg.device)
    head = fsdp.shard(head, "fp32", cfg.gather)

    def logits(x0, text, t, eps):
        return head(critic(add_noise(x0, eps, t), t, text, until=len(critic.blocks) // 2))

    def discriminate(step, which, made, t, eps):
        real, text = clips_for(cfg, step, made.part, which)
        loss = dmd.discriminator_loss(logits(real, text, t, eps), logits(made.x0.detach(), made.text, t, eps))
        return {"gan": loss}

    def deceive(step, made, t, eps, g):
        return {"gan": dmd.adversarial_loss(logits(made.x0, made.text, t, eps))}

    make = from_noised_clips(cfg, net, schedule(cfg.train_grid, cfg.shift), with_sc=True)
    return distribution_matching(cfg, net, ema, teacher, critic, make, deceive, discriminate, head)


def scfm(cfg, start) -> Training:
    """Shortcut flow matching (SCFM; Salt Tab. A.1): composition as the only signal, on a dense grid."""
    weights = finished(cfg, start)
    teacher = guide(cfg, build_teacher(cfg, weights), cfg.guidance)
    net, ema = build(cfg, weights), frozen(build(cfg, weights))

    def loss_of(step, part):
        x0, text = batch(cfg, "trajectory", step, part)
        return dense_shortcut(cfg, "trajectory", step, part, net, ema, teacher, x0, text)

    return regression(cfg, "trajectory", net, ema, loss_of)


def dense_shortcut(cfg, kind, step, part, net, ema, teacher, x0, text):
    """L_SCFM on the grid of --shortcut-grid times, with draws of their own."""
    grid, g = schedule(cfg.shortcut_grid, cfg.shift), draws(cfg, kind, step, SHORTCUT)
    index, stride = sc_loss.draw_shortcut(cfg.batch, cfg.frames, len(grid), g)
    eps = noise_like(cfg, kind, step, part, x0.shape[1:], SHORTCUT)
    return sc_loss.shortcut_loss(net, ema, teacher, x0, text, grid, index[part], stride, eps)


def dmd4_scfm(cfg, start) -> Training:
    """The naive hybrid (Salt A.2): DMD on 4 times, shortcuts on a dense grid. Between the 4, nobody matches
    distributions, and that is where the composed branch goes: Salt's reason why it is worse than either."""
    net, ema, teacher, critic = alike(cfg, start, "bidirectional")
    real = guide(cfg, teacher, cfg.score_guidance)

    def shortcuts(step, made, t, eps, g):
        x0, text = clips_for(cfg, step, made.part, 0)
        return {"scfm": dense_shortcut(cfg, "dmd", step, made.part, net, ema, real, x0, text)[0]}

    make = from_noised_clips(cfg, net, schedule(4, cfg.shift))
    return distribution_matching(cfg, net, ema, teacher, critic, make, shortcuts)


def pcm(cfg, start) -> Training:
    """PCM (Salt Tab. 1): consistency distillation in --phases (4) phases of the --trajectory-grid."""
    weights = finished(cfg, start)
    teacher = guide(cfg, build_teacher(cfg, weights), cfg.guidance)
    net, ema = build(cfg, weights), frozen(build(cfg, weights))
    grid, edges = schedule(cfg.trajectory_grid, cfg.shift), schedule(cfg.phases, cfg.shift)

    def loss_of(step, part):
        x0, text = batch(cfg, "trajectory", step, part)
        eps = noise_like(cfg, "trajectory", step, part, x0.shape[1:])
        index = draw_index(cfg.batch, cfg.frames, cfg.frames, len(grid), draws(cfg, "trajectory", step))[part]
        return pcm_loss(net, ema, teacher, x0, text, grid, edges, index, eps)

    return regression(cfg, "trajectory", net, ema, loss_of)


RCM_WEIGHT = 50  # of consistency against DMD in rCM's code: 100 to 1, with a DMD loss that lacks our factor of 1/2


def rcm(cfg, start) -> Training:
    """rCM (Salt Tab. 2): continuous-time consistency by JVP, and DMD on the student's own states as its regulariser.
    Written as L_DMD + lambda_rcm RCM_WEIGHT L_CD."""
    net, ema, teacher, critic = alike(cfg, start, "bidirectional")
    real = guide(cfg, teacher, cfg.score_guidance)

    def consistency(step, made, t, eps, g):
        x0, text = clips_for(cfg, step, made.part, 0)
        u = torch.rand(cfg.batch, 1, generator=g)[made.part].expand(-1, cfg.frames)
        loss, _ = rcm_loss(net, real, x0, text, warp(u, cfg.shift).to(x0.device), eps)
        return {"rcm": RCM_WEIGHT * loss}

    make = from_own_states(cfg, net, schedule(4, cfg.shift))
    return distribution_matching(cfg, net, ema, teacher, critic, make, consistency)


# ---------------------------------------------------------------------------------------------------------------------
# Autoregressive, stage 2

def trajectories(cfg, stage, teacher, layout_of) -> tuple[list[Path], dict]:
    """Trajectories of a teacher from noise, made once and kept in --out/STAGE_trajectories, a file for each.

    layout_of(x0): how the teacher looks at clips x0. Returns the files, of tensors x0 `f c h w`, states `5 f c h w` at
    the times of T^(4) and 0, text `l d`; and what they cost, seconds and bytes. What an earlier run left is used again;
    ValueError if its settings were others.
    """
    folder = Path(cfg.out) / f"{stage}_trajectories"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {k: getattr(cfg, k) for k in ("size", "data", "seed", "frames", "chunk", "shift", "guidance", "batch",
                                             "prompt_dropout", "trajectory_grid", "trajectories")}
    teacher_saved = about_of(path_of(cfg, STAGES[stage].start)).get("saved")
    settings = json.loads(json.dumps(settings | {"stage": stage, "teacher_saved": teacher_saved}))
    grid, batches = schedule(cfg.trajectory_grid, cfg.shift), range(-(-cfg.trajectories // cfg.batch))
    files = [folder / f"{i:06d}.safetensors" for i in range(len(batches) * cfg.batch)]
    missing = fsdp.on_rank_0(lambda: [not path.exists() for path in files])
    for step in tqdm(batches, desc=f"{stage}: trajectories", disable=fsdp.rank() > 0):
        if not any(missing[step * cfg.batch : (step + 1) * cfg.batch]):
            continue
        for part in fsdp.my_parts(cfg.batch, cfg.accum):
            start = time.time()
            x0, text = batch(cfg, "trajectory", step, part)
            noise, layout = noise_like(cfg, "trajectory", step, part, x0.shape[1:], CLIPS), layout_of(x0)

            def velocity(x, t, text=text, layout=layout):
                return teacher(x, torch.full(x.shape[:2], t, device=x.device), text, **layout)

            states = trajectory(velocity, noise, grid, keep=cfg.trajectory_grid // 4)
            about = {"settings": settings, "seconds": (time.time() - start) / len(x0)}
            fsdp.agree(f"writing trajectories from {files[step * cfg.batch]} on")
            for i, path in enumerate(files[step * cfg.batch : (step + 1) * cfg.batch][part]):
                write_tensors(path, {"x0": x0[i], "states": states[i], "text": text[i]}, about)
    fsdp.agree("training on trajectories")
    for path in files:
        about = about_of(path)
        made = about.get("settings") if isinstance(about.get("settings"), dict) else {}
        if differ := [k for k in settings if made.get(k, settings[k] if k == "teacher_saved" else None) != settings[k]]:
            told = ", ".join(f"{k} {made.get(k)} (now {settings[k]})" for k in differ)
            raise ValueError(f"got {path} made with {told}, expected the same: change --out, or move the folder away")
        if not isinstance(about.get("seconds"), float | int):
            raise ValueError(f"got {path} without its cost, expected a trajectory of ours: move the folder away")
    return files, {"data_seconds": sum(about_of(path)["seconds"] for path in files),
                   "data_bytes": sum(path.stat().st_size for path in files)}


def on_trajectories(cfg, stage, start, layout_of) -> Training:
    """Regress a student on stored trajectories of the network it starts from (CF++ Eq. 1): a random batch of them, a
    random time for every chunk.

    Without a clean past the chunks are each other's context, and it must be clean at times, as in rollouts: then time
    0, the end itself, is drawn as well. It carries no loss for its own chunk.
    """
    weights = finished(cfg, start)
    net, ema = build(cfg, weights), frozen(build(cfg, weights))
    files, cost = trajectories(cfg, stage, guide(cfg, build_teacher(cfg, weights), cfg.guidance), layout_of)
    times = torch.cat([schedule(4, cfg.shift), torch.zeros(1)])

    def loss_of(step, part):
        g = draws(cfg, "trajectory", step)
        pick = torch.randint(len(files), (cfg.batch,), generator=g)[part]
        stored = [read_tensors(files[i])[0] for i in pick]
        if not all({"x0", "states", "text"} <= s.keys() for s in stored):
            raise ValueError(f"got no x0, states and text in {[str(files[i]) for i in pick][:3]}, expected stored "
                             "trajectories: move the folder away")
        x0, states, text = (torch.stack([s[k] for s in stored]).to(cfg.device) for k in ("x0", "states", "text"))
        layout = {"chunk": cfg.chunk} | layout_of(x0)
        index = draw_index(cfg.batch, cfg.frames, cfg.chunk, 4 if "clean" in layout else 5, g)[part].to(cfg.device)
        return ode_loss(net, states, times, index, text, **layout)

    return regression(cfg, "trajectory", net, ema, loss_of, cost)


def bidirectional_ode(cfg, start) -> Training:
    """ODE initialisation of CausVid and Self Forcing: a causal student regresses on the bidirectional teacher's ends,
    behind a past that is as noisy as the trajectory it belongs to (diffusion forcing).

    The end of a frame depends on the noise of later frames, which the student cannot see: it learns the conditional
    mean (CF++ Sec. 3.1; tests/test_ar_world.py has the factor by which the variance shrinks).
    """
    return on_trajectories(cfg, "bidirectional_ode", start, lambda x0: {})


def causal_ode(cfg, start) -> Training:
    """Causal Forcing's stage 2 (CF++ Eq. 1): the trajectories of the autoregressive teacher behind the clean past."""
    return on_trajectories(cfg, "causal_ode", start, lambda x0: {"chunk": cfg.chunk, "clean": x0})


def causal_dmd(cfg, start) -> Training:
    """Causal DMD (CF++ Eq. 7): generator, teacher and critic are autoregressive and see the clean past of real clips.

    CF++ reports sharp first frames, then drift: it never meets its own history, and reverse KL puts all mass where an
    error of the history hurts (Sec. 3.4; tests/test_mixture_world.py). Over the toy's 8 frames it does not drift.
    """
    net, ema, teacher, critic = alike(cfg, start, "teacher_forcing")
    grid = schedule(4, cfg.shift)

    def make(step, part, which, g):
        clean, text = clips_for(cfg, step, part, which)
        layout = {"chunk": cfg.chunk, "clean": clean}
        exit_step = int(torch.randint(len(grid), (), generator=g))
        noise = noise_like(cfg, "dmd", step, part, (len(grid), *video_shape(cfg)), NOISE, which)
        x0 = simulated(net, noise, grid, exit_step, text, **layout)
        return Made(part, x0, text, layout=layout, drawn={"exit_step": exit_step})

    return distribution_matching(cfg, net, ema, teacher, critic, make)


# ---------------------------------------------------------------------------------------------------------------------
# Autoregressive, stage 3

def causvid(cfg, start) -> Training:
    """CausVid (arXiv 2412.07772): the generator denoises real clips, every chunk at its own time (diffusion forcing),
    and the whole clip is matched. Its chunks lean on noised real pasts, never on its own."""
    net, ema, teacher, critic = asymmetric(cfg, start)
    times = torch.cat([schedule(cfg.rollout_steps, cfg.shift), torch.zeros(1)]).to(cfg.device)  # 0: clean context

    def make(step, part, which, g):
        x0, text = clips_for(cfg, step, part, which)
        t = times[draw_index(cfg.batch, cfg.frames, cfg.chunk, len(times), g)[part].to(cfg.device)]
        x_t = add_noise(x0, noise_like(cfg, "dmd", step, part, x0.shape[1:], NOISE, which), t)
        return Made(part, to_x0(x_t, net(x_t, t, text, chunk=cfg.chunk), t), text)

    return distribution_matching(cfg, net, ema, teacher, critic, make)


def self_rollout_dmd(cfg, start, mixed=False, with_sc=False) -> Training:
    """Self Forcing (arXiv 2506.08009), and stage 3 of Causal Forcing and CF++: DMD on rollouts of --rollout-steps;
    mixed: of --mixed-steps (Salt Sec. 3.3). with_sc: + lambda_sc L_SC at the largest K.

    Salt does not say from which grid naive_sc takes te. With one K, T_train is T^(K); we read T^(K) of Eq. 9 as that of
    half as many steps, as between T^(8) and T^(4): with K = 4, te is .8333 or 0.
    """
    net, ema, teacher, critic = asymmetric(cfg, start)
    lengths, probabilities = (cfg.mixed_steps, cfg.mixed_probs) if mixed else ((cfg.rollout_steps,), (1.0,))
    return distribution_matching(cfg, net, ema, teacher, critic, rollouts(cfg, net, lengths, probabilities, with_sc))


def whole_clip(begin, kind, solver="cm"):
    return Stage(begin, kind, "bidirectional", causal=False, few_step=True, solver=solver,
                 teacher="bidirectional" if kind == "dmd" else "")


def streaming(begin, kind, start, windowed=False, teacher=""):
    return Stage(begin, kind, start, causal=True, few_step=True, solver="cm", windowed=windowed, teacher=teacher)


def stage_three(begin, start):
    return streaming(begin, "dmd", start, windowed=True, teacher="bidirectional")


BASELINES = {
    "dmd4": whole_clip(partial(dmd_on_grid, steps=4, make_from=from_noised_clips), "dmd"),
    "dmd8": whole_clip(partial(dmd_on_grid, steps=8, make_from=from_noised_clips), "dmd"),
    "dmd4_backward": whole_clip(partial(dmd_on_grid, steps=4, make_from=from_own_states), "dmd"),
    "dmd8_backward": whole_clip(partial(dmd_on_grid, steps=8, make_from=from_own_states), "dmd"),
    "sc_dmd": whole_clip(sc_dmd, "dmd"),
    "sc_dmd_gan": whole_clip(sc_dmd_gan, "dmd"),
    "scfm": whole_clip(scfm, "trajectory", "euler"),
    "dmd4_scfm": whole_clip(dmd4_scfm, "dmd"),
    "pcm": whole_clip(pcm, "trajectory", "euler"),
    "rcm": whole_clip(rcm, "dmd"),
    "bidirectional_ode": streaming(bidirectional_ode, "trajectory", "bidirectional"),
    "causal_ode": streaming(causal_ode, "trajectory", "teacher_forcing"),
    "causal_dmd": streaming(causal_dmd, "dmd", "teacher_forcing", teacher="teacher_forcing"),
    "causvid": stage_three(causvid, "bidirectional_ode"),
    "self_forcing": stage_three(self_rollout_dmd, "bidirectional_ode"),
    "causal_forcing": stage_three(self_rollout_dmd, "causal_ode"),
    "causal_forcing_pp": stage_three(self_rollout_dmd, "causal_cd"),
    "naive_sc": stage_three(partial(self_rollout_dmd, with_sc=True), "causal_cd"),
    "mixed_sc": stage_three(partial(self_rollout_dmd, mixed=True, with_sc=True), "causal_cd"),
}

STAGES = RECIPE | BASELINES
