"""The folder of a run, --out: who may be in it, its metrics, and how a run is stopped gently."""

import json
import signal
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cluster import ranks
from cluster.files import in_use, read_json, tidy, write_text


@contextmanager
def alone_in(out, stages):
    """Keep other runs out of a folder, and remove what killed ones have left half written in it."""
    with ExitStack() as stack:
        ranks.on_rank_0(lambda: stack.enter_context(in_use(out)), f"entering {out}")
        ranks.on_rank_0(lambda: check_folder(Path(out)))
        ranks.on_rank_0(lambda: tidy(out, [*stages, "config.json", "metrics.jsonl", "table_seed", "sheet"]))
        yield


def check_folder(out):
    """ValueError if a folder holds files that a run would replace and that no run has left."""
    path, metrics = out / "config.json", out / "metrics.jsonl"
    foreign = path.exists() and not {"stage", "seed", "out"} <= read_json(path, "that of a run: change --out").keys()
    if metrics.is_file() and metrics.stat().st_size and not any("stage" in line for line in readable_lines(metrics)):
        path, foreign = metrics, True
    if foreign:
        raise ValueError(f"got --out {out} with a {path.name} that no run has left, expected a folder of a run, or a "
                         "new one: change --out")


def append_metrics(out, line: dict):
    with open(Path(out) / "metrics.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")


def forget_metrics_after(out, stage, step):
    """Drop the metrics of steps that a stopped run made after its last save: they will be made again."""
    path = Path(out) / "metrics.jsonl"
    if path.exists() and not path.is_file():
        raise ValueError(f"got {path}, which is no file, expected the metrics of a run: move it away, or change --out")
    if path.exists():
        kept = [line for line in readable_lines(path) if line.get("stage") != stage or line.get("step", -1) < step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def readable_lines(path) -> list[dict]:
    """The JSON objects of a file of lines; a line that a crash has cut or a disk has spoilt is none."""
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        with suppress(ValueError, RecursionError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


@contextmanager
def stopping_gently():
    """Yields a list that Ctrl-C or SIGTERM fills, so that the update in hand is finished and saved. Only a second
    Ctrl-C stops at once: a second SIGTERM comes where a scheduler and torchrun both send one."""
    asked = []

    def ask(number, _):
        if number == signal.SIGINT and number in asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
