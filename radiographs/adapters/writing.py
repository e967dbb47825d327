"""Leaf: rows of a public set to a manifest.csv: masks drawn, near-duplicates listed, splits counted."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from checks import UsageError
from files import write_binary, write_csv
from radiographs.adapters.rows import About, Row
from radiographs.likeness import fingerprint, twins
from radiographs.reading import ImageReadError, read_radiograph

COLUMNS = ["image", "split", "label", "kind", "mask", "mask_from", "patient"]
DUPLICATES = "near_duplicates_local_only.csv"
FORMULA = ("=", "+", "-", "@")  # a cell that begins so is defused when it is written, and would name another file


@dataclass(frozen=True)
class Written:
    """What became of the rows of a set."""

    manifest: Path
    rows: list[Row]
    masks_from: Counter  # how many masks were drawn from what
    unmarked: int  # abnormal radiographs without a mask
    missing: int  # files that the annotation names and that are not there
    unreadable: int
    twins: list[tuple[int, int]]  # positions of rows whose radiographs are one picture


def write_manifest(rows: list[Row], manifest: Path, name: str, about: About) -> Written:
    """The manifest, and below masks/NAME beside it what boxes and polygons cover, 8-bit PNG, 255 inside.

    Files that are not there are left out. UsageError if the manifest does not lie above the set, or is somebody else's.
    """
    here = Path(os.path.abspath(manifest.parent))
    present = [row for row in rows if row.image.is_file()]
    if not present:
        raise UsageError(f"none of the {len(rows)} radiographs is there: unpack the images of the set, too")
    _check_place(manifest, here, present)
    cells, prints, sources, unreadable = [], {}, Counter(), 0
    for index, row in enumerate(tqdm(present, "reading radiographs", unit="image")):
        mask, source = row.mask, "mask" if row.mask else ""
        try:
            pixels = read_radiograph(row.image).pixels
            prints[index] = fingerprint(pixels)
            drawn = draw(row, pixels.shape)
            if drawn is not None:
                mask, source = _mask_place(row, here, name), _source(row)
                write_binary(mask, lambda file, drawn=drawn: Image.fromarray(drawn).save(file, "PNG"))
        except ImageReadError:
            unreadable += 1
        sources[source] += 1
        place = _cell(_beside(mask, here)) if mask else ""
        label = "" if row.label is None else row.label
        cells.append([_cell(_beside(row.image, here)), row.split, label, row.kind, place, source])
    pairs = _twins(prints)
    patients = [""] * len(present) if about.names_patients else _patients(present, pairs, here, name)
    write_csv(manifest, COLUMNS, [[*row, patient] for row, patient in zip(cells, patients, strict=True)])
    named = [[_beside(row.image, here).as_posix(), row.split] for row in present]
    columns = ["image", "split", "looks_like", "its_split"]
    write_csv(manifest.parent / DUPLICATES, columns, [named[one] + named[other] for one, other in pairs], private=True)
    unmarked = sum(row.label == 1 and not line[4] for row, line in zip(present, cells, strict=True))
    return Written(manifest, present, sources, unmarked, len(rows) - len(present), unreadable, pairs)


def draw(row: Row, shape: tuple[int, int]) -> np.ndarray | None:
    """What the boxes and polygons of a row cover, uint8 (H, W), 0 or 255; None if they cover nothing.

    A box covers every pixel that it touches, a polygon its corners rounded to pixels and its border. UsageError if the
    annotation was made for another size.
    """
    if row.size is not None and tuple(row.size) != tuple(shape):
        raise UsageError(
            f"{row.image.name} has {shape[0]} x {shape[1]} pixels and its annotation was made for {row.size[0]} x "
            f"{row.size[1]}: take the images of the set as they were published"
        )
    mask = np.zeros(shape, np.uint8)
    for left, top, width, height in row.boxes:
        first, across = max(0, int(np.floor(top))), max(0, int(np.floor(left)))
        mask[first : max(0, int(np.ceil(top + height))), across : max(0, int(np.ceil(left + width)))] = 255
    for polygon in row.polygons:
        corners = np.round(np.array(polygon, float)).astype(np.int32)
        cv2.fillPoly(mask, [corners.reshape(-1, 1, 2)], 255)  # one by one: together, what lies twice inside is outside
    return mask if mask.any() else None


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


def _check_place(manifest: Path, here: Path, rows: list[Row]) -> None:
    outside = [row for row in rows if not Path(os.path.abspath(row.image)).is_relative_to(here)]
    if outside:
        raise UsageError(
            f"{manifest} would not lie above the radiographs it lists, which a manifest must: put it into the folder "
            "of the set, or into one that holds that"
        )
    if manifest.exists():
        first = manifest.read_text(encoding="utf-8-sig", errors="replace").partition("\n")[0].strip()
        if first != ",".join(COLUMNS):
            raise UsageError(
                f"{manifest} is there already and was not made here: move it away, or choose another --out"
            )


def _source(row: Row) -> str:
    return "+".join(name for name, regions in (("box", row.boxes), ("polygon", row.polygons)) if regions)


def _mask_place(row: Row, here: Path, name: str) -> Path:
    """Flat, so that no folder of the set is found a second time among the masks."""
    return here / "masks" / name / f"{'__'.join(_beside(row.image, here).with_suffix('').parts)}.png"


def _beside(path: Path, here: Path) -> Path:
    return Path(os.path.abspath(path)).relative_to(here)


def _cell(path: Path) -> str:
    text = path.as_posix()
    return f"./{text}" if text.startswith(FORMULA) else text


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
    if not any(row.split for row in rows):
        for one, other in sorted(pairs):  # a row joins the first that looks like it
            owners[other] = min(owners[one], owners[other])
    return [f"{name}/{_beside(rows[owner].image, here).with_suffix('').as_posix()}" for owner in owners]
