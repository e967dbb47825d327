"""Phase 2: encode every normal radiograph, z = mean of the posterior.

Reads   the normal radiographs of data.root and outputs/phase1_vae/checkpoint_best.pt
Writes  outputs/phase2_latents/: latents_{train,val}.npy, float32 (N, 4, h, w), raw; latents_{train,val}.pkl with the source
        path of every row, for people; latents.json with the per-channel mean and std that standardize the latents

Training images can be encoded several times under augmentation (latent.augmented_copies): the UNet of phase 3 sees only latents.
Look for: standardized mean near 0 and std near 1 on the validation rows too, and a short list of outliers.
"""

import pickle
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from command_line import parse_config
from config import Config, UsageError
from dataset import RadiographDataset, open_datasets
from files import load_checkpoint, sha256, write_atomically, write_json
from model import RadiographVAE, rebuild_vae
from radiographs.manifest import list_records, split_records
from runtime import plain, run_script, start


def main() -> None:
    config = parse_config(__doc__)
    settings, seed, out = config.latent, config.runtime.seed, Path(config.latent.output)
    checkpoint = load_checkpoint(settings.vae_checkpoint, "vae", "python train_vae.py")
    accelerator = start(config.runtime)
    if accelerator.num_processes > 1:
        raise UsageError("phase 2 runs in one process: start it with python, not torchrun")
    vae = rebuild_vae(checkpoint).to(accelerator.device)
    for name in ("height", "width", "fit", "percentile_low", "percentile_high"):
        trained, now = checkpoint["config"]["data"][name], getattr(config.data, name)
        if trained != now:
            print(f"note: the VAE was trained with data.{name} = {trained}, these latents are made with {now}")

    splits = split_records(list_records(config.data.root), config.data, seed)
    normals = {name: splits[name] for name in ("train", "val")}
    datasets, latents, sources = open_datasets(normals, config.data, seed, out / "skipped_files.csv"), {}, {}
    for split, copies in (("train", settings.augmented_copies), ("val", 0)):
        dataset = datasets[split]
        path = out / f"latents_{split}.npy"
        write_atomically(
            path, lambda beside, d=dataset, s=split, c=copies: encode(vae, d, c, beside, config, accelerator.device, s)
        )
        latents[split] = np.load(path, mmap_mode="r")
        sources[split] = [str(record.path) for record in dataset.records] * (1 + copies)
        write_atomically(
            out / f"latents_{split}.pkl", lambda beside, rows=sources[split]: beside.write_bytes(pickle.dumps(rows))
        )

    mean, std = channel_statistics(latents["train"])
    outliers = find_outliers(latents, sources, settings.outlier_std)
    write_json(
        out / "latents.json",
        {
            "format": 1,
            "vae_sha256": sha256(settings.vae_checkpoint),
            "shape": list(latents["train"].shape[1:]),
            "rows": {split: len(rows) for split, rows in latents.items()},
            "images": {"train": len(latents["train"]) // (1 + settings.augmented_copies), "val": len(latents["val"])},
            "mean": mean.tolist(),
            "std": std.tolist(),
            "outliers": outliers,
            "sources": sources,
            "config": {"data": plain(config.data), "latent": plain(settings), "seed": seed},
        },
    )
    summarize(latents, mean, std, outliers, out)


@torch.no_grad()
def encode(
    vae: RadiographVAE,
    dataset: RadiographDataset,
    copies: int,
    path: Path,
    config: Config,
    device: torch.device,
    split: str,
) -> None:
    """Write the latents of every image, plain rows first, then each augmented copy, straight into the file: memory stays constant.

    Copy 0 is the image as it is; the epoch number of an augmented image is its copy number.
    """
    height, width = config.data.height // 8, config.data.width // 8
    shape = (len(dataset) * (1 + copies), vae.latent_channels, height, width)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        with tqdm(total=shape[0], desc=f"phase 2, {split}", unit="latent") as progress:
            for copy in range(1 + copies):
                keys = [(copy, index) for index in range(len(dataset))]
                images = dataset.augmented() if copy else dataset
                for batch in DataLoader(
                    images, batch_size=config.latent.batch_size, sampler=keys, num_workers=config.data.num_workers
                ):
                    mean, _ = vae.encode(batch["image"].to(device))
                    file.write(mean.float().cpu().numpy().astype("<f4").tobytes())
                    progress.update(len(mean))


def channel_statistics(latents: np.ndarray, rows_at_once: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (C,) over rows, height and width of (N, C, h, w), in float64 and a part at a time."""
    count, total, squares = 0, 0.0, 0.0
    for first in range(0, len(latents), rows_at_once):
        part = np.asarray(latents[first : first + rows_at_once], dtype=np.float64)
        count += part[:, 0].size
        total = total + part.sum(axis=(0, 2, 3))
        squares = squares + (part**2).sum(axis=(0, 2, 3))
    mean = total / count
    return mean, np.sqrt(squares / count - mean**2)


def find_outliers(latents: dict[str, np.ndarray], sources: dict[str, list[str]], limit: float) -> list[dict]:
    """Rows whose per-channel mean or spread lies more than `limit` robust standard deviations from the median of the training rows.

    Raises UsageError if a latent is not finite: training on it would destroy the network.
    """
    features = {
        split: np.stack([np.r_[row.mean((1, 2)), row.std((1, 2))] for row in rows]) for split, rows in latents.items()
    }
    for split, values in features.items():
        bad = sorted({Path(sources[split][row]).name for row in np.flatnonzero(~np.isfinite(values).all(1))})
        if bad:
            raise UsageError(
                f"the latents of {', '.join(bad[:5])} ({len(bad)} files) are not finite: look at these files, or train phase 1 again"
            )
    median = np.median(features["train"], axis=0)
    spread = (
        1.4826 * np.median(np.abs(features["train"] - median), axis=0) + 1e-6
    )  # 1.4826 MAD estimates a normal's standard deviation
    found = []
    for split, values in features.items():
        distance = (np.abs(values - median) / spread).max(axis=1)
        found += [
            {"split": split, "row": int(row), "source": sources[split][row], "deviations": float(distance[row])}
            for row in np.flatnonzero(distance > limit)
        ]
    return found


def summarize(
    latents: dict[str, np.ndarray], mean: np.ndarray, std: np.ndarray, outliers: list[dict], out: Path
) -> None:
    """What a person checks before phase 3."""
    for split, rows in latents.items():
        split_mean, split_std = channel_statistics(rows)
        print(
            f"{split}: {rows.shape[0]} latents of {' x '.join(map(str, rows.shape[1:]))}, raw mean {_list(split_mean)}, raw std {_list(split_std)}"
        )
        print(f"  standardized: mean {_list((split_mean - mean) / std)}, std {_list(split_std / std)}")
    names = sorted({Path(outlier["source"]).name for outlier in outliers})
    if names:
        print(
            f"{len(names)} file(s) lie far out, look at them (rows in latents.json): {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}"
        )
    print(f"wrote {out}\nnext: python train_flowdiff.py")


def _list(values: np.ndarray) -> str:
    return "[" + ", ".join(f"{value:+.3f}" for value in values) + "]"


if __name__ == "__main__":
    run_script(main)
