"""Where the clips and prompts of a run come from: a world that is drawn, a folder of latents, or random noise.

A source gives, for draws.Draw:

    clips(positions, *key) -> x0 `b f c h w`, text          a function of the positions and the key
    prompts(draw) -> text                                   of clips that are still to be made
    null_text, empty_text                                   words `l d`: what guidance leads away from; no prompt
    digest(), skipped                                       what tells these clips from others; how many were damaged

text is `b l d`, or a flowmap.Condition where the world tells its frames more than words.
"""

from functools import lru_cache

import torch

from flowmap import Condition, words_and_rows
from worlds import WORLDS
from worlds.draws import PROMPTS, noises
from worlds.latent_folder import LatentFolder


@lru_cache(maxsize=2)
def open_source(data: str, world: str, shape: tuple, text_shape: tuple, bad_data: str = "stop"):
    """The source of --data and --world, opened once. shape: f c h w; text_shape: l d."""
    if data == "random":
        return Noise(shape, text_shape)
    return Folder(data, shape, text_shape, bad_data) if data else Drawn(WORLDS[world], shape[0])


class Source:
    """What all three share."""

    skipped = 0

    def with_empty_words(self, text, kept):
        """text where kept `b 1 1` is true, and elsewhere the empty prompt's words. Never the negative prompt's: a model
        that learned good clips under that name would not be led away from them."""
        words, rows = words_and_rows(text)
        words = torch.where(kept, words, self.empty_text.to(words.device))
        return words if rows is None else Condition(words, rows)


class Drawn(Source):
    """Clips of a world, each drawn when it is asked for, and never seen before."""

    def __init__(self, world, frames):
        self.world, self.frames = world, frames
        self.null_text = self.empty_text = torch.zeros(world.text_shape)

    def clips(self, positions, *key):
        x0, labels = self.world.clips(positions, self.frames, *key)
        return x0, self.world.embed(labels)

    def prompts(self, draw):
        labels = self.world.draw_labels(draw.cfg.batch, self.frames, draw.generator(PROMPTS))
        return self.world.embed(labels[draw.batch_slice])

    def digest(self):
        return ""


class Noise(Source):
    """Noise in place of clips and words: to time and to try every stage without any data."""

    def __init__(self, shape, text_shape):
        self.shape, self.text_shape = shape, text_shape
        self.null_text = self.empty_text = torch.zeros(text_shape)

    def clips(self, positions, *key):
        return noises(positions, self.shape, *key), noises(positions, self.text_shape, *key, 1)

    def prompts(self, draw):
        return noises(draw.positions(), self.text_shape, PROMPTS, draw.cfg.seed, 1)

    def digest(self):
        return "random"


class Folder(LatentFolder, Source):
    """Latents and embeddings on disk."""

    def prompts(self, draw):
        return self.texts(draw.positions(), PROMPTS, draw.cfg.seed)
