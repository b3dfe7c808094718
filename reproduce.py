"""Find the papers' findings again, in worlds small enough to be exact.

    python reproduce.py                                 # the findings, one line each
    python reproduce.py chords                          # one of them: its table, and its figure
    python reproduce.py chords --out runs/findings      # measure it again, elsewhere
    python reproduce.py steps --seeds 3 --out runs/3    # with three seeds in place of five
    python reproduce.py steps --fast                    # few and small cells, to see that it runs

Findings are modules of findings/, which says what such a module has; docs/findings/ has a page for each. A finding is
cut into cells, each saved when it is done in results/findings/NAME.json or --out: a stopped run goes on where it
stopped, and one that is complete is shown. Most take 1 to 10 minutes on one core; steps, grids and hybrid about 20;
pixels, winds and quilts two hours, stage_two three; alignment and length as long as the recipes and quilts, where these
were not trained before. Trained students are kept in runs/findings. The figure, NAME.png beside the results, needs
matplotlib.
"""

import argparse
import importlib
import json
import math
import platform
import sys
import time
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import torch
from tqdm import tqdm

from cluster.files import read_json, replacing, run_command, write_json
from findings import markdown

FINDINGS = ("chords", "pooled_critic", "guidance_per_step", "steps", "grids", "agreement", "defect", "hybrid",
            "gradient_route", "price", "pixels", "initialisation", "cd_against_ode", "drift", "cache",
            "alignment", "length", "stage_two", "winds", "quilts")
SEEDS = range(100, 105)  # settings were chosen on others
EXACT = dict(linestyle="--", linewidth=2.5, alpha=0.4)  # how predictions are drawn


def module_of(name: str):
    if name not in FINDINGS:
        raise ValueError(f"got the finding {name!r}, expected one of {', '.join(FINDINGS)}")
    return importlib.import_module(f"findings.{name}")


def run(name: str, seeds: list[int], fast: bool, out: Path) -> tuple[dict, bool]:
    """Measure the cells that are not in out/NAME.json yet. Returns what is in it then, and whether that is more than
    before. ValueError if that file is of other seeds."""
    finding, path = module_of(name), out / f"{name}.json"
    content = {"finding": name, "seeds": seeds, "fast": fast, "torch": torch.__version__, "machine": platform.machine(),
               "cells": []}
    if path.exists():
        content = read_json(path, "the results of an earlier run")
        asked, there = (f"seeds {of}{' of --fast' if quick else ''}" for of, quick in (
            (seeds, fast), (content.get("seeds"), content.get("fast"))))
        if asked != there:
            raise ValueError(f"got {path} with {there}, expected {asked}: give another --out, or change --seeds")
    cells = finding.cells(fast)
    done = {json.dumps(cell["settings"]): cell for cell in content["cells"]}
    left = [cell for cell in cells if json.dumps(cell) not in done]
    if not left:
        print(f"{name}: measured before, in {path}; another --out measures it again\n")
    for cell in tqdm(left, desc=name, unit="cell", initial=len(cells) - len(left), total=len(cells), disable=not left):
        start = time.monotonic()
        rows = finding.measure(cell, seeds, fast)
        done[json.dumps(cell)] = {"settings": cell, "seconds": round(time.monotonic() - start, 1), "rows": rows}
        write_json(path, content | {"cells": [done[json.dumps(c)] for c in cells if json.dumps(c) in done]})
    return content | {"cells": [done[json.dumps(c)] for c in cells]}, bool(left)


# ---------------------------------------------------------------------------------------------------------------------
# Tables

def rows_of(finding, content: dict, quantity: str) -> list[dict]:
    """The rows of a quantity that the table and the figure show; all of them where none is among SHOWN."""
    rows = [row for cell in content["cells"] for row in cell["rows"] if row["quantity"] == quantity]
    shown = getattr(finding, "SHOWN", {})
    return [row for row in rows if all(row.get(k, v) == v for k, v in shown.items())] or rows


def across(finding, quantity: str) -> str:
    return finding.ACROSS if isinstance(finding.ACROSS, str) else finding.ACROSS[quantity]


def settings(row: dict) -> dict:
    return {k: v for k, v in row.items() if k not in ("quantity", "measured", "predicted")}


def word(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def number(x: float) -> str:
    """With three significant digits."""
    return f"{x:#.3g}".rstrip(".") if math.isfinite(x) else str(x)


def spread(row: dict) -> float:
    return stdev(row["measured"]) if len(row["measured"]) > 1 else 0.0


def entry(row: dict) -> str:
    """Mean and standard deviation over seeds, unless it rounds to 0; in brackets what the exact reference predicts."""
    text = number(mean(row["measured"]))
    deviation = number(spread(row)) if "e" in text else f"{spread(row):.{len(text.partition('.')[2])}f}"
    if float(deviation) > 0:
        text += f" ± {deviation}"
    return text if row["predicted"] is None else f"{text} ({number(row['predicted'])})"


def table(finding, rows: list[dict], key: str) -> str:
    """A table in Markdown: a column for each value of `key`, a line for each combination of the other settings."""
    columns = list(dict.fromkeys(row[key] for row in rows))
    hidden = set(getattr(finding, "SHOWN", {})) | {key}
    lines = {}
    for row in rows:
        lines.setdefault(tuple((k, v) for k, v in settings(row).items() if k not in hidden), {})[row[key]] = entry(row)
    names = list(dict.fromkeys(k for line in lines for k, _ in line))
    body = [[word(dict(line).get(k, "")) for k in names] + [cells.get(c, "-") for c in columns]
            for line, cells in lines.items()]
    head = names + [f"{key} {word(c)}" if i == 0 else word(c) for i, c in enumerate(columns)]
    return markdown(head, body)


def report(name: str, content: dict) -> str:
    """All tables of a finding, and its verdicts, as the page of docs/findings has them."""
    finding = module_of(name)
    parts = []
    for quantity, label in finding.QUANTITIES.items():
        if rows := rows_of(finding, content, quantity):
            parts += [f"**{label}**", table(finding, rows, across(finding, quantity))]
    if hasattr(finding, "summary"):
        parts.append(finding.summary([row for cell in content["cells"] for row in cell["rows"]]))
    return "\n\n".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Figures

def draw(name: str, content: dict, path: Path) -> bool:
    """The figure of a finding's first quantity: measured means with their standard deviation over seeds, predictions
    dashed. False where there is no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    finding = module_of(name)
    quantity, label = next(iter(finding.QUANTITIES.items()))
    rows, key = rows_of(finding, content, quantity), across(finding, quantity)
    hidden = {key, *finding.PANELS, *getattr(finding, "SHOWN", {})}

    def line_of(row):
        return tuple(v if isinstance(v, str) else f"{k} {word(v)}" for k, v in settings(row).items() if k not in hidden)

    columns, names = (list(dict.fromkeys(of(row) for row in rows)) for of in (lambda row: row[key], line_of))
    panels = [list(dict.fromkeys(row.get(panel) for row in rows)) for panel in finding.PANELS]
    figure, axes = pyplot.subplots(len(panels[0]), len(panels[1]), squeeze=False, sharex=True, sharey="row",
                                   figsize=(max(6, 2 + 2.6 * len(panels[1])), max(4, 1.2 + 2.1 * len(panels[0]))),
                                   layout="constrained")
    for (i, down), (j, right) in product(*map(enumerate, panels)):
        here = {name: [row for row in rows if line_of(row) == name and
                       [row.get(panel) for panel in finding.PANELS] == [down, right]] for name in names}
        draw_lines(axes[i][j], here, key, columns)
        if hasattr(finding, "RANGE"):
            axes[i][j].set_ylim(finding.RANGE)
        axes[i][j].set_title(", ".join(f"{panel} {word(value)}" for panel, value in zip(finding.PANELS, (down, right))
                                       if value is not None), fontsize=8)
    figure.supxlabel(key, fontsize=9)
    figure.supylabel(label, fontsize=9)
    handles = {h.get_label(): h for ax in axes.flat for h in ax.get_legend_handles_labels()[0]}
    if any(row["predicted"] is not None for row in rows):
        handles["exact"] = pyplot.Line2D([], [], color="grey", **EXACT)
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, fontsize=7)
    with replacing(path) as fresh:
        figure.savefig(fresh, format="png", dpi=80)
    pyplot.close(figure)
    return True


def draw_lines(ax, lines: dict[tuple, list[dict]], key: str, columns: list) -> None:
    """The rows of one panel, by the settings that tell lines apart: the first has a colour, the others a marker."""
    colours, styles = (list(dict.fromkeys(part)) for part in zip(*((name[:1], name[1:]) for name in lines)))
    for name, rows in lines.items():
        colour, style = f"C{colours.index(name[:1]) % 10}", styles.index(name[1:]) % 4
        x = [columns.index(row[key]) for row in rows]
        if rows:
            ax.errorbar(x, [mean(row["measured"]) for row in rows], [spread(row) for row in rows], color=colour,
                        marker="os^d"[style], linestyle=["-", ":", "-.", "--"][style], markersize=4, linewidth=1,
                        capsize=2, label=", ".join(name))
        if exact := [(k, row["predicted"]) for k, row in zip(x, rows) if row["predicted"] is not None]:
            ax.plot(*zip(*exact), color=colour, **EXACT)
    ax.set_xticks(range(len(columns)), map(word, columns), fontsize=7,
                  rotation=20 if max(len(word(c)) for c in columns) > 6 else 0)
    ax.tick_params(axis="y", labelsize=7)
    ax.grid(alpha=0.3)


def parse(argv=None):
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                    allow_abbrev=False)
    flags.add_argument("name", nargs="?", help="the finding; all are listed without")
    flags.add_argument("--seeds", type=int, help="how many seeds (default: 5, counted from 100; pixels: 3, from 1; "
                                                 "stage_two: 3, from 0; alignment, length, winds, quilts: 0 alone)")
    flags.add_argument("--fast", action="store_true",
                       help="few and small cells, to see that it runs; their numbers mean nothing")
    flags.add_argument("--out", default="", help="folder of the results (default: results/findings, and "
                                                 "runs/findings/fast with --fast)")
    return flags.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if not args.name:
        for name in FINDINGS:
            print(f"{name:<18} {module_of(name).CLAIM}")
        return
    seeds = list(getattr(module_of(args.name), "SEEDS", SEEDS))
    if args.seeds is not None and args.seeds < 1:
        raise ValueError(f"got --seeds {args.seeds}, expected at least 1")
    seeds = [seeds[0] + i for i in range(args.seeds or len(seeds))]
    torch.set_num_threads(1)  # the networks are small, and so nothing depends on the number of cores
    out = Path(args.out or ("runs/findings/fast" if args.fast else "results/findings"))
    if out.is_file():
        raise ValueError(f"got --out {out}, which is a file, expected a folder")
    content, measured_now = run(args.name, seeds, args.fast, out)
    print(report(args.name, content))
    figure = out / f"{args.name}.png"
    if (measured_now or not figure.exists()) and not draw(args.name, content, figure):
        print(f"got no matplotlib, expected it for {figure}: pip install matplotlib", file=sys.stderr)


if __name__ == "__main__":
    run_command(main, "\nstopped; the same command goes on from here")
