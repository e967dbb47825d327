"""Leaf: rows of a public set to a manifest.csv: masks drawn, near-duplicates listed, splits counted."""

import csv
import errno
import hashlib
import io
import os
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from checks import UsageError
from files import defused, write_binary, write_csv
from progress import bar
from radiographs.adapters.drawing import draw
from radiographs.adapters.rows import About, Row
from radiographs.likeness import fingerprint, twins
from radiographs.reading import ImageReadError, read_radiograph

COLUMNS = ["image", "split", "label", "kind", "mask", "mask_from", "patient"]
DUPLICATES = "near_duplicates_local_only.csv"
FORMULA = ("=", "+", "-", "@")  # a cell that begins so is defused when it is written, and would name another file
LONGEST = 120  # bytes of an image's place in the name of its mask
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


@dataclass(frozen=True)
class Written:
    """What became of the rows of a set."""

    manifest: Path
    rows: list[Row]
    masks_from: Counter  # how many masks were drawn from what
    unmarked: int  # abnormal radiographs without a mask
    missing: int  # files that the annotation names and that are not there
    unlisted: int  # files whose names no manifest can hold
    unreadable: int
    twins: list[tuple[int, int]]  # positions of rows whose radiographs are one picture


def write_manifest(rows: list[Row], manifest: Path, name: str, about: About) -> Written:
    """The manifest, and below masks/NAME beside it what boxes and polygons cover, 8-bit PNG, 255 inside.

    Files that are not there are left out, and so are those whose names no manifest can hold. Nothing is written before
    everything was read. UsageError if the manifest does not lie above the set, or if a file is in the way that this
    command did not write: it wrote a manifest with just these columns, the masks that are listed there, and the
    near-duplicates beside it.
    """
    here = Path(os.path.abspath(manifest.parent))
    there = [row for row in rows if _is_there(row.image)]
    _check_above(manifest, here, there)
    present = [row for row in there if _can_be_listed(row, here)]
    if not present:
        reason = "their names are not UTF-8: rename them" if there else "unpack the images of the set, too"
        raise UsageError(f"none of the {len(rows)} radiographs can be listed: {reason}")
    _check_place(manifest, present)
    _check_kinds(present)
    cells, prints, masks, sources, unreadable = [], {}, {}, Counter(), 0
    for index, row in enumerate(bar(present, desc="reading radiographs", unit="image")):
        mask, source = row.mask, "mask" if row.mask else ""
        try:
            pixels = read_radiograph(row.image).pixels
            prints[index] = fingerprint(pixels)
            drawn = draw(row, pixels.shape)
            if drawn is not None:
                mask, source = _mask_place(row, here, name), _source(row)
                masks[mask] = _png(drawn)
        except ImageReadError:
            unreadable += 1
        sources[source] += 1
        place = _cell(_beside(mask, here)) if mask else ""
        label = "" if row.label is None else row.label
        cells.append([_cell(_beside(row.image, here)), row.split, label, row.kind, place, source])
    pairs = _twins(prints)
    patients = [""] * len(present) if about.names_patients else _patients(present, pairs, here, name)
    _check_free(manifest, here, masks)
    for mask, content in bar(masks.items(), desc="writing masks", unit="mask"):
        write_binary(mask, lambda file, content=content: file.write(content))
    write_csv(manifest, COLUMNS, [[*row, patient] for row, patient in zip(cells, patients, strict=True)])
    named = [[_beside(row.image, here).as_posix(), row.split] for row in present]
    columns = ["image", "split", "looks_like", "its_split"]
    write_csv(manifest.parent / DUPLICATES, columns, [named[one] + named[other] for one, other in pairs], private=True)
    unmarked = sum(row.label == 1 and not line[4] for row, line in zip(present, cells, strict=True))
    missing, unlisted = len(rows) - len(there), len(there) - len(present)
    return Written(manifest, present, sources, unmarked, missing, unlisted, unreadable, pairs)


def describe(written: Written, about: About) -> str:
    """For people: what the set is, counts by split and kind, masks, near-duplicates, and what to do next."""
    rows, splits = written.rows, sorted({row.split for row in written.rows})
    counts = Counter((row.split, row.kind or "not said") for row in rows)
    kinds = sorted({kind for _, kind in counts}, key=lambda kind: (kind != "normal", kind == "not said", kind))
    width = max(map(len, kinds)) + 2
    lines = [about.title, "", "kind".ljust(width) + "".join(f"{split or 'no split':>10}" for split in splits)]
    lines += [kind.ljust(width) + "".join(f"{counts[split, kind]:>10}" for split in splits) for kind in kinds]
    lines += ["all".ljust(width) + "".join(f"{sum(row.split == split for row in rows):>10}" for split in splits), ""]
    drawn = ", ".join(f"{count} from {source}" for source, count in sorted(written.masks_from.items()) if source)
    lines += [f"masks:     {drawn or 'none'}; each covers {about.marks}"]
    if written.unmarked and drawn:
        lines += [f"           {written.unmarked} abnormal radiographs have none"]
    lines += [f"normal:    {about.normal}", f"licence:   {about.licence}", f"cite:      {about.citation}"]
    lines += [f"patients:  {_patient_line(rows, about)}", f"copies:    {_copies_line(written)}"]
    if written.missing:
        lines += [f"left out:  {written.missing} files that the annotation names are not there"]
    if written.unlisted:
        lines += [f"left out:  {written.unlisted} files whose names are not UTF-8 or end in a space: rename them"]
    if written.unreadable:
        lines += [f"bad:       {written.unreadable} files cannot be read; the phases will name them"]
    return "\n".join(
        [*lines, "", f"wrote {written.manifest}; next: python train_vae.py --data.root {written.manifest}"]
    )


def _patient_line(rows: list[Row], about: About) -> str:
    if about.names_patients:
        return "as headers and folders say, see data.patient_from"
    joined = "" if any(row.split for row in rows) else ", except that near-duplicates count as one patient's"
    return f"the set names none: each file is taken for a patient of its own{joined}"


def _copies_line(written: Written) -> str:
    pairs = written.twins
    if not pairs:
        return "no two radiographs are one picture"
    tested = [({written.rows[one].split, written.rows[other].split}) for one, other in pairs]
    across = sum("test" in splits and len(splits) > 1 for splits in tested)
    where = f", {across} of them between test and the rest" if any(row.split for row in written.rows) else ""
    return f"{len(pairs)} pairs of radiographs are one picture{where}: see {DUPLICATES}"


def _check_above(manifest: Path, here: Path, rows: list[Row]) -> None:
    outside = [row for row in rows if not Path(os.path.abspath(row.image)).is_relative_to(here)]
    if outside:
        raise UsageError(
            f"{manifest} would not lie above the radiographs it lists, which a manifest must: put it into the folder "
            "of the set, or into one that holds that"
        )


def _check_place(manifest: Path, rows: list[Row]) -> None:
    if manifest.name == DUPLICATES or manifest.is_dir():
        raise UsageError(f"{manifest} cannot be the manifest: give --out a file of its own, such as manifest.csv")
    if _earlier(manifest) is None and manifest.exists():
        raise UsageError(f"{manifest} is there already and was not made here: move it away, or choose another --out")
    twice = Counter(os.path.abspath(row.image) for row in rows).most_common(1)
    if twice[0][1] > 1:
        name = Path(twice[0][0]).name
        raise UsageError(f"the annotation names {name} {twice[0][1]} times: unpack the set again, or mend it")


def _check_kinds(rows: list[Row]) -> None:
    """What a manifest could not give back: kinds that are written with an apostrophe, or contradict their label."""
    for row in rows:
        if defused(row.kind) != row.kind or not row.kind.isprintable() or row.kind != row.kind.strip():
            raise UsageError(
                f"the kind {row.kind!r} cannot stand in a manifest: rename it to begin with a letter, of plain text"
            )
        if row.label is not None and (row.label == 0) != (row.kind == "normal") or (row.label == 1 and not row.kind):
            raise UsageError(f"{row.image.name} has label {row.label} and the kind {row.kind!r}: give it a kind's name")


def _check_free(manifest: Path, here: Path, masks: dict[Path, bytes]) -> None:
    """That nothing is overwritten but what this command wrote: of a run that was interrupted, the very same masks."""
    earlier = _earlier(manifest)
    ours = earlier or set()
    others = [mask for mask, content in masks.items() if _cell(_beside(mask, here)) not in ours and mask.exists()]
    taken = [mask for mask in others if mask.read_bytes() != masks[mask]]
    if earlier is None and (manifest.parent / DUPLICATES).exists():
        taken.append(manifest.parent / DUPLICATES)
    if taken:
        raise UsageError(f"{taken[0]} is there already and no manifest made here lists it: move it away")


def _earlier(manifest: Path) -> set[str] | None:
    """The masks that a manifest of this command lists; None if there is no such manifest."""
    if not manifest.is_file():
        return None
    with open(manifest, newline="", encoding="utf-8-sig", errors="replace") as file:
        if file.readline().strip() != ",".join(COLUMNS):
            return None
        try:
            return {row["mask"] for row in csv.DictReader(file, COLUMNS) if row["mask"]}
        except csv.Error as error:
            raise UsageError(f"{manifest} is damaged ({error}): move it away") from error


def _is_there(path: Path) -> bool:
    """Whether it is a file; a name that no file can have is none."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except ValueError:  # a name with a NUL, or of half a character
        return False
    except OSError as error:
        if error.errno in NOT_THERE:
            return False
        raise


def _can_be_listed(row: Row, here: Path) -> bool:
    """Whether a manifest, UTF-8 without spaces around its cells, gives the names back."""
    try:
        names = [_beside(path, here).as_posix() for path in (row.image, row.mask) if path]
        return all(name.encode() and name == name.rstrip() for name in names)
    except UnicodeEncodeError:
        return False


def _png(mask: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return file.getvalue()


def _source(row: Row) -> str:
    return "+".join(name for name, regions in (("box", row.boxes), ("polygon", row.polygons)) if regions)


def _mask_place(row: Row, here: Path, name: str) -> Path:
    """Flat, so that no folder of the set is found a second time among the masks.

    What tells x/y.png from x__y.png and from x/y.jpg is a hash of the whole name; a long one is cut.
    """
    image = _beside(row.image, here)
    flat = "__".join(image.with_suffix("").parts).encode()[:LONGEST].decode(errors="ignore")
    return here / "masks" / name / f"{flat}-{hashlib.sha256(image.as_posix().encode()).hexdigest()[:12]}.png"


def _beside(path: Path, here: Path) -> Path:
    return Path(os.path.abspath(path)).relative_to(here)


def _cell(path: Path) -> str:
    text = path.as_posix()
    return f"./{text}" if text.startswith(FORMULA) or text != text.lstrip() else text


def _twins(prints: dict[int, np.ndarray]) -> list[tuple[int, int]]:
    if not prints:
        return []
    positions = list(prints)
    return [(positions[one], positions[other]) for one, other in twins(np.stack(list(prints.values())))]


def _patients(rows: list[Row], pairs: list[tuple[int, int]], here: Path, name: str) -> list[str]:
    """Each file's own name; where splits are still to be drawn, near-duplicates share one, so that none is torn apart.

    Where the set has splits they stay as they are, and a patient in two of them would be refused.
    """
    owners = list(range(len(rows)))

    def owner_of(row: int) -> int:
        while owners[row] != row:
            owners[row] = owners[owners[row]]
            row = owners[row]
        return row

    if not any(row.split for row in rows):
        for pair in pairs:  # a copy of a copy is the same patient's, in whatever order they are found
            one, other = sorted(map(owner_of, pair))
            owners[other] = one
    return [f"{name}/{_beside(rows[owner_of(i)].image, here).as_posix()}" for i in range(len(rows))]
