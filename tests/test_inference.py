"""Phase 4 on a dozen phantoms, run as a user runs it, and what it leaves on disk."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pipeline import flags_of, opens, strict_json, table
from sklearn.metrics import roc_auc_score

from command_line import parse_command
from files import load_checkpoint, save_checkpoint, sha256
from phantoms import phantom
from runtime import plain


def test_every_artefact_of_phase_4_is_there(examined):
    fixed = {"scores.csv", "maps", "metrics.json", "calibration.npz", "config.json", "lookup_local_only.csv"}
    assert fixed == {path.name for path in examined.phase4.iterdir() if not path.match("result_*.png")}


def test_phase_4_writes_the_config_it_ran_with(examined):
    expected = plain(parse_command("", flags_of(examined.out, examined.phantoms)).config)
    assert strict_json(examined.phase4 / "config.json") == expected


def test_every_picture_of_phase_4_is_a_png(examined):
    assert all(opens(path) for path in examined.phase4.glob("*.png"))


def test_scores_have_one_row_per_test_image_with_its_label_and_kind(examined):
    rows, listed = (
        table(examined.phase4 / "scores.csv"),
        [row for row in table(examined.phantoms / "manifest.csv") if row["split"] == "test"],
    )
    assert list(rows[0]) == ["index", "name", "score", "flagged", "label", "kind"]
    assert [(row["label"], row["kind"]) for row in rows] == [(row["label"], row["kind"]) for row in listed]
    assert [row["index"] for row in rows] == [f"{index:03d}" for index in range(9)] and len(
        {row["name"] for row in rows}
    ) == 9


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
        assert float(row["score"]) == pytest.approx(
            np.sort(anomaly_map.ravel())[-82:].mean(), abs=1e-5
        )  # 82 is 1 % of 64 x 128


def test_metrics_are_strict_json_by_kind_and_agree_with_the_scores(examined):
    metrics, rows = strict_json(examined.phase4 / "metrics.json"), table(examined.phase4 / "scores.csv")
    labels, scores = [int(row["label"]) for row in rows], [float(row["score"]) for row in rows]
    assert set(metrics["kinds"]) == set(phantom.LESIONS) and metrics["validation_normals"]["images"] == 4
    assert metrics["overall"]["auroc"] == pytest.approx(roc_auc_score(labels, scores))


def test_thresholds_come_from_the_validation_normals(examined):
    with np.load(examined.phase4 / "calibration.npz", allow_pickle=False) as calibration:
        scores, threshold = calibration["scores"], float(calibration["score_threshold"])
        assert len(scores) == 4 and (scores > threshold).mean() <= 0.05
        assert str(calibration["flow_sha256"]) == sha256(examined.phase3 / "checkpoint_best.pt")
    for row in table(examined.phase4 / "scores.csv"):
        assert int(row["flagged"]) == (float(row["score"]) > threshold) or abs(float(row["score"]) - threshold) < 1e-5


def test_as_many_figures_as_asked_for_of_different_kinds(examined):
    drawn = [path.stem.removeprefix("result_") for path in examined.phase4.glob("result_*.png")]
    assert (
        len(drawn) == 3
        and len({row["kind"] for row in table(examined.phase4 / "scores.csv") if row["index"] in drawn}) == 3
    )


# ---------------------------------------------------------------- phase 4 on other terms


def scores_in(folder):
    return [float(row["score"]) for row in table(folder / "scores.csv")]


@pytest.mark.parametrize(
    "flags",
    [
        ["--inference.batch-size", 1],
        [
            "--unet.channels",
            32,
            32,
            32,
            "--unet.attention",
            "False",
            "False",
            "True",
            "--unet.norm-groups",
            16,
            "--vae.scratch-channels",
            8,
            8,
            8,
            8,
        ],
    ],
    ids=["another batch size", "another model in today's config"],
)
def test_scores_do_not_depend_on(flags, call, examined, tmp_path):
    assert call("inference", *flags, "--inference.figures", 0, "--inference.save-maps", "False").code == 0
    assert scores_in(tmp_path / "phase4_inference") == pytest.approx(scores_in(examined.phase4), abs=1e-5)
    assert not list(tmp_path.glob("phase4_inference/*.png")) and not (tmp_path / "phase4_inference" / "maps").exists()


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
    assert [np.load(path).shape for path in sorted(out.glob("maps/*.npy"))] == [(90, 200)] * 2 and len(
        list(out.glob("result_*.png"))
    ) == 2
    assert not any(name in (out / "scores.csv").read_text() for name in ("Smith", "visit", "panoramic"))


def test_padded_maps_come_back_at_the_size_of_the_file(call, unlabelled, tmp_path):
    assert call("inference", "--data.test", unlabelled, "--data.fit", "pad").code == 0
    assert [np.load(path).shape for path in sorted(tmp_path.glob("phase4_inference/maps/*.npy"))] == [(90, 200)] * 2


def test_nothing_of_an_earlier_examination_stays(call, examined, unlabelled, tmp_path):
    out = shutil.copytree(examined.phase4, tmp_path / "phase4_inference")
    assert call("inference", "--data.test", unlabelled).code == 0
    assert not (out / "metrics.json").exists(), "metrics of other images lie beside these scores"
    assert sorted(path.name for path in out.glob("maps/*")) == ["000.npy", "001.npy"]
    assert sorted(path.name for path in out.glob("result_*")) == ["result_000.png", "result_001.png"]


def test_one_unreadable_file_is_skipped_and_named(call, unlabelled, tmp_path):
    (unlabelled / "panoramic" / "aaa.png").write_bytes(b"not a picture")
    assert call("inference", "--data.test", unlabelled).code == 0
    assert len(scores_in(tmp_path / "phase4_inference")) == 2
    assert [row["file"] for row in table(tmp_path / "phase4_inference" / "skipped_files.csv")] == ["aaa.png"]


def test_phase_4_without_phase_3_names_it(call, tmp_path):
    result = call("inference", "--inference.flow-checkpoint", tmp_path / "none.pt")
    assert (
        result.code == 2
        and result.error == f"error: {tmp_path / 'none.pt'} is missing: run python train_flowdiff.py first"
    )


def test_phase_4_without_phase_1_names_it(call, tmp_path):
    result = call("inference", "--inference.vae-checkpoint", tmp_path / "none.pt")
    assert result.code == 2
    assert result.error == f"error: {tmp_path / 'none.pt'} is missing: run python train_vae.py first"


def test_phase_4_refuses_another_vae_than_that_of_the_latents(call, made, tmp_path):
    content = load_checkpoint(made.phase1 / "checkpoint_best.pt", "vae", "")
    content["weights"]["autoencoder.decoder.conv_out.bias"] += 1
    save_checkpoint(tmp_path / "other.pt", "vae", {**content, "step": 7})
    result = call("inference", "--inference.vae-checkpoint", tmp_path / "other.pt")
    assert result.code == 2 and "another VAE" in result.error and "python extract_latents.py" in result.error


def test_a_wrong_path_to_examine_names_data_test(call, tmp_path):
    result = call("inference", "--data.test", tmp_path / "nowhere")
    assert result.code == 2 and result.error.startswith(f"error: {tmp_path / 'nowhere'} does not exist")
    assert "data.test" in result.error
