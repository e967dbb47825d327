"""Phases 1 to 3 on a dozen phantoms, run as a user runs them: what they leave on disk, and what they train."""

import pickle
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline import COPIES, ROOT, flags_of, next_line, opens, shell, sources, strict_json

import extract_latents
import interruption
import train_flowdiff
from command_line import parse_command
from dataset import open_datasets
from files import load_checkpoint, save_checkpoint, sha256
from flowdiff_model import FlowDiffUNet
from latent_dataset import LatentDataset
from model import RadiographVAE, rebuild_vae
from radiographs.manifest import list_records, split_records
from radiographs.membership import Membership
from run_log import read_log
from runtime import shareable

TAESD3 = ROOT.parent / "shared" / "models" / "taesd3"
QUICK = ["--flowdiff.validate-every", 8, "--flowdiff.sample-every", 8]  # no pictures on the way


def config_of(made):
    return parse_command("", flags_of(made.out, made.phantoms)).config


def datasets_of(made):
    """The radiographs of `made`, by split."""
    config = config_of(made)
    splits = split_records(list_records(made.phantoms, config.data.patient_from), config.data)
    return open_datasets(splits, config.data, 0, made.folder / "skipped_local_only.csv", quiet=True)


def best(folder, kind):
    return load_checkpoint(folder / "checkpoint_best.pt", kind, "")


# ---------------------------------------------------------------- what each phase leaves behind


def test_every_artefact_is_there_and_nothing_half_written(made):
    train = {"checkpoint_best.pt", "checkpoint_last.pt", "log.csv", "curves.png", "config.json", ".training.lock"}
    assert train | {f"val_{step:06d}.png" for step in (0, 3, 6)} == {path.name for path in made.phase1.iterdir()}
    latents = {f"latents_{split}.{suffix}" for split in ("train", "val") for suffix in ("npy", "pkl")}
    assert latents | {"latents.json", ".latents.lock"} == {path.name for path in made.phase2.iterdir()}
    samples = {f"{name}_{step:06d}.png" for name in ("samples", "normals") for step in (4, 8)}
    assert train | samples | {"checkpoint_generative.pt"} == {path.name for path in made.phase3.iterdir()}
    assert all(opens(path) for path in made.out.rglob("phase[13]*/*.png"))


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


@pytest.mark.parametrize("phase", ["phase1", "phase3"])
def test_a_training_phase_writes_the_config_it_ran_with(made, phase):
    folder = getattr(made, phase)
    assert strict_json(folder / "config.json") == shareable(config_of(made))
    assert torch.load(folder / "checkpoint_best.pt", weights_only=True)["config"] == shareable(config_of(made))


def test_every_artefact_says_how_a_file_became_x_and_who_trains(made):
    config = config_of(made)
    latents = strict_json(made.phase2 / "latents.json")
    for artefact in (best(made.phase1, "vae"), latents, best(made.phase3, "flowdiff")):
        assert (artefact["preprocessing"], artefact["split"]) == (config.data.preprocessing, config.data.split)
    assert best(made.phase3, "flowdiff")["members"] == [best(made.phase1, "vae")["members"], latents["members"]]


def test_members_are_known_by_patient_and_by_content(made):
    datasets = datasets_of(made)
    for stored in best(made.phase3, "flowdiff")["members"]:
        members = Membership.from_plain(stored)
        for split, dataset in datasets.items():
            for record, digest in zip(dataset.records, dataset.digests, strict=True):
                assert members.trained(record.patient, "") == (split == "train")
                assert members.trained(None, digest) == (split == "train")


def test_latents_are_float32_in_c_order_one_row_per_listed_path(made):
    for split, images, copies in (("train", 12, COPIES), ("val", 4, 0)):
        rows = np.load(made.phase2 / f"latents_{split}.npy", mmap_mode="r", allow_pickle=False)
        assert rows.shape == (images * (1 + copies), 4, 8, 16)
        assert rows.dtype == np.dtype("<f4") and rows.flags.c_contiguous
        paths = pickle.loads((made.phase2 / f"latents_{split}.pkl").read_bytes())
        assert type(paths) is list and len(paths) == len(rows)
        assert all(type(path) is str and Path(path).is_file() for path in paths)
        assert paths == paths[:images] * (1 + copies) and len(set(paths)) == images


def test_latents_json_says_where_they_come_from(made):
    description = strict_json(made.phase2 / "latents.json")
    assert description["vae_sha256"] == sha256(made.phase1 / "checkpoint_best.pt")
    assert description["sha256"] == {s: sha256(made.phase2 / f"latents_{s}.npy") for s in ("train", "val")}
    assert (description["shape"], description["rows"]) == ([4, 8, 16], {"train": 36, "val": 4})
    assert description["images"] == {"train": 12, "val": 4}
    sources = pickle.loads((made.phase2 / "latents_train.pkl").read_bytes())
    assert len(sources) == 36 and all(Path(source).is_file() for source in sources)
    assert isinstance(description["outliers"], list) and description["config"]["latent"]["augmented_copies"] == COPIES


def test_standardized_training_latents_have_mean_zero_and_variance_one(made):
    description = strict_json(made.phase2 / "latents.json")
    rows = np.load(made.phase2 / "latents_train.npy").astype(np.float64)
    mean, std = (np.reshape(description[name], (1, 4, 1, 1)) for name in ("mean", "std"))
    z = (rows - mean) / std
    np.testing.assert_allclose(z.mean((0, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(z.std((0, 2, 3)), 1, atol=1e-6)


def test_a_latent_is_the_posterior_mean_of_its_radiograph(made):
    image = datasets_of(made)["train"][5]["image"]
    vae = rebuild_vae(best(made.phase1, "vae"))
    rows = np.load(made.phase2 / "latents_train.npy")
    np.testing.assert_allclose(rows[5], vae.autoencoder.encode(image[None]).latent_dist.mode()[0], atol=1e-5)
    for copy in (17, 29):
        assert np.abs(rows[copy] - rows[5]).max() > 1e-3  # augmented


def test_the_flow_checkpoint_carries_the_scale_and_the_vae_it_belongs_to(made):
    description, flow = strict_json(made.phase2 / "latents.json"), best(made.phase3, "flowdiff")
    for name in ("mean", "std", "vae_sha256"):
        assert flow[name] == description[name]


def test_logs_hold_every_term_unweighted_and_as_it_enters_the_loss(made):
    vae, flow = read_log(made.phase1), read_log(made.phase3)
    assert vae["val/loss"][0] == [0, 3, 6]
    config = config_of(made).vae
    weights = {"pix": config.lambda_pix, "grad": config.lambda_grad, "hf": config.lambda_hf, "ssim": config.lambda_ssim}
    weighted = [np.multiply(weight, vae[f"val/loss_{name}"][1]) for name, weight in weights.items()]
    for name, values in zip(weights, weighted, strict=True):
        np.testing.assert_allclose(vae[f"val/weighted_{name}"][1], values, rtol=1e-4)
    np.testing.assert_allclose(sum(weighted) + vae["val/weighted_kl"][1], vae["val/loss"][1], rtol=1e-4)
    assert {"val/psnr", "val/ssim", "train/loss_kl", "train/lr", "train/skipped_steps"} <= set(vae)
    terms = {f"{kind}_{name}" for kind in ("loss", "weighted") for name in ("diff", "flow", "id")}
    assert {f"train/{name}" for name in terms | {"lambda_id", "skipped_steps"}} <= set(flow)
    assert {f"val/{name}" for name in terms | {"objective"}} <= set(flow)
    names = {name.split("/")[1] for name in [*vae, *flow]}
    assert {name for name in names if name.startswith(("lambda", "beta"))} == {"lambda_id"}


def test_each_phase_ends_with_the_command_of_the_next(made):
    lines = made.printed.splitlines()
    for script in ("extract_latents", "train_flowdiff", "inference"):
        assert lines.count(next_line(script, flags_of(made.out, made.phantoms))) == 1


# ---------------------------------------------------------------- one phase takes from the other


@pytest.mark.parametrize("script", ["extract_latents", "train_flowdiff"])
def test_without_phase_1_every_phase_names_it(script, call, tmp_path):
    missing = [f"--{part}.vae-checkpoint" for part in ("latent", "flowdiff")]
    result = call(script, *(word for flag in missing for word in (flag, tmp_path / "none.pt")))
    assert result.code == 2
    assert result.error == f"error: {tmp_path / 'none.pt'} is missing: run python train_vae.py first"


def test_phase_3_without_phase_2_names_it(call, tmp_path):
    result = call("train_flowdiff", "--flowdiff.latents", tmp_path)
    assert result.code == 2
    assert result.error == f"error: {tmp_path / 'latents.json'} is missing: run python extract_latents.py first"


def test_another_vae_than_that_of_the_latents_is_refused(call, made, tmp_path):
    content = best(made.phase1, "vae")
    content["weights"]["autoencoder.decoder.conv_out.bias"] += 1
    save_checkpoint(tmp_path / "other.pt", "vae", {**content, "step": 7})
    result = call("train_flowdiff", "--flowdiff.vae-checkpoint", tmp_path / "other.pt")
    assert result.code == 2 and "another VAE" in result.error and "python extract_latents.py" in result.error


def test_latents_are_made_as_the_vae_saw_its_radiographs_whatever_the_config_says_now(call, made, tmp_path):
    content = best(made.phase1, "vae")
    content["preprocessing"] |= {"fit": "pad", "percentile_high": 98.0}
    save_checkpoint(tmp_path / "padded.pt", "vae", content)
    assert call("extract_latents", "--latent.vae-checkpoint", tmp_path / "padded.pt").code == 0
    description = strict_json(tmp_path / "phase2_latents" / "latents.json")
    assert description["preprocessing"] == content["preprocessing"] and description["config"]["data"]["fit"] == "pad"


@pytest.mark.parametrize("script", ["extract_latents", "train_flowdiff"])
def test_a_flag_that_contradicts_the_artefact_is_refused(script, call):
    result = call(script, "--data.fit", "pad")
    assert result.code == 2 and "--data.fit pad contradicts" in result.error and "made with stretch" in result.error


def vae_that_saw(made, records, folder):
    """The VAE of `made`, saying that these validation radiographs trained it too."""
    train = datasets_of(made)["train"]
    patients = {"train": [record.patient for record in [*train.records, *records]], "val": []}
    content = best(made.phase1, "vae")
    content["members"] = Membership.of(patients, {"train": train.digests, "val": []}).plain()
    save_checkpoint(folder / "vae.pt", "vae", content)
    return ["--latent.vae-checkpoint", folder / "vae.pt"]


def test_what_trained_the_vae_does_not_validate_the_flow(call, made, tmp_path):
    records = datasets_of(made)["val"].records
    result = call("extract_latents", *vae_that_saw(made, records[:1], tmp_path))
    assert result.code == 0 and "left out of validation: 1 of 4 radiographs" in result.out
    description = strict_json(tmp_path / "phase2_latents" / "latents.json")
    sources = pickle.loads((tmp_path / "phase2_latents" / "latents_val.pkl").read_bytes())
    assert description["rows"]["val"] == 3 and str(records[0].path) not in sources


def test_a_vae_that_saw_every_validation_radiograph_is_refused(call, made, tmp_path):
    result = call("extract_latents", *vae_that_saw(made, datasets_of(made)["val"].records, tmp_path))
    assert result.code == 2 and "all 4 validation radiographs trained the VAE" in result.error


def test_an_interrupted_phase_2_leaves_nothing_that_phase_3_takes(call, made, tmp_path, monkeypatch):
    assert call("extract_latents").code == 0
    folder = tmp_path / "phase2_latents"
    with monkeypatch.context() as patch:
        patch.setattr(extract_latents, "find_outliers", told_to_stop)
        assert call("extract_latents", "--latent.augmented-copies", 1).code == 130
    assert not (folder / "latents.json").exists() and (folder / "latents_val.npy").exists()
    result = call("train_flowdiff", "--flowdiff.latents", folder)
    assert result.code == 2 and "run python extract_latents.py first" in result.error


def told_to_stop(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("batch", [1, 7, 13, 19], ids=lambda batch: f"after batch {batch}")
def test_phase_2_goes_on_where_it_was_stopped_with_the_same_bytes(batch, call, made, tmp_path, monkeypatch):
    """36 training latents in batches of 2, the last 24 of them augmented; batch 19 is the first of validation."""
    encode, calls = RadiographVAE.encode, []

    def encode_and_be_told(self, x):
        calls.append(len(x))
        if len(calls) == batch:
            interruption._on_signal(signal.SIGTERM, None)
        return encode(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(RadiographVAE, "encode", encode_and_be_told)
        stopped = call("extract_latents", "--latent.batch-size", 2)
        rows = min(2 * batch, 36) if batch <= 18 else 2 * batch - 36
        name = "latents_train.npy" if batch <= 18 else "latents_val.npy"
        total = 36 if batch <= 18 else 4
        assert stopped.code == 143
        assert stopped.error.endswith(f"the same command goes on after {rows} of {total} latents of {name}")
        assert call("extract_latents", "--latent.batch-size", 2).code == 0
    assert sum(calls) == 36 + 4  # none twice
    folder, whole = tmp_path / "phase2_latents", tmp_path / "whole"
    assert call("extract_latents", "--latent.batch-size", 2, outputs=whole).code == 0
    for split in ("train", "val"):
        file = f"latents_{split}.npy"
        assert sha256(folder / file) == sha256(whole / "phase2_latents" / file)
    assert {path.name for path in folder.iterdir()} == {path.name for path in (whole / "phase2_latents").iterdir()}


# ---------------------------------------------------------------- which weights are kept


OBJECTIVES = {2: 0.1, 3: 0.1, 4: 0.1, 6: 0.5, 8: 0.7}  # step -> what validation shall say
IDENTITY_ERRORS = {2: 0.9, 3: 0.8, 4: 0.7, 6: 0.3, 8: 0.6}


@pytest.fixture
def scripted(monkeypatch):
    """Validation of phase 3 says what OBJECTIVES and IDENTITY_ERRORS say."""
    said = zip(OBJECTIVES.values(), IDENTITY_ERRORS.values(), strict=True)

    def validate(*_):
        objective, identity = next(said)
        return {"loss_diff": 1.0, "loss_flow": 1.0, "loss_id": identity, "objective": objective}

    monkeypatch.setattr(train_flowdiff, "validate", validate)
    return ["--flowdiff.validate-every", 2, "--flowdiff.sample-every", 8]


def test_the_best_weights_come_from_where_the_identity_has_its_full_weight(scripted, call, tmp_path):
    result = call("train_flowdiff", *scripted)
    kept = best(tmp_path / "phase3_flowdiff", "flowdiff")
    assert (result.code, kept["step"], kept["scores"]["objective"]) == (0, 6, 0.5)
    assert "0.8000 before the curriculum, 0.3000 in what is kept" in result.out


def test_without_an_identity_constraint_every_step_may_be_the_best(scripted, call, tmp_path):
    result = call("train_flowdiff", *scripted, "--flowdiff.lambda-id-global", 0)
    assert result.code == 0 and best(tmp_path / "phase3_flowdiff", "flowdiff")["step"] == 2
    assert "curriculum" not in result.out


# ---------------------------------------------------------------- other ways to train


def test_the_identity_loss_runs_in_pixels_through_a_walk_of_several_steps(call, tmp_path):
    walk = ["--flowdiff.identity-space", "pixel", "--flowdiff.identity-solver", "heun", "--flowdiff.identity-steps", 2]
    result = call("train_flowdiff", *QUICK, *walk)
    assert result.code == 0, result.error
    log = read_log(tmp_path / "phase3_flowdiff")
    assert log["train/loss_id"][1][-1] > 0 and log["train/lambda_id"][1][-1] == pytest.approx(0.1)
    assert log["train/weighted_id"][1][-1] < log["train/loss_id"][1][-1]


def test_the_weight_of_the_identity_is_zero_before_its_warm_up(call, tmp_path):
    late = ["--flowdiff.identity-warmup-start", 8, "--flowdiff.identity-warmup-end", 8, "--flowdiff.log-every", 1]
    assert call("train_flowdiff", *QUICK, *late).code == 0
    log = read_log(tmp_path / "phase3_flowdiff")
    assert log["train/lambda_id"][1] == [*[0.0] * 7, 0.1] and log["train/loss_id"][0] == [8]


@pytest.mark.skipif(not TAESD3.is_dir(), reason="needs ../shared/models/taesd3")
def test_a_tiny_autoencoder_of_sixteen_latent_channels_goes_through_all_phases(call, tmp_path):
    tiny = ["--vae.pretrained", TAESD3, "--vae.freeze-encoder", "True", "--vae.steps", 2, "--vae.validate-every", 2]
    assert call("train_vae", *tiny).code == 0
    vae = ["--latent.vae-checkpoint", tmp_path / "phase1_vae" / "checkpoint_best.pt"]
    assert call("extract_latents", *vae).code == 0
    vae = ["--flowdiff.vae-checkpoint", tmp_path / "phase1_vae" / "checkpoint_best.pt"]
    pixels = ["--flowdiff.latents", tmp_path / "phase2_latents", "--flowdiff.identity-space", "pixel"]
    assert call("train_flowdiff", *QUICK, *vae, *pixels).code == 0
    flow = best(tmp_path / "phase3_flowdiff", "flowdiff")
    assert flow["latent_channels"] == len(flow["mean"]) == 16
    assert np.load(tmp_path / "phase2_latents" / "latents_val.npy").shape == (4, 16, 8, 16)
    assert (tmp_path / "phase1_vae" / "log.csv").read_text().count("loss_kl,n/a") > 0


# ---------------------------------------------------------------- two processes


SHARED = {
    "train_vae": ["--vae.steps", 4, "--vae.scratch-channels", 16, 16, 32, 32],
    "train_flowdiff": ["--flowdiff.lr-warmup-steps", 0, "--flowdiff.identity-share", 0.5, *QUICK],
}
ROUNDING = {"train_vae": 1e-4, "train_flowdiff": 1e-6}  # of sums, as Adam amplifies it; other noise makes 0.7 and 0.1
PLACES = {"train_vae": "phase1_vae", "train_flowdiff": "phase3_flowdiff"}


def batch(images):
    return ["--vae.batch-size", images, "--flowdiff.batch-size", images]


def answer(script, outputs, made):
    """What the network of checkpoint_last.pt says: not its weights, some of which a normalization takes away again."""
    folder = outputs / PLACES[script]
    last = torch.load(folder / "checkpoint_last.pt", weights_only=True)
    if script == "train_vae":
        images = datasets_of(made)["val"]
        vae = rebuild_vae(best(folder, "vae") | {"weights": last["weights"]})
        return vae(torch.stack([images[row]["image"] for row in range(4)]))[0]
    network = FlowDiffUNet(config_of(made).unet, 4)
    network.load_state_dict(last["weights"])
    z = LatentDataset(made.phase2, "val")
    return torch.cat(network.eval()(torch.stack([z[row] for row in range(4)]), torch.linspace(0, 1, 4))).detach()


def weights_in(folder):
    """Of checkpoint_last.pt, those that a loss can feel: a softmax takes the bias of keys away again."""
    weights = torch.load(folder / "checkpoint_last.pt", weights_only=True)["weights"]
    return {name: weight for name, weight in weights.items() if not name.endswith("to_k.bias")}


@pytest.mark.parametrize("script", PLACES)
def test_two_processes_train_what_one_does_at_twice_the_batch(script, call, made, tmp_path):
    """Also where the identity loss sees three latents, two here and one there."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", f"{script}.py"]
    words = flags_of(tmp_path / "two", made.phantoms, *sources(script, made), *SHARED[script])
    result = shell(*launch, *words, *map(str, batch(3)))
    assert result.returncode == 0 and "2 process(es)" in result.stdout, result.stderr[-3000:]
    assert call(script, *SHARED[script], *batch(6), outputs=tmp_path / "one").code == 0
    two, one = (answer(script, tmp_path / name, made) for name in ("two", "one"))
    torch.testing.assert_close(two, one, rtol=0, atol=ROUNDING[script])
    two, one = (weights_in(tmp_path / name / PLACES[script]) for name in ("two", "one"))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5)  # of weights that moved by 2e-4 and more
    again = call(script, *SHARED[script], *batch(3), outputs=tmp_path / "two")
    assert again.code == 2 and "number of processes was 2, now 1" in again.error


def test_a_patient_who_was_corrected_is_another_run(call, made, tmp_path):
    """Who trained travels with the weights: latents and checkpoints of a wrong name would let the right one pass."""
    data = shutil.copytree(made.phantoms, tmp_path / "phantoms")
    for place in ("phase1_vae", "phase2_latents"):
        shutil.copytree(made.out / place, tmp_path / place)
    text = (data / "manifest.csv").read_text()
    patient = list_records(data)[0].patient
    (data / "manifest.csv").write_text(text.replace(f",{patient}", ",Somebody Else"))
    result = call("train_vae", data=data)
    assert result.code == 2 and "(who the training patients are changed)" in result.error
    result = call("extract_latents", data=data)
    assert result.code == 0 and "already" not in result.out
    description = strict_json(tmp_path / "phase2_latents" / "latents.json")
    assert Membership.from_plain(description["members"]).trained("Somebody Else", "")


def test_latents_that_are_there_already_are_not_made_again(call, made, tmp_path):
    out = shutil.copytree(made.phase2, tmp_path / "phase2_latents")
    before = (out / "latents.json").read_bytes()
    again = call("extract_latents")
    assert (
        again.code == 0 and "holds these latents already" in again.out and "next: python train_flowdiff.py" in again.out
    )
    assert (out / "latents.json").read_bytes() == before
    with open(out / "latents_val.npy", "r+b") as file:  # a row that rotted
        file.seek(-8, 2)
        file.write(b"\x00\x00\x80\x3f")
    mended = call("extract_latents")
    assert mended.code == 0 and "already" not in mended.out and "differ in" not in mended.out
    assert (out / "latents_val.npy").read_bytes() == (made.phase2 / "latents_val.npy").read_bytes()
    other = call("extract_latents", "--latent.augmented-copies", COPIES + 1)
    assert other.code == 0 and "differ in latent.augmented_copies: they are made anew" in other.out
