"""Leaf: DC1000, panoramics with caries outlined to the pixel, and the hundred of them in the repository MLUA.

Layout, from github.com/Zzz512/MLUA, whose dataset/test/ is the second, and from public code that reads the zip:

    DC1000_dataset/org_train_dataset/images/N.png       labels_clean/N.png beside it (or labels/): white on caries
    DC1000_dataset/org_test_dataset/images/N.png        labels/N.png beside it
    DC1000_dataset/train/                               384 x 384 pieces of the first: no panoramics, not used here
    dataset/test/images/N.png                           labels/N.png beside it; *_cut/ are cut to the teeth
"""

from pathlib import Path

from checks import UsageError
from radiographs.adapters.rows import About, Row, find, layout_missing
from radiographs.reading import ImageReadError, find_radiographs, read_mask

ABOUT = About(
    title="DC1000 and MLUA: caries outlined to the pixel",
    licence="none is stated: ask the authors (github.com/Zzz512/MLUA) before you pass anything on",
    citation="Wang et al. Multi-level uncertainty aware learning for semi-supervised dental panoramic caries "
    "segmentation. Neurocomputing 540, 126208, 2023",
    normal="no caries outlined; nobody looked for anything else",
    marks="caries as the set's own masks have it",
)
PARTS = (("org_train_dataset", "train"), ("org_test_dataset", "test"), ("dataset/test", "test"))
LABELS = ("labels_clean", "labels")  # the first that is there


def rows(folder: Path) -> list[Row]:
    """Every panoramic of the parts that are there; UsageError if none is."""
    found = []
    for part, split in PARTS:
        images = find(folder, f"{part}/images")
        if images:
            masks = _masks(images.parent)
            found += [_row(path, masks.get(path.stem), split) for path in find_radiographs(images)]
    if not found:
        wanted = "org_train_dataset/images/ or org_test_dataset/images/ (DC1000), or dataset/test/images/ (MLUA)"
        raise layout_missing(folder, "DC1000 or MLUA", wanted)
    return found


def _masks(part: Path) -> dict[str, Path]:
    """The mask of each image by its number."""
    folder = next((part / name for name in LABELS if (part / name).is_dir()), None)
    return {path.stem: path for path in find_radiographs(folder)} if folder else {}


def _row(image: Path, mask: Path | None, split: str) -> Row:
    if mask is None:
        return Row(image, split)
    try:
        caries = bool(read_mask(mask).any())
    except ImageReadError as error:
        raise UsageError(f"the mask {error}: unpack the set again") from error
    return Row(image, split, int(caries), "caries" if caries else "normal", mask=mask)
