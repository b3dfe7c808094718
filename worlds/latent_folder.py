"""Real video on disk: folders of latents and text embeddings, encoded beforehand.

`LatentFolder` reads such a folder, and its docstring is the format; `write_shard` and `write_null` write it. Samples
are drawn in a random order that is known in advance, a function of a key and a position, so that ranks share no sample
within an epoch and a resumed run needs no state. Every sample carries a checksum, so no damage gets into training.
"""

import hashlib
import json
import sys
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cameras import row_of
from cluster.files import checksum, header_of, write_tensors
from flowmap import Condition
from worlds.draws import generator

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # dtypes that may be stored, by safetensors' names
KINDS = {"latents": 4, "text": 2, "viewmats": 3, "Ks": 3}  # the tensors of a sample, and how many axes they have
CAMERA = {"viewmats": (4, 4), "Ks": (3, 3)}  # those of a camera for every frame, and their shapes
RIGID = 0.02  # how far R R^T of a rotation R may be from 1 in any element; bfloat16 puts it off by up to .01
LONGEST = 20  # focal length, in widths of the image: a field of view of 3 degrees. Longer ones are taken for pixels


def write_shard(path: Path, samples: list[dict], made_by="") -> None:
    """Write a shard of a LatentFolder; only a complete file ever appears at `path`.

    samples: dicts of `latents` (f c h w; in all or in none), `text` (l d), `caption` (str), and, in all or in none,
    `viewmats` (f 4 4) and `Ks` (f 3 3). Tensors are stored in the dtype they come in: bfloat16 halves the disk space of
    float32. made_by: a word for the header. ValueError if some have latents or cameras and some have not.
    """
    of_each = {frozenset(KINDS.keys() & sample.keys()) for sample in samples}
    if len(of_each) != 1 or len(CAMERA.keys() & samples[0].keys()) == 1:
        raise ValueError("got samples with latents or cameras and some without, no sample, or half a camera, expected "
                         "one kind in a shard")
    kinds = [kind for kind in KINDS if kind in samples[0]]
    metadata = {"captions": [sample["caption"] for sample in samples],
                "crc32": [checksum(*[sample[kind] for kind in kinds]) for sample in samples],
                **({"made_by": made_by} if made_by else {})}
    write_tensors(path, {f"{i}.{kind}": sample[kind] for i, sample in enumerate(samples) for kind in kinds}, metadata,
                  checked=False)  # each sample has its own checksum


def write_null(path: Path, text: Tensor) -> None:
    """Write null.safetensors or empty.safetensors of a LatentFolder: text `l d`, the embedding of what guidance leads
    away from (the negative prompt, or the empty one), or of the empty prompt."""
    write_tensors(path, {"text": text}, {})


def read_header(f) -> tuple[list[str], list[int], list[str]]:
    """Captions, checksums and kinds of tensors of an open shard. OSError if they do not make samples 0 to n-1."""
    try:
        metadata, names = header_of(f), set(f.keys())
        captions, crcs = metadata["captions"], metadata["crc32"]
        kinds = [kind for kind in KINDS if kind == "text" or f"0.{kind}" in names]
        fits = (len(captions) == len(crcs) > 0 and names == {f"{i}.{k}" for i in range(len(crcs)) for k in kinds}
                and all(isinstance(x, str) for x in captions) and all(isinstance(x, int) for x in crcs)
                and ("viewmats" in kinds) == ("Ks" in kinds))
    except (ValueError, KeyError, TypeError) as e:
        raise OSError(f"its header is not that of a shard: {type(e).__name__}: {e}") from e
    if not fits:
        raise OSError("its tensors, captions and checksums do not make samples 0 to n-1")
    return captions, crcs, kinds


def read_sample(f, i: int, crc: int, kinds: list[str], wanted=tuple(KINDS)) -> dict[str, Tensor]:
    """The tensors of sample i of an open shard, those of the kinds wanted, in float32. OSError if they are damaged, or
    its cameras are none."""
    stored = {kind: f.get_tensor(f"{i}.{kind}") for kind in kinds}
    if checksum(*stored.values()) != crc:
        raise OSError(f"the bytes of sample {i} do not match its crc32")
    sample = {kind: finite(x) for kind, x in stored.items() if kind in wanted}
    if "viewmats" in sample and (fault := fault_of(sample["viewmats"], sample["Ks"])):
        raise OSError(f"sample {i} has {fault}")
    return sample


def fault_of(viewmats: Tensor, Ks: Tensor) -> str:
    """What is wrong with cameras, finite `f 4 4` and `f 3 3`: no world-to-camera matrices, or focal lengths that are
    not in units of the image. "" if nothing is."""
    if viewmats.shape[1:] != (4, 4) or Ks.shape[1:] != (3, 3) or len(viewmats) != len(Ks):
        return f"viewmats and Ks of shapes {tuple(viewmats.shape)} and {tuple(Ks.shape)}, not f 4 4 and f 3 3"
    turn, focal = viewmats[:, :3, :3], Ks[:, (0, 1), (0, 1)]
    off = (turn @ turn.mT - torch.eye(3).to(turn)).abs().amax((1, 2))
    off = torch.maximum(off, (viewmats[:, 3] - torch.eye(4)[3].to(turn)).abs().amax(1))
    for what, wrong, of_frame in (
            ("viewmats that are not rigid (R R^T = 1, det R = 1, the last row 0 0 0 1)",
             (off > RIGID) | (torch.linalg.det(turn) < 0), viewmats),
            ("focal lengths in Ks that are not in units of the image's width and height",
             ((focal <= 0) | (focal > LONGEST)).any(1), focal)):
        if wrong.any():
            frame = int(wrong.int().argmax())
            return f"{what}, at frame {frame}: {of_frame[frame].tolist()}"
    return ""


def read_shard(path: Path) -> list[dict]:
    """The samples that write_shard wrote, tensors in float32. ValueError if one is damaged, or it is another file."""
    try:
        with safe_open(path, "pt") as f:
            captions, crcs, kinds = read_header(f)
            samples = [read_sample(f, i, crc, kinds) | {"caption": captions[i]} for i, crc in enumerate(crcs)]
        for i, sample in enumerate(samples):
            if any(sample[kind].ndim != KINDS[kind] or len(sample[kind]) == 0 for kind in kinds):
                raise OSError(f"sample {i} has the shapes {[tuple(sample[kind].shape) for kind in kinds]}")
        return samples
    except (SafetensorError, OSError, MemoryError) as e:
        raise ValueError(f"got no readable {path} ({e}), expected a complete file of clips or prompts "
                         "(latent_folder.write_shard)") from e


def read_text(path: Path, expected: str) -> Tensor:
    """The embedding `l d`, float32, that write_null wrote. ValueError, which says what was expected, if there is none.
    """
    try:
        with safe_open(path, "pt") as f:
            return finite(f.get_tensor("text"))
    except (SafetensorError, OSError) as e:
        raise ValueError(f"got no readable {path} ({e}), expected {expected}") from e


def finite(x: Tensor) -> Tensor:
    """x as float32; OSError if it has non-finite values, or is not floating point."""
    if not x.is_floating_point():
        raise OSError(f"it holds {x.dtype}, no floating point numbers")
    x = x.float()
    if not x.isfinite().all():
        raise OSError("it holds non-finite values")
    return x


@lru_cache(maxsize=2)  # a batch may reach from one epoch into the next
def permutation(n: int, *key: int) -> Tensor:
    """A random order of n samples that is a function of n and `key` only."""
    return torch.randperm(n, generator=generator(*key))


class LatentFolder:
    """Encoded clips and their text embeddings in a folder, drawn in a random order that is known in advance.

    The folder holds shards, `*.safetensors` files that are complete in themselves. A shard of n samples holds

        0.latents, 1.latents, ... (n-1).latents    `f c h w`, what the VAE gave for the clip, scaled for the network
        0.text, 1.text, ... (n-1).text             `l d`, what the text encoder gave for the caption, without padding
        0.viewmats, 0.Ks, ...                      `f 4 4`, `f 3 3`, a camera for every latent frame, or none anywhere
        metadata "about"                           a JSON text: {"captions": [n strings], "crc32": [n integers]}

    in any floating point dtype. crc32 is zlib.crc32 of a sample's bytes, those of its latents, text, viewmats and Ks,
    in this order, as they lie in the file. A folder for stages that need no video has no latents in any shard
    (prompts-only); its cameras are then paths that are to be walked.

    Cameras are told to networks that know of them: those of model.SIZES with a `camera`. viewmats are world-to-camera
    matrices, rigid, by OpenCV's axes (x right, y down, z forward); Ks hold the focal lengths, in units of the image's
    width and height, and the principal point, which is taken for the middle. By convention poses are relative to the
    first frame, so that its matrix is the identity. Translations are taken as they are: choose the unit of length so
    that the typical motion of a clip is about 1. (The public minWM takes that of its data set as it is: .08 for a step
    from one latent frame to the next, 1.5 for a clip of 20.)

    Two more files hold a tensor `text` (`l d`): `null.safetensors` what guidance leads away from, the negative prompt
    (or the empty one), embedded; `empty.safetensors`, needed for --prompt-dropout alone, the empty prompt.
    To convert a data set, write a shard for every few hundred clips; then read them back:

        latent_folder.write_shard("videos/0.safetensors", [{"latents": x0, "text": text, "caption": "a cat"}, ...])
        latent_folder.write_null("videos/null.safetensors", text_of_negative_prompt)
        x0, text = latent_folder.LatentFolder("videos", (21, 16, 60, 104), (512, 4096)).clips(range(8), seed)

    shape: (f, c, h, w) wanted; longer clips are cut to their first f frames. text_shape: (l, d) wanted; shorter texts
    are padded with zeros. cameras: whether they are wanted; text is then a flowmap.Condition with the rows of the
    cameras. Opening reads headers only, a draw just its samples, which are mapped from their files.

    A position counts samples from the start of training: update * batch + index in the global batch. Every n positions
    are an epoch, a permutation of all n samples by `key` and the number of the epoch.

    on_bad: what to do about a shard that cannot be read, and a sample with a wrong crc32, non-finite values, or cameras
    that are none (fault_of). "stop": ValueError. "skip": continue without the shard, and with the next intact sample of
    the same epoch in place of the bad one; each is named once on stderr, and `skipped` counts how often a bad sample
    was passed over.

    ValueError, naming file and sample, if a shape or dtype does not fit, and if there is nothing to read, or no cameras
    where they are wanted.
    """

    def __init__(self, path: Path, shape: tuple, text_shape: tuple, on_bad: str = "stop", cameras: bool = False):
        if on_bad not in ("stop", "skip"):
            raise ValueError(f"got {on_bad!r}, expected stop or skip: change --bad-data")
        self.path, self.shape, self.text_shape, self.on_bad = Path(path), tuple(shape), tuple(text_shape), on_bad
        self.captions, self.skipped, self._kinds = [], 0, None
        self._wanted = [kind for kind in KINDS if cameras or kind not in CAMERA]
        self._samples, self._bad, self._files, self._identity = [], set(), {}, []
        for shard in sorted(self.path.glob("*.safetensors")):
            if shard.name in ("null.safetensors", "empty.safetensors"):
                continue
            try:
                with safe_open(shard, "pt") as f:
                    captions, crcs, kinds = read_header(f)
                    for i in range(len(crcs)):
                        self._check_sample(f, i, shard, kinds)
            except (SafetensorError, OSError) as e:
                self._complain(f"shard {shard} ({e})")
                continue
            for what, kind in (("latents", "latents"), ("cameras", "viewmats")):
                if self._kinds is not None and (kind in kinds) != (kind in self._kinds):
                    raise ValueError(f"got {shard} {'with' if kind in kinds else 'without'} {what}, expected all "
                                     "shards of a folder to have them, or none: change --data")
            self._kinds = kinds
            self.captions += captions
            self._samples += [(shard, i, crc) for i, crc in enumerate(crcs)]
            self._identity.append((shard.name, shard.stat().st_size, crcs))
        if not self._samples:
            raise ValueError(f"got no readable sample in {self.path}, expected *.safetensors files as "
                             "latent_folder.LatentFolder describes them: change --data")
        if cameras and "viewmats" not in self._kinds:
            raise ValueError(f"got the folder {self.path} without cameras, expected viewmats and Ks in every sample, "
                             "for a network that is told them: change --data or --size")

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def has_latents(self) -> bool:
        return "latents" in self._kinds

    def clips(self, positions, *key: int) -> tuple[Tensor, Tensor | Condition]:
        """The samples at `positions`, whole numbers, in the order of `key`: x0 `b f c h w`, text `b l d`, float32, or
        with cameras a Condition.

        ValueError if the folder is prompts-only, and for damage, see on_bad.
        """
        if not self.has_latents:
            raise ValueError(f"got the prompts-only folder {self.path}, expected latents: this stage needs video: "
                             "change --data")
        samples = [self._draw(int(p), key) for p in positions]
        return torch.stack([sample["latents"][:self.shape[0]] for sample in samples]), self._told(samples)

    def texts(self, positions, *key: int) -> Tensor | Condition:
        """Their text, with cameras where these are wanted. Latents are verified as well, so that the samples are those
        of `clips`."""
        return self._told([self._draw(int(p), key) for p in positions])

    @cached_property
    def null_text(self) -> Tensor:
        """The embedding of what guidance leads away from, float32 `l d`. ValueError if it cannot be read."""
        return self._read_text("null.safetensors", "of the empty or the negative prompt, for guidance: write it with "
                               "latent_folder.write_null, or change --data")

    @cached_property
    def empty_text(self) -> Tensor:
        """The embedding of the empty prompt, float32 `l d`. ValueError if it cannot be read."""
        return self._read_text("empty.safetensors", "of the empty prompt, with which clips are trained whose prompt is "
                               "dropped: write it with latent_folder.write_null, or give --prompt-dropout 0")

    def digest(self) -> str:
        """A short hex string of the shards' names, sizes, sample counts and checksums: equal for equal data."""
        return hashlib.sha256(json.dumps(self._identity).encode()).hexdigest()[:12]

    def _check_sample(self, f, i, shard, kinds):
        """ValueError if a tensor of sample i of an open shard has another dtype or shape than wanted."""
        shapes = {}
        for kind in (kind for kind in kinds if kind in self._wanted):
            what, stored = f"{kind} of sample {i} in {shard}", f.get_slice(f"{i}.{kind}")  # not read yet
            if stored.get_dtype() not in FLOATS:
                raise ValueError(f"got {what} of dtype {stored.get_dtype()}, expected one of {', '.join(FLOATS)}: "
                                 "change --data")
            shapes[kind] = tuple(stored.get_shape())
            self._check_shape(what, kind, shapes[kind])
            if kind in CAMERA and len({shapes[k][0] for k in ("latents", "viewmats", kind) if k in shapes}) > 1:
                raise ValueError(f"got {what} of {shapes[kind][0]} frames, expected one for each latent frame: "
                                 "change --data")

    def _check_shape(self, what, kind, shape):
        if kind == "latents" and (shape[1:] != self.shape[1:] or shape[0] < self.shape[0]):
            raise ValueError(f"got {what} of shape {shape}, expected {self.shape} or longer: change --frames, "
                             "--height, --width, --size or --data")
        if kind == "text" and (shape[1:] != self.text_shape[1:] or shape[0] > self.text_shape[0]):
            raise ValueError(f"got {what} of shape {shape}, expected {self.text_shape} or shorter: change --size or "
                             "--data")
        if kind in CAMERA and (shape[1:] != CAMERA[kind] or shape[0] < self.shape[0]):
            raise ValueError(f"got {what} of shape {shape}, expected {(self.shape[0], *CAMERA[kind])} or longer: "
                             "change --frames or --data")

    def _draw(self, position, key) -> dict[str, Tensor]:
        """The sample at a position, or the next intact one of its epoch."""
        n = len(self)
        epoch, start = divmod(position, n)
        order = permutation(n, *key, epoch)
        for i in range(n):
            shard, number, crc = sample = self._samples[order[(start + i) % n]]
            try:
                if sample not in self._bad:
                    if shard not in self._files:
                        self._files[shard] = safe_open(shard, "pt")
                    return read_sample(self._files[shard], number, crc, self._kinds, self._wanted)
            except (SafetensorError, OSError) as e:
                self._complain(f"sample {number} of {shard} ({e})")
                self._bad.add(sample)
            self.skipped += 1
        raise ValueError(f"got only damaged samples in {self.path}, expected at least an intact one: change --data")

    def _read_text(self, name, expected) -> Tensor:
        text = read_text(self.path / name, f"the embedding `l d` {expected}")
        self._check_shape(f"text in {self.path / name}", "text", tuple(text.shape))
        return self._texts([{"text": text}])[0]

    def _told(self, samples) -> Tensor | Condition:
        if "viewmats" not in self._wanted:
            return self._texts(samples)
        viewmats, Ks = (torch.stack([sample[kind][:self.shape[0]] for sample in samples]) for kind in CAMERA)
        return Condition(self._texts(samples), row_of(viewmats, Ks))

    def _texts(self, samples) -> Tensor:
        length = self.text_shape[0]
        return torch.stack([torch.nn.functional.pad(s["text"], (0, 0, 0, length - len(s["text"]))) for s in samples])

    def _complain(self, damaged):
        if self.on_bad == "stop":
            raise ValueError(f"got the damaged {damaged}, expected it complete and finite: write the file again, or "
                             "give --bad-data skip")
        print(f"warning: skipped the damaged {damaged}", file=sys.stderr)
