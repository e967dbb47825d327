"""python -m radiographs.adapters NAME FOLDER [--out manifest.csv]: a manifest.csv for a public data set.

The adapters read what a set's own annotation says and nothing else: kinds, masks drawn from boxes and polygons (the
column mask_from says from what), splits where the set has them. Licence, citation and what "normal" means there are
printed at the end: read them.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn, TextIO

import cv2

from checks import UsageError
from radiographs.adapters import dc1000, dentex, plain, tufts, ufba
from radiographs.adapters.rows import MISUNDERSTOOD
from radiographs.adapters.writing import describe, write_manifest
from radiographs.reading import ImageReadError

SETS = {"dentex": dentex, "tufts": tufts, "ufba": ufba, "dc1000": dc1000}  # a set is one module and one line here


def main(words: list[str] | None = None) -> None:
    """Write the manifest of one set and say what it holds; one line on stderr and exit code 2 if that cannot be."""
    given = _parser().parse_args(words)
    try:
        _write(given)
    except KeyboardInterrupt:
        _end("interrupted; the same command starts anew", 130)
    except (UsageError, ImageReadError) as error:
        _end(str(error))
    except OSError as error:  # a folder that cannot be written, a file where a folder should be
        remedy = "see to its rights, and that no file or folder of that name is in the way"
        _end(f"{error.strerror or error}: {error.filename or 'the output'}: {remedy}")
    except MemoryError:
        _end("the machine has too little memory for these radiographs")
    except (*MISUNDERSTOOD, cv2.error) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        _end(f"{given.name}: a file is not as the set has it ({reason}): unpack the set again")


def _write(given: argparse.Namespace) -> None:
    if given.name == "folder":
        about, rows = plain.ABOUT, plain.rows(given.normals, given.test, given.kinds)
        home = Path(os.path.commonpath([os.path.abspath(given.normals), os.path.abspath(given.test)]))
    else:
        about, home = SETS[given.name].ABOUT, given.folder
        if not home.is_dir():
            raise UsageError(f"{home} is no folder: name the folder that the set was unpacked into")
        rows = SETS[given.name].rows(home)
    written = write_manifest(rows, given.out or home / "manifest.csv", given.name, about)
    try:
        print(_shown(describe(written, about), sys.stdout), flush=True)
    except OSError as error:  # nobody reads it: what is left over could fail a second time at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        reason = error.strerror or error
        raise UsageError(f"{written.manifest} is written, but its summary cannot be printed ({reason})") from error


def _end(words: str, code: int = 2) -> NoReturn:
    print(f"error: {_shown(' '.join(words.splitlines()), sys.stderr)}", file=sys.stderr)
    sys.exit(code)


def _shown(text: str, stream: TextIO) -> str:
    """What a stream can print of it: names may be of any bytes."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


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
