"""The affine world: Gaussian data, on which affine few-step students are trained by the project's own losses and
measured exactly.

The data have 64 independent channels, N(M, S) for the one condition at hand and N(0, S + M^2) without a condition. The
teacher is exact, and guided with weight w: v_u + w (v_c - v_u). The student is affine at each timestep t_k of its grid,

    v(x, t_k) = a_k x + b_k

and starts as a perfect consistency student of the unguided data. Everything that it makes is Gaussian, so the critic
is exact, too, and the mean and variance of its samples are computed: the only noise is that of training.

What an experiment chooses (arguments of `train`):

    own_states   inputs are the states of the student's own CM path (backward simulation), or noised real data
    pooled       the critic knows the mixture of what all timesteps make, as a critic without a level does, or the law
                 of the level that the sample comes from
    form         what the timesteps share: nothing ("free"), a change of a and of b that is linear in t ("line"), or one
                 change of b and no change of a ("shift"), the smallest student whose timesteps share something
    lambda_sc    weight of L_SC; `through` as in sc_loss.py

As in baselines/whole_clip.py every sample draws its own timestep. All seeds are trained side by side: parameters
`seeds K 2`, samples `b 1 c 1 1` with those of the first seed first, and every seed has a generator of its own. A mean
over all samples, times the number of seeds, gives each seed the gradient of its own mean, and Adam is elementwise.
"""

import torch
from torch import Tensor

from baselines.whole_clip import sc_dmd_loss
from dmd import score_times
from findings.gaussian import perfect_slope, student
from flowmap import add_noise, expand_like, guided, intervals, renoise, schedule
from sc_loss import draw_triples

MEAN, VARIANCE = 0.4, 0.84  # the marginal is N(0, 1)
CHANNELS, BATCH = 64, 16
LR, BETAS = 0.02, (0.0, 0.999)  # constant for half of the updates, then linear to 0
SCORE_SHIFT = 5.0
UPDATES = 400  # at least; a free student has 100 for each of its timesteps, since only 1 in K samples teaches it
FORMS = {"free": lambda grid: (torch.eye(len(grid)), (1.0, 1.0)),  # functions of t `K n` to combine, for a and for b
         "line": lambda grid: (torch.stack([torch.ones(len(grid)), 2 * grid - 1], 1), (1.0, 1.0)),
         "shift": lambda grid: (torch.ones(len(grid), 1), (0.0, 1.0))}


def mixture_velocity(means: Tensor, variances: Tensor, x: Tensor, t) -> Tensor:
    """E[eps - x_0 | x_t = x] for samples that come from one of n laws, equally often. means, variances: `b n` or `n`,
    the same for all channels; x `b 1 c 1 1`; t as in flowmap.py."""
    m, var, flat = means[..., None], variances[..., None], x.flatten(1)[:, None]
    t = expand_like(t, x).flatten()[:, None, None]
    spread, gap = (1 - t) ** 2 * var + t**2, flat - (1 - t) * m  # (b n 1), (b n c)
    share = (-gap.square() / (2 * spread) - spread.log() / 2).sum(-1, keepdim=True).softmax(1)
    x0 = (share * (m + (1 - t) * var / spread * gap)).sum(1, keepdim=True)
    return ((flat - x0) / t).reshape(x.shape)


def exact_teacher(mean: float, variance: float, w: float):
    """The guided teacher as a network."""
    inside, outside = torch.tensor([[[mean], [variance]], [[0.0], [variance + mean**2]]], dtype=torch.float64)
    return lambda x, t, text=None: guided(mixture_velocity(*inside, x, t), mixture_velocity(*outside, x, t), w)


def exact_critic(means: Tensor, variances: Tensor, level: Tensor | None):
    """The critic as a network; means, variances `seeds K` of the exits. level `b`: the exit of each sample, or None for
    a critic that is not told."""
    def net(x, t, text=None):
        laws = [of_seeds.repeat_interleave(len(x) // len(means), 0) for of_seeds in (means, variances)]  # (b K)
        if level is not None:
            laws = [law.gather(1, level[:, None]) for law in laws]  # (b 1)
        return mixture_velocity(*laws, x, t)
    return net


def levels_of(t, grid: Tensor) -> Tensor:
    """The indices in grid of timesteps t, a float or `b`. ValueError where one is not there."""
    distance, level = (torch.as_tensor(t, dtype=grid.dtype).reshape(-1, 1) - grid).abs().min(1)
    if distance.max() > 1e-6:
        raise ValueError(f"got a timestep that is not in {grid.tolist()}: {t}")
    return level


def affine_velocity(params: Tensor, grid: Tensor):
    """velocity(x, t) of the students params `seeds K 2`: x `b 1 c 1 1`, t a float or `b`."""
    def velocity(x, t, text=None):
        seed = torch.arange(len(params)).repeat_interleave(len(x) // len(params))
        a, b = params[seed, levels_of(t, grid)].unbind(-1)
        return expand_like(a, x) * x + expand_like(b, x)
    return velocity


@torch.no_grad()
def own_inputs(velocity, noise: Tensor, grid: Tensor, level: Tensor) -> Tensor:
    """Backward simulation, with an exit of its own for each sample: the state at grid[level] of the CM path from noise
    `b K 1 c 1 1`."""
    states = [noise[:, 0]]
    for k, (t, s) in enumerate(intervals(grid)):
        if s > 0:
            states.append(renoise(states[-1], velocity(states[-1], t), t, s, noise[:, k + 1]))
    return torch.stack(states, 1)[torch.arange(len(noise)), level]


@torch.no_grad()
def exit_laws(params: Tensor, grid: Tensor, mean: float, variance: float, own_states: bool) -> tuple[Tensor, Tensor]:
    """Means and variances `seeds K` of the x_0 that each timestep makes of its inputs."""
    m, v, laws = torch.zeros(len(params)).double(), torch.ones(len(params)).double(), []
    for (t, s), (a, b) in zip(intervals(grid), params.permute(1, 2, 0)):
        if not own_states:
            m, v = (1 - t) * mean, (1 - t) ** 2 * variance + t**2
        laws.append(((1 - t * a) * m - t * b, (1 - t * a) ** 2 * v))
        m, v = (1 - s) * laws[-1][0], (1 - s) ** 2 * laws[-1][1] + s**2
    means, variances = zip(*laws)
    return torch.stack(means, 1), torch.stack(variances, 1)


@torch.no_grad()
def sample_law(params: Tensor, grid: Tensor, path: Tensor, solver: str) -> tuple[Tensor, Tensor]:
    """Mean and variance `seeds` of what a solver, euler or cm, makes over a path of timesteps of grid."""
    params = params[:, levels_of(path, grid)]
    if solver == "cm":
        means, variances = exit_laws(params, path, 0.0, 1.0, own_states=True)
        return means[:, -1], variances[:, -1]
    m, v = torch.zeros(len(params)).double(), torch.ones(len(params)).double()
    for (t, s), (a, b) in zip(intervals(path), params.permute(1, 2, 0)):
        m, v = m - (t - s) * (a * m + b), (1 - (t - s) * a) ** 2 * v
    return m, v


def train(seeds, steps: int, *, shift=5.0, guidance=1.0, mean=MEAN, variance=VARIANCE, start=perfect_slope,
          form="free", own_states=False, pooled=True, lambda_sc=0.0, through="both", updates=None) -> Tensor:
    """Trains students on the grid of `steps` timesteps, one for each seed; returns their parameters `seeds K 2`.

    mean, variance: of the data. start: the slope they start with, of gaussian.py. updates: UPDATES says how many if
    None. Everything else: see above.
    """
    generators, grid = [torch.Generator().manual_seed(seed) for seed in seeds], schedule(steps, shift).double()
    begin = torch.tensor([student(start, mean, variance**0.5, t) for t in grid.tolist()], dtype=torch.float64)
    functions, which = (torch.as_tensor(x).double() for x in FORMS[form](grid))
    weights = torch.zeros(len(generators), functions.shape[1], 2, dtype=torch.float64, requires_grad=True)
    updates = updates or max(UPDATES, 100 * steps if form == "free" else 0)
    optimizer = torch.optim.Adam([weights], lr=LR, betas=BETAS)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: min(1.0, 2 * (1 - update / updates)))
    teacher = exact_teacher(mean, variance, guidance)

    def draw(one):
        return torch.cat([one(g) for g in generators])

    def normal(*axes):
        return draw(lambda g: torch.randn(BATCH, *axes, 1, CHANNELS, 1, 1, generator=g, dtype=torch.float64))

    for _ in range(updates):
        params = begin + which * (functions @ weights)
        velocity = affine_velocity(params, grid)
        level = draw(lambda g: torch.randint(steps, (BATCH,), generator=g))
        ts = grid[level]
        if own_states:
            x_ts = own_inputs(velocity, normal(steps), grid, level)
        else:
            x_ts = add_noise(mean + variance**0.5 * normal(), normal(), ts)
        critic = exact_critic(*exit_laws(params, grid, mean, variance, own_states), None if pooled else level)
        score_t = draw(lambda g: score_times(BATCH, 1, SCORE_SHIFT, g))
        eps, tm, te = normal(), ts, ts
        if lambda_sc > 0:
            triples = [draw_triples(t, grid, grid[::2], g) for t, g in zip(ts.split(BATCH), generators)]   # Salt Eq. 9
            tm, te = (torch.cat(times) for times in zip(*triples))
        loss, _ = sc_dmd_loss(velocity, critic, teacher, x_ts, None, ts, tm, te, score_t, eps, lambda_sc,
                              through)                                                                   # Salt Eq. 10
        optimizer.zero_grad()
        (len(generators) * loss).backward()
        optimizer.step()
        decay.step()
    return (begin + which * (functions @ weights)).detach()
