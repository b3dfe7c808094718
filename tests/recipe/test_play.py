"""play.py: what is played is a rollout, its server does what it says and no more, and its page works in a browser."""

import dataclasses
import gc
import http.client
import json
import os
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from PIL import Image

import play
import wan21.settings
from cluster.files import write_tensors
from flowmap import Condition, schedule
from model import SIZES, CausalWan
from rollout import grids, joined, rollout_with_prompts, stream
from tools import page
from wan21 import trajectory
from worlds import WORLDS, draws, room

ME, OTHER = "a" * 32, "b" * 32
RUN = play.Player.run
RECORD = dict(first_steps=4, sink=1, window=0, chunk=1, guidance=1.0, shift=5.0, mixed_steps=[1, 2, 4])


def write_student(path, size, dtype=torch.float32, **about):
    """A student of random weights, in which nothing is hidden behind a zero, as train.py leaves one."""
    net, world = CausalWan(SIZES[size]).init_weights(0), WORLDS[size]
    for name, p in net.named_parameters():
        if "prope_o" in name or name == "head.head.weight":
            torch.nn.init.normal_(p, std=0.1)
    _, h, w = world.latent_shape
    config = RECORD | dict(world=size, frames={"room": 16, "toy": 8}[size], height=h, width=w)
    record = dict(stage="salt", size=size, causal=True, few_step=True, solver="cm", saved=1.0, config=config) | about
    write_tensors(path, {k: v.to(dtype) for k, v in net.state_dict().items()}, record)
    return path


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    folder = tmp_path_factory.mktemp("students")
    return {size: write_student(folder / f"{size}.safetensors", size) for size in ("room", "toy")}


@pytest.fixture
def still(students, monkeypatch):
    """still("room"): a player whose thread makes nothing. It follows the orders it is given by `follow`."""
    monkeypatch.setattr(play.Player, "run", lambda self: None)
    def make(size, *words):
        return play.Player(play.parse([*(["--weights", str(students.get(size, size))] if size else []), *words]))
    return make


@torch.no_grad()
def follow(player, orders):
    """Make a clip by these orders, (prompt or None, steps, action), one each for every wait. Returns its frames `f h w
    3`, the truths, and what is told of each."""
    words = {prompt: player.embed(prompt) for prompt in {prompt for prompt, _, _ in orders} if prompt}
    left = [play.Order(words.get(prompt, player.words), steps, action, i) for i, (prompt, steps, action)
            in enumerate(orders)]
    player.wait = lambda clip: left.pop(0) if left else None
    player.make_clip()
    frames = list(player.frames)
    truths = None if frames[0].truth is None else torch.stack([torch.from_numpy(frame.truth) for frame in frames])
    return torch.stack([torch.from_numpy(frame.picture) for frame in frames]), truths, [frame.about for frame in frames]


def noise_of(player, seed=0):
    c = player.trained
    return lambda i, k: draws.noises([seed], (c["chunk"], player.config.in_dim, c["height"], c["width"]), i, k)


def drawn(player, x0):
    return torch.from_numpy(player.world.draw(x0, 1))[0]


# ---------------------------------------------------------------------------------------------------------------------
# What is played

@pytest.mark.parametrize("start", play.STARTS)
def test_a_walk_is_a_rollout(still, start):
    """Bug: an action whose row is that of another frame, a camera that goes where the walker was stopped, other noise
    or another cache than those of a rollout along the same path; the truth of another place or room."""
    player, walk = still("room", "--seed", "3"), ["forward"] * 8 + ["left", "left", "back", "none", "right"] * 3
    given, player.start = play.STARTS[start], start
    frames, truths, about = follow(player, [(None, 2, "back")] * given + [(None, 2, action) for action in walk])
    actions = (["none"] + ["left"] * (given - 1) + walk) if given else ["none", *walk[1:]]
    world, codes = room.Room(), torch.tensor([[room.ACTIONS.index(action) for action in actions]])
    hidden = world.draw_labels(1, 1, draws.generator(draws.EVALUATE, 3))[:, 3:11]
    label = room.label_of(torch.zeros(1, 3), hidden, codes)
    assert (label[0, 11:] != codes[0]).any()  # somebody stopped the walker
    true = room.render(*room.read(label)[:2])
    grid, first = grids(2, 5.0)
    with torch.no_grad():
        x = torch.cat(list(rollout_with_prompts(
            player.net, noise_of(player, 3), [(0, world.embed(label))], grid, chunk=1, frames=len(walk),
            given=true[:, :given] if given else None, cache=player.net.new_cache(16, 1, True, "poses"),
            first_grid=first)), 1)
    assert torch.equal(truths, drawn(player, true))
    assert (frames.int() - drawn(player, x).int()).abs().max() <= 1
    assert [of["given"] for of in about] == [True] * given + [False] * len(walk)
    assert [of["cache"] for of in about] == [min(i, 16) for i in range(len(frames))]


def test_a_new_prompt_recaches(still):
    """Bug: a prompt that changes a frame late, without a recache, or with the noise of the first frames again."""
    player, a, b = still("toy"), "red ball", "blue bar"
    frames, _, _ = follow(player, [(a, 2, "none")] * 5 + [(b, 2, "none")] * 7 + [(a, 2, "none")] * 2)
    grid, first = grids(2, 5.0)
    cache = player.net.new_cache(8, 1, True)
    x = torch.cat(list(rollout_with_prompts(
        player.net, noise_of(player), [(0, player.embed(a)), (5, player.embed(b)), (12, player.embed(a))], grid,
        chunk=1, frames=14, cache=cache, first_grid=first)), 1)
    assert (frames.int() - drawn(player, x).int()).abs().max() <= 1
    assert (frames.float().diff(dim=0).abs().amax((1, 2, 3)) > 0).all()


def test_other_steps_keep_the_past(still):
    """Bug: a change of steps that starts a new clip, loses the last frame, or comes a frame late."""
    player, (grid, first) = still("toy"), grids(1, 5.0)
    frames, _, about = follow(player, [(None, 1, "none")] * 4 + [(None, 4, "none")] * 4)
    cache, noise = player.net.new_cache(8, 1, True), noise_of(player)
    with torch.no_grad():
        x = [joined(stream(player.net, noise, player.words, grid, first_grid=first, num_chunks=4, cache=cache,
                           commit_last=True)),
             joined(stream(player.net, lambda i, k: noise(4 + i, k), player.words, schedule(4, 5.0), num_chunks=4,
                           cache=cache))]
    assert (frames.int() - drawn(player, torch.cat(x, 1)).int()).abs().max() <= 1
    assert [of["steps"] for of in about] == [1] * 4 + [4] * 4


def test_memory_and_work_do_not_grow(still, monkeypatch):
    """Bug: a cache, a history or a list of frames that grows as one walks on, or poses that are computed from the start
    anew for every frame."""
    player, lengths, alive = still("room"), [], []
    integrate, player.start = room.integrate, "nothing"
    monkeypatch.setattr(room, "integrate", lambda start, actions, *of: (lengths.append(actions.shape[1]),
                                                                        integrate(start, actions, *of))[1])
    monkeypatch.setattr(play, "CLIP_FRAMES", 30)
    hand_over = player.hand_over

    def counted(*of):
        hand_over(*of)
        if player.number in (40, 120):
            gc.collect()
            alive.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))

    player.hand_over = counted
    turns = ["left", "forward", "forward", "right", "back"]
    frames, _, about = follow(player, [(None, 1, turns[i % 5]) for i in range(120)])
    assert len(frames) == 30 and about[-1]["cache"] == 16 and set(lengths) == {1}
    assert alive[1] <= alive[0] + 5, alive


def test_bf16_weights_are_played_in_fp32(still, tmp_path):
    """Bug: a network in the dtype of the file that comes with the project, which is slow on a CPU."""
    player = still(write_student(tmp_path / "student.safetensors", "toy", torch.bfloat16))
    assert {p.dtype for p in player.net.net.parameters()} == {torch.float32}
    assert len(follow(player, [("red ball", 2, "none")] * 3)[0]) == 3


def test_a_clip_of_one_chunk_is_played_on(still, tmp_path):
    """Bug: a window of the clips of training that has no room for the sink and a chunk."""
    config = RECORD | dict(world="toy", frames=3, chunk=3, height=10, width=10)
    player = still(write_student(tmp_path / "student.safetensors", "toy", config=config))
    assert len(follow(player, [("red ball", 2, "none")] * 2)[0]) == 6


def test_what_is_played_by_default(still, students, tmp_path, monkeypatch):
    """Bug: a shipped student in place of one's own, an old one of one's own, a teacher, which blurs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wan21.settings, "SHIPPED", [students["toy"]])
    assert still(None).path == students["toy"]
    monkeypatch.setattr(wan21.settings, "SHIPPED", [tmp_path / "none.safetensors"])
    with pytest.raises(ValueError, match=r"train.py.*--weights"):
        still(None)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    mine = write_student(tmp_path / "runs" / "mine" / "salt.safetensors", "toy")
    monkeypatch.setattr(wan21.settings, "SHIPPED", [students["toy"]])
    assert still(None).path.resolve() == mine
    teacher = write_student(tmp_path / "teacher.safetensors", "toy", few_step=False, stage="teacher_forcing")
    for words, flag in ((["--seed", "-1"], "--seed -1"), (["--device", "tpu"], "--device")):
        with pytest.raises(ValueError, match=flag):
            still("toy", *words)
    with pytest.raises(ValueError, match="teacher_forcing, expected a causal few-step student.*--weights"):
        still(teacher)


# ---------------------------------------------------------------------------------------------------------------------
# Wan

@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """Students of Wan in small: .pt files in a folder of text encoder and VAE; 4 x 6 latents, chunks of 3."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    import dataclasses

    from tiny_wan import WIDTH, write_text_encoder, write_vae

    from wan21.families import FAMILIES
    folder, patch = tmp_path_factory.mktemp("wan"), pytest.MonkeyPatch()
    small = dataclasses.replace(SIZES["wan1.3b"], dim=48, ffn_dim=64, num_heads=3, num_layers=2, freq_dim=16,
                                text_dim=WIDTH, text_len=12)
    patch.setitem(SIZES, "wan1.3b", small)
    patch.setitem(SIZES, "wan1.3b_camera", dataclasses.replace(small, camera="frame"))
    for name, value in (("height", 4), ("width", 6), ("frames", 9)):
        patch.setitem(FAMILIES["wan2.1"].sampling, name, value)
    for size in ("wan1.3b", "wan1.3b_camera"):
        net = CausalWan(SIZES[size]).init_weights(0)
        for name, p in net.named_parameters():
            if "prope_o" in name or name == "head.head.weight":
                torch.nn.init.normal_(p, std=0.2)
        torch.save({"generator_ema": net.state_dict()}, folder / f"{size}.pt")
    write_text_encoder(folder)
    write_vae(folder)
    yield folder
    patch.undo()


@pytest.mark.parametrize("words", [[], ["--preview"]])
def test_video_is_a_rollout_decoded_as_it_comes(wan, still, words):
    """Bug: a prompt of Wan that changes without a recache; a decoder that forgets between chunks; a chunk of another
    length."""
    import wan21.vae
    player, fox, dog = still(wan / "wan1.3b.pt", *words), "a red fox", "a dog runs"
    frames, truths, _ = follow(player, [(fox, 2, "none")] * 2 + [(dog, 2, "none")] * 2)
    grid, first = grids(2, 5.0)
    x = torch.cat(list(rollout_with_prompts(player.net, noise_of(player), [(0, player.embed(fox)),
                       (6, player.embed(dog))], grid, chunk=3, frames=12, cache=player.net.new_cache(9, 1, True),
                       first_grid=first)), 1)
    whole = wan21.vae.preview(x)[0] if words else wan21.vae.StreamDecoder(wan21.vae.load_vae(wan)).decode(x)[0]
    assert truths is None and len(frames) == (12 if words else 1 + 4 * 11)
    assert (frames.int() - whole.int()).abs().max() <= 1 and player.fps == (4 if words else 16)


def test_video_with_a_camera_is_walked_through(wan, still):
    """Bug: keys that lead elsewhere than --trajectory's, a camera that moves before the first frame, cameras that are
    lost when the prompt changes."""
    player, fox, dog = still(wan / "wan1.3b_camera.pt", "--preview"), "a red fox", "a dog runs"
    frames, _, _ = follow(player, [(fox, 2, "forward"), (fox, 2, "left"), (dog, 2, "left"), (dog, 2, "back"),
                                   (dog, 2, "none"), (dog, 2, "right")])
    rows = trajectory.rows_of(trajectory.viewmats_of("w*2,j*6,s*3"))
    last = trajectory.rows_of(trajectory.viewmats_of("w*2,j*6,s*3,l*3"))[-3:]
    rows = torch.cat([rows, rows[-1:].expand(3, -1), last])[None]
    grid, first = grids(2, 5.0)
    x = torch.cat(list(rollout_with_prompts(
        player.net, noise_of(player), [(at, Condition(player.embed(of), rows)) for at, of in ((0, fox), (6, dog))],
        grid, chunk=3, frames=18, cache=player.net.new_cache(9, 1, True, "poses"), first_grid=first)), 1)
    import wan21.vae
    assert (frames.int() - wan21.vae.preview(x)[0].int()).abs().max() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Time

def test_frames_are_shown_at_their_rate(still, monkeypatch):
    """Bug: frames of a chunk that are shown at once, a chunk that is shown before the last one's end or makes all later
    ones late, a rate above that of the world, more frames kept than there is memory for."""
    player = still("toy")
    player.fps, player.began = 20.0, time.monotonic()
    picture = torch.zeros(3, 10, 10, 3, dtype=torch.uint8).numpy()
    for _ in range(2):
        player.hand_over(player.clip, picture, [None] * 3, {})
    due = [frame.due for frame in player.frames]
    assert torch.tensor(due, dtype=torch.float64).diff().sub(0.05).abs().max() < 1e-6 and due[0] <= time.monotonic()
    player.who, player.asked, got, after = ME, time.monotonic(), [], 0
    while after < 6 and (frame := player.frame(ME, after)):
        assert 0 <= time.monotonic() - frame.due
        after = frame.number
        got.append(after)
    assert got == sorted(set(got)) and got[-1] == 6
    monkeypatch.setattr(time, "monotonic", lambda: due[0] + 9.04)
    player.until = due[0] + 9.0  # late by less than a frame
    player.hand_over(player.clip, picture, [None] * 3, {})
    assert abs(player.frames[-3].due - (due[0] + 9.0)) < 1e-6
    player.until = due[0]  # a machine that is too slow: all frames are shown, but for one
    player.hand_over(player.clip, picture, [None] * 3, {})
    assert abs(player.frames[-3].due - (due[0] + 8.99)) < 1e-6
    assert len(player.frames) == 12
    monkeypatch.setattr(play, "CLIP_BYTES", 5 * picture[0].nbytes)  # of large pictures, fewer are kept
    player.hand_over(player.clip, picture, [None] * 3, {})
    assert [frame.number for frame in player.frames] == [11, 12, 13, 14, 15]


def test_a_short_key_is_one_action(still):
    """Bug: a key that was let go between two frames and never seen, or seen twice; another key that is held forgets
    it."""
    player = still("room")
    player.who, player.asked = ME, time.monotonic()
    for keys, want in (([["left"], []], ["left", "none"]), ([["forward"], ["forward", "left"], ["forward"]],
                       ["left", "forward", "forward"]), ([["forward", "right"]], ["right", "right"])):
        for held in keys:
            player.take(ME, {"keys": held})
        assert [player.wait(0).action for _ in want] == want
    player.take(ME, {"paused": True, "leave": True})
    assert player.wait(0) is None


def test_an_error_ends_the_program(still):
    """Bug: a thread that dies in silence while the page waits for its next frame."""
    player = still("toy")
    with torch.no_grad():
        next(player.net.net.parameters()).fill_(torch.nan)
    player.wait = lambda clip: play.Order(player.words, 2, "none", 0)
    RUN(player)
    with pytest.raises(ValueError, match="non-finite frames.*--weights"), \
            page.Server(player, "127.0.0.1", 0, b"") as server:
        server.service_actions()


# ---------------------------------------------------------------------------------------------------------------------
# The server

@contextmanager
def served(weights, *words):
    """A server of a player. Its page need not ask for frames all the time, as a machine may be slow."""
    patch = pytest.MonkeyPatch()
    patch.setattr(play, "LEASE", 60.0)
    player = play.Player(play.parse(["--weights", str(weights), "--steps", "1", *words]))
    with page.Server(player, "127.0.0.1", 0, (play.ASSETS / "play.html").read_bytes()) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
            player.close()
            patch.undo()
    assert player.error is None and not player.thread.is_alive()


@pytest.fixture(scope="module")
def server(students):
    with served(students["room"]) as server:
        yield server


@pytest.fixture(scope="module")
def toy_server(students):
    with served(students["toy"]) as server:
        yield server


def ask(server, method, path, body=None):
    """Status, what is said of the answer, and the answer."""
    with closing(http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)) as connection:
        connection.request(method, path, None if body is None else json.dumps(body))
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read()


def frame(server, who=ME, after=0):
    status, headers, body = ask(server, "GET", f"/frame?player={who}&after={after}")
    return (status, json.loads(headers["X-About"]) if status == 200 else None, body)


def leave(server, who=ME):
    ask(server, "POST", f"/input?player={who}", {"leave": True})


def until(true, seconds=60.0):
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)
    return found


def test_a_slow_reader_skips_frames(server):
    """Bug: frames that wait for a reader, who then sees the past."""
    _, first, body = until(lambda: (of := frame(server))[0] == 200 and of)
    assert len(body) == 2 * 3 * room.H * room.W and (first["height"], first["width"], first["n"]) == (16, 24, 2)
    until(lambda: server.player.number > first["number"] + 5)
    begin = time.monotonic()
    _, late, _ = frame(server, after=first["number"])
    newest = [of for of in list(server.player.frames) if of.due <= begin][-1]
    assert late["number"] >= newest.number > first["number"] + 2
    leave(server)


def test_one_page_plays(server):
    """Bug: two pages that pull at one walk, or a page that was closed and keeps all others out, or whose clip goes on.
    """
    assert until(lambda: frame(server)[0] == 200)
    status, _, said = frame(server, OTHER)
    assert status == 409 and b"one at a time: close the other one" in said
    assert ask(server, "POST", f"/input?player={OTHER}", {"keys": ["left"]})[0] == 409 and not server.player.keys
    assert ask(server, "GET", f"/clip.webp?player={OTHER}&truth=0")[0] == 409
    assert ask(server, "POST", f"/input?player={ME}", {"keys": ["left"], "seq": 7})[0] == 204
    assert server.player.keys == ["left"]
    leave(server)
    time.sleep(0.3)
    number = server.player.number
    time.sleep(0.3)
    assert server.player.number == number  # nobody plays
    until(lambda: frame(server, OTHER)[0] == 200)
    assert server.player.keys == [] and server.player.seq == 0 and server.player.frames[0].about["given"]
    leave(server, OTHER)


def test_a_page_that_takes_over(still):
    """Bug: the old page's prompt in the new page's clip, as it took long to embed; a page that comes back after its
    lease and sees the clip of before."""
    player = still("toy")
    player.who, player.asked = ME, time.monotonic()
    prompt, embed = player.prompt, player.embed
    player.embed = lambda prompt: setattr(player, "who", OTHER) or embed(prompt)
    with pytest.raises(play.Refused, match="does not play"):
        player.take(ME, {"prompt": next(p for p in player.prompts if p != prompt), "keys": []})
    assert player.prompt == prompt
    clip, player.asked = player.clip, -play.LEASE
    assert player.frame(OTHER, 0) is None and player.clip == clip + 1


def test_rows_that_no_key_tells(still, tmp_path, monkeypatch):
    """Bug: another world whose frames are told numbers, taken for the room; its error came from the player's thread."""
    monkeypatch.setitem(SIZES, "toy", dataclasses.replace(SIZES["toy"], row_dim=1))
    with pytest.raises(ValueError, match="told 1 numbers of each frame.*--weights"):
        still(write_student(tmp_path / "rows.safetensors", "toy"))


def test_a_port_that_is_taken(students):
    """Bug: an error without the flag to change."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(ValueError, match=f"--port {port} .*change --host or --port"):
            play.main(play.parse(["--weights", str(students["toy"]), "--port", port, "--no-browser"]))


def test_a_page_that_is_gone_makes_room(server, monkeypatch):
    """Bug: a browser that crashed and plays for ever."""
    monkeypatch.setattr(play, "LEASE", 0.3)
    monkeypatch.setattr(play, "POLL", 0.1)
    assert until(lambda: frame(server)[0] == 200)
    time.sleep(0.5)
    number = server.player.number
    time.sleep(0.3)
    assert server.player.number == number
    assert until(lambda: frame(server, OTHER)[0] == 200)
    leave(server, OTHER)


def test_pause_restart_seed_and_start(server):
    """Bug: a button of the page that does nothing."""
    first = until(lambda: frame(server)[1])
    say = lambda **message: ask(server, "POST", f"/input?player={ME}", message)[0]
    assert say(paused=True) == 204
    time.sleep(0.2)
    stands = server.player.number
    time.sleep(0.3)
    assert server.player.number == stands and frame(server, after=stands)[0] == 204
    truths = {}
    for seed in (5, 6, 5):
        assert say(paused=False, seed=seed, start="frame", steps=4) == 204
        fresh = until(lambda after=stands: (of := list(server.player.frames)) and of[0].number > after and of)
        stands = server.player.number
        truths.setdefault(seed, []).append(fresh[0].truth.tobytes())
        until(lambda: len(server.player.frames) > 1)
        assert [of.about["given"] for of in list(server.player.frames)[:2]] == [True, False]
        assert server.player.frames[1].about["steps"] == 4
    assert truths[5][0] == truths[5][1] != truths[6][0]
    assert say(restart=True) == 204 and until(lambda: server.player.frames and server.player.frames[0].number > stands)
    clip = server.player.clip
    assert first["steps"] == 1 and say(start="look", steps=1) == 204 and server.player.clip == clip + 1
    leave(server)


def test_a_clip_is_saved(server, tmp_path):
    """Bug: a clip that grows without bound, holds other frames than those shown, lacks the truth asked for, or enlarges
    video."""
    until(lambda: frame(server)[0] == 200)
    until(lambda: len(server.player.frames) > 5)
    for truth, width in ((0, 24), (1, 24 + 1 + 24)):
        status, headers, body = ask(server, "GET", f"/clip.webp?player={ME}&truth={truth}")
        assert status == 200 and headers["Content-Type"] == "image/webp"
        (tmp_path / "clip.webp").write_bytes(body)
        with Image.open(tmp_path / "clip.webp") as image:
            assert image.size == (8 * width, 8 * 16) and 5 <= image.n_frames <= play.CLIP_FRAMES
            shown = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).view(128, -1, 3)
        of = server.player.frames[0].picture
        assert (shown[4::8, 4:192:8].int() - torch.from_numpy(of).int()).abs().float().mean() < 12  # compressed
    large = SimpleNamespace(picture=torch.zeros(200, 24, 3, dtype=torch.uint8).numpy(), truth=None)
    (tmp_path / "clip.webp").write_bytes(page.webp([large, large], True, 12))
    with Image.open(tmp_path / "clip.webp") as image:
        assert image.size == (24, 200)
    leave(server)


def test_prompts_are_switched_while_it_plays(toy_server):
    """Bug: a prompt that is only shown, or words of another world that end the stream."""
    until(lambda: frame(toy_server)[0] == 200)
    about = json.loads(ask(toy_server, "GET", "/about")[2])
    assert about["prompts"] == WORLDS["toy"].prompts and about["words"] and not about["walks"] and not about["starts"]
    status, _, said = ask(toy_server, "POST", f"/input?player={ME}", {"prompt": "purple cow", "steps": 4})
    assert status == 400 and b"a colour of red" in said and toy_server.player.steps == 1
    words = toy_server.player.words
    assert ask(toy_server, "POST", f"/input?player={ME}", {"prompt": "green pole", "seq": 4})[0] == 204
    assert torch.equal(toy_server.player.words, toy_server.player.embed("green pole")) and len(words)
    until(lambda: toy_server.player.frames[-1].about["seq"] == 4)
    number = toy_server.player.number
    until(lambda: toy_server.player.number > number + 2 and frame(toy_server)[0] == 200)
    leave(toy_server)


def get(path, *headers, host="Host: 127.0.0.1"):
    return "\r\n".join([f"GET {path} HTTP/1.1", *([host] if host else []), *headers, "", ""])


def post(body, *headers, path=f"/input?player={ME}", length=None, host="Host: localhost:8000"):
    length = len(body.encode()) if length is None else length
    return "\r\n".join([f"POST {path} HTTP/1.1", host, f"Content-Length: {length}", *headers, "", body])


FRAME = f"/frame?player={ME}&after=0"
GOOD = '{"steps": 2}'
BAD = {  # what is sent, and the status
    "no HTTP": ("hello\r\n\r\n", 400), "no such version": ("GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", 505),
    "a long line": ("GET /" + "a" * 70000 + " HTTP/1.1\r\n\r\n", 414),
    "many headers": (get("/about", *["a: b"] * 200), 431),
    "another method": (get("/about").replace("GET", "DELETE"), 501), "put": (post(GOOD).replace("POST", "PUT"), 501),
    "a file": (get("/play.py"), 404), "a folder": (get("/assets/"), 404), "up": (get("/../../etc/passwd"), 404),
    "up, encoded": (get("/%2e%2e/%2e%2e/etc/passwd"), 404), "an address": (get("http://localhost/about"), 404),
    "post to get": (post(GOOD, path="/about"), 404), "get to post": (get(f"/input?player={ME}"), 404),
    "no host": (get("/", host=""), 400), "another host": (get("/", host="Host: evil.example"), 400),
    "another host, port": (get(FRAME, host="Host: evil.example:8000"), 400),
    "an address as a name": (get(FRAME, host="Host: 127.0.0.1.evil.example"), 400),
    "two hosts": (get(FRAME, "Host: evil.example"), 400), "user": (get(FRAME, host="Host: a@127.0.0.1"), 400),
    "another site": (get(FRAME, "Origin: http://evil.example"), 400), "null site": (post(GOOD, "Origin: null"), 400),
    "another site posts": (post(GOOD, "Origin: http://localhost:8001"), 400),
    "another site fetches": (get(FRAME, "Sec-Fetch-Site: cross-site"), 400),
    "same site": (post(GOOD, "Sec-Fetch-Site: same-site"), 400),
    "no player": (get("/frame?after=0"), 400), "a short name": (get("/frame?player=ab&after=0"), 400),
    "after a word": (get(f"/frame?player={ME}&after=x"), 400),
    "after minus": (get(f"/frame?player={ME}&after=-1"), 400),
    "a long number": (get(f"/frame?player={ME}&after={'9' * 99}"), 400),
    "more": (get(FRAME + "&path=/etc/passwd"), 400), "query of the page": (get("/?x=1"), 400),
    "truth": (get(f"/clip.webp?player={ME}&truth=2"), 400), "a body of a get": (get(FRAME, "Content-Length: 5"), 400),
    "no length": (post(GOOD).replace("Content-Length", "X-Length"), 400), "chunked": (
        post(GOOD, "Transfer-Encoding: chunked"), 400), "minus bytes": (post(GOOD, length=-1), 400),
    "two lengths": (post(GOOD, "Content-Length: 12"), 400), "nothing": (post(""), 400),
    "a large body": (post(GOOD + " " * 5000), 400), "a huge length": (post("", length=10**9), 400),
    "no JSON": (post("steps=2"), 400), "half of it": (post('{"steps": '), 400), "a list": (post("[1, 2]"), 400),
    "nested": (post("[" * 4000), 400), "empty": (post("{}"), 400), "null": (post("null"), 400),
    "unknown": (post('{"weights": "/etc/passwd"}'), 400), "a good and a bad": (post('{"steps": 2, "seed": -1}'), 400),
    "steps 3": (post('{"steps": 3}'), 400), "steps true": (post('{"steps": true}'), 400),
    "steps 2.0": (post('{"steps": 2.0}'), 400), "steps nan": (post('{"steps": NaN}'), 400),
    "a large seed": (post('{"seed": 9007199254740992}'), 400), "a seed of digits": (post('{"seed": "1"}'), 400),
    "a key": (post('{"keys": ["jump"]}'), 400), "keys of keys": (post('{"keys": [["left"]]}'), 400),
    "many keys": (post('{"keys": ["left", "left", "left", "left", "left"]}'), 400),
    "a text of keys": (post('{"keys": "left"}'), 400), "a prompt for a walk": (post('{"prompt": "red ball"}'), 400),
    "a start": (post('{"start": "middle"}'), 400), "a start of objects": (post('{"start": {}}'), 400),
    "paused 1": (post('{"paused": 1}'), 400), "restart false": (post('{"restart": false}'), 400),
}


def state(player):
    return {name: getattr(player, name) for name in
            ("keys", "tapped", "seq", "paused", "steps", "seed", "start", "prompt", "clip", "who", "closed", "error")}


def send(server, text):
    """The answer to raw bytes, to its end."""
    with closing(socket.create_connection(("127.0.0.1", server.server_port), timeout=60)) as connection:
        connection.sendall(text.encode("utf-8", "surrogateescape"))
        answer = b""
        while part := connection.recv(2**16):
            answer += part
    return answer.decode()


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_change_nothing(server, name):
    """Bug: a request that ends the stream, changes half of what it says, opens a file, lists a folder, or shows a
    traceback."""
    until(lambda: frame(server)[0] == 200)
    text, status = BAD[name]
    before = state(server.player)
    head, _, body = send(server, text).partition("\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} "), head
    assert body.count("\n") == 1 and (body.startswith("got ") or name == "no HTTP" or status > 404)
    assert "Connection: close" in head and "text/plain" in head
    assert state(server.player) == before


@pytest.mark.parametrize("body", ['{"prompt": ""}', '{"prompt": "  "}', '{"prompt": 5}', '{"prompt": "\\ud800"}',
                                  '{"prompt": "red\\nball"}', '{"prompt": "red\\u0000ball"}', '{"keys": ["left"]}',
                                  '{"start": "look"}', json.dumps({"prompt": "red" + " " * 1000 + "ball"})])
def test_bad_words_change_nothing(toy_server, body):
    """Bug: a prompt that no tokenizer reads; keys for a world without a camera."""
    until(lambda: frame(toy_server)[0] == 200)
    before = state(toy_server.player)
    assert send(toy_server, post(body)).startswith("HTTP/1.1 400 ") and state(toy_server.player) == before


def test_inputs_and_connections_are_bounded(server, monkeypatch):
    """Bug: a page, or a program, that takes all the time or all the threads there are."""
    until(lambda: frame(server)[0] == 200)
    now = time.monotonic() + 10
    monkeypatch.setattr(page, "time", SimpleNamespace(monotonic=lambda: now))
    got = [ask(server, "POST", f"/input?player={ME}", {"steps": 2})[0] for _ in range(page.INPUTS + 1)]
    assert got == [204] * page.INPUTS + [429]
    now += 1.5 / page.INPUTS
    assert ask(server, "POST", f"/input?player={ME}", {"steps": 1})[0] == 204
    idle = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(page.CONNECTIONS + 4)]
    for connection in (idle[0], idle[-1]):
        connection.settimeout(1)
    try:
        assert idle[-1].recv(1) == b""
    except ConnectionResetError:
        pass
    with pytest.raises(TimeoutError):
        idle[0].recv(1)  # it waits for a request
    for connection in idle:
        connection.close()
    assert until(lambda: connected(server))
    now += 1
    leave(server)
    assert not server.player.is_played()
    server.counted = 0.0  # by the real clock again


def connected(server):
    """Whether the server takes connections again."""
    try:
        return frame(server)[0] == 200
    except (ConnectionError, http.client.HTTPException):
        return False


def test_the_page_loads_nothing_else(server):
    """Bug: a page that tells others that it is open, or does not work without them; one that another site can frame."""
    status, headers, body = ask(server, "GET", "/")
    assert status == 200 and not re.search(rb'(src|href)=(?!"data:,")|url\(|@import|https?:', body)
    assert "default-src 'none'" in headers["Content-Security-Policy"] and headers["X-Frame-Options"] == "DENY"
    assert ask(server, "GET", "/")[0] == 200 and "no-store" in headers["Cache-Control"]
    a_link = get("/", "Sec-Fetch-Site: cross-site", "Connection: close")
    assert send(server, a_link).startswith("HTTP/1.1 200")


def test_the_command(students):
    """Bug: a command that does not say where its page is, takes long to start, or leaves a traceback after Ctrl-C."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command = subprocess.Popen([sys.executable, ROOT / "play.py", "--weights", students["room"], "--port", "0",
                                "--no-browser", "--host", "0.0.0.0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True,  # Ctrl-C is ignored by what a shell starts in the background
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    try:
        port = int(re.search(r"room.safetensors is played at http://127.0.0.1:(\d+)/", command.stdout.readline())[1])
        until(lambda: send(SimpleNamespace(server_port=port), get("/about", "Connection: close")).count('"walks"'))
        with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
            connection.request("GET", FRAME)
            assert connection.getresponse().status in (200, 204)
        command.send_signal(signal.SIGINT)
        out, err = command.communicate(timeout=60)
    finally:
        command.kill()
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 10  # seconds, of one core
    assert command.returncode == 0 and err.splitlines()[-1] == "stopped" and "warning: --host 0.0.0.0" in err
    assert "Traceback" not in err + out


# ---------------------------------------------------------------------------------------------------------------------
# A browser

class Chromium:
    """A page of a browser without a window, told what to do by the DevTools protocol: JSON, each ended by a zero byte.
    """

    def __init__(self, program, folder):
        (to_read, self.to), (self.of, to_write) = os.pipe(), os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe",
                 f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(  # which reads from 3 and writes to 4
            ["bash", "-c", f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}', program, *flags], stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, pass_fds=(to_read, to_write), start_new_session=True)
        os.close(to_read)
        os.close(to_write)
        self.number, self.rest, self.events = 0, b"", []

    def call(self, method, session=None, **params):
        """What a command returns. What is told meanwhile is kept in events."""
        self.number += 1
        message = dict(id=self.number, method=method, params=params) | (dict(sessionId=session) if session else {})
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                assert select.select([self.of], [], [], 60)[0], f"no answer to {method}"
                self.rest += os.read(self.of, 2**16)
            one, self.rest = self.rest.split(b"\0", 1)
            answer = json.loads(one)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, url):
        """A new tab; a function that computes an expression in it."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable", session)
        self.call("Page.navigate", session, url=url)

        def tab(expression):
            return self.call("Runtime.evaluate", session, expression=expression, returnByValue=True,
                             awaitPromise=True)["result"].get("value")

        def key(*kinds, code, key, **more):
            for kind in kinds:
                self.call("Input.dispatchKeyEvent", session, type=kind, code=code, key=key, **more)

        tab.key, tab.session, tab.target = key, session, target
        return tab

    def close(self):
        os.close(self.to)  # upon which it ends
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
        os.close(self.of)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium")
    with closing(Chromium(program, tmp_path_factory.mktemp("chromium"))) as browser:
        yield browser


TRUTH = 'by("truth_view").getContext("2d").getImageData(0, 0, 24, 16).data.join()'
NUMBER = 'Number(by("number").textContent) || 0'


def test_a_walk_in_a_browser(chromium, server, tmp_path):
    """Bug: a page that does not load, whose keys, buttons or touch do nothing or late, that shows no frames, or few;
    that needs a mouse, asks others, or saves no clip; a second tab that does not say why it shows nothing."""
    url = f"http://127.0.0.1:{server.server_port}/"
    leave(server)  # the page of the test before
    tab = chromium.open(url)
    until(lambda: tab(NUMBER) and not tab('by("caption").textContent.includes("given")'))
    assert tab('by("words").hidden && !by("walk").hidden && getComputedStyle(by("view")).imageRendering') == "pixelated"
    tab.key("keyDown", "keyUp", code="KeyT", key="t")
    assert tab('by("truth").hidden') is False
    time.sleep(0.5)
    before = tab(TRUTH)
    time.sleep(0.3)
    assert tab(TRUTH) == before  # nobody walks

    def moves(act):
        """Seconds until the truth is seen from another place; then all keys are let go."""
        before, begin = tab(TRUTH), time.monotonic()
        act()
        until(lambda: tab(TRUTH) != before)
        return time.monotonic() - begin

    def press(code, key):
        def act():
            tab.key("keyDown", code=code, key=key)
            tab.key("keyUp", code=code, key=key)
        return act

    left = press("ArrowLeft", "ArrowLeft")
    seconds = min(moves(left) for _ in range(3))
    if server.player.making < 0.5 / play.FPS:  # a machine that has time to play
        assert seconds < 0.3 and int(tab('by("latency").textContent').split()[0]) < 300
        until(lambda: int(tab('by("fps").textContent')) >= play.FPS - 1)
    moves(press("KeyA", "a"))
    tab.key("keyDown", "keyUp", code="KeyA", key="a", modifiers=2)  # with Ctrl it is not ours
    tab('by("pad").scrollIntoView()')
    x, y = tab('(r => [r.x + r.width / 2, r.y + r.height / 2])(by("pad").children[1].getBoundingClientRect())')
    mouse = dict(x=x, y=y, button="left", clickCount=1, session=tab.session)
    moves(lambda: [chromium.call("Input.dispatchMouseEvent", type=kind, **mouse)
                   for kind in ("mousePressed", "mouseReleased")])
    assert until(lambda: server.player.keys == [])
    tab('by("pad").children[0].focus()')
    names = []
    for _ in range(4):
        names.append(tab('document.activeElement.getAttribute("aria-label")'))
        tab.key("keyDown", "keyUp", code="Tab", key="Tab", windowsVirtualKeyCode=9)
    assert names == ["Walk forward", "Turn left", "Walk back", "Turn right"]
    tab('by("pad").children[1].focus()')
    moves(lambda: tab.key("keyDown", "keyUp", code="Enter", key="Enter", text="\r", windowsVirtualKeyCode=13))

    tab.key("keyDown", "keyUp", code="Digit2", key="2")
    until(lambda: tab('by("steps_now").textContent') == "2")
    assert tab('document.querySelector("#steps [aria-pressed=true]").textContent') == "2"
    tab.key("keyDown", "keyUp", code="KeyP", key="p")
    until(lambda: server.player.paused and tab('by("pause").getAttribute("aria-pressed")') == "true")
    tab.key("keyDown", "keyUp", code="KeyP", key="p")
    until(lambda: not server.player.paused)
    clip = server.player.clip
    tab('by("seed").value = 11, by("seed").onchange()')
    until(lambda: server.player.seed == 11 and server.player.clip == clip + 1)
    tab('by("start").value = "nothing", by("start").onchange()')
    until(lambda: server.player.start == "nothing" and server.player.clip == clip + 2)
    number = server.player.number
    until(lambda: tab(NUMBER) > number + 2)
    chromium.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    tab.key("keyDown", "keyUp", code="KeyC", key="c")
    saved = until(lambda: [path for path in tmp_path.glob("clip.webp") if path.stat().st_size])
    with Image.open(saved[0]) as image:
        assert image.size == (8 * 49, 8 * 16) and image.is_animated

    second = chromium.open(url)
    until(lambda: "one at a time" in (second('typeof by === "function" && by("message").textContent') or ""))
    chromium.call("Target.closeTarget", targetId=second.target)
    number = tab(NUMBER)
    until(lambda: tab(NUMBER) > number + 2)
    of_first = [event for event in chromium.events if event.get("sessionId") == tab.session]
    asked = [event["params"]["request"]["url"] for event in of_first if event["method"] == "Network.requestWillBeSent"]
    assert asked and all(of.startswith((url, "data:", f"blob:{url}")) for of in asked)
    assert not [event for event in of_first if event["method"] == "Runtime.exceptionThrown" or
                event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error"]
    chromium.call("Page.navigate", tab.session, url="about:blank")
    until(lambda: not server.player.is_played(), 20)  # it has said good-bye: the lease is longer


def test_prompts_in_a_browser(chromium, toy_server):
    """Bug: buttons of prompts that are missing, or that do nothing."""
    leave(toy_server)  # the page of the test before
    tab = chromium.open(f"http://127.0.0.1:{toy_server.server_port}/")
    until(lambda: tab(NUMBER))
    hidden = '["walk", "words", "typed", "show_truth"].map(id => by(id).hidden)'
    assert tab(hidden) == [True, False, True, True]
    assert tab('[...by("prompts").children].map(b => b.textContent)') == WORLDS["toy"].prompts
    assert toy_server.player.prompt != "blue pole"
    tab('[...by("prompts").children].find(b => b.textContent === "blue pole").click()')
    until(lambda: toy_server.player.prompt == "blue pole" and tab('by("latency").textContent !== "-"'))
    assert tab('document.querySelector("#prompts [aria-pressed=true]").textContent') == "blue pole"
    chromium.call("Target.closeTarget", targetId=tab.target)
