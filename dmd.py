"""Distribution matching distillation: move the generator's distribution towards the teacher's, not its samples to
targets.

A generated clip x_0 = G_theta(z) is noised again to a time t. There two score models tell how likely each direction
is: the frozen teacher under the data (s_real), an online *critic* under the generator's own distribution (s_fake).
Their difference is the gradient of the KL divergence (Salt Eq. 4, CF++ Eq. 6):

    grad_theta L_DMD = E_t[ (s_fake(x_t, t) - s_real(x_t, t)) dx_t/dtheta ],   x_t = (1 - t) x_0 + t eps

With s = -eps_hat / t and x_0 = x_t - t v, s_fake - s_real = (1 - t) (x0_fake - x0_real) / t^2, and dx_t/dx_0 = 1 - t:
`kl_gradient` is Eq. 4 to the letter. In practice its factor of t is replaced by one number per sample, 1 / mean|x_0 -
x0_real|, so that all timesteps pull equally hard (`dmd_gradient`):

    grad = (x0_fake - x0_real) / mean|x_0 - x0_real|
    L    = 1/2 mean || x_0 - sg(x_0 - grad) ||^2           so that dL/dx_0 = grad / numel

The critic follows the generator by flow matching on generated clips, several critic steps per generator step.
In *asymmetric* DMD (CausVid, Self Forcing, CF++ Stage 3) the generator is causal and rolls out by itself, while teacher
and critic are bidirectional and look at the whole clip. In *causal* DMD (CF++ Eq. 7) all three are causal and see the
clean past of real clips: the same functions with the layout chunk=n, clean=x_gt.

Both score models are callables net(x, t, text) -> velocity. The teacher is guided (flowmap.Guided), the critic is not.

Where we differ from the public code, and why
  - Timesteps are used as they are, everywhere (the public code looks sigma up in a table made with another shift).
  - No nan_to_num: a non-finite loss stops the run with its step (train.py).
  - Guidance is v_u + w (v_c - v_u); the public `guidance_scale: 3.0` of DMD is w = 4 here.
  - The shift of the timesteps is its own setting (public code: 5, as for Wan). On frames of 10 x 10 pixels shift 5
    compares the scores where nearly nothing of the frame is left; docs/results.md says what that costs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmap import add_noise, expand_like, shift_timesteps, to_x0


def score_times(batch: int, frames: int, shift: float, g: torch.Generator) -> Tensor:
    """Timesteps at which the scores are compared, one per clip, `batch frames`: shifted u, where u is uniform over what
    lands in [.02, .98] (the range is DMD2's; the public code clamps to it, so that at shift 5 9 % of draws are .98)."""
    low, high = (shift_timesteps(t, 1 / shift) for t in (0.02, 0.98))  # a shift of 1 / s undoes one of s
    return shift_timesteps(low + (high - low) * torch.rand(batch, 1, generator=g), shift).expand(batch, frames)


def kl_gradient(x0_fake: Tensor, x0_real: Tensor, t) -> Tensor:
    """Salt Eq. 4 for one clip and one t: (s_fake - s_real) dx_t/dx_0 = ((1 - t) / t)^2 (x0_fake - x0_real). Its mean
    over clips, noise and t is the gradient of E_t KL(p_fake,t || p_real,t) by x_0. All `b f c h w`."""
    t = expand_like(t, x0_fake)
    return ((1 - t) / t) ** 2 * (x0_fake - x0_real)                                                        # Salt Eq. 4


def dmd_gradient(x0: Tensor, x0_fake: Tensor, x0_real: Tensor) -> Tensor:
    """The normalised DMD direction (x0_fake - x0_real) / mean|x0 - x0_real|, mean per sample. All `b f c h w`."""
    size = (x0 - x0_real).abs().flatten(1).mean(1).clamp(min=1e-8)
    return (x0_fake - x0_real) / size.reshape(-1, *[1] * (x0.ndim - 1))


def surrogate_loss(x0: Tensor, grad: Tensor) -> Tensor:
    """A loss whose gradient by x0 is grad / numel: 1/2 mean || x0 - sg(x0 - grad) ||^2."""
    return 0.5 * (x0 - (x0 - grad).detach()).square().mean()


def dmd_loss(x0: Tensor, text: Tensor, critic, teacher, t: Tensor, eps: Tensor, exact: bool = False,
             **layout) -> tuple[Tensor, dict]:
    """DMD's generator loss (Salt Eq. 4, CF++ Eq. 6; with chunk=n, clean=x_gt and causal score models CF++ Eq. 7).

    x0: generated clips `b f c h w`; the gradient flows into x0 only. critic, teacher: net(x, t, text, **layout) ->
    velocity. t: `b f`. eps: like x0. exact: kl_gradient in place of the normalised dmd_gradient, for proofs.
    The metrics hold the clips x0_fake and x0_real, to look at.
    """
    with torch.no_grad():
        x_t = add_noise(x0, eps, t)
        x0_fake, x0_real = (to_x0(x_t, net(x_t, t, text, **layout), t) for net in (critic, teacher))
        if x0.dtype != torch.float64:
            x0_fake, x0_real = x0_fake.float(), x0_real.float()
        grad = kl_gradient(x0_fake, x0_real, t) if exact else dmd_gradient(x0, x0_fake, x0_real)
    metrics = {"dmd_grad": grad.abs().mean(), "fake_minus_real": (x0_fake - x0_real).abs().mean(),
               "x0_fake": x0_fake, "x0_real": x0_real}
    return surrogate_loss(x0, grad), metrics


def critic_loss(critic, x0: Tensor, text: Tensor, t: Tensor, eps: Tensor, weight: Tensor | None = None,
                **layout) -> tuple[Tensor, dict]:
    """The critic learns the generator's distribution: flow matching on generated clips x0, detached. weight: `b f`.

    The metrics hold, for each quarter of [0, 1], how many clips had their t there and the sum of their errors: a loss
    that is one number hides at which t the critic lags behind.
    """
    v = critic(add_noise(x0.detach(), eps, t), t, text, **layout)
    error = (v - (eps - x0.detach())).float().square().flatten(1).mean(1)
    error = error if weight is None else weight[:, 0] * error
    quarter = F.one_hot((4 * t[:, 0]).long().clamp(0, 3), 4).to(error)
    loss = error.mean()
    return loss, {"critic": loss.detach(), "critic_t_sum": error.detach() @ quarter, "critic_t_count": quarter.sum(0)}
