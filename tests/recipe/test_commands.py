"""Every command of README.md, docs/, runs/ and the docstrings, run as it stands there, in a tiny form where it is long;
of torchrun's, what follows train.py, in one process (tests/cluster runs ranks)."""

import dataclasses
import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import AS_SHIPPED, ROOT
from PIL import Image
from test_train import TINY

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("av")

from test_readme import commands_of  # noqa: E402
from tiny_wan import WIDTH, write_text_encoder, write_vae  # noqa: E402

import config  # noqa: E402
import evaluate  # noqa: E402
import play  # noqa: E402
import reproduce  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
import wan21.weights  # noqa: E402
from cluster.files import metadata_of  # noqa: E402
from config import RECIPE, STAGES  # noqa: E402
from fast.network import Fast  # noqa: E402
from findings import mixture  # noqa: E402
from model import SIZES, CausalWan  # noqa: E402
from tools import bench, convert, encode_prompts, plan  # noqa: E402
from worlds import room, toy  # noqa: E402

pytestmark = pytest.mark.usefixtures("small")

README = (ROOT / "README.md").read_text()
TEXT = "\n".join([README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))])
PACKAGES = ("", "baselines", "cluster", "findings", "tools", "wan21", "worlds")
DOCSTRINGS = "\n".join(found[1] for package in PACKAGES for path in sorted((ROOT / package).glob("*.py"))
                       if (found := re.match(r'"""(.*?)"""', path.read_text(), re.S)))
PLACEHOLDERS = {"SRC": "Wan2.1-T2V-1.3B", "OUT": "runs/out", "FILE": "causal_forcing.pt", "FOLDER": "runs/folder",
                "NAME": "dmd4", "S": "0", "HOST:29500": "localhost:29500"}
ONE_UPDATE = dict(bidirectional_steps=1, teacher_forcing_steps=1, trajectory_steps=1, dmd_steps=1, trajectories=2)
TINY_TOY = {**TINY, **ONE_UPDATE, "trajectory_grid": 16, "eval_clips": 2}
TINY_WAN = dict(frames=6, chunk=3, height=4, width=6, batch=2, accum=1, critic_steps=1, device="cpu", **ONE_UPDATE)
TINY_PLAN = "--frames 6 --chunk 3 --height 4 --width 6 --mixed-steps 4 --mixed-probs 1".split()


def commands():
    """Lists of words, in the order of the README, of docs/ and then of the files; nothing twice."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.S).replace("\n", " ")
    lines += re.findall(r"`((?:python|torchrun|cp) [^`]* -[^`]*)`", prose.replace("`torchrun --max-restarts`", ""))
    lines += re.findall(r"^    ((?:python|torchrun|pip) .*)$", DOCSTRINGS.replace("\\\n", ""), re.M)
    words = [shlex.split(command, comments=True) for line in lines for command in line.split(" && ")]
    seen = []
    for command in words:
        command = [PLACEHOLDERS.get(word, word) for word in command if word != "..."]
        if command and command not in seen:
            seen.append(command)
    return seen


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with all that the commands speak of: Wan in small, public students, videos, captions, a picture."""
    home, patch = tmp_path_factory.mktemp("home"), pytest.MonkeyPatch()
    small = dataclasses.replace(SIZES["wan1.3b"], dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16,
                                text_dim=WIDTH, text_len=12)
    walks = dataclasses.replace(small, num_heads=3, camera="frame")  # heads of 16 channels
    patch.setitem(SIZES, "wan1.3b", small)
    patch.setitem(SIZES, "wan1.3b_camera", walks)
    patch.setattr(evaluate, "TEACHER_STEPS", 2)
    few = room.EVERY_WALLS[:4], room.EVERY_PLACES[:4]  # of 92,160 rooms
    patch.setattr(room, "nearest_rooms", lambda x, poses, nearest=room.nearest_rooms: nearest(x, poses, *few))
    patch.chdir(home)
    net = CausalWan(small).init_weights(0)
    wan21.weights.write_official(home / "Wan2.1-T2V-1.3B", net.state_dict(), small)
    write_text_encoder(home / "Wan2.1-T2V-1.3B")
    write_vae(home / "Wan2.1-T2V-1.3B")
    for name in ("student.pt", "causal_forcing.pt"):
        torch.save({"generator_ema": {f"model.{k}": v for k, v in net.state_dict().items()}}, name)
    torch.save({"generator_ema": CausalWan(walks).init_weights(0).state_dict()}, "walk.pt")
    Image.new("RGB", (48, 32), "orange").save("fox.png")
    Path("assets").mkdir()
    shutil.copy(ROOT / "assets" / "toy.safetensors", "assets")
    Path("prompts.txt").write_text("a red fox runs through snow\na dog\n")
    for i in range(2):
        (home / "clips" / f"v{i}").mkdir(parents=True)
        for j in range(21):
            Image.new("RGB", (48, 32), (10 * j, 100, 50 * i)).save(home / "clips" / f"v{i}" / f"{j:02d}.png")
    encode_prompts.main("prompts.txt prompts/0.safetensors --wan Wan2.1-T2V-1.3B --device cpu".split())
    for name in ("captions.csv", "clips.csv"):
        Path(name).write_text("video,caption\nv0,a red fox runs through snow\nv1,a dog\n")
    for i in range(2):
        np.savez(home / "clips" / f"v{i}.npz", viewmats=np.tile(np.eye(4), (21, 1, 1)), Ks=np.eye(3), fps=16)
    Path("walks.csv").write_text("video,caption,cameras\nv0,a dog,v0.npz\nv1,a red fox,v1.npz\n")
    yield home
    patch.undo()


def run_train(words, ranks=1):
    if "--help" in words:
        with pytest.raises(SystemExit, match="^0$"):
            config.parse(words)
        return
    cfg = config.parse(words)
    assert cfg.batch % (cfg.accum * ranks) == 0, words
    if not cfg.world and cfg.batch > 1:  # one clip at a time is what the table of memory is for
        assert cfg.batch == cfg.accum * ranks or cfg.stage == "all", words
    for path in Path(cfg.out).glob(f"{cfg.stage}*.safetensors"):
        if "source" in metadata_of(path):  # a public student, which is the other way to come by this stage
            path.unlink()
    cfg = dataclasses.replace(cfg, **(TINY_TOY if cfg.world else TINY_WAN | {"data": cfg.data or "random"}))
    chain, stage = [], cfg.stage
    while stage in STAGES and (stage := config.start_of(dataclasses.replace(cfg, stage=stage), stage)):
        chain.insert(0, stage)
    for stage in ["bidirectional", *chain] if cfg.stage in STAGES else []:
        if Path(cfg.out, f"{stage}.safetensors").exists():
            continue
        if stage == "causal_cd" and not cfg.world:  # prompts cannot train one, a public student will do
            convert.main(f"causal_forcing.pt {cfg.out} --stage causal_cd --chunk 3".split())
        else:
            train.main(dataclasses.replace(cfg, stage=stage, init=""))
    train.main(cfg)
    if cfg.stage in STAGES:
        assert Path(cfg.out, f"{cfg.stage}.safetensors").exists()


def run_sample(words):
    wan = {"Wan2.1-T2V-1.3B", "student.pt"} & set(words)
    out = words[words.index("--out") + 1] if "--out" in words else None
    if "prompts.safetensors" in words:
        shutil.copy("prompts/0.safetensors", "prompts.safetensors")
    assert sample.main(sample.parse([*words, *("--height 32 --width 48 --device cpu".split() if wan else ())]))
    assert out is None or Path(out).exists()


def run_play(words):
    with pytest.MonkeyPatch.context() as patch:
        if "assets/toy.safetensors" in words:  # which is of the real size
            patch.setitem(SIZES, "toy", AS_SHIPPED["toy"])
        play.Player(play.parse(words)).close()


def run_reproduce(words, monkeypatch):
    monkeypatch.setattr(mixture, "N_EVAL", 200)
    few = ["--fast", *([] if "--seeds" in words else ["--seeds", "1"])]
    reproduce.main([*words, *(few if words else [])])


def run_tool(name, words, monkeypatch):
    if name == "plan":
        plan.main(*plan.parse([*words, *TINY_PLAN]))
        return
    if name == "bench":
        monkeypatch.setattr(CausalWan, "compile_blocks", lambda *args, **kwargs: None)  # half a minute; it has a test
        monkeypatch.setattr(bench, "TOY", [(1, 1, 8, 8)])
        monkeypatch.setattr(bench, "WAN", [(1, 1, 3, 3), (3, 4, 6, 6)])
        monkeypatch.setattr(bench, "Fast", lambda net, compiled=False: Fast(net))
        size = "--height 4 --width 6" if "wan1.3b" in words else ""
        size += " --rollouts 3x4x6" if "--rollouts" in words else ""
        bench.main(bench.parse([*words, *f"--rounds 1 --device cpu {size}".split()]))
        return
    if name == "walk":
        words += "--frames 16 --paths 1 --rooms 2".split()
    if name == "encode_prompts":
        Path(words[1]).unlink(missing_ok=True)  # several commands have the same output
    if name == "prepare":
        if "--videos" not in words:  # short for the command above it
            words += "--videos clips --captions clips.csv --wan Wan2.1-T2V-1.3B --out parts".split()
        words += "--frames 21 --height 32 --width 48 --shard 4".split()
    if name in ("encode_prompts", "prepare"):
        words += ["--device", "cpu"]
    if name == "convert" and "--layout" not in words:  # several commands make the same stage: none replaces another's
        args = convert.parse(words)
        for path in args.out.glob(f"{args.stage}*.safetensors"):
            path.unlink()
    if name == "convert" and "runs/wan/salt.safetensors" in words and not Path("runs/wan/salt.safetensors").exists():
        run_train("--size wan1.3b --stage salt --data prompts --out runs/wan --accum 64".split())
    importlib.import_module(f"tools.{name}").main(words)


def run(words, monkeypatch):
    if words[0] == "pip":
        assert (ROOT / words[words.index("-r") + 1]).exists()
    elif words[0] in ("cp", "rm"):
        subprocess.run(" ".join(words), shell=True, check=True)
    elif words[0] == "torchrun":
        at = words.index("train.py")
        options = dict(zip(words[1:at:2], words[2:at:2]))
        run_train(words[at + 1:], int(options["--nproc_per_node"]) * int(options.get("--nnodes", 1)))
    elif words[:3] == ["python", "-m", "pytest"]:
        assert {"on_cuda"} == set(words) & {"on_cuda"}  # these very tests
    elif words[:2] == ["python", "-m"]:
        run_tool(words[2].removeprefix("tools."), words[3:], monkeypatch)
    elif words[0] == "python":
        if words[1] == "reproduce.py":
            run_reproduce(words[2:], monkeypatch)
        else:
            {"train.py": run_train, "sample.py": run_sample, "play.py": run_play}[words[1]](words[2:])
    else:
        assert words == ["pytest"], words


def failures(todo, monkeypatch):
    failed = []
    for words in todo:
        try:
            run(list(words), monkeypatch)
        except (Exception, SystemExit) as e:
            failed.append(f"{' '.join(words)}: {type(e).__name__}: {e}")
    return "\n".join(failed)


def test_every_command(home, monkeypatch, capsys):
    """Bug: a command that fails when it is typed: `rm` on a folder, weights that the step before did not make, a batch
    that does not divide, more memory than a card has, a flag of another program."""
    monkeypatch.setattr(sample, "newest_student", lambda prompts: Path("runs/toy/salt.safetensors"))  # there is one
    todo = commands()
    assert len(todo) > 40
    train.main(dataclasses.replace(config.parse([]), **TINY_TOY))
    failed = failures(todo, monkeypatch)
    assert not failed, failed


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "runs").glob("*.sh")))
def test_every_script(home, tmp_path, monkeypatch, script):
    """Bug: a script whose steps do not fit together: a folder that no step before has made, a start that is missing, a
    batch that its ranks cannot divide."""
    monkeypatch.setenv("OUT", "runs/script")
    todo = commands_of(ROOT / "runs" / script, tmp_path)
    assert len(todo) > 3 and {words[0] for words in todo} <= {"torchrun", "python"}
    failed = failures(todo, monkeypatch)
    assert not failed, failed


@pytest.mark.parametrize("cell", [c for c in re.findall(r"`(--[^`]+ [^`]+)`", re.search(
    r"\| what \| flags \|\n(.*?)\n\n", TEXT, re.S)[1])])
def test_every_flag_of_sampling(home, cell):
    """Bug: flags shown together that are refused together, as 200 frames in chunks of 3 were."""
    words = shlex.split(cell.replace("FILE", "prompts.txt"))
    if "--weights" not in words:
        words = [*"--weights student.pt --wan Wan2.1-T2V-1.3B --steps 1 --first-steps 1".split(), *words]
    if "--prompt" not in words and "--prompts" not in words:
        words += ["--prompt", "a fox"]
    if "--frames" not in words:
        words += ["--frames", "6"]
    if "--out" not in words:
        words += ["--out", "cells" if "--format" in words else re.sub(r"\W+", "_", cell) + ".safetensors"]
    run_sample(words)


def test_counts_are_those_of_the_code():
    """Bug: "twenty baselines" of twenty-one, "23 stages" of 24."""
    numbers = {"four": 4, "twelve": 12, "nineteen": 19, "twenty": 20, "twenty-one": 21}
    baselines = [stage for stage in STAGES if stage not in RECIPE]
    expected = {"stages": {len(RECIPE), len(STAGES)}, "prompts": {len(toy.PROMPTS)}, "": {len(baselines)}}
    told = re.findall(r"(?:all|the) (\w+) (stages|prompts)\b|lists all ([\w-]+)()", TEXT + DOCSTRINGS)
    for n, what in ((first or second, what) for first, what, second, _ in told):
        if n.isdigit() or n in numbers:
            assert (int(n) if n.isdigit() else numbers[n]) in expected[what], (n, what)
    assert "lists all twenty-one" in README and len(baselines) == 21
