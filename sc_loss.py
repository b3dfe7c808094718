"""Self-consistency: make the student's Euler steps compose (Salt's SC-DMD).

DMD trains every noise level as a one-step generator by itself; nothing says that two short steps should land where
one long step lands. An exact flow map's do (Salt Eq. 3). The *semigroup defect* of a triple ts > tm > te compares, from
one x_ts,

    direct     x1 = Psi^{ts->te}(x_ts) = x_ts - (ts - te) v(x_ts, ts)              (Salt Eq. 6, 14)
    composed   x2 = Psi^{tm->te}( Psi^{ts->tm}(x_ts) )                             (Salt Eq. 7, 15)
    L_SC       = E || x1 - x2 ||^2                                                 (Salt Eq. 8)

v(x_ts, ts) is the forward that DMD makes anyway, so this costs one extra forward, at tm. Inserting one in the other,
x1 - x2 = (tm - te) (v(x_tm, tm) - v(x_ts, ts)): the loss asks the velocity to be constant along the student's own path.
So 0 means that *Euler steps* compose. A perfect consistency student, whose x_t - t v is the exact flow map to 0, has a
defect of its own, because its Euler steps to t > 0 are not flow maps: for data N(0, .1), Salt's metric gives it
.0065 along the 4-step path of shift 5 (tests/equations/test_gaussian_world.py).

Triples (Salt Eq. 9): ts from the training grid; te from the inference grid below ts; tm from the training grid strictly
between. SC acts on the grid that DMD supervises; on a denser one the composed branch passes through timesteps at which
nobody matches distributions, which Salt reports to hurt (appendix A.2; on the toy it does not: docs/results.md).
baselines/consistency.py has that other way of asking for composition, shortcuts on a dense grid.

Left open by the paper
  - Whether 0 belongs to the ends te. Here it does: otherwise the last interval, the one that makes the image, has
    no target.
  - Where the gradient flows. Default `through="both"`, as Eq. 8 is written; "direct" holds the composed end fixed
    (as in shortcut models), "composed" the direct one. docs/results.md compares the three.
"""

import torch
from torch import Tensor

from flowmap import euler, intervals, squared_error


def triple_ends(ts: float, train_grid: Tensor, infer_grid: Tensor) -> list[float]:
    """The ends te that a start ts allows: timesteps of the inference grid, or 0, with one of the training grid in
    between."""
    ends = [*infer_grid.tolist(), 0.0]
    return [te for te in ends if any(te < tm < ts for tm in train_grid.tolist())]


def draw_triple(ts: float, train_grid: Tensor, infer_grid: Tensor, g: torch.Generator) -> tuple[float, float] | None:
    """(tm, te) for a start ts (Salt Eq. 9): te uniform over the allowed ends, then tm uniform strictly between.

    Grids are descending timesteps without 0. None where there is no triple: ts is the last one of the training grid.
    """
    def pick(options):
        return options[int(torch.randint(len(options), (), generator=g))]

    ends = triple_ends(ts, train_grid, infer_grid)
    if not ends:
        return None
    te = pick(ends)
    return pick([tm for tm in train_grid.tolist() if te < tm < ts]), te                                    # Salt Eq. 9


def draw_triples(ts: Tensor, train_grid: Tensor, infer_grid: Tensor, g: torch.Generator) -> tuple[Tensor, ...]:
    """tm and te `b` for starts ts `b`, one of every clip. Where there is no triple, tm = te = ts: the defect is 0."""
    ends = [draw_triple(t, train_grid, infer_grid, g) or (t, t) for t in ts.tolist()]
    return tuple(torch.tensor(t) for t in zip(*ends))


def endpoints(velocity, x_ts: Tensor, v_ts: Tensor, ts, tm, te) -> tuple[Tensor, Tensor]:
    """The direct and the composed endpoint (Salt Eq. 6, 7). velocity: callable (x, t) -> v, called once, at tm.

    x_ts and v_ts = v(x_ts, ts): `b ...`. Timesteps: floats, or tensors whose axes are the leading axes of x.
    """
    direct = euler(x_ts, v_ts, ts, te)                                                                 # Salt Eq. 6, 14
    x_tm = euler(x_ts, v_ts, ts, tm)
    return direct, euler(x_tm, velocity(x_tm, tm), tm, te)                                             # Salt Eq. 7, 15


def sc_loss(velocity, x_ts: Tensor, v_ts: Tensor, ts, tm, te, through: str = "both") -> tuple[Tensor, dict]:
    """L_SC (Salt Eq. 8), as a mean over elements. Gradient: into velocity at tm and into v_ts (see `through`)."""
    if through not in ("both", "direct", "composed"):
        raise ValueError(f"got through={through!r}, expected 'both', 'direct' or 'composed'")
    direct, composed = endpoints(velocity, x_ts, v_ts, ts, tm, te)
    if through == "direct":
        composed = composed.detach()
    if through == "composed":
        direct = direct.detach()
    loss = squared_error(direct, composed)                                                                 # Salt Eq. 8
    return loss, {"sc": loss.detach()}


def relative_defect(x_ts: Tensor, direct: Tensor, composed: Tensor, eps: float = 1e-8) -> Tensor:
    """E[ ||x1 - x2||^2 / (||x1 - x_ts||^2 + eps) ] of the direct endpoint x1 and the composed x2 (Salt Eq. 16).
    Scalar."""
    defect = (direct - composed).flatten(1).square().sum(1)
    moved = (direct - x_ts).flatten(1).square().sum(1)
    return (defect / (moved + eps)).mean()                                                                # Salt Eq. 16


@torch.no_grad()
def semigroup_defect(velocity, x_ts: Tensor, ts, tm, te, eps: float = 1e-8) -> Tensor:
    """Delta(ts, tm, te), the test-time diagnostic (Salt Eq. 14-16). Scalar."""
    return relative_defect(x_ts, *endpoints(velocity, x_ts, velocity(x_ts, ts), ts, tm, te), eps)


@torch.no_grad()
def path_defects(velocity, x: Tensor, infer_grid: Tensor, train_grid: Tensor) -> list[float]:
    """The defect of every interval of the test-time path (Salt A.1): walk from noise x `b ...` down infer_grid by
    Euler steps; at each interval (ts, te) take tm from train_grid, the middle one of those strictly between.

    Salt measures T^(4) with shift 12. ValueError if an interval has no training time inside.
    """
    defects = []
    for ts, te in intervals(infer_grid):
        middles = [tm for tm in train_grid.tolist() if te < tm < ts]
        if not middles:
            raise ValueError(f"got no training time between {ts:.4f} and {te:.4f}, expected a finer training grid")
        direct, composed = endpoints(velocity, x, velocity(x, ts), ts, middles[len(middles) // 2], te)
        defects.append(relative_defect(x, direct, composed).item())
        x = direct
    return defects
