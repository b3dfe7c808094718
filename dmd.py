"""Distribution matching distillation: move the generator's distribution towards the teacher's, not its samples to
targets.

A generated clip x_0 = G_theta(z) is noised again to a time t. There two score models tell how likely each direction
is: the frozen teacher under the data (s_real), an online *critic* under the generator's own distribution (s_fake).
Their difference is the gradient of the KL divergence (Salt Eq. 4, CF++ Eq. 6):

    grad_theta L_DMD = E_t[ (s_fake(x_t, t) - s_real(x_t, t)) dx_0/dtheta ],   x_t = (1 - t) x_0 + t eps

With s = -eps_hat / t and x_0 = x_t - t v, s_fake - s_real = (1 - t) (x0_fake - x0_real) / t^2. In practice the factor
of t is replaced by one number per sample, 1 / mean|x_0 - x0_real|, so that all times pull equally hard:

    grad = (x0_fake - x0_real) / mean|x_0 - x0_real|
    L    = 1/2 mean || x_0 - sg(x_0 - grad) ||^2           so that dL/dx_0 = grad / numel

The critic follows the generator by flow matching on generated clips, several critic steps per generator step.
In *asymmetric* DMD (CausVid, Self Forcing, CF++ Stage 3) the generator is causal and rolls out by itself, while teacher
and critic are bidirectional and look at the whole clip.

Both score models are callables net(x, t, text) -> velocity. The teacher is guided (flowmap.Guided), the critic is not.

Where we differ from the public code, and why
  - Times are used as they are, everywhere (the public code looks its sigma up in a table made with another shift).
  - No nan_to_num: a non-finite loss stops the run with its step (train.py).
  - Guidance is v_u + w (v_c - v_u); the public `guidance_scale: 3.0` of DMD is w = 4 here.
  - The shift of the times is its own setting (public code: 5, as for Wan). On pictures of 10 x 10 pixels shift 5
    compares the scores where nearly nothing of the picture is left; README says what that costs.
"""

import torch
from torch import Tensor

from flowmap import add_noise, flow_matching_loss, to_x0, warp


def score_times(batch: int, frames: int, shift: float, g: torch.Generator) -> Tensor:
    """Times at which the scores are compared, one per clip: warped uniform in [.02, .98] (as in DMD2), `batch
    frames`."""
    return warp(torch.rand(batch, 1, generator=g), shift).clamp(0.02, 0.98).expand(batch, frames)


def dmd_gradient(x0: Tensor, x0_fake: Tensor, x0_real: Tensor) -> Tensor:
    """The normalised DMD direction (x0_fake - x0_real) / mean|x0 - x0_real|, mean per sample. All `b f c h w`."""
    size = (x0 - x0_real).abs().flatten(1).mean(1).clamp(min=1e-8)
    return (x0_fake - x0_real) / size.reshape(-1, *[1] * (x0.ndim - 1))


def surrogate_loss(x0: Tensor, grad: Tensor) -> Tensor:
    """A loss whose gradient by x0 is grad / numel: 1/2 mean || x0 - sg(x0 - grad) ||^2."""
    return 0.5 * (x0 - (x0 - grad).detach()).square().mean()


def dmd_loss(x0: Tensor, text: Tensor, critic, teacher, t: Tensor, eps: Tensor) -> tuple[Tensor, dict]:
    """DMD's generator loss (Salt Eq. 4, CF++ Eq. 6).

    x0: generated clips `b f c h w`; the gradient flows into x0 only. critic, teacher: net(x, t, text) -> velocity.
    t: `b f`. eps: like x0.
    """
    with torch.no_grad():
        x_t = add_noise(x0, eps, t)
        x0_fake = to_x0(x_t, critic(x_t, t, text), t).float()
        x0_real = to_x0(x_t, teacher(x_t, t, text), t).float()
        grad = dmd_gradient(x0.float(), x0_fake, x0_real)
    metrics = {"dmd_grad": grad.abs().mean(), "fake_minus_real": (x0_fake - x0_real).abs().mean()}
    return surrogate_loss(x0.float(), grad), metrics


def critic_loss(critic, x0: Tensor, text: Tensor, t: Tensor, eps: Tensor) -> tuple[Tensor, dict]:
    """The critic learns the generator's distribution: flow matching on generated clips x0, detached."""
    loss, _ = flow_matching_loss(critic, x0.detach(), text, t, eps)
    return loss, {"critic": loss.detach()}
