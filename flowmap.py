"""Time, noise, velocity, and the maps between timesteps: the vocabulary of every other file.

A noisy latent is x_t = (1 - t) x_0 + t eps, t = 1 noise, t = 0 data; its velocity is v = dx_t/dt = eps - x_0 (Salt
Eq. 1). Following v from t down to s < t is the flow map Phi^{t->s} (Salt Eq. 2); exact flow maps compose, Phi^{t->s}
= Phi^{u->s} o Phi^{t->u} for t >= u >= s (Salt Eq. 3, the semigroup law). A network that predicts v gives the
one-step Euler operator (Salt Eq. 5)

    Psi^{t->s}(x_t) = x_t - (t - s) v(x_t, t)

It is exact where the flow is straight, and composes only as well as v is consistent: sc_loss.py measures how well.

A *grid* is a 1-D tensor of descending timesteps without the final 0, 1 = t_1 > ... > t_K > 0. A K-step sampler visits
the grid and lands on 0 by one of SOLVERS: Euler steps with Psi; Heun steps, which average v at both ends of a step and
so run the network twice; the *CM solver*, which jumps to x_0 and re-noises to the next timestep with fresh noise.

Everything takes a callable `velocity(x, t)` or plain tensors. t is a float or any tensor whose axes are the leading
axes of x: `b f` per frame, `b` per sample, or a scalar. It stays in float32 or better, whatever the latents' dtype.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SOLVERS = ("euler", "heun", "cm")


def shift_timesteps(u, shift: float):
    """Move timesteps towards noise: shift u / (1 + (shift - 1) u), from [0, 1] onto itself; u a float or tensor."""
    return shift * u / (1 + (shift - 1) * u)


def schedule(steps: int, shift: float) -> Tensor:
    """T^(K): the K-step grid of shifted 1, 1 - 1/K, ..., 1/K, float32 `K`. The grids of 2, 4, 8 steps nest.

    With shift 5: K = 4 gives 1, .9375, .8333, .625; K = 2 gives 1, .8333 (CF++ Sec. 4).
    """
    if steps < 1:
        raise ValueError(f"got {steps} steps, expected at least 1: change --steps")
    return shift_timesteps(torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1], shift).float()


def intervals(grid: Tensor) -> Iterator[tuple[float, float]]:
    """The intervals (t, s) of a grid from top to bottom; the last one ends at 0."""
    timesteps = [*grid.tolist(), 0.0]
    return zip(timesteps, timesteps[1:])


def expand_like(t, x: Tensor) -> Tensor:
    """t as a float tensor that broadcasts against x: its axes are the leading axes of x."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not isinstance(t, Tensor):
        return torch.full((), t, dtype=dtype, device=x.device)  # as_tensor would wait for the GPU
    t = t.to(x.device, dtype)
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def per_frame(t, x: Tensor) -> Tensor:
    """t, a float or `b` or `b f`, as one timestep for each frame of x `b f c h w`."""
    if not isinstance(t, Tensor) or t.ndim == 0:
        return torch.full(x.shape[:2], float(t), device=x.device)
    return t if t.ndim == 2 else t[:, None].expand(x.shape[:2])


def add_noise(x0: Tensor, eps: Tensor, t) -> Tensor:
    """x_t = (1 - t) x_0 + t eps."""
    t = expand_like(t, x0)
    return ((1 - t) * x0 + t * eps).to(x0.dtype)


def to_x0(x_t: Tensor, v: Tensor, t) -> Tensor:
    """G = x_t - t v, the predicted clean latent (CF++ Eq. 4)."""
    return (x_t - expand_like(t, x_t) * v).to(x_t.dtype)                                                   # CF++ Eq. 4


def euler(x_t: Tensor, v: Tensor, t, s) -> Tensor:
    """Psi^{t->s}(x_t) = x_t - (t - s) v, one Euler step (Salt Eq. 5)."""
    return (x_t - (expand_like(t, x_t) - expand_like(s, x_t)) * v).to(x_t.dtype)                           # Salt Eq. 5


def renoise(x_t: Tensor, v: Tensor, t, s, eps: Tensor) -> Tensor:
    """One step of the CM solver: jump to x_0 = x_t - t v, then noise it to s with fresh eps."""
    return add_noise(to_x0(x_t, v, t), eps, s)


def solver_step(solver: str, velocity, x_t: Tensor, v: Tensor, t: float, s: float, eps) -> Tensor:
    """One step from t to s of a solver of SOLVERS, where v = velocity(x_t, t) is known already. eps: a callable that
    gives the CM solver's fresh noise, like x_t. ValueError for a solver that is none of them."""
    if solver not in SOLVERS:
        raise ValueError(f"got solver {solver!r}, expected one of {', '.join(SOLVERS)}: change --solver")
    if solver == "cm" and s > 0:
        return renoise(x_t, v, t, s, eps())
    x_s = euler(x_t, v, t, s)
    if solver == "heun":
        x_s = euler(x_t, (v + velocity(x_s, s)) / 2, t, s)
    return x_s


def sample(velocity, noise: Tensor, grid: Tensor, solver: str = "euler") -> Tensor:
    """Integrate from noise to data over a grid.

    velocity: callable (x, t) -> v, t a float. noise: `b K ...`, noise[:, 0] the start and noise[:, k] what the CM
    solver adds at grid[k] (the others need only K >= 1). Returns x_0 `b ...`. Gradients flow through everything.
    """
    x = noise[:, 0]
    for k, (t, s) in enumerate(intervals(grid)):
        x = solver_step(solver, velocity, x, velocity(x, t), t, s, lambda k=k: noise[:, k + 1])
    return x


@dataclass(frozen=True)
class Condition:
    """What a network is told of a clip: words `b l d`, and, where a world has them, a row of numbers for every frame,
    `b f d`. Where there are no rows, a plain tensor of words stands for it, everywhere."""

    words: Tensor
    rows: Tensor

    def to(self, device):
        return Condition(self.words.to(device), self.rows.to(device))


def words_and_rows(condition) -> tuple[Tensor, Tensor | None]:
    """Both parts of a condition; a tensor of words has no rows."""
    return (condition.words, condition.rows) if isinstance(condition, Condition) else (condition, None)


def of_frames(condition, first: int, end: int):
    """The condition of the frames first, ..., end - 1 of its clip."""
    words, rows = words_and_rows(condition)
    return words if rows is None else Condition(words, rows[:, first:end])


def twice(condition, other_words: Tensor | None = None):
    """Two conditions on the batch axis, with the same rows; the second has other words `b l d`, or the same."""
    words, rows = words_and_rows(condition)
    both = torch.cat([words, words if other_words is None else other_words])
    return both if rows is None else Condition(both, torch.cat([rows, rows]))


def guided(v_cond: Tensor, v_uncond: Tensor, w: float) -> Tensor:
    """Classifier-free guidance v_u + w (v_c - v_u); w = 1 is the conditional velocity."""
    return v_uncond + w * (v_cond - v_uncond)


class Guided:
    """A network whose velocity is guided: conditional and unconditional halves run as one batch.

    Same call contract as the network, cache included (its cache holds both halves). null_text: `l d`, the embedding of
    "no prompt" or of a negative prompt.
    """

    def __init__(self, net, null_text: Tensor, w: float):
        self.net, self.null_text, self.w, self.new_cache = net, null_text, w, net.new_cache

    def both(self, text):
        words = words_and_rows(text)[0]
        return twice(text, self.null_text.to(words).expand_as(words))

    def __call__(self, x, t, text, *, clean=None, **layout):
        t, clean = per_frame(t, x), None if clean is None else torch.cat([clean, clean])
        v = self.net(torch.cat([x, x]), torch.cat([t, t]), self.both(text), clean=clean, **layout)
        return guided(*v.chunk(2), self.w)

    def append(self, cache, x0, text):
        self.net.append(cache, torch.cat([x0, x0]), self.both(text))


def squared_error(a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of weight (a - b)^2, in float32 or better; the axes of weight (1 if not given) are the leading axes of a."""
    a, b = (x if x.dtype == torch.float64 else x.float() for x in (a, b))
    error = (a - b).square()
    return error.mean() if weight is None else (expand_like(weight, error) * error).mean()


def flow_matching_loss(net, x0: Tensor, text: Tensor, t: Tensor, eps: Tensor, weight: Tensor | None = None,
                       **layout) -> tuple[Tensor, dict]:
    """E w(t) || v(x_t, t) - (eps - x_0) ||^2: the loss of every diffusion model here.

    Bidirectional without a layout; teacher forcing (CF++ Stage 1) with chunk=n, clean=x0; the critic of dmd.py on
    generated clips. x0, eps: `b f c h w`; t: `b f`; weight: `b f`, 1 if not given. Gradient flows into net only (x0 is
    data).
    """
    v = net(add_noise(x0, eps, t), t, text, **layout)
    loss = squared_error(v, eps - x0, weight)
    return loss, {"flow_matching": loss.detach()}


def bell_weight(t: Tensor, shift: float) -> Tensor:
    """The weight of Stage 1's loss in Causal Forcing's code, `training_weight`: a bell around t = 1/2, 0 at 0 and 1,

        w(t) = (exp(-2 (t - 1/2)^2) - exp(-1/2)) / Z,      of mean 1 over shifted u = 1, .999 ... .001

    so that noise (t = 1) teaches nothing. t and w `...`.
    """
    def bell(t):
        return torch.exp(-2 * (t - 0.5) ** 2) - math.exp(-0.5)

    return bell(t) / bell(schedule(1000, shift)).mean().item()


def data_weight(t: Tensor) -> Tensor:
    """A weight between that of the error of v, 1, and that of the error of x_0, t^2: 1.1 t^2 / (t^2 + .1). For networks
    that predict x_0, whose error of v at small t is a small error of x_0 over t. t and w `...`."""
    return 1.1 * t.square() / (t.square() + 0.1)


def loss_weight(name: str, t: Tensor, shift: float) -> Tensor | None:
    """The weight of flow_matching_loss by its name: flat (none), bell or data."""
    if name == "bell":
        return bell_weight(t, shift)
    return data_weight(t) if name == "data" else None
