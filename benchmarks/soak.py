"""Many radiographs in one run: python benchmarks/soak.py

Phases 2 and 4 over 20,000 radiographs, drawn as they are read and stored nowhere, with tiny networks that are trained
first (maps and three figures are written, no report); then the calibration of phase 4 over 200 and over 2,000
validation normals. Prints

memory    MiB that the process and those that read for it hold themselves, first and last; what they map from files is
          the disk's (Linux: resident less shared)
files     that they have open, first and last
speed     images per second of the first and of the last thousand, once warm; `of a core`: per second of the processor
          time of all of them, which other jobs of the machine disturb less
peak      most memory at any time, for the calibration

Each part is kept in --folder, by commit, once it is finished; a benchmark that was stopped goes on with the others.
Writes benchmarks/results/soak.json.
"""

import argparse
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detection import commit
from pipeline import ROOT, SETTINGS, shell

import dataset
import examination
import extract_latents
import inference
from checks import UsageError
from files import write_json
from interruption import remember
from model import RadiographVAE
from normalizer import Normalizer
from phantoms import phantom
from radiographs.manifest import Record, list_records
from radiographs.reading import Radiograph, read_radiograph
from runtime import run_script

DRAWN = "drawn"  # the folder that radiographs claim to lie in which are drawn when they are read
EVERY = 1_000  # images between two looks
WARM_UP = 500
FEW = 100  # validation radiographs of phase 2: less than what a last thousand leaves over
CALIBRATIONS = 200, 2_000
SIZE = 64, 128  # rows and columns


def main() -> None:
    """All parts that are not there yet, each in a process of its own, then the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000, help="radiographs that phases 2 and 4 see")
    parser.add_argument("--folder", type=Path, default=Path("outputs/soak"))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/soak.json")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.images < 2 * EVERY + WARM_UP:
        raise UsageError(f"--images needs {2 * EVERY + WARM_UP} or more: a first and a last thousand, once warm")
    folder = options.folder.resolve() / commit()
    os.chdir(ROOT)
    if options.part:
        name, images = options.part[0], int(options.part[1])
        {"phase 2": phase2, "phase 4": phase4, "calibration": calibration}[name](images, folder)
        return
    remember("parts that are finished are kept, the same command goes on with the others")
    prepare(folder / "networks")
    wanted = [("phase 2", options.images), ("phase 4", options.images)]
    wanted += [("calibration", count) for count in CALIBRATIONS]
    found = {f"{name}, {images} images": part(name, images, folder) for name, images in wanted}
    write_json(options.results, {"parts": found, "cores": os.cpu_count(), "commit": folder.name})
    show(found)


def part(name: str, images: int, folder: Path) -> dict:
    """What a part measured, kept or new."""
    kept = kept_as(name, images, folder)
    if not kept.is_file():
        command = ["benchmarks/soak.py", "--folder", folder.parent, "--part", name, images]
        result = shell(*map(str, command))
        if not kept.is_file():
            raise UsageError(f"{name} over {images} images failed:\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}")
    return json.loads(kept.read_text())


def kept_as(name: str, images: int, folder: Path) -> Path:
    """Where a part keeps what it measured."""
    return folder / f"{name.replace(' ', '')}-{images}.json"


def prepare(folder: Path) -> None:
    """A dozen phantoms, and tiny networks trained on them."""
    if (folder / "phase3_flowdiff/checkpoint_best.pt").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    counts = {"train": 12, "val": 4, "test_normal": 1, "test_per_lesion": 0}
    phantom.write_dataset(folder / "phantoms", **counts, height=SIZE[0], width=SIZE[1], workers=1)
    for script in ("train_vae.py", "extract_latents.py", "train_flowdiff.py"):
        result = shell(script, *flags(folder, folder))
        if result.returncode:
            raise UsageError(f"{script} ended with {result.returncode}:\n{result.stderr[-2000:]}")


def flags(networks: Path, outputs: Path) -> list[str]:
    """The command line of a phase that reads the networks in one folder and writes to another."""
    vae, flow = networks / "phase1_vae/checkpoint_best.pt", networks / "phase3_flowdiff/checkpoint_best.pt"
    words = [*SETTINGS, "--outputs", outputs, "--data.root", networks / "phantoms", "--runtime.device", "cpu"]
    words += ["--data.height", SIZE[0], "--data.width", SIZE[1], "--data.cache-gb", 0, "--data.num-workers", 1]
    words += ["--latent.vae-checkpoint", vae, "--latent.augmented-copies", 0, "--flowdiff.vae-checkpoint", vae]
    words += ["--flowdiff.latents", networks / "phase2_latents"]
    words += ["--inference.vae-checkpoint", vae, "--inference.flow-checkpoint", flow, "--inference.report", False]
    return [*map(str, words)]


# ---------------------------------------------------------------- radiographs from nowhere


def drawn(height: int, width: int):
    """A `read_radiograph` that draws what claims to lie in DRAWN: three phantoms in one, mirrored or not, and noise."""
    phantoms = np.stack([phantom.draw_phantom(1, n, height=height, width=width).image for n in range(64)])

    def read(path: str | Path) -> Radiograph:
        path = Path(path)
        if path.parent.name != DRAWN:
            return read_radiograph(path)
        random = np.random.default_rng(int(path.stem))
        chosen, shares = random.choice(len(phantoms), 3, replace=False), random.dirichlet([1, 1, 1])
        pixels = np.einsum("n,nhw->hw", shares, phantoms[chosen])
        pixels = np.roll(pixels[:, :: random.choice([-1, 1])], random.integers(-8, 9), axis=1)
        pixels = (pixels + random.normal(0, 0.01, pixels.shape)).astype(np.float32)
        return Radiograph(pixels, np.ones(pixels.shape, bool), None)

    return read


def claimed(count: int, split: str, first: int = 0) -> list[Record]:
    """Records of radiographs that nobody stored."""
    names = [f"{number:06d}" for number in range(first, first + count)]
    return [Record(Path(DRAWN) / f"{name}.png", split, None, "", None, name, "file") for name in names]


def run(script, networks: Path, outputs: Path, records: list[Record], words: tuple = ()) -> None:
    """A phase over those records."""
    shutil.rmtree(outputs, ignore_errors=True)
    dataset.read_radiograph = drawn(*SIZE)
    dataset.list_records = examination.list_records = lambda *where: records
    sys.argv = [script.__name__, *flags(networks, outputs), *map(str, words)]
    script.main()
    shutil.rmtree(outputs)


# ---------------------------------------------------------------- what is measured


class Watch:
    """What the process looks like as images go by."""

    def __init__(self):
        self.process, self.images, self.rows = psutil.Process(), 0, []
        self.began = None

    def everyone(self) -> list[psutil.Process]:
        """This process, and those that read for it."""
        return [self.process, *self.process.children(recursive=True)]

    def memory(self) -> float:
        """MiB that are the processes' own."""
        known = [process.memory_info() for process in self.everyone()]
        return sum(each.rss - each.shared for each in known) / 2**20

    def processor_time(self) -> float:
        """Seconds that they computed, those that have ended among them."""
        known = [process.cpu_times() for process in self.everyone()]
        return sum(each.user + each.system + each.children_user + each.children_system for each in known)

    def count(self, images: int) -> None:
        """So many more went by."""
        self.images += images
        now = self.images, time.perf_counter(), self.processor_time()
        if self.began is None and self.images >= WARM_UP:
            self.began = now
        elif self.began is not None and self.images - self.began[0] >= EVERY:
            done, seconds, cpu = (new - old for new, old in zip(now, self.began, strict=True))
            speeds = {"images_per_s": done / seconds, "images_per_cpu_s": done / cpu}
            self.rows.append({"images": self.images, "memory_mib": self.memory(), **speeds})
            self.rows[-1]["files"] = sum(process.num_fds() for process in self.everyone())
            self.began = now

    def counting(self, method):
        """The method of networks, whose first argument is a batch, and which is counted."""

        def counted(network, batch, *more):
            result = method(network, batch, *more)
            self.count(len(batch))
            return result

        return counted


def phase2(images: int, folder: Path) -> None:
    """Latents of radiographs from nowhere."""
    watch = Watch()
    RadiographVAE.encode = watch.counting(RadiographVAE.encode)
    records = [*claimed(images - FEW, "train"), *claimed(FEW, "val", images)]
    run(extract_latents, folder / "networks", folder / "out", records)
    write_json(kept_as("phase 2", images, folder), {"rows": watch.rows})


def phase4(images: int, folder: Path) -> None:
    """Maps of radiographs from nowhere, calibrated by those that are stored."""
    watch, networks = Watch(), folder / "networks"
    calibrate = inference.calibration_of

    def calibrated(*given):
        known = calibrate(*given)
        Normalizer.examine = watch.counting(Normalizer.examine)  # from here the radiographs to examine go by
        return known

    inference.calibration_of = calibrated
    known = [record for record in list_records(networks / "phantoms") if record.split != "test"]
    run(inference, networks, folder / "out", [*known, *claimed(images, "test")])
    write_json(kept_as("phase 4", images, folder), {"rows": watch.rows})


def calibration(images: int, folder: Path) -> None:
    """What so many validation normals take to calibrate method statistical."""
    watch, networks = Watch(), folder / "networks"
    known = [record for record in list_records(networks / "phantoms") if record.split == "train"]
    ended, peak, began = threading.Event(), [0.0], time.perf_counter()

    def look() -> None:
        while not ended.wait(0.02):
            peak[0] = max(peak[0], watch.memory())

    looker = threading.Thread(target=look)
    looker.start()
    try:
        records = [*known, *claimed(images, "val"), *claimed(1, "test", images)]
        run(inference, networks, folder / "out", records, ("--inference.solver", "one_step"))
    finally:
        ended.set()
        looker.join()
    seconds = time.perf_counter() - began
    write_json(kept_as("calibration", images, folder), {"peak_mib": peak[0], "seconds": seconds})


def show(found: dict[str, dict]) -> None:
    """Two Markdown tables."""
    print("| part | memory, MiB | open files | images/s | images/s of a core | last / first |\n|" + " --- |" * 6)
    for name, part_ in found.items():
        if "rows" in part_:
            first, last = part_["rows"][0], part_["rows"][-1]
            cells = [f"{first[key]:.0f} to {last[key]:.0f}" for key in ("memory_mib", "files")]
            cells += [f"{first[key]:.1f} to {last[key]:.1f}" for key in ("images_per_s", "images_per_cpu_s")]
            ratios = [f"{last[key] / first[key]:.2f}" for key in ("images_per_s", "images_per_cpu_s")]
            print(f"| {name} | " + " | ".join(cells) + f" | {ratios[0]}, of a core {ratios[1]} |")
    print("\n| part | peak, MiB | minutes |\n| --- | --- | --- |")
    for name, part_ in found.items():
        if "peak_mib" in part_:
            print(f"| {name} | {part_['peak_mib']:.0f} | {part_['seconds'] / 60:.1f} |")


if __name__ == "__main__":
    run_script(main)
