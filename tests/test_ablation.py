"""The ablation of the reader: what a row leaves out, and a run on the tiny pipeline."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pipeline import ROOT, flags_of, run_benchmark, sources

sys.path.insert(0, str(ROOT / "benchmarks"))
import ablation
import ablation_ground
import detection
import rehearsal

from checks import UsageError
from config import Config
from config_reading import ReaderConfig
from normalizer import Normalizer

FEW = ("--reader.steps", "2", "--reader.copies", "1", "--reader.members", "1", "--reader.magnification", "1")


@pytest.mark.parametrize(
    ("row", "left"),
    [
        ("everything", {"z": 4, "changed": 12, "heads": 3}),
        ("without z", {"changed": 12, "heads": 3}),
        ("without what G changed", {"z": 4, "heads": 3}),
        ("without G", {"z": 4}),
        ("without G and its autoencoder", {}),
    ],
)
def test_a_row_keeps_these_channels_of_the_latent(row, left):
    settings = replace(ReaderConfig(), levels=(0.1, 0.2, 0.3))
    (channels,) = ablation_ground.channels_of("latent", [torch.zeros(1, 4 + 3 * 5, 2, 2)], settings)
    kept = [channel[1] for channel in channels if ablation.ROWS[row].keep(channel)]
    assert {part: kept.count(part) for part in kept} == left


def test_channels_of_the_latent_are_named_in_the_order_in_which_they_are_made():
    settings = replace(ReaderConfig(), levels=(0.1, 0.4))
    (channels,) = ablation_ground.channels_of("latent", [torch.zeros(1, 8, 2, 2)], settings)  # 2 of z, twice 2 + 1
    one, other = [("latent", "changed", level) for level in ("@0.1", "@0.4")]
    heads, others = [("latent", "heads", level) for level in ("@0.1", "@0.4")]
    assert channels == [("latent", "z")] * 2 + [one] * 2 + [heads] + [other] * 2 + [others]
    trunk = ablation_ground.channels_of("trunk", [torch.zeros(1, 2, 2, 2)], settings)
    assert trunk == [[("trunk",)] * 2]


def test_a_row_of_one_noise_level_reads_g_at_that_level_alone():
    settings = ReaderConfig()
    (channels,) = ablation_ground.channels_of("latent", [torch.zeros(1, 4 + 3 * 5, 2, 2)], settings)
    for level in settings.levels:
        keep = ablation.ROWS[f"G at {level:g} alone"].keep
        kept = [channel for channel in channels if keep(channel)]
        assert kept == [channel for channel in channels if channel[2:] in ((), (f"@{level:g}",))] and len(kept) == 9
        assert not keep(("trunk",)) and keep(("backbone",))


def test_what_is_left_out_is_what_the_name_says():
    maps = [np.arange(24.0).reshape(2, 3, 2, 2), np.zeros((2, 1, 4, 4)), np.ones((2, 2, 1, 1))]
    first, last = ablation.selected(maps, [[0, 2], [], [0, 1]])
    assert np.array_equal(first, maps[0][:, [0, 2]]) and last is maps[2]


@pytest.mark.parametrize("row", [*ablation.ROWS, *detection.OURS, *detection.PEERS])
def test_a_row_can_be_chosen_by_its_name(row):
    assert detection.names_in(row) == [row]


def test_no_row_of_fills_learns_from_what_it_leaves_out():
    everything = set(ReaderConfig().fills)
    left_out = [everything - set(dict(row.settings)["fills"]) for row in ablation.FILLS.values()]
    assert all(left_out) and set().union(*left_out) == everything and sum(map(len, left_out)) == len(everything)


def test_rows_are_judged_both_ways_kept_and_not_run_again(examined, monkeypatch, capsys, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    results = tmp_path / "results"
    flags = flags_of(tmp_path / "out", examined.phantoms, *sources("inference", examined), *FEW)
    rows = "everything,without G,without rim,the tuned backbone alone"
    asked = [*flags, "--reader.tuned-steps", "1", "--results", results, "--rows", rows]
    run_benchmark(ablation.main, monkeypatch, *asked)
    networks, both = (
        {part["row"]: part for part in map(detection.read_part, results.glob(f"{way}/*.json"))}
        for way in ("networks", "with_the_tuned_backbone")
    )
    assert set(networks) == {"everything", "without G", "without rim"}
    assert set(both) == {*networks, "the tuned backbone alone"}
    means = [parts["without G"]["mean_over_kinds"] for parts in (networks, both)]
    assert {part["normals"] for part in both.values()} == {12}
    assert networks["everything"]["mean_over_kinds"] != means[0] != means[1]
    averages, of_networks, of_both = (results / "table.md").read_text().split("**\n\n")[1:]
    assert all("| everything |" in table for table in (averages, of_networks, of_both))
    assert "| the tuned backbone alone | 64 | - | - | - | 0 | 0." in averages and "alone" not in of_networks
    capsys.readouterr()
    monkeypatch.setattr(ablation, "judged_both_ways", lambda *_: pytest.fail("run again"))
    run_benchmark(ablation.main, monkeypatch, *asked)
    assert capsys.readouterr().out.count("there already") == 4
    monkeypatch.setattr(
        ablation, "judged_both_ways", lambda *_: {"networks": {"kinds": {}, "mean_over_kinds": means[0]}}
    )
    run_benchmark(ablation.main, monkeypatch, *asked[:-1], "everything", "--as", "another G")
    named = detection.read_part(results / "networks" / "another_G-seed0.json")
    assert named["row"] == "another G" and named["mean_over_kinds"] == means[0]
    for other in (("--reader.steps", 3), ("--inference.draws", 3), ("--data.gamma", 0.2)):
        with pytest.raises(UsageError, match="remove it, or choose another"):
            run_benchmark(ablation.main, monkeypatch, *asked, *other)
    for row, name in (("without G", "another G"), ("everything", "another_G")):
        with pytest.raises(UsageError, match="of another row"):
            run_benchmark(ablation.main, monkeypatch, *asked[:-1], row, "--as", name)
    with pytest.raises(UsageError, match="of the same networks"):
        run_benchmark(ablation.main, monkeypatch, *asked, "--runtime.seed", 1)
    (results / "with_the_tuned_backbone" / "everything-seed0.json").unlink()
    with pytest.raises(UsageError, match="remove it, or choose another"):  # one of its two files is enough
        run_benchmark(ablation.main, monkeypatch, *asked, "--reader.steps", 3)
    kept = results / "networks" / "without_G-seed0.json"
    kept.rename(kept.with_name("without_G.json"))  # as an earlier version named it
    with pytest.raises(UsageError, match="kept twice"):
        run_benchmark(ablation.main, monkeypatch, *asked[:-1], "without G")


def test_seeds_of_a_row_are_a_mean_and_what_else_differs_is_refused(tmp_path):
    for seed, auroc in ((0, 0.7), (1, 0.9)):
        found = {"auroc": auroc, "pixel_ap": None, "aupro": auroc / 2}
        asked = {"manifest_sha256": "m", "seed": seed, "flow_sha256": f"of {seed}", "reader": {"steps": 3}}
        part = {"row": "without z", "seed": seed, "size": 64, "asked": asked, "kinds": {}, "mean_over_kinds": found}
        path = ablation.part_file("without z", "networks", tmp_path, seed)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(part))
    assert "| without z | 64 | 0, 1 | 0.80 ± 0.14 | 0.40 ± 0.07 | - | - | - |" in ablation.side_by_side(tmp_path)
    assert "| without z | 64 | 0, 1 | 0.80 ± 0.14 | 0.40 ± 0.07 |" in detection.table_of(path.parent)
    for changed, refusal in (
        ({"asked": asked | {"reader": {"steps": 4}}}, "different flags"),
        ({"asked": asked | {"flow_sha256": "of 0"}}, "of the same networks"),
        ({"seed": 0}, "kept twice"),
    ):
        path.write_text(json.dumps(part | changed))
        for table in (lambda: detection.table_of(path.parent), lambda: ablation.side_by_side(tmp_path)):
            with pytest.raises(UsageError, match=refusal):
                table()
    path.write_text(json.dumps(part | {"size": 128}))
    assert "| without z | 128 | 1 | 0.90 | 0.45 |" in ablation.side_by_side(tmp_path)


def test_a_row_says_what_a_reader_says_of_the_same_images(examined, tmp_path, monkeypatch):
    """The networks of `everything` on features from the disk, against the reader of phase 4 that looks for itself."""
    from command_line import parse_command
    from reader import Reader

    flags = flags_of(tmp_path, examined.phantoms, *sources("inference", examined), *FEW, "--reader.tuned-steps", 0)
    model, config = ablation.open_normalizer(parse_command("", [*flags, "--inference.method", "reader"]))
    ground = ablation_ground.OnTest(model, config)
    pool = ground.pool(config)
    statistics = pool.statistics(config)
    network = ablation.fit_network(pool, statistics, config, {}, tmp_path / "last.pt", model.device)
    everybody, features = ground.everybody, ground.features
    again = ablation_ground.OnTest(model, config)
    monkeypatch.setattr(again, "extractor", None)  # whom nobody asks
    assert all(np.array_equal(*pair) for pair in zip(again.features, features, strict=True))
    kept = Reader(network, statistics, ablation_ground.Kept(config.reader), {})
    own = Reader(network, statistics, ground.extractor, {})
    said = ablation_ground.logits_of(kept, model, everybody[:3], [part[:3] for part in features], config)
    seen = model.examine(torch.from_numpy(everybody[:3]).unsqueeze(1), 1)
    assert np.abs(said - own.logits(seen)[:, 0].numpy()).max() < 0.02


def test_a_rehearsal_judges_what_it_shows_and_no_radiograph_of_the_test(examined, monkeypatch, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    monkeypatch.setattr(rehearsal, "BANDS", ((20, 40),))
    monkeypatch.setattr(rehearsal, "BLOBS", ((64, 0.3),))
    monkeypatch.setattr(ablation_ground, "splits_of", lambda _: pytest.fail("the test split is read"))
    flags = flags_of(tmp_path / "out", examined.phantoms, *sources("inference", examined), *FEW)
    asked = [*flags, "--reader.tuned-steps", "1", "--results", tmp_path, "--rows", "everything", "--on", "rehearsal"]
    run_benchmark(ablation.main, monkeypatch, *asked)
    for way in ("networks", "with_the_tuned_backbone"):
        part = detection.read_part(tmp_path / way / "everything-seed0.json")
        assert set(part["kinds"]) == {"corruption r 20 to 40", "blob r 64, 0.3"}
        shown = part["kinds"]["blob r 64, 0.3"]
        assert shown["normal_images"] == shown["abnormal_images"] == shown["patients"] == shown["masked_images"]


@pytest.mark.parametrize(("skill", "found"), [(1.0, 1.0), (0.0, 0.5)])
def test_who_sees_what_a_rehearsal_shows_is_told_from_who_does_not(skill, found, tmp_path):
    random = np.random.default_rng(0)
    normals, masks = np.zeros((12, 32, 32), np.float32), np.zeros((12, 32, 32), bool)
    for number, mask in enumerate(masks):
        mask[number : number + 12, 8:20] = True
    ground = object.__new__(ablation_ground.OnRehearsal)
    ground.normals = SimpleNamespace(images=normals, patients=range(len(normals)), shapes=[(512, 512)] * len(normals))
    ground.cases = [rehearsal.Rehearsal("blob", what, normals + masks, masks) for what in ("one", "two")]
    shown = np.concatenate([np.zeros_like(masks), masks, masks])
    logits = (random.normal(0, 0.1, shown.shape) + skill * 8 * shown).astype(np.float16)
    judged = ground.judged(logits, Config())
    assert judged["mean_over_kinds"]["auroc"] == pytest.approx(found, abs=0.3 * (skill == 0))
    assert (judged["mean_over_kinds"]["pixel_ap"] > 0.9) == bool(skill)
    assert judged["kinds"]["blob one"]["patients"] == 12


def test_the_tuned_backbone_alone_is_refused_where_none_is_tuned():
    with pytest.raises(UsageError, match="reader.tuned_steps is 0"):
        ablation.ways_of(ablation.TUNED, tuned=False)
    assert ablation.ways_of("everything", tuned=False) == (ablation.NETWORKS,)


def test_the_walk_is_what_phase_4_draws(examined):
    model = Normalizer.load(*(folder / "checkpoint_best.pt" for folder in (examined.phase1, examined.phase3)))
    size = (model.artefact["preprocessing"][side] for side in ("height", "width"))
    seen = model.examine(torch.zeros(2, 1, *size))
    (maps,) = ablation_ground.FEATURES["walk"](seen, ReaderConfig(), None)
    z, changed = maps.chunk(2, dim=1)
    assert z.equal(seen.z) and changed.abs().max() > 0
    assert torch.allclose(model.decode(z - changed), seen.normal, atol=1e-4)


def test_features_of_another_walk_are_made_anew_where_a_walk_is_read(examined, tmp_path):
    from command_line import parse_command

    def identity(*words):
        flags = flags_of(tmp_path, examined.phantoms, *sources("inference", examined), *FEW, *words)
        model, config = ablation.open_normalizer(parse_command("", [*flags, "--inference.method", "reader"]))
        ground = ablation_ground.OnTest(model, config)
        return ground.features_identity(ground.config)

    walks, heun = ("--reader.features", "walk"), ("--inference.solver", "heun")
    assert identity(*walks) != identity(*walks, *heun)
    assert identity() == identity(*heun)


def test_what_was_kept_of_others_who_are_judged_is_made_anew(tmp_path):
    ground = object.__new__(ablation_ground.OnRehearsal)
    ground.folder, ground.config, looked = tmp_path, Config(), []

    def look(images):
        looked.append(len(images))
        return [images[:, :, :2, :2]]

    for everybody in (np.zeros((3, 4, 4), np.float32), np.ones((3, 4, 4), np.float32), np.ones((2, 4, 4), np.float32)):
        ground.everybody, before = everybody, sum(looked)
        vars(ground).pop("fingerprint", None)
        for _ in range(2):  # the second time nobody looks
            (kept,) = ground.kept(look, "rehearsed", {})
            assert np.array_equal(kept[:, 0], everybody[:, :2, :2]) and sum(looked) == before + len(everybody)


def test_an_unknown_row_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--rows", "parts,all of it"])
    with pytest.raises(UsageError, match="all of it is unknown"):
        ablation.arguments()


@pytest.mark.parametrize(
    "asked",
    [
        *(("parts", "all of them"), ("everything", "../other"), ("everything", ".hidden"), ("everything", "a|b")),
        *(("without z", "everything"), ("everything", "fills"), ("everything", "a\nb"), ("everything", "x" * 101)),
    ],
)
def test_one_row_is_renamed_and_to_a_name_of_a_file(asked, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--rows", asked[0], "--as", asked[1]])
    with pytest.raises(UsageError, match="--as renames one row"):
        ablation.arguments()


def test_rows_of_one_noise_level_need_the_usual_ones(examined, monkeypatch, tmp_path):
    flags = flags_of(tmp_path / "out", examined.phantoms, *sources("inference", examined), "--reader.levels", "0.3")
    with pytest.raises(UsageError, match="leave reader.levels as it is"):
        run_benchmark(ablation.main, monkeypatch, *flags, "--results", tmp_path, "--rows", "levels")
