"""Weights spread over ranks, with FSDP2 as torch has it.

Every rank holds a slice of each weight, of its gradient and of its optimizer state, in fp32, and gathers a block's
whole weights just before it needs them (in bf16, if the precision says so); gradients are averaged in fp32. Without
ranks `shard` leaves a network as it is, and the rest does nothing special.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cluster import ranks


def shard(net: nn.Module, precision: str, reshard_after_forward: bool) -> nn.Module:
    """Spread a network, which may still be on the meta device, over the ranks: block by block, then the rest.

    precision: bf16 computes in bf16, with fp32 weights and reductions behind it. reshard_after_forward: drop a block's
    gathered weights after each forward; otherwise they stay until a backward, or until `reshard`.
    """
    if ranks.control is None:
        return net
    ranks.control.networks += 1
    name = f"{type(net).__name__} number {ranks.control.networks}"
    policy = MixedPrecisionPolicy(torch.bfloat16 if precision == "bf16" else None, torch.float32,
                                  cast_forward_inputs=False)  # times stay in float32
    mesh = ranks.control.mesh if ranks.control.mesh.size(0) > 1 else ranks.control.mesh["shards"]
    for module in [*getattr(net, "blocks", []), net]:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)

    def note_forward(net, args, layout):
        known = {k: tuple(v.shape) if isinstance(v, Tensor) else v if isinstance(v, int) else "" for k, v in
                 layout.items()}
        shapes = [tuple(x.shape) for x in args if isinstance(x, Tensor)]
        ranks.note(f"{name} on {shapes} {known}, {'with' if torch.is_grad_enabled() else 'without'} gradient")

    net.register_forward_pre_hook(note_forward, prepend=True, with_kwargs=True)
    return net


@torch.no_grad()
def load(net: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy full tensors, one at a time, into a network; each rank keeps its slice."""
    own = net.state_dict()
    for name, w in weights:
        if isinstance(own[name], DTensor):
            p = own[name]
            w = distribute_tensor(w.to(p.device, p.dtype), p.device_mesh, p.placements, src_data_rank=None)
        own[name].copy_(w)


def full_tensor(x: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def full_state_dict(net: nn.Module) -> dict[str, Tensor]:
    """All weights of a network in CPU memory on rank 0, nothing on the others. Every rank must call it."""
    weights = {}
    for name, p in net.state_dict().items():
        full = full_tensor(p.detach())
        if ranks.rank() == 0:
            weights[name] = full.cpu()
    return weights


def reshard(*nets: nn.Module) -> None:
    """Drop gathered weights, as the slices that they were gathered from are about to change."""
    for net in nets:
        for module in net.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
