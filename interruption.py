"""Leaf: what a signal does to a run. Scripts begin it before their long imports, so that it holds during those, too.

A scheduler that wants its machine back sends SIGTERM, a terminal that is lost SIGHUP, somebody at the keyboard SIGINT.
Inside a step (`Steps`) the step is finished and written first; anywhere else, and at the second signal, the run ends at
once. It ends with one line, which says what the same command will do, and with the code that shells expect, 128 + the
signal's number. A signal that the caller had ignored (nohup) stays ignored.
"""

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
NOTHING_YET = "nothing to continue from, the same command starts anew"
Item = TypeVar("Item")


class Interrupted(KeyboardInterrupt):
    """A signal ended the run."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class Steps:
    """A stretch of work in steps that are not broken off.

    steps = Steps()
    for batch in steps.of(loader):
        ...
        if steps.asked:     the last step before the end: write what is to be gone on from
    """

    under_way: "Steps | None" = None  # of the process: a signal knows of one

    def __init__(self):
        self.number: int | None = None  # of the signal that came

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return self.number is not None

    def of(self, items: Iterable[Item]) -> Iterator[Item]:
        """The same items; a signal waits until the loop asks for the next one, and then ends the run."""
        Steps.under_way = self
        try:
            for item in items:
                yield item
                if self.asked:
                    raise Interrupted(self.number)
            if self.asked:  # while it was found out that there is no next one
                raise Interrupted(self.number)
        finally:
            Steps.under_way = None


_memory = {"words": NOTHING_YET, "running": False}


def begin() -> None:
    """From now on signals end the run as this module says. In the main thread, once."""
    _stand_in_for_closed_streams()
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _on_signal)


def _stand_in_for_closed_streams() -> None:
    """Where a caller closed stdin, stdout or stderr, no file of ours is to get that number, and words go to nobody."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))


def running() -> None:
    """The imports are done: from here on a signal is an exception, and what is open is closed."""
    _memory.update(words=NOTHING_YET, running=True)


def remember(words: str) -> None:
    """What the same command would do if the run ended now."""
    _memory["words"] = words


def continues(step: int, total: int) -> str:
    """What `remember` wants to hear of a training."""
    return f"the same command continues from step {step} of {total}"


def remembered() -> str:
    """What the same command would do if the run ended now."""
    return _memory["words"]


def last_words(error: KeyboardInterrupt) -> str:
    """The line that an interrupted run ends with."""
    by = f" by {error}" if isinstance(error, Interrupted) else ""
    return f"interrupted{by}: {_memory['words']}"


def ignore_signals(worker: int = 0) -> None:
    """For a process that reads ahead: signals are meant for the one that it reads for, and it ends with that one."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _on_signal(number: int, frame: object) -> None:
    _leave_a_lost_terminal()
    if not _memory["running"]:
        os.write(2, f"{last_words(Interrupted(number))}\n".encode())
        os._exit(128 + number)  # in the middle of an import nothing is open, and an exception might be swallowed
    steps = Steps.under_way
    if steps is None or steps.asked:
        raise Interrupted(number)
    steps.number = number
    os.write(2, f"\n{signal.Signals(number).name}: finishing the step; once more ends it now\n".encode())


def _leave_a_lost_terminal() -> None:
    """Where nobody reads what is printed any more, print to nobody: an error about that would end the step."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:  # the terminal was hung up
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
