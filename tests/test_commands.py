"""Every command of the README and of the docstrings, run as it stands there, in a tiny form where it is long; of
torchrun's, what follows train.py, in one process (test_ranks.py and test_faults.py run ranks)."""

import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_train import TINY

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("av")

from tiny_wan import WIDTH, write_text_encoder, write_vae  # noqa: E402

import baselines  # noqa: E402
import bench  # noqa: E402
import data  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
import wan21  # noqa: E402
from model import SIZES, CausalWan  # noqa: E402

README = (ROOT / "README.md").read_text()
DOCSTRINGS = "\n".join(re.match(r'"""(.*?)"""', path.read_text(), re.S)[1] for path in sorted(ROOT.glob("*.py")))
PLACEHOLDERS = {"SRC": "Wan2.1-T2V-1.3B", "OUT": "runs/out", "FILE": "causal_forcing.pt", "FOLDER": "runs/folder",
                "NAME": "dmd4", "S": "0", "HOST:29500": "localhost:29500"}
ONE_UPDATE = dict(bidirectional_steps=1, teacher_forcing_steps=1, trajectory_steps=1, dmd_steps=1, trajectories=2)
TINY_TOY = {**TINY, **ONE_UPDATE, "trajectory_grid": 16, "eval_clips": 2, "teacher_eval_steps": 2}
TINY_WAN = dict(frames=6, height=4, width=6, batch=2, accum=1, critic_steps=1, device="cpu", **ONE_UPDATE)


def commands():
    """Lists of words, in the order of the README and then of the files; nothing twice."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", README, flags=re.S).replace("\n", " ")
    lines += re.findall(r"`((?:python|torchrun|cp) [^`]* -[^`]*)`", prose.replace("`torchrun --max-restarts`", ""))
    lines += re.findall(r"^    ((?:python|torchrun|pip) .*)$", DOCSTRINGS.replace("\\\n", ""), re.M)
    words = [shlex.split(command, comments=True) for line in lines for command in line.split(" && ")]
    seen = []
    for command in words:
        command = [PLACEHOLDERS.get(word, word) for word in command if word != "..."]
        if command and command not in seen:
            seen.append(command)
    return seen


def flags(settings):
    return [word for k, v in settings.items() for word in (f"--{k.replace('_', '-')}", str(v))]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with all that the commands speak of: Wan in small, a public student, videos, captions, a picture."""
    home, patch = tmp_path_factory.mktemp("home"), pytest.MonkeyPatch()
    config = dataclasses.replace(SIZES["wan1.3b"], dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16,
                                 text_dim=WIDTH, text_len=12)
    patch.setitem(SIZES, "wan1.3b", config)
    patch.chdir(home)
    net = CausalWan(config).init_weights(0)
    wan21.write_official(home / "Wan2.1-T2V-1.3B", net.state_dict(), config)
    write_text_encoder(home / "Wan2.1-T2V-1.3B")
    write_vae(home / "Wan2.1-T2V-1.3B")
    for name in ("student.pt", "causal_forcing.pt"):
        torch.save({"generator_ema": {f"model.{k}": v for k, v in net.state_dict().items()}}, name)
    Image.new("RGB", (48, 32), "orange").save("fox.png")
    Path("prompts.txt").write_text("a red fox runs through snow\na dog\n")
    for i in range(2):
        (home / "clips" / f"v{i}").mkdir(parents=True)
        for j in range(21):
            Image.new("RGB", (48, 32), (10 * j, 100, 50 * i)).save(home / "clips" / f"v{i}" / f"{j:02d}.png")
    wan21.main("encode-prompts prompts.txt prompts/0.safetensors --wan Wan2.1-T2V-1.3B".split())
    for name in ("captions.csv", "clips.csv"):
        Path(name).write_text("video,caption\nv0,a red fox runs through snow\nv1,a dog\n")
    yield home
    patch.undo()


def run_train(words, ranks):
    if "--help" in words:
        subprocess.run([sys.executable, ROOT / "train.py", *words], check=True, capture_output=True)
        return
    cfg = train.parse(words)
    assert cfg.batch % (cfg.accum * ranks) == 0, words
    toy = cfg.size == "toy"
    if not toy and not cfg.plan and cfg.batch > 1:  # one clip at a time is what the README's table of memory is for
        assert cfg.batch == cfg.accum * ranks or cfg.stage == "all", words
    if cfg.plan:
        words = [*words, *flags(dict(frames=6, chunk=3, height=4, width=6)), *"--mixed-steps 4 --mixed-probs 1".split()]
    else:
        words = [*words, *flags(TINY_TOY if toy else TINY_WAN | {"chunk": 3})]
        if not toy and not cfg.data:
            words += ["--data", "random"]
    cfg = train.parse(words)
    chain, stage = [], cfg.stage
    while stage in train.STAGES and (stage := train.start_of(dataclasses.replace(cfg, stage=stage), stage)):
        chain.insert(0, stage)
    for stage in ["bidirectional", *chain] if cfg.stage in train.STAGES and not cfg.plan else []:
        if not Path(cfg.out, f"{stage}.safetensors").exists():
            train.main(dataclasses.replace(cfg, stage=stage, init=""))
    train.main(cfg)
    if cfg.stage in train.STAGES and not cfg.plan:
        assert Path(cfg.out, f"{cfg.stage}.safetensors").exists()


def run_sample(words):
    wan = {"Wan2.1-T2V-1.3B", "student.pt"} & set(words)
    out = words[words.index("--out") + 1] if "--out" in words else None
    if "prompts.safetensors" in words:
        shutil.copy("prompts/0.safetensors", "prompts.safetensors")
    assert sample.main(sample.parse([*words, *("--height 32 --width 48 --device cpu".split() if wan else ())]))
    assert out is None or Path(out).exists()


def run_wan21(words):
    if words[0] == "encode-prompts":
        Path(words[2]).unlink(missing_ok=True)  # two commands have the same output
    if words[0] == "prepare":
        if "--videos" not in words:  # short for the command above it
            words += "--videos clips --captions clips.csv --wan Wan2.1-T2V-1.3B --out parts".split()
        words += "--frames 21 --height 32 --width 48 --shard 4 --device cpu".split()
    if words[0] == "convert" and not Path(words[1]).exists():
        assert words[1] == "runs/wan/salt.safetensors"  # the training before it in the same list
        run_train("--size wan1.3b --stage salt --data prompts --out runs/wan".split() + ["--accum", "64"], 1)
    if words[0] == "convert" and "--stage" not in words and "--layout" in words and "own" in words:
        words += ["--stage", "bidirectional"]
    wan21.main(words)


def run(words, monkeypatch):
    if words[0] == "pip":
        assert (ROOT / words[words.index("-r") + 1]).exists()
    elif words[0] in ("cp", "rm"):
        subprocess.run(" ".join(words), shell=True, check=True)
    elif words[0] == "torchrun":
        at = words.index("train.py")
        options = dict(zip(words[1:at:2], words[2:at:2]))
        run_train(words[at + 1:], int(options["--nproc_per_node"]) * int(options.get("--nnodes", 1)))
    elif words[0] == "python":
        name, words = words[1], words[2:]
        if name == "bench.py":
            monkeypatch.setattr(CausalWan, "compile_blocks", lambda net: None)  # half a minute; it has a test
            monkeypatch.setattr(bench, "TOY", [(1, 1, 8, 8)])
            monkeypatch.setattr(bench, "WAN", [(1, 1, 3, 3), (3, 4, 6, 6)])
            bench.main(bench.parse([*words, *"--rounds 1 --device cpu --height 4 --width 6".split()]))
        else:
            {"train.py": lambda w: run_train(w, 1), "sample.py": run_sample, "wan21.py": run_wan21}[name](words)
    else:
        assert words == ["pytest"], words


def test_every_command(home, monkeypatch, capsys):
    """Bug: a command that fails when it is typed: `rm` on a folder, weights that the step before did not make, a batch
    that does not divide, more memory than a card has, a flag of another program."""
    monkeypatch.setattr(sample, "newest_student", lambda: Path("runs/toy/salt.safetensors"))  # who types them has one
    todo = commands()
    assert len(todo) > 40
    train.main(train.parse(flags(TINY_TOY)))
    failed = []
    for words in todo:
        if "salt" in words and "wan1.3b" in words and not Path("runs/wan/causal_cd.safetensors").exists():
            # as the README says, it starts from a student
            wan21.main("convert causal_forcing.pt runs/wan --stage causal_cd --chunk 3".split())
        try:
            run(list(words), monkeypatch)
        except (Exception, SystemExit) as e:
            failed.append(f"{' '.join(words)}: {type(e).__name__}: {e}")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("cell", [c for c in re.findall(r"`(--[^`]+ [^`]+)`", re.search(
    r"\| what \| flags \|\n(.*?)\n\n", README, re.S)[1])])
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
    """Bug: "nineteen baselines" of twenty, "23 stages" of 24."""
    numbers = {"nineteen": 19, "twelve": 12}
    for text in (README, DOCSTRINGS):
        for n in re.findall(r"(\d+) stages\b|all (\w+) are listed|all (\w+) prompts|\ball (\w+) of the stages", text):
            (n,) = [word for word in n if word]
            expected = {len(train.STAGES), len(baselines.BASELINES), len(data.PROMPTS), len(train.RECIPE)}
            assert numbers.get(n, int(n) if n.isdigit() else None) in expected, n
    assert f"all {len(train.STAGES)} stages" in README and "all nineteen are listed" in README
    assert len(baselines.BASELINES) == 19 and "all twelve prompts" in README and len(data.PROMPTS) == 12
