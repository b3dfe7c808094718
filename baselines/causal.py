"""Autoregressive rivals: stage 2 by stored trajectories or by DMD (CF++ Tab. 2), and CausVid's stage 3 (CF++ Tab. 1).

    bidirectional_ode   regression on stored trajectories of the bidirectional teacher (CausVid, Self Forcing)
    causal_ode          the same of the autoregressive teacher (Causal Forcing; CF++ Eq. 1)
    causal_dmd          DMD behind the clean past, all three networks causal (CF++ Eq. 7)
    causvid             diffusion forcing on real clips + asymmetric DMD, from bidirectional_ode

Causal ODE stores trajectories of the teacher and regresses the student G = x_t - t v_theta on their ends (CF++ Eq. 1):

    min_theta E || G_theta(x_t^i, x_gt^{<i}, t) - x_0^i ||^2                 x_t^i, x_0^i on one stored trajectory

Self Forcing, Causal Forcing, CF++ and Salt's other rows are train.salt with other settings (STAGES in config.py).
"""

import json
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from baselines.whole_clip import backward_simulation, score_times_and_noise
from causal_cd import draw_index
from cluster import ranks
from cluster.files import metadata_of, read_tensors, write_tensors
from dmd import critic_loss, dmd_loss
from flowmap import Condition, add_noise, euler, intervals, schedule, squared_error, to_x0, words_and_rows
from stage import (Training, alternate, build_teacher, guide, load_finished, path_of, regression, score_models,
                   source_of, student_and_average, video_shape)
from worlds.draws import CLIPS, Draw

# ---------------------------------------------------------------------------------------------------------------------
# Stored trajectories

@torch.no_grad()
def trajectory(velocity, noise: Tensor, grid: Tensor, keep: int) -> Tensor:
    """Solve the teacher's ODE from noise `b ...` over grid by Euler steps; keep every keep-th state and the end.

    velocity: callable (x, t) -> v, t a float. Returns `b k+1 ...`: the states at grid[::keep], and x_0.
    """
    x, states = noise, []
    for i, (t, s) in enumerate(intervals(grid)):
        if i % keep == 0:
            states.append(x)
        x = euler(x, velocity(x, t), t, s)
    return torch.stack([*states, x], dim=1)


def ode_loss(student, states: Tensor, timesteps: Tensor, index: Tensor, text: Tensor, **layout) -> tuple[Tensor, dict]:
    """Causal ODE distillation (CF++ Eq. 1): regress G(x_t) on the end of the trajectory that x_t lies on.

    student: net(x, t, text, **layout); layout chunk=n, clean=x_gt for causal ODE, chunk=n for a bidirectional teacher's
    trajectories. states: `b k+1 f c h w` at timesteps `k+1`, the last 0. index: integers `b f` into them; the last is
    x_0 itself, which carries no loss but is clean context for later chunks where they see it. Gradient flows into the
    student.
    """
    t = timesteps.to(states.device)[index]
    x_t = states.gather(1, index[:, None, :, None, None, None].expand_as(states[:, :1]))[:, 0]
    loss = squared_error(to_x0(x_t, student(x_t, t, text, **layout), t), states[:, -1])
    return loss, {"ode": loss.detach()}


def stored_trajectories(cfg, stage, teacher, start, layout_of) -> tuple[list[Path], dict]:
    """Trajectories of a teacher from noise, made once and kept in --out/STAGE_trajectories, a file for each.

    layout_of(x0): how the teacher looks at clips x0. Returns the files, of tensors x0 `f c h w`, states `5 f c h w` at
    the timesteps of T^(4) and 0, text `l d`, and rows `f d` where frames are told some; and what they cost, seconds and
    bytes. What an earlier run left is used again; ValueError if its settings were others.
    """
    folder = Path(cfg.out) / f"{stage}_trajectories"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {k: getattr(cfg, k) for k in ("size", "data", "seed", "frames", "chunk", "shift", "guidance", "batch",
                                             "prompt_dropout", "trajectory_grid", "trajectories")}
    teacher_saved = metadata_of(path_of(cfg, start)).get("saved")
    settings = json.loads(json.dumps(settings | {"stage": stage, "teacher_saved": teacher_saved}))
    grid, batches = schedule(cfg.trajectory_grid, cfg.shift), range(-(-cfg.trajectories // cfg.batch))
    files = [folder / f"{i:06d}.safetensors" for i in range(cfg.trajectories)]  # the last batch is made whole
    missing = ranks.on_rank_0(lambda: [not path.exists() for path in files])
    for step in tqdm(batches, desc=f"{stage}: trajectories", disable=ranks.rank() > 0):
        of_batch = files[step * cfg.batch : (step + 1) * cfg.batch]
        if not any(missing[step * cfg.batch : (step + 1) * cfg.batch]):
            continue
        for batch_slice in ranks.my_slices(cfg.batch, cfg.accum):
            began, draw = time.time(), Draw(cfg, source_of(cfg), "trajectory", step, batch_slice)
            x0, text = draw.clips()
            layout = layout_of(x0)
            states = trajectory(lambda x, t, text=text, layout=layout: teacher(x, t, text, **layout),
                                draw.noise_like(x0, CLIPS), grid, keep=cfg.trajectory_grid // 4)
            kept = of_batch[batch_slice]
            metadata = {"settings": settings, "seconds": (time.time() - began) / max(1, len(kept))}
            words, rows = words_and_rows(text)
            stored = {"x0": x0, "states": states, "text": words} | ({} if rows is None else {"rows": rows})
            ranks.check_in_sync(f"writing trajectories from {of_batch[0]} on")
            for i, path in enumerate(kept):
                write_tensors(path, {name: of[i] for name, of in stored.items()}, metadata)
    ranks.check_in_sync("training on trajectories")
    for path in files:
        metadata = metadata_of(path)
        made = metadata.get("settings") if isinstance(metadata.get("settings"), dict) else {}
        if differ := [k for k in settings if made.get(k, settings[k] if k == "teacher_saved" else None) != settings[k]]:
            told = ", ".join(f"{k} {made.get(k)} (now {settings[k]})" for k in differ)
            raise ValueError(f"got {path} made with {told}, expected the same: change --out, or move the folder away")
        if not isinstance(metadata.get("seconds"), float | int):
            raise ValueError(f"got {path} without its cost, expected a trajectory of ours: move the folder away")
    return files, {"data_seconds": sum(metadata_of(path)["seconds"] for path in files),
                   "data_bytes": sum(path.stat().st_size for path in files)}


def on_trajectories(cfg, stage, start, layout_of) -> Training:
    """Regress a student on stored trajectories of the network it starts from (CF++ Eq. 1): a random batch of them, a
    random timestep for every chunk.

    Without a clean past the chunks are each other's context, and it must sometimes be clean, as in rollouts: then the
    end itself, t = 0, is drawn as well. It carries no loss for its own chunk.
    """
    weights = load_finished(cfg, start)
    net, ema = student_and_average(cfg, weights)
    teacher = guide(cfg, build_teacher(cfg, weights), cfg.guidance)
    files, cost = stored_trajectories(cfg, stage, teacher, start, layout_of)
    timesteps = torch.cat([schedule(4, cfg.shift), torch.zeros(1)])

    def loss_of(draw):
        picked = torch.randint(len(files), (cfg.batch,), generator=draw.g)[draw.batch_slice]
        stored = [read_tensors(files[i])[0] for i in picked]
        if not all({"x0", "states", "text"} <= s.keys() for s in stored):
            raise ValueError(f"got no x0, states and text in {[str(files[i]) for i in picked][:3]}, expected stored "
                             "trajectories: move the folder away")
        x0, states, text, *rows = (torch.stack([s[k] for s in stored]).to(cfg.device)
                                   for k in ("x0", "states", "text", "rows") if k in stored[0])
        text = Condition(text, *rows) if rows else text
        layout = {"chunk": cfg.chunk} | layout_of(x0)
        index = draw.mine(draw_index(cfg.batch, cfg.frames, cfg.chunk, 4 if "clean" in layout else 5, draw.g))
        return ode_loss(net, states, timesteps, index, text, **layout)                                      # CF++ Eq. 1

    return regression(cfg, "trajectory", net, ema, loss_of, cost)


def bidirectional_ode(cfg, start) -> Training:
    """ODE initialisation of CausVid and Self Forcing: a causal student regresses on the bidirectional teacher's ends,
    behind a past that is as noisy as the trajectory it belongs to (diffusion forcing).

    The end of a frame depends on the noise of later frames, which the student cannot see: it learns the conditional
    mean (CF++ Sec. 3.1; tests/equations/test_ar_world.py has the factor by which the variance shrinks).
    """
    return on_trajectories(cfg, "bidirectional_ode", start, lambda x0: {})


def causal_ode(cfg, start) -> Training:
    """Causal Forcing's stage 2 (CF++ Eq. 1): the trajectories of the autoregressive teacher behind the clean past."""
    return on_trajectories(cfg, "causal_ode", start, lambda x0: {"chunk": cfg.chunk, "clean": x0})


# ---------------------------------------------------------------------------------------------------------------------
# Distribution matching

def causal_dmd(cfg, start) -> Training:
    """Causal DMD (CF++ Eq. 7): generator, teacher and critic are autoregressive and see the clean past of real clips.

    CF++ reports sharp first frames, then drift: it never meets its own history, and reverse KL puts all mass where an
    error of the history hurts (Sec. 3.4; tests/equations/test_mixture_world.py). Over the toy's 8 frames it does not
    drift.
    """
    net, ema = student_and_average(cfg, load_finished(cfg, start))
    teacher, critic = score_models(cfg, "teacher_forcing")
    guided_teacher = guide(cfg, teacher, cfg.score_guidance)
    grid = schedule(4, cfg.shift)

    def generated(draw):
        clean, text = draw.clips()
        layout = {"chunk": cfg.chunk, "clean": clean}
        exit_step = draw.integer(len(grid))
        noise = draw.noise(len(grid), *video_shape(cfg))
        return backward_simulation(net, noise, grid, exit_step, text, **layout), text, layout, exit_step

    def generator_step(draw):
        x0, text, layout, exit_step = generated(draw)
        t, eps = score_times_and_noise(cfg, draw, x0)
        loss, metrics = dmd_loss(x0, text, critic, guided_teacher, t, eps, **layout)                        # CF++ Eq. 7
        return loss, metrics | {"x0": x0, "exit_step": exit_step}

    def critic_step(draw):
        with torch.no_grad():
            x0, text, layout, _ = generated(draw)
        return critic_loss(critic, x0, text, *score_times_and_noise(cfg, draw, x0), **layout)

    return alternate(cfg, net, ema, critic, generator_step, critic_step)


def causvid(cfg, start) -> Training:
    """CausVid (arXiv 2412.07772): the generator denoises real clips, every chunk at its own timestep (diffusion
    forcing), and the whole clip is matched. Its chunks lean on noised real pasts, never on its own."""
    net, ema = student_and_average(cfg, load_finished(cfg, start), windowed=True)
    teacher, critic = score_models(cfg, "bidirectional")
    guided_teacher = guide(cfg, teacher, cfg.score_guidance)
    timesteps = torch.cat([schedule(cfg.rollout_steps, cfg.shift), torch.zeros(1)])  # 0: clean context

    def generated(draw):
        x0, text = draw.clips()
        t = draw.mine(timesteps[draw_index(cfg.batch, cfg.frames, cfg.chunk, len(timesteps), draw.g)])
        x_t = add_noise(x0, draw.noise_like(x0), t)
        return to_x0(x_t, net(x_t, t, text, chunk=cfg.chunk), t), text

    def generator_step(draw):
        x0, text = generated(draw)
        loss, metrics = dmd_loss(x0, text, critic, guided_teacher, *score_times_and_noise(cfg, draw, x0))  # CF++ Eq. 6
        return loss, metrics | {"x0": x0}

    def critic_step(draw):
        with torch.no_grad():
            x0, text = generated(draw)
        return critic_loss(critic, x0, text, *score_times_and_noise(cfg, draw, x0))

    return alternate(cfg, net, ema, critic, generator_step, critic_step)


METHODS = {"bidirectional_ode": bidirectional_ode, "causal_ode": causal_ode, "causal_dmd": causal_dmd,
           "causvid": causvid}
