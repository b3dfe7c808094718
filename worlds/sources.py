"""Where the clips and prompts of a run come from: a world that is drawn, a folder of latents, or random noise.

A source gives, for draws.Draw:

    clips(positions, *key) -> x0 `b f c h w`, text          a function of the positions and the key
    prompts(draw) -> text                                   of clips that are still to be made
    null_text, empty_text                                   words `l d`: what guidance leads away from; no prompt
    digest(), skipped                                       what tells these clips from others; how many were damaged

text is `b l d`, or a flowmap.Condition where frames are told more than words: by the world, or a folder's cameras.
"""

from functools import lru_cache

import torch

from cameras import ROW
from flowmap import Condition, words_and_rows
from worlds import WORLDS
from worlds.draws import PROMPTS, noises
from worlds.latent_folder import LatentFolder


@lru_cache(maxsize=2)
def open_source(data: str, world: str, shape: tuple, text_shape: tuple, row_width: int = 0, bad_data: str = "stop"):
    """The source of --data and --world, opened once. shape: f c h w; text_shape: l d; row_width: numbers that a frame's
    row of the condition has."""
    if data == "random":
        return Noise(shape, text_shape, row_width)
    return Folder(data, shape, text_shape, row_width, bad_data) if data else Drawn(WORLDS[world], shape[0])


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
    """Noise in place of clips, words and rows: to time and to try every stage without any data."""

    def __init__(self, shape, text_shape, row_width):
        self.shape, self.text_shape, self.row_width = shape, text_shape, row_width
        self.null_text = self.empty_text = torch.zeros(text_shape)

    def clips(self, positions, *key):
        return noises(positions, self.shape, *key), self.told(positions, *key, 1)

    def prompts(self, draw):
        return self.told(draw.positions(), PROMPTS, draw.cfg.seed, 1)

    def told(self, positions, *key):
        words = noises(positions, self.text_shape, *key)
        if not self.row_width:
            return words
        return Condition(words, noises(positions, (self.shape[0], self.row_width), *key, 2))

    def digest(self):
        return "random"


class Folder(LatentFolder, Source):
    """Latents and embeddings on disk, and cameras for networks whose rows are those of cameras."""

    def __init__(self, path, shape, text_shape, row_width=0, on_bad="stop"):
        if row_width not in (0, ROW):
            raise ValueError(f"got --data {path} and a network that is told {row_width} numbers of each frame, "
                             f"expected one that is told a camera, {ROW} numbers, or none: change --size or --data")
        super().__init__(path, shape, text_shape, on_bad, cameras=row_width == ROW)

    def prompts(self, draw):
        return self.texts(draw.positions(), PROMPTS, draw.cfg.seed)
