"""Leaf: how much of its time the device waited for data.

    waiting = Waiting()
    for batch in waiting.of(loader):    again for every other loop of the phase, within this one too
        ...
    print(waiting.told())

A loop that fetches something from the device before it asks for the next batch (latents, scores, on a CPU a gradient's
norm) leaves it nothing to do meanwhile: the host's clock is enough. A training on a GPU fetches nothing, and the GPU
may still be at earlier steps when a batch comes (computing.busy): then it did not wait. One that ended them in between
is taken to have waited all that while: the share is the most that it can have been.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Batch = TypeVar("Batch")
END = object()


class Waiting:
    """Seconds in which a batch was asked for and had not come, and seconds of the loops as a whole.

    Those in which a device was `busy` to the end are none that it waited.
    """

    def __init__(self, busy: Callable[[], bool] = lambda: False):
        self.busy, self.seconds = busy, 0.0
        self._past, self._began, self._loops, self._came = 0.0, 0.0, 0, False

    def of(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches."""
        if self._loops == 0:
            self._began = time.perf_counter()
        self._loops += 1
        try:
            source = None
            while True:
                asked = time.perf_counter()
                source = iter(batches) if source is None else source  # a loader starts its processes here
                batch = next(source, END)
                if not self.busy():
                    self.seconds += time.perf_counter() - asked
                if batch is END:
                    return
                self._came = True
                yield batch
        finally:
            self._loops -= 1
            if self._loops == 0:
                self._past += time.perf_counter() - self._began

    @property
    def whole(self) -> float:
        """Seconds of the loops, the one under way among them; what stands in another one is counted once."""
        return self._past + (time.perf_counter() - self._began if self._loops else 0.0)

    @property
    def share(self) -> float:
        """Of the time of the loops, in [0, 1]."""
        return self.seconds / max(1e-9, self.whole)

    def told(self) -> str:
        """A phase's line about it."""
        if not self._came:
            return "no batch was left to compute, and none to wait for"
        seconds = f"{self.seconds:.1f} of {self.whole:.1f} s"
        return f"the device waited for data {100 * self.share:.1f} % of the time ({seconds})"
