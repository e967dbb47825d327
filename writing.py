"""Leaf: what phase 4 puts on the disk while the device computes the next images.

    with Writing(workers, most) as writing:
        writing.draw(save_result, path, ...)    by one of `workers` processes; with none, here and at once
        writing.keep(np.save, path, array)      by a thread
        writing.finish()                        everything is on the disk

A function and what it is given are handed to a process whole, so both come from a file of the house or of a library.
Of each kind no more than `most` are under way: whoever asks for another waits for the oldest, so that a slow disk costs
time and no memory. An error ends the run with its own words, at the next call that asks for something. What comes out
is what one process alone would write, to the last byte.

A process of its own knows no torch, so that it is small and starts at once, at the first picture that nobody is free to
draw. It hears no signal, which the run sees to, and ends when the run is no more, however that ended.
"""

if __name__ == "__main__":
    import interruption

    interruption.ignore_signals()

import os
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType

from checks import UsageError
from interruption import SIGNALS, remembered

STDIN = 0  # of a process that draws: the end of a pipe that goes both ways
HANDS_ON = os.name == "posix"  # Windows hands no such pipe to a process: there the run draws itself


class Writing:
    """Drawing and keeping beside the loop that asks for it."""

    def __init__(self, workers: int, most: int):
        self._drawing = _Line(workers, most) if workers and HANDS_ON else None
        self._keeping = _Line(1, most)
        self._of_thread, self._processes = threading.local(), []

    def draw(self, function: Callable[..., None], *given: object) -> None:
        """What keeps a processor busy, such as a figure."""
        if self._drawing:
            self._drawing.put(self._by_process, function, given)
        else:
            function(*given)

    def keep(self, function: Callable[..., None], *given: object) -> None:
        """What waits for the disk, such as an array."""
        self._keeping.put(function, *given)

    def finish(self) -> None:
        """Wait until all that was asked for is on the disk."""
        for line in self._lines:
            line.finish()

    @property
    def _lines(self) -> list["_Line"]:
        return [line for line in (self._drawing, self._keeping) if line]

    def _by_process(self, function: Callable[..., None], given: tuple) -> None:
        """In a thread of the drawing line, which has a process of its own from its first picture on."""
        if not hasattr(self._of_thread, "process"):
            self._of_thread.process = _Process()
            self._processes.append(self._of_thread.process)
        self._of_thread.process.run(function, given)

    def __enter__(self) -> "Writing":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is None:
                self.finish()
        finally:  # after an error what has not begun is left out, and what has is ended
            for line in self._lines:
                line.close()
            for process in self._processes:
                process.close()


class _Line:
    """Work that threads do, in the order in which it was asked for; so much of it is under way at once."""

    def __init__(self, threads: int, most: int):
        self._pool = ThreadPoolExecutor(threads, initializer=_leave_signals_to_the_main_thread)
        self._under_way: deque[Future] = deque()
        self._most = most

    def put(self, function: Callable[..., None], *given: object) -> None:
        while self._under_way and (self._under_way[0].done() or len(self._under_way) >= self._most):
            self._under_way.popleft().result()  # raises what it raised
        self._under_way.append(self._pool.submit(function, *given))

    def finish(self) -> None:
        while self._under_way:
            self._under_way.popleft().result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _leave_signals_to_the_main_thread() -> None:
    """A process that this thread starts has them blocked too, before its first line is read."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


class _Process:
    """A fresh Python, not a copy of this one: what a GPU and threads are in the middle of is not to be copied."""

    def __init__(self):
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen([sys.executable, __file__], stdin=theirs.fileno())

    def run(self, function: Callable[..., None], given: tuple) -> None:
        try:
            self._connection.send((function, given))
            error, where = self._connection.recv()
        except (EOFError, OSError) as ended:
            raise UsageError(f"{_why_ended(self._process)}; {remembered()}") from ended
        if error is not None:
            raise error from RuntimeError(where)

    def close(self) -> None:
        self._connection.close()
        self._process.wait()


def _why_ended(process: subprocess.Popen) -> str:
    """What to say of a process that draws and is no more."""
    code = process.wait()
    if code > 0:  # by itself: an import that failed, say, about which it has spoken
        return f"a process that draws ended with code {code}, see above: --data.num-workers 0 draws in the main process"
    return (
        "a process that draws was killed, perhaps for want of memory: lower data.num_workers (0 draws in the main "
        "process) or inference.batch_size"
    )


def serve(connection: Connection) -> None:
    """Do what comes until nobody is there any more who could ask: the other end is closed, be it by a SIGKILL."""
    while True:
        try:
            function, given = connection.recv()
        except (EOFError, OSError):
            return
        told = _attempt(function, given)
        try:
            connection.send(told)
        except OSError:
            return


def _attempt(function: Callable[..., None], given: tuple) -> tuple[Exception | None, str]:
    """Why it could not be done, and where: an error of a library goes by its name, since not all of them travel."""
    try:
        function(*given)
    except (UsageError, OSError, MemoryError) as error:
        return error, traceback.format_exc()
    except Exception as error:
        return RuntimeError(f"{type(error).__name__}: {error}"), traceback.format_exc()
    return None, ""


if __name__ == "__main__":
    serve(Connection(STDIN))
