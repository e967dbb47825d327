"""python -m radiographs.adapters NAME FOLDER [--out manifest.csv]: a manifest.csv for a public data set.

The adapters read what a set's own annotation says and nothing else: kinds, masks drawn from boxes and polygons (the
column mask_from says from what), splits where the set has them. Licence, citation and what "normal" means there are
printed at the end: read them.
"""

import argparse
import os
import sys
from pathlib import Path

from checks import UsageError
from radiographs.adapters import dc1000, dentex, plain, tufts, ufba
from radiographs.adapters.writing import describe, write_manifest

SETS = {"dentex": dentex, "tufts": tufts, "ufba": ufba, "dc1000": dc1000}  # a set is one module and one line here


def main(words: list[str] | None = None) -> None:
    """Write the manifest of one set and say what it holds; one line on stderr and exit code 2 if that cannot be."""
    given = _parser().parse_args(words)
    try:
        if given.name == "folder":
            about, rows = plain.ABOUT, plain.rows(given.normals, given.test, given.kinds)
            home = Path(os.path.commonpath([os.path.abspath(given.normals), os.path.abspath(given.test)]))
        else:
            about, home = SETS[given.name].ABOUT, given.folder
            if not home.is_dir():
                raise UsageError(f"{home} is no folder: name the folder that the set was unpacked into")
            try:
                rows = SETS[given.name].rows(home)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise UsageError(
                    f"an annotation below {home} is not as {given.name} has it ({type(error).__name__}: {error}): "
                    "unpack the set again"
                ) from error
        written = write_manifest(rows, given.out or home / "manifest.csv", given.name, about)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted; the same command starts anew", file=sys.stderr)
        sys.exit(130)
    print(describe(written, about))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m radiographs.adapters", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    out = {"type": Path, "help": "the manifest; by default manifest.csv in the folder, and never outside of it"}
    for name, adapter in SETS.items():
        described = {"help": adapter.ABOUT.title, "description": adapter.__doc__, "allow_abbrev": False}
        one = names.add_parser(name, **described, formatter_class=argparse.RawDescriptionHelpFormatter)
        one.add_argument("folder", type=Path, help="where the set was unpacked")
        one.add_argument("--out", **out)
    own = names.add_parser("folder", help=plain.ABOUT.title, description=plain.__doc__, allow_abbrev=False)
    own.add_argument("normals", type=Path, help="the folder of normal radiographs, which train")
    own.add_argument("test", type=Path, help="the folder of radiographs to test")
    own.add_argument("--kinds", action="store_true", help="folders right below TEST are kinds: normal/, cyst/ ...")
    own.add_argument("--out", **out)
    return parser


if __name__ == "__main__":
    main()
