"""Leaf: what a training that is no phase goes on from: all that changes in it after a step, of one identity."""

from pathlib import Path
from typing import Protocol

from checks import UsageError
from files import load_checkpoint, save_checkpoint

REMEDY = "python inference.py --runtime.resume False"


class Changing(Protocol):
    """A network, an average, an optimizer: what can say how it stands, and stand so again."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> object: ...


class LastStep:
    """A file beside what is trained; it is removed by whoever saves the result."""

    def __init__(self, path: Path, kind: str, identity: dict, parts: dict[str, Changing], remedy: str = REMEDY):
        self.path, self.kind, self.identity = path, kind, identity
        self.parts, self.remedy = parts, remedy

    def take_up(self, resume: bool) -> int:
        """The step after which an interrupted training of this identity goes on, and its state; 0 for one of another.

        UsageError if the file is damaged.
        """
        if not resume or not self.path.is_file():
            return 0
        stored = load_checkpoint(self.path, self.kind, self.remedy)
        try:
            if stored["identity"] != self.identity:
                return 0
            for name, part in self.parts.items():
                part.load_state_dict(stored[name])
            return stored["step"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"{self.path} is damaged: run {self.remedy}") from error

    def write(self, step: int) -> None:
        """All of it after so many steps."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        save_checkpoint(self.path, self.kind, {"identity": self.identity, "step": step, **state})

    def refuse_diverged(self, words: str) -> None:
        """UsageError with these words if a weight is not finite; then nothing is left to go on from."""
        if not all(bool(weight.isfinite().all()) for weight in self.parts["weights"].parameters()):
            self.path.unlink(missing_ok=True)
            raise UsageError(words)
