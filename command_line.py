"""Leaf: the command line of the four scripts, made from config.py."""

import argparse
import sys

from config import PRESETS, Config, preset


def parse_config(description: str, argv: list[str] | None = None) -> Config:
    """The command line as a Config: --preset and --outputs choose the defaults, any other flag overrides one field.

    Raises UsageError for an unknown preset or a value the dataclasses refuse; tyro itself ends the program on an unknown flag.
    """
    import tyro

    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="default")
    first.add_argument("--outputs")
    chosen, rest = first.parse_known_args(argv)
    defaults = preset(chosen.preset, chosen.outputs)
    text = (
        f"{description}\n\nBefore any other flag is read, --preset {{{','.join(PRESETS)}}} chooses the defaults shown below, "
        "and --outputs DIR puts everything the four phases write and hand on below DIR. Every default is a line of config.py."
    )
    return tyro.cli(Config, default=defaults, args=rest, description=text, config=(tyro.conf.FlagConversionOff,))
