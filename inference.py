"""Phase 4: what G(x) changed is the anomaly.

Reads   radiographs (data.test, or the test split of data.root) and the checkpoints of phases 1 and 3; where
        outputs/calibration/ has nothing that belongs to them, also the training and validation normals of data.root

Writes  outputs/phase4_inference/: result_XXX.png, scores.csv, maps/XXX.npy at the size of the original image,
        metrics.json where labels exist, lookup_local_only.csv, the one file that says which source each index is, and
        skipped_files.csv with the names of files that could not be read

        outputs/calibration/: reader.pt and corruptions.png, METHOD.npz and .json, what normals say; made once, read by
        every later examination

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


import os
import shutil
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from calibration import Calibration, magnification_of
from checks import UsageError
from command_line import parse_command
from config import Config
from dataset import Sample, read_batches, refuse_too_many_bad, report_skipped
from examination import calibration_of, open_normalizer, records_to_examine, refuse_known_content
from files import write_binary, write_csv, write_json
from holding import hold
from image_ops import residual_components
from metrics import false_positive_interval, summarize
from normalizer import Examined
from radiographs.geometry import unfit_map
from radiographs.manifest import Record
from reporting.figures import ColourScale, save_result
from reporting.lookup import Pseudonyms
from reporting.summary import metrics_table
from runtime import plain, run_script

UNFINISHED = ".unfinished_phase4"  # where results lie until all of them are there
RESULTS = ("result_*.png", "maps/*.npy", "metrics.json", "scores.csv")


@dataclass
class Findings:
    """What the loop over the images collects; maps and masks only of images with a known label."""

    rows: list[list] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    maps: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray | None] = field(default_factory=list)
    coarser: int = 0  # files that show less than those of the validation normals
    best: tuple[float, str] = (-inf, "")  # the highest score, and the figure that shows it


def main() -> None:
    """Phase 4, from the command line."""
    model, config = open_normalizer(parse_command(__doc__))
    settings = config.inference
    records = records_to_examine(model, config)
    out = Path(settings.output)
    refuse_to_write_among(records, out)
    held = hold(out, "results")
    calibration = calibration_of(model, config)

    fresh = begin(out, config)
    names, findings, errors = Pseudonyms(out), Findings(), []
    threshold, scale = calibration.score_threshold(settings.image_fpr), ColourScale(**calibration.scale)
    drawn, times = figures_to_draw(records, settings.figures), magnification_of(config)
    finest = tuple(calibration.file_sizes[1])
    with tqdm(total=len(records), desc="phase 4", unit="image") as progress:
        for batch in read_batches(records, config.data, settings.batch_size, errors, times, finest):
            images = torch.stack([torch.from_numpy(sample.image) for _, sample in batch]).unsqueeze(1)
            seen = model.examine(images, times)
            maps = calibration.anomaly_map(seen, config)
            scores = calibration.scores_of(seen, maps, config).tolist()
            for position, (index, sample) in enumerate(batch):
                refuse_known_content(model, sample, index, config)
                record, score, anomaly_map = records[index], scores[position], maps[position, 0].cpu().numpy()
                p_value = calibration.p_value(score)
                row = [f"{index:03d}", names.name(index, record.path), f"{score:.6f}", f"{p_value:.4f}"]
                label = "" if record.label is None else record.label
                findings.rows.append([*row, int(score > threshold), label, record.kind])
                keep(findings, record, score, anomaly_map, sample)
                findings.coarser += calibration.coarser(sample.original_shape, config)
                if settings.save_maps:
                    save_map(fresh / "maps" / f"{index:03d}.npy", anomaly_map, sample, config)
                if index in drawn:
                    figure = f"result_{index:03d}.png"
                    title = f"{title_of(index, score, p_value, threshold, record)}  |  method {settings.method}"
                    draw(fresh / figure, seen, position, anomaly_map, title, scale, sample.mask)
                    findings.best = max(findings.best, (score, figure))
            progress.update(len(batch))
            if len(errors) > config.data.max_bad_share * len(records):
                break  # refused below: no need to examine the rest first

    skipped = out / "skipped_files.csv"
    report_skipped(errors, len(records), skipped)
    refuse_too_many_bad(len(errors), len(records), config.data, skipped, emptied=not findings.rows)
    columns = ["index", "name", "score", "p_value", "flagged", "label", "kind"]
    write_csv(fresh / "scores.csv", columns, findings.rows)
    names.save(fresh)
    metrics = measure(findings, calibration)
    if metrics:
        write_json(fresh / "metrics.json", metrics)
    publish(fresh, out)
    held.close()
    report(findings, len(errors), calibration, metrics, config)


# ---------------------------------------------------------------- results


def refuse_to_write_among(records: list[Record], out: Path) -> None:
    """UsageError if radiographs lie where results go: a new examination removes old results by their names."""
    if any(out.resolve() in record.path.resolve().parents for record in records):
        raise UsageError(f"{out} holds radiographs to examine: choose another --inference.output for the results")


def begin(out: Path, config: Config) -> Path:
    """An empty folder for the new results; earlier ones stay until these are complete."""
    fresh = out / UNFINISHED
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    write_json(fresh / "config.json", plain(config))
    return fresh


def publish(fresh: Path, out: Path) -> None:
    """Put the new results in place, file by file, then remove what an earlier examination left."""
    new = {path.relative_to(fresh) for path in fresh.rglob("*") if path.is_file()}
    for path in sorted(new):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(fresh / path, out / path)
    shutil.rmtree(fresh)
    for pattern in RESULTS:
        for path in out.glob(pattern):
            if path.relative_to(out) not in new:
                path.unlink()


def figures_to_draw(records: list[Record], count: int) -> set[int]:
    """Which images get a figure: all, or `count` spread evenly over the kinds."""
    if count < 0 or count >= len(records):
        return set(range(len(records)))
    by_kind: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        by_kind.setdefault(record.kind, []).append(index)
    turns = sorted((place, index) for indices in by_kind.values() for place, index in enumerate(indices))
    return {index for _, index in turns[:count]}


def keep(findings: Findings, record: Record, score: float, anomaly_map: np.ndarray, sample: Sample) -> None:
    """Remember what the metrics need of a labelled image."""
    if record.label is not None:
        findings.records.append(record)
        findings.scores.append(score)
        findings.maps.append(anomaly_map)
        findings.masks.append(sample.mask)


def save_map(path: Path, anomaly_map: np.ndarray, sample: Sample, config: Config) -> None:
    """The map (H, W) as float32 .npy at the size of the original image."""
    full = unfit_map(anomaly_map, sample.original_shape, config.data.fit, magnification_of(config))
    write_binary(path, lambda file: np.save(file, full))


def title_of(index: int, score: float, p_value: float, threshold: float, record: Record) -> str:
    """The line above a figure."""
    verdict = "flagged" if score > threshold else "not flagged"
    title = f"image {index:03d}  |  score {score:.4f}, threshold {threshold:.4f}, p {p_value:.3f}: {verdict}"
    return f"{title}  |  {record.kind}" if record.kind else title


def draw(
    path: Path,
    seen: Examined,
    position: int,
    anomaly_map: np.ndarray,
    title: str,
    scale: ColourScale,
    mask: np.ndarray | None,
) -> None:
    """result_XXX.png: six panels, the score in the title, the outline where there is a mask."""
    l1, gradient, _ = residual_components(seen.x, seen.normal)
    size = anomaly_map.shape
    larger = [F.interpolate(panel[position : position + 1], size=size) for panel in (seen.normal, l1, gradient)]
    panels = (panel[0, 0].cpu().numpy() for panel in (seen.detail[position : position + 1], *larger))
    save_result(path, *panels, anomaly_map, title, scale, mask)


def measure(findings: Findings, calibration: Calibration) -> dict | None:
    """Everything for metrics.json; None unless there are labels of both kinds."""
    labels = [record.label for record in findings.records]
    if len(set(labels)) < 2:
        return None
    kinds = [record.kind for record in findings.records]
    patients = [record.patient for record in findings.records]
    threshold = calibration.pixel_threshold
    metrics = summarize(findings.scores, labels, kinds, findings.maps, findings.masks, threshold, patients)
    errors = {"identity_error": calibration.identity_error, "vae_error": calibration.vae_error}
    metrics["validation_normals"] = {"images": len(calibration.scores), **errors}
    return metrics


def report(findings: Findings, skipped: int, calibration: Calibration, metrics: dict | None, config: Config) -> None:
    """The last words of phase 4: how many were flagged, how sure that is, where to look."""
    settings, out, normals = config.inference, Path(config.inference.output), len(calibration.scores)
    threshold = calibration.score_threshold(settings.image_fpr)
    low, high = false_positive_interval(normals, settings.image_fpr)
    flagged = sum(row[4] for row in findings.rows)
    print(f"\n{len(findings.rows)} images examined, {skipped} skipped, {flagged} flagged at score > {threshold:.4f}")
    if findings.coarser:
        print(
            f"{findings.coarser} of {len(findings.rows)} files have fewer pixels than any validation normal: "
            "thresholds and p-values do not hold for them"
        )
    print(
        f"threshold from {normals} validation normals at a false-positive rate of {settings.image_fpr:.0%}: on new "
        f"normals expect {low:.1%} to {high:.1%} (95 % interval), or somewhat more, since the same normals chose the "
        "checkpoints"
    )
    print(
        f"map threshold {calibration.pixel_threshold:.4f}: {settings.pixel_fpr:.2%} of the pixels of normals lie above"
    )
    identity, vae = calibration.identity_error, calibration.vae_error
    print(
        f"validation normals: |x - G(x)| {identity:.4f}, |x - dec(enc(x))| {vae:.4f} (x{identity / max(vae, 1e-9):.2f})"
    )
    print(f"\n{metrics_table(metrics)}\n" if metrics else "no metrics: they need images labelled 0 and 1 in a manifest")
    written = [
        "scores.csv",
        *(["maps/"] if settings.save_maps else []),
        *(["result_XXX.png"] if settings.figures else []),
    ]
    print(f"wrote {out}: {', '.join(written)}")
    if findings.best[1]:
        print(f"look at {out / findings.best[1]}: the highest score of those drawn")


if __name__ == "__main__":
    run_script(main)
