"""What a stage needs: a dry run of the very code that will train, on shapes alone.

    python -m tools.plan --size wan1.3b                         # the four stages of the recipe; nothing is allocated
    python -m tools.plan --size wan1.3b --stage salt --gpu-memory 40 --batch 32

It takes every flag of train.py. The stage is built on the meta device, where tensors have shapes and no data; one
update runs, in which every tensor is followed from its first to its last use. Only one line is a formula:

    memory of a rank = (weights + moments + gradients) / ranks + gathered weights + peak memory of the dry run

with fp32 weights, averages, gradients and both AdamW moments of what is trained, and teachers in --precision.
"""

import weakref
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import config
import train
from cluster import flops
from cluster.checkpoint import state_of
from cluster.files import run_command
from config import RECIPE, STAGES
from model import SIZES
from worlds.draws import Draw


class Live(TorchDispatchMode):
    """Follows the tensors made while it is on, from first to last use, without weights and moments.

    peak: the largest number of bytes that they held at a time, without gradients of weights; peak_with: with them.
    """

    def __init__(self, there_already):
        super().__init__()
        self.held = {"activations": 0, "gradients": 0}
        self.peak = self.peak_with = 0
        self.kinds = weakref.WeakKeyDictionary({x.untyped_storage(): ["there already"] for x in there_already})

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type == "meta":
                self.follow(x.untyped_storage())
        return out

    def follow(self, storage):
        if storage not in self.kinds:
            kind = self.kinds[storage] = ["activations"]
            self.add(kind, storage.nbytes())
            weakref.finalize(storage, self.add, kind, -storage.nbytes())

    def add(self, kind, size):
        self.held[kind[0]] += size
        self.peak = max(self.peak, self.held["activations"])
        self.peak_with = max(self.peak_with, sum(self.held.values()))

    def call_gradient(self, p):
        """The gradient of a weight has arrived."""
        storage = p.grad.untyped_storage()
        kind = self.kinds[storage]
        if kind[0] == "activations":
            self.add(kind, -storage.nbytes())
            kind[0] = "gradients"
            self.add(kind, storage.nbytes())


def fused_attention(q, k, v, unfused=F.scaled_dot_product_attention):
    """Attention as the fused kernels do it, without a matrix of weights; on the meta device torch would make one."""
    if not torch.backends.cuda.flash_sdp_enabled():  # rCM's JVP has no fused kernel
        return unfused(q, k, v)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


@dataclass
class Needs:
    """Bytes that a stage needs, before they are spread over ranks, and FLOPs of an update of the whole batch."""

    weights: int  # of all networks
    moments: int
    gathered: int  # weights in the precision of the forward, as many as are gathered at a time
    activations: int  # peak of what an update holds besides, the cache included
    gradients: int  # how much higher the peak is with gradients of weights, which come as activations go
    cache: int  # keys and values of a whole rollout, of stages that roll out
    flops: float

    def on(self, ranks: int) -> float:
        """Bytes of each of so many ranks that share one copy and work on one clip at a time."""
        return (self.weights + self.moments + self.gradients) / ranks + self.gathered + self.activations


def needs(cfg, stage) -> Needs:
    """What a stage needs. All blocks are alike, so everything grows evenly with their number: two dry runs, of networks
    of 4 and of 6 blocks, tell what as many as there are need."""
    deep = SIZES[cfg.size].num_layers
    if deep <= 6 or cfg.teacher_size not in ("", cfg.size):  # a teacher of another size has blocks of its own
        return dry_run(cfg, stage)
    shallow = []
    for layers in (4, 6):
        with mock.patch.dict(SIZES, {cfg.size: replace(SIZES[cfg.size], num_layers=layers)}):
            shallow.append(dry_run(cfg, stage))
    four, six = (astuple(n) for n in shallow)
    return Needs(*(a + (b - a) * (deep - 4) // 2 for a, b in zip(four, six)))


def dry_run(cfg, stage) -> Needs:
    """One update of a stage on shapes alone, on one clip: of the largest K, with room for L_SC; the exit steps of its
    critic updates are what that update draws."""
    largest = tuple(float(k == max(cfg.mixed_steps)) for k in cfg.mixed_steps)
    dry = replace(cfg, device="meta", batch=1, accum=1, critic_steps=1, compile=False, data="random",
                  mixed_probs=largest)
    flops.watched.clear()
    training = train.begin(dry, stage)
    nets, trained = list(flops.watched), [p for o in training.optimizers.values() for p in trained_by(o)]
    live = Live([p for net in nets for p in net.parameters()] + [*state_of(training).values()])
    for p in trained:
        p.register_post_accumulate_grad_hook(live.call_gradient)
    before, of_critic = flops.done, [0.0]
    if "critic" in training.optimizers:
        training.optimizers["critic"].register_step_post_hook(lambda *_: of_critic.append(flops.done - before))
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", fused_attention), \
            mock.patch("stage.all_finite", lambda metrics: True), live:
        training.update(late_exit(dry, stage))

    low = 2 if cfg.precision == "bf16" else 4  # bytes; the dry run computes, and has its gradients, in this precision
    kept_fp32 = [net for net in nets if any(net is x for x in training.nets.values())]
    return Needs(
        weights=sum((4 if net in kept_fp32 else low) * size(net) for net in nets),
        moments=8 * sum(p.numel() for p in trained),
        gathered=low * (sum(map(size, nets)) if not cfg.reshard_after_forward else max(map(at_a_time, nets))),
        activations=live.peak,
        gradients=(live.peak_with - live.peak) * 4 // low,
        cache=STAGES[stage].windowed * 2 * low * SIZES[cfg.size].num_layers * SIZES[cfg.size].dim
        * flops.tokens_of_clip(cfg),
        flops=cfg.batch * (flops.done - before + (cfg.critic_steps - 1) * of_critic[-1]),
    )


def late_exit(cfg, stage) -> int:
    """A step whose rollout exits last, or as late as leaves room for a triple of L_SC."""
    own = config.for_stage(cfg, stage)
    largest_k = max(own.mixed_steps)

    def exit_step(step):  # as train.salt draws K and it
        draw = Draw(own, None, "dmd", step, slice(None))
        torch.multinomial(torch.tensor(own.mixed_probs), 1, generator=draw.g)
        return draw.integer(largest_k)

    return next(step for step in range(10**6) if exit_step(step) == largest_k - (2 if own.lambda_sc > 0 else 1))


def trained_by(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def size(net) -> int:
    return sum(p.numel() for p in net.parameters())


def at_a_time(net) -> int:
    """Weights that are gathered at a time: two blocks, the one at work and the next, and what is not in a
    block."""
    return size(net) - (len(net.blocks) - 2) * size(net.blocks[0])


COLUMNS = "weights moments gathered activations (cache) gradients on-1-GPU".split()


def table(cfg, gpu_memory=80.0) -> Iterator[str]:
    """What every stage of --stage needs on GPUs of so many GB, line by line."""
    columns = " ".join(f"{name:>11}" for name in COLUMNS)
    yield ("GB of one rank that works on one clip at a time (--accum batch / ranks), all ranks sharing one copy "
           f"(--shard-group-size); PFLOP of an update of {cfg.batch} clips, of the largest K")
    yield f"{'stage':<18} {columns} | GPUs of {gpu_memory:g} GB, each | PFLOP"
    for stage in RECIPE if cfg.stage == "all" else (cfg.stage,):
        n = needs(cfg, stage)
        held = (n.weights, n.moments, n.gathered, n.activations, n.cache, n.gradients, n.on(1))
        fits = [k for k in range(1, cfg.batch + 1) if cfg.batch % k == 0 and n.on(k) <= 1e9 * gpu_memory]
        gpus = f"{fits[0]:>6}, {n.on(fits[0]) / 1e9:.2f}" if fits else f"more than {cfg.batch}"
        yield f"{stage:<18} {' '.join(f'{x / 1e9:>11.3f}' for x in held)} | {gpus:>20} | {n.flops / 1e15:.3g}"


def parse(argv=None) -> tuple[config.Config, float]:
    """The settings of train.py, on random data, and --gpu-memory."""
    flags = config.parser(__doc__, "python -m tools.plan")
    flags.add_argument("--gpu-memory", type=float, default=80.0, help="GB of memory of a GPU (default: 80)")
    given = vars(flags.parse_args(argv))
    gpu_memory = given.pop("gpu_memory")
    return config.config_of({"data": "random"} | given), gpu_memory


def main(cfg, gpu_memory):
    if not 0 < gpu_memory <= 1e9:
        raise ValueError(f"got --gpu-memory {gpu_memory}, expected a number above 0, up to 1e+09")
    if cfg.stage != "all" and (cfg.stage not in STAGES or cfg.stage.endswith("_ode")):
        raise ValueError(f"got --stage {cfg.stage}, expected the recipe or a stage that makes no trajectories first")
    config.check(cfg)
    for line in table(cfg, gpu_memory):
        print(line, flush=True)


if __name__ == "__main__":
    run_command(lambda: main(*parse()), "stopped")
