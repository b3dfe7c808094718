"""Faults in real runs: what the user is told, that no rank waits for ever, and that the same command then ends bit for
bit as if nothing had happened. faulty.py has the faults.

Runs of two ranks are started as any launcher would start them; torchrun itself is used where what it does matters.
"""

import json
import os
import shutil
from dataclasses import dataclass

import pytest
import torch
from conftest import ROOT, launch
from faulty import flip
from test_latents import flip as flip_tensor
from test_train import equal, logged

import stage
import train
from cluster import checkpoint
from cluster.files import read_tensors, write_tensors
from worlds import draws, latent_folder

pytestmark = pytest.mark.usefixtures("small")

FAULTY = ROOT / "tests" / "cluster" / "faulty.py"
FLAGS = "--stage bidirectional --batch 4 --frames 3 --save-every 2 --device cpu --data random --timeout 60".split()
STEPS = {1: 6, 2: 4}  # ranks: updates


@dataclass
class Ended:
    """A run: exit codes, stdout and stderr of every rank."""
    codes: list
    out: list
    err: list

    def fine(self):
        assert set(self.codes) == {0}, self.err
        return self

    def said(self, *words, rank=0, code=1):
        """It ended with this code and a message in which all of the words are, without a traceback."""
        message = self.err[rank].splitlines()[-1] if code else self.err[rank]
        assert self.codes[rank] == code and "Traceback" not in self.err[rank], self.err[rank]
        assert all(word in self.err[rank] for word in words), self.err[rank]
        return message


@pytest.fixture(scope="module")
def run(start, tmp_path_factory):
    """run(out, *flags, fault="", ranks=1, mine={rank: flags}, absent=(rank,), **settings) -> Ended. settings: those
    that have no flag. No run takes over two minutes."""
    cwd = tmp_path_factory.mktemp("cwd")

    def run(out, *flags, fault="", ranks=1, mine=None, absent=(), **settings):
        env = {"FAULT": fault, "SETTINGS": json.dumps(settings)}
        there = [r for r in range(ranks) if r not in absent]
        launched = launch(ranks) if ranks > 1 else [{}]
        runs = [start(FAULTY, *FLAGS, "--bidirectional-steps", STEPS[ranks], "--out", out, *flags,
                      *(mine or {}).get(r, ()), cwd=cwd, **env, **launched[r]) for r in there]
        ended = [one.ended() for one in runs]
        return Ended([x.returncode for x in ended], [x.stdout for x in ended], [x.stderr for x in ended])

    return run


@pytest.fixture(scope="module")
def straight(run, tmp_path_factory):
    """straight[ranks]: the folder of a run without a fault."""
    folders = {ranks: tmp_path_factory.mktemp("straight") / str(ranks) for ranks in (1, 2)}
    for ranks, out in folders.items():
        run(out, ranks=ranks).fine()
    return folders


def weights(out, suffix=""):
    return read_tensors(out / f"bidirectional{suffix}.safetensors")[0]


def same(out, straight):
    """All that a run leaves is what the other left, bit for bit, and each step was logged once."""
    assert all(equal(weights(out, suffix), weights(straight, suffix)) for suffix in ("", "_raw"))
    lines = logged(out)
    assert lines == logged(straight) and [line["step"] for line in lines] == list(range(intact(out)[-1]))


def intact(out):
    """The steps of its intact checkpoints."""
    found = checkpoint.checkpoints(out / "bidirectional.state")
    return [int(path.name) for path in found if not checkpoint.damage(path)]


# -- a process that dies ----------------------------------------------------------------------------------------------

def test_killed_rank_is_restarted_by_torchrun(python, straight, tmp_path):
    """Bug: a rank left waiting for a dead one; a restart from the beginning, or with steps logged twice."""
    words = ["torch.distributed.run", "--standalone", "--nproc_per_node", 2, "--max-restarts", 1, FAULTY, *FLAGS,
             "--bidirectional-steps", STEPS[2], "--out", tmp_path / "a"]
    ran = python("-m", *words, FAULT="kill:at=stage.update_ema:call=4:rank=1")
    assert ran.returncode == 0, ran.stderr
    assert "exitcode: -9" in ran.stderr
    same(tmp_path / "a", straight[2])


MOMENTS = [  # of kill -9, each in the run that resumes after the one before; and the step that is safe by then
    ("stage.update_ema:call=4", 2),  # in an update, with a step logged since the last save
    ("os.replace:arg=metrics.jsonl.writing", 2),  # forgetting that step
    ("cluster.checkpoint.dcp.save", 2),  # before anything of the next checkpoint is written
    ("torch.distributed.checkpoint.FileSystemWriter.finish", 2),  # between its tensors and their index
    ("cluster.checkpoint.write_text:arg=about.json", 2),
    ("cluster.checkpoint.write_text:arg=sha256.json", 2),
    ("pathlib.Path.rename:arg=.writing", 2),
    ("pathlib.Path.rename:arg=.writing:when=after", 4),
    ("os.unlink:arg=.distcp:when=after", 6),  # while it forgets the older ones
    ("cluster.files.write_tensors:call=2", 6),  # between the raw weights and their average
]


def test_killed_at_every_moment(run, straight, tmp_path):
    """Bug: a half-written checkpoint taken for a whole one; an old one deleted before the new one is safe; a stage that
    counts as finished with one of its two files; lines of metrics lost or doubled."""
    out = tmp_path / "a"
    for moment, safe in MOMENTS:
        ran = run(out, keep=1, fault=f"kill:at={moment}")
        assert ran.codes == [-9] and intact(out)[-1] == safe, (moment, ran)
    run(out, keep=1).fine()
    same(out, straight[1])


def test_save_that_one_rank_fails(run, straight, tmp_path):
    """Bug: a disk blamed for a dead rank, or ranks that wait for the one that cannot write; a checkpoint without the
    part of a rank."""
    out = tmp_path / "a"
    ran = run(out, ranks=2, fault="kill:at=cluster.checkpoint.dcp.save:call=2:rank=1")
    assert ran.codes[1] == -9 and "lost the connection" in ran.said("RankError", "saving", "00000004")
    ran = run(out, ranks=2, fault="kill:at=cluster.checkpoint.write_text:arg=sha256.json:rank=0")
    assert ran.codes[0] == -9 and "lost the connection" in ran.said("RankError", "finishing", "00000004", rank=1)
    ran = run(out, ranks=2, fault="full:at=cluster.checkpoint.dcp.save:rank=1")
    assert all("00000004.writing" in ran.said("OSError: got no space", rank=r) for r in range(2))
    assert intact(out) == [2]
    run(out, ranks=2).fine()
    same(out, straight[2])


def test_sigterm_to_one_rank_stops_all_gently(run, straight, tmp_path):
    """Bug: one rank stops and the others wait for it; a second SIGTERM, of the launcher, that kills in the middle."""
    out, term = tmp_path / "a", "term:at=stage.update_ema:call=3:rank=1"
    assert "stopped; the same command resumes" in run(out, ranks=2, fault=f"{term} {term}").fine().out[0]
    assert intact(out) == [2, 3] and [line["step"] for line in logged(out)] == [0, 1, 2]
    run(out, ranks=2).fine()
    same(out, straight[2])


def test_sigterm_in_a_stages_last_update(run, straight, tmp_path):
    """Bug: a request to stop that is forgotten when the stage is done: the next stage trains until it is killed."""
    ran = run(tmp_path / "a", "--stage", "all", fault="term:at=stage.update_ema:call=6").fine()
    assert "stopped; the same command resumes" in ran.out[0]
    assert not (tmp_path / "a" / "teacher_forcing.state").exists()
    same(tmp_path / "a", straight[1])


# -- a disk -----------------------------------------------------------------------------------------------------------

FULL = [  # when the disk fills up, what cannot be written then, what is safe
    ("stage.update_ema:call=4", "", 2),  # metrics.jsonl
    ("cluster.checkpoint.dcp.save", "bidirectional.state/00000004.writing", 2),
    ("torch.distributed.checkpoint.FileSystemWriter.finish", "bidirectional.state/00000004.writing", 2),
    ("cluster.checkpoint.write_text:arg=about.json", "", 2),
    ("cluster.files.write_tensors", "bidirectional_raw.safetensors", 6),
]


def test_full_disk(run, straight, tmp_path):
    """Bug: a traceback out of a library; a message without the folder; an older checkpoint that is lost, or weights
    that are cut off."""
    out = tmp_path / "a"
    for moment, what, safe in FULL:
        ran = run(out, fault=f"full:at={moment}")
        assert ran.said("OSError: got no space", "--out").count(str(out / what)), moment
        assert intact(out)[-1] == safe and not (out / "bidirectional.safetensors").exists(), moment
    run(out).fine()
    same(out, straight[1])


def test_out_that_is_not_shared(run):
    """Bug: every rank saves to a disk of its own, and nobody notices until a run has to be resumed."""
    ran = run("here", ranks=2, fault="elsewhere:at=cluster.ranks.setup:rank=1")
    assert all("expected a folder that all ranks share: change --out" in ran.said("OSError", rank=r) for r in range(2))


# -- damaged checkpoints ----------------------------------------------------------------------------------------------

DAMAGES = {"no index": lambda path: (path / ".metadata").unlink(),
           "cut off": lambda path: os.truncate(path / "__0_0.distcp", 1000),
           "a bit": lambda path: flip(path / "__0_0.distcp"),
           "no hashes": lambda path: (path / "sha256.json").unlink(),
           "about": lambda path: flip(path / "about.json")}


@pytest.fixture(scope="module")
def stopped(run, tmp_path_factory):
    """A folder with checkpoints of steps 2 and 4."""
    out = tmp_path_factory.mktemp("stopped") / "a"
    run(out, "--stop-after", 4).fine()
    return out


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint(run, straight, stopped, tmp_path, damage):
    """Bug: training that resumes from damaged weights, or from none."""
    out = shutil.copytree(stopped, tmp_path / "a")
    DAMAGES[damage](out / "bidirectional.state" / "00000004")
    run(out).fine().said("warning", f"{out / 'bidirectional.state' / '00000004'} is damaged", "the one before", code=0)
    same(out, straight[1])
    assert (out / "bidirectional.state" / "00000004.damaged0").is_dir()


def test_all_checkpoints_damaged(run, stopped, tmp_path):
    """Bug: a silent start from the beginning, on top of what might still be repaired."""
    out = shutil.copytree(stopped, tmp_path / "a")
    for path in (out / "bidirectional.state").iterdir():
        flip(path / "__0_0.distcp")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert "move" in run(out).said("ValueError: got only damaged", "00000002", "00000004", "--out")
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_pruning_spares_what_is_intact(run, straight, stopped, tmp_path):
    """Bug: a damaged checkpoint that counts as the newest, so that with --keep 1 the one just written is deleted."""
    out = shutil.copytree(stopped, tmp_path / "a")
    flip(out / "bidirectional.state" / "00000004" / "__0_0.distcp")
    run(out, "--stop-after", 1, keep=1).fine()
    assert intact(out) == [3]
    run(out).fine()
    same(out, straight[1])


@pytest.mark.parametrize("keep", [1, 2])
def test_keep(run, tmp_path, keep):
    """Bug: one too many or too few; old ones deleted before the new one was read back."""
    out = tmp_path / "a"
    run(out, "--stop-after", 5, keep=keep).fine()
    assert intact(out) == [2, 4, 5][-keep:]
    ran = run(out, keep=keep, fault="flip:at=cluster.checkpoint.damage:arg=00000006")
    ran.said("OSError: got __0_0.distcp", "00000006 just written", "Older checkpoints are as they were")
    assert intact(out) == [2, 4, 5][-keep:]


# -- other numbers of ranks -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_resumed_on_another_number_of_ranks(run, straight, tmp_path, before, after):
    """Bug: an optimizer's state that only the same ranks can read, or that starts anew; draws that depend on the rank.
    """
    out = tmp_path / "a"
    run(out, "--bidirectional-steps", 6, "--stop-after", 3, ranks=before).fine()
    run(out, "--bidirectional-steps", 6, ranks=after).fine()
    for suffix in ("", "_raw"):
        for k, w in weights(straight[1], suffix).items():
            assert (weights(out, suffix)[k] - w).norm() <= 3e-6 * (1 + w.norm()), k  # rounding makes it 3e-7
    for a, b in zip(logged(out), logged(straight[1]), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5 and a["step"] == b["step"]


# -- numbers ----------------------------------------------------------------------------------------------------------

def test_nan_is_named_and_may_be_skipped(run, tmp_path):
    """Bug: a NaN that is trained on or saved; a message that blames all ranks for the data of one; an update that is
    skipped but not counted, or made by some ranks; a count that a resumed run forgets."""
    def fault(kind, function, call):
        return f"{kind}:at={function}:when=after:call={call}:rank=1"

    out = tmp_path / "a"
    ran = run(out, ranks=2, fault=fault("nan", "worlds.draws.Draw.clips", 3))
    for r in range(2):
        message = ran.said("ValueError: stage bidirectional, step 2: got a non-finite loss on rank 1, expected", rank=r)
        assert "--bidirectional-lr" in message and "--skip-nonfinite" in message and "rank 0" not in message
    assert intact(out) == [2]
    faults = (fault("nan_backward", "flowmap.flow_matching_loss", 1) + " " + fault("nan", "worlds.draws.Draw.clips", 2))
    ran = run(out, "--skip-nonfinite", 1, "--save-every", 1, ranks=2, fault=faults)
    ran.said("step 3: got a non-finite loss on rank 1")
    assert intact(out) == [2, 3]
    run(out, "--skip-nonfinite", 1, ranks=2).fine()
    lines = logged(out)
    assert [line["nonfinite"] for line in lines] == [0, 0, 1, 1]
    assert ["skipped" in line for line in lines] == [False, False, True, False]
    assert "grad_norm, which is over all ranks" in lines[2]["skipped"]
    assert all(x.isfinite().all() for suffix in ("", "_raw") for x in weights(out, suffix).values())


# -- data -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A latent folder of 10 clips in two shards: an epoch is two and a half updates."""
    folder = tmp_path_factory.mktemp("clips")
    samples = [{"latents": x0, "text": text, "caption": f"clip {i}"} for i, (x0, text) in
               enumerate(zip(draws.noises(range(10), (4, 3, 10, 10), 1), draws.noises(range(10), (2, 16), 2)))]
    latent_folder.write_shard(folder / "a.safetensors", samples[:5])
    latent_folder.write_shard(folder / "b.safetensors", samples[5:])
    for text in ("null", "empty"):
        latent_folder.write_null(folder / f"{text}.safetensors", torch.zeros(2, 16))
    return folder


def test_stopped_in_an_epoch(run, clips, tmp_path):
    """Bug: an order of the data that starts again with the process."""
    run(tmp_path / "a", "--data", clips).fine()
    run(tmp_path / "b", "--data", clips, "--stop-after", 3).fine()
    run(tmp_path / "b", "--data", clips).fine()
    same(tmp_path / "b", tmp_path / "a")


def test_damaged_sample(run, clips, tmp_path):
    """Bug: a damaged clip that is trained on; a message without file or sample, or only a broken connection; a run that
    cannot continue without the clip, or not as if it had been skipped from the start."""
    bad, out = shutil.copytree(clips, tmp_path / "clips"), tmp_path / "a"
    flip_tensor(bad / "b.safetensors", "3.latents")
    ran = run(out, "--data", bad, ranks=2)
    told = [r for r in range(2) if "sample 3 of" in ran.err[r]]
    assert len(told) == 1 and ran.codes == [1, 1]
    what = f"the damaged sample 3 of {bad / 'b.safetensors'}"
    assert "--bad-data skip" in ran.said("ValueError: stage bidirectional, step", f"rank {told[0]}: got {what}",
                                         rank=told[0])
    ran.said("RankError", "see its log", rank=1 - told[0])
    ran = run(out, "--data", bad, "--bad-data", "skip", "--stop-after", 5).fine()
    assert ran.err[0].count(f"warning: skipped {what}") == 1
    run(out, "--data", bad, "--bad-data", "skip").fine()
    run(tmp_path / "b", "--data", bad, "--bad-data", "skip").fine()
    same(out, tmp_path / "b")


# -- ranks that stall or disagree -------------------------------------------------------------------------------------

@pytest.mark.parametrize("fault, seen", [
    ("stall:at=stage.update_ema:call=3:rank=1", "rank 1 was last seen at: the mean of loss"),
    ("stall_backward:at=flowmap.flow_matching_loss:when=after:call=3:rank=1", "all ranks have come this far")])
def test_stalled_rank(run, tmp_path, fault, seen):
    """Bug: a job that hangs, or dies with a message out of the network library that says nothing of where."""
    ran = run(tmp_path / "a", "--timeout", 3, ranks=2, fault=fault)
    assert ran.codes == [1, 1]
    assert "got no answer within 3 s" in ran.said("RankError: rank 0", seen, "see its log", "--timeout")
    ran.said("RankError: rank 1 lost the connection", rank=1)


def test_rank_that_never_comes(run, tmp_path):
    """Bug: a stack trace, or a wait without end, where a node was not started."""
    run(tmp_path / "a", "--timeout", 3, ranks=2, absent=(1,)).said("RankError: got no meeting of all ranks")


def test_ranks_with_other_flags(run, tmp_path):
    """Bug: ranks that train different things, or a deadlock once one saves and the other does not."""
    ran = run(tmp_path / "a", ranks=2, mine={1: ("--save-every", 1)})
    for r in range(2):
        ran.said("RankError: ranks disagree: got --save-every 2 on rank 0 and --save-every 1 on rank 1", rank=r)


def test_ranks_that_draw_another_rollout(run, tmp_path):
    """Bug: a rank that rolls out for longer than the others: all wait, or gather weights for another forward."""
    cfg = train.Config(out=str(tmp_path / "a"), device="cpu")
    (tmp_path / "a").mkdir()
    for name in ("bidirectional", "causal_cd"):  # what salt starts from
        write_tensors(stage.path_of(cfg, name), stage.build(cfg).state_dict(), {"stage": name, "size": "toy"})
    ran = run(tmp_path / "a", "--stage", "salt", "--dmd-steps", 2, "--critic-steps", 1, ranks=2,
              fault="other_exit:at=worlds.draws.Draw.integer:call=2:rank=1:when=after")
    for r in range(2):
        ran.said("RankError: ranks disagree on what comes next:\n  rank 0: a rollout of ", "\n  rank 1: a rollout of ",
                 rank=r)


def test_rank_that_runs_another_forward(run, tmp_path):
    """Bug: a forward on one rank alone, whose weights are gathered from what the others send for other blocks: a job
    that hangs without a word of where, or trains on; and with --check-ranks, one that does not say which forward."""
    fault = "forward:at=flowmap.flow_matching_loss:call=2:rank=1"
    ran = run(tmp_path / "a", "--timeout", 3, ranks=2, fault=fault)
    assert set(ran.codes) == {1} and any("--check-ranks" in err for err in ran.err), ran.err
    assert not any("Traceback" in err for err in ran.err), ran.err
    ran = run(tmp_path / "b", "--check-ranks", ranks=2, fault=fault)
    for r in range(2):
        ran.said("RankError: ranks disagree on what comes next:\n  rank 0: CausalWan", "\n  rank 1: CausalWan",
                 "with gradient", "without gradient", rank=r)
