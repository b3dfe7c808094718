"""What the papers found, found again in worlds small enough to be exact: one file for each finding, one page for each
in docs/findings/. `python reproduce.py` lists them and runs them.

A finding is a module with

    CLAIM        what the paper says and where, in one line
    ACROSS       the setting along the x axis of the figure and the columns of the table, such as "steps"; or one for
                 each quantity, by its name
    QUANTITIES   what is measured: name -> label of the y axis, with its unit; the figure shows the first
    PANELS       settings (rows, columns) that split the figure into panels; all other settings tell lines apart
    SEEDS        optional: the seeds, where they are not 100 to 104
    RANGE        optional: limits of the figure's y axis, where a line that diverges would hide the others
    SHOWN        optional: settings -> value of the rows that the tables and the figure show
    cells(fast)  -> a list of settings, each a piece of work by itself; fast: few and small ones, to see that it runs
    measure(cell, seeds, fast) -> rows, each a dictionary of its settings (those of ACROSS and PANELS among them) and
                 quantity   one of QUANTITIES
                 measured   a list of numbers, one for each seed
                 predicted  what the exact reference gives, or None where there is none
    summary(rows) -> text in Markdown, optional: a verdict for each regime, computed from the rows

A finding's name stands in FINDINGS of reproduce.py. Its page has five parts, and between <!-- begin --> and <!-- end
--> what `python reproduce.py NAME` prints, with its results in results/findings; a test compares them.

gaussian.py has the closed forms; affine.py, mixture.py, video.py, increments.py and bumps.py the exact worlds in which
students are trained, by the project's own losses; torus.py a world of pixels for train.py, and recipe.py its runs.
"""


def markdown(head: list[str], body: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body])
