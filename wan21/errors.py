"""What is said to the user: errors that name flags, files and packages, and words on stderr."""

import sys
from contextlib import contextmanager


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def flag_of(name: str) -> str:
    """The flag of a setting."""
    return f"--{'continue' if name == 'clip' else name.replace('_', '-')}"


def need(settings, ok, names: str, expected: str, flag_of=flag_of) -> None:
    """ValueError that names what was got for these settings, attributes of an object, unless ok."""
    if not ok:
        got = ", ".join(f"{flag_of(name)} {getattr(settings, name)}"[:200] for name in names.split())
        raise ValueError(f"got {got}, expected {expected}")


@contextmanager
def reading(path, expected: str, *errors: type[Exception], error=ValueError):
    """`error` that names the file, why it cannot be read, and what was expected, in place of these errors."""
    try:
        yield
    except errors as e:
        why = " ".join(str(e).split())[:400]  # it may name every tensor
        raise error(f"got {path}, which cannot be read ({type(e).__name__}: {why}), expected {expected}") from e


@contextmanager
def optional_packages():
    """Around imports of what requirements-wan.txt lists: ValueError that says what to install."""
    try:
        yield
    except ImportError as e:
        raise ValueError(f"got no package {e.name} ({e}), expected it: pip install -r requirements-wan.txt") from e
