"""Leaf: what a training within phase 4 goes on from: network, average and optimizer after a step, of one identity."""

from pathlib import Path

import torch
from torch import nn

from checks import UsageError
from files import load_checkpoint, save_checkpoint
from runtime import EMA

REMEDY = "python inference.py --runtime.resume False"


class LastStep:
    """A file beside what is trained; it is removed by whoever saves the result."""

    def __init__(
        self, path: Path, kind: str, identity: dict, network: nn.Module, average: EMA, optimizer: torch.optim.Optimizer
    ):
        self.path, self.kind, self.identity = path, kind, identity
        self.network, self.average, self.optimizer = network, average, optimizer

    def take_up(self, resume: bool) -> int:
        """The step after which an interrupted training of this identity goes on, and its state; 0 for one of another.

        UsageError if the file is damaged.
        """
        if not resume or not self.path.is_file():
            return 0
        stored = load_checkpoint(self.path, self.kind, REMEDY)
        try:
            if stored["identity"] != self.identity:
                return 0
            self.network.load_state_dict(stored["weights"])
            self.average.load_state_dict(stored["average"])
            self.optimizer.load_state_dict(stored["optimizer"])
            return stored["step"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"{self.path} is damaged: run {REMEDY}") from error

    def write(self, step: int) -> None:
        """All of it after so many steps."""
        state = {"weights": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        state["average"] = self.average.state_dict()
        save_checkpoint(self.path, self.kind, {"identity": self.identity, "step": step, **state})

    def refuse_diverged(self, words: str) -> None:
        """UsageError with these words if a weight is not finite; then nothing is left to go on from."""
        if not all(bool(weight.isfinite().all()) for weight in self.network.parameters()):
            self.path.unlink(missing_ok=True)
            raise UsageError(words)
