"""Phase 4: what G(x) changed is the anomaly.

Reads   radiographs (data.test, or the test split of data.root), the validation normals of data.root, and the checkpoints of phases 1 and 3
Writes  outputs/phase4_inference/: result_XXX.png, scores.csv, maps/XXX.npy at the size of the original image, calibration.npz,
        metrics.json where labels exist, and lookup_local_only.csv, the one file that says which source each index is

    map = alpha_l1 |x - G(x)| + beta_grad |grad x - grad G(x)| + gamma_hf |Laplacian x - Laplacian G(x)|
    score = mean of the top_share highest values of the map

Thresholds and colour scales come from the validation normals alone: at most target_fpr of them lie above. No score depends on
another test image. Labels are used for metrics.json and nothing else.
Look for: lesions bright and teeth dark in the final map, scores of normals near those of the validation normals.
"""

import csv
import hashlib
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from calibration import Fusion, NormalViews, PixelStatistics, fit_fusion
from command_line import parse_config
from config import Config, UsageError
from corruption import corrupt
from dataset import RadiographDataset
from files import load_checkpoint, sha256, write_atomically, write_csv, write_json
from image_ops import gaussian_blur
from metrics import false_positive_interval, summarize, threshold_from_normals
from normalizer import Examined, Normalizer
from radiographs.geometry import unfit_map
from radiographs.manifest import Record, list_records, split_records
from radiographs.reading import ImageReadError
from reporting.figures import ColourScale, save_result
from runtime import plain, run_script, start


@dataclass(frozen=True)
class Calibration:
    """What the validation normals say: their scores, the thresholds at target_fpr, the ends of the colour bars."""

    scores: np.ndarray
    score_threshold: float
    pixel_threshold: float
    scale: ColourScale
    statistics: PixelStatistics | None  # of the views; None for the plain map
    fusion: Fusion | None  # of the views; None for the plain map
    identity_error: float  # mean |x - G(x)|
    vae_error: float  # mean |x - dec(enc(x))|

    def anomaly_map(self, views: Tensor) -> Tensor:
        """The map (B, 1, H, W) of images with these views, before smoothing."""
        return views if self.statistics is None else self.fusion.anomaly_map(self.statistics.standardize(views))


@dataclass
class Findings:
    """What the loop over the test images collects; maps and masks only of images with a known label."""

    rows: list[list] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    maps: list[np.ndarray | None] = field(default_factory=list)
    masks: list[np.ndarray | None] = field(default_factory=list)
    skipped: list[list[str]] = field(default_factory=list)


def main() -> None:
    config = parse_config(__doc__)
    settings, out = config.inference, Path(config.inference.output)
    vae_checkpoint = load_checkpoint(settings.vae_checkpoint, "vae", "python train_vae.py")
    flow_checkpoint = load_checkpoint(settings.flow_checkpoint, "flowdiff", "python train_flowdiff.py")
    if flow_checkpoint["vae_sha256"] != sha256(settings.vae_checkpoint):
        raise UsageError(
            f"{settings.flow_checkpoint} was trained on latents of another VAE than {settings.vae_checkpoint}: "
            "give the VAE it was trained with, or rerun python extract_latents.py and python train_flowdiff.py"
        )
    splits = split_records(list_records(config.data.root), config.data, config.runtime.seed)
    records = list_records(config.data.test, "data.test") if config.data.test else splits["test"]
    if not records:
        raise UsageError(
            f"{config.data.root} has no test split: name the radiographs to examine with --data.test, a folder or a manifest.csv"
        )
    accelerator = start(config.runtime)
    model = Normalizer(vae_checkpoint, flow_checkpoint, config, accelerator.device)
    clear(out)
    write_json(out / "config.json", plain(config))

    normals = RadiographDataset(splits["val"], config.data)
    calibration = calibrate(model, normals, config)
    save_calibration(out / "calibration.npz", calibration, config)

    dataset = RadiographDataset(records, config.data)
    findings, lookup = Findings(), Pseudonyms(out / "lookup_local_only.csv")
    drawn = figures_to_draw(records, settings.figures)
    with tqdm(total=len(dataset), desc="phase 4", unit="image") as progress:
        for items in read_batches(dataset, config, findings.skipped):
            examined = model.examine(torch.stack([item["image"] for item in items]))
            maps = gaussian_blur(calibration.anomaly_map(examined.views), settings.smooth_sigma)
            scores = image_score(maps, settings.top_share).tolist()
            for position, item in enumerate(items):
                index, record = item["index"], records[item["index"]]
                score, anomaly_map = scores[position], maps[position, 0].cpu().numpy()
                row = [
                    f"{index:03d}",
                    lookup.name(index, record),
                    f"{score:.6f}",
                    int(score > calibration.score_threshold),
                ]
                findings.rows.append([*row, "" if record.label is None else record.label, record.kind])
                keep(findings, record, score, anomaly_map, item)
                if settings.save_maps:
                    save_map(out / "maps" / f"{index:03d}.npy", anomaly_map, item, config)
                if index in drawn:
                    draw(
                        out / f"result_{index:03d}.png",
                        examined,
                        position,
                        anomaly_map,
                        score,
                        item,
                        record,
                        calibration,
                    )
            progress.update(len(items))

    if not findings.rows:
        raise UsageError(
            f"none of the {len(records)} files could be read: {findings.skipped[0][1]}; see the list of formats in the README"
        )
    write_csv(out / "scores.csv", ["index", "name", "score", "flagged", "label", "kind"], findings.rows)
    lookup.save()
    if findings.skipped:
        write_csv(out / "skipped_files.csv", ["file", "reason"], findings.skipped)
    report(findings, calibration, config)


def clear(out: Path) -> None:
    """Remove what an earlier examination left, so that nothing of other images lies beside these scores; the lookup keeps its salt."""
    for pattern in ("result_*.png", "maps/*.npy", "metrics.json", "scores.csv", "skipped_files.csv"):
        for path in out.glob(pattern):
            path.unlink()


def image_score(anomaly_map: Tensor, top_share: float) -> Tensor:
    """Mean of the top_share highest values of each map (B, 1, H, W): (B,). A mean over all pixels would drown a lesion, a maximum is noise."""
    values = anomaly_map.flatten(1)
    return values.topk(max(1, round(top_share * values.shape[1])), dim=1).values.mean(dim=1)


def read_batches(dataset: RadiographDataset, config: Config, skipped: list[list[str]]) -> Iterator[list[dict]]:
    """Batches of items, read by threads one batch at a time; unreadable files go to `skipped` as (file name, reason)."""

    def read(index: int) -> dict | ImageReadError:
        try:
            return dataset[index]
        except ImageReadError as error:
            return error

    with ThreadPoolExecutor(max_workers=max(1, config.data.num_workers)) as pool:
        for first in range(0, len(dataset), config.inference.batch_size):
            items = list(pool.map(read, range(first, min(first + config.inference.batch_size, len(dataset)))))
            skipped += [[item.path.name, item.reason] for item in items if isinstance(item, ImageReadError)]
            good = [item for item in items if not isinstance(item, ImageReadError)]
            if good:
                yield good


def calibrate(model: Normalizer, normals: RadiographDataset, config: Config) -> Calibration:
    """Examine the validation normals and read off them how views become a map, the thresholds and the colour scales."""
    settings = config.inference
    images, views, identity, vae, unreadable = [], [], [], [], []
    ends = {"l1": [], "gradient": []}
    with tqdm(total=len(normals), desc="validation normals", unit="image") as progress:
        for items in read_batches(normals, config, unreadable):
            examined = model.examine(torch.stack([item["image"] for item in items]))
            images += [item["image"][0].numpy() for item in items]
            views.append(examined.views.half().cpu() if settings.method == "calibrated" else examined.views.cpu())
            identity += (examined.x - examined.normal).abs().mean((1, 2, 3)).tolist()
            vae += (examined.x - examined.reconstruction).abs().mean((1, 2, 3)).tolist()
            for name, part in (("l1", examined.l1), ("gradient", examined.gradient)):
                ends[name].append(np.quantile(part.cpu().numpy(), 0.999))
            progress.update(len(items))
    if not views:
        raise UsageError(
            f"no validation normal of {config.data.root} can be read: thresholds need them; point data.root at the normals of phase 1"
        )
    statistics = fusion = None
    maps = torch.cat(views)
    if settings.method == "calibrated":
        if len(images) < 2:
            raise UsageError(
                "inference.method calibrated needs at least two validation normals: add some, or use --inference.method plain"
            )
        normal_views = NormalViews(maps)
        fusion, maps = fit_fusion(normal_views, implanted(model, images, config), config.runtime.seed)
        statistics, fusion = normal_views.statistics().to(model.device), fusion.to(model.device)
    maps = gaussian_blur(maps, settings.smooth_sigma)
    scores = image_score(maps, settings.top_share).numpy()
    # Twice what all but a thousandth of normal pixels reach: normals stay dark, a lesion has room above them.
    l1, gradient = (max(1e-6, 2 * float(np.mean(values))) for values in ends.values())
    scale = ColourScale(
        residual=l1, l1=l1, gradient=gradient, anomaly_map=max(1e-6, 2 * float(np.quantile(maps.numpy(), 0.999)))
    )
    thresholds = [threshold_from_normals(values, settings.target_fpr) for values in (scores, maps.numpy().ravel())]
    return Calibration(scores, *thresholds, scale, statistics, fusion, float(np.mean(identity)), float(np.mean(vae)))


def implanted(model: Normalizer, images: list[np.ndarray], config: Config) -> Iterator[tuple[int, Tensor, np.ndarray]]:
    """Corrupted copies of the validation normals (H, W): index of the normal, views (1, V, H, W), changed pixels (H, W), for `fit_fusion`."""
    count, size = config.inference.implants, config.inference.batch_size
    with tqdm(total=count, desc="corrupted normals", unit="image") as progress:
        for first in range(0, count, size):
            origins, corrupted, changed = [], [], []
            for number in range(first, min(first + size, count)):
                random = np.random.default_rng((config.runtime.seed, number))
                origins.append(number % len(images))
                image, where = corrupt(images[origins[-1]], images[random.integers(len(images))], random)
                corrupted.append(torch.from_numpy(image))
                changed.append(where)
            views = model.examine(torch.stack(corrupted).unsqueeze(1)).views.cpu()
            yield from zip(origins, views.split(1), changed, strict=True)
            progress.update(len(origins))


def save_calibration(path: Path, calibration: Calibration, config: Config) -> None:
    """The calibration as arrays, with the hashes of what it belongs to."""
    content = {
        "scores": calibration.scores,
        "score_threshold": calibration.score_threshold,
        "pixel_threshold": calibration.pixel_threshold,
    }
    content |= {f"scale_{name}": value for name, value in vars(calibration.scale).items()}
    content |= {"identity_error": calibration.identity_error, "vae_error": calibration.vae_error}
    if calibration.statistics is not None:
        content |= {
            "pixel_mean": calibration.statistics.mean.cpu().numpy(),
            "pixel_std": calibration.statistics.std.cpu().numpy(),
        }
        content |= {"fusion_weights": calibration.fusion.weights.cpu().numpy(), "fusion_bias": calibration.fusion.bias}
    content |= {
        "vae_sha256": sha256(config.inference.vae_checkpoint),
        "flow_sha256": sha256(config.inference.flow_checkpoint),
    }

    def write(beside: Path) -> None:
        with open(beside, "wb") as file:
            np.savez(file, **content)

    write_atomically(path, write)


class Pseudonyms:
    """Names for scores.csv that say nothing of the patient: a hash of the source path under a secret salt of this output folder."""

    def __init__(self, path: Path):
        self.path, self.salt, self.rows = path, secrets.token_hex(16), []
        if path.is_file():
            with open(path, newline="") as file:
                self.salt = next(iter(csv.DictReader(file)), {}).get("salt") or self.salt  # the same names as last time

    def name(self, index: int, record: Record) -> str:
        name = "image-" + hashlib.sha256(f"{self.salt}{record.path.resolve()}".encode()).hexdigest()[:10]
        self.rows.append([f"{index:03d}", name, str(record.path), self.salt])
        return name

    def save(self) -> None:
        write_csv(self.path, ["index", "name", "source", "salt"], self.rows)


def figures_to_draw(records: list[Record], count: int) -> set[int]:
    """Which images get a figure: all, or `count` spread evenly over the kinds."""
    if count < 0 or count >= len(records):
        return set(range(len(records)))
    by_kind: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        by_kind.setdefault(record.kind, []).append(index)
    turns = sorted((place, index) for indices in by_kind.values() for place, index in enumerate(indices))
    return {index for _, index in turns[:count]}


def keep(findings: Findings, record: Record, score: float, anomaly_map: np.ndarray, item: dict) -> None:
    """Remember what the metrics need of a labelled image."""
    if record.label is not None:
        findings.records.append(record)
        findings.scores.append(score)
        findings.maps.append(anomaly_map)
        findings.masks.append(item["mask"][0].numpy().astype(bool) if item["has_mask"] else None)


def save_map(path: Path, anomaly_map: np.ndarray, item: dict, config: Config) -> None:
    """The map (H, W) as float32 .npy at the size of the original image."""
    full = unfit_map(anomaly_map, (item["original_height"], item["original_width"]), config.data.fit)

    def write(beside: Path) -> None:
        with open(beside, "wb") as file:
            np.save(file, full)

    write_atomically(path, write)


def draw(
    path: Path,
    examined: Examined,
    position: int,
    anomaly_map: np.ndarray,
    score: float,
    item: dict,
    record: Record,
    calibration: Calibration,
) -> None:
    """result_XXX.png: six panels, the score in the title, the outline where there is a mask."""
    verdict = "flagged" if score > calibration.score_threshold else "not flagged"
    title = f"image {item['index']:03d}  |  score {score:.4f}, threshold {calibration.score_threshold:.4f}: {verdict}"
    if record.kind:
        title += f"  |  {record.kind}"
    panels = (examined.x, examined.normal, examined.l1, examined.gradient)
    mask = item["mask"][0].numpy().astype(bool) if item["has_mask"] else None
    save_result(
        path, *(panel[position, 0].cpu().numpy() for panel in panels), anomaly_map, title, calibration.scale, mask
    )


def report(findings: Findings, calibration: Calibration, config: Config) -> None:
    """The one-screen summary, and metrics.json where labels exist."""
    out, fpr, normals = Path(config.inference.output), config.inference.target_fpr, len(calibration.scores)
    low, high = false_positive_interval(normals, fpr)
    flagged = sum(row[3] for row in findings.rows)
    print(
        f"\n{len(findings.rows)} images examined, {len(findings.skipped)} skipped, {flagged} flagged at score > {calibration.score_threshold:.4f}"
    )
    print(
        f"threshold from {normals} validation normals at a false-positive rate of {fpr:.0%}: on new normals expect {low:.1%} to {high:.1%} (95 % interval)"
    )
    ratio = calibration.identity_error / calibration.vae_error
    print(
        f"validation normals: |x - G(x)| {calibration.identity_error:.4f}, |x - dec(enc(x))| {calibration.vae_error:.4f} (x{ratio:.2f})"
    )
    labels = [record.label for record in findings.records]
    if len(set(labels)) == 2:
        kinds, patients = [record.kind for record in findings.records], [record.patient for record in findings.records]
        metrics = summarize(
            findings.scores, labels, kinds, findings.maps, findings.masks, calibration.pixel_threshold, patients
        )
        metrics["validation_normals"] = {
            "images": normals,
            "identity_error": calibration.identity_error,
            "vae_error": calibration.vae_error,
        }
        write_json(out / "metrics.json", metrics)
        print_table(metrics)
    else:
        print("no metrics: they need images labelled 0 and 1 in a manifest")
    print(
        f"wrote {out}: scores.csv"
        + (", result_XXX.png" if config.inference.figures else "")
        + (", maps/" if config.inference.save_maps else "")
    )


def print_table(metrics: dict) -> None:
    """Metrics per kind, as people read them."""
    columns = ("auroc", "ap", "pixel_ap", "aupro", "dice", "best_dice")
    print(f"\n{'kind':16s}{'images':>8s}" + "".join(f"{name:>11s}" for name in columns))
    entries = [
        *metrics["kinds"].items(),
        ("all kinds", metrics["overall"]),
        ("mean of kinds", metrics["mean_over_kinds"]),
    ]
    for kind, entry in entries:
        values = ("" if entry[name] is None else f"{entry[name]:.3f}" for name in columns)
        print(f"{kind:16s}{entry.get('abnormal_images', ''):>8}" + "".join(f"{value or '-':>11s}" for value in values))
    print()


if __name__ == "__main__":
    run_script(main)
