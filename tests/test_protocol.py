"""The comparison with other methods: who is judged on what, the peers, and the table."""

import importlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pipeline import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import detection
import protocol

from backbone import backbone_name
from checks import UsageError
from config import Config, DataConfig, InferenceConfig, VAEConfig
from metrics import auroc
from phantoms.phantom import main as draw_phantoms

needs_backbone = pytest.mark.skipif(backbone_name("auto") == "none", reason="no backbone is installed")


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    draw_phantoms(folder, train=6, val=3, test_normal=3, test_per_lesion=1, height=64, width=128, workers=1)
    return DataConfig(root=str(folder), height=32, width=64, num_workers=0)


class Brightness:
    """A method whose map is the radiograph itself."""

    def fit(self, normals):
        self.fitted_to = normals

    def score(self, images):
        return images, images.max(axis=(1, 2))


def test_a_peer_is_fitted_to_training_normals_alone_and_judged_at_the_size_of_the_files(phantoms):
    splits, peer = protocol.splits_of(phantoms), Brightness()
    verdicts = protocol.examine(peer, splits, phantoms)
    assert peer.fitted_to.shape == (6, 32, 64)
    assert {one.shape for one in verdicts.maps} == {(64, 128)} and len(verdicts.maps) == len(splits["test"]) == 9
    normals = protocol.images_of(splits["val"], phantoms)
    assert np.mean(normals > verdicts.pixel_threshold) <= protocol.PIXEL_FPR
    judged = protocol.judge(verdicts)
    assert judged["overall"]["auroc"] == auroc(verdicts.scores, [record.label for record in verdicts.records])
    assert set(judged["kinds"]) == {record.kind for record in splits["test"] if record.label}


def test_unlabelled_images_are_not_judged_and_one_class_is_refused(phantoms, tmp_path):
    rows = (Path(phantoms.root) / "manifest.csv").read_text().splitlines()
    normals = [row for row in rows if ",test,1," not in row]
    assert len(normals) < len(rows)
    (tmp_path / "manifest.csv").write_text("\n".join(normals) + "\n")
    shutil.copytree(Path(phantoms.root) / "images", tmp_path / "images")
    with pytest.raises(UsageError, match="no test split of images labelled 0 and 1"):
        protocol.splits_of(replace(phantoms, root=str(tmp_path)))


@pytest.fixture
def peer_of(tmp_path):
    calibration = InferenceConfig(calibration=str(tmp_path / "peer"))
    config = Config(vae=VAEConfig(pretrained=str(ROOT / "assets/phantom_vae")), inference=calibration)

    def made(name, seed=0, **more):
        return getattr(importlib.import_module(f"peers.{name}"), detection.PEERS[name])(seed, config, **more)

    return made


@needs_backbone
@pytest.mark.parametrize("name", ["nearest", "padim", "patchcore"])
def test_each_peer_sees_a_square_that_no_normal_has(name, peer_of):
    random = np.random.default_rng(0)
    normals = 0.1 * random.standard_normal((12, 64, 128)).astype(np.float32)
    strange = normals[:2].copy()
    strange[:, 24:40, 40:60] = 1.0
    peer = peer_of(name)
    peer.fit(normals[2:])
    (quiet, low), (loud, high) = peer.score(normals[:2]), peer.score(strange)
    assert quiet.shape == loud.shape == (2, 64, 128) and high.min() > low.max()
    assert np.median(loud[:, 26:38, 44:56]) > np.quantile(loud[:, :, 90:], 0.99)


TRAINED = {"denoising": 60, "latent_repair": 40}  # and steps that suffice here


@pytest.mark.parametrize("name", sorted(TRAINED))
def test_each_peer_that_is_trained_sees_a_square_after_a_few_steps(name, peer_of):
    rows, columns = np.mgrid[:32, :64].astype(np.float32)
    shifts = np.linspace(0, 1, 12, dtype=np.float32)
    normals = np.stack([0.4 * np.sin(columns / 9 + shift) * np.cos(rows / 7) - 0.2 for shift in shifts])
    strange = normals[:2].copy()
    strange[:, 10:20, 20:32] = 1.0
    peer = peer_of(name, steps=TRAINED[name])
    peer.fit(normals[2:])
    (quiet, low), (loud, high) = peer.score(normals[:2]), peer.score(strange)
    assert quiet.shape == loud.shape == (2, 32, 64) and high.min() > low.max()
    assert loud[:, 10:20, 20:32].mean() > 1.25 * loud[:, :, 44:].mean()


def test_both_networks_of_draem_learn_and_say_a_probability(peer_of):
    clean = torch.linspace(-0.6, 0.4, 32).repeat(8, 1, 16, 1)
    peer = peer_of("draem", steps=40)
    peer.textures = clean
    before, found = peer._loss(clean).item(), peer.find.last.weight.clone()
    peer.fit(clean[:, 0].numpy())
    assert peer._loss(clean).item() < 0.8 * before and not torch.equal(peer.find.last.weight, found)
    maps, scores = peer.score(clean[:, 0].numpy())
    assert maps.shape == (8, 16, 32) and maps.min() >= 0 and scores.max() <= maps.max() <= 1


def test_the_diffusion_of_pixels_learns_its_noise_and_examines_with_the_mean_of_its_weights(peer_of):
    normals = np.zeros((4, 16, 32), np.float32)
    peer = peer_of("anoddpm", steps=40)
    clean = torch.zeros(8, 1, 16, 32)
    before, learning = peer._loss(clean).item(), peer.network
    peer.fit(normals)
    assert peer._loss(clean).item() < 0.8 * before and peer.network is not learning
    for averaged, last in zip(peer.network.parameters(), learning.parameters(), strict=True):
        assert not torch.equal(averaged, last) or not last.grad.any()
    maps, scores = peer.score(normals)
    assert maps.shape == (4, 16, 32) and scores.shape == (4,) and np.isfinite(maps).all() and maps.min() >= 0


@pytest.mark.parametrize("name", ["anoddpm", "denoising", "draem", "latent_repair"])
def test_a_peer_whose_training_was_stopped_goes_on_to_the_same_maps(name, peer_of, monkeypatch):
    normals = np.random.default_rng(0).uniform(-1, 1, (6, 32, 64)).astype(np.float32)
    whole = peer_of(name, steps=6)
    whole.fit(normals)
    monkeypatch.setattr("peers.training.SAVE_EVERY", 2)
    loss_of = type(whole)._loss
    seen = []

    def until(most):
        def counted(self, batch):
            if len(seen) == most:
                raise KeyboardInterrupt
            seen.append(batch)
            return loss_of(self, batch)

        seen.clear()
        monkeypatch.setattr(type(whole), "_loss", counted)

    for seed in (1, 0):  # what another seed left is not gone on from
        until(3)
        with pytest.raises(KeyboardInterrupt):
            peer_of(name, seed=seed, steps=6).fit(normals)
    until(6)
    resumed = peer_of(name, steps=6)
    resumed.fit(normals)
    assert len(seen) == 4  # those after the second, with which it was kept
    again, once = resumed.score(normals[:2]), whole.score(normals[:2])
    assert all(np.array_equal(a, b) for a, b in zip(again, once, strict=True))


def test_gradient_noise_is_nothing_at_its_corners_and_about_one_at_most():
    from peers.training import gradient_noise

    noise = gradient_noise(50, (32, 64), (4, 8), torch.Generator().manual_seed(0))
    assert noise.shape == (50, 1, 32, 64) and noise[..., ::8, ::8].abs().max() < 1e-6
    assert 0.7 < noise.abs().max() <= 1 and abs(noise.mean()) < 0.02


def test_what_the_peers_spoil_is_what_they_say(peer_of):
    clean = torch.zeros(64, 1, 32, 32)
    draem = peer_of("draem")
    draem.textures = torch.ones(3, 1, 32, 32)
    foreign, mask = draem.corrupted(clean)
    assert torch.equal(foreign != 0, mask == 1) and 0.2 < mask.flatten(1).any(1).float().mean() < 0.6
    anoddpm = peer_of("anoddpm")
    noise = anoddpm.noise(clean)
    torch.testing.assert_close(noise.std(dim=(1, 2, 3)), torch.ones(64))
    torch.testing.assert_close(anoddpm.noisy(clean, noise, torch.full((64,), 999)), noise, rtol=0, atol=0.01)
    repair = peer_of("latent_repair")
    repair.normal = torch.ones(3, 4, 8, 8)
    spoilt = repair.spoilt(torch.zeros(64, 4, 8, 8)) != 0
    assert 0.02 < spoilt.float().mean() < 0.5 and 0 < (~spoilt.flatten(1).any(1)).sum() < 32
    coarse = peer_of("denoising").noise(clean)
    assert 0.2 < coarse.std() < 0.45


def test_the_way_back_of_a_known_image_is_that_image(peer_of):
    """Told the true noise at every step, the walk ends at the clean image whatever noise is added on the way."""
    anoddpm = peer_of("anoddpm")
    clean = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    z = anoddpm.noisy(clean, anoddpm.noise(clean), torch.tensor([250]))
    for now, then in ((250, 100), (100, 0)):
        truth = (z - anoddpm.kept[now].sqrt() * clean) / (1 - anoddpm.kept[now]).sqrt()
        z = anoddpm._back(z, truth, now, then)
    torch.testing.assert_close(z, clean, rtol=0, atol=1e-5)


def test_an_image_that_the_diffusion_knows_comes_back_from_the_walk(monkeypatch, peer_of):
    anoddpm, x = peer_of("anoddpm"), np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 8, 8)

    def knows(z, now):
        kept = anoddpm.kept[now]
        return SimpleNamespace(sample=(z - kept.sqrt() * torch.from_numpy(x)) / (1 - kept).sqrt())

    anoddpm.network = knows
    assert np.abs(anoddpm.score(x)[0]).max() < 1e-6


def test_the_repairing_network_of_draem_hears_of_its_coarsest_level_alone(peer_of):
    draem = peer_of("draem")
    assert draem.repair.up[0][0].in_channels == draem.repair.down[0][0].out_channels
    assert draem.find.up[0][0].in_channels == 2 * draem.find.down[0][0].out_channels


@pytest.mark.parametrize(("name", "size"), [("draem", 40), ("anoddpm", 60), ("latent_repair", 48)])
def test_a_size_that_a_peer_cannot_halve_is_refused_at_once(name, size):
    config = SimpleNamespace(vae=None, data=SimpleNamespace(height=size, width=size))
    with pytest.raises(UsageError, match="needs a --size that divides by"):
        getattr(importlib.import_module(f"peers.{name}"), detection.PEERS[name])(0, config)


def test_a_part_of_a_peer_says_with_what_numbers_it_was_made(phantoms, tmp_path, monkeypatch):
    options = SimpleNamespace(data=Path(phantoms.root), networks=None)
    asked = detection.asked_for("denoising", options, [])
    monkeypatch.setattr("peers.denoising.STEPS", 7)
    assert asked["peer"]["DEVICE"] in ("cpu", "cuda") and detection.asked_for("denoising", options, []) != asked
    assert "peer" not in detection.asked_for("plain", options, [])


@needs_backbone
def test_the_nearest_neighbour_of_a_training_normal_is_itself_unless_it_is_left_out(peer_of):
    normals = np.random.default_rng(0).uniform(-1, 1, (4, 64, 64)).astype(np.float32)
    peer = peer_of("nearest")
    peer.fit(normals)
    first = peer.memory[1:2].float()
    assert peer._distances(first).max() < 0.1 * peer._distances(first, range(1, 2)).min()


# ---------------------------------------------------------------- parts and their table


def part(row, seed, auroc, size=256, manifest="a", flags=()):
    entry, asked = {"auroc": auroc, "pixel_ap": None, "aupro": None}, {"manifest_sha256": manifest, "flags": flags}
    return {"row": row, "seed": seed, "size": size, "asked": asked, "kinds": {"cyst": entry}, "mean_over_kinds": entry}


def test_the_table_has_a_line_per_row_and_size_and_the_spread_over_seeds(tmp_path):
    for number, one in enumerate([part("plain", 0, 0.5), part("reader", 0, 0.8), part("reader", 1, 0.9)]):
        (tmp_path / f"{number}.json").write_text(json.dumps(one))
    lines = detection.table_of(tmp_path).splitlines()
    assert lines[-2].startswith("| reader | 256 | 0, 1 | 0.85 ± 0.07 |")
    assert lines[-1].startswith("| plain | 256 | 0 | 0.50 |")


@pytest.mark.parametrize(("change", "told"), [("manifest", "different radiographs"), ("flags", "different flags")])
def test_parts_that_cannot_be_compared_make_no_table(tmp_path, change, told):
    for seed, one in enumerate([part("plain", 0, 0.5), part("plain", 1, 0.5, **{change: "b"})]):
        (tmp_path / f"{seed}.json").write_text(json.dumps(one))
    with pytest.raises(UsageError, match=told):
        detection.table_of(tmp_path)


@pytest.mark.parametrize("seeds", ["a", "", "0,x"])
def test_seeds_that_are_no_numbers_are_refused_with_an_example(seeds, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["detection.py", "--seeds", seeds])
    with pytest.raises(SystemExit):
        detection.arguments()
    assert "numbers parted by commas, such as 0,1,2" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--flowdiff.output", "--latent.vae_checkpoint", "--inference.shard", "--data.root"])
def test_a_flag_that_leads_a_phase_elsewhere_is_refused_before_anything_runs(flag, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["detection.py", "--rows", "reader", flag, "there"])
    with pytest.raises(UsageError, match="this command's to give"):
        detection.arguments()


def test_seeds_of_one_training_are_no_seeds(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["detection.py", "--networks", "outputs", "--seeds", "0,1"])
    with pytest.raises(UsageError, match="--networks holds one training"):
        detection.arguments()


@pytest.mark.parametrize("row", ["reader: backbone alone", "reader: without G"])
def test_a_row_without_g_does_not_hear_g_in_its_scores(row):
    from command_line import parse_command

    settings = parse_command("", list(detection.OURS[row])).config.reader
    assert settings.plain_weight == settings.residual_weight == 0 and not {"latent", "trunk", "residual"} & set(
        settings.features
    )


@pytest.mark.parametrize("flag", ["--data.test", "--inference.method=plain", "--runtime.seed"])
def test_a_flag_that_would_belie_what_a_part_says_is_refused(flag, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["detection.py", "--data", "data", "--rows", "reader", flag])
    with pytest.raises(UsageError, match="this command's to give"):
        detection.arguments()


@pytest.mark.parametrize(("text", "told"), [("{", "damaged"), ("{}", "no part"), ("[1]", "no part")])
def test_a_file_that_is_no_part_is_named(text, told, tmp_path):
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(UsageError, match=f"odd.json in --results is {told}"):
        detection.table_of(tmp_path)


def test_a_row_of_an_earlier_version_stands_last(tmp_path):
    for number, one in enumerate([part("gone", 0, 0.5), part("padim", 0, 0.8)]):
        (tmp_path / f"{number}.json").write_text(json.dumps(one))
    assert detection.table_of(tmp_path).splitlines()[-1].startswith("| gone |")


def test_a_part_that_is_kept_is_not_run_again(tmp_path, monkeypatch, capsys):
    options, kept = SimpleNamespace(results=tmp_path, size=256, data=tmp_path), tmp_path / "plain-256-seed3.json"
    options.networks = tmp_path / "networks"
    trained = options.networks / "phase3_flowdiff" / "checkpoint_best.pt"
    trained.parent.mkdir(parents=True)
    trained.write_bytes(b"networks")
    (tmp_path / "manifest.csv").write_text("image\n")
    asked = detection.asked_for("plain", options, ["--vae.pretrained", "/somewhere/taesd"])
    kept.write_text(json.dumps(part("plain", 3, 0.5) | {"asked": asked}))
    monkeypatch.setattr(detection, "run_ours", lambda *_: pytest.fail("run again"))
    detection.run_part("plain", 3, options, ["--vae.pretrained", "/elsewhere/taesd"])
    assert "there already" in capsys.readouterr().out and "somewhere" not in kept.read_text()
    kept.write_text(
        json.dumps(
            part("plain", 3, 0.5) | {"asked": asked | {"flags": ["--reader.levels", "0.1", "0.2", "--vae.lr=3e-4"]}}
        )
    )
    detection.run_part("plain", 3, options, ["--vae.lr=3e-4", "--reader.levels", "0.1", "0.2"])
    with pytest.raises(UsageError, match="is of other"):
        detection.run_part("plain", 3, options, ["--vae.lr=3e-4", "--reader.levels", "0.2", "0.1"])
    kept.write_text(json.dumps(part("plain", 3, 0.5) | {"asked": asked}))
    for change in ("flags", "networks", "data"):
        if change == "networks":
            trained.write_bytes(b"other networks")
        if change == "data":
            (tmp_path / "manifest.csv").write_text("image,label\n")
        flags = ["--vae.lr", "1e-4"] if change == "flags" else ["--vae.pretrained", "/somewhere/taesd"]
        with pytest.raises(UsageError, match="is of other radiographs, networks, flags or code"):
            detection.run_part("plain", 3, options, flags)


def test_a_signal_to_the_comparison_ends_its_phase_too(tmp_path):
    phase = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(print('ended', flush=True)))\n"
    (tmp_path / "phase.py").write_text(phase + "print('begun', flush=True)\ntime.sleep(60)\n")
    code = f"""if True:
        import sys
        sys.path[:0] = {[str(ROOT), str(ROOT / "benchmarks")]}
        import interruption; interruption.begin()
        import detection, pathlib, runtime
        detection.ROOT = pathlib.Path({str(tmp_path)!r})
        runtime.run_script(lambda: detection.call("phase.py", []))"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True) as run:
        assert run.stdout.readline() == "begun\n"
        run.terminate()
        said, told = run.communicate()
    assert said == "ended\n" and told.startswith("interrupted by SIGTERM") and run.returncode == 143


@pytest.mark.parametrize("row", detection.OURS)
def test_the_flags_of_every_row_are_understood(row):
    from command_line import parse_command

    config = parse_command("", ["--preset", "cpu", *detection.OURS[row]]).config
    assert row == "reader" or config != parse_command("", ["--preset", "cpu"]).config


@pytest.mark.parametrize(("multiplies", "told"), [(True, "bf16"), (False, None)])
def test_a_part_says_if_phase_4_did_not_read_in_float32(multiplies, told, phantoms, monkeypatch):
    monkeypatch.setattr("runtime.multiplies_bf16", lambda on_cpu: multiplies)
    options = SimpleNamespace(data=Path(phantoms.root), networks=None)
    assert detection.asked_for("plain", options, ["--preset", "cpu"]).get("reads_in") == told
    assert "reads_in" not in detection.asked_for("denoising", options, ["--preset", "cpu"])


def test_every_row_can_be_asked_for_by_its_name(monkeypatch):
    rows = [*detection.OURS, *detection.PEERS]
    monkeypatch.setattr(sys, "argv", ["detection.py", "--data", "data", "--rows", ",".join(rows)])
    options, flags = detection.arguments()
    assert options.rows == rows and flags == []
    assert len({detection.part_file(row, 0, options) for row in rows}) == len(rows)


def test_an_unknown_row_is_refused_with_the_known_ones(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["detection.py", "--rows", "magic"])
    with pytest.raises(UsageError, match="magic is unknown, choose from reader, plain"):
        detection.arguments()
