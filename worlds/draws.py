"""Random numbers that are functions of whole numbers, never of what was drawn before.

So a stopped run resumes as if it had never stopped, methods of one hyperparameter group meet the same noise, and
neither the number of ranks nor that of micro-batches changes what is drawn: what is drawn for the whole batch is drawn
whole, and then a slice of it is used; sample i of the batch has a generator of its own.
"""

import numpy as np
import torch
from torch import Tensor

from flowmap import Condition

# which settings a stage reads, --GROUP-steps, --GROUP-lr, ...: its hyperparameter group
GROUPS = ("bidirectional", "teacher_forcing", "trajectory", "dmd")

# what a draw is for
STEER, DROP, PROMPTS, NOISE, RENOISE, CLIPS, WORLD, EVALUATE, TRIPLE, SHORTCUT, FIRST_EXIT, ROWS = range(12)


def generator(*key: int) -> torch.Generator:
    """A random generator that is a function of whole numbers only, e.g. (seed, step, index in the global batch)."""
    (state,) = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)  # (a, b) is not (a, b, 0)
    return torch.Generator().manual_seed(int(state) >> 1)


def noises(indices, shape, *key: int) -> Tensor:
    """Standard normal noise `b *shape`, each sample from its own generator (*key, index)."""
    return torch.stack([torch.randn(shape, generator=generator(*key, i)) for i in indices])


class Draw:
    """All that is random in one pass over a slice of the batch, in update `step` of a stage.

    which: 0 for the student's own update, 1, 2, ... for the critic's updates that come before it. `g` is the generator
    of draws that are made once for the batch and steer all ranks alike: K, exit steps, timesteps, which losses. They
    come one after the other, so their order is part of the result. Every other draw has a generator of its own.
    """

    def __init__(self, cfg, source, group: str, step: int, batch_slice: slice, which: int = 0):
        self.cfg, self.source, self.group, self.step = cfg, source, group, step
        self.batch_slice, self.which = batch_slice, which
        self.g = self.generator(STEER)

    def generator(self, purpose: int) -> torch.Generator:
        return generator(purpose, self.cfg.seed, GROUPS.index(self.group), self.step, self.which)

    def mine(self, x: Tensor) -> Tensor:
        """The slice of this pass of what was drawn for the whole batch, on the device."""
        return x[self.batch_slice].to(self.cfg.device)

    def integer(self, n: int) -> int:
        """From 0 to n - 1."""
        return int(torch.randint(n, (), generator=self.g))

    def coin(self, probability: float) -> bool:
        return bool(torch.rand((), generator=self.g) < probability)

    def noise(self, *shape: int, purpose: int = NOISE) -> Tensor:
        """Standard normal noise `b *shape`."""
        key = purpose, self.cfg.seed, GROUPS.index(self.group), self.step, self.which
        return noises(range(self.cfg.batch)[self.batch_slice], shape, *key).to(self.cfg.device)

    def noise_like(self, x: Tensor, purpose: int = NOISE) -> Tensor:
        return self.noise(*x.shape[1:], purpose=purpose)

    def positions(self) -> range:
        """Of the samples of this pass, counted over all updates, the critic's among them."""
        update = self.step
        if self.group == "dmd":
            update = self.step * (1 + self.cfg.critic_steps) + self.which
        return range(update * self.cfg.batch, (update + 1) * self.cfg.batch)[self.batch_slice]

    def clips(self):
        """Clips x0 `b f c h w` and what is told of them. Some words are replaced by the empty prompt where guidance is
        learned: a student of DMD is sampled without. Of some clips, drawn apart from these, the rows are zeros."""
        x0, text = self.source.clips(self.positions(), CLIPS, self.cfg.seed, GROUPS.index(self.group))
        x0, text = x0.to(self.cfg.device), text.to(self.cfg.device)
        dropout = 0 if self.group == "dmd" else self.cfg.prompt_dropout
        if dropout > 0:
            kept = self.mine(torch.rand(self.cfg.batch, 1, 1, generator=self.generator(DROP)) >= dropout)
            text = self.source.with_empty_words(text, kept)
        if self.cfg.row_dropout > 0:
            kept = self.mine(torch.rand(self.cfg.batch, 1, 1, generator=self.generator(ROWS)) >= self.cfg.row_dropout)
            text = Condition(text.words, text.rows * kept)
        return x0, text

    def prompts(self):
        """What is told of clips that are still to be made: a rollout needs no video."""
        return self.source.prompts(self).to(self.cfg.device)
