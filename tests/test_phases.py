"""The four phases on a dozen phantoms, run as a user runs them, and what they leave on disk.

The pipeline runs once per session, in subprocesses; variants of it run in this process, where torch is imported already.
"""

import csv
import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from sklearn.metrics import roc_auc_score

from command_line import parse_config
from dataset import RadiographDataset
from files import load_checkpoint, save_checkpoint, sha256
from model import rebuild_vae
from phantoms import phantom
from radiographs.manifest import list_records, split_records
from runtime import plain, read_log, run_script

ROOT = Path(__file__).parent.parent
PHASES = ["train_vae", "extract_latents", "train_flowdiff", "inference"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
COPIES = 2
SETTINGS = f"""
    --preset demo --data.height 64 --data.width 128 --runtime.precision no
    --vae.pretrained scratch --vae.freeze-encoder False --vae.scratch-channels 8 8 16 16 --vae.steps 6 --vae.validate-every 3 --vae.batch-size 2
    --latent.augmented-copies {COPIES}
    --flowdiff.total-steps 8 --flowdiff.phase1-steps 4 --flowdiff.identity-warmup-start 3 --flowdiff.identity-warmup-end 6
    --flowdiff.validate-every 4 --flowdiff.sample-every 4 --flowdiff.batch-size 4
    --unet.channels 16 32 --unet.attention False True --unet.norm-groups 8 --unet.attention-head-dim 8 --inference.figures 3 --inference.top-share 0.01
""".split()


def flags_of(outputs, data, *more):
    return [*SETTINGS, "--outputs", str(outputs), "--data.root", str(data), *map(str, more)]


def shell(*command):
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.fixture(scope="session")
def made(tmp_path_factory, worker_id):
    """Phantoms, and what the four scripts made of them; once per session, also where pytest-xdist runs several processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "pipeline"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            phantom.write_dataset(
                folder / "phantoms", train=12, val=4, test_normal=3, test_per_lesion=1, height=64, width=128, workers=1
            )
            (folder / "printed.txt").write_text("".join(run_or_tell(script, folder) for script in PHASES))
    if not (folder / "printed.txt").exists():
        pytest.fail("the pipeline failed in the process that built it")
    out = folder / "run"
    phases = {
        "phase1": out / "phase1_vae",
        "phase2": out / "phase2_latents",
        "phase3": out / "phase3_flowdiff",
        "phase4": out / "phase4_inference",
    }
    return SimpleNamespace(
        folder=folder, phantoms=folder / "phantoms", out=out, printed=(folder / "printed.txt").read_text(), **phases
    )


def run_or_tell(script, folder):
    result = shell(f"{script}.py", *flags_of(folder / "run", folder / "phantoms"))
    assert result.returncode == 0, f"{script}.py:\n{result.stderr}"
    return result.stdout


@pytest.fixture
def call(made, monkeypatch, capsys, tmp_path):
    """Run a phase here, reading from `made` and writing to a folder of this test: exit code, stdout, last line of stderr."""
    monkeypatch.chdir(ROOT)
    torch.set_num_threads(1)
    given = {
        "extract_latents": ["--latent.vae-checkpoint", made.phase1 / "checkpoint_best.pt"],
        "train_flowdiff": [
            "--flowdiff.vae-checkpoint",
            made.phase1 / "checkpoint_best.pt",
            "--flowdiff.latents",
            made.phase2,
        ],
        "inference": [
            "--inference.vae-checkpoint",
            made.phase1 / "checkpoint_best.pt",
            "--inference.flow-checkpoint",
            made.phase3 / "checkpoint_best.pt",
        ],
    }

    def call(script, *flags, outputs=tmp_path):
        monkeypatch.setattr(
            sys, "argv", [f"{script}.py", *flags_of(outputs, made.phantoms, *given.get(script, []), *flags)]
        )
        code = 0
        try:
            run_script(importlib.import_module(script).main)
        except SystemExit as end:
            code = end.code
        shown = capsys.readouterr()
        return SimpleNamespace(code=code, out=shown.out, error=(shown.err.replace("\r", "\n").splitlines() or [""])[-1])

    return call


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def opens(path):
    with Image.open(path) as image:
        image.load()
        return image.format == "PNG" and path.stat().st_size > 10_000


def strict_json(path):
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


# ---------------------------------------------------------------- what each phase leaves behind


def test_every_artefact_is_there_and_nothing_half_written(made):
    train = {"checkpoint_best.pt", "checkpoint_last.pt", "log.csv", "curves.png", "config.json"}
    assert train | {f"val_{step:06d}.png" for step in (0, 3, 6)} == {path.name for path in made.phase1.iterdir()}
    assert {"latents_train.npy", "latents_train.pkl", "latents_val.npy", "latents_val.pkl", "latents.json"} == {
        path.name for path in made.phase2.iterdir()
    }
    samples = {f"{name}_{step:06d}.png" for name in ("samples", "normals") for step in (4, 8)}
    assert train | samples | {"checkpoint_generative.pt"} == {path.name for path in made.phase3.iterdir()}
    fixed = {"scores.csv", "maps", "metrics.json", "calibration.npz", "config.json", "lookup_local_only.csv"}
    assert fixed == {path.name for path in made.phase4.iterdir() if not path.match("result_*.png")}


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("phase1_vae/checkpoint_best.pt", "vae"),
        ("phase1_vae/checkpoint_last.pt", "vae-training"),
        ("phase3_flowdiff/checkpoint_best.pt", "flowdiff"),
        ("phase3_flowdiff/checkpoint_generative.pt", "flowdiff"),
        ("phase3_flowdiff/checkpoint_last.pt", "flowdiff-training"),
    ],
)
def test_checkpoints_say_what_they_are_and_hold_finite_weights(made, place, kind):
    content = load_checkpoint(made.out / place, kind, "")
    assert content["step"] > 0 and all(torch.isfinite(weight).all() for weight in content["weights"].values())


@pytest.mark.parametrize("phase", ["phase1", "phase3", "phase4"])
def test_every_phase_writes_the_config_it_ran_with(made, phase):
    expected = plain(parse_config("", flags_of(made.out, made.phantoms)))
    folder = getattr(made, phase)
    assert strict_json(folder / "config.json") == expected
    if phase != "phase4":
        assert torch.load(folder / "checkpoint_best.pt", weights_only=True)["config"] == expected


def test_latents_are_float32_in_c_order_one_row_per_listed_path(made):
    for split, images, copies in (("train", 12, COPIES), ("val", 4, 0)):
        rows = np.load(made.phase2 / f"latents_{split}.npy", mmap_mode="r", allow_pickle=False)
        assert (
            rows.shape == (images * (1 + copies), 4, 8, 16)
            and rows.dtype == np.dtype("<f4")
            and rows.flags.c_contiguous
        )
        paths = pickle.loads((made.phase2 / f"latents_{split}.pkl").read_bytes())
        assert (
            type(paths) is list
            and len(paths) == len(rows)
            and all(type(path) is str and Path(path).is_file() for path in paths)
        )
        assert paths == paths[:images] * (1 + copies) and len(set(paths)) == images


def test_latents_json_says_where_they_come_from(made):
    description = strict_json(made.phase2 / "latents.json")
    assert description["vae_sha256"] == sha256(made.phase1 / "checkpoint_best.pt")
    assert (description["shape"], description["rows"], description["images"]) == (
        [4, 8, 16],
        {"train": 36, "val": 4},
        {"train": 12, "val": 4},
    )
    assert description["sources"]["train"] == pickle.loads((made.phase2 / "latents_train.pkl").read_bytes())
    assert isinstance(description["outliers"], list) and description["config"]["latent"]["augmented_copies"] == COPIES


def test_standardized_training_latents_have_mean_zero_and_variance_one(made):
    description, rows = (
        strict_json(made.phase2 / "latents.json"),
        np.load(made.phase2 / "latents_train.npy").astype(np.float64),
    )
    mean, std = (np.reshape(description[name], (1, 4, 1, 1)) for name in ("mean", "std"))
    z = (rows - mean) / std
    np.testing.assert_allclose(z.mean((0, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(z.std((0, 2, 3)), 1, atol=1e-6)


def test_a_latent_is_the_posterior_mean_of_its_radiograph(made):
    config = parse_config("", flags_of(made.out, made.phantoms))
    records = split_records(list_records(made.phantoms), config.data, 0)["train"]
    image = RadiographDataset(records, config.data)[5]["image"]
    vae = rebuild_vae(load_checkpoint(made.phase1 / "checkpoint_best.pt", "vae", ""))
    rows = np.load(made.phase2 / "latents_train.npy")
    np.testing.assert_allclose(rows[5], vae.autoencoder.encode(image[None]).latent_dist.mode()[0], atol=1e-5)
    for copy in (17, 29):
        assert np.abs(rows[copy] - rows[5]).max() > 1e-3  # augmented


def test_the_flow_checkpoint_carries_the_scale_and_the_vae_it_belongs_to(made):
    description, flow = (
        strict_json(made.phase2 / "latents.json"),
        load_checkpoint(made.phase3 / "checkpoint_best.pt", "flowdiff", ""),
    )
    assert (flow["mean"], flow["std"], flow["vae_sha256"]) == (
        description["mean"],
        description["std"],
        description["vae_sha256"],
    )


def test_logs_hold_every_term_as_it_enters_the_loss(made):
    vae, flow = read_log(made.phase1), read_log(made.phase3)
    assert vae["val/loss"][0] == [0, 3, 6]
    parts = sum(
        np.array(vae[f"val/{name}"][1]) for name in ("lambda_pix", "lambda_grad", "lambda_hf", "lambda_ssim", "beta_kl")
    )
    np.testing.assert_allclose(parts, vae["val/loss"][1], rtol=1e-4)
    assert {
        "train/lambda_diff",
        "train/lambda_flow",
        "train/lambda_id",
        "train/lambda_id_now",
        "val/objective",
        "val/id",
    } <= set(flow)


def test_every_picture_is_a_png(made):
    assert all(
        opens(path) for path in [*made.phase1.glob("*.png"), *made.phase3.glob("*.png"), *made.phase4.glob("*.png")]
    )


def test_scores_have_one_row_per_test_image_with_its_label_and_kind(made):
    rows, listed = (
        table(made.phase4 / "scores.csv"),
        [row for row in table(made.phantoms / "manifest.csv") if row["split"] == "test"],
    )
    assert list(rows[0]) == ["index", "name", "score", "flagged", "label", "kind"]
    assert [(row["label"], row["kind"]) for row in rows] == [(row["label"], row["kind"]) for row in listed]
    assert [row["index"] for row in rows] == [f"{index:03d}" for index in range(9)] and len(
        {row["name"] for row in rows}
    ) == 9


def test_scores_name_no_source(made):
    text = (made.phase4 / "scores.csv").read_text()
    for row in table(made.phantoms / "manifest.csv"):
        assert Path(row["image"]).stem not in text and row["patient"] not in text
    sources = {row["name"]: row["source"] for row in table(made.phase4 / "lookup_local_only.csv")}
    assert all(Path(sources[row["name"]]).is_file() for row in table(made.phase4 / "scores.csv"))


def test_the_score_is_the_mean_of_the_highest_hundredth_of_the_map(made):
    for row in table(made.phase4 / "scores.csv"):
        anomaly_map = np.load(made.phase4 / "maps" / f"{row['index']}.npy", allow_pickle=False)
        assert anomaly_map.shape == (64, 128) and anomaly_map.dtype == np.float32 and anomaly_map.min() >= 0
        assert float(row["score"]) == pytest.approx(
            np.sort(anomaly_map.ravel())[-82:].mean(), abs=1e-5
        )  # 82 is 1 % of 64 x 128


def test_metrics_are_strict_json_by_kind_and_agree_with_the_scores(made):
    metrics, rows = strict_json(made.phase4 / "metrics.json"), table(made.phase4 / "scores.csv")
    labels, scores = [int(row["label"]) for row in rows], [float(row["score"]) for row in rows]
    assert set(metrics["kinds"]) == set(phantom.LESIONS) and metrics["validation_normals"]["images"] == 4
    assert metrics["overall"]["auroc"] == pytest.approx(roc_auc_score(labels, scores))


def test_thresholds_come_from_the_validation_normals(made):
    with np.load(made.phase4 / "calibration.npz", allow_pickle=False) as calibration:
        scores, threshold = calibration["scores"], float(calibration["score_threshold"])
        assert len(scores) == 4 and (scores > threshold).mean() <= 0.05
        assert str(calibration["flow_sha256"]) == sha256(made.phase3 / "checkpoint_best.pt")
    for row in table(made.phase4 / "scores.csv"):
        assert int(row["flagged"]) == (float(row["score"]) > threshold) or abs(float(row["score"]) - threshold) < 1e-5


def test_as_many_figures_as_asked_for_of_different_kinds(made):
    drawn = [path.stem.removeprefix("result_") for path in made.phase4.glob("result_*.png")]
    assert (
        len(drawn) == 3
        and len({row["kind"] for row in table(made.phase4 / "scores.csv") if row["index"] in drawn}) == 3
    )


def test_each_phase_says_which_comes_next(made):
    assert [made.printed.count(f"next: python {script}.py") for script in PHASES[1:]] == [1, 1, 1]


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
def test_scores_do_not_depend_on(flags, call, made, tmp_path):
    assert call("inference", *flags, "--inference.figures", 0, "--inference.save-maps", "False").code == 0
    assert scores_in(tmp_path / "phase4_inference") == pytest.approx(scores_in(made.phase4), abs=1e-5)
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


def test_nothing_of_an_earlier_examination_stays(call, made, unlabelled, tmp_path):
    out = shutil.copytree(made.phase4, tmp_path / "phase4_inference")
    assert call("inference", "--data.test", unlabelled).code == 0
    assert not (out / "metrics.json").exists(), "metrics of other images lie beside these scores"
    assert sorted(path.name for path in out.glob("maps/*")) == ["000.npy", "001.npy"]
    assert sorted(path.name for path in out.glob("result_*")) == ["result_000.png", "result_001.png"]


def test_one_unreadable_file_is_skipped_and_named(call, unlabelled, tmp_path):
    (unlabelled / "panoramic" / "aaa.png").write_bytes(b"not a picture")
    assert call("inference", "--data.test", unlabelled).code == 0
    assert len(scores_in(tmp_path / "phase4_inference")) == 2
    assert [row["file"] for row in table(tmp_path / "phase4_inference" / "skipped_files.csv")] == ["aaa.png"]


# ---------------------------------------------------------------- order of the phases


@pytest.mark.parametrize(
    ("script", "remedy"),
    [
        ("extract_latents", "run python train_vae.py first"),
        ("train_flowdiff", "run python train_vae.py first"),
        ("inference", "run python train_vae.py first"),
    ],
)
def test_without_phase_1_every_phase_names_it(script, remedy, call, tmp_path):
    missing = [f"--{part}.vae-checkpoint" for part in ("latent", "flowdiff", "inference")]
    result = call(script, *(word for flag in missing for word in (flag, tmp_path / "none.pt")))
    assert result.code == 2 and result.error == f"error: {tmp_path / 'none.pt'} is missing: {remedy}"


def test_phase_3_without_phase_2_names_it(call, tmp_path):
    result = call("train_flowdiff", "--flowdiff.latents", tmp_path)
    assert (
        result.code == 2
        and result.error == f"error: {tmp_path / 'latents.json'} is missing: run python extract_latents.py first"
    )


def test_phase_4_without_phase_3_names_it(call, tmp_path):
    result = call("inference", "--inference.flow-checkpoint", tmp_path / "none.pt")
    assert (
        result.code == 2
        and result.error == f"error: {tmp_path / 'none.pt'} is missing: run python train_flowdiff.py first"
    )


@pytest.mark.parametrize(
    ("script", "flag"), [("train_flowdiff", "--flowdiff.vae-checkpoint"), ("inference", "--inference.vae-checkpoint")]
)
def test_another_vae_than_that_of_the_latents_is_refused(script, flag, call, made, tmp_path):
    content = load_checkpoint(made.phase1 / "checkpoint_best.pt", "vae", "")
    content["weights"]["autoencoder.decoder.conv_out.bias"] += 1
    save_checkpoint(tmp_path / "other.pt", "vae", {**content, "step": 7})
    result = call(script, flag, tmp_path / "other.pt")
    assert result.code == 2 and "another VAE" in result.error and "python extract_latents.py" in result.error


# ---------------------------------------------------------------- training, stopped and taken up again


def train_until_killed(script, flags, checkpoint):
    """Kill -9 as soon as there is something to resume from."""
    process = subprocess.Popen(
        [sys.executable, f"{script}.py", *flags],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    error = process.communicate()[1].decode()
    assert checkpoint.exists(), error
    return torch.load(checkpoint, weights_only=True)["step"]


QUICK = ["--flowdiff.validate-every", 8, "--flowdiff.sample-every", 8]  # no pictures on the way
LONGER = {
    "train_vae": ["--vae.steps", 20, "--vae.validate-every", 10, "--runtime.checkpoint-every", 4],
    "train_flowdiff": [
        *(
            "--flowdiff.total-steps",
            30,
            "--flowdiff.phase1-steps",
            10,
            "--flowdiff.identity-warmup-start",
            5,
            "--flowdiff.identity-warmup-end",
            20,
        ),
        *("--flowdiff.validate-every", 15, "--flowdiff.sample-every", 30, "--runtime.checkpoint-every", 4),
    ],
}


@pytest.mark.parametrize(
    ("script", "phase", "total"), [("train_vae", "phase1_vae", 20), ("train_flowdiff", "phase3_flowdiff", 30)]
)
def test_a_killed_run_taken_up_again_ends_where_an_uninterrupted_one_does(script, phase, total, call, made, tmp_path):
    whole, broken, longer = tmp_path / "whole", tmp_path / "broken", LONGER[script]
    source = (
        ["--flowdiff.vae-checkpoint", made.phase1 / "checkpoint_best.pt", "--flowdiff.latents", made.phase2]
        if script == "train_flowdiff"
        else []
    )
    step = train_until_killed(
        script, flags_of(broken, made.phantoms, *source, *longer), broken / phase / "checkpoint_last.pt"
    )
    assert 0 < step < total
    resumed = call(script, *longer, outputs=broken)
    assert resumed.code == 0 and f"continuing from step {step} of {total}" in resumed.out
    assert call(script, *longer, outputs=whole).code == 0
    for name, parts in (
        ("checkpoint_last.pt", ("weights", "ema", "optimizer")),
        ("checkpoint_best.pt", ("weights", "scores")),
    ):
        ours, theirs = (torch.load(folder / phase / name, weights_only=True) for folder in (broken, whole))
        assert ours["step"] == theirs["step"]
        for part in set(parts) & set(theirs):
            same = [content[part]["state"] if part == "optimizer" else content[part] for content in (ours, theirs)]
            torch.testing.assert_close(*same, rtol=0, atol=0)
    assert without_speed(broken / phase) == without_speed(whole / phase)


def without_speed(folder):
    """The rows of log.csv; means over a stretch that the interruption cut in two are its own business."""
    return {
        name: series
        for name, series in read_log(folder).items()
        if name.startswith("val/") or name in ("train/lr", "train/lambda_id_now")
    }


@pytest.mark.parametrize(
    ("script", "flag", "value", "named"),
    [
        ("train_vae", "--vae.lr", 0.01, "vae.lr was 0.0002, now 0.01"),
        ("train_flowdiff", "--flowdiff.lambda-flow", 0.7, "flowdiff.lambda_flow was 0.5, now 0.7"),
    ],
)
def test_a_changed_config_does_not_resume_and_names_the_field(script, flag, value, named, call, made):
    result = call(script, flag, value, outputs=made.out)
    assert result.code == 2 and f"({named})" in result.error and "--runtime.resume False" in result.error


def test_starting_anew_is_a_flag(call, made, tmp_path):
    shutil.copytree(made.phase3, tmp_path / "phase3_flowdiff")
    result = call("train_flowdiff", *QUICK, "--flowdiff.lambda-flow", 0.7, "--runtime.resume", "False")
    assert result.code == 0 and "continuing" not in result.out
    assert (
        load_checkpoint(tmp_path / "phase3_flowdiff" / "checkpoint_last.pt", "flowdiff-training", "")["config"][
            "flowdiff"
        ]["lambda_flow"]
        == 0.7
    )


def test_a_finished_run_started_again_changes_nothing(call, made, tmp_path):
    out = shutil.copytree(made.phase3, tmp_path / "phase3_flowdiff")
    before = sha256(out / "checkpoint_best.pt"), (out / "log.csv").read_text()
    assert call("train_flowdiff").code == 0
    assert (sha256(out / "checkpoint_best.pt"), (out / "log.csv").read_text()) == before


# ---------------------------------------------------------------- other ways to train


def test_the_identity_loss_runs_in_pixels_through_a_walk_of_several_steps(call, tmp_path):
    walk = ["--flowdiff.identity-space", "pixel", "--flowdiff.identity-solver", "heun", "--flowdiff.identity-steps", 2]
    result = call("train_flowdiff", *QUICK, *walk)
    assert result.code == 0, result.error
    log = read_log(tmp_path / "phase3_flowdiff")
    assert log["train/lambda_id"][1][-1] > 0 and log["train/lambda_id_now"][1][-1] == pytest.approx(0.1)


def test_the_weight_of_the_identity_is_zero_before_its_warm_up(call, tmp_path):
    late = [
        *QUICK,
        "--flowdiff.identity-warmup-start",
        8,
        "--flowdiff.identity-warmup-end",
        9,
        "--flowdiff.log-every",
        1,
    ]
    assert call("train_flowdiff", *late).code == 0
    log = read_log(tmp_path / "phase3_flowdiff")
    assert log["train/lambda_id_now"][1] == [0.0] * 8 and "train/id" not in log


def test_two_processes_train_one_network(made, tmp_path):
    source = ["--flowdiff.vae-checkpoint", made.phase1 / "checkpoint_best.pt", "--flowdiff.latents", made.phase2]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train_flowdiff.py"]
    result = shell(*launch, *flags_of(tmp_path, made.phantoms, *source, *QUICK))
    assert result.returncode == 0, result.stderr[-3000:]
    assert (
        "2 process(es)" in result.stdout
        and load_checkpoint(tmp_path / "phase3_flowdiff" / "checkpoint_best.pt", "flowdiff", "")["step"] <= 8
    )
    assert read_log(tmp_path / "phase3_flowdiff")["train/lambda_id"][1][-1] > 0
