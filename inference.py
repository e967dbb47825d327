"""Phase 4: what G(x) changed is the anomaly.

Reads   radiographs (data.test, or the test split of data.root) and the checkpoints of phases 1 and 3; where
        outputs/calibration/ has nothing that belongs to them, also the training and validation normals of data.root

Writes  outputs/phase4_inference/: report.html with its pictures in report/, result_XXX.png, scores.csv, maps/XXX.npy
        at the size of the original image, metrics.json where labels exist, examination.json, which tells the next run
        what is there, and readable by their owner alone lookup_local_only.csv, which says which source each index is,
        and skipped_local_only.csv with the names of files that could not be read; with --inference.dicom True
        dicom_local_only/, which names patients: DICOM objects of every DICOM input, for an archive

        outputs/calibration/: reader.pt and corruptions.png, METHOD.npz and .json, what normals say; made once, read by
        every later examination

        outputs/cache/: radiographs as they were decoded, those examined too, for later runs; its owner's alone

method reader       map = how foreign small networks find each place, in standard deviations of validation normals

method plain        map = alpha_l1 |x - G(x)| + beta_grad |grad x - grad G(x)| + gamma_hf |Laplacian x - Laplacian G(x)|

method statistical  map = many views of what G changed, in standard deviations of validation normals, fused

score = mean of the top_share highest values of the map; for reader, that of its map, plain_weight of that of the plain
        one and residual_weight of that of |x - dec(enc(x))|, each in standard deviations of validation normals

The reader learns on corrupted training normals. Thresholds, p-values and colour scales come from the validation normals
alone: at most image_fpr of their scores and pixel_fpr of their pixels lie above. No score depends on another test
image. Labels are used for metrics.json and nothing else. Look for: lesions bright and teeth dark in the final map,
scores of normals near those of the validation normals.
"""

if __name__ == "__main__":
    import interruption

    interruption.begin()  # first: a signal may come during the imports below, too


import json
from pathlib import Path

import numpy as np
import torch

from archive import Archive
from calibration import Calibration
from command_line import parse_command
from conclusion import REMARKS, conclude
from config import Config
from dataset import Sample, attempt_sample, read_batches, refuse_too_many_bad, report_skipped
from examination import calibration_of, open_normalizer, records_to_examine, refuse_known_content, remarks_on
from files import write_binary, write_csv, write_json
from holding import hold
from interruption import Steps, remember
from metrics import summarize
from normalizer import Normalizer
from progress import bar, warn
from radiographs.geometry import unfit_map
from radiographs.manifest import Record
from radiographs.reading import ImageReadError
from reporting.figures import ColourScale
from reporting.layers import FOLDER, save_layers
from reporting.lookup import LOOKUP, Pseudonyms
from reporting.report import Findings, write_report
from results import Unfinished, finished_entries, identity_of, refuse_to_replace, refuse_to_write_among
from runtime import run_script, shareable
from showing import draw, layers_of, title_of
from survey import magnification_of
from thresholds import expected_false_positive_rate, false_positive_interval
from waiting import Waiting

RECIPE = 2  # raise it when code changes the results of the same files and settings
SKIPPED = "skipped_local_only.csv"
COLUMNS = ["index", "name", "score", "p_value", "flagged", "label", "kind", "remarks"]
SAVE_EVERY = 10  # batches at first, then a twentieth of those that are done: the note grows with them


def main() -> None:
    """Phase 4, from the command line."""
    model, config = open_normalizer(parse_command(__doc__))
    settings = config.inference
    records = records_to_examine(model, config)
    out = Path(settings.output)
    refuse_to_write_among(records, out)
    refuse_to_replace(out)
    held = hold(out, "results")
    calibration = calibration_of(model, config)

    identity = identity_of(records, **shaping_results(calibration, config), device=str(model.device))
    entries, skipped = finished_entries(out, identity) if config.runtime.resume else None, out / SKIPPED
    errors = same_errors(entries or [], records, config)
    if entries is not None and errors is not None:
        print(f"{out} holds these results already (--runtime.resume False examines anew)")
        report_skipped(errors, len(records), skipped)
        refuse_too_many_bad(len(errors), len(records), config.data, skipped, emptied=len(errors) == len(records))
        conclude(entries, calibration, metrics_in(out), config)
        return
    unfinished = Unfinished(out, identity, config.runtime.resume)
    if same_errors(unfinished.entries, records, config) is None:
        unfinished = Unfinished(out, identity, resume=False)
    write_json(unfinished.folder / "config.json", shareable(config))
    examine(records, unfinished, model, calibration, config)

    entries = unfinished.entries
    errors = [ImageReadError(records[entry["index"]].path, entry["error"]) for entry in entries if "error" in entry]
    rows = [entry["row"] for entry in entries if "row" in entry]
    report_skipped(errors, len(records), skipped)
    broken_off = len(entries) < len(records)
    refuse_too_many_bad(len(errors), len(records), config.data, skipped, emptied=not rows, broken_off=broken_off)
    write_csv(unfinished.folder / "scores.csv", COLUMNS, rows)
    metrics = measure(records, unfinished, calibration)
    if metrics:
        write_json(unfinished.folder / "metrics.json", metrics)
    if settings.report:
        write_report(unfinished.folder, findings(entries, calibration, metrics, config))
    unfinished.publish()
    held.close()
    conclude(entries, calibration, metrics, config)


def examine(
    records: list[Record], unfinished: Unfinished, model: Normalizer, calibration: Calibration, config: Config
) -> None:
    """Every record that is not examined yet: its entry, its map, its figure."""
    settings, fresh, done = config.inference, unfinished.folder, unfinished.done
    names = names_so_far(records, unfinished)
    places = {record.path: index for index, record in enumerate(records)}
    drawn, times = figures_to_draw(records, settings.figures), magnification_of(config)
    scale, threshold = ColourScale(**calibration.scale), calibration.score_threshold(settings.image_fpr)
    if not any(members.prints for members in model.members):
        warn("these checkpoints are of an earlier version: copies of radiographs that trained are not remarked on")
    if done:
        print(f"continuing after {done} of {len(records)} images (--runtime.resume False examines anew)")
    objects = Archive(fresh, calibration, config, records[:done]) if settings.dicom else None
    errors: list[ImageReadError] = []
    finest = tuple(calibration.file_sizes[1])
    batches = read_batches(records[done:], config.data, settings.batch_size, errors, times, finest)
    steps, begun, next_save, waiting = Steps(), done, SAVE_EVERY, Waiting()
    bad = sum("error" in entry for entry in unfinished.entries)
    with bar(total=len(records), initial=done, desc="phase 4", unit="image") as progress:
        for number, batch in enumerate(steps.of(waiting.of(batches)), 1):
            unfinished.entries += [{"index": places[error.path], "error": error.reason} for error in errors]
            bad += len(errors)
            errors.clear()
            images = torch.stack([torch.from_numpy(sample.image) for _, sample in batch]).unsqueeze(1)
            seen = model.examine(images, times)
            maps = calibration.anomaly_map(seen, config)
            scores = calibration.scores_of(seen, maps, config).tolist()
            foreign = calibration.foreign(seen, config.latent.outlier_std)
            for position, (place, sample) in enumerate(batch):
                index = begun + place
                refuse_known_content(model, sample, index, config)
                record, score, anomaly_map = records[index], scores[position], maps[position, 0].cpu().numpy()
                p_value, figure = calibration.p_value(score), f"result_{index:03d}.png" if index in drawn else ""
                row = [f"{index:03d}", names.name(index, record.path), f"{score:.6f}", f"{p_value:.4f}"]
                row += [int(score > threshold), "" if record.label is None else record.label, record.kind]
                remarks = remarks_on(sample, model, calibration, config) | {"foreign": foreign[position]}
                row.append("; ".join(told for name, told in REMARKS.items() if remarks[name]))
                entry = {"index": index, "row": row, "score": score, **remarks, "figure": figure}
                unfinished.entries.append(entry)
                if record.label is not None:
                    unfinished.keep(index, anomaly_map, sample.mask)
                if settings.save_maps:
                    save_map(fresh / "maps" / f"{index:03d}.npy", anomaly_map, sample, config)
                if objects:
                    entry["objects"] = objects.write(index, record, anomaly_map, sample.original_shape)
                if settings.report:
                    layers = layers_of(seen, position, anomaly_map, sample, config)
                    entry["report"] = save_layers(fresh / FOLDER, index, layers, scale.anomaly_map)
                if figure:
                    title = f"{title_of(index, score, p_value, threshold, record)}  |  method {settings.method}"
                    draw(fresh / figure, seen, position, anomaly_map, title, scale, sample.mask)
            done = min(len(records), begun + settings.batch_size * (1 + batch[-1][0] // settings.batch_size))
            progress.update(done - progress.n)
            if number >= next_save or steps.asked:
                next_save = number + max(SAVE_EVERY, number // 20)
                names.save(fresh)
                unfinished.save(done)
                remember(f"the same command goes on after {done} of {len(records)} images")
            if bad > config.data.max_bad_share * len(records):
                break  # refused afterwards: no need to examine the rest first
    print(waiting.told())
    unfinished.entries += [{"index": places[error.path], "error": error.reason} for error in errors]
    unfinished.entries.sort(key=lambda entry: entry["index"])
    names.save(fresh)
    if len(unfinished.entries) == len(records):  # not where it was broken off
        unfinished.save(len(records))
        remember(f"the same command goes on after {len(records)} of {len(records)} images")


def names_so_far(records: list[Record], unfinished: Unfinished) -> Pseudonyms:
    """The names that images have in tables, those of the records that are examined already among them.

    A run that was killed while results were moved has left the lookup in place.
    """
    here = (unfinished.folder / LOOKUP).is_file()
    names = Pseudonyms(unfinished.folder if here else unfinished.out)
    for entry in unfinished.entries:
        if "row" in entry:
            names.name(entry["index"], records[entry["index"]].path)  # the table is written as a whole
    return names


def same_errors(entries: list[dict], records: list[Record], config: Config) -> list[ImageReadError] | None:
    """The files that could not be read, read again; None if one of them can be by now."""
    again = [attempt_sample(records[entry["index"]], config.data) for entry in entries if "error" in entry]
    return again if all(isinstance(result, ImageReadError) for result in again) else None


def shaping_results(calibration: Calibration, config: Config) -> dict:
    """Everything beside the files that results follow from."""
    names = ("belongs_to", "pixel_threshold", "scale", "file_sizes")
    known = {name: getattr(calibration, name) for name in names} | {"scores": calibration.scores.tolist()}
    asked = ("figures", "report", "save_maps", "dicom", "image_fpr", "examine_training_patients", "batch_size")
    settings = {name: getattr(config.inference, name) for name in asked} | {"outlier_std": config.latent.outlier_std}
    made_by = {"recipe": RECIPE, "torch": torch.__version__}
    return {"calibration": known, "settings": settings, "preprocessing": config.data.preprocessing, **made_by}


def metrics_in(out: Path) -> dict | None:
    """What an earlier run measured, if there were labels."""
    path = out / "metrics.json"
    return json.loads(path.read_text()) if path.is_file() else None


# ---------------------------------------------------------------- results


def figures_to_draw(records: list[Record], count: int) -> set[int]:
    """Which images get a figure: all, or `count` spread evenly over the kinds."""
    if count < 0 or count >= len(records):
        return set(range(len(records)))
    by_kind: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        by_kind.setdefault(record.kind, []).append(index)
    turns = sorted((place, index) for indices in by_kind.values() for place, index in enumerate(indices))
    return {index for _, index in turns[:count]}


def save_map(path: Path, anomaly_map: np.ndarray, sample: Sample, config: Config) -> None:
    """The map (H, W) as float32 .npy at the size of the original image."""
    full = unfit_map(anomaly_map, sample.original_shape, config.data.fit, magnification_of(config))
    write_binary(path, lambda file: np.save(file, full))


def findings(entries: list[dict], calibration: Calibration, metrics: dict | None, config: Config) -> Findings:
    """What the report tells: nothing that the identity of the examination does not say already."""
    rate = config.inference.image_fpr
    normals = len(calibration.scores)
    expected = expected_false_positive_rate(normals, rate), false_positive_interval(normals, rate)
    shaping = shaping_results(calibration, config)
    return Findings(entries, shaping, calibration.score_threshold(rate), *expected, metrics)


def measure(records: list[Record], unfinished: Unfinished, calibration: Calibration) -> dict | None:
    """Everything for metrics.json; None unless there are labels of both kinds."""
    known = [entry for entry in unfinished.entries if "row" in entry and records[entry["index"]].label is not None]
    labelled = [records[entry["index"]] for entry in known]
    labels = [record.label for record in labelled]
    if len(set(labels)) < 2:
        return None
    kept = [unfinished.kept(entry["index"]) for entry in known]
    maps, masks = [each[0] for each in kept], [each[1] for each in kept]
    kinds, patients = [record.kind for record in labelled], [record.patient for record in labelled]
    threshold, scores = calibration.pixel_threshold, [entry["score"] for entry in known]
    metrics = summarize(scores, labels, kinds, maps, masks, threshold, patients)
    metrics["validation_normals"] = calibration.validation_normals()
    return metrics


if __name__ == "__main__":
    run_script(main)
