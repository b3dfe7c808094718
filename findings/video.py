"""Affine students of autoregressive videos, trained by the project's losses on their own rollouts, measured exactly.

The world: 8 frames of 64 independent channels, each frame N(M, S), the correlation of neighbours .9; so given a frame
the next is N(M + .9 (x - M), (1 - .9^2) S). Without a condition M is itself random, N(0, M^2). The teacher is
bidirectional, exact, and guided with weight w. The student is causal, and affine at each timestep t_k,

    v(x, t_k) = a_k x + c_k past + b_k               past: the frame before; the first frame has its own a and b

so that a frame is h past + k + N(0, var) by any solver in any number of steps, and clips are Gaussian. Its rollouts are
those of train.salt: K and an exit step for all frames are drawn anew for each. So what it makes is a mixture of one
Gaussian for each (K, exit), and the critic is exact, too. Changes of a, b and c are linear in t: timesteps share what
they learn, as those of a network do.

Every seed has a generator of its own, and its own K, exits, triples and noise. All are trained side by side: a mean
over all samples, times the number of seeds, gives each seed the gradient of its own mean, and Adam is elementwise.
"""

from itertools import product
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from dmd import dmd_loss, score_times
from findings.affine import BETAS, CHANNELS, FORMS, LR, MEAN, SCORE_SHIFT, VARIANCE, levels_of
from findings.gaussian import perfect_slope, student
from flowmap import guided, intervals, per_frame, schedule
from rollout import grids, stream
from sc_loss import draw_triple, sc_loss

RHO, FRAMES, SHIFT = 0.9, 8, 5.0
BATCH, UPDATES = 8, 300
GRID = schedule(8, SHIFT).double()
LEVEL = {t: level for level, t in enumerate(GRID.tolist())}
APART = (torch.arange(FRAMES)[:, None] - torch.arange(FRAMES)).abs()
DATA = torch.full((FRAMES,), MEAN, dtype=torch.float64), VARIANCE * RHO ** APART.double()  # mean, covariance of clips
MARGINAL = 0 * DATA[0], DATA[1] + MEAN**2  # without a condition


def exact_net(means: Tensor, covariances: Tensor, shares: Tensor):
    """E[eps - x_0 | x_t = x] as a network, for clips that come from one of n Gaussians, the same for all channels.

    means `s n f`, covariances `s n f f`: of s seeds; shares `n`. The network takes x `b f c 1 1`, samples of the first
    seed first, and t `b f`, one timestep for a clip."""
    values, basis = torch.linalg.eigh(covariances)
    values, basis, means = values[:, None], basis[:, None], means[:, None, ..., None]  # (s 1 n f), (.. f f), (.. f 1)

    def net(x, t, text=None):
        flat = x.reshape(len(means), -1, 1, *x.shape[1:3])  # (s b 1 f c)
        t = t[:, 0].reshape(len(means), -1, 1, 1)
        z = basis.mT @ (flat - (1 - t[..., None]) * means)  # (s b n f c), frames independent
        spread = (1 - t) ** 2 * values + t**2
        fit = shares.log() - (z.square().sum(-1) / spread + x.shape[2] * spread.log()).sum(-1) / 2
        v = basis @ (((t - (1 - t) * values) / spread)[..., None] * z) - means  # eps = t z / spread, less x_0
        return (fit.softmax(-1)[..., None, None] * v).sum(2).reshape(x.shape)

    return net


def exact_teacher(w: float):
    """The guided bidirectional teacher as a network."""
    inside, outside = (exact_net(mean[None, None], cov[None, None], torch.ones(1)) for mean, cov in (DATA, MARGINAL))
    return lambda x, t, text=None: inside(x, t) if w == 1 else guided(inside(x, t), outside(x, t), w)


class Student:
    """params `2 K 3`: (a, c, b) at each timestep of GRID, for the first frame and for the others. It keeps the contract
    of model.py in rollouts; its cache holds the last frame."""

    def __init__(self, params: Tensor):
        self.params = params

    def new_cache(self):
        return SimpleNamespace(past=None, next_frame=0)

    def append(self, cache, x0, text=None):
        cache.past, cache.next_frame = x0[:, -1:], cache.next_frame + x0.shape[1]

    def __call__(self, x, t, text=None, *, cache, clean=None):
        if clean is not None:
            self.append(cache, clean)
        a, c, b = self.params[int(cache.past is not None), LEVEL[t[0, 0].item()]]
        return a * x + b if cache.past is None else a * x + c * cache.past + b


def params_of(slope) -> Tensor:
    """`2 K 3` of the student whose jumps have a slope of gaussian.py, given the past. Its mean is right."""
    def of_frame(variance, kept):
        ab = torch.tensor([student(slope, 1.0, variance**0.5, t) for t in GRID.tolist()], dtype=torch.float64)
        a, b = ab.T  # for data of mean 1; here the mean is M + kept (past - M)
        return torch.stack([a, kept * b, (1 - kept) * MEAN * b], 1)

    return torch.stack([of_frame(VARIANCE, 0.0), of_frame((1 - RHO**2) * VARIANCE, RHO)])


@torch.no_grad()
def frame_laws(params: Tensor, path: Tensor, solver: str = "cm") -> Tensor:
    """How students params `s 2 K 3` make a frame, h past + k + N(0, var): (h, k, var) after each step of a path of
    timesteps of GRID, `len(path) 3 s 2`. By CM that is the x_0 of each exit, by Euler the state."""
    k = torch.zeros(params.shape[:2]).double()
    h, var, laws = k, k + 1, []
    for (t, s), (a, c, b) in zip(intervals(path), params[:, :, levels_of(path, GRID)].permute(2, 3, 0, 1)):
        length = t if solver == "cm" else t - s
        h, k, var = h - length * (a * h + c), k - length * (a * k + b), (1 - length * a) ** 2 * var
        laws.append(torch.stack([h, k, var]))
        if solver == "cm":
            h, k, var = (1 - s) * h, (1 - s) * k, (1 - s) ** 2 * var + s**2
    return torch.stack(laws)


def clip_law(first: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `... f` and covariance `... f f` of clips whose frames have the laws of frame_laws, `3 ... 2` each."""
    (_, k, var), (h, k_later, var_later) = first[..., 0], others[..., 1]
    means, variances = [k], [var]
    for _ in range(FRAMES - 1):
        means.append(h * means[-1] + k_later)
        variances.append(h**2 * variances[-1] + var_later)
    earlier = torch.minimum(torch.arange(FRAMES)[:, None], torch.arange(FRAMES))
    return torch.stack(means, -1), torch.stack(variances, -1)[..., earlier] * h[..., None, None] ** APART


def sampled_law(params: Tensor, steps: int, solver: str, first_steps: int) -> tuple[Tensor, Tensor]:
    """The same of clips made in `steps` steps."""
    return clip_law(*(frame_laws(params, path, solver)[-1] for path in reversed(grids(steps, SHIFT, first_steps))))


def exits_of(steps: int, first_steps: int) -> list[tuple[int, int]]:
    """Exit steps (first frame, others), all equally likely: a first frame with more steps has an exit of its own."""
    own = product(range(first_steps), range(steps))
    return list(own) if steps < first_steps else [(e, e) for e in range(steps)]


def rollout_laws(params: Tensor, lengths: dict[int, float], first_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means `s n f`, covariances `s n f f` and shares `n` of all rollouts; lengths: number of steps -> probability."""
    first, others, shares = [], [], []
    laws = {steps: frame_laws(params, schedule(steps, SHIFT)) for steps in {*lengths, first_steps}}
    for steps, probability in lengths.items():
        exits = exits_of(steps, first_steps)
        first += [laws[max(steps, first_steps)][e] for e, _ in exits]
        others += [laws[steps][e] for _, e in exits]
        shares += [probability / len(exits)] * len(exits)
    means, covariances = clip_law(torch.stack(first, 2), torch.stack(others, 2))
    return means, covariances, torch.tensor(shares, dtype=torch.float64)


def kl(law: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """KL divergence of Gaussians, in nats for each channel. Means `... f`, covariances `... f f`."""
    return kl_divergence(*(MultivariateNormal(*of) for of in (law, other)))


def train(seeds, lengths: dict[int, float], *, guidance=1.0, lambda_sc=0.0, sc_share=1.0, first_steps=1,
          start=perfect_slope, updates=UPDATES) -> Tensor:
    """Salt's training on rollouts, without alignment; returns `s 2 K 3`.

    lengths: number of steps -> probability. L_SC acts on a share sc_share of the rollouts of the largest number, tm
    from its grid and te from that of half as many steps, as in train.salt. start: a slope of gaussian.py.
    """
    generators, longest = [torch.Generator().manual_seed(seed) for seed in seeds], max(lengths)
    train_grid, infer_grid = schedule(longest, SHIFT), schedule(max(1, longest // 2), SHIFT)
    begin, functions = params_of(start), FORMS["line"](GRID)[0].double()
    weights = torch.zeros(len(generators), 2, functions.shape[1], 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=LR, betas=BETAS)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: min(1.0, 2 * (1 - update / updates)))
    teacher, probabilities = exact_teacher(guidance), torch.tensor(list(lengths.values()))

    def normal(g, frames):
        return torch.randn(BATCH, frames, CHANNELS, 1, 1, generator=g, dtype=torch.float64)

    def rollout(net, g):
        """A clip, and L_SC of its frames that exit at ts."""
        steps = list(lengths)[int(torch.multinomial(probabilities, 1, generator=g))]
        exits, triple, l_sc = exits_of(steps, first_steps), None, []
        first_exit, exit_step = exits[int(torch.randint(len(exits), (), generator=g))]
        if lambda_sc > 0 and steps == longest and torch.rand((), generator=g) < sc_share:
            ts = train_grid[exit_step].item()
            ends = draw_triple(ts, train_grid, infer_grid, g)                                              # Salt Eq. 9
            triple = ends and (ts, *ends)
        grid, first_grid = grids(steps, SHIFT, first_steps)
        chunks = []
        for chunk in stream(net, lambda i, k: normal(g, 1), None, grid, num_chunks=FRAMES, first_grid=first_grid,
                            exit_step=exit_step, first_exit=first_exit):
            chunks.append(chunk.x0)
            if triple and chunk.t == triple[0]:
                l_sc.append(sc_loss(lambda x, t, cache=chunk.cache: net(x, per_frame(t, x), cache=cache), chunk.x_t,
                                    chunk.v, *triple)[0])                                                  # Salt Eq. 8
        return torch.cat(chunks, 1), sum(l_sc) / FRAMES

    for _ in range(updates):
        params = begin + functions @ weights
        x0, l_sc = zip(*(rollout(Student(of_seed), g) for of_seed, g in zip(params, generators)))
        t = torch.cat([score_times(BATCH, FRAMES, SCORE_SHIFT, g).double() for g in generators])
        eps = torch.cat([normal(g, FRAMES) for g in generators])
        critic = exact_net(*rollout_laws(params.detach(), lengths, first_steps))
        loss = len(generators) * dmd_loss(torch.cat(x0), None, critic, teacher, t, eps)[0] + lambda_sc * sum(l_sc)
        optimizer.zero_grad()
        loss.backward()                                                                                   # Salt Eq. 13
        optimizer.step()
        decay.step()
    return (begin + functions @ weights).detach()
