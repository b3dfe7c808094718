"""What a stage needs: FLOPs against torch's own count, memory against what the allocator really gave out."""

import dataclasses
import resource

import pytest
import torch
from test_train import config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from cluster import checkpoint, flops
from config import STAGES, start_of
from fast.network import Fast
from flowmap import Condition, of_frames
from model import SIZES
from stage import is_finished
from tools import plan


def layouts(net, x, t, text):
    """A forward of every kind, and what to call it."""
    cache = net.new_cache()
    net.append(cache, x[:, :2], of_frames(text, 0, 2))
    yield "bidirectional", lambda: net(x, t, text)
    yield "chunked", lambda: net(x, t, text, chunk=2)
    yield "teacher forcing", lambda: net(x, t, text, chunk=1, clean=x)
    yield "rollout", lambda: net(x[:, :1], t[:, :1], of_frames(text, 0, 1), cache=cache)
    yield "commit", lambda: net.append(cache, x[:, :1], of_frames(text, 0, 1))
    yield "commit on the way", lambda: net(x[:, :1], t[:, :1], of_frames(text, 0, 3), cache=cache, clean=x[:, 1:3])
    yield "features", lambda: net(x, t, text, num_blocks=1)


@pytest.mark.parametrize("window, row_dim, camera", [
    (None, 0, ""), (3, 0, ""), (None, 4, ""), (None, 4, "frame"), (3, 0, "ray"), (None, 0, "prope"),
    (None, 4, "unseen")])
def test_flops_are_those_that_torch_counts(tiny, window, row_dim, camera):
    """Bug: a formula that forgets a projection, the clean stream, the window, the text, what is told of a frame or its
    camera; MFU would be wrong by it."""
    net = flops.count(tiny(window=window, sink=1 if window else 0, row_dim=row_dim, dim=32, camera=camera))
    x, t, text = torch.randn(2, 4, 3, 4, 6), torch.rand(2, 4), torch.randn(2, 3, 5)
    text = Condition(text, torch.randn(2, 4, net.config.row_width)) if net.config.row_width else text
    for name, forward in layouts(net, x, t, text):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            before = flops.done
            forward()
        uncounted = 0.03 if net.config.sees_cameras else 0  # P and P^-1 themselves
        assert flops.done - before == pytest.approx(counter.get_total_flops(), rel=uncounted), name


def test_a_backward_counts_twice_and_recomputing_not_at_all(tiny):
    """Bug: a backward that is not counted, or counted for frozen networks; recomputation sold as work."""
    net = flops.count(tiny())
    x, t, text = torch.randn(1, 2, 3, 4, 6), torch.rand(1, 2), torch.randn(1, 3, 5)

    def counted(make):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            before = flops.done
            make()
        return flops.done - before, counter.get_total_flops()

    with torch.no_grad():
        forward, _ = counted(lambda: net(x, t, text))
    ours, torch_s = counted(lambda: net(x, t, text).sum().backward())
    # of the first linear maps torch counts no gradient by the input; those of sinusoids and text are never needed
    assert ours == 3 * forward and 0.95 < torch_s / ours <= 1
    net.checkpointing = True
    assert counted(lambda: net(x, t, text).sum().backward())[0] == 3 * forward
    net.requires_grad_(False)
    x.requires_grad_()
    assert counted(lambda: net(x, t, text).sum().backward())[0] == 2 * forward


def most_allocated(work) -> int:
    """The most bytes that the CPU allocator held at a time during work(), beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    held = most = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("plan")


def small(home, stage, **changes):
    """Settings of a stage in tiny form, with what it starts from and learns from trained."""
    cfg = config(home, **{**dict(trajectories=4, trajectory_grid=16, critic_steps=1, seed=3), **changes})
    for other in (start_of(cfg, stage), STAGES[stage].teacher):
        if other and not is_finished(cfg, other):
            small(home, other)
            train.run_stage(config(home, seed=3), other)
    return cfg


@pytest.mark.parametrize("stage, checkpointing", [
    ("bidirectional", False), ("teacher_forcing", False), ("teacher_forcing", True), ("causal_cd", True),
    ("salt", True), ("dmd8", False)])
def test_plan_is_what_a_real_update_takes(home, stage, checkpointing):
    """Bug: a plan that counts dead tensors, forgets the graph or the cache, or does not see recomputing."""
    cfg = small(home, stage, batch=1, mixed_probs=(0.0, 0.0, 1.0), frames=4 if stage == "salt" else 24,
                checkpointing=checkpointing)
    n = plan.needs(cfg, stage)
    training = train.begin(cfg, stage)
    state = checkpoint.state_of(training)
    teachers = [net for net in flops.watched if not isinstance(net, Fast)  # which has the weights of another
                and not any(net is x for x in training.nets.values())]
    held = [v for k, v in state.items() if not k.startswith("optimizer")]
    held += [p for teacher in teachers for p in teacher.parameters()]
    assert n.weights == sum(v.nbytes for v in held)
    assert n.moments == sum(v.nbytes for k, v in state.items() if k.endswith(("exp_avg", "exp_avg_sq")))
    before = flops.done
    took = most_allocated(lambda: training.update(plan.late_exit(cfg, stage)))
    assert flops.done - before == n.flops
    assert 0.99 < took / (n.gradients + n.activations) < 1.01, (took, n)


@pytest.mark.parametrize("stage", ["teacher_forcing", "causal_cd", "sc_dmd_gan"])
def test_two_shallow_networks_tell_of_a_deep_one(monkeypatch, stage):
    """Bug: a plan of 30 blocks from 4 and 6 that is not what 30 need."""
    monkeypatch.setitem(SIZES, "wan_tiny", dataclasses.replace(SIZES["wan_tiny"], num_layers=10))
    cfg, _ = plan.parse(f"--size wan_tiny --stage {stage} --frames 6 --chunk 3 --height 4 --width 4 --batch 2".split())
    told, needed = dataclasses.asdict(plan.needs(cfg, stage)), dataclasses.asdict(plan.dry_run(cfg, stage))
    assert told.pop("gradients") + told.pop("activations") == pytest.approx(
        needed.pop("gradients") + needed.pop("activations"), rel=1e-3)
    assert told == needed


def test_plan_of_14b_fits_on_no_gpu_and_allocates_nothing():
    """Bug: a plan that builds the networks (57 GB each), or a number of GPUs that does not fit."""
    cfg, gpu_memory = plan.parse("--size wan14b --stage bidirectional --gpu-memory 80".split())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    n, lines = plan.needs(cfg, "bidirectional"), list(plan.table(cfg, gpu_memory))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2e6  # kB
    assert 14.2e9 < n.moments / 8 < 14.4e9 and n.weights == n.moments  # two of fp32 a weight; the net and its average
    gpus = int(lines[-1].split("|")[1].split(",")[0])
    assert gpus > 1 and n.on(gpus) <= 80e9 < n.on(gpus // 2) and cfg.batch % gpus == 0
