"""Leaf: files that appear whole or not at all, content hashes, checkpoints that say what they are, runs that go on."""

import csv
import errno
import hashlib
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from checks import UsageError
from config import RuntimeConfig

FORMAT = 2  # of every checkpoint; raise it when a reader of the old one would misread the new
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk
SEAL = "content_sha256"  # in a JSON file that says of itself whether it is whole


def write_atomically(path: Path | str, write: Callable[[Path], None], private: bool = False) -> None:
    """Let `write` fill a file beside `path`, flush it to the disk, put it in place: readers never see half a file.

    A private one is its owner's alone to read; others follow the umask.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if private:
            os.close(os.open(beside, os.O_CREAT | os.O_WRONLY, 0o600))  # before anything is in it
        write(beside)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        if not says_full(error):
            raise
        free = shutil.disk_usage(path.parent).free / 2**20
        raise UsageError(
            f"{path} cannot be written, the disk is full or over its quota ({free:.0f} MiB are free): make room there "
            "and give the same command again; what was there before is whole"
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def says_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error: torch reports what Python told it as an error of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    if error is not None and error.errno is None and "requested and" in str(error):  # what numpy says of it
        return True
    return error is not None and error.errno in FULL


def write_binary(path: Path | str, fill: Callable[[BinaryIO], None]) -> None:
    """A file that `fill` writes into, such as an .npy: whole or not at all, under just this name."""

    def write(beside: Path) -> None:
        with open(beside, "wb") as file:
            fill(file)

    write_atomically(path, write)


def write_json(path: Path | str, content: dict) -> None:
    """JSON for people and programs; refuses NaN, which JSON does not know."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda beside: beside.write_text(text))


def write_sealed_json(path: Path | str, content: dict) -> None:
    """JSON that a program relies on: with a hash of its content, which `unsealed` checks."""
    write_json(path, {**content, SEAL: _content_sha256(content)})


def unsealed(stored: dict) -> dict:
    """What `write_sealed_json` was given, from what it wrote; ValueError if that has changed since."""
    content = {name: value for name, value in stored.items() if name != SEAL}
    if stored.get(SEAL) != _content_sha256(content):
        raise ValueError("its content is not what was written")
    return content


def _content_sha256(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_csv(path: Path | str, columns: list[str], rows: list[list], private: bool = False) -> None:
    """A table, whole or not at all, of which a spreadsheet takes no cell for a formula."""

    def write(beside: Path) -> None:
        with open(beside, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:  # names of any bytes
            csv.writer(file).writerows([columns, *([defused(cell) for cell in row] for row in rows)])

    write_atomically(path, write, private)


def defused(cell: object) -> object:
    """Text that a spreadsheet would execute, with the apostrophe before it that makes it text again."""
    if not isinstance(cell, str) or not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def remove_files(folder: Path | str, patterns: tuple[str, ...]) -> None:
    """Remove what an earlier run left in a folder under names such as val_*.png; what carries another name stays.

    UsageError if there is something and nothing says that a run wrote it: runs leave their config.json first.
    """
    found = [path for pattern in patterns for path in Path(folder).glob(pattern)]
    if found and not (Path(folder) / "config.json").is_file():
        raise UsageError(f"{found[0]} was not written by this phase: move it away, or choose another --outputs")
    for path in found:
        path.unlink()


def keep_newest(folder: Path | str, pattern: str, most: int) -> None:
    """Of the files of a run whose names end in the step, such as checkpoint_step_*.pt, remove all but the last few."""
    for path in sorted(Path(folder).glob(pattern))[:-most]:
        path.unlink()


def sha256(path: Path | str) -> str:
    """Content hash of a file: how one phase recognises the very file of another."""
    with open(path, "rb") as file:
        if sys.version_info >= (3, 11):
            return hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.sha256(file.read()).hexdigest()


def weights_sha256(weights: dict) -> str:
    """Content hash of a state dict, whatever file it came from."""
    found = hashlib.sha256()
    for name, weight in weights.items():
        found.update(name.encode())
        found.update(weight.cpu().numpy().tobytes())
    return found.hexdigest()


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(path: Path | str, kind: str, content: dict) -> None:
    """Write plain types and tensors under a format number and a kind: a reader can refuse what it would misread."""
    import torch  # here, so that files without tensors need no torch

    write_binary(path, lambda file: torch.save({"format": FORMAT, "kind": kind, **content}, file))


def load_checkpoint(path: Path | str, kind: str, made_by: str) -> dict:
    """Read a checkpoint of this kind onto the CPU.

    Raises UsageError, naming the command that makes the file, if it is missing, damaged, of another kind or format.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} is missing: run {made_by} first")
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes a checksum of each part, and does not read it
            rotted = archive.testzip()
        if rotted:
            raise UsageError(f"{path} is damaged (the checksum of a part is wrong): run {made_by} again")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except Exception as error:  # torch raises a different type for every way a file can be damaged
        raise UsageError(
            f"{path} cannot be read ({type(error).__name__}): it is damaged or no checkpoint; run {made_by} again"
        ) from error
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise UsageError(f"{path} is no {kind} checkpoint: give the file that {made_by} wrote")
    if content.get("format") != FORMAT:
        raise UsageError(
            f"{path} has format {content.get('format')}, this code reads {FORMAT}: "
            f"use the matching version, or run {made_by} again"
        )
    return content


# ---------------------------------------------------------------- a run that goes on


@dataclass(frozen=True)
class RunIdentity:
    """What a resumed run must share with the run it continues; not where its files lie."""

    settings: dict  # by value, such as {"vae": {"lr": 1e-4}}
    inputs: dict[str, str]  # by content, such as {"the training radiographs": a hash}
    adjustable: tuple[str, ...]  # settings that --runtime.resume-changed True may change, such as vae.lr

    def plain(self) -> dict:
        """What checkpoint_last.pt keeps of it."""
        return {"settings": self.settings, "inputs": self.inputs}

    def changes_since(self, stored: dict) -> dict[str, str]:
        """What differs from a stored identity: the name, and the sentence that says so."""
        found = {
            name: f"{name} was {old}, now {new}" for name, old, new in _differences(stored["settings"], self.settings)
        }
        changed = _differences(stored["inputs"], self.inputs)
        return found | {name: f"{name} changed" for name, _, _ in changed}


def resume_point(
    path: Path, kind: str, identity: RunIdentity, options: RuntimeConfig, made_by: str, total: int
) -> dict | None:
    """The content of checkpoint_last.pt to continue from up to step `total`, or None for a new run.

    Raises UsageError, naming everything that changed, if it belongs to another run than `identity`, unless all of that
    is adjustable and options.resume_changed says so; and if it lies beyond `total`.
    """
    if not options.resume or not path.is_file():
        return None
    content = load_checkpoint(path, kind, f"{made_by} --runtime.resume False")
    changes = identity.changes_since(content["identity"])
    adjustable = set(changes) <= set(identity.adjustable)
    if changes and not (adjustable and options.resume_changed):
        continued = "add --runtime.resume-changed True to go on under the new numbers, " if adjustable else ""
        raise UsageError(
            f"{path} belongs to another run ({'; '.join(changes.values())}): {continued}go back to what it was, "
            "choose another --outputs folder, or start anew with --runtime.resume False"
        )
    if content["step"] > total:
        raise UsageError(
            f"{path} has taken {content['step']} steps already, and {total} are asked for: ask for more, "
            "or start anew with --runtime.resume False"
        )
    return content


def _differences(old: dict, new: dict, prefix: str = "") -> Iterator[tuple[str, object, object]]:
    """Name, old and new value of whatever differs in nested dicts; "not set" is what one of them lacks."""
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, "not set"), new.get(key, "not set")
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}", before, after
