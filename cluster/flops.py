"""FLOPs, counted as networks run, and with them the speed of an update.

    FLOPs of a forward = 2 (weights met by each token) + 4 dim (pairs of query and key), per layer; a backward twice

Of what is only committed, or only the clean past, the last layer leaves out all that follows attention.

Every network that stage.py builds is watched (`count`); a Meter turns the count into tokens/s, TFLOP/s and MFU.
"""

import resource
import time
import weakref

import torch

from model import SIZES, visible

# bf16 FLOP/s of dense matrices, from the data sheets
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "A800": 312e12}

done = 0.0  # by all networks that `count` watches, on this rank
watched = weakref.WeakSet()


def count(net):
    """Add every forward of a network, and the backward that will follow, to `done`. Recomputing is not counted."""
    def add(net, args, layout):
        global done
        passes = 1
        if torch.is_grad_enabled():
            passes = 3 if any(p.requires_grad for p in net.parameters()) else 2  # a frozen one passes gradient on
        done += passes * forward_flops(net.config, args[0].shape, **layout)

    watched.add(net)
    net.register_forward_pre_hook(add, with_kwargs=True)
    return net


def forward_flops(c, shape, chunk=None, clean=None, cache=None, commit=False, num_blocks=None) -> float:
    """FLOPs of the matrix products of net(x, ...), x of shape `b f c h w`, in the layouts of model.py."""
    (b, f, _, height, width), d = shape, c.dim
    s = (height // c.patch_size[1]) * (width // c.patch_size[2])  # tokens of a frame
    patch = c.in_dim * c.patch_size[0] * c.patch_size[1] * c.patch_size[2]
    head = f * s * d * patch if num_blocks is None and not commit else 0
    frame_pairs, streams, keys, before = f * f, 1, f, 0  # keys: frames whose keys are put in their place
    if chunk is not None:
        frame_pairs = sum(chunk * (chunk + len(visible(i, chunk, c.window, c.sink))) for i in range(0, f, chunk))
    if cache is not None:
        before = 0 if clean is None else clean.shape[1]  # frames that are committed on the way
        chunks = (before, f) if before else (f,)
        seen = [len(frames) for frames in cache.visible_frames(*chunks)]
        frame_pairs, keys, f = sum(n * m for n, m in zip(chunks, seen)), sum(seen), sum(chunks)
    elif clean is not None:
        streams = 2

    def after(tokens, words):  # o, q o of the text, feed-forward; k v of the text
        per_token = 3 * d * d + 2 * d * c.ffn_dim + 2 * d * c.text_len + (d * d if c.sees_cameras else 0)
        return tokens * per_token + words * 2 * d * d

    tokens, attention = f * s, 2 * d * frame_pairs * s * s
    if c.sees_cameras:  # as many heads again; the matrices on q and o, k and v; P and P^-1 are nothing
        attention = 2 * attention + 8 * d * (f + keys) * s
    layer = tokens * 3 * d * d + attention + after(tokens, c.text_len)
    unasked = after(before * s, 0)  # what the last layer leaves out
    if streams == 2:
        unasked = after(tokens, c.text_len)
    if commit:
        unasked = attention + after(tokens, c.text_len)
    embeddings = tokens * d * patch + f * d * (c.freq_dim + c.row_dim + 7 * d) + c.text_len * d * (c.text_dim + d)
    layers = c.num_layers if num_blocks is None else num_blocks
    return 2.0 * b * (streams * (layers * layer + embeddings) - unasked + head)


def tokens_of_clip(cfg) -> int:
    _, ph, pw = SIZES[cfg.size].patch_size
    return cfg.frames * (cfg.height // ph) * (cfg.width // pw)


class Meter:
    """Speed and memory of one update after the other, as metrics."""

    def __init__(self, cfg):
        self.tokens = cfg.batch * tokens_of_clip(cfg)
        self.cuda = cfg.device.startswith("cuda")
        name = torch.cuda.get_device_name() if self.cuda else ""
        self.peak = next((rate for card, rate in PEAK.items() if card in name and cfg.precision == "bf16"), None)

    def start(self):
        self.began, self.flops = time.perf_counter(), done

    def stop(self) -> dict:
        """seconds; tokens_per_second of the batch's clips, over all ranks; of this rank: tflops (model TFLOP/s), mfu
        (tflops as a fraction of the card's peak, where that is known), memory_gb (peak memory so far)."""
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began
        rate = (done - self.flops) / seconds
        memory = (torch.cuda.max_memory_allocated() if self.cuda
                  else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        speed = {"seconds": seconds, "tokens_per_second": self.tokens / seconds, "tflops": rate / 1e12}
        return speed | ({"mfu": rate / self.peak} if self.peak else {}) | {"memory_gb": memory / 1e9}
