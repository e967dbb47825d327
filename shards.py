"""Leaf: one phase done by several: who does which batches, and how they wait for one another.

A shard is a stretch of whole batches, cut where a single run cuts them: every batch is one of the single run's, and so
is every byte of what comes out. Each shard works in a folder of its own, shard_2_of_8, and one process makes the result
of all. Under torchrun each process is a shard and the first makes the result; phase 4 also knows shards that are jobs
of their own (inference.shard).

Waiting is asking the disk now and then. No process group waits, so that no timeout of one ends a long calibration, and
a signal ends the waiting at once.
"""

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from checks import UsageError
from files import unsealed, write_json, write_sealed_json
from holding import hold, lock_of
from progress import be_quiet, warn

TOGETHER = ".together.json"  # what the first process of a team told the others last
SHARD = "shard.json"  # in a shard's folder: of what it is a part
PURPOSE = "shard"  # for which a shard's folder is held
ASK_AT_FIRST, ASK_AT_LAST = 0.05, 5.0  # seconds between two looks at the disk
Found = TypeVar("Found")


@dataclass(frozen=True)
class Shard:
    """The number-th of count parts, counted from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Of 2/8."""
        return cls(*map(int, text.split("/")))

    @property
    def name(self) -> str:
        """Of its folder, and in words."""
        return f"shard_{self.number}_of_{self.count}"

    @property
    def everyone(self) -> list["Shard"]:
        """It and all others, in order."""
        return [Shard(number, self.count) for number in range(1, self.count + 1)]

    def cut(self, batches: int) -> slice:
        """Which of so many batches are its own; all shards together have each once."""
        return slice(batches * (self.number - 1) // self.count, batches * self.number // self.count)

    def rows(self, total: int, batch_size: int) -> range:
        """Which of so many rows, in batches of this size from the first on, are its own."""
        own = self.cut(-(-total // batch_size))
        return range(min(total, batch_size * own.start), min(total, batch_size * own.stop))


class Team:
    """The processes of one torchrun, which make one result in the folder `out`; a process alone is a team of one.

    team = Team(out)
    if team.leads:
        ...             what one process does first
        team.begin()    the others may work now
    elif not team.may_begin():
        return          there is nothing to do
    ...                 each its shard
    team.end()          the result is there: the first says so, the others wait for it
    """

    def __init__(self, out: Path):
        state = PartialState()
        self.shard, self.path = Shard(state.process_index + 1, state.num_processes), out / TOGETHER
        self.leads, self.alone = self.shard.number == 1, self.shard.count == 1
        token = [secrets.token_hex(8)]  # by it what this run says is known from what an earlier one said
        self.run = token[0] if self.alone else broadcast_object_list(token)[0]
        if not self.leads:
            be_quiet()  # the first speaks for all

    def begin(self) -> None:
        """By the first: the others may work."""
        self._say("begin")

    def may_begin(self) -> bool:
        """By the others: wait for the first; False if all is done already."""
        return wait_for(self._said) == "begin"

    def end(self) -> None:
        """By all. The others wait: a node that ends early can take the rendezvous of the others with it."""
        if self.leads:
            self._say("end")
        else:
            wait_for(lambda: self._said() == "end" or None)
        if not self.alone:
            PartialState().destroy_process_group()

    def _say(self, word: str) -> None:
        if not self.alone:
            write_json(self.path, {"run": self.run, "word": word})

    def _said(self) -> str | None:
        """The last word of the first of this very run; None before there is one."""
        try:
            said = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return None
        return said["word"] if said["run"] == self.run else None


def wait_for(ready: Callable[[], Found | None]) -> Found:
    """Ask until there is an answer; UsageError if the process that started this one, torchrun, is no more."""
    parent, pause = os.getppid(), ASK_AT_FIRST
    while (found := ready()) is None:
        if os.getppid() != parent:
            raise UsageError("torchrun was ended while its processes waited for one another: give the command again")
        time.sleep(pause)
        pause = min(ASK_AT_LAST, 1.5 * pause)
    return found


# ---------------------------------------------------------------- folders


def label(folder: Path, made_of: dict, run: str = "") -> None:
    """Write in a shard's folder of what it is a part, and in which run of a team."""
    write_sealed_json(folder / SHARD, {"made_of": made_of, "run": run})


def label_of(folder: Path) -> dict:
    """What `label` wrote; one of nothing where there is none, or it is damaged."""
    try:
        return unsealed(json.loads((folder / SHARD).read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError):
        return {"made_of": {}, "run": ""}


def shards_in(out: Path) -> list[Shard]:
    """The shards that have a folder below `out`, in order."""
    ours = (path.parent for path in out.glob(f"shard_*_of_*/{lock_of(PURPOSE)}"))  # and not one of that name
    names = (re.fullmatch(r"shard_(\d+)_of_(\d+)", path.name) for path in ours)
    return sorted((Shard(int(name[1]), int(name[2])) for name in names if name), key=lambda s: (s.count, s.number))


def remove_shards(out: Path) -> None:
    """Remove the folders of all shards below `out`, but those in which somebody works."""
    for shard in shards_in(out):
        folder = out / shard.name
        try:
            with hold(folder, PURPOSE):
                (folder / SHARD).unlink(missing_ok=True)  # first: half of it shall not pass for a shard
        except UsageError as error:
            warn(f"{folder} stays: {error}")
            continue
        shutil.rmtree(folder, ignore_errors=True)  # a network disk may keep what somebody still has open
