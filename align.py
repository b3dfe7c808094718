"""Reference alignment: a low-step rollout should keep the spatial structure of a denser one from the same noise.

In autoregressive generation the cache is made by the model; Salt finds it worse with few steps, and so what follows.
(On the toy alignment makes no difference: docs/results.md.) It rolls out twice from the same noise, with K steps and
with the next denser schedule (2 -> 4, 4 -> 8; no gradient), and compares the two, not pixel by pixel, but by how the
tokens of a frame relate to each other (token relation distillation, TRD):

    R = Z Z^T                      Z `s d`: l2-normalised features of one frame's tokens               (Salt Eq. 11)
    L_align = mean_f mean_ij [ |R_low - R_ref| - delta ]_+                                             (Salt Eq. 12)

R does not change when feature space is rotated; differences below the margin delta are forgiven, with zero gradient.
The features are those of a frozen network on the outputs noised to one timestep t, the same noise and t for both.

Left open by the paper: which network and layer gives Z (here: the bidirectional teacher, after its middle block), delta
(0.1, the default of VideoREPA, where TRD comes from), the weight and how often it is applied (train.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmap import add_noise


def relations(z: Tensor) -> Tensor:
    """R = Z Z^T over l2-normalised tokens (Salt Eq. 11). z `... s d` -> cosines `... s s`."""
    z = F.normalize(z.float(), dim=-1)
    return z @ z.mT                                                                                       # Salt Eq. 11


def trd_loss(z_low: Tensor, z_ref: Tensor, margin: float = 0.1) -> Tensor:
    """Mean of [|R_low - R_ref| - margin]_+ over frames and token pairs (Salt Eq. 12). z: `b f s d`; gradient into
    z_low."""
    return F.relu((relations(z_low) - relations(z_ref.detach())).abs() - margin).mean()                   # Salt Eq. 12


def align_loss(features, x_low: Tensor, x_ref: Tensor, text: Tensor, t: Tensor, eps: Tensor,
               margin: float = 0.1) -> tuple[Tensor, dict]:
    """L_align (Salt Eq. 11-12) of two rollouts. Gradient flows into x_low, through features.

    features: frozen callable (x_t, t, text) -> tokens `b f s d`. x_low, x_ref, eps: `b f c h w`. t: `b f`.
    """
    with torch.no_grad():
        z_ref = features(add_noise(x_ref, eps, t), t, text)
    loss = trd_loss(features(add_noise(x_low, eps, t), t, text), z_ref, margin)
    return loss, {"align": loss.detach()}
