"""Consistency without causality: students of the bidirectional teacher whose steps compose (Salt Tab. 1, 2, A.1).

    scfm        shortcut flow matching on a dense grid: composition as the only signal
    dmd4_scfm   the naive hybrid of DMD on 4 timesteps and shortcuts on a dense grid (Salt A.2)
    pcm         consistency distillation in phases
    rcm         continuous-time consistency by a Jacobian-vector product, and DMD as its regulariser
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from baselines.whole_clip import denoised_clips, networks, own_state, score_times_and_noise
from causal_cd import draw_index
from dmd import critic_loss, dmd_loss
from flowmap import add_noise, euler, expand_like, schedule, shift_timesteps, squared_error
from stage import Training, alternate, build_teacher, guide, load_finished, regression, student_and_average
from worlds.draws import SHORTCUT

SHORTCUT_GRID = 32  # timesteps of the dense grid of scfm and dmd4_scfm, a power of two
PHASES = 4  # of pcm, and its sampling steps; they divide trajectory_grid
LAMBDA_SCFM = 1.0  # weight of the shortcut loss in dmd4_scfm (ours)
LAMBDA_RCM = 1.0  # weight of the consistency loss in rcm, in units of rCM's own
RCM_WEIGHT = 50  # of consistency against DMD in rCM's code: 100 to 1, with a DMD loss that lacks our factor of 1/2


# ---------------------------------------------------------------------------------------------------------------------
# Shortcuts

def shortcut_loss(student, ema, teacher, x0: Tensor, text: Tensor, grid: Tensor, start: Tensor, stride: int,
                  eps: Tensor) -> tuple[Tensor, dict]:
    """Shortcut flow matching without a step-size embedding (SCFM, arXiv 2510.17858; shortcut models, arXiv 2410.12557).

        v_theta(x_t, t) -> sg (x_t - x_s) / (t - s),  x_s = two Euler steps of theta-, of half the stride each

    A step should go where two half steps go; a step of one interval where the teacher goes. One velocity serves all
    strides, so its flow is pulled straight. (Strides are powers of two, as in shortcut models.) x0, eps: `b f c h w`.
    grid: descending timesteps `N`, followed by 0. start: integers `b f` with start + stride <= N. stride: 1 or even.
    Gradient into the student only.
    """
    timesteps = torch.cat([grid, grid.new_zeros(1)]).to(x0.device)
    t, m, s = timesteps[start], timesteps[start + stride // 2], timesteps[start + stride]
    x_t = add_noise(x0, eps, t)
    with torch.no_grad():
        if stride == 1:
            target = teacher(x_t, t, text)
        else:
            first = ema(x_t, t, text)
            x_m = euler(x_t, first, t, m)
            half = ((t - m) / (t - s))[..., None, None, None]
            target = half * first + (1 - half) * ema(x_m, m, text)
    loss = squared_error(student(x_t, t, text), target)
    return loss, {"shortcut": loss.detach()}


def draw_shortcut(batch: int, frames: int, steps: int, g: torch.Generator) -> tuple[Tensor, int]:
    """A stride of 1, 2, 4, ..., steps for the batch, and a start for every clip: integers `batch frames`."""
    stride = 2 ** int(torch.randint(steps.bit_length(), (), generator=g))
    return torch.randint(steps - stride + 1, (batch, 1), generator=g).expand(batch, frames), stride


def dense_shortcut(cfg, draw, net, ema, teacher, x0, text) -> Tensor:
    """L_SCFM on the grid of SHORTCUT_GRID timesteps, with draws of its own."""
    grid, g = schedule(SHORTCUT_GRID, cfg.shift), draw.generator(SHORTCUT)
    index, stride = draw_shortcut(cfg.batch, cfg.frames, len(grid), g)
    eps = draw.noise_like(x0, SHORTCUT)
    return shortcut_loss(net, ema, teacher, x0, text, grid, draw.mine(index), stride, eps)


def scfm(cfg, start) -> Training:
    """Shortcut flow matching (SCFM; Salt Tab. A.1): composition as the only signal, on a dense grid."""
    weights = load_finished(cfg, start)
    teacher = guide(cfg, build_teacher(cfg, weights), cfg.guidance)
    net, ema = student_and_average(cfg, weights)

    def loss_of(draw):
        return dense_shortcut(cfg, draw, net, ema, teacher, *draw.clips())

    return regression(cfg, "trajectory", net, ema, loss_of)


def dmd4_scfm(cfg, start) -> Training:
    """The naive hybrid (Salt A.2): DMD on 4 timesteps, shortcuts on a dense grid. Between the 4, nobody matches
    distributions, and that is where the composed branch goes: Salt's reason why it is worse than either."""
    net, ema, teacher, critic = networks(cfg, start)
    grid = schedule(4, cfg.shift)

    def generator_step(draw):
        x0, text = denoised_clips(cfg, net, draw, grid)
        loss, metrics = dmd_loss(x0, text, critic, teacher, *score_times_and_noise(cfg, draw, x0))         # Salt Eq. 4
        metrics["scfm"], _ = dense_shortcut(cfg, draw, net, ema, teacher, *draw.clips())
        return loss + LAMBDA_SCFM * metrics["scfm"], metrics | {"x0": x0}

    def critic_step(draw):
        with torch.no_grad():
            x0, text = denoised_clips(cfg, net, draw, grid)
        return critic_loss(critic, x0, text, *score_times_and_noise(cfg, draw, x0))

    return alternate(cfg, net, ema, critic, generator_step, critic_step)


# ---------------------------------------------------------------------------------------------------------------------
# Phases

def pcm_loss(student, ema, teacher, x0: Tensor, text: Tensor, grid: Tensor, edges: Tensor, index: Tensor,
             eps: Tensor) -> tuple[Tensor, dict]:
    """Consistency distillation in phases (PCM, arXiv 2405.18407), without its adversarial loss.

    The trajectory is cut at `edges`; within a phase, every x_t maps to the phase's lower end e, by Psi^{t->e}:

        min_theta E || Psi_theta^{t->e}(x_t) - sg Psi_theta-^{s->e}(xhat_s) ||^2,   xhat_s one teacher step from x_t

    With one phase this is consistency distillation; the student samples with one Euler step per phase. edges: the
    sampling grid T^(K), descending from 1, a subset of grid. The rest as in causal_cd_loss, without a layout.
    """
    timesteps = torch.cat([grid, grid.new_zeros(1)]).to(x0.device)
    t, s = timesteps[index], timesteps[index + 1]
    lower_ends = torch.cat([edges, edges.new_zeros(1)]).to(x0.device)
    e = lower_ends[(lower_ends > s[..., None]).sum(-1)]  # the first edge that s has reached or passed
    x_t = add_noise(x0, eps, t)
    with torch.no_grad():
        x_s = euler(x_t, teacher(x_t, t, text), t, s)
        target = euler(x_s, ema(x_s, s, text), s, e)
    prediction = euler(x_t, student(x_t, t, text), t, e)
    loss = squared_error(prediction, target)
    return loss, {"consistency": loss.detach()}


def pcm(cfg, start) -> Training:
    """PCM (Salt Tab. 1): consistency distillation in PHASES phases of the teacher's trajectory."""
    weights = load_finished(cfg, start)
    teacher = guide(cfg, build_teacher(cfg, weights), cfg.guidance)
    net, ema = student_and_average(cfg, weights)
    grid, edges = schedule(cfg.trajectory_grid, cfg.shift), schedule(PHASES, cfg.shift)

    def loss_of(draw):
        x0, text = draw.clips()
        eps = draw.noise_like(x0)
        index = draw.mine(draw_index(cfg.batch, cfg.frames, cfg.frames, len(grid), draw.g))
        return pcm_loss(net, ema, teacher, x0, text, grid, edges, index, eps)

    return regression(cfg, "trajectory", net, ema, loss_of)


# ---------------------------------------------------------------------------------------------------------------------
# Continuous time

def rcm_loss(student, teacher, x0: Tensor, text: Tensor, t: Tensor, eps: Tensor) -> tuple[Tensor, dict]:
    """Continuous-time consistency (sCM, arXiv 2410.11081; rCM, arXiv 2510.08431): the limit of CD for t - s -> 0.

    Along the teacher's ODE dx/dt = v_teacher the prediction G = x_t - t v must not move:

        dG/dt = v_teacher - v - t dv/dt = 0,    dv/dt = (dv/dx) v_teacher + dv/dt|x    by one forward-mode JVP

    so v is pulled along the tangent g = v_teacher - v - t dv/dt, normalised to g / (||g|| + 0.1), ||.|| the norm of a
    whole sample, as in sCM and rCM. rCM writes this for the TrigFlow path, we for x_t = (1 - t) x_0 + t eps, without
    its warm-up of the tangent. t: `b f`.
    """
    x_t = add_noise(x0, eps, t)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no forward mode
        drift = teacher(x_t, t, text)
        # dual numbers and not torch.func.jvp: under that, torch 2.11's FSDP2 marks gathered weights as changed in place
        with forward_ad.dual_level():
            moving = forward_ad.make_dual(x_t, drift), forward_ad.make_dual(t, torch.ones_like(t))
            v, dv = forward_ad.unpack_dual(student(*moving, text))
        tangent = drift - v - expand_like(t, x_t) * dv
        size = tangent.flatten(1).norm(dim=1)
        target = v + tangent / (expand_like(size, x_t) + 0.1)
    loss = squared_error(student(x_t, t, text), target)
    return loss, {"tangent": size.mean()}


def rcm(cfg, start) -> Training:
    """rCM (Salt Tab. 2): continuous-time consistency, and DMD on the student's own states as its regulariser. Written
    as L_DMD + LAMBDA_RCM RCM_WEIGHT L_CD."""
    net, ema, teacher, critic = networks(cfg, start)
    grid = schedule(4, cfg.shift)

    def generator_step(draw):
        x0, text, exit_step = own_state(cfg, net, draw, grid)
        t, eps = score_times_and_noise(cfg, draw, x0)
        loss, metrics = dmd_loss(x0, text, critic, teacher, t, eps)                                         # Salt Eq. 4
        real, real_text = draw.clips()
        u = torch.rand(cfg.batch, 1, generator=draw.g).expand(-1, cfg.frames)
        consistency, _ = rcm_loss(net, teacher, real, real_text, draw.mine(shift_timesteps(u, cfg.shift)), eps)
        metrics["rcm"] = RCM_WEIGHT * consistency
        return loss + LAMBDA_RCM * metrics["rcm"], metrics | {"x0": x0, "exit_step": exit_step}

    def critic_step(draw):
        with torch.no_grad():
            x0, text, _ = own_state(cfg, net, draw, grid)
        return critic_loss(critic, x0, text, *score_times_and_noise(cfg, draw, x0))

    return alternate(cfg, net, ema, critic, generator_step, critic_step)


METHODS = {"scfm": scfm, "dmd4_scfm": dmd4_scfm, "pcm": pcm, "rcm": rcm}
