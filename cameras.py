"""Cameras in self-attention: a frame's position is where it was seen from (PRoPE, arXiv 2507.10496; CF++ Sec. 3.3).

A camera has a world-to-camera matrix V (4 x 4, rigid; OpenCV's axes: x right, y down, z forward) and focal lengths fx
and fy in units of the image's width and height. With its projection P = diag(fx, fy, 1, 1) V, the matrix P_i P_j^-1
takes what camera j sees to camera i: it relates two frames, and no choice of world coordinates
enters it. PRoPE puts it into attention as RoPE puts the distance of two tokens. Cut the channels of a head into groups
of four, and multiply every group, with the projection of its frame:

    queries  q' = P^T q     keys  k' = P^-1 k     values  v' = P^-1 v     output  o = P softmax(q' k'^T / sqrt dh) v'

Then q'_i . k'_j = q_i . (P_i P_j^-1) k_j, and a value that token i gets from token j is (P_i P_j^-1) v_j: a vector of
camera j, told in the coordinates of camera i. model.py runs this beside the attention with RoPE, as further heads of
the same q, k and v, and adds it through a linear layer of its own, `self_attn.prope_o`, which is zero at the start: a
text-to-video model with cameras begins as it was. As with RoPE, the cache holds keys and values without their position.
So both kinds of heads share them, and world coordinates can be chosen anew for every forward: `matrices` puts the last
frame at the origin. Otherwise bf16 would round small steps away, far from the start of a walk.

KINDS of matrices:

    frame   P = diag(fx, fy, 1, 1) V, one for all tokens of a frame, as in the public minWM. It cannot know where in the
            picture a token is: that must come from the content of q and k
    ray     V turned to look along the ray through the middle of a token's patch, a camera for every token (ours)
    prope   as published: half of the groups as in `frame`, the others turned by the column and the row of the patch, as
            by RoPE, in values, too
    unseen  none: attention does not see the cameras, and the network is told the other numbers of a row alone

A camera is the last ROW numbers of a row of the condition (flowmap.Condition): V, row by row, fx, fy. A row of zeros is
a frame without a camera: its matrices are zero, and so is what it gets from the others, and they from it.
"""

import math

import torch
from einops import rearrange
from torch import Tensor

KINDS = ("frame", "ray", "prope", "unseen")
ROW = 18  # numbers of a camera


def row_of(viewmats: Tensor, Ks: Tensor) -> Tensor:
    """World-to-camera matrices `... 4 4` and intrinsics `... 3 3`, in units of the image's width and height, as rows
    `... 18`. The principal point is left out: it is taken to be the middle of the image."""
    return torch.cat([viewmats.flatten(-2), Ks[..., 0, 0, None], Ks[..., 1, 1, None]], -1)


def rigid_inverse(v: Tensor) -> Tensor:
    """The inverse of rigid matrices `... 4 4`; of a matrix of zeros, zeros."""
    inverse, turn = torch.zeros_like(v), v[..., :3, :3].transpose(-1, -2)
    inverse[..., :3, :3], inverse[..., 3, 3] = turn, v[..., 3, 3]
    inverse[..., :3, 3:] = -turn @ v[..., :3, 3:]
    return inverse


def diagonal(x: Tensor, y: Tensor) -> Tensor:
    """Matrices diag(x, y, 1, 1), `... 4 4`."""
    return torch.stack([x, y, torch.ones_like(x), torch.ones_like(x)], -1).diag_embed()


def towards(x: Tensor, y: Tensor) -> Tensor:
    """Rotations `... 4 4` of a camera so that its axis z becomes the ray (x, y, 1): first about y, then about x."""
    across, zero, one = (x.square() + 1).sqrt(), torch.zeros_like(x), torch.ones_like(x)
    length = (across.square() + y.square()).sqrt()
    right = torch.stack([1 / across, zero, -x / across, zero], -1)
    down = torch.stack([-x * y / (across * length), across / length, -y / (across * length), zero], -1)
    forward = torch.stack([x / length, y / length, 1 / length, zero], -1)
    return torch.stack([right, down, forward, torch.stack([zero, zero, zero, one], -1)], -2)


def rotations(positions: Tensor, groups: int) -> Tensor:
    """RoPE's rotations of so many groups of four channels by whole numbers `n`, as matrices `n groups 4 4`."""
    pairs = 2 * groups
    angles = torch.outer(positions, 100.0 ** (-torch.arange(pairs, device=positions.device) / pairs))
    c, s = angles.cos(), angles.sin()
    pair = torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2).unflatten(1, (groups, 2))
    both = torch.zeros(len(positions), groups, 4, 4, device=positions.device)
    both[..., :2, :2], both[..., 2:, 2:] = pair.unbind(2)
    return both


def reciprocal(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is 0: a frame without a camera has no focal length."""
    return 1 / torch.where(x > 0, x, math.inf)


def matrices(kind: str, rows: Tensor, h: int, w: int, dh: int) -> tuple[Tensor, Tensor]:
    """P and P^-1 of h x w patches a frame and heads of width dh, float32 `b f s g 4 4`; s is 1 where all patches of a
    frame have the same, g is 1 where all groups have. rows: `b f 18`. The last frame's camera is the origin."""
    v = rows[..., :16].float().unflatten(-1, (4, 4))[:, :, None]  # (b f 1 4 4)
    fx, fy = rows[..., 16:, None].float().unbind(2)  # (b f 1)
    has_camera = v[..., 3:, 3:]  # 1, or 0
    v = v @ (rigid_inverse(v[:, -1:]) + (1 - has_camera[:, -1:]) * torch.eye(4, device=v.device))
    patch = torch.arange(h * w, device=rows.device, dtype=torch.float32)
    row, column = patch.div(w, rounding_mode="floor"), patch % w
    if kind == "ray":
        turn = towards(((column + 0.5) / w - 0.5) * reciprocal(fx), ((row + 0.5) / h - 0.5) * reciprocal(fy))
        p, inverse = turn @ v, rigid_inverse(v) @ turn.transpose(-1, -2)  # (b f s 4 4)
        return p[..., None, :, :], inverse[..., None, :, :]
    p, inverse = diagonal(fx, fy) @ v, rigid_inverse(v) @ diagonal(reciprocal(fx), reciprocal(fy))
    p, inverse = p[..., None, :, :], inverse[..., None, :, :]
    if kind == "frame":
        return p, inverse
    b, f, groups = *rows.shape[:2], dh // 4
    turn = torch.cat([rotations(column, groups // 4), rotations(row, groups // 4)], 1)  # (s g/2 4 4)
    turn = has_camera[..., None, :, :] * turn.expand(b, f, *turn.shape)
    p, inverse = (x.expand(b, f, h * w, groups // 2, 4, 4) for x in (p, inverse))
    return torch.cat([p, turn], 3), torch.cat([inverse, turn.transpose(-1, -2)], 3)


def multiply(m: Tensor, x: Tensor) -> Tensor:
    """Every group of four channels of x `b (f s) nh dh` times the matrix m `b f s g 4 4` of its frame, patch and group.
    """
    groups = rearrange(x, "b (f s) nh (g c) -> b f s nh g c", f=m.shape[1], c=4)
    return torch.einsum("bfsgij,bfsngj->bfsngi", m.to(x.dtype), groups).flatten(1, 2).flatten(-2)


def seen_by(p: Tensor | None, attended: Tensor) -> Tensor:
    """What attention gives, `b n 2nh dh`, with the second half of heads told in the coordinates of the frames that ask,
    of matrices p; p None: there are no cameras, and nh heads."""
    if p is None:
        return attended
    by_rope, by_camera = attended.chunk(2, dim=2)
    return torch.cat([by_rope, multiply(p, by_camera)], dim=2)


def covering(rows: Tensor, keep: int, recent: int = 2) -> list[int]:
    """Which `keep` of the frames of rows `b f 18` to remember, so that they cover the poses seen: again and again, that
    frame is forgotten which an older one shows best. The first frame and the `recent` last ones stay, as far as there
    is room.

    The distance of two cameras is that of their positions plus 1 - cos of the angle between their axes z, on average
    over the clips.
    """
    v = rows[..., :16].float().unflatten(-1, (4, 4))
    position, axis = rigid_inverse(v)[..., :3, 3], v[..., 2, :3]
    distance = (torch.cdist(position, position) + 1 - axis @ axis.transpose(-1, -2)).mean(0).tolist()
    kept, recent = list(range(rows.shape[1])), min(recent, max(0, keep - 1))
    while len(kept) > max(1, keep):
        old = kept[: len(kept) - recent]
        kept.remove(min(old[1:], key=lambda i: min(distance[i][j] for j in old if j < i)))
    return kept[:keep]
