"""Leaf: one writer at a time in a folder, and what killed writers left there."""

import json
import os
import socket
import time
import warnings
import weakref
from pathlib import Path
from typing import TextIO

from checks import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class Held:
    """A folder that is kept for one purpose until `close()`, which lets others in, or until nobody has this object."""

    def __init__(self, file: TextIO):
        self.close = weakref.finalize(self, _let_go, file)  # also when nobody has it any more, or the program ends
        _held.add(self)

    def __enter__(self) -> "Held":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


_held: "weakref.WeakSet[Held]" = weakref.WeakSet()


def _let_go(file: TextIO) -> None:
    file.truncate(0)  # it names no owner any more
    file.close()


def _leave_to_the_parent() -> None:
    """In a process that is forked off, such as one that reads ahead: it outlives a killed parent by some seconds."""
    for held in list(_held):
        whole = held.close.detach()
        if whole:
            _, _, (file,), _ = whole
            file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)


def hold(folder: Path | str, purpose: str) -> Held:
    """Keep others that hold this folder for the same purpose away, and clear away what killed ones left in it.

    UsageError, naming the owner and since when, if one holds it already. The system lets go when a process ends,
    however it ends. Where there are no such locks (Windows, some network disks) the owner's note alone counts, and a
    warning says so.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder) / lock_of(purpose)
    file = open(path, "a+", encoding="utf-8")
    try:
        if fcntl is None:
            raise OSError("this system has no such locks")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = _owner(path)
        file.close()
        raise UsageError(_taken(folder, owner)) from error
    except OSError as error:
        owner = _owner(path)
        if owner and owner["host"] == socket.gethostname() and is_alive(owner["process"]):
            file.close()
            raise UsageError(_taken(folder, owner)) from error
        warnings.warn(f"{folder} cannot be locked ({error}): see that no other run writes there", stacklevel=2)
    file.truncate(0)
    file.write(json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": time.time()}))
    file.flush()
    remove_leftovers(folder)
    return Held(file)


def take(descriptor: int, alone: bool, wait: bool = False) -> bool:
    """Lock an open file, alone or with others who do the same, until it is closed or taken otherwise.

    False where another's lock is in the way and nobody waits, or where there are no such locks.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def lock_of(purpose: str) -> str:
    """The name of the file by which a folder is held for a purpose."""
    return f".{purpose}.lock"


def _owner(path: Path) -> dict | None:
    """Who holds a lock, as its file says; None if it says nothing."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return {"process": int(owner["process"]), "host": str(owner["host"]), "since": float(owner["since"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _taken(folder: Path | str, owner: dict | None) -> str:
    who = ""
    if owner:
        minutes = max(0.0, time.time() - owner["since"]) / 60
        age = f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.0f} hours"
        who = f" (process {owner['process']} on {owner['host']}, for {age})"
    return f"another run is writing into {folder}{who}: wait until it is done, end it, or name another folder"


def remove_leftovers(folder: Path | str) -> None:
    """Remove what processes that were killed in the middle of a write left in a folder, and below it.

    Only those of processes that are no more, by their number on this machine: call it where no other may write. A
    folder below that has a lock of its own is left to who holds it, perhaps on another machine.
    """
    others = {lock.parent for lock in Path(folder).rglob(".*.lock") if lock.parent != Path(folder)}
    for path in Path(folder).rglob(".*.tmp"):
        if not others.isdisjoint(path.parents):
            continue
        number = path.suffixes[-2][1:] if len(path.suffixes) > 1 else ""
        if number.isdecimal() and int(number) != os.getpid() and not is_alive(int(number)):
            path.unlink(missing_ok=True)


def is_alive(process: int) -> bool:
    """Whether a process of this number runs on this machine; on Windows nobody may ask, and it does."""
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's, or no number of a process
        return True
    return True
