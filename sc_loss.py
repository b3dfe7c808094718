"""Self-consistency: make the student's Euler steps compose (Salt's SC-DMD).

DMD trains every noise level as a one-step generator by itself; nothing says that two short steps should land where
one long step lands. An exact flow map does (Salt Eq. 3). The *semigroup defect* of a triple ts > tm > te compares,
from one x_ts,

    direct     x1 = Psi^{ts->te}(x_ts) = x_ts - (ts - te) v(x_ts, ts)              (Salt Eq. 6, 14)
    composed   x2 = Psi^{tm->te}( Psi^{ts->tm}(x_ts) )                             (Salt Eq. 7, 15)
    L_SC       = E || x1 - x2 ||^2                                                 (Salt Eq. 8)

v(x_ts, ts) is the forward that DMD makes anyway, so this costs one extra forward, at tm. Inserting one in the other,
x1 - x2 = (tm - te) (v(x_tm, tm) - v(x_ts, ts)): the loss asks the velocity to be constant along the student's own path.

Triples (Salt Eq. 9): ts from the training grid; te from the inference grid below ts; tm from the training grid strictly
between. SC must act on the grid that DMD supervises; on a denser one the composed branch passes through times that
nobody trains, and it hurts (Salt, appendix A.2).

Left open by the paper
  - Whether 0 belongs to the ends te. Here it does: otherwise the last interval, the one that makes the picture, has
    no target.
  - Where the gradient flows. Default `through="both"`, as Eq. 8 is written; "direct" holds the composed end fixed
    (as in shortcut models), "composed" the direct one.
"""

import torch
from torch import Tensor

from flowmap import euler


def triple_ends(ts: float, train_grid: Tensor, infer_grid: Tensor) -> list[float]:
    """The ends te that a start ts allows: times of the inference grid, or 0, with a training time strictly in
    between."""
    ends = [*infer_grid.tolist(), 0.0]
    return [te for te in ends if any(te < tm < ts for tm in train_grid.tolist())]


def draw_triple(ts: float, train_grid: Tensor, infer_grid: Tensor, g: torch.Generator) -> tuple[float, float] | None:
    """(tm, te) for a start ts (Salt Eq. 9): te uniform over the allowed ends, then tm uniform strictly between.

    Grids are descending times without 0. None where there is no triple: ts is the last time of the training grid.
    """
    def pick(options):
        return options[int(torch.randint(len(options), (), generator=g))]

    ends = triple_ends(ts, train_grid, infer_grid)
    if not ends:
        return None
    te = pick(ends)
    return pick([tm for tm in train_grid.tolist() if te < tm < ts]), te


def endpoints(velocity, x_ts: Tensor, v_ts: Tensor, ts, tm, te) -> tuple[Tensor, Tensor]:
    """The direct and the composed endpoint (Salt Eq. 6, 7). velocity: callable (x, t) -> v, called once, at tm.

    x_ts and v_ts = v(x_ts, ts): `b ...`. Times: floats, or tensors whose axes are the leading axes of x.
    """
    direct = euler(x_ts, v_ts, ts, te)
    x_tm = euler(x_ts, v_ts, ts, tm)
    return direct, euler(x_tm, velocity(x_tm, tm), tm, te)


def sc_loss(velocity, x_ts: Tensor, v_ts: Tensor, ts, tm, te, through: str = "both") -> tuple[Tensor, dict]:
    """L_SC (Salt Eq. 8), as a mean over elements. Gradient: into velocity at tm and into v_ts (see `through`)."""
    if through not in ("both", "direct", "composed"):
        raise ValueError(f"got through={through!r}, expected 'both', 'direct' or 'composed'")
    direct, composed = endpoints(velocity, x_ts, v_ts, ts, tm, te)
    if through == "direct":
        composed = composed.detach()
    if through == "composed":
        direct = direct.detach()
    loss = (direct.float() - composed.float()).square().mean()
    return loss, {"sc": loss.detach()}


@torch.no_grad()
def semigroup_defect(velocity, x_ts: Tensor, ts, tm, te, eps: float = 1e-8) -> Tensor:
    """Delta(ts, tm, te) = E[ ||x1 - x2||^2 / (||x1 - x_ts||^2 + eps) ], the test-time diagnostic (Salt Eq. 14-16).
    Scalar."""
    direct, composed = endpoints(velocity, x_ts, velocity(x_ts, ts), ts, tm, te)
    defect = (direct - composed).flatten(1).square().sum(1)
    moved = (direct - x_ts).flatten(1).square().sum(1)
    return (defect / (moved + eps)).mean()


