"""Leaf: the error that a user can put right, and what a setting must satisfy."""

import math
import re


class UsageError(Exception):
    """Something the user can put right; the message says how. Scripts print it on one line and exit with 2."""


def require(condition: bool, message: str) -> None:
    """UsageError with this message unless the condition holds."""
    if not condition:
        raise UsageError(message)


def is_finite(value: float) -> bool:
    """Whether a float can hold the number: a whole number of four hundred digits is none."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def require_ranges(phase: str, config: object, names: tuple[str, ...], low: float, high: float = math.inf) -> None:
    """Each named setting of a phase is finite and in [low, high]."""
    upper = "" if high == math.inf else f" and at most {high:g}"
    for name in names:
        value = getattr(config, name)
        inside = is_finite(value) and low <= value <= high
        require(inside, f"{phase}.{name} must be at least {low:g}{upper}, got {value}")


def require_positive(phase: str, config: object, names: tuple[str, ...]) -> None:
    """Each named setting of a phase is finite and above 0."""
    for name in names:
        value = getattr(config, name)
        require(is_finite(value) and value > 0, f"{phase}.{name} must be a finite number above 0, got {value}")


def require_between(phase: str, config: object, names: tuple[str, ...]) -> None:
    """Each named setting of a phase lies in (0, 1)."""
    for name in names:
        value = getattr(config, name)
        require(0 < value < 1, f"{phase}.{name} must lie in (0, 1), got {value}")


def require_part(name: str, value: str, words: tuple[str, ...]) -> None:
    """A setting is one of these words, or says which of how many parts: 1/8 to 8/8."""
    found = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", value)
    inside = value in words or (found and int(found[1]) <= int(found[2]))
    named = ", ".join(word for word in words if word)
    require(bool(inside), f"{name} must be {named}, or a part such as 2/8 (the second of eight), got {value}")
