"""Leaf: what becomes of a training step whose gradient is not finite."""

import math

import torch
from torch import Tensor

from checks import UsageError
from progress import warn


class StepGuard:
    """Lets a step pass if its gradient is finite; the others are told, counted and, too many in a row, end the run.

    So no weight that is not a number reaches a checkpoint. With an `optimizer` that leaves such a step out itself
    (computing.leaves_out) the host does not wait for the gradient: it hears of it when it next asks for `skipped`, or
    before weights are written.
    """

    def __init__(
        self,
        lr_name: str,
        limit: int,
        skipped: int = 0,
        quiet: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
    ):
        self.remedy = f"lower {lr_name}, with --runtime.resume-changed True to go on from the last good checkpoint"
        self.limit, self.quiet, self.optimizer = limit, quiet, optimizer
        self.in_a_row, self._skipped = 0, skipped
        self.counts: Tensor | None = None  # whether the last step counts, where the device alone knows
        self._unheard: list[tuple[int, Tensor]] = []

    def passes(self, step: int, grad_norm: Tensor) -> bool:
        """Whether the optimizer may follow this gradient; on a CPU the host looks at it.

        Elsewhere always True: the optimizer is told, and changes nothing by a gradient that is not finite.
        """
        if self.optimizer is None:
            return self._hear(step, math.isfinite(float(grad_norm)))
        self.counts = grad_norm.detach().isfinite()
        self.optimizer.found_inf = (~self.counts).float()
        self._unheard.append((step, self.counts))
        return True

    def counted(self, values: dict[str, object]) -> dict[str, object]:
        """What a Meter shall add of a step: nothing of one that does not count."""
        if self.counts is None:
            return values
        return {name: value if isinstance(value, str) else self._if_it_counts(value) for name, value in values.items()}

    def _if_it_counts(self, value: Tensor | float | tuple) -> tuple[Tensor, Tensor]:
        pair = value if isinstance(value, tuple) else (value, 1.0)
        parts = (part.detach().double() if isinstance(part, Tensor) else part for part in pair)
        return tuple(torch.where(self.counts, part, 0.0) for part in parts)

    @property
    def skipped(self) -> int:
        """How many steps were skipped; UsageError after too many in a row. The host waits for the device here."""
        unheard, self._unheard = self._unheard, []
        if unheard:
            finite = torch.stack([each for _, each in unheard]).tolist()
            for (step, _), passed in zip(unheard, finite, strict=True):
                self._hear(step, passed)
        return self._skipped

    def _hear(self, step: int, finite: bool) -> bool:
        if finite:
            self.in_a_row = 0
            return True
        self._skipped += 1
        self.in_a_row += 1
        if not self.quiet:
            warn(f"step {step}: the gradient is not finite, the step is skipped ({self._skipped} so far)")
        if self.in_a_row == self.limit:
            raise UsageError(f"no gradient was finite in the {self.limit} steps up to {step}: {self.remedy}")
        return False

    def check(self, step: int, weights: dict[str, Tensor]) -> None:
        """Before they are written: UsageError if a weight is not finite, or after too many skipped steps."""
        _ = self.skipped
        if not all(bool(weight.isfinite().all()) for weight in weights.values()):
            raise UsageError(f"the weights are not finite at step {step}: {self.remedy}")
