"""Leaf: UFBA-UESC Dental Images and its subset UFBA-425, panoramics sorted into ten categories by what they show.

The category stands in the file's name, cate8-00329.jpg, in both sets; their folders are documented for UFBA-425 only
(bb_u_net_dataset/panoramic_x_rays/, and labels/ with one mask for each tooth). So this adapter goes by the name,
wherever the file lies, and leaves folders of masks and labels alone. Copies that were augmented for a detector carry
longer names (cate9-00034_jpg.rf....jpg) and are left out with them.

The ten categories, from the table of both sets: 1 to 4 have 32 teeth, 7 to 10 fewer; 1, 3, 7 and 9 show an appliance,
1, 2, 7 and 8 restorations; 5 shows implants, 6 more than 32 teeth.
"""

import re
from pathlib import Path

from radiographs.adapters.rows import About, Row, layout_missing
from radiographs.reading import find_radiographs

ABOUT = About(
    title="UFBA-UESC Dental Images and UFBA-425: ten categories by what teeth carry",
    licence="UFBA-UESC: on request to IvisionLab, no redistribution, modification or commercial use without "
    "permission; UFBA-425: see its page, figshare 29827475",
    citation="Silva, Oliveira, Pithon. Automatic segmenting teeth in X-ray images: Trends, a novel data set, "
    "benchmarking and future perspectives. Expert Systems with Applications 107, 2018; UFBA-425: Budagam et al. "
    "OralBBNet. arXiv:2406.03747, 2024",
    normal="no appliance, no implant, no supernumerary tooth (categories 2, 4, 8 and 10); restorations and missing "
    "teeth occur, and nobody looked for disease: mostly normal at best",
    marks="nothing: an image as a whole is in a category",
)
NAME = re.compile(r"cate(\d+)-\d+", re.IGNORECASE)
KINDS = {1: "appliance", 3: "appliance", 7: "appliance", 9: "appliance", 5: "implant", 6: "supernumerary"}
CATEGORIES = range(1, 11)
OTHERS = {"mask", "masks", "label", "labels"}  # folders of something else under the same names


def rows(folder: Path) -> list[Row]:
    """Every file named after a category; the sets have no splits. UsageError if there is none."""
    found = []
    for path in find_radiographs(folder):
        named = NAME.fullmatch(path.stem)
        among = {part.lower() for part in path.relative_to(folder).parts[:-1]}
        if named and int(named[1]) in CATEGORIES and not among & OTHERS:
            kind = KINDS.get(int(named[1]), "normal")
            found.append(Row(path, label=int(kind != "normal"), kind=kind))
    if not found:
        raise layout_missing(folder, "UFBA-UESC or UFBA-425", "images named cateN-NNNNN.jpg, N from 1 to 10")
    return found
