"""Two ranks, or two micro-batches, are one process: every function that trains a stage, update by update; memory,
precision and compilation change nothing but speed."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import launch
from safetensors.torch import load_file
from test_train import FUNCTIONS, config

import train
from cluster import checkpoint, fsdp, ranks
from cluster.files import write_tensors, write_text
from model import SIZES, CausalWan

pytestmark = pytest.mark.usefixtures("small")

UPDATES = 2


def small(out, **changes):
    """Two updates of every kind of stage, with all of Salt's terms: the second update is one of the largest K."""
    return config(out, **{**dict(trajectories=4, trajectory_grid=16, mixed_probs=(0.0, 0.5, 0.5), critic_steps=1,
                                 seed=3), **changes})


def updates(cfg, stage):
    """What UPDATES updates of a stage report, and the full weights of its networks afterwards."""
    training = train.begin(cfg, stage)
    metrics = [train.readable(training.update(step)) for step in range(UPDATES)]
    full = {name: fsdp.full_state_dict(net) for name, net in training.nets.items()}
    return metrics, {f"{name}.{k}": v for name, weights in full.items() for k, v in weights.items()}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with something for every stage to start from, and where trajectories are."""
    out = tmp_path_factory.mktemp("ranks")
    for stage in ("bidirectional", "teacher_forcing", "causal_cd", "bidirectional_ode", "causal_ode"):
        train.run_stage(small(out, stage=stage), stage)
    return out


@pytest.fixture(scope="module")
def alone(home):
    return {stage: updates(small(home), stage) for stage in FUNCTIONS}


def numbers(metric):
    many = metric if isinstance(metric, list) else [metric]
    return torch.tensor([float("nan") if v is None else v for v in many], dtype=torch.float64)


def same(got, want, tolerance=1e-5):
    """Equal metrics, lists included, up to 1e-4; every weight matrix up to `tolerance`, the norm of the difference."""
    for a, b in zip(got[0], want[0]):
        assert a.keys() == b.keys()
        for k in a:
            assert torch.allclose(numbers(a[k]), numbers(b[k]), rtol=1e-4, atol=1e-6, equal_nan=True), (k, a[k], b[k])
    assert got[1].keys() == want[1].keys()
    for k, w in want[1].items():
        assert (got[1][k] - w).norm() <= tolerance, (k, (got[1][k] - w).norm())


@pytest.fixture(scope="module")
def on_ranks(start):
    """on_ranks(n, out, changes, jobs): updates(small(out, **changes), stage) for every stage of jobs, on n ranks under
    gloo."""
    def run(n, out, changes, jobs):
        together = [start(__file__, out, json.dumps(changes), *jobs, **rank) for rank in launch(n)]
        for ended in [one.ended(600) for one in together]:
            assert ended.returncode == 0, ended.stderr[-3000:]
        metrics, weights = json.loads((out / "ranks.json").read_text()), load_file(out / "ranks.safetensors")
        return {stage: (metrics[stage], {k.split(":")[1]: v for k, v in weights.items() if k.startswith(f"{stage}:")})
                for stage in jobs}

    return run


def rank_main(out, changes, *jobs):
    """What each of those ranks runs: this file as a script."""
    cfg = small(out, **json.loads(changes))
    with ranks.setup(cfg.device, cfg.precision, cfg.shard_group_size, cfg.timeout):
        waits, all_gather, results = {}, ranks.dist.all_gather_object, {}
        for stage in jobs:
            waits[stage] = 0

            def counted(*args, stage=stage, **kwargs):
                waits[stage] += kwargs.get("group") is ranks.control.group
                return all_gather(*args, **kwargs)

            ranks.dist.all_gather_object = counted
            results[stage] = updates(cfg, stage)
        ranks.dist.all_gather_object = all_gather

        def write():
            write_text(Path(out) / "ranks.json", json.dumps({k: metrics for k, (metrics, _) in results.items()}))
            write_text(Path(out) / "waits.json", json.dumps(waits))
            weights = {f"{k}:{name}": v for k, (_, weights) in results.items() for name, v in weights.items()}
            write_tensors(Path(out) / "ranks.safetensors", weights, {})

        ranks.on_rank_0(write)


@pytest.fixture(scope="module")
def two_ranks(home, on_ranks, tmp_path_factory):
    """Every stage on two ranks, in one launch, which also makes its own trajectories."""
    out = tmp_path_factory.mktemp("two_ranks")
    for path in home.glob("*.safetensors"):
        (out / path.name).symlink_to(path)
    return out, on_ranks(2, out, {}, FUNCTIONS)


@pytest.mark.parametrize("stage", FUNCTIONS)
def test_two_ranks_are_one_process(alone, two_ranks, stage):
    """Bug: a loss averaged over ranks twice or not at all; a draw that depends on the rank or on the size of its slice;
    a gradient lost between the forwards of a rollout; weights gathered before they changed."""
    same(two_ranks[1][stage], alone[stage])


def test_two_ranks_are_one_process_in_the_room(on_ranks, tmp_path):
    """Bug: rows of a frame that go with another rank's clips, in a batch or behind a cache; the layer of the cameras
    left out of the shards, or of the gradient."""
    room = dict(world="room", size="room", height=16, width=24, prompt_dropout=0.0, init="bidirectional",
                bidirectional_weight="data", teacher_forcing_weight="data")
    train.run_stage(small(tmp_path, **room), "bidirectional")
    start = load_file(tmp_path / "bidirectional.safetensors")
    prope_o = [k for k in start if k.endswith("prope_o.weight")]
    together = on_ranks(2, tmp_path, room, ["teacher_forcing", "salt"])
    for stage in together:
        alone = updates(small(tmp_path, **room), stage)
        assert len(prope_o) == 2 and all(start[k].any() and (alone[1][f"net.{k}"] - start[k]).any() for k in prope_o)
        same(together[stage], alone, 1e-3)  # keys of a text of one token have only rounding's gradient, raised by Adam


def test_ranks_wait_for_each_other_a_few_times_an_update(two_ranks):
    """Bug: a wait for the slowest rank before every forward, hundreds in an update that rolls out."""
    waits = json.loads((two_ranks[0] / "waits.json").read_text())
    assert waits.keys() == set(FUNCTIONS)
    for stage, n in waits.items():  # for the metrics of an optimizer step, and where a rollout is drawn
        dmd, rolls = train.STAGES[stage].group == "dmd", train.STAGES[stage].windowed and stage != "causvid"
        assert n == UPDATES * (1 + dmd) * (1 + rolls) + 4 * stage.endswith("_ode"), (stage, n)  # 4: for trajectories


@pytest.mark.parametrize("stage", FUNCTIONS)
def test_micro_batches_are_one_batch(home, alone, stage):
    """Bug: gradients of micro-batches summed, or slices of a batch that all draw the same."""
    same(updates(small(home, accum=2), stage), alone[stage])


def test_two_ranks_make_the_trajectories_of_one(home, two_ranks):
    """Bug: trajectories that depend on who makes them, are made twice, or are missing on the other rank."""
    for stage in ("causal_ode", "bidirectional_ode"):
        one, two = (sorted((out / f"{stage}_trajectories").iterdir()) for out in (home, two_ranks[0]))
        assert [p.name for p in one] == [p.name for p in two] and len(one) == 4
        for a, b in zip(one, two):
            for x, y in zip(load_file(a).values(), load_file(b).values()):
                assert torch.allclose(y, x, rtol=1e-4, atol=1e-5)


def test_copies_of_shards_and_gathering_once_change_nothing(on_ranks, alone, two_ranks):
    """Bug: gradients averaged over the shards and not over the copies (HSDP); weights that stay gathered when they have
    changed (--no-reshard-after-forward): the next forward would see the old ones."""
    changes = dict(shard_group_size=2, reshard_after_forward=False, checkpointing=True)
    got = on_ranks(4, two_ranks[0], changes, ["causal_cd", "salt"])
    for stage in got:
        same(got[stage], alone[stage])


@pytest.mark.parametrize("stage", ["teacher_forcing", "causal_cd", "salt"])
def test_checkpointing_changes_nothing(home, alone, stage):
    """Bug: a block recomputed against a cache that has moved on since (rollouts), or in another layout."""
    same(updates(small(home, checkpointing=True), stage), alone[stage], 1e-6)


def test_bf16_keeps_fp32_weights_behind_it(home, alone):
    """Bug: weights, averages or moments in bf16, where an update of 1e-5 is lost; times or losses in bf16; a teacher
    that takes twice the memory, or gathers gradients."""
    cfg = small(home, precision="bf16")
    with ranks.setup(cfg.device, cfg.precision, cfg.shard_group_size, cfg.timeout):
        forwards, asked, forward = set(), set(), CausalWan.forward

        def watch(self, x, t, text, *args, **layout):
            asked.add(self)
            forwards.add((self.patch_embedding.weight.dtype, x.dtype, torch.as_tensor(t).dtype))
            return forward(self, x, t, text, *args, **layout)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CausalWan, "forward", watch)
            training = train.begin(cfg, "salt")
            metrics = [train.readable(training.update(step)) for step in range(UPDATES)]
        assert forwards == {(torch.bfloat16, torch.float32, torch.float32)}
        assert {v.dtype for v in checkpoint.state_of(training).values()} == {torch.float32}
        (teacher,) = asked - set(training.nets.values())
        assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
        moved = {k: fsdp.full_tensor(v) for k, v in training.nets["net"].state_dict().items()}
    for a, b in zip(metrics, alone["salt"][0]):
        assert abs(a["critic_loss"] / b["critic_loss"] - 1) < 0.01 and abs(a["grad_norm"] / b["grad_norm"] - 1) < 0.1
    start_of_it, want = load_file(home / "causal_cd.safetensors"), alone["salt"][1]
    update = {k: (moved[k] - w, want[f"net.{k}"] - w) for k, w in start_of_it.items()}
    cosine = torch.cosine_similarity(*(torch.cat([u[i].flatten() for u in update.values()]) for i in (0, 1)), dim=0)
    assert cosine > 0.9, cosine


def test_compiled_blocks_compute_the_same(home, alone, monkeypatch):
    """Bug: a compiled block that keeps the layout, the cache or the weights of its first call. Graphs are made and run
    as always, but without the code that takes a compiler half a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    same(updates(small(home, compile=True), "teacher_forcing"), alone["teacher_forcing"], 1e-5)


def test_teacher_of_another_size(home, tmp_path):
    """Bug: a larger teacher that is looked for in the student's folder, or a critic of its size (Salt, CF++: 14B)."""
    train.run_stage(config(tmp_path, size="toy_large", stage="bidirectional"), "bidirectional")
    training = train.begin(small(home, teacher_size="toy_large", teacher_out=str(tmp_path)), "salt")
    assert training.nets["critic"].config.num_layers == SIZES["toy"].num_layers
    assert training.update(0)["dmd_grad"] > 0
    with pytest.raises(ValueError, match="--teacher-size toy_large, --teacher-out"):
        train.check(small(home, teacher_size="toy_large"))
    with pytest.raises(ValueError, match="size toy, expected.* size toy_large"):
        train.begin(small(home, teacher_size="toy_large", teacher_out=str(home)), "salt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank_main(*sys.argv[1:])
