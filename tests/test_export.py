"""A normalizer as one folder: the numbers of phase 4, nothing unpickled, nothing of a patient, and damage told."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pydicom
import pytest
import torch
from pipeline import ENVIRONMENT, ROOT, opens, strict_json, table
from pydicom.data import get_testdata_file
from safetensors import safe_open

import export as script
from checks import UsageError
from config import Config, InferenceConfig
from exported import CONTENTS, NORMALIZER, Judged, load
from files import sha256, unsealed, write_sealed_json
from normalizer import Normalizer
from radiographs.reading import ImageReadError, read_header, read_radiograph
from reporting.card import CardFacts, model_card

READER = (
    "--inference.method reader --reader.features image latent --reader.steps 4 --reader.copies 1 --reader.width 8 "
    "--reader.tuned-steps 2"
)
METHODS = {"plain": "--inference.method plain --inference.draws 2", "statistical": "", "reader": READER}
METHODS["plain in bf16"] = "--inference.method plain --inference.precision bf16"
# each image in a batch of its own, as `examine` has it: convolutions of a larger one add up in another order
ALONE = ["--inference.figures", 0, "--inference.batch-size", 1]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def exports():
    """Method -> the folder of results and the folder that was exported, once each."""
    return {}


@pytest.fixture
def exported(call, examined, tmp_path_factory, exports):
    """Examine and export with a method: (results, folder)."""

    def make(method):
        if method not in exports:
            out, folder = tmp_path_factory.mktemp(method), tmp_path_factory.mktemp("given") / "normalizer"
            flags = METHODS[method].split()
            assert call("inference", *flags, *ALONE, outputs=out).code == 0
            result = export(call, folder, *flags, outputs=out)
            assert result.code == 0, result.error
            assert "read" in result.out and str(folder) in result.out
            exports[method] = out / "phase4_inference", folder
        return exports[method]

    return make


def export(call, folder, *flags, **where):
    return call("export", "--out", folder, *flags, **where)


def listed(made):
    rows = [row for row in table(made.phantoms / "manifest.csv") if row["split"] == "test"]
    return [made.phantoms / row["image"] for row in rows]


def copy_of(folder, place):
    shutil.copytree(folder, place)
    return place


@pytest.mark.parametrize("method", METHODS)
def test_a_file_gets_the_numbers_of_phase_4(method, exported, made):
    results, folder = exported(method)
    normalizer = Normalizer.load(folder)
    rows = table(results / "scores.csv")
    assert len(rows) == len(listed(made)) == 9
    for row, path in zip(rows, listed(made), strict=True):
        result = normalizer.examine(str(path))
        assert result.score == pytest.approx(float(row["score"]), rel=1e-5, abs=1e-5)
        assert result.p_value == pytest.approx(float(row["p_value"]), abs=1e-4)
        assert result.flagged == bool(int(row["flagged"]))
        expected = np.load(results / "maps" / f"{row['index']}.npy")
        np.testing.assert_allclose(result.map, expected, **CLOSE)
        assert result.map.dtype == np.float32 and result.map.shape == read_radiograph(path).pixels.shape


def test_normal_and_x_are_those_of_g(exported, made):
    normalizer = Normalizer.load(exported("statistical")[1])
    path = listed(made)[0]
    result, x = normalizer.examine(path), normalizer.read(path)
    np.testing.assert_allclose(result.x, x[0, 0], **CLOSE)
    np.testing.assert_allclose(result.normal, normalizer(x)[0, 0], **CLOSE)
    assert isinstance(result, Judged) and np.abs(result.normal).max() <= 1


def test_a_dicom_of_another_size_gets_a_map_of_its_own_size(exported, tmp_path):
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    dataset.save_as(tmp_path / "patient.dcm")
    result = Normalizer.load(exported("plain")[1]).examine(tmp_path / "patient.dcm")
    assert result.map.shape == (dataset.Rows, dataset.Columns) == (128, 128) and np.isfinite(result.score)


def test_three_lines_run_in_a_fresh_process(exported, made):
    results, folder = exported("reader")
    lines = (
        "from normalizer import Normalizer\n"
        f"result = Normalizer.load({str(folder)!r}).examine({str(listed(made)[0])!r})\n"
        "print(result.score)"
    )
    done = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = float(table(results / "scores.csv")[0]["score"])
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_nothing_is_unpickled(exported, made, monkeypatch):
    _, folder = exported("statistical")
    monkeypatch.setattr(torch, "load", lambda *given, **more: pytest.fail("torch.load"))
    monkeypatch.setattr(np, "load", lambda *given, **more: pytest.fail("np.load"))
    normalizer = Normalizer.load(folder)
    assert np.isfinite(normalizer.examine(listed(made)[0]).score)


@pytest.mark.parametrize("method", METHODS)
def test_the_folder_is_whole_and_its_contents_say_so(method, exported):
    _, folder = exported(method)
    expected = {"vae", "network", "calibration"} | ({"reader"} if method == "reader" else set())
    names = {f"{name}.safetensors" for name in expected} | {NORMALIZER, CONTENTS, "README.md", "example.png"}
    assert {path.name for path in folder.iterdir()} == names
    stored = strict_json(folder / CONTENTS)["sha256"]
    assert stored == {name: sha256(folder / name) for name in names - {CONTENTS}}
    assert opens(folder / "example.png")


def test_the_weights_are_those_of_the_checkpoints(exported, examined):
    _, folder = exported("plain")
    model = Normalizer.load(examined.phase1 / "checkpoint_best.pt", examined.phase3 / "checkpoint_best.pt")
    for name, network in (("vae", model.vae), ("network", model.network)):
        with safe_open(folder / f"{name}.safetensors", "pt") as stored:
            weights = network.state_dict()
            assert set(stored.keys()) == set(weights)
            assert all(torch.equal(stored.get_tensor(key), weights[key].contiguous()) for key in weights)


def test_who_trained_is_not_in_the_folder_unless_asked_for(exported, call, examined, tmp_path):
    results, folder = exported("plain")
    assert strict_json(folder / NORMALIZER)["members"] == []
    words = (folder / "README.md").read_text() + (folder / NORMALIZER).read_text()
    rows = table(examined.phantoms / "manifest.csv")
    assert not any(row["patient"] in words or row["image"] in words for row in rows)
    assert str(examined.out) not in words and str(examined.phantoms) not in words
    home = tmp_path / "home"
    flags = [*METHODS["plain"].split(), "--inference.calibration", results.parent / "calibration"]
    assert export(call, home, "--members", "True", *flags).code == 0
    trained = next(examined.phantoms / row["image"] for row in rows if row["split"] == "train")
    with pytest.raises(UsageError, match="its score would flatter"):
        Normalizer.load(home).examine(trained)
    assert Normalizer.load(folder).examine(trained).known is False
    assert "keep the folder at home" in " ".join((home / "README.md").read_text().split())


def test_the_card_has_the_header_of_the_hub_and_the_figures_of_phase_4(exported):
    results, folder = exported("statistical")
    card = (folder / "README.md").read_text()
    start, header, body = card.split("---\n", 2)
    fields = dict(line.split(": ", 1) for line in header.splitlines() if ": " in line)
    assert start == "" and fields["license"] == "other" and fields["pipeline_tag"] == "image-segmentation"
    metrics = json.loads((results / "metrics.json").read_text())
    assert all(kind in body for kind in metrics["kinds"]) and f"{metrics['overall']['auroc']:.3f}" in body
    assert "not a medical device" in body and "4 validation normals" in body and "16 normal radiographs" in body


def test_a_card_without_labelled_images_says_so():
    facts = CardFacts(
        "g", "mit", "plain", (64, 128), "stretch", None, 4, None, 0.05, 1.0, 0.1, 0.1, False, False, None, {}
    )
    card = model_card(facts)
    assert "license: mit" in card and "No labelled test images" in card and "none were labelled" in card


@pytest.mark.parametrize("name", ["vae.safetensors", "calibration.safetensors", NORMALIZER])
def test_a_file_that_rotted_or_is_missing_is_named(name, exported, tmp_path):
    folder = copy_of(exported("plain")[1], tmp_path / "copy")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"{name} is missing or damaged"):
        load(folder)
    (folder / name).unlink()
    with pytest.raises(UsageError, match=f"{name} is missing or damaged"):
        load(folder)


def test_a_card_may_be_edited(exported, tmp_path):
    folder = copy_of(exported("plain")[1], tmp_path / "copy")
    (folder / "README.md").write_text("mine")
    assert load(folder).judge is not None


def test_contents_that_were_changed_are_refused(exported, tmp_path):
    folder = copy_of(exported("plain")[1], tmp_path / "copy")
    content = json.loads((folder / CONTENTS).read_text())
    del content["sha256"]["vae.safetensors"]
    (folder / CONTENTS).write_text(json.dumps(content))
    with pytest.raises(UsageError, match="contents.json is damaged"):
        load(folder)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no contents.json"):
        Normalizer.load(tmp_path)


def test_settings_of_ones_own_are_refused_for_a_folder(exported):
    with pytest.raises(UsageError, match="has its own settings and seed"):
        Normalizer.load(exported("plain")[1], settings=InferenceConfig(draws=3))


def test_checkpoints_alone_judge_no_file(examined):
    model = Normalizer.load(examined.phase1 / "checkpoint_best.pt", examined.phase3 / "checkpoint_best.pt")
    with pytest.raises(UsageError, match="checkpoints alone know no thresholds"):
        model.examine("patient.dcm")


def test_a_file_that_is_no_radiograph_is_told_without_its_folder(exported, tmp_path):
    (tmp_path / "note.dcm").write_text("no picture")
    with pytest.raises(ImageReadError, match="^note.dcm: "):
        Normalizer.load(exported("plain")[1]).examine(tmp_path / "note.dcm")


def test_an_export_without_a_calibration_names_phase_4(call, examined, tmp_path):
    result = export(call, tmp_path / "new", "--inference.method", "plain")
    assert result.code == 2 and "run python inference.py with the same flags first" in result.error


def test_a_folder_with_other_things_in_it_is_left_alone(call, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    result = export(call, tmp_path)
    assert result.code == 2 and "holds something else" in result.error and (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "add --out DIR"),
        (["--out", "x", "--members", "maybe"], "--members"),
        (["--out", "x", "--license", "a: b"], "--license takes"),
        (["--out", "x", "--inference.metod", "plain"], "did you mean --inference.method"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, words, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("export", *flags)
    assert result.code == 2 and words in result.error and not (tmp_path / "x").exists()


# ---------------------------------------------------------------- over an earlier export


@pytest.fixture
def again(call, exported, tmp_path):
    """A copy of the plain export, and a function that exports over it with more flags."""
    results, first = exported("plain")
    folder, phase4 = copy_of(first, tmp_path / "normalizer"), copy_of(results, tmp_path / "phase4")
    flags = [*METHODS["plain"].split(), "--inference.calibration", results.parent / "calibration"]

    def run(*more):
        return export(call, folder, *flags, "--inference.output", phase4, *more)

    return folder, phase4, run


def hashes(folder):
    return {path.name: sha256(path) for path in folder.iterdir()}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_export_that_is_broken_off_leaves_the_earlier_one_and_the_same_command_ends_it(error, again, monkeypatch):
    folder, _, run = again
    before = hashes(folder)

    def stop(*given):
        raise error

    for step in ("draw_example", "seal", "put_in_place"):
        with monkeypatch.context() as patch:
            patch.setattr(script, step, stop)
            assert run("--license", "mit").code in (2, 130)
        assert hashes(folder) == before
    assert run("--license", "mit").code == 0 and hashes(folder) != before
    assert not list(folder.parent.glob(".*exporting")) and not list(folder.parent.glob(".*before"))


def test_an_export_that_was_killed_is_cleared_away(again):
    folder, _, run = again
    staged, before = (folder.parent / f".{folder.name}.{name}" for name in ("exporting", "before"))
    staged.mkdir()
    (staged / "vae.safetensors").write_text("half")
    os.rename(folder, before)  # killed between the two names
    assert run().code == 0 and load(folder).judge is not None
    assert not staged.exists() and not before.exists()


def test_a_swap_that_fails_is_taken_back(again, monkeypatch):
    folder, _, run = again
    before, rename = hashes(folder), os.rename

    def fail(source, target):
        if str(source).endswith("exporting"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        assert run("--license", "mit").code == 2
    assert hashes(folder) == before


def test_a_card_that_was_edited_is_kept_at_every_export(again):
    folder, _, run = again
    (folder / "README.md").write_text("mine")
    for _ in range(2):
        result = run()
        assert result.code == 0 and "was edited and is kept" in result.out
        assert (folder / "README.md").read_text() == "mine"
        assert "README.md" not in strict_json(folder / CONTENTS)["sha256"]
    (folder / "README.md").unlink()
    assert "is kept" not in run().out and "license: other" in (folder / "README.md").read_text()


def test_a_file_that_no_export_wrote_is_refused_before_anything_is_written(again):
    folder, _, run = again
    (folder / "thesis.txt").write_text("mine")
    before = hashes(folder)
    result = run("--license", "mit")
    assert result.code == 2 and "'thesis.txt', 1 in all" in result.error and "move it away" in result.error
    assert hashes(folder) == before


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="names are UTF-8 there")
def test_a_name_that_is_not_utf_8_is_refused(call, tmp_path):
    result = export(call, os.fsdecode(bytes(tmp_path) + b"/\xff"))
    assert result.code == 2 and "is not UTF-8" in result.error and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- figures on the card


@pytest.fixture
def figures(exported, tmp_path):
    """metrics.json of the plain results, its calibration, and what `metrics_of` makes of a config."""
    results, folder = exported("plain")
    copied = copy_of(results, tmp_path / "phase4")
    calibration = load(folder).judge.calibration
    config = Config(inference=InferenceConfig(output=str(copied)))
    return copied / "metrics.json", calibration, config


def test_figures_of_the_same_settings_are_taken(figures, capsys):
    path, calibration, config = figures
    assert script.metrics_of(calibration, config) == strict_json(path) and capsys.readouterr().out == ""


@pytest.mark.parametrize("changed", ["top_share", "smooth_share", "pixel_fpr", "reader_sha256"])
def test_figures_of_other_settings_are_not_taken(changed, figures, capsys):
    _, calibration, config = figures
    other = replace(calibration, belongs_to={**calibration.belongs_to, changed: 0.123})
    assert script.metrics_of(other, config) is None
    assert "is of other checkpoints, settings or version: the card goes without figures" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b"\xff\xfe", b"{}", b"[" * 200_000, "kinds", None])
def test_metrics_that_are_damaged_or_missing_leave_the_card_without_figures(content, figures, capsys):
    path, calibration, config = figures
    if content is None:
        path.unlink()
    elif content == "kinds":
        path.write_text(json.dumps({name: value for name, value in strict_json(path).items() if name != "kinds"}))
    else:
        path.write_bytes(content)
    assert script.metrics_of(calibration, config) is None
    (line,) = capsys.readouterr().out.splitlines()
    assert "the card goes without figures" in line


def test_the_card_says_small_rates_and_odd_names_as_they_are():
    facts = CardFacts(
        'a"b', "mit", "plain", (64, 128), "stretch", None, 4, None, 0.005, 1.0, 0.1, 0.1, False, False, None, {}
    )
    card = model_card(facts)
    assert card.count("rate of 0.5 %") == 2 and "Normalizer.load('a\"b')" in card


# ---------------------------------------------------------------- what cannot be loaded


@pytest.mark.parametrize("device", ["nonsense", "mps", "cuda:99", 1.5])
def test_a_device_that_is_not_there_is_one_line(device, exported):
    with pytest.raises(UsageError, match="use cpu"):
        Normalizer.load(exported("plain")[1], device=device)


def test_cuda_without_a_gpu_is_one_line(exported, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match="torch sees 0 GPUs: check nvidia-smi, or use cpu"):
        Normalizer.load(exported("plain")[1], device="cuda")


@pytest.mark.parametrize(
    "change",
    [
        {"identity": None},
        {"unet": [1, 2]},
        {"unet": {"channels": 7}},
        {"normals": None},
        {"normals.file_sizes": None},
        {"normals.file_sizes": [[1, 2]]},
        {"settings": []},
        {"members": 3},
        {"seed": "a"},
        {"reader": {"settings": None}},
    ],
)
def test_content_that_was_changed_and_sealed_again_is_refused(change, exported, tmp_path):
    folder = copy_of(exported("plain")[1], tmp_path / "copy")
    content, contents = (unsealed(strict_json(folder / name)) for name in (NORMALIZER, CONTENTS))
    for name, value in change.items():
        part, _, inner = name.partition(".")
        content[part] = {**content[part], inner: value} if inner else value
    write_sealed_json(folder / NORMALIZER, content)
    contents["sha256"][NORMALIZER] = sha256(folder / NORMALIZER)
    write_sealed_json(folder / CONTENTS, contents)
    with pytest.raises(UsageError):
        load(folder)


@pytest.mark.parametrize("listed", [None, [], {}])
def test_contents_without_files_are_refused(listed, exported, tmp_path):
    folder = copy_of(exported("plain")[1], tmp_path / "copy")
    write_sealed_json(folder / CONTENTS, {"format": 1} if listed is None else {"format": 1, "sha256": listed})
    with pytest.raises(UsageError, match="damaged"):
        load(folder)


def test_a_path_that_is_too_long_and_json_that_is_too_deep_are_one_line(tmp_path):
    with pytest.raises(UsageError, match="name one that python export.py wrote|name a folder"):
        Normalizer.load("a" * 5000)
    (tmp_path / CONTENTS).write_text("[" * 200_000)
    with pytest.raises(UsageError, match="contents.json is damaged"):
        Normalizer.load(tmp_path)


def test_a_dicom_object_that_is_no_radiograph_is_refused(exported, tmp_path):
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.66.4"  # a segmentation
    dataset.Modality = "SEG"
    dataset.save_as(tmp_path / "seg.dcm")
    assert not read_header(tmp_path / "seg.dcm").is_image
    with pytest.raises(ImageReadError, match=r"seg.dcm: a DICOM object that is no image of a radiograph"):
        Normalizer.load(exported("plain")[1]).examine(tmp_path / "seg.dcm")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same_numbers(exported, made):
    _, folder = exported("statistical")
    on_cpu, on_gpu = (Normalizer.load(folder, device=device).examine(listed(made)[0]) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(on_gpu.map, on_cpu.map, rtol=1e-3, atol=1e-3)
    assert on_gpu.score == pytest.approx(on_cpu.score, rel=1e-3)
