"""The ring: points in the plane whose score, guided or not, is known exactly, and few-step students of it.

Data: bumps N(mu_j, width^2 I) around a ring, of mean 0 and variance 1 a coordinate; a label owns one bump or several
neighbours. The teacher is the exact velocity of this world, guided by w, so whatever a student gets wrong is its own.
Where a label owns one bump and w = 1, its data are one Gaussian, and gaussian.py knows what the perfect student does.

Students, critics and the network that they start from are MLPs, the same one for every seed, side by side in one batch:
a clip is `1 2 1 1`, one frame of one pixel of two channels; a batch `(seeds n) 1 2 1 1` holds n points of every seed,
and its text is their labels `(seeds n)`. Losses are the project's: baselines.whole_clip.sc_dmd_loss (dmd.dmd_loss and
sc_loss.sc_loss), dmd.critic_loss, baselines.consistency.shortcut_loss, flowmap.flow_matching_loss.

The settings were chosen once for all students and regimes, on other seeds; scores are compared at timesteps of shift 1
whatever the student's grid. Each seed has draws of its own, but for what steers all alike: the exit of backward
simulation, the start and stride of shortcuts. A training triple of L_SC is drawn for each timestep and update, not for
each point.
"""

import copy
import math
import zlib
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.consistency import draw_shortcut, shortcut_loss
from baselines.whole_clip import backward_simulation, sc_dmd_loss
from cluster.files import read_tensors, write_tensors
from config import Config
from dmd import critic_loss, dmd_loss, score_times
from findings import gaussian, markdown
from flowmap import add_noise, flow_matching_loss, guided, per_frame, sample, schedule, to_x0
from sc_loss import draw_triples, path_defects
from stage import lr_factor
from worlds.draws import generator

FOLDER = Path("runs/findings")  # where trained students are kept, until one of these files is changed
CODE = zlib.crc32(b"".join((Path(__file__).parents[1] / f"{name}.py").read_bytes() for name in (
    "findings/mixture", "baselines/whole_clip", "baselines/consistency", "dmd", "sc_loss", "flowmap")))
WEIGHTS, FLOW_MATCHING, DISTILLATION, EVALUATION = range(4)  # what random numbers are for
START_UPDATES, N_START, START_LR, START_EMA, NO_LABEL = 1500, 128, 3e-3, 0.995, 0.1  # flow matching
N_BATCH, LR, CRITIC_LR, CRITIC_STEPS, EMA = 64, 5e-4, 2e-3, 2, 0.95  # students; critic updates come before each
WIDTH, DEPTH, SHORTCUT_GRID = 64, 3, 32
N_EVAL, MOST_STEPS = 4000, 16  # points of a label that are measured; the finest grid of all


@dataclass(frozen=True)
class Ring:
    bumps: int = 4
    labels: int = 4
    width: float = 0.5

    @cached_property
    def centres(self) -> Tensor:
        """`bumps 2`: on the circle that gives every coordinate variance 1."""
        angle = 2 * math.pi * torch.arange(self.bumps) / self.bumps
        return torch.stack([angle.cos(), angle.sin()], 1) * math.sqrt(2 * (1 - self.width**2))

    @cached_property
    def shares(self) -> Tensor:
        """`labels + 1, bumps`: how a label's points are spread over bumps; the last row is of no label."""
        own = F.one_hot(torch.arange(self.bumps) * self.labels // self.bumps, self.labels).T
        own = torch.cat([own.float(), torch.ones(1, self.bumps)])
        return own / own.sum(1, keepdim=True)

    def draw(self, text: Tensor, g) -> Tensor:
        """Data with these labels `b`: `b 1 2 1 1`."""
        bump = torch.multinomial(self.shares[text], 1, generator=g)[:, 0]
        return clips(self.centres[bump] + self.width * torch.randn(len(text), 2, generator=g))

    def velocity(self, x, t, text) -> Tensor:
        """E[eps - x_0 | x_t] of points with labels `b`, exact: the mean over which bump the point comes from."""
        y, t = points(x), per_frame(t, x)
        var = ((1 - t) * self.width) ** 2 + t**2
        gap = y[:, None] - (1 - t)[..., None] * self.centres
        which = (self.shares[text].log() - gap.square().sum(-1) / (2 * var)).softmax(-1)
        v = ((t - (1 - t) * self.width**2) / var)[..., None] * gap - self.centres  # of each bump
        return clips((which[..., None] * v).sum(1))

    def perfect_student(self, x, t, text) -> Tensor:
        """A velocity whose jump x - t v gives the data (gaussian.perfect_slope), where a label owns one bump."""
        centre = clips(self.centres[text])
        return (x - centre - gaussian.perfect_slope(self.width, t) * (x - (1 - t) * centre)) / t

    def teacher(self, w: float, velocity=None):
        """Guided velocity as a network: the exact one, or that of another network."""
        velocity = velocity or self.velocity

        def net(x, t, text):
            v = velocity(x, t, text)
            return v if w == 1 else guided(v, velocity(x, t, torch.full_like(text, self.labels)), w)
        return net


def clips(points: Tensor) -> Tensor:
    return points[:, None, :, None, None]


def points(x: Tensor) -> Tensor:
    return x[:, 0, :, 0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Networks: one MLP for each seed

class Nets(nn.Module):
    """net(x, t, text) -> velocity, of a batch `(seeds n) 1 2 1 1`, with labels as text. level `(seeds n)`: which
    timestep of the grid made the point, for a critic that is told; its weights start at 0."""

    def __init__(self, world: Ring, seeds):
        super().__init__()
        self.seeds, self.labels = len(seeds), world.labels
        sizes = [2 + 9 + world.labels + 1, *[WIDTH] * DEPTH, 2]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList(torch.zeros(len(seeds), 1, n) for n in sizes[1:])
        self.level_weight = nn.Parameter(torch.zeros(len(seeds), MOST_STEPS, WIDTH))
        for i, (n_in, n_out) in enumerate(zip(sizes, sizes[1:])):
            size = 0.1 if i == DEPTH else 1
            weight = [torch.randn(n_in, n_out, generator=generator(seed, WEIGHTS, i)) for seed in seeds]
            self.weights.append(torch.stack(weight) * size / n_in**0.5)

    def forward(self, x, t, text, level=None):
        t = per_frame(t, x)
        waves = [f(k * math.pi * t) for k in (0.5, 1, 2, 4) for f in (torch.sin, torch.cos)]
        h = torch.cat([points(x), t, *waves, F.one_hot(text, self.labels + 1).float()], 1)
        h = h.unflatten(0, (self.seeds, -1))
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            h = torch.baddbmm(bias, h if i == 0 else F.silu(h), weight)
            if i == 0 and level is not None:
                h = torch.baddbmm(h, F.one_hot(level, MOST_STEPS).float().unflatten(0, (self.seeds, -1)),
                                  self.level_weight)
        return clips(h.flatten(0, 1))


def optimizer(net):
    return torch.optim.AdamW(net.parameters(), lr=0, betas=(0.0, 0.999), weight_decay=0.01, fused=True)


def descend(opt, loss, seeds, lr):
    """One step. The mean over all seeds, times their number, gives each seed the gradient that it has alone; each has
    its gradient's norm clipped at 1."""
    opt.zero_grad()
    (len(seeds) * loss).backward()
    grads = [p.grad for group in opt.param_groups for p in group["params"] if p.grad is not None]  # each `seeds n m`
    norm = torch.stack([grad.flatten(1).norm(dim=1) for grad in grads]).norm(dim=0)
    for grad in grads:
        grad.mul_((1 / norm).clamp(max=1)[:, None, None])
    for group in opt.param_groups:
        group["lr"] = lr
    opt.step()


def follow(ema, net, update, most):
    decay = min(most, (1 + update) / (10 + update))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


def flow_matching(world: Ring, seeds, updates) -> Nets:
    """What students and critics start from: a diffusion model of the world, averaged."""
    net, gens = Nets(world, seeds), [generator(seed, FLOW_MATCHING) for seed in seeds]
    ema, opt = copy.deepcopy(net), optimizer(net)

    def draw(g):
        text = torch.randint(world.labels, (N_START,), generator=g)
        x0, eps, t = world.draw(text, g), noise(N_START, g), torch.rand(N_START, 1, generator=g)
        return x0, torch.where(torch.rand(N_START, generator=g) < NO_LABEL, world.labels, text), t, eps

    for update in range(updates):
        loss, _ = flow_matching_loss(net, *of_all(draw, gens))
        descend(opt, loss, seeds, START_LR * lr_factor(Config(), update, updates))
        follow(ema, net, update, START_EMA)
    return ema


def noise(n, g, *of) -> Tensor:
    return torch.randn(n, *of, 1, 2, 1, 1, generator=g)


def of_all(draw, gens) -> list[Tensor]:
    """What draw(g) -> tensors gives for each seed, each tensor joined along the batch."""
    return [torch.cat(x) for x in zip(*(draw(g) for g in gens))]


# ---------------------------------------------------------------------------------------------------------------------
# Students

@dataclass(frozen=True)
class Student:
    """grid: how many timesteps DMD trains (0: no DMD). own_states: from backward simulation, not from noised data.
    told: the critic sees which timestep made a point. shortcut: weight of shortcut flow matching on a dense grid. weak:
    the teacher is the network that the student starts from, not the exact velocity."""

    grid: int
    lambda_sc: float = 0.0
    own_states: bool = False
    told: bool = False
    shortcut: float = 0.0
    weak: bool = False


STUDENTS = {
    **{f"DMD-{k}": Student(k) for k in (4, 8, 16)},
    **{f"DMD-{k}, own states": Student(k, own_states=True) for k in (4, 8, 16)},
    **{f"SC-DMD {lam:g}": Student(8, lambda_sc=lam) for lam in (0.2, 0.4, 1.0)},
    "DMD-8, critic told": Student(8, told=True),
    "SCFM": Student(0, shortcut=1.0),
    **{f"DMD-4 + {weight:g} SCFM": Student(4, shortcut=weight) for weight in (0.1, 1.0, 10.0)},
}
STUDENTS |= {f"{name}, weak teacher": replace(student, weak=True) for name, student in STUDENTS.items()}


def distil(world: Ring, start: Nets, student: Student, seeds, shift, guidance, updates) -> Nets:
    """Train a student of the guided teacher; its averaged weights."""
    net, ema, critic = (copy.deepcopy(start) for _ in range(3))
    opt, critic_opt = optimizer(net), optimizer(critic)
    teacher = world.teacher(guidance, start if student.weak else None)
    gens, shared = [generator(seed, DISTILLATION) for seed in seeds], generator(DISTILLATION)
    grid, dense = schedule(max(1, student.grid), shift), schedule(SHORTCUT_GRID, shift)

    def noised_data(g):
        text, level = (torch.randint(n, (N_BATCH,), generator=g) for n in (world.labels, len(grid)))
        return add_noise(world.draw(text, g), noise(N_BATCH, g), grid[level]), text, grid[level], level

    def triples(g):  # of every timestep of the grid one
        return draw_triples(grid, grid, grid[::2], g)                                                       # Salt Eq. 9

    def own_noise(g):
        return torch.randint(world.labels, (N_BATCH,), generator=g), noise(N_BATCH, g, len(grid))

    def score_draw(g):
        return score_times(N_BATCH, 1, 1.0, g), noise(N_BATCH, g)

    def own_clips():
        text, z = of_all(own_noise, gens)
        exit_step = int(torch.randint(len(grid), (), generator=shared))
        return backward_simulation(net, z, grid, exit_step, text), text, torch.full_like(text, exit_step)

    def seen_by_critic(level):
        return (lambda x, t, text: critic(x, t, text, level)) if student.told else critic

    @torch.no_grad()
    def generated():
        if student.own_states:
            return own_clips()
        x_t, text, t, level = of_all(noised_data, gens)
        return to_x0(x_t, net(x_t, t, text), t), text, level

    def dmd_part():
        t, eps = of_all(score_draw, gens)
        if student.own_states:
            x0, text, level = own_clips()
            return dmd_loss(x0, text, seen_by_critic(level), teacher, t, eps)[0]
        x_ts, text, ts, level = of_all(noised_data, gens)
        tm = te = ts
        if student.lambda_sc > 0:
            mine = level + len(grid) * torch.arange(len(seeds)).repeat_interleave(N_BATCH)
            tm, te = (x[mine] for x in of_all(triples, gens))
        return sc_dmd_loss(net, seen_by_critic(level), teacher, x_ts, text, ts, tm, te, t, eps, student.lambda_sc)[0]

    def shortcut_part():
        first, stride = draw_shortcut(N_BATCH, 1, SHORTCUT_GRID, shared)
        text, x0, eps = of_all(lambda g: (
            text := torch.randint(world.labels, (N_BATCH,), generator=g), world.draw(text, g), noise(N_BATCH, g)), gens)
        return shortcut_loss(net, ema, teacher, x0, text, dense, first.repeat(len(seeds), 1), stride, eps)[0]

    for update in range(updates):
        factor = lr_factor(Config(), update, updates)
        for _ in range(CRITIC_STEPS if student.grid else 0):
            x0, text, level = generated()
            loss, _ = critic_loss(seen_by_critic(level), x0, text, *of_all(score_draw, gens))
            descend(critic_opt, loss, seeds, CRITIC_LR * factor)
        loss = dmd_part() if student.grid else 0
        if student.shortcut:
            loss = loss + student.shortcut * shortcut_part()
        descend(opt, loss, seeds, LR * factor)
        follow(ema, net, update, EMA)
    return ema


def trained(name: str, seeds, shift: float, guidance: float, updates: int, world=Ring(), start_updates=START_UPDATES):
    """A student of STUDENTS, or "start", from FOLDER if it was trained before."""
    of_start = dict(world=asdict(world), seeds=list(seeds), updates=start_updates, code=CODE)
    settings = of_start if name == "start" else dict(of_start, student=asdict(STUDENTS[name]), shift=shift,
                                                     guidance=guidance, distilled=updates)
    words = [name, f"start {start_updates}", f"seeds {seeds[0]} to {seeds[-1]}"]
    if name != "start":
        words += [f"shift {shift:g}", f"guidance {guidance:g}", f"updates {updates}"]
    path = FOLDER / f"ring of {world.bumps}, {world.labels} labels" / f"{', '.join(words)}.safetensors"
    net = Nets(world, seeds)
    if path.is_file():
        weights, about = read_tensors(path)
        if about.get("settings") == settings:
            net.load_state_dict(weights)
            return net.requires_grad_(False)
    if name == "start":
        net = flow_matching(world, seeds, start_updates)
    else:
        start = trained("start", seeds, shift, guidance, updates, world, start_updates).requires_grad_(True)
        net = distil(world, start, STUDENTS[name], seeds, shift, guidance, updates)
    write_tensors(path, net.state_dict(), {"settings": settings})
    return net.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Regimes

SHIFTS, GUIDANCES, UPDATES = (1.0, 5.0, 12.0), (1.0, 2.0, 4.0), (150, 600, 2400)


def regimes(fast: bool, updates=UPDATES) -> list[dict]:
    """Every combination of timestep shift, guidance of the teacher, and updates of the student; the longest training at
    shift 5 alone."""
    if fast:
        return [{"shift": 5.0, "guidance": 1.0, "updates": 10}]
    return [{"shift": s, "guidance": w, "updates": u} for u in updates for s in SHIFTS for w in GUIDANCES
            if u <= 600 or s == 5.0]


def student_of(name: str, seeds, cell: dict, fast: bool, world=Ring()) -> Nets:
    start_updates = 30 if fast else START_UPDATES
    return trained(name, seeds, cell["shift"], cell["guidance"], cell["updates"], world, start_updates)


def ratio(a: list[float], b: list[float]) -> str:
    """mean a / mean b, and whether a is larger (+) or smaller (-), or neither is known (=): the mean of the differences
    of each seed against three of its standard errors (for five seeds p = .04). No sign for a single seed."""
    text = f"{mean(a) / mean(b):.2f}" if mean(a) < 100 * mean(b) else "over 100"
    if len(a) == 1:
        return text
    difference = [x - y for x, y in zip(a, b)]
    if abs(mean(difference)) <= 3 * stdev(difference) / math.sqrt(len(a)):
        return text + " ="
    return text + (" +" if mean(difference) > 0 else " -")


SIGNS = ("(+ larger, - smaller, by more than three standard errors of the differences seed by seed; = neither. Where "
         "nothing differs, 1 entry in 25 gets a sign all the same)")


def regime_map(rows: list[dict], lines: tuple, compare) -> str:
    """A table in Markdown with a column for each shift and guidance. lines: settings that make a line of the table;
    compare(rows of one entry) -> its text."""
    regimes = list(dict.fromkeys((row["shift"], row["guidance"]) for row in rows))
    head = [*lines, *(f"shift {s:g}, w {w:g}" for s, w in regimes)]
    body = []
    for line in dict.fromkeys(tuple(row[k] for k in lines) for row in rows):
        of_line = [row for row in rows if tuple(row[k] for k in lines) == line]
        body.append([*map(str, line), *(compare([r for r in of_line if (r["shift"], r["guidance"]) == regime])
                                        for regime in regimes)])
    return markdown(head, body)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring. Every student meets the same labels and the same noise; grids nest, so that equal timesteps get equal noise

@lru_cache(maxsize=8)
def evaluation_set(world: Ring, guidance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Labels `b`, noise `b 16 1 2 1 1`, and what the teacher makes of other noise by 100 Heun steps, `labels n 2`."""
    text, g = torch.arange(world.labels).repeat_interleave(N_EVAL), generator(EVALUATION)
    z, other = noise(len(text), g, MOST_STEPS), noise(len(text), g, 1)
    teacher = world.teacher(guidance)
    return text, z, by_label(sample(lambda x, t: teacher(x, t, text), other, schedule(100, 1.0), "heun"))


def by_label(x: Tensor) -> Tensor:
    """`... labels n 2` of clips."""
    return points(x).unflatten(0, (-1, N_EVAL))


@torch.no_grad()
def samples(students, world: Ring, solver: str, steps: int, shift: float) -> Tensor:
    """What every seed's student makes: `seeds labels n 2`. students: Nets, or one velocity (x, t, text)."""
    seeds = getattr(students, "seeds", 1)
    text, z, _ = evaluation_set(world, 1.0)
    text, z = text.repeat(seeds), z[:, :: MOST_STEPS // steps].repeat(seeds, *[1] * 5)
    x = sample(lambda x, t: students(x, t, text), z, schedule(steps, shift), solver)
    return by_label(x).unflatten(0, (seeds, -1))


def error(x: Tensor, world: Ring, guidance: float) -> list[float]:
    """Sliced Wasserstein-2 distance to the teacher's samples: root mean square, over labels and 16 directions, of the
    Wasserstein-2 distance of the projections. One number for each seed. Two sets of perfect samples are .02 apart."""
    true = evaluation_set(world, guidance)[2]
    angle = math.pi * torch.arange(16) / 16
    along = torch.stack([angle.cos(), angle.sin()])
    gap = (x @ along).sort(-2).values - (true @ along).sort(-2).values
    return gap.square().mean((1, 2, 3)).sqrt().tolist()


def contrast(x: Tensor, world: Ring, guidance: float) -> list[float]:
    """Standard deviation within a label over the teacher's."""
    true = evaluation_set(world, guidance)[2]
    return (x.var(-2).mean((1, 2)) / true.var(-2).mean()).sqrt().tolist()


def same_noise(a: Tensor, b: Tensor) -> list[float]:
    """Root mean square distance of points that two numbers of steps make from the same noise."""
    return (a - b).square().sum(-1).mean((1, 2)).sqrt().tolist()


def defects(students, world: Ring, shift: float) -> list[list[float]]:
    """Salt's metric on each interval of the 4-step path, tm from T^(8): a list for each seed. students: Nets, or one
    velocity (x, t, text)."""
    text, z, _ = evaluation_set(world, 1.0)
    each = [one_seed(students, world, i) for i in range(students.seeds)] if isinstance(students, Nets) else [students]
    return [path_defects(lambda x, t, one=one: one(x, t, text), z[:, 0], schedule(4, shift), schedule(8, shift))
            for one in each]


def one_seed(net: Nets, world: Ring, i: int) -> Nets:
    one = Nets(world, [0])
    one.load_state_dict({name: weight[i : i + 1] for name, weight in net.state_dict().items()})
    return one
