"""Phase 4 on a dozen phantoms, run as a user runs it, and what it leaves on disk."""

import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.ndimage as ndi
import torch
from PIL import Image
from pipeline import flags_of, opens, strict_json, table
from sklearn.metrics import roc_auc_score

import conclusion
import dataset
import examination
import interruption
from calibration import Calibration
from checks import UsageError
from command_line import parse_command
from config import Config, InferenceConfig
from files import load_checkpoint, save_checkpoint, sha256
from normalizer import Normalizer
from phantoms import phantom
from publishing import measure
from radiographs.geometry import content
from radiographs.manifest import list_records
from radiographs.reading import ImageReadError, read_radiograph
from reporting.lookup import LOOKUP
from results import UNFINISHED
from runtime import shareable

QUIET = ["--inference.figures", 0, "--inference.save-maps", "False", "--inference.report", "False"]


def scores_in(folder):
    return [float(row["score"]) for row in table(folder / "scores.csv")]


def listed_test_rows(made):
    return [row for row in table(made.phantoms / "manifest.csv") if row["split"] == "test"]


# ---------------------------------------------------------------- what it leaves behind


def test_every_artefact_of_phase_4_is_there_and_nothing_unfinished(examined):
    fixed = {"scores.csv", "maps", "metrics.json", "config.json", "lookup_local_only.csv"}
    fixed |= {".results.lock", "examination.json", "report.html", "report"}
    assert fixed == {path.name for path in examined.phase4.iterdir() if not path.match("result_*.png")}
    assert {path.name for path in (examined.out / "calibration").glob("[!.]*")} == {
        "statistical.npz",
        "statistical.json",
    }


def test_phase_4_writes_the_config_it_ran_with(examined):
    expected = shareable(parse_command("", flags_of(examined.out, examined.phantoms)).config)
    assert strict_json(examined.phase4 / "config.json") == expected


def test_every_picture_of_phase_4_is_a_png(examined):
    assert all(opens(path) for path in examined.phase4.glob("*.png"))


def test_scores_have_one_row_per_test_image_in_the_order_of_the_input(examined):
    rows, listed = table(examined.phase4 / "scores.csv"), listed_test_rows(examined)
    assert list(rows[0]) == ["index", "name", "score", "p_value", "flagged", "label", "kind", "remarks"]
    assert [(row["label"], row["kind"]) for row in rows] == [(row["label"], row["kind"]) for row in listed]
    assert [row["index"] for row in rows] == [f"{index:03d}" for index in range(9)]
    assert len({row["name"] for row in rows}) == 9


def test_scores_name_no_source(examined):
    text = (examined.phase4 / "scores.csv").read_text()
    for row in table(examined.phantoms / "manifest.csv"):
        assert Path(row["image"]).stem not in text and row["patient"] not in text
    sources = {row["name"]: row["source"] for row in table(examined.phase4 / "lookup_local_only.csv")}
    assert all(Path(sources[row["name"]]).is_file() for row in table(examined.phase4 / "scores.csv"))


def test_the_score_is_the_mean_of_the_highest_hundredth_of_the_map(examined):
    for row in table(examined.phase4 / "scores.csv"):
        anomaly_map = np.load(examined.phase4 / "maps" / f"{row['index']}.npy", allow_pickle=False)
        assert anomaly_map.shape == (64, 128) and anomaly_map.dtype == np.float32 and anomaly_map.min() >= 0
        highest = np.sort(anomaly_map.ravel())[-82:]  # 1 % of 64 x 128
        assert float(row["score"]) == pytest.approx(highest.mean(), abs=1e-5)


def test_metrics_are_strict_json_by_kind_and_agree_with_the_scores(examined):
    metrics, rows = strict_json(examined.phase4 / "metrics.json"), table(examined.phase4 / "scores.csv")
    labels, scores = [int(row["label"]) for row in rows], [float(row["score"]) for row in rows]
    assert set(metrics["kinds"]) == set(phantom.LESIONS) and metrics["validation_normals"]["images"] == 4
    assert metrics["overall"]["auroc"] == pytest.approx(roc_auc_score(labels, scores))


def test_thresholds_and_p_values_come_from_the_validation_normals(examined):
    known = Calibration.load(examined.out / "calibration", "statistical")
    threshold = known.score_threshold(0.05)
    assert len(known.scores) == 4 and (known.scores > threshold).mean() <= 0.05
    assert known.belongs_to["flow_sha256"] == sha256(examined.phase3 / "checkpoint_best.pt")
    for row in table(examined.phase4 / "scores.csv"):
        score = float(row["score"])
        assert int(row["flagged"]) == (score > threshold) or abs(score - threshold) < 1e-5
        assert float(row["p_value"]) in (0.2, 0.4, 0.6, 0.8, 1.0)


def test_as_many_figures_as_asked_for_of_different_kinds(examined):
    drawn = [path.stem.removeprefix("result_") for path in examined.phase4.glob("result_*.png")]
    kinds = {row["kind"] for row in table(examined.phase4 / "scores.csv") if row["index"] in drawn}
    assert len(drawn) == 3 and len(kinds) == 3


def test_the_last_lines_name_the_figure_with_the_highest_score_and_the_report(examined):
    look, last = examined.printed.splitlines()[-2:]
    assert Path(re.fullmatch(r"open (.*) in a browser: .*", last).group(1)).is_file()
    figure = Path(re.fullmatch(r"look at (.*): .*", look).group(1))
    scores = {row["index"]: float(row["score"]) for row in table(examined.phase4 / "scores.csv")}
    drawn = [path.stem.removeprefix("result_") for path in examined.phase4.glob("result_*.png")]
    assert figure.is_file() and figure.stem.removeprefix("result_") == max(drawn, key=scores.get)


def test_the_optimism_of_the_threshold_is_said_where_it_is_printed(examined):
    assert "the same normals chose the checkpoints" in examined.printed


@pytest.mark.parametrize(("flagged", "count", "told"), [(17, 20, True), (16, 20, False), (19, 19, False)])
def test_more_flagged_than_can_be_ill_ask_for_other_normals(flagged, count, told, monkeypatch, tmp_path):
    said, unremarked = [], dict.fromkeys(conclusion.REMARKS, False)
    monkeypatch.setattr(conclusion, "warn", said.append)
    entries = [
        {"index": number, "row": ["", "", "", "", int(number < flagged)], "score": 1.0, "figure": "", **unremarked}
        for number in range(count)
    ]
    known = Calibration("plain", {}, np.arange(40.0), 1.0, {}, 0.1, 0.1)
    config = Config(inference=InferenceConfig(output=str(tmp_path), report=False))
    conclusion.conclude(entries, known, None, config)
    assert any(f"{flagged} of {count} images are flagged" in line for line in said) == told


# ---------------------------------------------------------------- the plain map


def test_the_plain_map_is_the_formula_of_the_mission_between_the_file_and_g(call, made, tmp_path):
    flags = ["--inference.method", "plain", "--inference.figures", 0, "--inference.smooth-share", 0]
    assert call("inference", *flags).code == 0
    settings = InferenceConfig(solver="one_step", draws=2)
    vae, flow = (made.out / place / "checkpoint_best.pt" for place in ("phase1_vae", "phase3_flowdiff"))
    G = Normalizer.load(vae, flow, settings)
    for index, row in list(enumerate(listed_test_rows(made)))[:3]:
        x = G.read(made.phantoms / row["image"])
        residual = (x - G(x))[0, 0].double().numpy()
        sobel = [ndi.sobel(residual, axis=axis, mode="nearest") / 8 for axis in (0, 1)]
        expected = np.abs(residual) + 0.5 * np.abs(sobel).mean(0)
        expected += 0.3 * np.abs(ndi.laplace(residual, mode="nearest"))
        ours = np.load(tmp_path / "phase4_inference" / "maps" / f"{index:03d}.npy")
        np.testing.assert_allclose(ours, expected, atol=1e-4)


# ---------------------------------------------------------------- stopped, taken up again, asked for again


def results_in(folder):
    """Every file of an examination but the table that leads back, whose names are of that folder alone."""
    names = ("*.png", "maps/*.npy", "report/*.*", "metrics.json")
    return {path.relative_to(folder): path.read_bytes() for name in names for path in folder.glob(name)}


@pytest.mark.parametrize("stop", [1, 3])
def test_a_stopped_examination_goes_on_and_ends_as_one_that_was_not(stop, call, examined, tmp_path, monkeypatch):
    """Nine images, two at a time, one of them unreadable."""
    data = tmp_path / "phantoms"
    shutil.copytree(examined.phantoms, data)
    first = next(row for row in listed_test_rows(examined))
    (data / first["image"]).write_bytes(b"not a picture")
    known = ["--inference.calibration", examined.out / "calibration", "--inference.batch-size", 2]
    known += ["--data.max-bad-share", 0.5]
    examine, seen = Normalizer.examine, []

    def examine_and_be_told(self, images, times):
        seen.append(len(images))
        if len(seen) == stop:
            interruption._on_signal(signal.SIGTERM, None)
        return examine(self, images, times)

    whole = tmp_path / "whole"
    with pytest.warns(UserWarning, match="1 of 9 files"):
        assert call("inference", *known, data=data, outputs=whole).code == 0
    monkeypatch.setattr(Normalizer, "examine", examine_and_be_told)
    stopped = call("inference", *known, data=data)
    assert stopped.code == 143
    assert stopped.error == f"interrupted by SIGTERM: the same command goes on after {2 * stop} of 9 images"
    with pytest.warns(UserWarning, match="1 of 9 files"):
        resumed = call("inference", *known, data=data)
    assert resumed.code == 0 and f"continuing after {2 * stop} of 9 images" in resumed.out
    assert sum(seen) == 8  # none twice
    ours, theirs = tmp_path / "phase4_inference", whole / "phase4_inference"
    assert results_in(ours) == results_in(theirs)
    assert scores_in(ours) == scores_in(theirs)
    names = [row["name"] for row in table(ours / "scores.csv")]
    assert names == [row["name"] for row in table(ours / LOOKUP) if row["index"] != f"{0:03d}"]
    assert "1 skipped" in resumed.out


@pytest.mark.parametrize(
    ("spoilt", "reason"), [(b"no picture", "its mask .* cannot be used"), (None, "its mask .* has")]
)
def test_a_mask_that_cannot_be_used_is_an_error_of_its_image(spoilt, reason, call, examined, tmp_path):
    """An abnormal image is never taken for one without a mask, nor lost without a word."""
    data = tmp_path / "phantoms"
    shutil.copytree(examined.phantoms, data)
    row = next(row for row in listed_test_rows(examined) if row["mask"])
    if spoilt is None:
        Image.new("L", (40, 30), 255).save(data / row["mask"])
    else:
        (data / row["mask"]).write_bytes(spoilt)
    known = ["--inference.calibration", examined.out / "calibration", "--data.max-bad-share", 0.5, *QUIET]
    with pytest.warns(UserWarning, match="1 of 9 files"):
        result = call("inference", *known, data=data)
    assert result.code == 0 and "8 images examined, 1 skipped" in result.out
    (skipped,) = table(tmp_path / "phase4_inference" / "skipped_local_only.csv")
    assert skipped["file"] == Path(row["image"]).name and re.match(reason, skipped["reason"])
    kinds = strict_json(tmp_path / "phase4_inference" / "metrics.json")["kinds"]
    assert row["kind"] not in kinds


def test_an_examination_that_is_stopped_while_results_are_moved_ends_as_one_that_was_not(
    call, examined, tmp_path, monkeypatch
):
    known, moves, replace = ["--inference.calibration", examined.out / "calibration"], [], os.replace

    def replace_and_be_told(source, target):
        if UNFINISHED in str(source) and not str(source).endswith(".tmp"):
            moves.append(target)
            if len(moves) == 5:
                raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_and_be_told)
        stopped = call("inference", *known)
    assert stopped.code == 130 and stopped.error.endswith("the same command goes on after 9 of 9 images")
    with monkeypatch.context() as patch:
        patch.setattr(Normalizer, "examine", lambda *given: pytest.fail("examined again"))
        assert call("inference", *known).code == 0
    out = tmp_path / "phase4_inference"
    assert results_in(out) == results_in(examined.phase4) and scores_in(out) == scores_in(examined.phase4)
    assert not (out / UNFINISHED).exists()


def test_a_file_that_could_not_be_read_and_now_can_is_examined(call, examined, tmp_path, monkeypatch):
    known = ["--inference.calibration", examined.out / "calibration", "--data.max-bad-share", 0.2, *QUIET]
    read, spoilt = dataset.read_radiograph, listed_test_rows(examined)[2]["image"]

    def want_of_memory(path):
        if str(path).endswith(spoilt):
            raise ImageReadError(path, "the machine has too little memory for it")
        return read(path)

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="1 of 9 files"):
        patch.setattr(dataset, "read_radiograph", want_of_memory)
        assert "1 skipped" in call("inference", *known).out
        assert "holds these results already" in call("inference", *known).out
        assert call("inference", *known, "--data.max-bad-share", 0.0).code == 2
    again = call("inference", *known)
    assert again.code == 0 and "9 images examined, 0 skipped" in again.out
    assert not (tmp_path / "phase4_inference" / "skipped_local_only.csv").exists()


@pytest.mark.parametrize("name", ["metrics.json", "scores.csv"])
def test_results_that_were_emptied_are_made_anew(name, call, examined, tmp_path):
    known = ["--inference.calibration", examined.out / "calibration", *QUIET]
    assert call("inference", *known).code == 0
    path = tmp_path / "phase4_inference" / name
    whole = path.read_bytes()
    path.write_bytes(b"")
    assert "already" not in call("inference", *known).out and path.read_bytes() == whole


def test_what_was_examined_is_not_examined_again_unless_asked(call, examined, tmp_path, monkeypatch):
    known = ["--inference.calibration", examined.out / "calibration", *QUIET]
    first = call("inference", *known)
    assert first.code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "phase4_inference").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("inference.read_batches", lambda *given: pytest.fail("examined again"))
        again = call("inference", *known)
    assert again.code == 0 and "holds these results already (--runtime.resume False examines anew)" in again.out
    assert again.out.split("\n\n", 1)[1] == first.out.split("\n\n", 1)[1]  # the same last words
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed <= {".results.lock", "skipped_local_only.csv"}
    for more in (["--runtime.resume", "False"], ["--inference.image-fpr", 0.2]):
        assert "already" not in call("inference", *known, *more).out


# ---------------------------------------------------------------- today's config against the checkpoints


def test_scores_do_not_depend_on_the_batch_size(call, examined, tmp_path):
    known = ["--inference.calibration", examined.out / "calibration"]
    assert call("inference", *known, "--inference.batch-size", 1, *QUIET).code == 0
    assert scores_in(tmp_path / "phase4_inference") == pytest.approx(scores_in(examined.phase4), abs=1e-5)
    assert not list(tmp_path.glob("phase4_inference/*.png")) and not (tmp_path / "phase4_inference" / "maps").exists()


def test_scores_do_not_depend_on_the_model_in_todays_config(call, examined, tmp_path):
    unet = "--unet.channels 32 32 32 --unet.attention False False True --unet.norm-groups 16"
    assert call("inference", *unet.split(), "--vae.scratch-channels", 8, 8, 8, 8, *QUIET).code == 0
    assert scores_in(tmp_path / "phase4_inference") == pytest.approx(scores_in(examined.phase4), abs=1e-4)


def test_size_and_percentiles_are_those_of_the_checkpoint_whatever_the_preset_says(
    made, examined, tmp_path, monkeypatch
):
    vae, flow = (made.out / place / "checkpoint_best.pt" for place in ("phase1_vae", "phase3_flowdiff"))
    command = parse_command("", ["--preset", "cpu", "--data.root", str(made.phantoms)])
    model = Normalizer.load(vae, flow, command.config.inference)
    adopted = command.adopt(model.artefact, str(flow)).data
    assert (command.config.data.height, adopted.height, adopted.width) == (256, 64, 128)
    assert (adopted.percentile_low, adopted.percentile_high) == (0.5, 99.5)


@pytest.mark.parametrize(("flag", "value"), [("--data.fit", "pad"), ("--data.height", 96), ("--data.split-seed", 4)])
def test_a_flag_that_contradicts_the_checkpoint_is_named(flag, value, call):
    result = call("inference", flag, value)
    assert result.code == 2 and result.error.startswith(f"error: {flag} {value} contradicts")


def test_another_vae_than_that_of_the_latents_is_refused(call, made, tmp_path):
    content = load_checkpoint(made.phase1 / "checkpoint_best.pt", "vae", "")
    content["weights"]["autoencoder.decoder.conv_out.bias"] += 1
    save_checkpoint(tmp_path / "other.pt", "vae", {**content, "step": 7})
    result = call("inference", "--inference.vae-checkpoint", tmp_path / "other.pt")
    assert result.code == 2 and "another VAE" in result.error and "python extract_latents.py" in result.error


def test_phase_4_without_phase_3_names_it(call, tmp_path):
    result = call("inference", "--inference.flow-checkpoint", tmp_path / "none.pt")
    assert result.code == 2
    assert result.error == f"error: {tmp_path / 'none.pt'} is missing: run python train_flowdiff.py first"


def test_an_export_by_several_processes_is_refused(call, monkeypatch, tmp_path):
    several = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    monkeypatch.setattr(examination, "start", lambda runtime: several)
    result = call("export", "--out", tmp_path / "normalizer")
    assert result.code == 2 and "start it with python, not torchrun" in result.error


# ---------------------------------------------------------------- calibration


def test_a_calibration_is_made_once_and_made_anew_under_other_settings(call, tmp_path):
    assert "calibration read from" not in call("inference", *QUIET).out
    before = scores_in(tmp_path / "phase4_inference")
    again = call("inference", *QUIET)
    assert "calibration read from" in again.out and scores_in(tmp_path / "phase4_inference") == before
    other = call("inference", *QUIET, "--calibration.levels", 0.2)
    assert "belongs to other checkpoints or settings: made anew" in other.out


def test_a_calibration_serves_where_the_normals_are_not_at_hand(call, examined, unlabelled, tmp_path):
    elsewhere = ["--inference.calibration", examined.out / "calibration", "--data.test", unlabelled]
    result = call("inference", *elsewhere, *QUIET, data=tmp_path / "nowhere")
    assert result.code == 0, result.error


# ---------------------------------------------------------------- other radiographs


@pytest.fixture
def unlabelled(tmp_path):
    """A folder of two radiographs of a patient's name, of a size of their own, without any label."""
    folder = tmp_path / "Smith_Jane" / "panoramic"
    folder.mkdir(parents=True)
    for patient in range(2):
        pixels = np.round(phantom.draw_phantom(9, patient, None, 90, 200).image * 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"visit_{patient}.png")
    return folder.parent


def test_a_folder_without_labels_is_examined_at_the_size_of_its_files(call, unlabelled, tmp_path):
    result, out = call("inference", "--data.test", unlabelled), tmp_path / "phase4_inference"
    assert result.code == 0 and "no metrics" in result.out and not (out / "metrics.json").exists()
    assert [(row["label"], row["kind"]) for row in table(out / "scores.csv")] == [("", "")] * 2
    assert [np.load(path).shape for path in sorted(out.glob("maps/*.npy"))] == [(90, 200)] * 2
    assert len(list(out.glob("result_*.png"))) == 2
    shown = (out / "scores.csv").read_text() + result.out
    assert not any(name in shown.replace(str(unlabelled), "") for name in ("Smith", "visit", "panoramic"))


def test_a_copy_of_a_training_radiograph_is_remarked_on_whatever_its_format(call, examined, unlabelled, tmp_path):
    source = next(record.path for record in list_records(examined.phantoms) if record.split == "train")
    pixels = read_radiograph(source).pixels
    picture = Image.fromarray(np.uint8(255 * (pixels - pixels.min()) / np.ptp(pixels)))
    picture.resize((150, 75)).save(unlabelled / "panoramic" / "z.jpg", quality=60)
    result = call("inference", "--data.test", unlabelled)
    assert "1 of 3 images look like radiographs that trained or validated" in result.out
    remarks = [row["remarks"] for row in table(tmp_path / "phase4_inference" / "scores.csv")]
    assert ["looks like a radiograph that trained" in remark for remark in remarks] == [False, False, True]


def test_names_are_those_of_the_lookup_after_a_kill_while_results_are_moved(call, unlabelled, tmp_path, monkeypatch):
    replace, out = os.replace, tmp_path / "phase4_inference"

    def killed(source, target):
        replace(source, target)
        if Path(target) == out / LOOKUP:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        assert call("inference", "--data.test", unlabelled).code == 130
    assert call("inference", "--data.test", unlabelled).code == 0
    assert [row["name"] for row in table(out / "scores.csv")] == [row["name"] for row in table(out / LOOKUP)]


def test_nothing_of_an_earlier_examination_stays(call, examined, unlabelled, tmp_path):
    out = shutil.copytree(examined.phase4, tmp_path / "phase4_inference")
    assert call("inference", "--data.test", unlabelled).code == 0
    assert not (out / "metrics.json").exists(), "metrics of other images lie beside these scores"
    assert sorted(path.name for path in out.glob("maps/*")) == ["000.npy", "001.npy"]
    assert sorted(path.name for path in out.glob("result_*")) == ["result_000.png", "result_001.png"]
    assert {path.name[:3] for path in out.glob("report/*")} == {"000", "001"}


def test_an_unreadable_file_is_named_and_the_others_keep_their_places(call, unlabelled, tmp_path):
    (unlabelled / "panoramic" / "visit_0b.png").write_bytes(b"not a picture")
    assert call("inference", "--data.test", unlabelled, "--data.max-bad-share", 0.5).code == 0
    out = tmp_path / "phase4_inference"
    assert [row["index"] for row in table(out / "scores.csv")] == ["000", "002"]
    assert [row["file"] for row in table(out / "skipped_local_only.csv")] == ["visit_0b.png"]


def test_too_many_unreadable_files_stop_the_run_and_leave_the_earlier_results(call, examined, unlabelled, tmp_path):
    out = shutil.copytree(examined.phase4, tmp_path / "phase4_inference")
    before = (out / "scores.csv").read_text()
    (unlabelled / "panoramic" / "aaa.png").write_bytes(b"not a picture")
    result = call("inference", "--data.test", unlabelled)
    assert result.code == 2 and "1 of 3 files cannot be read" in result.error and "data.max_bad_share" in result.error
    assert (out / "scores.csv").read_text() == before and (out / "metrics.json").exists()


def test_a_training_patient_is_refused_unless_told(call, made, tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    shutil.copy(made.phantoms / "images" / "train_0003.dcm", folder / "somebody.dcm")
    result = call("inference", "--data.test", folder)
    assert result.code == 2 and "1 of 1 radiographs are of patients who trained or validated" in result.error
    assert call("inference", "--data.test", folder, "--inference.examine-training-patients", "True", *QUIET).code == 0


def test_a_training_radiograph_is_recognised_by_its_content(call, made, tmp_path):
    import pydicom

    folder = tmp_path / "new"
    folder.mkdir()
    pixels = pydicom.dcmread(made.phantoms / "images" / "train_0003.dcm").pixel_array
    Image.fromarray(pixels.astype(np.uint16)).save(folder / "holiday.png")
    result = call("inference", "--data.test", folder)
    assert result.code == 2 and "radiograph 000" in result.error and "trained or validated" in result.error


# ---------------------------------------------------------------- method reader

READER = (
    "--inference.method reader --reader.features image latent --reader.steps 4 --reader.copies 1 --reader.width 8 "
    "--reader.tuned-steps 2"
)


def test_the_reader_is_trained_once_and_read_by_the_next_examination(call, examined, tmp_path):
    flags = [*READER.split(), "--inference.calibration", tmp_path / "calibration"]
    first = call("inference", *flags, "--inference.figures", 1)
    assert first.code == 0 and "trained the reader in" in first.out
    made = {path.name for path in (tmp_path / "calibration").iterdir()}
    assert made == {"reader.pt", "corruptions.png", "reader.npz", "reader.json", ".reader.lock", ".calibration.lock"}
    before = scores_in(tmp_path / "phase4_inference")
    assert len(before) == 9 and opens(next((tmp_path / "phase4_inference").glob("result_*.png")))
    again = call("inference", *flags, *QUIET)
    assert "reader read from" in again.out and "calibration read from" in again.out and "training" not in again.out
    assert scores_in(tmp_path / "phase4_inference") == pytest.approx(before, abs=1e-4)


def test_another_setting_trains_another_reader_and_says_so(call, examined, tmp_path):
    flags = [*READER.split(), "--inference.calibration", tmp_path / "calibration", *QUIET]
    call("inference", *flags)
    other = call("inference", *flags, "--reader.width", 16)
    assert other.code == 0 and "belongs to other checkpoints or settings: trained anew" in other.out


def test_an_unknown_fill_or_feature_is_one_line(call, examined):
    for flags, word in ((["--reader.fills", "glow"], "glow"), (["--reader.features", "smell"], "smell")):
        result = call("inference", *READER.split(), *flags)
        assert result.code == 2 and f"{word} is unknown, choose from" in result.error


@pytest.mark.parametrize("field", ["preprocessing", "members", "weights"])
def test_a_flow_checkpoint_without_what_phase_3_writes_is_refused(field, examined, tmp_path):
    content = torch.load(examined.out / "phase3_flowdiff/checkpoint_best.pt", weights_only=True)
    content[field] = {"of": "another version"} if field == "weights" else 7
    damaged = tmp_path / "flow.pt"
    torch.save({name: value for name, value in content.items() if value != 7}, damaged)
    with pytest.raises(UsageError, match=r"flow.pt is damaged: run python train_flowdiff.py"):
        Normalizer.load(examined.out / "phase1_vae/checkpoint_best.pt", damaged)


def test_metrics_are_of_radiographs_and_not_of_what_pad_added():
    """A map that knows nothing finds nothing, however much black lies around it."""
    random, config = np.random.default_rng(0), parse_command("", ["--data.fit", "pad"]).config
    config = replace(config, inference=replace(config.inference, method="plain"))
    rows, columns = content((100, 300), config.data.height, config.data.width, "pad")
    maps = np.full((6, config.data.height, config.data.width), -1e6)
    masks = np.zeros(maps.shape, bool)
    maps[:, rows, columns] = random.normal(size=maps[:, rows, columns].shape)
    masks[3:, rows.start + 10 : rows.start + 20, 40:60] = True
    labels = [0, 0, 0, 1, 1, 1]
    records = [SimpleNamespace(label=label, kind="cyst" * label, patient=str(i)) for i, label in enumerate(labels)]
    entries = [{"index": i, "row": [], "score": float(i), "shape": [100, 300]} for i in range(6)]
    kept = SimpleNamespace(entries=entries, kept=lambda i: (maps[i], masks[i] if labels[i] else None))
    known = SimpleNamespace(pixel_threshold=3.0, validation_normals=dict)
    found = measure(records, kept, known, config)["kinds"]["cyst"]
    assert found["aupro"] == pytest.approx(0.15, abs=0.03)  # a diagonal up to 30 %
