"""The server of play.py's page: what a request may be, and what it is answered with. The standard library's, no more.

    GET  /                                 the page
    GET  /about                            what is played, JSON
    GET  /frame?player=NAME&after=NUMBER   the newest frame, RGB, the truth behind it; X-About: JSON. 204: none yet
    GET  /clip.webp?player=NAME&truth=0    the last frames
    POST /input?player=NAME                JSON, as `checked` has it

NAME is one that a page makes up, 32 hexadecimal digits; it plays whose /frame comes first. Every other request gets one
line that says what is wrong, status 400 for the most part, and changes nothing. A page of another site can neither ask
(Origin, Sec-Fetch-Site) nor have its own name point here (Host: DNS rebinding).
"""

import json
import re
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from wan21 import video

INPUT_BYTES, INPUTS, CONNECTIONS, CLIP_HEIGHT = 2**12, 50, 16, 128  # bytes, per second, at a time, pixels
NAME = "player=([0-9a-f]{32})"
ROUTES = {"GET /": "", "GET /about": "", "GET /frame": NAME + "&after=([0-9]{1,15})",
          "GET /clip.webp": NAME + "&truth=([01])", "POST /input": NAME}  # and their queries
OURS = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"


class Refused(ValueError):
    """A refusal with a status other than 400."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


def check_origin(headers, host: str, of_page: bool):
    """ValueError unless a request comes to this server by an address, localhost or `host`, and from our own page; the
    page itself may be asked for from anywhere."""
    hosts = headers.get_all("Host", [])
    if len(hosts) != 1 or not re.fullmatch(rf"(localhost|[0-9.]+|\[[0-9a-f:]+\]|{re.escape(host)})(:[0-9]{{1,5}})?",
                                           hosts[0]):
        raise ValueError(f"got the host {str(hosts)[:60]}, expected this machine's address, or what --host says")
    if not of_page and (headers.get("Origin", f"http://{hosts[0]}") != f"http://{hosts[0]}"
                        or headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")):
        raise ValueError("got a request of another site, expected one of this page")


def checked(message, about: dict) -> dict:
    """An input, a JSON object of some of the names below. ValueError if any of it cannot be. about: what is played."""
    def whole(x):
        return type(x) is int and 0 <= x < 2**53

    expected = {
        "keys": ("the actions held, the last pressed last, of a walk", lambda x: about["walks"] and type(x) is list
                 and len(x) <= 4 and all(key in ("forward", "back", "left", "right") for key in x)),
        "prompt": ("a line of at most 1000 characters, of a student that is told words", lambda x: about["words"]
                   and type(x) is str and len(x) <= 1000 and x.isprintable()),
        "steps": (f"one of {about['all_steps']}", lambda x: whole(x) and x in about["all_steps"]),
        "start": (f"one of {about['starts']}", lambda x: type(x) is str and x in about["starts"]),
        "seed": ("a whole number from 0", whole), "seq": ("the number of this input", whole),
        "paused": ("true or false", lambda x: type(x) is bool),
        "restart": ("true", lambda x: x is True), "leave": ("true", lambda x: x is True)}
    if type(message) is not dict or not message or message.keys() - expected.keys():
        raise ValueError(f"got {str(message)[:60]!r}, expected an object of some of {', '.join(expected)}")
    for name, value in message.items():
        if not expected[name][1](value):
            raise ValueError(f"got {name} {str(value)[:60]!r}, expected {expected[name][0]}")
    return message


def webp(frames, with_truth: bool, fps: float) -> bytes:
    """Frames as an animated picture, on request with the truth to their right, small ones enlarged."""
    pictures = np.stack([frame.picture for frame in frames])  # (f h w 3)
    if with_truth and frames[0].truth is not None:
        line = np.full_like(pictures[:, :, :1], 255)
        pictures = np.concatenate([pictures, line, np.stack([frame.truth for frame in frames])], axis=2)
    scale = -(-CLIP_HEIGHT // pictures.shape[1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.webp"
        with video.writer(path, fps) as write:
            write(pictures.repeat(scale, 1).repeat(scale, 2))
        return path.read_bytes()


class Handler(BaseHTTPRequestHandler):
    protocol_version, timeout, wbufsize, disable_nagle_algorithm = "HTTP/1.1", 10, -1, True

    def do_GET(self):
        path, _, query = self.path.partition("?")
        route, player = f"{self.command} {path}", self.server.player
        try:
            if route not in ROUTES:
                raise Refused(404, f"got {route[:60]!r}, expected one of {', '.join(ROUTES)}")
            check_origin(self.headers, self.server.host, route == "GET /")
            match = re.fullmatch(ROUTES[route], query)
            if not match:
                raise ValueError(f"got the query {query[:60]!r}, expected {ROUTES[route] or 'none'}")
            body = self.body()
            if route == "GET /":
                self.reply(200, self.server.page, "text/html; charset=utf-8")
            elif route == "GET /about":
                self.reply(200, json.dumps(player.about()).encode(), "application/json")
            elif route == "GET /clip.webp":
                frames = player.last_frames(match[1])
                with self.server.saving:
                    self.reply(200, webp(frames, match[2] == "1", player.fps), "image/webp")
            elif route == "POST /input":
                self.server.count_input()
                player.take(match[1], checked(body, player.about()))
                self.reply(204)
            elif frame := player.frame(match[1], int(match[2])):
                parts = [frame.picture, *([] if frame.truth is None else [frame.truth])]
                about = frame.about | {"height": len(frame.picture), "width": len(frame.picture[0]), "n": len(parts)}
                self.reply(200, b"".join(part.tobytes() for part in parts), about=json.dumps(about))
            else:
                self.reply(204)
        except ValueError as e:
            self.send_error(getattr(e, "status", 400), str(e))

    do_POST = do_GET

    def body(self):
        """The JSON of a POST; None of a GET, which has no body. ValueError for any other body."""
        length = " ".join(self.headers.get_all("Content-Length", ["0"]))
        if not re.fullmatch("[0-9]{1,5}", length) or int(length) > INPUT_BYTES or "Transfer-Encoding" in self.headers:
            raise ValueError(f"got a body of {length[:20]} bytes, or of none told, expected at most {INPUT_BYTES}")
        if (self.command == "POST") != (int(length) > 0):
            raise ValueError("got a GET with a body or a POST without, expected the contrary")
        try:
            return json.loads(self.rfile.read(int(length)).decode()) if int(length) else None
        except (ValueError, RecursionError) as e:
            raise ValueError("got a body that cannot be read, expected JSON in UTF-8") from e

    def send_error(self, code, message=None, explain=None):
        """One line, and the end of the connection: what else it holds was never read."""
        self.close_connection, self.request_version = True, self.protocol_version  # 0.9 has no head
        text = " ".join((message or "got no HTTP request, expected one").encode("ascii", "replace").decode().split())
        self.reply(code, f"{text}\n".encode(), "text/plain; charset=utf-8")

    def reply(self, status: int, body: bytes = b"", kind: str = "application/octet-stream", about: str = ""):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "X-About": about, "Cache-Control": "no-store",
                            "Content-Security-Policy": OURS, "X-Content-Type-Options": "nosniff",
                            "X-Frame-Options": "DENY", "Cross-Origin-Resource-Policy": "same-origin",
                            "Connection": "close" if self.close_connection else "keep-alive"}.items():
            if value:
                self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def version_string(self):
        return "play"

    def log_message(self, *args):
        """Nothing: a line per frame."""


class Server(ThreadingHTTPServer):
    """A thread for each of few connections. What the player's thread has raised, serve_forever raises."""

    daemon_threads = True

    def __init__(self, player, host: str, port: int, page: bytes):
        self.player, self.host, self.page = player, host, page
        self.free, self.saving, self.counting = threading.Semaphore(CONNECTIONS), threading.Lock(), threading.Lock()
        self.inputs, self.counted = INPUTS, 0.0  # that may still come, as of then
        super().__init__((host, port), Handler)

    def count_input(self):
        """Refused if there have been too many of late."""
        with self.counting:
            now = time.monotonic()
            self.inputs = min(INPUTS, self.inputs + INPUTS * (now - self.counted))
            self.counted = now
            if self.inputs < 1:
                raise Refused(429, f"got more than {INPUTS} inputs a second, expected fewer")
            self.inputs -= 1

    def process_request(self, request, client_address):
        if self.free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def handle_error(self, request, client_address):
        """Nothing for a page that was closed in the middle of an answer."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def service_actions(self):
        if self.player.error:
            raise self.player.error
