"""docs/changing_things.md: every diff in it applies to the project as it is, and does what is said of it."""

import re
import shutil
import subprocess

import pytest
from conftest import ROOT

pytestmark = pytest.mark.usefixtures("small")

DOC = (ROOT / "docs" / "changing_things.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", DOC, re.M | re.S))
DIFFS = {title: re.search(r"```diff\n(.*?)```", text, re.S)[1] for title, text in SECTIONS.items() if "```diff" in text}
TINY = ("--batch 2 --frames 4 --bidirectional-steps 2 --teacher-forcing-steps 2 --trajectory-steps 2 --dmd-steps 3 "
        "--critic-steps 1 --eval-clips 4 --device cpu --out runs/a").split()


@pytest.fixture
def copy(tmp_path):
    """The project's code, to be changed."""
    for path in ROOT.rglob("*.py"):
        inside = path.relative_to(ROOT)
        if not any(part == "tests" or part.endswith("venv") or part.startswith(".") for part in inside.parts):
            (tmp_path / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / inside)
    return tmp_path


def apply(copy, title, *how):
    (copy / "change.diff").write_text(DIFFS[title])
    subprocess.run(["git", "apply", *how, "change.diff"], cwd=copy, check=True)


@pytest.fixture
def program(python, copy):
    """program(code): what it prints, run in the changed copy."""
    def run(code):
        ran = python("-c", "import evaluate; evaluate.TEACHER_STEPS = 2\n" + code, cwd=copy)
        assert ran.returncode == 0, ran.stderr[-2000:]
        return ran.stdout

    return run


def metrics(program, flags):
    """metrics.jsonl of a tiny run of all four stages."""
    return program(f"""
import json, train, config
train.main(config.parse({TINY} + {flags}))
lines = [json.loads(line) for line in open("runs/a/metrics.jsonl")]
print("METRICS", sorted(set().union(*lines)), [line["loss"] for line in lines if line["stage"] == "salt"])
""").split("METRICS")[1]


@pytest.mark.parametrize("title", DIFFS)
def test_a_change_is_small(title):
    """Bug: an easy change that takes more than 15 lines, or touches more than two files."""
    lines = DIFFS[title].splitlines()
    changed = [line for line in lines if re.match(r"[+-](?!\+\+ |-- )", line)]
    assert 0 < len(changed) <= 15
    assert 1 <= sum(line.startswith("+++ ") for line in lines) <= 2


def test_all_six_are_there():
    """Bug: a change that is told of without a diff."""
    assert len(DIFFS) == 6


def test_a_solver(copy, program):
    """Bug: a solver that has to be named in several places, or that only some of them know."""
    apply(copy, "A solver")
    errors = program("""
import torch, flowmap, sample, math
assert sample.parse(["--solver", "midpoint"]).solver == "midpoint"
def exact(x, t, s, var=.1): return x * math.sqrt(((1 - s)**2 * var + s**2) / ((1 - t)**2 * var + t**2))
def v(x, t, var=.1): return x * (t - (1 - t) * var) / ((1 - t)**2 * var + t**2)
x = torch.ones(1, 1, dtype=torch.float64)
for solver in ("euler", "midpoint"):
    print(abs(flowmap.sample(v, x[None], flowmap.schedule(8, 5.), solver) - exact(x, 1, 0)).item())
""")
    euler, midpoint = map(float, errors.split())
    assert midpoint < euler / 2


def test_a_loss_between_two_rollouts(copy, program):
    """Bug: a reference rollout that only alignment can use."""
    before = metrics(program, ["--mixed-steps", "2", "4", "8", "--mixed-probs", "1", "0", "0", "--align-warmup", "0",
                            "--align-prob", "1"])
    apply(copy, "A loss between the low-step and the reference rollout")
    shutil.rmtree(copy / "runs")
    after = metrics(program, ["--mixed-steps", "2", "4", "8", "--mixed-probs", "1", "0", "0", "--align-warmup", "0",
                           "--align-prob", "1", "--lambda-match", "1"])
    assert "'match'" in after and "'match'" not in before and after != before


def test_decoupled_guidance(copy, program):
    """Bug: a score that cannot be exchanged without a change of the recipe."""
    before = metrics(program, ["--score-guidance", "3"])
    apply(copy, "A DMD variant with decoupled guidance")
    shutil.rmtree(copy / "runs")
    assert metrics(program, ["--score-guidance", "3"]) != before
    same = program("""
import torch, dmd
g = torch.Generator().manual_seed(0)
x0, eps, text, null = (torch.randn(2, 3, 1, 2, 2, generator=g), torch.randn(2, 3, 1, 2, 2, generator=g),
                       torch.randn(2, 2, 4, generator=g), torch.randn(2, 4, generator=g))
def teacher(x, t, text): return x * text.mean((1, 2))[:, None, None, None, None]
x0.requires_grad_()
t = torch.full((2, 3), .5)
one, two = (torch.autograd.grad(dmd.guidance_loss(x0, text, teacher, null, w, t, eps), x0)[0] for w in (2., 3.))
print(torch.allclose(two, 2 * one, atol=1e-6) and bool(one.abs().max() > 0),
      dmd.guidance_loss(x0, text, teacher, null, 1., t, eps).item() == 0)
""")
    assert same.split() == ["True", "True"]


def test_a_size_of_another_family(copy, program):
    """Bug: a family that is known in more places than its record: a pixel count, a frame rate, a VAE. (The size is part
    of the project, so its diff is taken back, and given again.)"""
    tells = """
import torch, config
from model import SIZES, CausalWan
if "wan2.2-5b" not in SIZES: raise SystemExit(print("unknown"))
with torch.device("meta"): print(sum(p.numel() for p in CausalWan(SIZES["wan2.2-5b"]).parameters()))
cfg = config.parse(["--size", "wan2.2-5b"]); print(cfg.height, cfg.width, cfg.world == "")
"""
    assert program(tells).split() == ["4999787712", "44", "80", "True"]
    apply(copy, "A network size of another family", "-R")
    assert program(tells).split() == ["unknown"]
    apply(copy, "A network size of another family")
    program("""
import dataclasses, model, train, config
model.SIZES["wan2.2-5b"] = dataclasses.replace(model.SIZES["wan2.2-5b"], dim=48, ffn_dim=64, num_heads=4, num_layers=2)
train.main(config.parse("--size wan2.2-5b --data random --stage bidirectional --batch 2 --frames 3 --height 4 \
--width 4 --bidirectional-steps 1 --device cpu --out runs/b".split()))
from tools import plan
plan.main(*plan.parse(["--size", "wan2.2-5b", "--stage", "teacher_forcing", "--chunk", "3"]))
""")


def test_a_condition_per_frame(copy, program):
    """Bug: a row that is lost on the way to the network: in a batch slice, in guidance, in a chunk, behind the
    cache."""
    apply(copy, "A condition per frame")
    metrics(program, ["--chunk", "2", "--accum", "2"])
    same = program("""
import torch, config, stage, evaluate
from flowmap import Condition, Guided
from rollout import joined, stream
from worlds import WORLDS
cfg = config.parse(["--out", "runs/a", "--frames", "4", "--chunk", "2"])
net, world = evaluate.network(cfg, "teacher_forcing"), WORLDS["toy"]
torch.nn.init.normal_(net.head.head.weight, std=.1, generator=torch.Generator().manual_seed(0))
x0, labels = world.clips(range(3), 4, 7)
told = world.embed(labels)
assert told.rows.shape == (3, 4, 1)
other = Condition(told.words, 1 - told.rows)
assert not torch.allclose(net(x0, .5, told), net(x0, .5, other))
for net in (net, Guided(net, torch.zeros(2, 16), 2.)):  # rollout = teacher forcing, fused and apart, one by one
    with torch.no_grad():
        for fused in (True, False):
            x = joined(stream(net, lambda i, k: x0[:, 2*i:2*i+2], told, torch.tensor([.5]), num_chunks=2, fused=fused))
            again = x0 - .5 * net(x0, .5, told, chunk=2, clean=x)
            assert torch.allclose(x, again, atol=1e-4), (x - again).abs().max()
print("same")
""")
    assert same.split() == ["same"]


def test_another_world(copy, program):
    """Bug: a world that is asked for by its name somewhere."""
    apply(copy, "Another toy world")
    told = program(f"""
import json, train, config
rows = train.main(config.parse({TINY} + ["--world", "calm", "--stage", "bidirectional"]))
print("MOTION", rows[0]["motion"], json.load(open("runs/a/config.json"))["world"])
try: train.main(config.parse({TINY} + ["--stage", "bidirectional"]))
except ValueError as e: print("refused" if "--world" in str(e) else e)
""").split("MOTION")[1].split()
    assert abs(float(told[0]) - 1) < 0.3 and (told[1], told[-1]) == ("calm", "refused")
