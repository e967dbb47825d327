"""Part: phase 4 in shards: what each is a part of, and how one examination comes of all of them.

whole = Whole(...)                         what the shards are parts of
whole.label(shard)                         in the shard's folder
whole.join(unfinished)                     by a job of its own: refused unless all are there and of this whole
whole.join_team(team, unfinished)          by the first process of a torchrun: awaits the others
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from checks import UsageError
from files import RunIdentity
from radiographs.manifest import Record
from results import Unfinished, identity_of, left_by
from shards import Shard, Team, label, label_of, shards_in, wait_for


@dataclass(frozen=True)
class Whole:
    """An examination that shards are parts of."""

    out: Path
    identity: str  # of the whole, by results.identity_of
    made_of: RunIdentity  # the same in parts, to say what differs
    images: int
    batch_size: int

    @classmethod
    def of(cls, out: Path, identity: str, records: list[Record], shaping: dict, device: str) -> "Whole":
        """shaping is everything beside the files that results follow from (inference.shaping_results)."""
        known = shaping["calibration"]
        belongs_to, others = known["belongs_to"], {key: shaping[key] for key in ("preprocessing", "recipe", "torch")}
        hashes = {name: value for name, value in belongs_to.items() if name.endswith("_sha256")}
        walk = {"precision": "float32"}  # of which a calibration does not speak
        walk |= {name: value for name, value in belongs_to.items() if name not in hashes}
        settings = {"inference": walk | shaping["settings"], "device": device, **others}
        names = {"vae_sha256": "the VAE", "flow_sha256": "the normalizer", "reader_sha256": "the reader"}
        inputs = {names.get(name, name): value for name, value in hashes.items()}
        inputs["the radiographs"] = identity_of(records)
        inputs["what normals say"] = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
        made_of = RunIdentity(json.loads(json.dumps(settings)), inputs, ())
        return cls(out, identity, made_of, len(records), shaping["settings"]["batch_size"])

    def folder(self, shard: Shard) -> Path:
        """Where a shard works."""
        return self.out / shard.name

    def rows(self, shard: Shard) -> range:
        """The records of a shard."""
        return shard.rows(self.images, self.batch_size)

    def identity_of(self, shard: Shard) -> str:
        """Of the examination of a shard."""
        return f"{self.identity} {shard.name}"

    def label(self, shard: Shard, run: str = "") -> None:
        """Say in a shard's folder of what it is a part, and in which run of a team."""
        label(self.folder(shard), self.made_of.plain(), run)

    def join(self, unfinished: Unfinished) -> None:
        """All shards that lie in the folder, as one; UsageError if one is missing, not finished or of another whole."""
        found = shards_in(self.out)
        counts = sorted({shard.count for shard in found})
        if not found:
            raise UsageError(
                f"{self.out} has no shards: run python inference.py with --inference.shard 1/8 to 8/8 first"
            )
        if len(counts) > 1:
            several = " and of ".join(map(str, counts))
            raise UsageError(f"{self.out} has shards of {several}: remove the folders that are not to be merged")
        missing = [shard for shard in found[0].everyone if shard not in found]
        if missing:
            raise UsageError(f"{self.out} lacks {', '.join(shard.name for shard in missing)}: {_again(missing[0])}")
        self._take(found, unfinished)

    def join_team(self, team: Team, unfinished: Unfinished) -> None:
        """The shards of all processes of a team, as one, when all of them are there."""
        for shard in team.shard.everyone:
            wait_for(lambda shard=shard: label_of(self.folder(shard))["run"] == team.run or None)
        self._take(team.shard.everyone, unfinished)

    def _take(self, shards: list[Shard], unfinished: Unfinished) -> None:
        for shard in shards:
            self._refuse_foreign(shard)
        notes = [self._finished(shard) for shard in shards]
        for shard, note in zip(shards, notes, strict=True):
            unfinished.take(self.folder(shard), note)
        unfinished.save(self.images)

    def _refuse_foreign(self, shard: Shard) -> None:
        stored = label_of(self.folder(shard))["made_of"]
        changes = self.made_of.changes_since(stored) if stored else {"": "nothing says which"}
        if changes:
            raise UsageError(
                f"{self.folder(shard)} belongs to another examination ({'; '.join(changes.values())}): merge with the "
                f"flags that it was made with, or {_again(shard)}"
            )

    def _finished(self, shard: Shard) -> dict:
        """What a shard left; UsageError if it is not all."""
        note = left_by(self.folder(shard), self.identity_of(shard))
        done, images = note["done"] if note else 0, len(self.rows(shard))
        if not note or done < images:
            raise UsageError(f"{self.folder(shard)} is not finished ({done} of {images} images): {_again(shard)}")
        return note


def _again(shard: Shard) -> str:
    return f"run python inference.py with the same flags and --inference.shard {shard.number}/{shard.count}"
