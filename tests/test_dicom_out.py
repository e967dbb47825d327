"""Objects for an archive, against the standard's checker, other readers, and an archive."""

import functools
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from datetime import datetime
from types import SimpleNamespace

import highdicom
import numpy as np
import pydicom
import pytest
from PIL import Image
from pipeline import ROOT, table
from pydicom.uid import (
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

import interruption
from archive import CHANGED, NO_DICOM, Archive, report_objects
from archive import ODD as ODD_HEADER
from checks import UsageError
from config import MAKER, VERSION, Config
from phantoms.phantom import draw_phantom, write_dicom
from radiographs.manifest import list_records
from radiographs.reading import read_radiograph, rescale
from reporting.dicom_out import NOTE, TYPE_2, Algorithm, captured, encoded, fraction_of, make_objects, save
from results import PATIENTS

SHAPE = (64, 128)
READER = Algorithm("reader", 3.0, 5.0, {"vae_sha256": "a" * 64, "flow_sha256": "b" * 64})
QUIET = ["--inference.figures", 0, "--inference.save-maps", False]
NOON = datetime(2026, 1, 2, 12, 0, 0)
KINDS = {"capture", "binary", "fractional"}


@functools.cache
def drawn():
    return draw_phantom(0, 1, "cyst", *SHAPE)


def a_map():
    """Values on both sides of the threshold, up to far beyond the colours' end."""
    return np.where(drawn().mask, 1, 0) * np.linspace(2, 9, SHAPE[1], dtype=np.float32) + np.float32(0.5)


def a_file(folder, name="source.dcm", **changes):
    """A phantom as DICOM; changes are elements, None removes one."""
    write_dicom(folder / name, drawn())
    dataset = pydicom.dcmread(folder / name)
    for keyword, value in changes.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    dataset.save_as(folder / name)
    return folder / name


def objects_of(path, anomaly_map=None, algorithm=READER, made_at=NOON):
    source = pydicom.dcmread(path, stop_before_pixels=True)
    shown = a_map() if anomaly_map is None else anomaly_map
    return make_objects(source, np.zeros(SHAPE), shown, algorithm, made_at)


def saved(made, folder):
    for name, each in made.items():
        save(folder / f"{name}.dcm", encoded(each))
    return {name: pydicom.dcmread(folder / f"{name}.dcm") for name in made}


def archive(folder):
    """As phase 4 makes one, at the size of the files."""
    known = {"vae_sha256": "a" * 64, "flow_sha256": "b" * 64, "settings": 1}
    scores, scale = np.arange(3.0), {"anomaly_map": 5.0}
    calibration = {"belongs_to": known, "pixel_threshold": 3.0, "scale": scale, "scores": scores, "method": "plain"}
    return Archive(folder, SimpleNamespace(**calibration), Config())


def written(path, folder):
    """What phase 4 says of a file, and the objects it writes of it."""
    folder.mkdir(exist_ok=True)
    why = archive(folder).write(7, SimpleNamespace(path=path), a_map(), SHAPE)
    return why, {file.name: pydicom.dcmread(file) for file in (folder / PATIENTS).glob("*.dcm")}


# ---------------------------------------------------------------- the standard

ODD = {
    "as it is": {},
    "without what may be empty": dict.fromkeys((*TYPE_2, "PatientOrientation", "ImageLaterality", "PixelSpacing")),
    "several frames": {"NumberOfFrames": 3, "SOPClassUID": "1.2.840.10008.5.1.4.1.1.12.2"},
    "a place in a frame of reference": {"FrameOfReferenceUID": "1.2.3", "ImagePositionPatient": [0, 0, 0]},
    "a class of its vendor": {"SOPClassUID": "1.2.3.4.5"},
    "lossy": {"LossyImageCompression": "01", "LossyImageCompressionRatio": 8},
}


def checked(path):
    """What dciodvfy says, but for what a DICOMDIR would need."""
    if not shutil.which("dciodvfy"):
        pytest.skip("dciodvfy is not installed (Debian: dicom3tools)")
    said = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True)
    lines = (said.stdout + said.stderr).splitlines()
    assert any(line in ("SCImage", "Segmentation", "DXImageForPresentation") for line in lines), lines
    return [line for line in lines if line.startswith("Error")]


@pytest.mark.parametrize("changes", ODD.values(), ids=ODD)
def test_the_checker_of_the_standard_finds_no_error(changes, tmp_path):
    saved(objects_of(a_file(tmp_path, **changes)), tmp_path)
    assert [checked(tmp_path / f"{name}.dcm") for name in sorted(KINDS)] == [[], [], []]


def test_the_checker_finds_no_error_in_a_phantom_and_some_in_a_file_without_modality(tmp_path):
    assert checked(a_file(tmp_path)) == []
    assert checked(a_file(tmp_path, ImageLaterality=None))


# ---------------------------------------------------------------- pixels


def test_the_capture_reads_back_as_the_picture_that_was_drawn(tmp_path):
    capture = saved(objects_of(a_file(tmp_path)), tmp_path)["capture"]
    assert capture.SOPClassUID == SecondaryCaptureImageStorage and capture.PhotometricInterpretation == "RGB"
    np.testing.assert_array_equal(capture.pixel_array, captured(np.zeros(SHAPE), a_map(), READER))


@pytest.mark.parametrize("kind", ["binary", "fractional"])
def test_segmentations_read_back_as_the_map(kind, tmp_path):
    source = a_file(tmp_path)
    saved(objects_of(source), tmp_path)
    read = highdicom.seg.segread(tmp_path / f"{kind}.dcm")
    uid = pydicom.dcmread(source).SOPInstanceUID
    stored = read.get_pixels_by_source_instance([uid], rescale_fractional=False)[0, ..., 0]
    logistic = 255 / (1 + np.exp(-(a_map().astype(float) - 3) / (5 / 8)))
    np.testing.assert_array_equal(stored, a_map() > 3 if kind == "binary" else np.round(logistic))
    np.testing.assert_array_equal(pydicom.dcmread(tmp_path / f"{kind}.dcm").pixel_array, stored)


@pytest.mark.parametrize("threshold", [-2.0, 0.0, 3.0, 50.0])
def test_the_fraction_is_monotone_and_a_half_at_the_threshold(threshold):
    algorithm = Algorithm("plain", threshold, 5.0, {})
    values = np.linspace(threshold - 3, threshold + 3, 1001)
    fraction = fraction_of(values, algorithm)
    assert (np.diff(fraction) > 0).all() and fraction[500] == 0.5
    np.testing.assert_array_equal(
        (np.round(fraction * 255) >= 128)[values != threshold], (values > threshold)[values != threshold]
    )
    assert fraction_of(np.array([-1e30, 1e30]), algorithm).tolist() == pytest.approx([0, 1])


def test_a_radiograph_without_anything_above_the_threshold_has_an_empty_segment(tmp_path):
    made = saved(objects_of(a_file(tmp_path), np.zeros(SHAPE)), tmp_path)
    assert made["binary"].NumberOfFrames == 1 and not made["binary"].pixel_array.any()
    assert made["binary"].pixel_array.shape == SHAPE and not checked(tmp_path / "binary.dcm")


# ---------------------------------------------------------------- the picture


def test_the_capture_leaves_what_lies_below_the_threshold_as_it_is():
    grey = drawn().image * 2 - 1
    shown = captured(grey, np.where(drawn().mask, 9, 0), READER)[: SHAPE[0]]
    far = np.ones(SHAPE, bool)
    rows, columns = np.nonzero(drawn().mask)
    far[rows.min() - 2 : rows.max() + 3, columns.min() - 2 : columns.max() + 3] = False
    np.testing.assert_array_equal(shown[far], np.round((grey[far] + 1) * 127.5).astype(np.uint8)[:, None].repeat(3, 1))


@pytest.mark.parametrize("value", [3.001, 4.0, 1e6])
def test_the_radiograph_is_seen_through_the_tint(value):
    """Two grey levels stay two thirds as far apart, whatever the map says."""
    grey = np.tile(np.linspace(-1, 1, SHAPE[1]), (SHAPE[0], 1))
    shown = captured(grey, np.full(SHAPE, value), READER)[: SHAPE[0]].astype(int)
    apart = shown[:, -1] - shown[:, 0]
    assert apart.min() >= 0.64 * 255


@pytest.mark.parametrize("width", [128, 1024, 2880])
def test_the_note_lies_below_the_radiograph_and_fits_its_width(width):
    shown = captured(np.zeros((width // 2, width)), np.zeros((width // 2, width)), READER)
    strip = shown[width // 2 :]
    assert strip.max() == 255 and 0.02 < (strip > 128).mean() < 0.4
    assert not strip[:, -2:].any() and not strip[-2:].any()  # nothing is cut off


# ---------------------------------------------------------------- what they say


def test_objects_lie_in_the_study_of_the_source_and_name_it(tmp_path):
    source = pydicom.dcmread(a_file(tmp_path))
    made = saved(objects_of(tmp_path / "source.dcm"), tmp_path)
    assert {each.StudyInstanceUID for each in made.values()} == {source.StudyInstanceUID}
    assert made["binary"].SeriesInstanceUID == made["fractional"].SeriesInstanceUID
    assert len({source.SeriesInstanceUID, *(each.SeriesInstanceUID for each in made.values())}) == 3
    for each in made.values():
        (series,), (item,) = each.ReferencedSeriesSequence, each.SourceImageSequence
        assert series.SeriesInstanceUID == source.SeriesInstanceUID
        named = (series.ReferencedInstanceSequence[0], item)
        assert {(one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID) for one in named} == {
            (source.SOPClassUID, source.SOPInstanceUID)
        }


def test_segments_say_from_which_frame_they_were_derived(tmp_path):
    made = objects_of(a_file(tmp_path, **ODD["several frames"]))
    for kind in ("binary", "fractional"):
        (derived,) = made[kind].PerFrameFunctionalGroupsSequence[0].DerivationImageSequence
        (item,) = derived.SourceImageSequence
        assert (item.ReferencedFrameNumber, item.SpatialLocationsPreserved) == (1, "YES")
        assert item.ReferencedSOPClassUID == ODD["several frames"]["SOPClassUID"]


def test_tool_and_checkpoints_are_named_in_the_algorithm(tmp_path):
    made = objects_of(a_file(tmp_path))
    for kind in ("binary", "fractional"):
        (algorithm,) = made[kind].SegmentSequence[0].SegmentationAlgorithmIdentificationSequence
        assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == (MAKER, VERSION)
        told = dict(pair.split("=") for pair in algorithm.AlgorithmParameters.split(","))
        assert told == {"method": "reader", "threshold": "3", "width": "0.625", **READER.hashes}
    assert all(value in made["capture"].DerivationDescription for value in (NOTE, *READER.hashes.values()))


def test_the_version_is_that_of_the_project():
    assert f'\nversion = "{VERSION}"\n' in (ROOT / "pyproject.toml").read_text()


def test_patient_and_study_are_copied_in_their_own_script(tmp_path):
    known = {"PatientName": "Yamada^Tarou=山田^太郎=やまだ^たろう", "PatientID": "7", "PatientBirthDate": "19700102"}
    known |= {"PatientSex": "O", "StudyDate": "20250304", "AccessionNumber": "A1", "PatientAge": "055Y"}
    charset = {"SpecificCharacterSet": ["", "ISO 2022 IR 87"]}
    for each in saved(objects_of(a_file(tmp_path, **charset, **known)), tmp_path).values():
        assert {name: str(each[name].value) for name in known} == known
        assert each.SpecificCharacterSet == charset["SpecificCharacterSet"]


def test_a_value_that_the_standard_does_not_know_is_copied_as_it_is(tmp_path):
    made = objects_of(a_file(tmp_path, PatientSex="X"))
    assert {each.PatientSex for each in made.values()} == {"X"}


def test_lossy_stays_lossy(tmp_path):
    made = objects_of(a_file(tmp_path, **ODD["lossy"]))
    said = {(each.LossyImageCompression, each.LossyImageCompressionRatio) for each in made.values()}
    assert said == {("01", 8)}


# ---------------------------------------------------------------- UIDs


def uids(made):
    return {name: str(each.SOPInstanceUID) for name, each in made.items()}


def test_the_same_examination_gives_the_same_objects_at_another_time(tmp_path):
    source, later = a_file(tmp_path), datetime(2027, 5, 6)
    first, second = objects_of(source), objects_of(source, made_at=later)
    assert uids(first) == uids(second)
    times = {"InstanceCreation", "Content", "DateOfSecondaryCapture", "TimeOfSecondaryCapture"}
    for name in KINDS:
        differ = {element.keyword for element in first[name] if element != second[name][element.tag]}
        times |= {"InstanceCreationDate", "InstanceCreationTime", "ContentDate", "ContentTime"}
        assert differ <= times | {"ContributingEquipmentSequence"}


def test_another_source_checkpoint_threshold_or_map_is_another_object(tmp_path):
    source, higher = a_file(tmp_path), a_map()
    higher[0, 0] += 10
    other = {
        **{"source": objects_of(a_file(tmp_path, "other.dcm", SOPInstanceUID="1.2.3"))},
        **{"checkpoint": objects_of(source, algorithm=Algorithm("reader", 3.0, 5.0, {"vae_sha256": "c" * 64}))},
        **{"threshold": objects_of(source, algorithm=Algorithm("reader", 3.1, 5.0, READER.hashes))},
        **{"map": objects_of(source, higher), "same": objects_of(source)},
    }
    found = [uid for made in other.values() for uid in uids(made).values()]
    assert len(set(found)) == 15
    assert all(re.fullmatch(r"2\.25\.[1-9]\d{30,38}", uid) for uid in found)


# ---------------------------------------------------------------- kinds of files


def recoded(path, syntax):
    dataset = pydicom.dcmread(path)
    if syntax.is_encapsulated:
        dataset.compress(syntax)
    if syntax == ExplicitVRBigEndian:
        dataset.PixelData = dataset.pixel_array.astype(">u2").tobytes()
    dataset.file_meta.TransferSyntaxUID = syntax
    order = {"little_endian": syntax.is_little_endian, "implicit_vr": syntax.is_implicit_VR}
    pydicom.dcmwrite(path, dataset, **order, force_encoding=True)


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless]
)
def test_a_source_in_any_coding_has_objects_with_the_same_pixels(syntax, tmp_path):
    path = a_file(tmp_path, PatientName="Ärztin^Anna", SpecificCharacterSet="ISO_IR 100")
    _, plain = written(path, tmp_path / "plain")
    recoded(path, syntax)
    why, made = written(path, tmp_path / "coded")
    assert why == "" and {name: each.PixelData for name, each in made.items()} == {
        name: each.PixelData for name, each in plain.items()
    }
    assert {str(each.PatientName) for each in made.values()} == {"Ärztin^Anna"}


def test_a_source_in_lossy_jpeg_has_objects_that_say_so(tmp_path):
    path = a_file(tmp_path, LossyImageCompression=None)
    dataset = pydicom.dcmread(path)
    Image.fromarray((drawn().image * 255).astype(np.uint8)).save(tmp_path / "x.jpg")
    dataset.PixelData = pydicom.encaps.encapsulate([(tmp_path / "x.jpg").read_bytes()])
    dataset["PixelData"].is_undefined_length = True
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.save_as(path)
    why, made = written(path, tmp_path)
    assert why == "" and {each.LossyImageCompression for each in made.values()} == {"01"}


def test_a_negative_looks_like_a_positive(tmp_path):
    path = a_file(tmp_path)
    _, plain = written(path, tmp_path / "plain")
    dataset = pydicom.dcmread(path)
    dataset.PixelData = (dataset.pixel_array.max() - dataset.pixel_array).tobytes()
    dataset.PhotometricInterpretation = "MONOCHROME1"
    dataset.save_as(path)
    _, made = written(path, tmp_path / "negative")
    ours, theirs = (each["007_capture.dcm"].pixel_array.astype(int) for each in (made, plain))
    assert abs(ours - theirs).max() <= 1


def test_of_several_frames_the_first_has_objects(tmp_path):
    path = a_file(tmp_path, NumberOfFrames=2)
    dataset = pydicom.dcmread(path)
    _, plain = written(a_file(tmp_path, "one.dcm"), tmp_path / "one")
    dataset.PixelData = dataset.PixelData + bytes(len(dataset.PixelData))
    dataset.save_as(path)
    why, made = written(path, tmp_path / "two")
    assert why == "" and made["007_capture.dcm"].PixelData == plain["007_capture.dcm"].PixelData


def test_a_source_without_preamble_has_objects(tmp_path):
    path = a_file(tmp_path)
    dataset = pydicom.dcmread(path)
    with pydicom.filebase.DicomBytesIO() as file:
        file.is_little_endian, file.is_implicit_VR = True, False
        pydicom.filewriter.write_dataset(file, dataset)
        path.write_bytes(file.getvalue())
    why, made = written(path, tmp_path)
    assert why == "" and len(made) == 3


def test_what_has_no_objects_is_told_with_a_reason_that_names_nobody(tmp_path, capsys):
    Image.new("L", SHAPE[::-1]).save(tmp_path / "Meyer.png")
    (tmp_path / "Meyer_spoilt.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"Meyer" * 9)
    paths = [tmp_path / "Meyer.png", a_file(tmp_path, "a.dcm", StudyInstanceUID=None), tmp_path / "Meyer_spoilt.dcm"]
    paths += [a_file(tmp_path, "b.dcm", SOPInstanceUID=""), a_file(tmp_path, "c.dcm")]
    found = [written(path, tmp_path / path.stem)[0] for path in paths]
    assert found == [NO_DICOM, "without StudyInstanceUID", CHANGED, "without SOPInstanceUID", ""]
    report_objects([{"objects": why} for why in (*found, NO_DICOM)] + [{"error": "x"}])
    said = capsys.readouterr().out
    assert "2 of 6 files have no DICOM objects: no DICOM\n" in said and "Meyer" not in said
    assert f"DICOM objects of 1 of 6 files, which name the patients, are in {PATIENTS}/" in said


def test_an_examination_without_them_says_nothing_of_them(capsys):
    report_objects([{"row": []}])
    assert capsys.readouterr().out == ""


def test_a_number_that_is_none_is_copied_as_it_is(tmp_path):
    path = a_file(tmp_path)
    dataset = pydicom.dcmread(path)
    dataset.add_new("PatientWeight", "LO", "heavy")
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    pydicom.dcmwrite(path, dataset, implicit_vr=True, little_endian=True, force_encoding=True)
    why, made = written(path, tmp_path)
    assert why == "" and {each.PatientWeight for each in made.values()} == {"heavy"}


def test_a_header_that_fits_no_map_is_a_reason_and_no_crash(tmp_path):
    record = SimpleNamespace(path=a_file(tmp_path))
    assert archive(tmp_path).write(7, record, a_map(), (63, 128)) == f"{ODD_HEADER} (ValueError)"
    assert not (tmp_path / PATIENTS).exists()


def test_without_highdicom_the_error_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    monkeypatch.delitem(sys.modules, "reporting.dicom_out")
    monkeypatch.delattr("reporting.dicom_out")
    with pytest.raises(UsageError, match="needs highdicom.*pip install -r requirements.txt"):
        archive(tmp_path)


def test_objects_that_come_back_from_an_archive_are_no_radiographs(tmp_path):
    saved(objects_of(a_file(tmp_path)), tmp_path)
    with pytest.warns(UserWarning, match="3 DICOM files are not images"):
        assert [record.path.name for record in list_records(tmp_path)] == ["source.dcm"]


# ---------------------------------------------------------------- phase 4


@pytest.fixture
def clinic(made, tmp_path):
    """Two DICOM files and one that is none, to examine."""
    rows = [row for row in table(made.phantoms / "manifest.csv") if row["split"] == "test"][:3]
    folder = tmp_path / "clinic"
    folder.mkdir()
    for row in rows[:2]:
        shutil.copy(made.phantoms / row["image"], folder)
    grey = rescale(read_radiograph(made.phantoms / rows[2]["image"]), 0, 100)
    Image.fromarray(((grey + 1) * 127).astype(np.uint8)).save(folder / "film.png")
    return folder


def uids_in(folder):
    return {path.name: pydicom.dcmread(path).SOPInstanceUID for path in folder.glob("*.dcm")}


def test_phase_4_writes_them_for_their_owner_alone_and_clears_them_away(call, examined, clinic, tmp_path):
    known = ["--inference.calibration", examined.out / "calibration", "--data.test", clinic, *QUIET]
    folder = tmp_path / "phase4_inference" / PATIENTS
    folder.mkdir(parents=True, mode=0o755)
    result = call("inference", *known, "--inference.dicom", True)
    assert result.code == 0 and "1 of 3 files have no DICOM objects: no DICOM" in result.out, result.error
    assert set(uids_in(folder)) == {f"{number}_{kind}.dcm" for number in ("001", "002") for kind in KINDS}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert call("inference", *known).code == 0 and not folder.exists()


def test_a_repeated_and_a_resumed_run_have_the_objects_of_one_that_was_not(
    call, examined, clinic, tmp_path, monkeypatch
):
    known = ["--inference.calibration", examined.out / "calibration", "--data.test", clinic, *QUIET]
    known += ["--inference.dicom", True, "--inference.batch-size", 1]
    write, seen, stopped = Archive.write, [], tmp_path / "stopped"

    def write_and_be_told(*given):
        seen.append(given)
        if len(seen) == 2:
            interruption._on_signal(signal.SIGTERM, None)
        return write(*given)

    assert call("inference", *known).code == 0
    first = uids_in(tmp_path / "phase4_inference" / PATIENTS)
    assert "1 of 3 files have no DICOM objects" in call("inference", *known).out and len(first) == 6
    assert call("inference", *known, "--runtime.resume", False).code == 0
    assert uids_in(tmp_path / "phase4_inference" / PATIENTS) == first
    with monkeypatch.context() as patch:
        patch.setattr(Archive, "write", write_and_be_told)
        assert call("inference", *known, outputs=stopped).code == 143
    resumed = call("inference", *known, outputs=stopped)
    assert "continuing after 2 of 3" in resumed.out and "1 of 3 files have no DICOM objects" in resumed.out
    assert uids_in(stopped / "phase4_inference" / PATIENTS) == first


def test_the_binary_segment_is_the_map_of_phase_4_above_its_threshold(call, examined, clinic, tmp_path):
    known = ["--inference.calibration", examined.out / "calibration", "--data.test", clinic, "--inference.dicom", True]
    assert call("inference", *known, "--inference.figures", 0).code == 0
    threshold = json.loads((examined.out / "calibration" / "statistical.json").read_text())["pixel_threshold"]
    out = tmp_path / "phase4_inference"
    for number in ("001", "002"):
        above = np.load(out / "maps" / f"{number}.npy") > threshold
        np.testing.assert_array_equal(pydicom.dcmread(out / PATIENTS / f"{number}_binary.dcm").pixel_array, above)


def test_only_these_files_name_the_patient(call, examined, clinic, tmp_path):
    canary = b"Kanarienvogel"
    for path in clinic.glob("*.dcm"):
        dataset = pydicom.dcmread(path)
        dataset.PatientName = dataset.PatientID = dataset.StudyDescription = canary.decode()
        dataset.save_as(path)
    known = ["--inference.calibration", examined.out / "calibration", "--data.test", clinic, "--inference.dicom", True]
    assert canary.decode() not in call("inference", *known).out
    out = tmp_path / "phase4_inference"
    naming = {path.parent.name for path in out.rglob("*") if path.is_file() and canary in path.read_bytes()}
    assert naming == {PATIENTS}


# ---------------------------------------------------------------- an archive


@pytest.fixture
def orthanc(tmp_path):
    """A real archive on this machine alone; a function that asks it."""
    program = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin")
    if not program:
        pytest.skip("Orthanc is not installed (Debian: orthanc)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "orthanc"
    folder.mkdir()
    settings = {"StorageDirectory": str(folder), "IndexDirectory": str(folder), "HttpPort": port, "Plugins": []}
    settings |= {"RemoteAccessAllowed": False, "AuthenticationEnabled": False, "DicomServerEnabled": False}
    (folder / "orthanc.json").write_text(json.dumps(settings))

    def ask(path, content=None):
        data = content if content is None or isinstance(content, bytes) else json.dumps(content).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", data, timeout=20) as answer:
            return json.load(answer)

    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen([program, str(folder / "orthanc.json")], stdout=log, stderr=log, env=environment)
    try:
        for _ in range(200):
            try:
                ask("/system")
                break
            except OSError:
                assert process.poll() is None, (folder / "log.txt").read_text()
                time.sleep(0.1)
        yield ask
    finally:
        process.terminate()
        process.wait(20)


def test_an_archive_finds_source_and_objects_under_one_study(orthanc, tmp_path):
    source = a_file(tmp_path)
    saved(objects_of(source), tmp_path)
    files = [source, *(tmp_path / f"{kind}.dcm" for kind in sorted(KINDS))]
    assert [orthanc("/instances", path.read_bytes())["Status"] for path in files] == ["Success"] * 4
    (study,) = orthanc("/tools/find", {"Level": "Study", "Query": {"PatientID": "PHANTOM^0001"}, "Expand": True})
    assert study["MainDicomTags"]["StudyInstanceUID"] == pydicom.dcmread(source).StudyInstanceUID
    series = [orthanc(f"/series/{each}") for each in study["Series"]]
    assert sorted((each["MainDicomTags"]["Modality"], len(each["Instances"])) for each in series) == [
        ("OT", 1),
        ("PX", 1),
        ("SEG", 2),
    ]
    assert orthanc("/instances", (tmp_path / "binary.dcm").read_bytes())["Status"] == "AlreadyStored"
