"""Worlds in which everything about diffusion is known in closed form, small enough to read. All in float64.

Gaussian   data N(m, S). Its noised law at time t is N((1 - t) m, (1 - t)^2 S + t^2 I); hence scores, velocities, flow
           maps and KL divergences, exactly.
ARWorld    a vector AR(1) process x^i = A x^{i-1} + N(0, Q), the linear-Gaussian video: given the past, the next frame
           is a Gaussian world with mean A x^{i-1}.
Mixture    two bumps on a line: the smallest world with modes to cover or to seek.

As networks they keep the contract of model.py, with one frame of `c = d` channels of 1 x 1 pixels.
"""

import torch

from flowmap import per_frame
from model import Cache


def normals(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sigma_points(d):
    """4 d points whose mean is 0 and whose covariance is I exactly, in two halves (z, eps), each `4d d`: the mean of a
    quadratic function over them is its expectation over normal z and eps."""
    points = (2 * d) ** 0.5 * torch.eye(2 * d, dtype=torch.float64)
    return torch.cat([points, -points]).chunk(2, dim=1)


def video(x):
    """Vectors `b d` or `b f d` as clips `b f d 1 1`."""
    return (x[:, None] if x.ndim == 2 else x)[..., None, None]


def least(loss, shape):
    """The minimum of a quadratic function of a tensor of this shape: one Newton step from 0."""
    zero = torch.zeros(shape, dtype=torch.float64)
    gradient = torch.autograd.functional.jacobian(loss, zero).flatten()
    curvature = torch.autograd.functional.hessian(loss, zero).reshape(zero.numel(), zero.numel())
    return -(torch.linalg.pinv(curvature, hermitian=True, rtol=1e-13) @ gradient).reshape(shape)


class Gaussian:
    """Data N(m, S). x: `... d`; t, s: floats."""

    def __init__(self, mean, cov):
        self.mean, self.cov = mean, cov
        self.eigenvalues, self.basis = torch.linalg.eigh(cov)

    def spread(self, t, power):
        """((1 - t)^2 S + t^2 I)^power."""
        return (self.basis * ((1 - t) ** 2 * self.eigenvalues + t**2) ** power) @ self.basis.T

    def score(self, x, t):
        """grad_x log p_t(x)."""
        return -(x - (1 - t) * self.mean) @ self.spread(t, -1)

    def velocity(self, x, t):
        """E[eps - x_0 | x_t = x]: eps = -t score; x_0 = m + (1 - t) S C_t^-1 (x - (1 - t) m) (Salt Eq. 1)."""
        z = -self.score(x, t)
        return t * z - (self.mean + (1 - t) * z @ self.cov)

    def flow(self, x, t, s):
        """Phi^{t->s} (Salt Eq. 2): take off the mean and the spread of t, put on those of s."""
        return (1 - s) * self.mean + (x - (1 - t) * self.mean) @ self.spread(t, -0.5) @ self.spread(s, 0.5)

    def consistency_velocity(self, x, t):
        """The v for which x_t - t v is the end of the trajectory: a perfect student's."""
        return (x - self.flow(x, t, 0.0)) / t

    def sample(self, n, seed=0):
        return self.mean + normals(n, len(self.mean), seed=seed) @ self.spread(0.0, 0.5)

    def net(self, x, t, text=None):
        """The exact velocity as a network: x `b 1 d 1 1`, one t for all."""
        return self.velocity(x[..., 0, 0], per_frame(t, x)[0, 0].item())[..., None, None]


def kl(p_mean, p_cov, q_mean, q_cov):
    """KL(N(p_mean, p_cov) || N(q_mean, q_cov)), differentiable."""
    inverse, d = torch.linalg.inv(q_cov), len(p_mean)
    gap = q_mean - p_mean
    return 0.5 * ((inverse @ p_cov).trace() + gap @ inverse @ gap - d + torch.logdet(q_cov) - torch.logdet(p_cov))


class ARWorld:
    """x^1 ~ N(0, P), x^i = A x^{i-1} + N(0, Q). As a network it sees the clean past and knows the next frame's law.

    perfect: it returns the velocity that leads to the end of the trajectory in one step (a perfect few-step student),
    not the velocity of the ODE (a perfect teacher).
    """

    def __init__(self, A, Q, P, perfect=False):
        self.A, self.Q, self.P, self.perfect = A, Q, P, perfect

    def given(self, past):
        """The Gaussian world of the next frame; past `b d` or None for the first frame."""
        if past is None:
            return Gaussian(self.A.new_zeros(len(self.A)), self.P)
        return Gaussian(past @ self.A.T, self.Q)

    def sample(self, n, frames, seed=0):
        """Clips `n frames d`."""
        x = [self.given(None).sample(n, seed=1000 * seed)]
        for i in range(1, frames):
            x.append(x[-1] @ self.A.T + normals(n, len(self.A), seed=1000 * seed + i) @ self.given(x[-1]).spread(0, .5))
        return torch.stack(x, 1)

    def __call__(self, x, t, text, *, chunk=1, clean):
        """Teacher forcing, frame by frame: x, clean `b f d 1 1`, t `b f` or a float."""
        t, frames = per_frame(t, x), []
        for i in range(x.shape[1]):
            world = self.given(clean[:, i - 1, :, 0, 0] if i else None)
            law = world.consistency_velocity if self.perfect else world.velocity
            frames.append(law_at(law, x[:, i, :, 0, 0], t[:, i]))
        return video(torch.stack(frames, 1))


def law_at(law, x, t):
    """law(x, t) for times `b` that may differ: one call per time that occurs. A law with a mean per sample is called
    on all samples and its rows picked."""
    out = torch.empty_like(x)
    for time in t.unique():
        out[t == time] = law(x, time.item())[t == time]
    return out


class WindowWorld:
    """A network for rollouts whose next chunk is Gaussian, given the n frames that the cache shows it:

        x^i = offset + sum over the shown frames of weight(r, n) x^r + N(0, Q),   r = 0 the oldest

    the frames of a chunk independent. It uses model.Cache as the transformer does: windows, sinks and commits are the
    real ones. perfect: as in ARWorld.
    """

    def __init__(self, weight, offset, Q, window=None, sink=0, perfect=True):
        self.weight, self.offset, self.Q, self.perfect = weight, offset, Q, perfect
        self.window, self.sink = window, sink

    def new_cache(self):
        return Cache(1, self.window, self.sink)

    def append(self, cache, x0, text):
        tokens = x0.flatten(2)[:, :, None]  # (b f nh=1 dh)
        cache.write([tokens], [tokens], x0.shape[1])

    def __call__(self, x, t, text, *, cache, clean=None):
        if clean is not None:
            self.append(cache, clean, text)
        shown = cache.visible_frames(x.shape[1])[0][: -x.shape[1]]
        past = sum(self.weight(r, len(shown)) * cache.values[0][i][:, 0, 0] for r, i in enumerate(shown))
        t = per_frame(t, x)
        world = Gaussian(self.offset + past, self.Q)
        law = world.consistency_velocity if self.perfect else world.velocity
        return video(torch.stack([law(frame[..., 0, 0], t[0, 0].item()) for frame in x.unbind(1)], 1))

    def moments(self, shown, own):
        """Mean `f d` and covariance `f d f d` of all frames, from the recursion itself.

        shown: for every frame the earlier frames it sees, oldest first; own: the covariance of its own noise.
        """
        frames, d = len(shown), len(self.Q)
        mix, mean = torch.eye(frames, dtype=torch.float64), torch.zeros(frames, d, dtype=torch.float64)
        for i, seen in enumerate(shown):  # x^i = offset + ...: frames as mixtures of the noises, row by row
            weights = [self.weight(r, len(seen)) for r in range(len(seen))]
            mean[i] = self.offset + sum(w * mean[j] for w, j in zip(weights, seen))
            mix[i] += sum(w * mix[j] for w, j in zip(weights, seen))
        return mean, torch.einsum("ik,jk,kde->idje", mix, mix, torch.stack(own))


class Mixture:
    """Bumps N(m_k, width^2) with weights, on the line. One bump is a Gaussian. x: any shape; t > 0: like x, or one."""

    def __init__(self, means, width, weights):
        self.means, self.width = torch.as_tensor(means, dtype=torch.float64), width
        self.weights = torch.as_tensor(weights, dtype=torch.float64)

    def velocity(self, x, t):
        """v = (x - x_0) / t, with x_0 = E[x_0 | x]: the posterior mean of each bump, weighted by its share."""
        t = torch.as_tensor(t, dtype=torch.float64)[..., None]
        gap, var = x[..., None] - (1 - t) * self.means, (1 - t) ** 2 * self.width**2 + t**2
        share = (self.weights.log() - gap**2 / (2 * var)).softmax(-1)
        x0 = (share * (self.means + (1 - t) * self.width**2 / var * gap)).sum(-1)
        return (x - x0) / t[..., 0]

    def net(self, x, t, text=None, **layout):
        return self.velocity(x, per_frame(t, x)[..., None, None, None])
