"""Leaf: who trained, as salted hashes that travel in checkpoints: no later phase takes a trained patient for a new one.

A patient is known by name and by content: the same radiograph under another name or in another file format is still
recognised, and one that was compressed or exposed anew by its fingerprint (radiographs.likeness). The salt is stored
beside the hashes: whoever holds a checkpoint can ask whether a patient they already know is in it, and cannot list
those they do not know. Fingerprints bear no salt, since they are compared by how much they differ: the same radiograph
can be recognised in two checkpoints.
"""

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from radiographs.likeness import looks_like_one_of


@dataclass(frozen=True)
class Membership:
    """The patients and the contents of the radiographs that trained and that validated."""

    salt: str
    train: frozenset[str]
    val: frozenset[str]
    prints: frozenset[str]  # fingerprints in hexadecimal digits, of train and val together

    @classmethod
    def of(
        cls, patients: dict[str, Sequence[str]], digests: dict[str, Sequence[str]], prints: Sequence[np.ndarray] = ()
    ) -> "Membership":
        """From patient names and content digests of the splits "train" and "val", under a new salt.

        prints are the fingerprints of them all.
        """
        salt = secrets.token_hex(8)

        def hashes(split: str) -> frozenset[str]:
            return frozenset(_hashes(salt, patients[split], digests[split]))

        return cls(salt, hashes("train"), hashes("val"), frozenset(each.tobytes().hex() for each in prints))

    @classmethod
    def from_plain(cls, stored: dict) -> "Membership":
        """From what `plain` gave to a checkpoint or to JSON."""
        sets = (frozenset(stored.get(name, ())) for name in ("train", "val", "prints"))  # the last came later
        return cls(stored["salt"], *sets)

    def plain(self) -> dict:
        """As plain types, sorted, so that it says nothing of the order of the files."""
        return {"salt": self.salt} | {name: sorted(getattr(self, name)) for name in ("train", "val", "prints")}

    def trained(self, patient: str | None, digest: str) -> bool:
        """Whether this radiograph, or another of this patient, trained; None compares the content alone."""
        return not self.train.isdisjoint(self._hashes_of(patient, digest))

    def knows(self, patient: str | None, digest: str) -> bool:
        """Whether this radiograph, or another of this patient, trained or validated."""
        return not (self.train | self.val).isdisjoint(self._hashes_of(patient, digest))

    def looks_known(self, fingerprint: np.ndarray) -> bool:
        """Whether a radiograph that trained or validated looks like this one."""
        return len(self._prints) > 0 and looks_like_one_of(fingerprint, self._prints)

    @cached_property
    def _prints(self) -> np.ndarray:
        """All fingerprints, uint8 (N, 32)."""
        known = [np.frombuffer(bytes.fromhex(each), np.uint8) for each in sorted(self.prints)]
        return np.stack(known) if known else np.empty((0, 0), np.uint8)

    def _hashes_of(self, patient: str | None, digest: str) -> list[str]:
        return _hashes(self.salt, [] if patient is None else [patient], [digest])


def _hashes(salt: str, patients: Iterable[str], digests: Iterable[str]) -> list[str]:
    texts = [f"{salt}/patient/{name}" for name in patients] + [f"{salt}/content/{digest}" for digest in digests]
    return [hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16] for text in texts]
