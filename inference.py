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

Under torchrun each process examines a share, and the first makes one result of all. --inference.shard does the same by
jobs of their own: calibrate, then 1/8 to 8/8 in any order, then merge. Both leave the bytes of a single run.

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


import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from archive import Archive
from calibration import Calibration
from checks import UsageError
from command_line import parse_command
from conclusion import REMARKS, conclude
from config import Config
from dataset import read_batches, refuse_too_many_bad, report_skipped
from examination import (
    calibration_of,
    open_normalizer,
    ready_calibration,
    records_to_examine,
    refuse_known_content,
    remarks_on,
)
from files import write_binary
from holding import hold
from interruption import Steps, remember
from merging import Whole
from normalizer import Normalizer
from progress import bar, warn
from publishing import SKIPPED, errors_in, metrics_in, publish, same_errors
from radiographs.geometry import unfit_map
from radiographs.manifest import Record
from radiographs.reading import ImageReadError
from reporting.figures import ColourScale, save_result
from reporting.layers import FOLDER, save_layers
from results import (
    Unfinished,
    finished_entries,
    identity_of,
    refuse_to_replace,
    refuse_to_write_among,
    remove_what_was_published,
)
from runtime import run_script
from shards import PURPOSE, Shard, Team, remove_shards
from showing import layers_of, panels_of, title_of
from survey import magnification_of
from waiting import Waiting
from writing import Writing

RECIPE = 3  # raise it when code changes the results of the same files and settings
SAVE_EVERY = 10  # batches at first, then a twentieth of those that are done: the note grows with them


def main() -> None:
    """Phase 4, from the command line."""
    model, config = open_normalizer(parse_command(__doc__), several=True)
    asked, out = config.inference.shard, Path(config.inference.output)
    config = replace(config, inference=replace(config.inference, shard=""))  # results do not depend on it
    team = Team(out)
    if asked and not team.alone:
        raise UsageError(
            "under torchrun every process is a shard: leave --inference.shard out, or start it with python"
        )
    if asked == "calibrate":
        calibration_of(model, config)
        print(f"ready for all shards: {config.inference.calibration}")
        return
    if not team.leads and not team.may_begin():
        team.end()
        return
    records = records_to_examine(model, config)
    refuse_to_write_among(records, out)
    job = Shard.parse(asked) if "/" in asked else None
    held = None
    if team.leads and not job:
        refuse_to_replace(out)
        held = hold(out, "results")
    if team.leads and not asked:
        calibration = calibration_of(model, config)
    if asked or not team.alone:
        calibration = ready_calibration(model, config)  # of the same file for all of them

    shaping, device = shaping_results(calibration, config), model.device.type
    identity = identity_of(records, **shaping, device=device)
    whole = Whole.of(out, identity, records, shaping, device)
    entries, skipped = finished_entries(out, identity) if config.runtime.resume else None, out / SKIPPED
    errors = same_errors(entries or [], records, config)
    if team.leads and entries is not None and errors is not None:
        print(f"{out} holds these results already (--runtime.resume False examines anew)")
        if held:
            remove_what_was_published(out, identity)
        report_skipped(errors, len(records), skipped)
        refuse_too_many_bad(len(errors), len(records), config.data, skipped, emptied=len(errors) == len(records))
        end_together(team, whole, asked)
        conclude(entries, calibration, metrics_in(out), config)
        return
    if team.leads:
        team.begin()
    if job or not team.alone:
        examine_shard(job or team.shard, whole, "" if job else team.run, records, model, calibration, config)
    if job or not team.leads:
        team.end()
        return
    unfinished = taken_up(out, identity, records, config)
    if asked != "merge" and team.alone:
        examine(records, range(len(records)), unfinished, model, calibration, config)
    elif unfinished.done < len(records):
        unfinished = Unfinished(out, identity, resume=False)
        whole.join(unfinished) if team.alone else whole.join_team(team, unfinished)

    metrics = publish(records, unfinished, calibration, shaping, config)
    end_together(team, whole, asked)
    held.close()
    conclude(unfinished.entries, calibration, metrics, config)


def taken_up(folder: Path, identity: str, records: list[Record], config: Config) -> Unfinished:
    """The examination in a folder, from where it was left; from the beginning where what was an error is none now."""
    unfinished = Unfinished(folder, identity, config.runtime.resume)
    if same_errors(unfinished.entries, records, config) is None:
        unfinished = Unfinished(folder, identity, resume=False)
    return unfinished


def examine_shard(
    shard: Shard,
    whole: Whole,
    run: str,
    records: list[Record],
    model: Normalizer,
    calibration: Calibration,
    config: Config,
) -> None:
    """Some of the records, in the folder of the shard, where they stay until all shards are joined."""
    folder, rows = whole.folder(shard), whole.rows(shard)
    with hold(folder, PURPOSE):
        unfinished = taken_up(folder, whole.identity_of(shard), records, config)
        whole.label(shard)
        examine(records, rows, unfinished, model, calibration, config)
        bad, broken_off = errors_in(unfinished, records), len(unfinished.entries) < len(rows)
        report_skipped(bad, len(rows), folder / SKIPPED)
        refuse_too_many_bad(len(bad), len(records), config.data, folder / SKIPPED, broken_off=broken_off)
    whole.label(shard, run)  # after it was let go: the first process may take it
    if not run:
        print(f"examined {len(rows) - len(bad)} images, {len(bad)} skipped: {folder} is ready to be merged")


def end_together(team: Team, whole: Whole, asked: str) -> None:
    """The result is there: shards are removed, and whoever waits for it is told."""
    if asked == "merge" or not team.alone:
        remove_shards(whole.out)
    team.end()


def examine(
    records: list[Record],
    rows: range,
    unfinished: Unfinished,
    model: Normalizer,
    calibration: Calibration,
    config: Config,
) -> None:
    """Every record of these rows that is not examined yet: its entry, its map, its figure."""
    settings, fresh, done = config.inference, unfinished.folder, unfinished.done
    places = {record.path: index for index, record in enumerate(records)}
    drawn, times = figures_to_draw(records, settings.figures), magnification_of(config)
    scale, threshold = ColourScale(**calibration.scale), calibration.score_threshold(settings.image_fpr)
    if rows.start == 0 and not any(members.prints for members in model.members):
        warn("these checkpoints are of an earlier version: copies of radiographs that trained are not remarked on")
    begun, total = rows.start + done, len(rows)
    goes_on = f"of {total} images{'' if total == len(records) else ' of this shard'}"
    if done:
        print(f"continuing after {done} of {total} images (--runtime.resume False examines anew)")
        remember(f"the same command goes on after {done} {goes_on}")
    objects = Archive(fresh, calibration, config, records[:begun]) if settings.dicom else None
    errors: list[ImageReadError] = []
    finest = tuple(calibration.file_sizes[1])
    batches = read_batches(records[begun : rows.stop], config.data, settings.batch_size, errors, times, finest)
    steps, next_save, began, waiting = Steps(), SAVE_EVERY, time.perf_counter(), Waiting()
    bad = sum("error" in entry for entry in unfinished.entries)
    progress = bar(total=total, initial=done, desc="phase 4", unit="image")
    most = 2 * settings.batch_size  # of pictures and of arrays that wait to be written: those of a batch
    with progress, Writing(config.data.num_workers, most) as writing:
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
                row = [f"{index:03d}", "", f"{score:.6f}", f"{p_value:.4f}"]  # its name comes last
                row += [int(score > threshold), "" if record.label is None else record.label, record.kind]
                remarks = remarks_on(sample, model, calibration, config) | {"foreign": foreign[position]}
                row.append("; ".join(told for name, told in REMARKS.items() if remarks[name]))
                kept = f"maps/{index:03d}.npy" if settings.save_maps else ""
                entry = {"index": index, "row": row, "score": score, **remarks, "figure": figure, "map": kept}
                entry["shape"] = list(sample.original_shape)
                unfinished.entries.append(entry)
                if record.label is not None:
                    writing.keep(unfinished.keep, index, anomaly_map, sample.mask)
                if kept:
                    writing.keep(save_map, fresh / kept, anomaly_map, sample.original_shape, config)
                if objects:
                    entry["objects"] = objects.write(index, record, anomaly_map, sample.original_shape)
                if settings.report:
                    layers = layers_of(seen, position, anomaly_map, sample, config)
                    entry["report"] = layers.told()
                    writing.draw(save_layers, fresh / FOLDER, index, layers, scale.anomaly_map)
                if figure:
                    title = f"{title_of(index, score, p_value, threshold, record)}  |  method {settings.method}"
                    panels = panels_of(seen, position, anomaly_map)
                    writing.draw(save_result, fresh / figure, *panels, title, scale, sample.mask)
            done = min(total, begun - rows.start + settings.batch_size * (1 + batch[-1][0] // settings.batch_size))
            progress.update(done - progress.n)
            if number >= next_save or steps.asked:
                next_save = number + max(SAVE_EVERY, number // 20)
                writing.finish()  # the note says what is there
                unfinished.save(done)
                remember(f"the same command goes on after {done} {goes_on}")
            if bad > config.data.max_bad_share * len(records):
                break  # refused afterwards: no need to examine the rest first
    print(waiting.told())
    unfinished.entries += [{"index": places[error.path], "error": error.reason} for error in errors]
    unfinished.entries.sort(key=lambda entry: entry["index"])
    if len(unfinished.entries) == total:  # not where it was broken off
        unfinished.save(total)
        remember(f"the same command goes on after {total} {goes_on}")
        fresh_ones, seconds = rows.stop - begun, time.perf_counter() - began
        if fresh_ones:
            print(f"{fresh_ones} images at {fresh_ones / seconds:.2f} a second by this process")


def shaping_results(calibration: Calibration, config: Config) -> dict:
    """Everything beside the files that results follow from."""
    names = ("belongs_to", "pixel_threshold", "scale", "file_sizes", "patients")
    known = {name: getattr(calibration, name) for name in names} | {"scores": calibration.scores.tolist()}
    asked = ("figures", "report", "save_maps", "dicom", "image_fpr", "examine_training_patients", "batch_size")
    settings = {name: getattr(config.inference, name) for name in asked} | {"outlier_std": config.latent.outlier_std}
    made_by = {"recipe": RECIPE, "torch": torch.__version__}
    return {"calibration": known, "settings": settings, "preprocessing": config.data.preprocessing, **made_by}


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


def save_map(path: Path, anomaly_map: np.ndarray, original_shape: tuple[int, int], config: Config) -> None:
    """The map (H, W) as float32 .npy at the size of the original image."""
    full = unfit_map(anomaly_map, original_shape, config.data.fit, magnification_of(config))
    write_binary(path, lambda file: np.save(file, full))


if __name__ == "__main__":
    run_script(main)
