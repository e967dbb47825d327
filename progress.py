"""Leaf: progress bars with rate and remaining time. On a terminal they move; a log gets a line now and then."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO

from tqdm import tqdm

LOG_EVERY = 60.0  # seconds between two lines in a log; what takes less leaves none

_quiet = False


class _Lines:
    """A stream on which each state of a bar is a line of its own."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        """Without what moves a cursor."""
        if text.strip():
            self.stream.write(text.strip("\r\n ") + "\n")

    def flush(self) -> None:
        """At once, for whoever follows a log."""
        self.stream.flush()


def bar(work: Iterable | None = None, **how: object) -> tqdm:
    """tqdm(work, **how), as suits where it is shown; none after `be_quiet`."""
    how["disable"] = bool(how.get("disable")) or _quiet
    if not sys.stderr.isatty():
        how |= {"file": _Lines(sys.stderr), "mininterval": LOG_EVERY, "maxinterval": LOG_EVERY, "delay": LOG_EVERY}
        how["bar_format"] = "{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left, {rate_fmt}{postfix}"
    return tqdm(work, **how)


def warn(text: str) -> None:
    """What a reader must not miss: among the other words, or on stderr where there are none."""
    print(text, file=sys.stderr if _quiet else sys.stdout)


def say(text: str) -> None:
    """A line among moving bars."""
    tqdm.write(text)


@contextlib.contextmanager
def own_voice() -> Iterator[None]:
    """Within it `be_quiet` holds, and no longer."""
    global _quiet
    stream = sys.stdout
    try:
        yield
    finally:
        if sys.stdout is not stream:
            sys.stdout.close()
        sys.stdout, _quiet = stream, False


def be_quiet() -> None:
    """No bars and nothing on stdout from here: warnings and errors alone are heard."""
    global _quiet
    sys.stdout, _quiet = open(os.devnull, "w"), True
