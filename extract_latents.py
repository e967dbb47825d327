"""Phase 2: encode every normal radiograph, z = mean of the posterior.

Reads   the normal radiographs of data.root and outputs/phase1_vae/checkpoint_best.pt, which says how a file becomes x
        and who validates; a radiograph that trained the VAE is no validation radiograph here either

Writes  outputs/phase2_latents/: latents_{train,val}.npy, float32 (N, C, h, w), raw; latents_{train,val}.pkl with the
        source path of every row, for people, and for the owner of the file alone; latents.json with the mean and std
        per channel that standardize them; skipped_local_only.csv and twins_local_only.csv, as phase 1

        outputs/cache/: radiographs as they were decoded, where phase 1 has not left them

Training images can be encoded several times under augmentation (latent.augmented_copies): the UNet of phase 3 sees only
latents.
Under torchrun each process encodes a share, and the first makes the files, to the byte those of a single process.
What a folder holds already of the same VAE, radiographs and settings is not made again, and a run that was interrupted
goes on where it was.
Look for: standardized mean near 0 and std near 1 on the validation rows too, and a short list of outliers.
"""

if __name__ == "__main__":
    import interruption

    interruption.begin()  # first: a signal may come during the imports below, too


import pickle
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from augmentation import images_of, on_device, shaping
from checks import UsageError
from command_line import parse_command
from config import VAE_DOWNSAMPLING, Config, LatentConfig
from dataset import RadiographDataset, open_normals
from files import RunIdentity, load_checkpoint, sha256, write_atomically, write_sealed_json
from growing import GrowingArray, finished_rows
from holding import hold
from interruption import Steps, ignore_signals, remember
from latent_dataset import FORMAT, read_latents_json
from model import RadiographVAE, rebuild_vae
from progress import bar
from radiographs.membership import Membership
from runtime import plain, run_script, shareable, start, without
from shards import PURPOSE, Shard, Team, label, label_of, remove_shards, wait_for
from typical import Typical, summary_of
from waiting import Waiting

SAVE_EVERY = 20  # batches
RECIPE = 1  # raise it when code changes what the latents of the same files and settings are


def main() -> None:
    """Phase 2, from the command line."""
    command = parse_command(__doc__)
    settings, out = command.config.latent, Path(command.config.latent.output)
    checkpoint = load_checkpoint(settings.vae_checkpoint, "vae", "python train_vae.py")
    vae_sha256 = sha256(settings.vae_checkpoint)
    config = command.adopt({**checkpoint, "unet": checkpoint["config"]["unet"]}, settings.vae_checkpoint)
    accelerator = start(config.runtime)
    team = Team(out)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, on a GPU too
    vae = rebuild_vae(checkpoint).to(accelerator.device)

    held = hold(out, "latents") if team.leads else None
    datasets = open_normals(config.data, config.runtime.seed, out / "skipped_local_only.csv", quiet=not team.leads)
    rows = {"train": list(range(len(datasets["train"]))), "val": unseen_rows(datasets["val"], checkpoint, settings)}

    made_of = made_from(config, datasets, rows, vae_sha256, accelerator.device)
    encoder = Encoder(vae, datasets, made_of, config, accelerator.device, Waiting())
    if not team.leads:
        if team.may_begin():
            encode_shard(encoder, keys_of(rows, settings), team, out)
        team.end()
        return
    if config.runtime.resume and is_finished(out, made_of):
        for split, keys in keys_of(rows, settings).items():  # the files may lie elsewhere by now
            write_sources(out, split, datasets[split], keys)
        remove_shards(out)
        team.end()
        print(f"{out} holds these latents already (--runtime.resume False makes them anew)")
        print(f"next: {command.next('train_flowdiff.py')}")
        return

    # From here until it is written again nothing that lies in the folder may pass for finished.
    (out / "latents.json").unlink(missing_ok=True)
    team.begin()
    if not team.alone:
        encode_shard(encoder, keys_of(rows, settings), team, out)
    latents: dict[str, np.ndarray] = {}
    written: list[GrowingArray] = []
    for split, keys in keys_of(rows, settings).items():
        path = out / f"latents_{split}.npy"
        written.append(encode_to_file(encoder, split, keys, path) if team.alone else join(encoder, keys, team, path))
        latents[split] = np.load(path, mmap_mode="r", allow_pickle=False)
        write_sources(out, split, datasets[split], keys)

    mean, std = channel_statistics(latents["train"])
    outliers = find_outliers(latents, settings.outlier_std)
    description = {
        "format": FORMAT,
        "vae_sha256": vae_sha256,
        "made_from": made_of,
        "sha256": {split: sha256(out / f"latents_{split}.npy") for split in latents},
        "shape": list(latents["train"].shape[1:]),
        "rows": {split: len(part) for split, part in latents.items()},
        "images": {split: len(part) for split, part in rows.items()},
        "mean": mean.tolist(),
        "std": std.tolist(),
        "preprocessing": config.data.preprocessing,
        "split": config.data.split,
        "members": members_of(datasets, rows),
        "outliers": outliers,
        "config": shareable(config),
    }
    write_sealed_json(out / "latents.json", description)
    for array in written:
        array.forget()
    remove_shards(out)
    team.end()
    summarize(latents, mean, std, outliers)
    held.close()
    print(encoder.waiting.told())
    print(f"wrote {out}\nnext: {command.next('train_flowdiff.py')}")


def keys_of(rows: dict[str, list[int]], settings: LatentConfig) -> dict[str, list[tuple[int, int]]]:
    """By split the (copy, row) of every latent, in their order."""
    copies = {"train": settings.augmented_copies, "val": 0}
    return {name: [(copy, row) for copy in range(1 + copies[name]) for row in rows[name]] for name in copies}


def write_sources(out: Path, split: str, dataset: RadiographDataset, keys: list[tuple[int, int]]) -> None:
    """latents_SPLIT.pkl: the source of every row, for people."""
    pickled = pickle.dumps([str(dataset.records[row].path) for _, row in keys])
    write_atomically(out / f"latents_{split}.pkl", partial(Path.write_bytes, data=pickled), private=True)


def made_from(
    config: Config, datasets: dict[str, RadiographDataset], rows: dict, vae_sha256: str, device: torch.device
) -> dict:
    """Everything that the latents follow from, as JSON has it: the same again gives the same latents."""
    return {
        "vae_sha256": vae_sha256,
        "recipe": RECIPE,
        "radiographs": {split: dataset.digest for split, dataset in datasets.items()},
        "patients": {split: dataset.patients_digest for split, dataset in datasets.items()},
        "rows": rows,
        "data": shaping(config.data, device),
        "latent": without(plain(config.latent), "vae_checkpoint", "batch_size", "output"),
        "seed": config.runtime.seed,
    }


def is_finished(out: Path, made_of: dict) -> bool:
    """Whether the folder holds the latents of just that, whole; it says what they differ in if they are of another."""
    if not (out / "latents.json").is_file():
        return False
    try:
        description = read_latents_json(out)
        whole = all(sha256(out / f"latents_{split}.npy") == known for split, known in description["sha256"].items())
    except (UsageError, OSError):
        return False
    stored = {"settings": description.get("made_from") or {}, "inputs": {}}
    changed = sorted(RunIdentity(made_of, {}, ()).changes_since(stored))
    if changed:
        print(f"the latents in {out} differ in {', '.join(changed)}: they are made anew")
    return whole and not changed


def unseen_rows(dataset: RadiographDataset, checkpoint: dict, settings: LatentConfig) -> list[int]:
    """The validation radiographs whose patient and content did not train the VAE; UsageError if there is none."""
    members = Membership.from_plain(checkpoint["members"])
    known = zip(dataset.records, dataset.digests, strict=True)
    rows = [row for row, (record, digest) in enumerate(known) if not members.trained(record.patient, digest)]
    seen = len(dataset) - len(rows)
    if not rows:
        raise UsageError(
            f"all {seen} validation radiographs trained the VAE of {settings.vae_checkpoint}: "
            "run python train_vae.py again on today's data"
        )
    if seen:
        print(
            f"left out of validation: {seen} of {len(dataset)} radiographs, for they, or others of their patient, "
            "trained the VAE"
        )
    return rows


def members_of(datasets: dict[str, RadiographDataset], rows: dict[str, list[int]]) -> dict:
    """Who trains and who validates in phase 3, as latents.json keeps it."""
    patients = {name: [datasets[name].records[row].patient for row in part] for name, part in rows.items()}
    digests = {name: [datasets[name].digests[row] for row in part] for name, part in rows.items()}
    prints = [datasets[name].prints[row] for name, part in rows.items() for row in part]
    return Membership.of(patients, digests, prints).plain()


class Encoder(NamedTuple):
    """What latents are made with."""

    vae: RadiographVAE
    datasets: dict[str, RadiographDataset]
    made_of: dict
    config: Config
    device: torch.device
    waiting: Waiting

    def file_of(self, keys: list[tuple[int, int]]) -> tuple[tuple[int, ...], dict]:
        """Of the .npy of these keys, the shape and everything that it follows from."""
        config = self.config
        grid = config.data.height // VAE_DOWNSAMPLING, config.data.width // VAE_DOWNSAMPLING
        more = {"keys": keys, "batch_size": config.latent.batch_size, "device": self.device.type}
        return (len(keys), self.vae.latent_channels, *grid), {**self.made_of, **more}


def encode_to_file(encoder: Encoder, split: str, keys: list[tuple[int, int]], path: Path) -> GrowingArray:
    """The latents of (copy, row) keys as .npy, whole or not at all, written batch by batch: memory stays constant.

    Copy 0 is the image as it is; the epoch number of an augmented image is its copy number. A run that was interrupted
    goes on between two batches, so that the bytes are those of one that was not.
    """
    dataset, config, size = encoder.datasets[split], encoder.config, encoder.config.latent.batch_size
    array = GrowingArray(path, *encoder.file_of(keys), config.runtime.resume)
    if array.rows:
        print(f"{path.name}: {array.rows} of {len(keys)} latents are there already")
    plain_keys = [key for key in keys if key[0] == 0]
    augmented = dataset.augmented(on_device(config.data, encoder.device))
    parts = [(dataset, plain_keys), (augmented, keys[len(plain_keys) :])]
    steps, done = Steps(), array.rows
    with torch.no_grad(), bar(total=len(keys), initial=done, desc=f"phase 2, {path.name}", unit="latent") as progress:
        for images, wanted in parts:
            left, done = wanted[done:], max(0, done - len(wanted))
            workers = config.data.num_workers if left else 0
            loader = DataLoader(images, size, sampler=left, num_workers=workers, worker_init_fn=ignore_signals)
            for number, batch in enumerate(steps.of(encoder.waiting.of(loader)), 1):
                mean, _ = encoder.vae.encode(images_of(batch, encoder.device))
                array.append(mean.float().cpu().numpy())
                progress.update(len(mean))
                if number % SAVE_EVERY == 0 or steps.asked:
                    array.save()
                    remember(f"the same command goes on after {array.rows} of {len(keys)} latents of {path.name}")
    array.finish()
    return array


# ---------------------------------------------------------------- several processes


def keys_of_shard(keys: list[tuple[int, int]], shard: Shard, size: int) -> list[tuple[int, int]]:
    """The keys that one of several processes encodes: whole batches, cut as `encode_to_file` cuts all of them."""
    plain_keys = sum(copy == 0 for copy, _ in keys)
    starts = [*range(0, plain_keys, size), *range(plain_keys, len(keys), size), len(keys)]
    own = shard.cut(len(starts) - 1)
    return keys[starts[own.start] : starts[own.stop]]


def encode_shard(encoder: Encoder, keys: dict[str, list[tuple[int, int]]], team: Team, out: Path) -> None:
    """What this process encodes of every split, in a folder of its own."""
    folder, size = out / team.shard.name, encoder.config.latent.batch_size
    with hold(folder, PURPOSE):
        for split, everyone in keys.items():
            encode_to_file(encoder, split, keys_of_shard(everyone, team.shard, size), folder / f"latents_{split}.npy")
    label(folder, {}, team.run)


def join(encoder: Encoder, keys: list[tuple[int, int]], team: Team, path: Path) -> GrowingArray:
    """The latents of all processes, each when they are there, as one .npy: that of a single process."""
    array, begun = GrowingArray(path, *encoder.file_of(keys), encoder.config.runtime.resume), 0
    for shard in team.shard.everyone:
        folder, own = path.parent / shard.name, keys_of_shard(keys, shard, encoder.config.latent.batch_size)
        wait_for(lambda folder=folder: label_of(folder)["run"] == team.run or None)
        rows = finished_rows(folder / path.name, *encoder.file_of(own))
        if rows is None:
            raise UsageError(f"{folder} changed while it was read: give the same command again")
        for first in range(max(0, array.rows - begun), len(own), SAVE_EVERY):
            array.append(np.array(rows[first : first + SAVE_EVERY]))
        begun += len(own)
    array.finish()
    return array


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


def find_outliers(latents: dict[str, np.ndarray], limit: float) -> list[dict]:
    """Rows whose mean or spread in a channel lies more than `limit` robust deviations from the training rows' median.

    Raises UsageError if a latent is not finite: training on it would destroy the network.
    """
    features = {split: np.concatenate([summary_of(row[None]) for row in rows]) for split, rows in latents.items()}
    for split, values in features.items():
        bad = np.flatnonzero(~np.isfinite(values).all(1))
        if len(bad):
            raise UsageError(
                f"{len(bad)} latents are not finite, such as row {bad[0]} of latents_{split}: look at its file, which "
                f"latents_{split}.pkl names, or train phase 1 again"
            )
    typical, found = Typical.of(features["train"]), []
    for split, values in features.items():
        distance = typical.deviations(values)
        found += [
            {"split": split, "row": int(row), "deviations": float(distance[row])}
            for row in np.flatnonzero(distance > limit)
        ]
    return found


def summarize(latents: dict[str, np.ndarray], mean: np.ndarray, std: np.ndarray, outliers: list[dict]) -> None:
    """What a person checks before phase 3."""
    for split, rows in latents.items():
        split_mean, split_std = channel_statistics(rows)
        size = " x ".join(map(str, rows.shape[1:]))
        print(f"{split}: {len(rows)} latents of {size}, raw mean {_list(split_mean)}, raw std {_list(split_std)}")
        print(f"  standardized: mean {_list((split_mean - mean) / std)}, std {_list(split_std / std)}")
    if outliers:
        shown = ", ".join(f"{outlier['split']} row {outlier['row']}" for outlier in outliers[:10])
        more = " ..." if len(outliers) > 10 else ""
        print(f"{len(outliers)} latents lie far out, look at their files (latents_*.pkl names them): {shown}{more}")


def _list(values: np.ndarray) -> str:
    return "[" + ", ".join(f"{value:+.3f}" for value in values) + "]"


if __name__ == "__main__":
    run_script(main)
