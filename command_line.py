"""Leaf: the command line of the four scripts, made from config.py: flags to numbers, and the line to paste next.

command = parse_command(__doc__)
config = command.config
"""

import argparse
import contextlib
import dataclasses
import difflib
import io
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass

import progress
from checks import UsageError
from config import PREPROCESSING, SPLIT, Config, UNetConfig, rebuild_phase
from presets import PRESETS, preset

FIRST_FLAGS = ("--preset", "--outputs", "--quiet")
ONLY_THIS_TIME = (
    "runtime.resume",
    "runtime.resume_changed",
)  # not for the next phase: it would remove or change that one's


BEST = "checkpoint_best.pt"
HAND_OFFS = {  # where a phase was told to write -> what later phases read there
    "vae.output": (
        ("latent.vae_checkpoint", BEST),
        ("flowdiff.vae_checkpoint", BEST),
        ("inference.vae_checkpoint", BEST),
    ),
    "latent.output": (("flowdiff.latents", ""),),
    "flowdiff.output": (("inference.flow_checkpoint", BEST),),
}


@dataclass(frozen=True)
class CommandLine:
    """What the user asked for: the numbers, and the words that said so."""

    config: Config
    words: tuple[str, ...]  # as typed, the script's name left out

    @property
    def given(self) -> frozenset[str]:
        """The fields that the command line names, such as data.height."""
        return frozenset(field_of(word) for word in self.words if _is_flag(word))

    def next(self, script: str) -> str:
        """The command of the next phase with everything that was overridden here, ready to be pasted."""
        kept: list[str] = []
        passing = True
        for word in self.words:
            if _is_flag(word):
                passing = field_of(word) not in ONLY_THIS_TIME
            if passing:
                kept.append(word)
        for output, readers in HAND_OFFS.items():
            if output in self.given:
                kept += self._hand_off(output, readers)
        return shlex.join(["python", script, *kept])

    def _hand_off(self, output: str, readers: tuple[tuple[str, str], ...]) -> list[str]:
        """Flags that make later phases read where a phase was told to write."""
        phase, _, name = output.partition(".")
        folder = getattr(getattr(self.config, phase), name)
        flags = (
            [flag_of(reader), f"{folder}/{file}".rstrip("/")] for reader, file in readers if reader not in self.given
        )
        return [word for pair in flags for word in pair]

    def adopt(self, artefact: dict, source: str) -> Config:
        """The config with preprocessing and split as the artefact of an earlier phase has them.

        Raises UsageError where a flag of this command line says something else than `source` holds.
        """
        handed_on = {**artefact["preprocessing"], **artefact["split"]}
        for name in (*PREPROCESSING, *SPLIT):
            now = getattr(self.config.data, name)
            if f"data.{name}" in self.given and now != handed_on[name]:
                raise UsageError(
                    f"{flag_of(f'data.{name}')} {now} contradicts {source}, made with {handed_on[name]}: "
                    "leave the flag out, or run python train_vae.py and what follows it again"
                )
        changed = {"data": dataclasses.replace(self.config.data, **handed_on)}
        if "unet" in artefact:  # which size suits a UNet is for the one it was made with to say
            changed["unet"] = rebuild_phase(UNetConfig, artefact["unet"])
        return dataclasses.replace(self.config, **changed)


def parse_command(description: str, argv: list[str] | None = None) -> CommandLine:
    """The command line: --preset and --outputs choose the defaults, any other flag overrides one field.

    Raises UsageError, one line, for an unknown preset or flag and for a value its field refuses. --help ends the
    program.
    """
    import tyro

    words = sys.argv[1:] if argv is None else list(argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset", default="default")
    first.add_argument("--outputs")
    first.add_argument("--quiet", action="store_true")
    try:
        chosen, rest = first.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise UsageError(f"{error.argument_name}: {error.message}") from error
    defaults = preset(chosen.preset, chosen.outputs)
    text = (
        f"{description}\n\nBefore any other flag is read, --preset {{{','.join(PRESETS)}}} chooses the defaults "
        "shown below, and --outputs DIR puts everything the four phases write and hand on below DIR. Every default "
        "is a line of config.py, config_reading.py or presets.py. --quiet leaves progress and chatter out: warnings "
        "and errors alone are heard."
    )

    def parsed(flags: list[str]) -> Config:
        style = (tyro.conf.FlagConversionOff,)
        return tyro.cli(Config, default=defaults, args=flags, description=text, config=style)

    if "--help" in rest or "-h" in rest:
        parsed(["--help"])
    _check_flags(rest)
    try:
        config = _quietly(parsed, rest)
    except SystemExit as error:
        raise UsageError(_why_refused(rest, parsed)) from error
    if chosen.quiet:
        progress.be_quiet()
    return CommandLine(config, tuple(words))


def field_of(word: str) -> str:
    """data.percentile_low of --data.percentile-low or --data.percentile_low=1."""
    return word.split("=", 1)[0].lstrip("-").replace("-", "_")


def flag_of(field: str) -> str:
    """--data.percentile-low of data.percentile_low."""
    return "--" + field.replace("_", "-")


def _is_flag(word: str) -> bool:
    return word.startswith("--")


def _fields() -> dict[str, str]:
    """Every field of the config, such as data.height, with its type as text."""
    phases = {item.name: item.type for item in dataclasses.fields(Config)}
    return {
        f"{name}.{item.name}": _type_name(item.type)
        for name, phase in phases.items()
        for item in dataclasses.fields(phase)
    }


def _type_name(kind: object) -> str:
    """How a person says what a field takes."""
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
    values = getattr(kind, "__args__", ())
    if kind in names:
        return names[kind]
    return "one or more values" if Ellipsis in values else f"one of {', '.join(map(str, values))}"


def _check_flags(words: list[str]) -> None:
    """Refuse an unknown flag with the nearest one, and a value that no flag asks for."""
    known = [*FIRST_FLAGS, *map(flag_of, _fields())]
    if words and not _is_flag(words[0]):
        raise UsageError(f"{words[0]} stands alone: a value follows a flag, such as --data.root ./data (see --help)")
    for word in words:
        flag = word.split("=", 1)[0].replace("_", "-")
        if _is_flag(word) and flag not in known:
            nearest = difflib.get_close_matches(flag, known, n=1, cutoff=0)
            raise UsageError(f"unknown flag {word.split('=', 1)[0]}: did you mean {nearest[0]}? --help lists them all")


def _quietly(parsed: Callable[[list[str]], Config], words: list[str]) -> Config:
    """tyro explains an error in a box of many lines; ours is one."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return parsed(words)


def _why_refused(words: list[str], parsed: Callable[[list[str]], Config]) -> str:
    """The first flag that the parser refuses when it stands alone."""
    starts = [position for position, word in enumerate(words) if _is_flag(word)]
    for start, end in zip(starts, [*starts[1:], len(words)], strict=True):
        flag, *values = words[start].split("=", 1) + words[start + 1 : end]
        try:
            _quietly(parsed, words[start:end])
        except UsageError:  # a value that another flag would make right
            continue
        except SystemExit:
            given = " ".join(values) or "nothing"
            return f"{flag} takes {_fields()[field_of(flag)]}, got {given}"
    return "the command line cannot be read: see --help"
