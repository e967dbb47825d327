"""Leaf: report.html, all results of an examination in one page that opens from disk; reporting/layers.py makes its
pictures.

What the page says follows from what the examination follows from (results.identity_of) and from nothing else, so that
it cannot be stale. It names images as scores.csv does, loads nothing but the files beside it, and runs no script but
its own: its Content-Security-Policy forbids the rest.
"""

import base64
import hashlib
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from files import write_atomically
from reporting import charts
from reporting.figures import heat_colours
from reporting.layers import FOLDER

REPORT = "report.html"
TEMPLATES = Path(__file__).parent / "templates"
MEASURED = ("auroc", "ap", "pixel_ap", "aupro", "dice")
LABELS = {0: "normal", 1: "abnormal", "": "unknown"}  # of a row of scores.csv, in words


@dataclass(frozen=True)
class Findings:
    """What an examination found, and what it was made with."""

    entries: list[dict]  # of results.Unfinished, with what layers.save_layers gave as "report"
    shaping: dict  # of inference.shaping_results: settings, checkpoints, what normals say
    threshold: float  # of the score
    expected_rate: float  # of new normals above it, on average: thresholds.expected_false_positive_rate
    false_positives: tuple[float, float]  # where that rate lies, thresholds.false_positive_interval
    metrics: dict | None  # of metrics.summarize
    normals_told: str  # how many say it: calibration.Calibration.normals_told

    @property
    def examined(self) -> list[dict]:
        """The entries of files that could be read."""
        return [entry for entry in self.entries if "row" in entry]


def write_report(folder: Path, found: Findings, date: datetime | None = None) -> None:
    """Write report.html into a folder, for pictures in its folder `report`; date is that of today if not given."""
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    page = templates.get_template("report.html.j2").render(
        style=Markup(style),
        script=Markup(script),
        style_hash=content_hash(style),
        script_hash=content_hash(script),
        date=(date or datetime.now().astimezone()).strftime("%Y-%m-%d %H:%M %z"),
        summary=summary(found),
        charts=charts_of(found),
        kinds=table_of_kinds(found),
        measured=MEASURED,
        checkpoints=checkpoints(found.shaping),
        settings=settings_told(found.shaping),
        colours=[f"rgb({red},{green},{blue})" for red, green, blue in heat_colours()[::15].tolist()],
        bar=colour_bar(found.shaping),
        data=data_of(found),
        frame=charts,
    )
    write_atomically(folder / REPORT, lambda beside: beside.write_bytes(page.encode(errors="backslashreplace")))


def content_hash(text: str) -> str:
    """How a Content-Security-Policy names a script or a style that it lets pass."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def data_of(found: Findings) -> dict:
    """What the page's script works with: of each image what scores.csv says, and where its pictures are."""
    images = []
    for entry in found.examined:
        index, name, _, p_value, flagged, label, kind, remarks = entry["row"]
        told = {"index": index, "name": name, "score": entry["score"], "p_value": p_value, "flagged": bool(flagged)}
        told |= {"label": LABELS[label], "kind": kind, "remarks": remarks, "figure": entry["figure"]}
        images.append(told | entry["report"])
    return {"images": images, "threshold": found.threshold, "folder": FOLDER}


def summary(found: Findings) -> dict:
    """How many were examined, skipped and flagged, how many of these are expected to be wrong, what was remarked on."""
    rows, rate = [entry["row"] for entry in found.examined], found.shaping["settings"]["image_fpr"]
    normal = [row[4] for row in rows if row[5] == 0]
    remarks = Counter(remark for row in rows for remark in row[7].split("; ") if remark)
    return {
        "examined": len(rows),
        "skipped": len(found.entries) - len(rows),
        "flagged": sum(row[4] for row in rows),
        "threshold": found.threshold,
        "validation_normals": found.normals_told,
        "rate": rate,
        "interval": found.false_positives,
        "expected": found.expected_rate * len(rows),
        "expected_interval": [end * len(rows) for end in found.false_positives],
        "normals": len(normal),
        "normals_flagged": sum(normal),
        "remarks": dict(remarks.most_common()),
    }


def charts_of(found: Findings) -> list[charts.Chart]:
    """The histogram of scores; ROC and precision-recall where metrics.json holds their areas."""
    by_label = {label: [e["score"] for e in found.examined if e["row"][5] == label] for label in LABELS}
    groups = [(f"examined, {LABELS[label]}", f"examined-{LABELS[label]}", by_label[label]) for label in LABELS]
    if not by_label[0] and not by_label[1]:
        groups = [("examined", "examined-unknown", by_label[""])]
    drawn = [charts.histogram(found.shaping["calibration"]["scores"], groups, found.threshold)]
    if found.metrics:
        scores, labels = by_label[0] + by_label[1], [0] * len(by_label[0]) + [1] * len(by_label[1])
        overall = found.metrics["overall"]
        area = {name: with_interval(overall, name) for name in ("auroc", "ap")}
        drawn.append(charts.roc(scores, labels, found.threshold, f"AUROC {area['auroc']}"))
        drawn.append(charts.precision_recall(scores, labels, found.threshold, f"AP {area['ap']}"))
    return drawn


def table_of_kinds(found: Findings) -> list[dict]:
    """One line per label and kind: images, how many are flagged, the median score; the metrics where there are some."""
    groups: dict[tuple, list[dict]] = {}
    for entry in found.examined:
        groups.setdefault((entry["row"][5], entry["row"][6]), []).append(entry)
    measured = found.metrics or {"kinds": {}}
    lines = []
    for (label, kind), entries in sorted(groups.items(), key=lambda group: (str(group[0][0]), group[0][1])):
        known = measured["kinds"].get(kind) if label == 1 else None
        lines.append(_line(kind or "(no kind)", LABELS[label], entries, known))
    if found.metrics:
        labelled = [entry for entry in found.examined if entry["row"][5] != ""]
        lines.append(_line("all with a label", "", labelled, measured["overall"]))
        lines.append(_line("mean of kinds", "", [], measured["mean_over_kinds"]))
    return lines


def _line(kind: str, label: str, entries: list[dict], known: dict | None) -> dict:
    line = {"kind": kind, "label": label, "images": len(entries) or "", "flagged": "", "median": ""}
    if entries:
        line["flagged"] = sum(entry["row"][4] for entry in entries)
        line["median"] = f"{np.median([entry['score'] for entry in entries]):.4f}"
    return line | {name: with_interval(known, name) if known else "" for name in MEASURED}


def with_interval(measured: dict, name: str) -> str:
    """A metric as people read it: 0.812 (0.701 to 0.903), or - where it is undefined."""
    if measured.get(name) is None:
        return "-"
    low, high = measured.get(f"{name}_interval") or (None, None)
    return f"{measured[name]:.3f}" + ("" if low is None or high is None else f" ({low:.3f} to {high:.3f})")


def checkpoints(shaping: dict) -> dict[str, str]:
    """The hashes of the files that the results were made with."""
    names = {"vae_sha256": "VAE (phase 1)", "flow_sha256": "normalizer (phase 3)", "reader_sha256": "reader"}
    belongs_to = shaping["calibration"]["belongs_to"]
    return {told: belongs_to[name] for name, told in names.items() if name in belongs_to}


def settings_told(shaping: dict) -> dict[str, str]:
    """Everything else that the results follow from, by name."""
    told = {**shaping["calibration"]["belongs_to"], **shaping["settings"], **shaping["preprocessing"]}
    told |= {"torch": shaping["torch"], "recipe": shaping["recipe"]}
    return {name: _told(value) for name, value in sorted(told.items()) if not name.endswith("_sha256")}


def _told(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(_told, value)) if isinstance(value, list | tuple) else str(value)


def colour_bar(shaping: dict) -> dict:
    """Where the bar of a map ends, and the share of it at which a pixel counts as found."""
    end, threshold = shaping["calibration"]["scale"]["anomaly_map"], shaping["calibration"]["pixel_threshold"]
    return {"end": end, "threshold": threshold, "share": min(1.0, max(0.0, threshold / end))}
