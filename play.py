"""Play a student in the browser, in real time: walk through the room that it draws, or tell it what to draw next.

    python play.py                                      # the newest student in runs/, or assets/room.safetensors
    python play.py --weights assets/toy.safetensors     # the toy world: its prompts are buttons
    python play.py --weights student.pt --wan Wan2.1-T2V-1.3B    # video, on a GPU; prompts are typed while it runs

Arrow keys or W A S D walk; t shows the truth beside it, the same walk through a hidden room that the seed chooses. Of
that room the student is given nothing, one frame, or a look around (`start` in the page), and makes up the rest.

Playing is rollout.stream, as everywhere: before each chunk, the keys held right then become its Condition. Poses follow
from the actions exactly. The cache is a window with a sink; of a network that sees cameras, those frames stay that
cover the poses seen (docs/world_model.md, Long walks). So memory and time stay as they are, however long one plays. A
new prompt recaches the past (rollout.recache).

One thread makes chunks, each just in time for the moment when it is shown, and keeps the last frames with their
moments. The page asks for the newest frame again and again, so a slow page skips frames and delays nothing. One page
plays at a time, and its clip ends when it is closed. Only this machine can ask, unless --host says otherwise, and no
file is opened that a request names.
"""

import argparse
import threading
import time
import webbrowser
from collections import deque, namedtuple
from pathlib import Path

import torch
from torch import Tensor

import wan21.text
import wan21.vae
import wan21.weights
from cameras import ROW
from cluster.files import check_device, run_command
from fast.network import Fast
from flowmap import Condition, words_and_rows
from model import SIZES
from rollout import grids, recache, stream
from sample import with_stage
from tools.page import Refused, Server
from wan21 import trajectory
from wan21.errors import need, say
from wan21.families import FAMILIES
from wan21.settings import newest_student, trained_for
from worlds import WORLDS, draws, room

ASSETS = Path(__file__).parent / "assets"
FPS = 12  # frames per second of a world; video has its own
STEPS = (1, 2, 4)
STARTS = {"nothing": 0, "frame": 1, "look": room.TURNS}  # how many true frames are given
PROMPT = "a red fox runs through snow"  # of video, until another is typed
LEASE, POLL = 3.0, 1.0  # seconds: a page that asks for no frame so long has gone; a request waits for one so long
CLIP_FRAMES, CLIP_BYTES = 240, 2**27  # that are kept to be saved, at most

# What is asked of the next chunk. words: `1 l d`, the same object while the prompt stays. seq: of the last input
Order = namedtuple("Order", "words steps action seq")
# due: when it is shown, by time.monotonic. picture: bytes `h w 3`. truth: the hidden room from the same pose, or None
Frame = namedtuple("Frame", "number due picture truth about")


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.add_argument("--weights", type=Path, help="a causal few-step student (default: the newest in runs/, or else "
                                                "assets/room.safetensors)")
    p.add_argument("--steps", type=int, choices=STEPS, help="denoising steps per chunk (default: 2; of Wan 4)")
    p.add_argument("--seed", type=int, default=0, help="of the noise and the hidden room (default: 0)")
    p.add_argument("--wan", type=Path, help="folder of Wan's text encoder and VAE (default: that of --weights)")
    p.add_argument("--preview", action="store_true", help="draw latents without the VAE: small, blurred, fast")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    p.add_argument("--port", type=int, default=8000, help="of the page (default: 8000; 0: any that is free)")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    p.add_argument("--no-browser", action="store_true", help="do not open the page")
    return p.parse_args(argv)


def since_start(words: Tensor, history: list):
    """The condition of all frames since the first, for recache: zeros where the history does not reach, unread."""
    first, x0, condition = history[-1]
    rows = words_and_rows(condition)[1]
    if rows is None:
        return words
    every = rows.new_zeros(1, first + x0.shape[1], rows.shape[2])
    for first, x0, condition in history:
        every[:, first : first + x0.shape[1]] = condition.rows
    return Condition(words, every)


# ---------------------------------------------------------------------------------------------------------------------
# The player

class Player:
    """A student that is played: who plays, what they ask for, the last frames. One thread, `run`, makes these; those of
    the server call the methods from `frame` on. `changed` is the lock of all, and wakes who waits."""

    def __init__(self, args):
        """args: what `parse` returns. ValueError if the weights are no causal few-step student."""
        need(args, 0 <= args.seed < 2**53, "seed", "a number from 0 to 2^53 - 1")
        check_device(args.device)
        self.path, self.device = args.weights or newest_student(), args.device
        weights, metadata = wan21.weights.read_weights(self.path)
        size = metadata.get("size") or wan21.weights.size_of(weights, self.path)
        trained = trained_for(with_stage(metadata), size) if str(size) in SIZES else {"stage": f"size {size}"}
        if not (trained.get("causal") and trained["few_step"]):
            raise ValueError(f"got {self.path} of {trained['stage']}, expected a causal few-step student, as salt's: "
                             "change --weights")
        config, family, world = SIZES[size], FAMILIES[SIZES[size].family], WORLDS.get(trained["world"])
        dtype = torch.bfloat16 if args.device.startswith("cuda") and not world else torch.float32
        self.net = Fast(wan21.weights.load(config, self.path, args.device, dtype)[0].eval().requires_grad_(False))
        self.config, self.trained, self.world = config, trained, world
        if config.row_width and trained["world"] != "room" and (world or config.row_width != ROW):
            raise ValueError(f"got {self.path}, which is told {config.row_width} numbers of each frame, expected a "
                             "student of the room, or of cameras, as no keys are known for others: change --weights")
        self.walk = (room.step if world else trajectory.step) if config.row_width else None
        self.has_truth, self.fps = bool(world and self.walk), FPS if world else family.fps
        folder = args.wan or (self.path if self.path.is_dir() else self.path.parent)
        if world:
            self.decoder = lambda: lambda x0: torch.from_numpy(world.draw(x0.float(), 1))
        elif args.preview:
            need(args, family.rgb, "preview", "none: it is not known for latents of this size")
            self.decoder = lambda: lambda x0: wan21.vae.preview(x0, family)
            self.fps /= family.frames_per_latent
        else:
            vae = wan21.vae.load_vae(folder, args.device, dtype, family)
            self.decoder = lambda: wan21.vae.StreamDecoder(vae).decode
        self.encoder = None if world else wan21.text.load_text_encoder(folder, args.device)
        self.prompts = list(world.prompts) if world and not self.walk else []
        self.prompt = "" if self.has_truth else [*self.prompts, PROMPT][0]
        self.words = self.embed(self.prompt)
        self.steps, self.seed = args.steps or trained["steps"], args.seed
        self.start = "look" if self.has_truth else "nothing"
        self.keys, self.tapped, self.seq, self.paused, self.who, self.asked = [], "", 0, False, "", -LEASE
        self.clip = self.number = 0  # how many clips and frames there have been
        self.began = self.until = self.making = 0.0  # a chunk; the last frame's end; seconds that a chunk takes
        self.frames, self.closed, self.error = deque(), False, None
        self.changed, self.embedding = threading.Condition(), threading.Lock()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    @torch.no_grad()
    def embed(self, prompt: str) -> Tensor:
        """Words `1 l d`. ValueError if a world has no such words."""
        if self.has_truth:
            return torch.zeros(1, *self.world.text_shape, device=self.device)
        if self.world:
            return self.world.embed([self.world.parse(prompt)]).to(self.device)
        words = [self.encoder.encode([prompt])[0].float()]
        return wan21.text.pad_text(words, self.config.text_len).to(self.device)

    @torch.no_grad()
    def run(self):
        """Make clip after clip while somebody plays. An error is for the main thread to raise."""
        if self.world and self.device == "cpu":
            torch.set_num_threads(1)  # so few numbers are not worth sharing
        try:
            while not self.closed:
                self.make_clip()
                with self.changed:
                    if not self.is_played():
                        self.changed.wait(POLL)
        except Exception as e:
            self.error = e
            self.close()

    def make_clip(self):
        """Make one clip, until it is restarted, left or closed."""
        with self.changed:
            clip, seed, given = self.clip, self.seed, STARTS[self.start]
        trained, history, frames, chunks, poses = self.trained, [], 0, 0, []  # so many frames and chunks are finished
        cache = self.net.new_cache(max(trained["window"] or trained["frames"], trained["sink"] + trained["chunk"]),
                                   trained["sink"], True, "poses" if self.config.sees_cameras else "latest")
        pose, decode = torch.zeros(3) if self.world else torch.eye(4, dtype=torch.float64), self.decoder()
        if self.has_truth:
            hidden = room.read(self.world.draw_labels(1, 1, draws.generator(draws.EVALUATE, seed)))[0]

        def noise(i, k):  # as sample.py draws it
            shape = (trained["chunk"], self.config.in_dim, trained["height"], trained["width"])
            return draws.noises([seed], shape, chunks, k).to(self.device)

        def told(i=0, action=None, n=trained["chunk"]):
            """The condition of the next n frames. A row belongs to the frame that its action leads to: to the first
            one, none does."""
            nonlocal pose
            poses[:], rows = [], []
            for f in range(n if self.walk else 0):
                pose, row = self.walk(pose, (action or order.action) if frames + f else "none")
                poses.append(pose)
                rows.append(row)
            return Condition(order.words, torch.stack(rows)[None].to(self.device)) if rows else order.words

        def truth():
            """What is seen of the hidden room from the poses told last, latents `1 n 3 h w`."""
            return room.render(hidden, torch.stack(poses)[None])

        def show(x0, condition, is_given=False):
            """Hand the frames of a finished chunk over, and remember it while the cache does."""
            nonlocal frames, chunks, history
            if not x0.isfinite().all():
                raise ValueError(f"got non-finite frames from {self.path}, expected finite ones: change --weights")
            pictures = decode(x0)[0].cpu().numpy()
            truths = decode(truth())[0].numpy() if self.has_truth else [None] * len(pictures)
            self.hand_over(clip, pictures, truths, {"steps": order.steps, "seq": order.seq, "cache": len(cache.frames),
                                                    "given": is_given})
            held = set(cache.frames)
            history = [past for past in history if held & set(range(past[0], past[0] + past[1].shape[1]))]
            history.append((frames, x0, condition))
            frames, chunks = frames + x0.shape[1], chunks + 1

        order = self.wait(clip)
        while order and frames < given:
            condition = told(action="left", n=min(trained["chunk"], given - frames))
            x0 = truth().to(self.device)
            show(x0, condition, is_given=True)
            self.net.append(cache, x0, condition)
            order = self.wait(clip)
        while order:
            now = order  # a stream has one prompt and one number of steps
            grid, first_grid = grids(now.steps, trained["shift"], trained["first_steps"])
            for made in stream(self.net, noise, told, grid, first_grid=first_grid, num_chunks=10**12,
                               solver=trained["solver"], cache=cache):
                show(made.x0, made.text)
                order = self.wait(clip)
                if order is None or order.words is not now.words or order.steps != now.steps:
                    break
            if order:
                self.net.append(cache, made.x0, made.text)
            if order and order.words is not now.words:
                cache = recache(self.net, cache, [past[:2] for past in history], since_start(order.words, history))

    def wait(self, clip: int) -> Order | None:
        """Wait until the next chunk must be made to be in time; what is asked of it. None if the clip has ended."""
        with self.changed:
            while clip == self.clip and self.is_played():
                left = self.until - 1.1 * self.making - 0.002 - time.monotonic()
                if left <= 0 and not self.paused:
                    action = self.tapped or (self.keys[-1] if self.keys else "none")
                    self.tapped, self.began = "", time.monotonic()
                    return Order(self.words, self.steps, action, self.seq)
                self.changed.wait(POLL if self.paused else min(left, POLL))
        return None

    def begin_clip(self):
        """Drop all frames. What is being made for the clip before is dropped when it is handed over."""
        self.clip += 1
        self.frames.clear()

    def hand_over(self, clip: int, pictures, truths, about: dict):
        """Frames `n h w 3` of a clip, shown one after the other once those before have been."""
        with self.changed:
            if clip != self.clip:
                return
            now, length = time.monotonic(), len(pictures) / self.fps
            self.making = max(now - self.began, 0.9 * self.making)  # the longest of late
            start = max(self.until, now - 1 / self.fps)  # late by less than a frame, it leaves the next ones on time
            self.until = start + length
            for i, (picture, truth) in enumerate(zip(pictures, truths)):
                self.number += 1
                self.frames.append(Frame(self.number, start + i / self.fps, picture, truth, about | {
                    "number": self.number, "making": round(1000 * (now - self.began), 1)}))
            while len(self.frames) > max(2, min(CLIP_FRAMES, CLIP_BYTES // pictures[0].nbytes)):
                self.frames.popleft()
            self.changed.notify_all()

    def is_played(self) -> bool:
        return not self.closed and time.monotonic() < self.asked + LEASE

    def close(self):
        """End the clip, and the thread that makes it."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        if threading.current_thread() is not self.thread:
            self.thread.join(10)

    # -- what the server's threads call --------------------------------------------------------------------------------

    def frame(self, who: str, after: int) -> Frame | None:
        """The frame to show now, once it is another than number `after`; None if there is none soon. Refused while
        another page plays."""
        with self.changed:
            if who != self.who and self.is_played():
                raise Refused(409, "got a second page, expected one at a time: close the other one")
            if not self.is_played():
                self.begin_clip()
            if who != self.who:
                self.who, self.keys, self.tapped, self.seq, self.paused = who, [], "", 0, False
            self.asked = time.monotonic()
            self.changed.notify_all()
            while self.is_played() and who == self.who:
                now = time.monotonic()
                shown = [frame for frame in self.frames if frame.due <= now]
                if shown and shown[-1].number != after:
                    return shown[-1]
                until = min([self.asked + POLL, *(frame.due for frame in self.frames if frame.due > now)])
                if until <= now:
                    return None
                self.changed.wait(until - now)

    def take(self, who: str, message: dict):
        """Take an input, which page.checked has checked. ValueError, without effect, for words that a world has not."""
        with self.changed:
            self.check_player(who)
        with self.embedding:  # one at a time, while frames are made
            prompt = message.get("prompt", self.prompt)
            words = self.words if prompt == self.prompt else self.embed(prompt)
            with self.changed:
                self.check_player(who)  # another page may have taken over while this prompt was embedded
                self.prompt, self.words = prompt, words
                for key in message.get("keys", []):
                    if key not in self.keys:
                        self.tapped = key  # until a chunk has followed it, however short
                for name in ("keys", "steps", "seed", "start", "seq", "paused"):
                    setattr(self, name, message.get(name, getattr(self, name)))
                if message.keys() & {"seed", "start", "restart"}:
                    self.begin_clip()
                if "leave" in message:
                    self.asked = -LEASE
                self.changed.notify_all()

    def check_player(self, who: str):
        """Refused if this page is not the one that plays."""
        if who != self.who or not self.is_played():
            raise Refused(409, "got a page that does not play, expected the one that does: reload this one")

    def last_frames(self, who: str) -> list[Frame]:
        """Those shown last. Refused if there are none yet."""
        with self.changed:
            self.check_player(who)
            frames = [frame for frame in self.frames if frame.due <= time.monotonic()]
        if not frames:
            raise Refused(409, "got no frame yet, expected some: try again")
        return frames

    def about(self) -> dict:
        """What a page must know to show itself."""
        return {"weights": f"{self.path.parent.name}/{self.path.name}", "walks": bool(self.walk),
                "starts": list(STARTS) if self.has_truth else [], "prompts": self.prompts, "words": not self.has_truth,
                "prompt": self.prompt, "steps": self.steps, "all_steps": STEPS, "seed": self.seed, "start": self.start,
                "fps": self.fps}


def main(args):
    """Serve the page until Ctrl-C."""
    need(args, 0 <= args.port < 2**16, "port", "a number from 0 to 65535")
    player = Player(args)
    try:
        try:
            server = Server(player, args.host, args.port, (ASSETS / "play.html").read_bytes())
        except OSError as e:
            raise ValueError(f"got --host {args.host} --port {args.port} ({e}), expected an address of this machine "
                             "and a free port: change --host or --port") from e
        with server:
            url = f"http://{args.host if args.host != '0.0.0.0' else '127.0.0.1'}:{server.server_port}/"
            print(f"{player.path} is played at {url} (Ctrl-C ends this)", flush=True)
            if args.host not in ("127.0.0.1", "localhost"):
                say(f"warning: --host {args.host}: whoever can reach this machine can play, and see what is played")
            if not args.no_browser:
                threading.Thread(target=webbrowser.open, args=[url], daemon=True).start()
            server.serve_forever(poll_interval=0.2)
    finally:
        player.close()


if __name__ == "__main__":
    run_command(lambda: main(parse()), "stopped")
