"""Part: what becomes of examined images: names, tables, metrics and the report, all in place together."""

import json
from pathlib import Path

from calibration import Calibration
from config import Config
from dataset import attempt_sample, refuse_too_many_bad, report_skipped
from files import write_csv, write_json
from metrics import summarize
from radiographs.manifest import Record
from radiographs.reading import ImageReadError
from reporting.lookup import LOOKUP, Pseudonyms
from reporting.report import Findings, write_report
from results import Unfinished
from runtime import shareable
from survey import contents_of, magnification_of
from thresholds import expected_false_positive_rate, false_positive_interval

SKIPPED = "skipped_local_only.csv"
COLUMNS = ["index", "name", "score", "p_value", "flagged", "label", "kind", "remarks"]


def publish(
    records: list[Record], unfinished: Unfinished, calibration: Calibration, shaping: dict, config: Config
) -> dict | None:
    """The tables and the report of what was examined, and all of it in its place; gives what metrics.json holds."""
    entries, skipped = unfinished.entries, unfinished.out / SKIPPED
    errors, broken_off = errors_in(unfinished, records), len(entries) < len(records)
    report_skipped(errors, len(records), skipped)
    emptied = len(errors) == len(entries)
    refuse_too_many_bad(len(errors), len(records), config.data, skipped, emptied=emptied, broken_off=broken_off)
    write_json(unfinished.folder / "config.json", shareable(config))
    rows = give_names(records, unfinished)
    write_csv(unfinished.folder / "scores.csv", COLUMNS, rows)
    metrics = measure(records, unfinished, calibration, config)
    if metrics:
        write_json(unfinished.folder / "metrics.json", metrics)
    if config.inference.report:
        write_report(unfinished.folder, findings(entries, calibration, metrics, shaping, config))
    unfinished.publish()
    return metrics


def give_names(records: list[Record], unfinished: Unfinished) -> list[list]:
    """The rows of scores.csv, with the names that images have there and in the report.

    A run that was killed while results were moved has left the lookup in place.
    """
    here = (unfinished.folder / LOOKUP).is_file()
    names = Pseudonyms(unfinished.folder if here else unfinished.out)
    examined = [entry for entry in unfinished.entries if "row" in entry]
    for entry in examined:
        entry["row"][1] = names.name(entry["index"], records[entry["index"]].path)
    names.save(unfinished.folder)
    return [entry["row"] for entry in examined]


def errors_in(unfinished: Unfinished, records: list[Record]) -> list[ImageReadError]:
    """The files that could not be read."""
    bad = [entry for entry in unfinished.entries if "error" in entry]
    return [ImageReadError(records[entry["index"]].path, entry["error"]) for entry in bad]


def same_errors(entries: list[dict], records: list[Record], config: Config) -> list[ImageReadError] | None:
    """The files that could not be read, read again; None if one of them can be by now."""
    again = [attempt_sample(records[entry["index"]], config.data) for entry in entries if "error" in entry]
    return again if all(isinstance(result, ImageReadError) for result in again) else None


def findings(
    entries: list[dict], calibration: Calibration, metrics: dict | None, shaping: dict, config: Config
) -> Findings:
    """What the report tells: nothing that the identity of the examination does not say already."""
    rate = config.inference.image_fpr
    normals = calibration.independent
    expected = expected_false_positive_rate(normals, rate), false_positive_interval(normals, rate)
    return Findings(entries, shaping, calibration.score_threshold(rate), *expected, metrics, calibration.normals_told)


def measure(records: list[Record], unfinished: Unfinished, calibration: Calibration, config: Config) -> dict | None:
    """Everything for metrics.json, of the radiographs without what "pad" added; None without labels of both kinds."""
    known = [entry for entry in unfinished.entries if "row" in entry and records[entry["index"]].label is not None]
    labelled = [records[entry["index"]] for entry in known]
    labels = [record.label for record in labelled]
    if len(set(labels)) < 2:
        return None
    shapes, times = [entry["shape"] for entry in known], magnification_of(config)
    contents = contents_of(shapes, len(known), config, times)
    kept = [unfinished.kept(entry["index"]) for entry in known]
    maps = [own[where] for (own, _), where in zip(kept, contents, strict=True)]
    masks = [None if mask is None else mask[where] for (_, mask), where in zip(kept, contents, strict=True)]
    kinds, patients = [record.kind for record in labelled], [record.patient for record in labelled]
    threshold, scores = calibration.pixel_threshold, [entry["score"] for entry in known]
    metrics = summarize(scores, labels, kinds, maps, masks, threshold, patients)
    metrics["validation_normals"] = calibration.validation_normals()
    return metrics


def metrics_in(out: Path) -> dict | None:
    """What an earlier run measured, if there were labels."""
    path = out / "metrics.json"
    return json.loads(path.read_text()) if path.is_file() else None
