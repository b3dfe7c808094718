"""README.md, docs/ and runs/*.sh: their map of equations, commands, numbers and examples must be true of the code."""

import doctest
import importlib
import json
import math
import re
import shlex
import subprocess

import pytest
from conftest import ROOT

import config
import play
import reproduce
import sample

README = (ROOT / "README.md").read_text()
DOCS = {path.relative_to(ROOT / "docs").with_suffix("").as_posix(): path.read_text()
        for path in sorted((ROOT / "docs").rglob("*.md"))}
TEXT = "\n".join([README, *DOCS.values()])
SCRIPTS = sorted((ROOT / "runs").glob("*.sh"))
TESTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "tests").glob("*/test_*.py")}
TOOLS = "convert encode_prompts prepare plan bench walk ship".split()
TORCHRUN = {"--nproc_per_node", "--nnodes", "--max-restarts", "--rdzv-backend", "--rdzv-endpoint",
            "--shutdown-timeout"}
PLACEHOLDERS = {"NAME": "dmd4", "S": "0", "N": "1"}


def section(title, text):
    return re.search(rf"^##+ {re.escape(title)}\n(.*?)^##", text + "\n##", re.M | re.S)[1]


def tables(text) -> list[list[list[str]]]:
    """The tables of a text, each a list of rows of cells without its header."""
    found = re.findall(r"(?:^\|.*\n)+", text, re.M)
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
            for table in found]


def rows(title, text):
    return [row for table in tables(section(title, text)) for row in table]


def test_readme_is_short():
    """Bug: a README that grows until nobody reads it; what is long belongs to docs/."""
    assert len(README.splitlines()) <= 200 and len(README.split()) <= 2500


def test_every_numbered_equation_has_a_function_and_a_test():
    """Bug: an equation of Salt (1-16) or Causal Forcing++ (1-7) that is missing from the map, a function that is not
    there, a row without a test."""
    seen = set()
    for equation, functions, tests in rows("Equations", README):
        for paper, numbers in re.findall(r"(Salt|CF\+\+) ([\d, -]+)", equation):
            for first, last in re.findall(r"(\d+)(?:-(\d+))?", numbers):
                seen |= {(paper, n) for n in range(int(first), int(last or first) + 1)}
        names = re.findall(r"`([\w.]+)\.(\w+)`", functions)
        assert names and re.findall(r"`(test_\w+)`", tests), equation
        for module, name in names:
            assert callable(getattr(importlib.import_module(module), name)), f"{module}.{name}"
    assert seen == {("Salt", n) for n in range(1, 17)} | {("CF++", n) for n in range(1, 8)}


def test_every_test_and_file_named_exists():
    """Bug: a claim that rests on a test that was renamed or never written; a file or a page that has moved."""
    named = set(re.findall(r"\btest_\w+(?!\w*\.py)", TEXT))
    files = set(re.findall(r"`((?:tests|worlds|wan21|cluster|tools|baselines|findings|results)/[\w./]+|"
                           r"runs/[\w.]+\.sh)`", TEXT))
    modules = {path.split("/")[-1].removesuffix(".py") for path in TESTS}
    assert len(named) > 60 and len(files) > 10
    assert not {name for name in named if name not in modules and f"def {name}(" not in "".join(TESTS.values())}
    assert not {path for path in files if not (ROOT / path).exists()}
    for page, text in {"README": README, **{f"docs/{name}": text for name, text in DOCS.items()}}.items():
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
            assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"
        titles = re.findall(r"^#+ (.*)", text, re.M)
        titles = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert set(re.findall(r"\]\(#([^)]+)", text)) <= titles, page


def test_every_pitfall_names_its_test():
    """Bug: a difference from the official code that nothing pins."""
    pitfalls = rows("Where we differ from the official code, and why", DOCS["differences"])
    assert len(pitfalls) >= 12
    for what, _, ours, tests in pitfalls:
        assert "`test_" in tests, what
        assert len(ours) > 10, what


def test_every_stage_is_described():
    """Bug: a method that can be trained and that nobody is told of, or one that is told of and cannot."""
    recipe = rows("The four stages", README)
    methods = tables(section("Every method of the papers' tables", DOCS["results"]))[0]
    described = {name for cells in [*recipe, *methods] for name in re.findall(r"`(\w+)`", cells[0])}
    assert described == set(config.STAGES)
    assert {cells[0].strip("`") for cells in recipe} == set(config.RECIPE)


# ---------------------------------------------------------------------------------------------------------------------
# Commands

def commands_shown() -> list[list[str]]:
    """The words of every command in a block of README.md and docs/, or between backticks."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.S)
    lines += re.findall(r"`((?:python|torchrun|cp) [^`]* [^`]*)`", prose.replace("`torchrun --max-restarts`", ""))
    return [[PLACEHOLDERS.get(word, word) for word in shlex.split(command, comments=True)]
            for line in lines for command in line.split(" && ")]


def commands_of(script, folder) -> list[list[str]]:
    """The words of every command that a script would run."""
    for name in ("python", "torchrun"):
        (folder / name).write_text('#!/bin/bash\nprintf "%q " "${0##*/}" "$@"\necho\n')
        (folder / name).chmod(0o755)
    ran = subprocess.run(["bash", "-c", f'PATH="{folder}:$PATH" bash "{script}"'], check=True, capture_output=True,
                         text=True, cwd=folder)
    return [shlex.split(line) for line in ran.stdout.splitlines()]


def parse(words):
    """Parse a command as it would itself; False if it is none of ours."""
    if words[:3] == ["python", "-m", "pytest"]:
        return True
    if words[:2] == ["python", "-m"]:
        importlib.import_module(words[2]).parse(words[3:])
    elif words[:1] == ["python"] and words[1] in ("sample.py", "play.py", "reproduce.py"):
        {"sample.py": sample, "play.py": play, "reproduce.py": reproduce}[words[1]].parse(words[2:])
    elif "train.py" in words[:2] or words[:1] == ["torchrun"]:
        start = words.index("train.py")
        if "--help" not in words:
            ranks = [int(words[words.index(flag) + 1]) for flag in ("--nproc_per_node", "--nnodes") if flag in words]
            config.check(config.parse(words[start + 1:]), ranks=math.prod(ranks))
    else:
        return False
    return True


def test_every_command_parses(tmp_path):
    """Bug: a command that the command line refuses, or whose batch its ranks cannot divide."""
    shown = [words for words in commands_shown() if parse(words)]
    assert len(shown) > 30 and {words[2] for words in shown if words[1] == "-m"} == {f"tools.{name}" for name in TOOLS}
    for script in SCRIPTS:
        ran = commands_of(script, tmp_path)
        assert len(ran) > 3 and all(parse(words) for words in ran)


def flags_of(parse, capsys) -> set[str]:
    with pytest.raises(SystemExit):
        parse(["--help"])
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]+", capsys.readouterr().out))


def test_every_flag_exists(capsys):
    """Bug: a flag that is told of and that no command has."""
    known = {*TORCHRUN, "--help"}
    for module in (config, sample, play, reproduce, *(importlib.import_module(f"tools.{name}") for name in TOOLS)):
        known |= flags_of(module.parse, capsys)
    of_a_diff = re.findall(r"^\+ +(\w+): .* = flag\(", TEXT, re.M)
    known |= {"--" + name.replace("_", "-") for name in of_a_diff}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", TEXT))
    assert len(named) > 50 and named <= known, named - known


def test_examples_give_what_they_show():
    """Bug: an example that prints something else."""
    shown = [block for block in re.findall(r"```python\n(.*?)```", TEXT, re.S) if ">>>" in block]
    assert shown
    for block in shown:
        example = doctest.DocTestParser().get_doctest(block, {}, "README", "README.md", 0)
        assert doctest.DocTestRunner().run(example).failed == 0


# ---------------------------------------------------------------------------------------------------------------------
# Numbers

def results(name):
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def test_tables_of_the_room_are_those_of_the_results():
    """Bug: a number that was typed, or that belongs to another run."""
    measured = {(str(r["seed"]), f"`{r['stage']}`", str(r["steps"])): r for r in results("room_cpu")["rows"]}
    shown = rows("What was measured", DOCS["world_model"])
    stages, kinds = [row for row in shown if len(row) == 10], [row for row in shown if len(row) == 5]
    assert len(stages) >= 18 and len(kinds) == 4
    for seed, stage, steps, *numbers in stages:
        r = measured[seed, stage, steps]
        assert numbers == [f"{r[name]:.4f}" for name in ("render_error", "validity")] + [
            f"{r[name]:.2f}" for name in ("wall_variety", "pillar_variety")] + [
            f"{r[name]:.4f}" for name in ("memory_error", "return_error")] + [f"{r['variety']:.2f}"], (stage, steps)
    for kind, *numbers in kinds:
        size = re.search(r"--size (\w+)", kind)[1]
        (r,) = (r for r in results("room_cameras_cpu")["rows"][size] if r["steps"] == 4)
        assert numbers == [f"{r[name]:.3f}" for name in ("memory_error", "return_error", "render_error", "validity")]
    speed = {r["steps"]: round(r["frames_per_second"]) for r in results("rollout_room_cpu")["rows"]
             if r["way"] == "fast"}
    assert f"{speed[2]} frames a second at 2 steps on one thread, {speed[1]} at 1, {speed[4]} at 4" in section(
        "What was measured", DOCS["world_model"])
    walk = results("room_walk_cpu")
    assert {name: [f"{e:.3f}" for e in of] for name, of in walk["errors"].items()} == {
        name: numbers for name, *numbers in rows("Long walks", DOCS["world_model"])}


def test_tables_of_speed_are_those_of_the_results():
    """Bug: a number that was typed, or that belongs to another run."""
    def told(seconds):
        return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"

    assert rows("Beside the official code", DOCS["speed"]) == [
        [r["what"], *(told(r[way]["cpu_seconds"]) for way in ("official", "plain", "fast")),
         f"{r['official']['cpu_seconds'] / r['fast']['cpu_seconds']:.2f}x"] for r in results("official_cpu")["rows"]]
    updates = results("updates_toy_cpu")
    stages = [[told(s) for s in updates["seconds"][when].values()]
              + [f"{updates[f'{what}_minutes'][when]:.1f} min" for what in ("evaluation", "recipe")]
              for when in ("before", "now")]
    assert [row[1:] for row in rows("Training", DOCS["speed"])] == stages
    for of in ("recipe", "update"):
        minutes = updates[f"{of}_minutes"]
        assert f"{minutes['before'] / minutes['now']:.2f} times" in DOCS["speed"]


def test_tables_are_those_of_the_results():
    """Bug: a number that was typed, or that belongs to another run."""
    measured = results("toy_cpu")["rows_eval_seed_1_512_clips"]
    measured = {(r["stage"], r["weights"], str(r["steps"])): r for r in measured}
    shown = rows("The recipe", DOCS["results"])
    assert len(shown) == len(measured)
    for stage, weights, steps, nfe, error, third, last, drift, accuracy, motion, motion_w1, defect in shown:
        if stage == "the world":
            continue
        r = measured[stage, weights, steps]
        by_frame = r["render_error_by_frame"]
        assert [nfe, error, third, last, drift, accuracy, motion, motion_w1, defect] == [
            str(r["nfe"]), f"{r['render_error']:.4f}", f"{by_frame[2]:.4f}", f"{by_frame[-1]:.4f}", f"{r['drift']:.2f}",
            f"{100 * r['prompt_accuracy']:.1f} %", f"{r['motion']:.2f}", f"{r['motion_w1']:.2f}",
            f"{r['defect']:.4f}"], (stage, weights, steps)

    student, before = measured["salt", "ema", "2"], measured["causal_cd", "ema", "2"]
    teacher, two, one = (measured["teacher_forcing", "ema", steps] for steps in ("40", "2", "1"))
    later = [sum(r["render_error_by_frame"][1:]) for r in (one, teacher)]
    error = f"{student['render_error']:.4f}"
    shown = [row[1] for row in rows("Results on the toy world", README)][:7]
    assert shown == [f"{later[0] / later[1]:.1f}x", f"{100 * student['prompt_accuracy']:.1f} %",
                     f"{student['render_error'] / teacher['render_error']:.2f}x",
                     f"{error} against {two['render_error']:.4f}", f"{error} against {before['render_error']:.4f}",
                     f"{student['motion']:.2f}", f"{student['drift']:.2f}x"]
    assert all(f"{r['render_error']:.4f}" in section("Start", README) for r in (student, teacher, before))

    measured = {(r["stage"], r["steps"]): r for r in results("baselines_toy_cpu")["rows"] if r["weights"] == "ema"}
    _, *shown = tables(section("Every method of the papers' tables", DOCS["results"]))
    shown = [row for table in shown for row in table]
    teachers = iter(("bidirectional", "teacher_forcing"))
    for name, *errors, motion, drift, motion_w1, defect in shown:
        stage = next(teachers) if "teacher" in name else name.strip("`")
        for steps, error in zip((1, 2, 4, 8), errors):
            assert error == ("-" if (stage, steps) not in measured else f"{measured[stage, steps]['render_error']:.4f}")
        r = measured[stage, 2]
        assert [motion, drift, motion_w1, defect] == [
            f"{r['motion']:.2f}", f"{r['drift']:.2f}", f"{r['motion_w1']:.2f}", f"{r['defect']:.4f}"], stage
    later = {"dmd16", "dmd16_backward"}  # than these tables, of which the page says so
    assert not later & {stage for stage, _ in measured} and "`dmd16` and `dmd16_backward` came later" in DOCS["results"]
    baselines = len(config.STAGES) - len(later) - 4
    assert len(shown) == baselines + 4  # causal_cd and salt, and two teachers

    by_flags = {}
    for run in results("salt_open_choices_cpu")["runs"].values():
        by_flags.setdefault(run["flags"], []).append(run)
    shown = rows("What Salt leaves open", DOCS["results"])
    for (setting, *cells), (flags, runs) in zip(shown, by_flags.items(), strict=True):
        assert setting == flags or not flags.startswith("`"), (setting, flags)
        wanted = [[r["render_error"]["2"] for r in runs], [r["render_error"]["4"] for r in runs],
                  [r["motion"]["2"] for r in runs], [r["defect"] for r in runs]]
        assert cells == [", ".join(f"{x:.{digits}f}" for x in values) for digits, values in zip((4, 4, 2, 5), wanted)]
