"""The README's map of equations, its commands and its examples: all of them must be true of the code."""

import doctest
import importlib
import re
import shlex

from conftest import ROOT

import bench
import sample
import train
import wan21

README = (ROOT / "README.md").read_text()
TORCHRUN = {"--nproc_per_node", "--nnodes", "--max-restarts", "--rdzv-backend", "--rdzv-endpoint",
            "--shutdown-timeout"}
TESTS = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))


def section(title):
    return re.search(rf"^## {title}\n(.*?)^## ", README + "\n## ", re.M | re.S)[1]


def rows(title):
    """The cells of the tables of a section, header left out."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line][1:]


def test_every_numbered_equation_has_a_function_and_a_test():
    """Bug: an equation of Salt (1-16) or Causal Forcing++ (1-7) that is missing from the map, a function that is not
    there, a row without a test."""
    seen = set()
    for equation, functions, tests in rows("Equations"):
        for paper, numbers in re.findall(r"(Salt|CF\+\+) ([\d, -]+)", equation):
            for first, last in re.findall(r"(\d+)(?:-(\d+))?", numbers):
                seen |= {(paper, n) for n in range(int(first), int(last or first) + 1)}
        names = re.findall(r"`(\w+)\.(\w+)", functions)
        assert names and re.findall(r"`(test_\w+)`", tests), equation
        for module, name in names:
            assert callable(getattr(importlib.import_module(module), name)), f"{module}.{name}"
    assert seen == {("Salt", n) for n in range(1, 17)} | {("CF++", n) for n in range(1, 8)}


def test_every_test_named_exists():
    """Bug: a claim that rests on a test that was renamed or never written."""
    named = set(re.findall(r"\btest_\w+", README)) - {"test_requirements"}
    modules = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    assert len(named) > 30
    assert not {name for name in named if name not in modules and f"def {name}(" not in TESTS}


def test_every_pitfall_names_its_test():
    """Bug: a difference from the official code that nothing pins."""
    pitfalls = rows("Where we differ from the official code, and why")
    assert len(pitfalls) >= 12
    for what, _, ours, tests in pitfalls:
        assert "`test_" in tests, what
        assert len(ours) > 10, what


def test_every_stage_is_described():
    """Bug: a method that can be trained and that nobody is told of, or one that is told of and cannot."""
    described = set()
    for title in ("What happens", "Every method of the papers' tables"):
        described |= {name for cells in rows(title) for name in re.findall(r"`(\w+)`", cells[0])}
    assert described == set(train.STAGES)


def test_every_flag_exists():
    """Bug: a command of the README that the command line refuses."""
    help_of = {f"--{f.replace('_', '-')}" for f in train.Config.__dataclass_fields__}
    for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]+", README)):
        others = "".join((ROOT / f"{name}.py").read_text() for name in ("sample", "wan21", "prepare", "bench"))
        assert flag in help_of | TORCHRUN or f'"{flag}"' in others or flag == "--help", flag
    commands = re.findall(r"^(?:python|torchrun .*?) train\.py *(.*?) *(?:#.*)?$", README, re.M)
    assert any("--plan" in command for command in commands)
    for command in commands:
        train.check(train.parse(command.split()))
    samples, wans = (re.findall(rf"^python {name}\.py *(.*?) *(?:#.*)?$", README, re.M) for name in ("sample", "wan21"))
    assert len(samples) > 4 and {words.split()[0] for words in wans} == {"convert", "encode-prompts", "prepare"}
    for words in samples:
        sample.parse(shlex.split(words))
    for words in re.findall(r"^python bench\.py *(.*?) *(?:#.*)?$", README, re.M):
        bench.parse(shlex.split(words))
    for words in wans:
        wan21.parse(shlex.split(words))


def test_examples_give_what_they_show():
    """Bug: an example that prints something else."""
    shown = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if ">>>" in block]
    assert shown
    for block in shown:
        example = doctest.DocTestParser().get_doctest(block, {}, "README", "README.md", 0)
        assert doctest.DocTestRunner().run(example).failed == 0
