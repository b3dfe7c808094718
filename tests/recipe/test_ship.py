"""The students that come with the project can do what their record says."""

import pytest
import torch
from conftest import ROOT

from cluster.files import metadata_of, read_tensors, write_tensors
from tools import ship, walk
from wan21.settings import newest_student

SHIPPED = sorted((ROOT / "assets").glob("*.safetensors"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_student_is_as_good_as_its_record(path):
    """Bug: weights of another run, or code that no longer plays them as they were trained."""
    made = metadata_of(path)["made"]
    assert made["command"].startswith("python train.py") and path.stat().st_size < 4e6
    found = ship.measured(path)
    assert found.keys() == made["measured"].keys()
    for name, value in found.items():
        assert abs(value - made["measured"][name]) <= 0.02 * abs(value) + 1e-3, name


@pytest.mark.parametrize("name", ["causal", "few_step"])
def test_who_walks(name, tmp_path):
    """Bug: a student of whole clips, or a teacher, that is taken for one that goes on frame by frame."""
    weights, metadata = read_tensors(ROOT / "assets" / "room.safetensors")
    write_tensors(tmp_path / "other.safetensors", weights, metadata | {name: False})
    with pytest.raises(ValueError, match="expected a causal student of the room.*--weights"):
        walk.main(["--weights", str(tmp_path / "other.safetensors")])


@pytest.mark.parametrize("prompts, world", [
    ((), "room"), (("forward left",), "room"), (("red ball",), "toy"), (("red ball", "forward"), "toy")])
def test_the_student_that_knows_the_words(prompts, world, tmp_path, monkeypatch):
    """Bug: `sample.py --prompt "red ball"` that fails before anything was trained, as the student of the room has no
    such words."""
    monkeypatch.chdir(tmp_path)
    assert newest_student(prompts) == ROOT / "assets" / f"{world}.safetensors"


def test_what_is_shipped(tmp_path, monkeypatch):
    """Bug: weights that are not the student's, or too large for bf16, a teacher or a student of whole clips that is
    shipped as one, a record without its command and commit, or with a path of this machine."""
    monkeypatch.setattr(ship, "measured", lambda path: {"validity": 0.5})
    weights, metadata = read_tensors(SHIPPED[0])
    src, out = tmp_path / "salt.safetensors", tmp_path / "room.safetensors"
    metadata["config"]["out"] = str(tmp_path)
    write_tensors(src, {name: w.float() for name, w in weights.items()}, metadata)
    ship.main([str(src), str(out), "--command", "python train.py --world room --seed 5", "--commit", "abc"])
    shipped, about = read_tensors(out)
    assert about["made"]["command"].endswith("--seed 5") and about["made"]["measured"] == {"validity": 0.5}
    assert about["made"]["commit"] == "abc" and str(tmp_path) not in str(about)
    assert all(w.dtype == torch.bfloat16 and torch.equal(w, weights[name]) for name, w in shipped.items())
    for stage in ("teacher_forcing", "dmd4"):
        write_tensors(src, weights, metadata | {"stage": stage})
        with pytest.raises(ValueError, match="few-step student"):
            ship.main([str(src), str(out), "--command", "x"])
    write_tensors(src, {name: torch.full_like(w, 3.4e38, dtype=torch.float32) for name, w in weights.items()}, metadata)
    with pytest.raises(ValueError, match="no finite numbers"):
        ship.main([str(src), str(out), "--command", "x"])
