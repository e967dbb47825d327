"""What phase 4 hands to an archive: DICOM objects of every examined file that is DICOM itself, and how many have none.

    objects = Archive(folder, calibration, config)
    why = objects.write(index, record, anomaly_map, original_shape)     # "" where they are written
    report_objects(entries)                                             # says aloud which files have none

They name the patient, so they lie in a folder of their own that its owner alone can enter (`results.PATIENTS`).
"""

import contextlib
import hashlib
import json
import warnings
from collections import Counter
from datetime import datetime
from pathlib import Path

import numpy as np
import pydicom

from calibration import Calibration
from checks import UsageError
from config import Config
from progress import warn
from radiographs.dicom import is_dicom, open_dicom
from radiographs.geometry import unfit_map
from radiographs.manifest import Record
from radiographs.reading import PUZZLED, ImageReadError, read_radiograph, rescale
from results import PATIENTS
from survey import magnification_of

NO_DICOM = "no DICOM"
TWICE = "another file has the same SOPInstanceUID"
CHANGED = "cannot be read again"
ODD = "an element of the header makes no sense"


class Archive:
    """The objects of an examination, written below `folder`; UsageError where highdicom is not installed.

    `done` are the records whose objects an interrupted examination wrote.
    """

    def __init__(self, folder: Path, calibration: Calibration, config: Config, done: list[Record] = ()):
        try:
            from reporting import dicom_out  # here: it takes a second to load, and few ask for it
        except ImportError as error:
            raise UsageError(
                f"--inference.dicom True needs {error.name}, which is not installed: pip install -r requirements.txt"
            ) from error
        self.make, self.folder, self.config = dicom_out, folder / PATIENTS, config
        known = calibration.belongs_to
        hashes = {name: known[name] for name in ("vae_sha256", "flow_sha256", "reader_sha256") if name in known}
        told = json.dumps([known, config.data.preprocessing, calibration.scores.tolist()], sort_keys=True)
        hashes["settings_sha256"] = hashlib.sha256(told.encode()).hexdigest()
        threshold, end = calibration.pixel_threshold, calibration.scale["anomaly_map"]
        self.algorithm = dicom_out.Algorithm(calibration.method, threshold, end, hashes)
        self.seen: set[str] = set()  # SOPInstanceUIDs
        for record in done:
            with contextlib.suppress(ImageReadError, OSError, ValueError, *PUZZLED):
                self.seen.add(_instance(open_dicom(record.path, stop_before_pixels=True)))

    def write(self, index: int, record: Record, anomaly_map: np.ndarray, original_shape: tuple[int, int]) -> str:
        """Write the objects of one radiograph, whose map (k H, k W) is at the size of the model or k times that.

        "" where they are written; otherwise why there are none, in words that name nobody.
        """
        data = self.config.data
        if not is_dicom(record.path):
            return NO_DICOM
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they were given when it was examined
                source = open_dicom(record.path, stop_before_pixels=True)
                grey = rescale(read_radiograph(record.path), data.percentile_low, data.percentile_high)
        except (ImageReadError, OSError, ValueError, *PUZZLED):
            return CHANGED
        missing = self.make.missing_in(source)
        if missing:
            return f"without {missing}"
        if _instance(source) in self.seen:
            return TWICE
        full = unfit_map(anomaly_map, original_shape, data.fit, magnification_of(self.config))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they quote what a header holds
                made = self.make.make_objects(source, grey, full, self.algorithm, datetime.now())
                files = {f"{index:03d}_{name}.dcm": self.make.encoded(each) for name, each in made.items()}
        except (ValueError, *PUZZLED) as error:
            return f"{ODD} ({type(error).__name__})"
        self.folder.mkdir(mode=0o700, exist_ok=True)
        for name, content in files.items():
            self.make.save(self.folder / name, content)
        self.seen.add(_instance(source))
        return ""


def _instance(source: pydicom.Dataset) -> str:
    return str(source.get("SOPInstanceUID") or "")


def report_objects(entries: list[dict]) -> None:
    """Say of how many examined files there are DICOM objects, and why the others have none."""
    known = [entry["objects"] for entry in entries if "objects" in entry]
    for why, count in sorted(Counter(known).items()):
        if why:
            warn(f"{count} of {len(known)} files have no DICOM objects: {why}")
    if known:
        print(f"DICOM objects of {known.count('')} of {len(known)} files, which name the patients, are in {PATIENTS}/")
