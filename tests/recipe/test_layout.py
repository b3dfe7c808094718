"""The house: who may import whom, how long a file may be, where the equations stand."""

import ast
import re

import pytest
from conftest import ROOT

from config import ROW_MAY_SET, STAGES, Config, for_stage

FLOORS = [  # from the ground up; a file may import only from floors below its own, or what stands in the same folder
    {"flowmap", "cameras"}, {"model", "align", "sc_loss", "dmd", "causal_cd", "rollout"}, {"fast"}, {"cluster"},
    {"worlds"}, {"wan21"}, {"config"}, {"stage"}, {"baselines", "evaluate"}, {"train", "sample"},
    {"tools", "findings"}, {"reproduce", "play"}]
BUDGETS = {"model.py": 565, "flowmap.py": 215, "causal_cd.py": 60, "rollout.py": 195, "dmd.py": 95, "sc_loss.py": 115,
           "align.py": 50, "train.py": 440, "sample.py": 300}  # lines
FILES = sorted(path for path in ROOT.rglob("*.py") if not {"tests", ".venv", "venv"} & set(path.parts[:-1])
               and not any(part.startswith(".") for part in path.relative_to(ROOT).parts))


def floor_of(name):
    return next(i for i, names in enumerate(FLOORS) if name in names)


def imports(path):
    """The project's own modules that a file imports, anywhere in it, as `folder.file` or `file`."""
    ours = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in FILES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & ours


def test_no_import_runs_upwards():
    """Bug: a library that needs a command, an idea that needs the recipe: a floor that cannot be read by itself."""
    assert {name for names in FLOORS for name in names} == {path.relative_to(ROOT).parts[0].removesuffix(".py")
                                                            for path in FILES}
    for path in FILES:
        own = path.relative_to(ROOT).parts
        for name in imports(path):
            top = name.split(".")[0]
            same_folder = len(own) > 1 and top == own[0]
            assert same_folder or floor_of(top) < floor_of(own[0].removesuffix(".py")), f"{path.name} imports {name}"


def test_no_import_runs_in_a_circle():
    """Bug: two files of a folder that need each other."""
    graph = {".".join(path.relative_to(ROOT).with_suffix("").parts): imports(path) for path in FILES}
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, " -> ".join([*open_, name])
        if name not in done:
            open_.append(name)
            for other in graph[name]:
                visit(other)
            open_.pop()
            done.add(name)

    for name in graph:
        visit(name)


@pytest.mark.parametrize("name", BUDGETS)
def test_an_idea_fits_its_budget(name):
    """Bug: one of the nine files that grows beyond what a reader holds in mind."""
    assert len((ROOT / name).read_text().splitlines()) <= BUDGETS[name]


def test_the_ground_floor_is_the_nine_and_a_few():
    """Bug: a script that nobody came for among the nine that everybody came for."""
    top = {path.name for path in ROOT.glob("*.py")}
    assert top >= set(BUDGETS) and len(top - set(BUDGETS)) <= 6


def test_equations_are_found_where_they_are_computed():
    """Bug: an equation's number that stands in prose alone, so that grep does not land on the line that computes it."""
    code = {path: [line for line in path.read_text().splitlines() if re.search(r"\S.*  +# .*(Salt|CF\+\+) Eq\.", line)]
            for path in FILES}
    marked = "\n".join(line for lines in code.values() for line in lines)
    numbers = {(paper, int(n)) for comment in re.findall(r"# (.*)", marked) for paper, ns in
               re.findall(r"(Salt|CF\+\+) Eq\. ([\d, ]+)", comment) for n in re.findall(r"\d+", ns)}
    salt, causal_forcing_pp = (4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16), (1, 3, 4, 6, 7)
    assert numbers >= {("Salt", n) for n in salt} | {("CF++", n) for n in causal_forcing_pp}
    train = (ROOT / "train.py").read_text()
    for name in ("lambda_sc", "lambda_align"):
        assert re.search(rf"cfg\.{name} \* .*# Salt Eq\.", train), name


def test_salt_is_read_in_one_place():
    """Bug: a stage that is spread over callbacks again: the losses of Salt Eq. 13 must stand in one function."""
    tree = ast.parse((ROOT / "train.py").read_text())
    (salt,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "salt")
    called = {node.func.id for node in ast.walk(salt) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert {"dmd_loss", "sc_loss", "align_loss", "draw_triple", "critic_loss", "rollout"} <= called
    assert salt.end_lineno - salt.lineno < 100


def test_a_row_sets_only_what_its_function_reads():
    """Bug: a setting of a row that the loop, evaluation or sampling reads, too, which see the flag's value."""
    for stage in STAGES.values():
        assert dict(stage.settings).keys() <= ROW_MAY_SET
    cfg = Config(rollout_steps=2, lambda_sc=0.3)
    assert for_stage(cfg, "naive_sc").mixed_steps == (2,) and for_stage(cfg, "naive_sc").lambda_sc == 0.3
    assert for_stage(cfg, "self_forcing").lambda_sc == 0 and for_stage(cfg, "salt") == cfg


def test_about_sixty_flags():
    """Bug: a flag for what a constant in the code does."""
    assert sum(bool(f.metadata["help"]) for f in Config.__dataclass_fields__.values()) <= 61
