"""Clips of eight times the length that students were trained on: what they may remember, and where that leads.

A student of 8-frame clips makes 64. Past the eighth frame it is told of more frames than it ever was, unless its memory
is a window of the latest ones; a sink keeps the first frame in the window. RoPE tells two frames their distance and
nothing else, so to a window without a sink it is all one whether positions are counted from the start of the clip or
inside the window. To a sink it is not: counted from the start, it is further away than any frame was in training.

Nothing exact is known of a trained network, so `predicted` is None. The runs are in recipe.ROOT: that of the recipe,
and one whose Salt was trained with a window and a sink (LongLive's short memory).
"""

from config import RECIPE, STAGES
from evaluate import TEACHER_STEPS
from findings.recipe import beside, clips, settings_of, trained
from worlds import WORLDS
from worlds.draws import EVALUATE, generator

CLAIM = "Salt Tab. 3, LongLive: students make clips many times as long as in training; a short window and a sink help"
ACROSS = {"render_error": "frame", "at_the_end": "of"}
QUANTITIES = {"render_error": "render error, this frame and three before",
              "at_the_end": "contrast and motion over the world's, share of clips that show their prompt, same frames"}
PANELS = ("of", "student")
RANGE = (0.02, 0.05)
SEEDS = (0,)
FRAMES, CLIPS = (8, 16, 32, 64), 64
METRICS = {"contrast": "contrast", "motion": "motion", "prompt": "prompt_accuracy"}
SHORT = {"window": 4, "sink": 1}  # LongLive's
ASKED = {  # student -> memories: the window, and where the position of a sink of one frame is counted from
    "teacher_forcing, 40 steps": [(8, "none")], "causal_cd": [("all", "none"), (8, "none")],
    "salt": [("all", "none"), (8, "none"), (4, "none"), (8, "relative"), (8, "absolute"), (4, "relative")],
    "salt, trained with 4 and a sink": [(8, "none"), (4, "none"), (4, "relative"), (4, "absolute")]}


def cells(fast):
    cells = [{"student": student, "window": window, "sink": sink}
             for student, memories in ASKED.items() for window, sink in memories]
    return cells[:1] + cells[-1:] if fast else cells


def run_of(student, seed, fast):
    """The run that has a student."""
    run = trained(settings_of("toy", seed, fast), RECIPE)
    if not student.startswith("salt,"):
        return run
    return trained(beside(run, settings_of("toy_short_memory", seed, fast, **SHORT), RECIPE[:-1]), ("salt",))


def measure(cell, seeds, fast):
    frames, world, stage = FRAMES[:2] if fast else FRAMES, WORLDS["toy"], cell["student"].partition(",")[0]
    memory = dict(window=frames[-1] if cell["window"] == "all" else cell["window"], sink=int(cell["sink"] != "none"),
                  relative=cell["sink"] == "relative")
    labels, rows = world.draw_labels(4 if fast else CLIPS, frames[-1], generator(EVALUATE, 1, 6)), []
    steps = 2 if fast or STAGES[stage].few_step else TEACHER_STEPS
    runs = [run_of(cell["student"], seed, fast) for seed in seeds]
    made = [clips(run, stage, [(frames[-1], steps)], labels, **memory) for run in runs]
    for frame in frames:
        found = [world.measure(x[:, frame - 4 : frame], labels) for x in made]
        rows.append({"quantity": "render_error", "frame": frame, "measured": [of["render_error"] for of in found]})
        rows += [{"quantity": "at_the_end", "of": f"{word} at {frame}", "measured": [of[name] for of in found]}
                 for word, name in METRICS.items() if frame in (frames[0], frames[-1])]
    return [cell | row | {"predicted": None} for row in rows]
