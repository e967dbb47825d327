"""Leaf: files that appear whole or not at all, content hashes, and checkpoints that say what they are."""

import csv
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from config import UsageError

FORMAT = 1  # of every checkpoint; raise it when a reader of the old one would misread the new


def write_atomically(path: Path | str, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, flush it to the disk, then put it in place: readers never see half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(beside)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path | str, content: dict) -> None:
    """JSON for people and programs; refuses NaN, which JSON does not know."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda beside: beside.write_text(text))


def write_csv(path: Path | str, columns: list[str], rows: list[list]) -> None:
    """A table, whole or not at all."""

    def write(beside: Path) -> None:
        with open(beside, "w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])

    write_atomically(path, write)


def save_checkpoint(path: Path | str, kind: str, content: dict) -> None:
    """Write plain types and tensors under a format number and a kind, so that a reader can refuse what it would misread."""
    import torch  # here, so that files without tensors need no torch

    write_atomically(path, lambda beside: torch.save({"format": FORMAT, "kind": kind, **content}, beside))


def load_checkpoint(path: Path | str, kind: str, made_by: str) -> dict:
    """Read a checkpoint of this kind onto the CPU.

    Raises UsageError, naming the command that makes the file, if it is missing, damaged, of another kind or of a newer format.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} is missing: run {made_by} first")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different type for every way a file can be damaged
        raise UsageError(
            f"{path} cannot be read ({type(error).__name__}): it is damaged or no checkpoint; run {made_by} again"
        ) from error
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise UsageError(f"{path} is no {kind} checkpoint: give the file that {made_by} wrote")
    if content.get("format") != FORMAT:
        raise UsageError(
            f"{path} has format {content.get('format')}, this code reads {FORMAT}: use the matching version, or run {made_by} again"
        )
    return content


def sha256(path: Path | str) -> str:
    """Content hash of a file: how one phase recognises the very file of another."""
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if sys.version_info >= (3, 11)
            else hashlib.sha256(file.read()).hexdigest()
        )
