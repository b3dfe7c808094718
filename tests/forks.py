"""Programs that start at once: each is a fork of one process that has imported torch and the other libraries, which
takes a new Python four seconds. Of the project nothing is imported before the fork.

    server = open_server()
    start(server, ["train.py", "--help"], ...) -> Program;   Program.ended() -> subprocess.CompletedProcess
"""

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Program:
    """A program that was started, and the files that it writes stdout and stderr to."""

    server: subprocess.Popen
    pid: int
    out: Path
    err: Path

    def ended(self, seconds=120) -> subprocess.CompletedProcess:
        """Wait for its end. Killed when it takes longer; its code is then -9, as those of all signals are negative."""
        code = ask(self.server, ended=self.pid, seconds=seconds)
        return subprocess.CompletedProcess(self.pid, code, self.out.read_text(), self.err.read_text())


def open_server() -> subprocess.Popen:
    return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            start_new_session=True)


def ask(server, **what) -> int:
    server.stdin.write(json.dumps(what) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


def start(server, words, log: Path, cwd: Path, env: dict) -> Program:
    """What `python WORDS` does in the folder cwd. log: NAME of the files NAME.out and NAME.err. env: added to the
    environment; its SIZES: see `resize`."""
    files = [str(log) + end for end in (".out", ".err")]
    for name in files:
        Path(name).touch()
    pid = ask(server, words=[str(word) for word in words], files=files, cwd=str(cwd),
              env={k: str(v) for k, v in env.items()})
    return Program(server, pid, *map(Path, files))


# ---------------------------------------------------------------------------------------------------------------------
# The server

def serve():
    sys.path.pop(0)  # this file's folder
    import einops  # noqa: F401
    import numpy  # noqa: F401
    import PIL.Image  # noqa: F401
    import pytest  # noqa: F401  # of tests that run as programs
    import safetensors.torch  # noqa: F401
    import torch._dynamo  # noqa: F401  # an optimizer imports it when it is made
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp  # noqa: F401
    import tqdm  # noqa: F401
    gc.freeze()  # a collection in a fork would copy all that has been imported
    running = set()
    for line in sys.stdin:
        asked = json.loads(line)
        if pid := asked.get("ended"):
            print(wait(**asked), flush=True)
            running.remove(pid)
        else:
            running.add(pid := fork(**asked))
            print(pid, flush=True)
    for pid in running:  # of tests that have failed
        os.kill(pid, signal.SIGKILL)
    os._exit(0)


def fork(words, files, cwd, env):
    if pid := os.fork():
        return pid
    for handle, name in enumerate(["/dev/null", *files]):
        os.dup2(os.open(name, os.O_RDWR), handle)
    os.chdir(cwd)
    os.environ |= env
    tempfile.tempdir = None  # that of the new environment
    sys.path[:0] = [os.path.dirname(os.path.abspath(words[0])) if words[0].endswith(".py") else cwd, str(ROOT),
                    str(ROOT / "tests")]
    try:
        resize()
        code = run(words)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: to take torch apart lasts a second


def run(words):
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
    return 0


def resize():
    """Replace in model.SIZES what the environment's SIZES says, a JSON object {size: {name: value}}."""
    if sizes := json.loads(os.environ.get("SIZES", "{}")):
        from dataclasses import replace

        import model
        model.SIZES |= {size: replace(model.SIZES[size], **changes) for size, changes in sizes.items()}


def wait(ended, seconds):
    limit = time.monotonic() + seconds
    while True:
        if time.monotonic() > limit:
            os.kill(ended, signal.SIGKILL)
        pid, status = os.waitpid(ended, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)


if __name__ == "__main__":
    serve()
