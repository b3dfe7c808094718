"""What a stage needs: a dry run of the very code that will train, on shapes alone.

`python train.py --size wan1.3b --stage salt --plan` builds the stage on the meta device, where tensors have shapes and
no data, runs one update, and follows every tensor from birth to death. Only one line is a formula:

    memory of a rank = (weights + gradients + moments) / ranks + gathered weights + the most that the dry run held

with fp32 weights, averages, gradients and both AdamW moments of what is trained, and teachers in --precision.
"""

import weakref
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flops
from baselines import STAGES
from model import SIZES
from stages import RECIPE, draws, rollout_length


class Live(TorchDispatchMode):
    """Follows the tensors made while it is on: `now` and `most`, the bytes they hold together."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.follow(x.untyped_storage())
        return out

    def follow(self, storage):
        if storage not in self.known:
            self.known.add(storage)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.forget, storage.nbytes())

    def forget(self, size):
        self.now -= size


def fused_attention(q, k, v):
    """Attention as the fused kernels do it, without a matrix of weights; on the meta device torch would make one."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


@dataclass
class Needs:
    """Bytes that a stage needs, before they are spread over ranks, and FLOPs of an update of the whole batch."""

    weights: int  # all networks
    gradients: int
    moments: int
    gathered: int  # weights in the precision of the forward, as many as are gathered at a time
    activations: int  # the most that an update holds besides, the cache included
    cache: int
    flops: float

    def on(self, ranks: int) -> float:
        """Bytes of each of so many ranks, of which every one works on one clip at a time."""
        return (self.weights + self.gradients + self.moments) / ranks + self.gathered + self.activations


def needs(cfg, stage) -> Needs:
    """A dry run of one update of a stage on one clip, the costliest it has: the largest K, with all of its terms."""
    dense = {"mixed_probs": tuple(float(k == max(cfg.mixed_steps)) for k in cfg.mixed_steps), "align_prob": 1.0}
    dry = replace(cfg, device="meta", batch=1, accum=1, critic_steps=1, compile=False, data="random", **dense)
    def exit_step(step):
        return rollout_length(dry.mixed_steps, dry.mixed_probs, draws(dry, "dmd", step))[1]

    # the last exit that leaves room for L_SC
    step = next(s for s in range(10**6) if exit_step(s) == max(cfg.mixed_steps) - 2)
    flops.watched.clear()
    training = STAGES[stage].begin(dry, STAGES[stage].start)
    weights = gathered = trained = 0
    low = 2 if cfg.precision == "bf16" else 4
    for net in flops.watched:
        block, all_of_it = (sum(p.numel() for p in x.parameters()) for x in (net.blocks[0], net))
        weights += all_of_it * (4 if any(net is x for x in training.nets.values()) else low)
        if cfg.gather == "update":
            gathered += low * all_of_it
        else:  # all but the blocks, and two of them: the one at work and the next
            gathered = max(gathered, low * (all_of_it - block * (len(net.blocks) - 2)))
    for optimizer in training.optimizers.values():
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            trained += p.numel()
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))  # they are counted by themselves
    before, of_critic = flops.done, 0.0
    if "critic" in training.optimizers:

        def note(*_):
            nonlocal of_critic
            of_critic = flops.done - before

        training.optimizers["critic"].register_step_post_hook(note)
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", fused_attention), Live() as live:
        training.update(step)
    c = SIZES[cfg.size]
    tokens = cfg.frames * (cfg.height // c.patch_size[1]) * (cfg.width // c.patch_size[2])
    return Needs(weights, 4 * trained, 8 * trained, gathered, live.most, 2 * c.num_layers * tokens * c.dim * low,
                 cfg.batch * (flops.done - before + (cfg.critic_steps - 1) * of_critic))


COLUMNS = "weights gradients moments gathered activations (cache) on-1-GPU".split()


def table(cfg) -> str:
    """What every stage of --stage needs, one line each."""
    columns = " ".join(f"{name:>11}" for name in COLUMNS)
    lines = ["GB of one rank that works on one clip at a time (--accum batch / ranks); PFLOP of an update of "
             f"{cfg.batch} clips, of the largest K",
             f"{'stage':<18} {columns} | GPUs of {cfg.gpu_memory:g} GB, each | PFLOP"]
    for stage in RECIPE if cfg.stage == "all" else (cfg.stage,):
        n = needs(cfg, stage)
        held = (n.weights, n.gradients, n.moments, n.gathered, n.activations, n.cache, n.on(1))
        fits = [k for k in range(1, cfg.batch + 1) if cfg.batch % k == 0 and n.on(k) <= 1e9 * cfg.gpu_memory]
        gpus = f"{fits[0]:>6}, {n.on(fits[0]) / 1e9:.2f}" if fits else f"more than {cfg.batch}"
        lines.append(f"{stage:<18} {' '.join(f'{x / 1e9:>11.3f}' for x in held)} | {gpus:>20} | {n.flops / 1e15:.3g}")
    return "\n".join(lines)
