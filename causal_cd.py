"""Causal consistency distillation (Causal Forcing++): a few-step autoregressive student from an autoregressive teacher.

CF++ Stage 1, teacher forcing: flow matching where a noisy chunk x_t^i sees the clean past x_gt^{<i} and itself. It is
`flowmap.flow_matching_loss(net, x0, text, t, eps, chunk=n, clean=x0)`, and nothing else.

CF++ Stage 2. The teacher's ODE, given the clean past, carries x_t^i to one definite x_0^i: the AR-conditional flow map
f: (x_t^i, x_gt^{<i}, t) -> x_0^i (CF++ Eq. 2). The student is G = x_t - t v_theta (CF++ Eq. 4). Causal ODE, the rival,
stores trajectories of the teacher and regresses G on their ends (CF++ Eq. 1, baselines/causal.py). Causal CD learns
the same f without any stored trajectory: one jump from x_t must land where a teacher step and then a jump land (CF++
Eq. 3),

    min_theta E[ w(t) || G_theta(x_t^i, x_gt^{<i}, t) - sg G_theta-(xhat_s^i, x_gt^{<i}, s) ||^2 ],
    xhat_s = x_t - (t - s) v_teacher(x_t^i, x_gt^{<i}, t)       one guided Euler step from real data noised to t

t and s are neighbours on a grid of N timesteps (48 in the paper) followed by 0; theta- is an exponential moving
average of theta; w = 1. At s = 0 the target is xhat_0 itself, because G(x, 0) = x: the chain is anchored to the teacher
there. The error of the optimum is O(dt) for the Euler step (CF++ Eq. 5).

Where we differ from the public code, and why
  - The last interval, t_N -> 0, is included; without it nothing anchors the chain to data.
  - Every chunk of every clip draws its own t (the public code: one t for the whole batch). Under teacher forcing
    the chunks are independent problems, so this is the same expectation with less variance.
  - Timesteps stay in float32 (in bf16 the small steps t - s are off by up to 64 %).
  - A bidirectional teacher cannot be used: its x_0^i depends on future frames, so it is not a function of
    (x_t^i, x_gt^{<i}), and the student would learn its conditional mean (CF++ Sec. 3.1).
"""

import torch
from torch import Tensor

from flowmap import add_noise, euler, squared_error, to_x0


def causal_cd_loss(student, ema, teacher, x0: Tensor, text: Tensor, grid: Tensor, index: Tensor, eps: Tensor,
                   chunk: int) -> tuple[Tensor, dict]:
    """Causal consistency distillation (CF++ Eq. 3). Gradient flows into the student only.

    student, ema, teacher: causal networks called as net(x, t, text, chunk=n, clean=x0); the teacher guided.
    x0, eps: `b f c h w`. grid: descending timesteps `N`. index: integers `b f` into the grid, equal within a chunk.
    """
    timesteps = torch.cat([grid, grid.new_zeros(1)]).to(x0.device)
    t, s = timesteps[index], timesteps[index + 1]
    x_t = add_noise(x0, eps, t)
    with torch.no_grad():
        x_s = euler(x_t, teacher(x_t, t, text, chunk=chunk, clean=x0), t, s)
        target = to_x0(x_s, ema(x_s, s, text, chunk=chunk, clean=x0), s)
    prediction = to_x0(x_t, student(x_t, t, text, chunk=chunk, clean=x0), t)
    loss = squared_error(prediction, target)                                                               # CF++ Eq. 3
    return loss, {"consistency": loss.detach()}


def draw_index(batch: int, frames: int, chunk: int, steps: int, g: torch.Generator) -> Tensor:
    """A uniform grid index for every chunk, repeated over its frames: integers `batch frames` in [0, steps)."""
    return torch.randint(steps, (batch, frames // chunk), generator=g).repeat_interleave(chunk, dim=1)
