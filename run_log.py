"""Leaf: the numbers of a run as it goes on: log.csv, by config also wandb, and running means between two log lines."""

import csv
import os
import time
from pathlib import Path

import torch
from torch import Tensor

from config import Config
from files import write_csv
from runtime import plain


class RunLog:
    """Numbers of a run: rows of (step, name, value) in log.csv; by config also wandb, which gets no image and no path.

    A resumed run drops the rows after the step it resumes from and says with its first ones, in a row named resumed,
    which step that was: the means of train/ from there to the next rows are of what came after it.
    """

    def __init__(self, folder: Path | str, name: str, config: Config, from_step: int = 0, enabled: bool = True):
        self.path, self.enabled, self.run = Path(folder) / "log.csv", enabled, None
        if not enabled:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.resumed_at, kept = from_step, []
        if from_step and self.path.is_file():
            kept = [row for row in _whole_rows(self.path) if int(row[0]) <= from_step]
        write_csv(self.path, ["step", "name", "value"], kept)
        if config.runtime.wandb != "disabled":
            self.run = _start_wandb(self.path.parent, name, config)

    def write(self, step: int, values: dict[str, float | str]) -> None:
        """Append one row per value; a string such as "n/a" says why there is no number."""
        if not self.enabled:
            return
        with open(self.path, "a", newline="") as file:
            if self.resumed_at:
                csv.writer(file).writerow([self.resumed_at, "resumed", self.resumed_at])
                self.resumed_at = 0
            csv.writer(file).writerows(
                [step, name, value if isinstance(value, str) else f"{value:.6g}"] for name, value in values.items()
            )
        if self.run is not None:
            self.run.log({name: value for name, value in values.items() if not isinstance(value, str)}, step=step)

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()


def _start_wandb(folder: Path, name: str, config: Config):
    if config.runtime.wandb == "offline":
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # offline mode looks a host up without this
    import wandb

    shown = plain(config)
    numbers = {
        phase: {key: value for key, value in fields.items() if not isinstance(value, str)}
        for phase, fields in shown.items()
    }
    settings = wandb.Settings(
        disable_git=True,
        disable_code=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        console="off",
        silent=True,
    )
    return wandb.init(
        project=config.runtime.wandb_project,
        name=name,
        mode=config.runtime.wandb,
        dir=folder,
        config=numbers,
        settings=settings,
    )


def read_log(folder: Path | str) -> dict[str, tuple[list[int], list[float]]]:
    """log.csv as name -> (steps, values), numbers only."""
    history: dict[str, tuple[list[int], list[float]]] = {}
    for step, name, value in _whole_rows(Path(folder) / "log.csv"):
        if value != "n/a":
            steps, values = history.setdefault(name, ([], []))
            steps.append(int(step))
            values.append(float(value))
    return history


def _whole_rows(path: Path) -> list[list[str]]:
    """The rows of a log below its header, less what a power cut or a full disk made of them."""
    text = path.read_text(encoding="utf-8", errors="replace").replace("\0", "")
    rows = list(csv.reader(text.splitlines()))[1:]
    return [row for row in rows if len(row) == 3 and row[0].isdecimal() and row[2]]


class Meter:
    """Running means between two log lines, and the images per second over the same stretch.

    Tensors stay on their device, and are fetched by `flush` alone.
    """

    def __init__(self):
        self.sums: dict[str, float | Tensor] = {}
        self.counts: dict[str, float | Tensor] = {}
        self.notes: dict[str, str] = {}
        self.images, self.began = 0, time.perf_counter()

    def add(self, values: dict[str, object], weight: float = 1.0, images: int = 0) -> None:
        """A number counts `weight` times; a pair is a sum and of how many; text, such as n/a, is kept as it is."""
        for name, value in values.items():
            if isinstance(value, str):
                self.notes[name] = value
                continue
            total, count = value if isinstance(value, tuple) else (weight * _detached(value), weight)
            self.sums[name] = self.sums.get(name, 0.0) + _detached(total)
            self.counts[name] = self.counts.get(name, 0.0) + _detached(count)
        self.images += images

    def flush(self) -> dict[str, float | str]:
        """The means since the last flush; a name that nothing was counted under is left out."""
        sums, counts = (_fetched(list(part.values())) for part in (self.sums, self.counts))
        means = {name: total / count for name, total, count in zip(self.sums, sums, counts, strict=True) if count > 0}
        if self.images:
            means["images_per_s"] = self.images / max(1e-9, time.perf_counter() - self.began)
        means |= self.notes
        self.__init__()
        return means


def _detached(value: float | Tensor) -> float | Tensor:
    return value.detach().double() if isinstance(value, Tensor) else value


def _fetched(values: list[float | Tensor]) -> list[float]:
    """All of them as numbers of the host, at the price of one wait."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    fetched = iter(torch.stack(tensors).tolist() if tensors else [])
    return [next(fetched) if isinstance(value, Tensor) else value for value in values]
