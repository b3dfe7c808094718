"""Self-rollout: generate a clip chunk by chunk, each conditioned on the chunks the model itself made before.

For every chunk: start from noise, visit the timesteps of a grid with a solver of flowmap.py, reading the past from the
cache; yield the clean chunk; commit it to the cache with one more forward at t = 0. `stream` is a Python generator, so
sampling, playing, evaluation and training all consume the same loop:

    for chunk in stream(net, noise, text, grid, num_chunks=8): show(chunk.x0)

Without gradient a commit costs no forward of its own: it is one forward with the first step of the next chunk, K
forwards per chunk in place of K + 1, with the same numbers.

Training asks for an *exit step* (Self Forcing): every chunk stops at step `exit_step` of the grid and its prediction
x_0 there is the output; only that last forward carries gradient. Over random exit steps each timestep of the grid is
trained behind a history of the student's own. (Not quite that of inference: with an early exit the chunks in the cache
are early predictions too. The last exit step is inference.) A first chunk with a grid of its own has an exit step of
its own, `first_exit`, drawn independently: with K = 1 and 4 first steps it exits at t = 1, .9375, .8333 or .625, while
every other chunk exits at t = 1. While a chunk is being yielded the cache still holds its past and not yet itself, so
the consumer may run further forwards in the chunk's own condition: Salt's self-consistency term does.

Mixed steps (Salt Sec. 3.3): K is drawn anew for every rollout, so the student meets caches of every quality.
With K < 4 the first chunk, which has no past to lean on, still uses 4 steps (CF++ Sec. 4).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flowmap import Condition, intervals, of_frames, per_frame, schedule, solver_step, words_and_rows


@dataclass
class Chunk:
    """One finished chunk and its last forward, v = net(x_t, t, text, cache=cache): x0 = x_t - t v, but for a solver
    that corrects this step (heun). x0, x_t, v `b n c h w`; text as given to the network for this chunk."""

    x0: Tensor
    x_t: Tensor
    v: Tensor
    t: float
    cache: object
    text: Tensor | Condition


def grids(steps: int, shift: float, first_steps: int = 4) -> tuple[Tensor, Tensor]:
    """The grid T^(K) of a rollout and that of its first chunk, which has at least `first_steps` steps."""
    return schedule(steps, shift), schedule(max(steps, first_steps), shift)


def stream(net, noise: Callable[[int, int], Tensor], text, grid: Tensor, *, num_chunks: int,
           first_grid: Tensor | None = None, solver: str = "cm", exit_step: int | None = None,
           first_exit: int | None = None, cache=None, commit_last: bool = False, fused: bool = True) -> Iterator[Chunk]:
    """Generate `num_chunks` chunks, one after the other.

    net: a causal network or flowmap.Guided. noise(i, k): `b n c h w`, for chunk i the start (k = 0) or what the CM
    solver adds at the k-th timestep. text: `b l d`, or a flowmap.Condition with the rows of all frames to make, or a
    callable that gives the condition of chunk i when it is due (while the prompt stays, the same object of words, or
    commits are not fused). grid, first_grid: descending timesteps without 0. exit_step, first_exit: stop every chunk at
    this index of grid, and the first at that of first_grid; by default at the last one, and the first chunk with the
    others where its grid is theirs. Gradient flows through that last step only, where the caller has it enabled. cache:
    a past to continue from; if it is not empty, no chunk counts as the first. commit_last: the last chunk too, for a
    cache that is continued from. fused: without gradient, commit a chunk in one forward with the first step of the
    next.
    """
    cache = net.new_cache() if cache is None else cache
    exit_step = len(grid) - 1 if exit_step is None else exit_step
    if first_grid is None or cache.next_frame > 0:
        first_grid, first_exit = grid, exit_step
    if first_exit is None:
        first_exit = exit_step if len(first_grid) == len(grid) else len(first_grid) - 1
    if not (0 <= exit_step < len(grid) <= len(first_grid) and 0 <= first_exit < len(first_grid)):
        raise ValueError(f"got exit steps {exit_step} and {first_exit} (first chunk) of grids of {len(grid)} and "
                         f"{len(first_grid)} timesteps, expected a step of each grid, and no fewer steps for the first "
                         "chunk: change --first-steps")
    with_grad = torch.is_grad_enabled()
    fused, uncommitted = fused and not with_grad, None
    for i in range(num_chunks):
        chunk_grid, last = (first_grid, first_exit) if i == 0 else (grid, exit_step)
        x = noise(i, 0)
        told = text(i) if callable(text) else of_frames(text, i * x.shape[1], (i + 1) * x.shape[1])
        if uncommitted and words_and_rows(told)[0] is not words_and_rows(uncommitted[1])[0]:
            net.append(cache, *uncommitted)  # one forward has one prompt, and this chunk was made under another
            uncommitted = None

        def velocity(x, t, told=told):
            nonlocal uncommitted
            if uncommitted is None:
                return net(x, per_frame(t, x), told, cache=cache)
            (clean, before), uncommitted = uncommitted, None
            return net(x, per_frame(t, x), after(before, told), cache=cache, clean=clean)

        for k, (t, s) in enumerate(list(intervals(chunk_grid))[: last + 1]):
            with torch.set_grad_enabled(with_grad and k == last):
                v = velocity(x, t)
                if k < last:
                    x = solver_step(solver, velocity, x, v, t, s, lambda i=i, k=k: noise(i, k + 1))
                else:
                    x0 = solver_step(solver, velocity, x, v, t, 0.0, None)
        yield Chunk(x0, x, v, t, cache, told)
        if fused and i + 1 < num_chunks:
            uncommitted = x0, told
        elif commit_last or i + 1 < num_chunks:
            net.append(cache, x0.detach(), told)


def after(before, condition):
    """The condition of two chunks in one forward: rows of both, words of the second."""
    words, rows = words_and_rows(condition)
    return words if rows is None else Condition(words, torch.cat([before.rows, rows], dim=1))


def joined(chunks: Iterator[Chunk]) -> Tensor:
    """All chunks of a stream as one clip x0 `b f c h w`."""
    return torch.cat([chunk.x0 for chunk in chunks], dim=1)


@torch.no_grad()
def recache(net, cache, history: list[tuple[int, Tensor]], text):
    """A new cache of the frames that `cache` holds, as if they had been made under another prompt (LongLive's recache).

    The old prompt is in the keys and values of the past, in every layer but the first. history: (position of its first
    frame, x0 `b n c h w`) of each chunk committed; frames that the cache has dropped are passed over, and those kept
    see only each other. text: the new `b l d`, or a Condition with the rows of all frames since the first.
    """
    fresh = net.new_cache(cache.window, cache.sink, cache.relative, cache.keep)
    for first, x0 in history:
        kept = [i for i in range(x0.shape[1]) if first + i in cache.frames]
        for start in [i for i in kept if i - 1 not in kept]:  # of each run of neighbours: a window may cut one out
            end = next(i for i in range(start, x0.shape[1] + 1) if i not in kept)
            fresh.next_frame = first + start
            net.append(fresh, x0[:, start:end], of_frames(text, first + start, first + end))
    if fresh.frames != cache.frames:
        raise ValueError(f"got a history without frames {sorted(set(cache.frames) - set(fresh.frames))}, expected all "
                         f"that the cache holds: {cache.frames}")
    return fresh


@torch.no_grad()
def rollout_with_prompts(net, noise: Callable[[int, int], Tensor], texts: list[tuple[int, Tensor]], grid: Tensor, *,
                         chunk: int, frames: int, given: Tensor | None = None, cache=None, **how) -> Iterator[Tensor]:
    """A clip whose prompt changes on the way: x0 `b n c h w` of chunk after chunk, those given first.

    texts: (frame, `b l d` or a Condition with the rows of the whole clip), from which frame on which text, the first
    from 0; the change is made, with a recache, at the first chunk boundary from there on. frames: how many to make, a
    multiple of chunk. given: `b f c h w`, clean latents to start from, an image or a clip; if f is no multiple of
    chunk, the first piece is the shorter one. cache: an empty one with the window wanted. noise(i, k), how: as for
    `stream`; i counts the given pieces too, so a clip of whole chunks continues as if it had never stopped.
    """
    cache = net.new_cache() if cache is None else cache
    history, made, done = [], 0, 0  # chunks with the positions of their first frames; how many; frames there are

    def remember(x0):
        nonlocal history, done
        held = set(cache.frames)
        history = [(first, x) for first, x in history if held & set(range(first, first + x.shape[1]))] + [(done, x0)]
        done += x0.shape[1]
        return x0

    if given is not None:
        pieces = [given.shape[1] % chunk] + [chunk] * (given.shape[1] // chunk)
        for piece in given.split([n for n in pieces if n], dim=1):
            net.append(cache, piece, of_frames(texts[0][1], done, done + piece.shape[1]))
            made += 1
            yield remember(piece)
    end = done + frames
    for (start, text), until in zip(texts, [*(frame for frame, _ in texts[1:]), end]):
        num_chunks = -(-(min(until, end) - done) // chunk)
        if num_chunks > 0:
            if start > 0:
                cache = recache(net, cache, history, text)
            for new in stream(net, lambda i, k, first=made: noise(first + i, k), of_frames(text, done, end), grid,
                              num_chunks=num_chunks, cache=cache, commit_last=until < end, **how):
                yield remember(new.x0)
            made += num_chunks


def shared_noise(noise: Tensor, chunk: int, steps: int, first_steps: int) -> Callable[[int, int], Tensor]:
    """The noise(i, k) of `stream` from one tensor `b K f c h w`, K the densest grid: equal timesteps get equal noise.

    The grids of 2, 4 and 8 steps nest, so step k of a rollout of `steps` reads noise[:, k K / steps]. Rollouts of
    different length then start from the same noise, as Salt's reference alignment asks (Sec. 3.3).
    """
    densest = noise.shape[1]
    if densest % steps or densest % first_steps:
        raise ValueError(f"noise for {densest} steps cannot serve a rollout of {steps} (first chunk {first_steps}); "
                         f"both must divide {densest}: change --mixed-steps or --first-steps")

    def draw(i, k):
        stride = densest // (first_steps if i == 0 else steps)
        return noise[:, k * stride, i * chunk : (i + 1) * chunk]

    return draw
