"""Causal consistency distillation (Causal Forcing++): a few-step autoregressive student from an autoregressive teacher.
And its relatives: causal ODE, which regresses on stored trajectories, and two ways to distil consistency without
causality, in phases (PCM) and in continuous time (rCM).

CF++ Stage 1, teacher forcing: flow matching where a noisy chunk x_t^i sees the clean past x_gt^{<i} and itself. It is
`flowmap.flow_matching_loss(net, x0, text, t, eps, chunk=n, clean=x0)`, and nothing else.

CF++ Stage 2. The teacher's ODE, given the clean past, carries x_t^i to one definite x_0^i: the AR-conditional flow map
f: (x_t^i, x_gt^{<i}, t) -> x_0^i (CF++ Eq. 2). Causal ODE (Causal Forcing) stores such trajectories and regresses the
student G = x_t - t v_theta (CF++ Eq. 4) on their ends (CF++ Eq. 1):

    min_theta E || G_theta(x_t^i, x_gt^{<i}, t) - x_0^i ||^2                 x_t^i, x_0^i on one stored trajectory

Causal CD learns the same f without any stored trajectory, by agreeing with itself one teacher step further down (CF++
Eq. 3):

    min_theta E[ w(t) || G_theta(x_t^i, x_gt^{<i}, t) - sg G_theta-(xhat_s^i, x_gt^{<i}, s) ||^2 ],
    xhat_s = x_t - (t - s) v_teacher(x_t^i, x_gt^{<i}, t)       one guided Euler step from real data noised to t

t and s are neighbours on a grid of N times (48 in the paper) followed by 0; theta- is an exponential moving average
of theta; w = 1. At s = 0 the target is xhat_0 itself, because G(x, 0) = x: the chain is anchored to the teacher there.
The error of the optimum is O(dt) for the Euler step (CF++ Eq. 5).

Where we differ from the public code, and why
  - The last interval, t_N -> 0, is included; without it nothing anchors the chain to data.
  - Every chunk of every clip draws its own t (the public code: one t for the whole batch). Under teacher forcing
    the chunks are independent problems, so this is the same expectation with less variance.
  - Times stay in float32 (in bf16 the small steps t - s are off by up to 64 %).
  - A bidirectional teacher cannot be used: its x_0^i depends on future frames, so it is not a function of
    (x_t^i, x_gt^{<i}), and the student would learn its conditional mean (CF++ Sec. 3.1). `ode_loss` accepts its
    trajectories, because CausVid and Self Forcing start so (baselines.bidirectional_ode).
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowmap import add_noise, euler, like, squared_error, to_x0


def causal_cd_loss(student, ema, teacher, x0: Tensor, text: Tensor, grid: Tensor, index: Tensor, eps: Tensor,
                   chunk: int) -> tuple[Tensor, dict]:
    """Causal consistency distillation (CF++ Eq. 3). Gradient flows into the student only.

    student, ema, teacher: causal networks called as net(x, t, text, chunk=n, clean=x0); the teacher guided.
    x0, eps: `b f c h w`. grid: descending times `N`. index: integers `b f` into the grid, equal within a chunk.
    """
    times = torch.cat([grid, grid.new_zeros(1)]).to(x0.device)
    t, s = times[index], times[index + 1]
    x_t = add_noise(x0, eps, t)
    with torch.no_grad():
        x_s = euler(x_t, teacher(x_t, t, text, chunk=chunk, clean=x0), t, s)
        target = to_x0(x_s, ema(x_s, s, text, chunk=chunk, clean=x0), s)
    prediction = to_x0(x_t, student(x_t, t, text, chunk=chunk, clean=x0), t)
    loss = squared_error(prediction, target)
    return loss, {"consistency": loss.detach()}


def draw_index(batch: int, frames: int, chunk: int, steps: int, g: torch.Generator) -> Tensor:
    """A uniform grid index for every chunk, repeated over its frames: integers `batch frames` in [0, steps)."""
    return torch.randint(steps, (batch, frames // chunk), generator=g).repeat_interleave(chunk, dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Causal ODE: the same target from stored trajectories

@torch.no_grad()
def trajectory(velocity, noise: Tensor, grid: Tensor, keep: int) -> Tensor:
    """Solve the teacher's ODE from noise `b ...` over grid by Euler steps; keep every keep-th state and the end.

    velocity: callable (x, t) -> v, t a float. Returns `b k+1 ...`: the states at grid[::keep], and x_0.
    """
    x, states, times = noise, [], [*grid.tolist(), 0.0]
    for i, (t, s) in enumerate(zip(times, times[1:])):
        if i % keep == 0:
            states.append(x)
        x = euler(x, velocity(x, t), t, s)
    return torch.stack([*states, x], dim=1)


def ode_loss(student, states: Tensor, times: Tensor, index: Tensor, text: Tensor, **layout) -> tuple[Tensor, dict]:
    """Causal ODE distillation (CF++ Eq. 1): regress G(x_t) on the end of the trajectory that x_t lies on.

    student: net(x, t, text, **layout); layout chunk=n, clean=x_gt for causal ODE, chunk=n for a bidirectional teacher's
    trajectories. states: `b k+1 f c h w` at times `k+1`, the last 0. index: integers `b f` into them; the last is x_0
    itself, which carries no loss but is clean context for later chunks where they see it. Gradient flows into the
    student.
    """
    t = times.to(states.device)[index]
    x_t = states.gather(1, index[:, None, :, None, None, None].expand_as(states[:, :1]))[:, 0]
    loss = squared_error(to_x0(x_t, student(x_t, t, text, **layout), t), states[:, -1])
    return loss, {"ode": loss.detach()}


# ---------------------------------------------------------------------------------------------------------------------
# Consistency without causality

def pcm_loss(student, ema, teacher, x0: Tensor, text: Tensor, grid: Tensor, edges: Tensor, index: Tensor,
             eps: Tensor) -> tuple[Tensor, dict]:
    """Consistency distillation in phases (PCM, arXiv 2405.18407), without its adversarial loss.

    The trajectory is cut at `edges`; within a phase, every x_t maps to the phase's lower end e, by Psi^{t->e}:

        min_theta E || Psi_theta^{t->e}(x_t) - sg Psi_theta-^{s->e}(xhat_s) ||^2,   xhat_s one teacher step from x_t

    With one phase this is consistency distillation; the student samples with one Euler step per phase. edges: the
    sampling grid T^(K), descending from 1, a subset of grid. The rest as in causal_cd_loss, without a layout.
    """
    times = torch.cat([grid, grid.new_zeros(1)]).to(x0.device)
    t, s = times[index], times[index + 1]
    lower_ends = torch.cat([edges, edges.new_zeros(1)]).to(x0.device)
    e = lower_ends[(lower_ends > s[..., None]).sum(-1)]  # the first edge that s has reached or passed
    x_t = add_noise(x0, eps, t)
    with torch.no_grad():
        x_s = euler(x_t, teacher(x_t, t, text), t, s)
        target = euler(x_s, ema(x_s, s, text), s, e)
    prediction = euler(x_t, student(x_t, t, text), t, e)
    loss = squared_error(prediction, target)
    return loss, {"consistency": loss.detach()}


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
        tangent = drift - v - like(t, x_t) * dv
        size = tangent.flatten(1).norm(dim=1)
        target = v + tangent / (like(size, x_t) + 0.1)
    loss = squared_error(student(x_t, t, text), target)
    return loss, {"tangent": size.mean()}
