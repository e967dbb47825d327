"""Names for results that say nothing of the patient, and the one table that leads back to the files."""

import csv
import hashlib
import os
import secrets
from pathlib import Path

from checks import UsageError
from files import write_csv

LOOKUP = "lookup_local_only.csv"


class Pseudonyms:
    """Names made of the source path under a secret salt of this output folder: the same again in the next run."""

    def __init__(self, folder: Path):
        self.salt = secrets.token_hex(16)
        self.rows: list[list[str]] = []
        earlier = folder / LOOKUP
        if earlier.is_file():
            try:
                with open(earlier, newline="", encoding="utf-8") as file:
                    self.salt = next(csv.DictReader(file), {}).get("salt") or self.salt
            except (UnicodeDecodeError, csv.Error) as error:
                raise UsageError(f"{earlier} is damaged ({error}): remove it, and images get new names") from error

    def name(self, index: int, source: Path) -> str:
        """The name of one file; remembers which file it stands for."""
        digest = hashlib.sha256(f"{self.salt}{os.path.realpath(source)}".encode(errors="surrogateescape")).hexdigest()
        name = f"image-{digest[:10]}"
        self.rows.append([f"{index:03d}", name, str(source), self.salt])
        return name

    def save(self, folder: Path) -> None:
        """Write the table that must stay where it is, for its owner alone to read."""
        write_csv(folder / LOOKUP, ["index", "name", "source", "salt"], self.rows, private=True)
