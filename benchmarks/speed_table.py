"""The parts that speed.py kept, as Markdown."""

import json
from pathlib import Path

from checks import UsageError

Part = dict


def table_of(folder: Path) -> str:
    """All parts in a folder: steps, what stood side by side, the number of latents, what fits, what was the ceiling."""
    parts = [read_part(path) for path in sorted(folder.glob("*.json"))]
    if not parts:
        return f"no part is kept in {folder.name} yet: choose with --parts"
    parts.sort(key=lambda part: (part["part"], part["size"], part["device"], part["preset"]))
    chapters = [steps(parts), sides(parts), growth(parts), fits(parts), roofs(parts)]
    return "\n\n".join(chapter for chapter in chapters if chapter)


def read_part(path: Path) -> Part:
    """What was kept; UsageError if it is damaged or something else."""
    try:
        part = json.loads(path.read_text())
        missing = {"part", "size", "device", "preset", "asked", "rows", "ceiling", "hardware"} - set(part)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path.name} in --results is damaged: remove it") from error
    if missing:
        raise UsageError(f"{path.name} in --results is no part of this benchmark: move it elsewhere")
    return part


def markdown(titles: list[str], lines: list[list[str]]) -> str:
    """A table; nothing without lines."""
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) if lines else ""


def where(part: Part) -> list[str]:
    """The cells that every table begins with."""
    return [part["part"], part["preset"], str(part["size"]), part["device"]]


def said(value: float | None, digits: int = 3) -> str:
    """A number to so many digits, or that there is none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def waits(share: float | None) -> str:
    """A share of a step, or that it was not measured."""
    return "-" if share is None else f"{share:.0%}"


def steps(parts: list[Part]) -> str:
    """A line per part, size and batch."""
    titles = ["part", "preset", "size", "device", "batch", "images/s", "ms a step", "of the processor", "share"]
    titles += ["of", "waits", "peak, MiB"]
    lines = []
    for part in parts:
        for row in part["rows"] if part["part"].startswith(("phase", "tuning-whole")) else ():
            cells = ["does not fit"] + ["-"] * 6
            if row["fits"]:
                cells = [said(row["images_per_s"]), said(row["step_ms"]), said(row["core_ms"]), f"{row['share']:.0%}"]
                cells += [row["precision"], waits(row["idle"]), said(row["peak_mib"])]
            lines.append([*where(part), str(row["batch"]), *cells])
    return markdown(titles, lines)


def sides(parts: list[Part]) -> str:
    """What took turns, against the first of its kind."""
    titles = ["part", "preset", "size", "device", "row", "batch", "images/s", "times as fast", "by processor time"]
    lines = []
    for part in parts:
        for row in part["rows"]:
            if "times" in row:
                times = [f"{row[name]:.2f}" for name in ("times", "core_times")]
                lines.append([*where(part), row["row"], str(row["batch"]), said(row["images_per_s"]), *times])
    return markdown(titles, lines)


def growth(parts: list[Part]) -> str:
    """Phase 3 against the number of latents."""
    titles = ["part", "preset", "size", "device", "latents", "batch", "ms a step", "of the processor", "opened in, s"]
    lines = []
    for part in parts:
        for row in part["rows"] if part["part"] == "scaling" else ():
            cells = [f"{row['latents']:,}", str(row["batch"]), said(row["step_ms"]), said(row["core_ms"])]
            lines.append([*where(part), *cells, said(row["open_s"]), said(row["own_mib"])])
    return markdown([*titles, "memory, MiB"], lines)


def fits(parts: list[Part]) -> str:
    """The largest batch and the fastest."""
    lines = []
    for part in parts:
        rows = [row for row in part["rows"] if row.get("fits")]
        if part["part"].startswith("fit") and rows:
            fastest = max(rows, key=lambda row: row["images_per_s"])
            end = "memory ended" if not all(row["fits"] for row in part["rows"]) else "the largest tried"
            cells = [f"{rows[-1]['batch']} ({end})", f"{fastest['batch']}: {said(fastest['images_per_s'])} images/s"]
            lines.append([*where(part), *cells])
    return markdown(["part", "preset", "size", "device", "largest batch", "fastest"], lines)


def roofs(parts: list[Part]) -> str:
    """What the device could do at most while each part was measured."""
    titles = [
        "part",
        "preset",
        "size",
        "device",
        "bf16, TFLOP/s",
        "tf32",
        "float32",
        "copy, GB/s",
        "hardware",
        "commit",
    ]
    lines = []
    for part in parts:
        ceiling = [said(part["ceiling"].get(name)) for name in ("bf16", "tf32", "float32", "copy")]
        lines.append([*where(part), *ceiling, part["hardware"], part["commit"]])
    return markdown(titles, lines)
