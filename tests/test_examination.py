"""Phase 4 without its networks: who is examined, who calibrates, and how results replace those of an earlier
examination.
"""

import csv
import dataclasses
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from checks import UsageError
from config import Config, DataConfig, InferenceConfig
from config_reading import ReaderConfig
from dataset import read_sample
from examination import (
    calibration_of,
    kept_reader,
    read_normals,
    records_to_examine,
    refuse_known_content,
    refuse_to_lose_the_backbone,
)
from files import write_json
from inference import figures_to_draw
from radiographs.manifest import Record, list_records, split_records
from reader_training import RECIPE
from reporting.lookup import LOOKUP, Pseudonyms
from results import (
    Unfinished,
    finished_entries,
    identity_of,
    left_by,
    refuse_to_replace,
    refuse_to_write_among,
    remove_what_was_published,
)


def write_radiographs(folder, names, size=(24, 32)):
    """Pictures of noise, one per name; each content is another."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 255, size, np.uint8)).save(path)


def write_manifest(folder, rows):
    with open(folder / "manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "split", "label", "kind", "patient"), *rows])


def config_of(root, test="", **inference):
    given = {"method": "plain", "calibration": str(root / "calibration"), "batch_size": 2}
    settings = InferenceConfig(**given | inference)
    return Config(data=DataConfig(root=str(root), test=str(test), num_workers=0), inference=settings)


def model_that_trained_on(*patients, contents=()):
    """Knows who trained, as the flow checkpoint says, and nothing else."""

    def knows(patient, digest):
        return patient in patients or digest in contents

    return SimpleNamespace(trained_on=knows, knows=knows)


@pytest.fixture
def study(tmp_path):
    """Two normals to train, three to validate, one to test; patients P0 to P5."""
    splits = ["train", "train", "val", "val", "val", "test"]
    rows = [(f"images/{i}.png", split, 0, "normal", f"P{i}") for i, split in enumerate(splits)]
    write_radiographs(tmp_path, [name for name, *_ in rows])
    write_manifest(tmp_path, rows)
    return tmp_path


# ---------------------------------------------------------------- who is examined


def test_the_test_split_is_examined_where_no_folder_is_named(study):
    records = records_to_examine(model_that_trained_on("P0", "P1"), config_of(study))
    assert [record.patient for record in records] == ["P5"]


def test_a_patient_who_trained_is_not_examined_unless_told(study, tmp_path):
    model, config = model_that_trained_on("P5"), config_of(study)
    with pytest.raises(
        UsageError, match="1 of 1 radiographs are of patients who trained or validated .*examine-training-patients True"
    ):
        records_to_examine(model, config)
    assert len(records_to_examine(model, config_of(study, examine_training_patients=True))) == 1


def test_a_file_of_another_folder_is_not_a_training_patient_for_having_the_same_name(study, tmp_path):
    write_radiographs(tmp_path / "elsewhere", ["000.png", "001.png"])
    records = records_to_examine(model_that_trained_on("000"), config_of(study, tmp_path / "elsewhere"))
    assert len(records) == 2


def test_a_patient_named_by_another_manifest_is_recognised(study, tmp_path):
    other = tmp_path / "elsewhere"
    write_radiographs(other, ["a.png", "b.png"])
    write_manifest(other, [("a.png", "", "", "", "P0"), ("b.png", "", "", "", "P9")])
    with pytest.raises(UsageError, match="1 of 2 radiographs"):
        records_to_examine(model_that_trained_on("P0"), config_of(study, other))


def test_a_picture_that_trained_is_recognised_whatever_its_name(study):
    sample = SimpleNamespace(digest="seen before")
    model = model_that_trained_on(contents={"seen before"})
    with pytest.raises(UsageError, match="radiograph 007 .* trained or validated the networks"):
        refuse_known_content(model, sample, 7, config_of(study))
    refuse_known_content(model, sample, 7, config_of(study, examine_training_patients=True))


# ---------------------------------------------------------------- who calibrates


def test_validation_normals_that_trained_are_left_out(study, capsys):
    images = read_normals(model_that_trained_on("P2"), config_of(study), "val")[0]
    assert images.shape == (2, 256, 256) and "1 of 3 validation normals trained" in capsys.readouterr().out


def test_a_reader_with_a_backbone_does_not_give_way_to_one_without_for_want_of_a_package(study, monkeypatch):
    monkeypatch.setattr("backbone.PACKAGES", ("no_such_package",))
    stored = {"belongs_to": {"backbone": "efficientnet-lite0"}}
    with pytest.raises(UsageError, match="was made with efficientnet-lite0, which is not installed here: pip install"):
        refuse_to_lose_the_backbone(stored, config_of(study), study / "calibration")
    without = dataclasses.replace(config_of(study), reader=ReaderConfig(backbone="none"))
    refuse_to_lose_the_backbone(stored, without, study / "calibration")


@pytest.mark.parametrize("why", ["listed", "trained", "unreadable"])
def test_too_few_validation_normals_are_told_before_the_reader_is_trained(why, study, monkeypatch):
    """Whatever the calibration's folder holds: a reader that is there is not lost."""
    patients = ["P0", "P1"]
    if why == "listed":
        rows = (study / "manifest.csv").read_text().replace("images/4.png,val", "images/4.png,test")
        (study / "manifest.csv").write_text(rows)
    elif why == "trained":
        patients.append("P4")
    else:
        (study / "images/4.png").write_bytes(b"no picture")
    config = config_of(study, method="reader")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_bad_share=0.9))
    Path(config.inference.calibration).mkdir(parents=True, exist_ok=True)
    (Path(config.inference.calibration) / "reader.json").write_text("{}")
    monkeypatch.setattr("examination.train_reader", lambda *given: pytest.fail("trained before it was looked"))
    with pytest.raises(UsageError, match="method reader needs those of 3 patients and there are 2"):
        calibration_of(model_that_trained_on(*patients), config)


def test_a_reader_of_an_earlier_version_is_called_that(study, monkeypatch, capsys):
    config = config_of(study, method="reader")
    Path(config.inference.calibration).mkdir(parents=True, exist_ok=True)
    (Path(config.inference.calibration) / "reader.pt").write_bytes(b"")
    for recipe, said in ((5, "was made by another version of this code"), (RECIPE, "belongs to other checkpoints")):
        stored = {"belongs_to": {"recipe": recipe, "backbone": "none"}}
        monkeypatch.setattr("examination.stored_reader", lambda path, stored=stored: stored)
        model = SimpleNamespace(identity={})
        assert kept_reader(model, config) is None and said in capsys.readouterr().out


def test_g_sees_the_normals_of_the_reader_as_it_saw_them_in_training(study):
    """Whatever their files' size: smaller than what the reader looks at, they are enlarged, and not blurred for G."""
    config = config_of(study, method="reader")
    images = read_normals(model_that_trained_on(), config, "val").images
    records = split_records(list_records(study, "auto"), config.data)["val"]
    trained_on = [read_sample(record, config.data).image for record in records]
    assert trained_on[0].shape == tuple(size // 2 for size in images.shape[1:])
    seen = torch.nn.functional.avg_pool2d(torch.from_numpy(images)[:, None], 2)[:, 0]
    np.testing.assert_allclose(seen, np.stack(trained_on), atol=1e-5)


def test_reader_normals_cuts_those_it_learns_on_and_not_those_it_is_calibrated_on(study):
    config = dataclasses.replace(config_of(study, method="reader"), reader=ReaderConfig(normals=1))
    everyone = read_normals(model_that_trained_on(), config_of(study, method="reader"), "val").images
    assert len(everyone) > 1 and len(read_normals(model_that_trained_on(), config, "val").images) == len(everyone)


def test_the_sizes_of_the_files_of_normals_are_known(study):
    config = config_of(study)
    records = split_records(list_records(study, "auto"), config.data)["val"]
    shapes = [read_sample(record, config.data).original_shape for record in records]
    sizes = read_normals(model_that_trained_on(), config, "val").file_sizes
    assert sizes == [np.min(shapes, axis=0).tolist(), np.max(shapes, axis=0).tolist()]


def test_the_reader_learns_on_those_alone_who_trained_the_networks(study, capsys):
    """A file that came to the folder later may be anybody's, with a lesion too."""
    records = split_records(list_records(study, "auto"), config_of(study).data)["train"]
    content = read_sample(records[0], config_of(study).data).digest
    images, pictures, *_ = read_normals(model_that_trained_on(contents=[content]), config_of(study), "train")
    said = f"{len(records) - 1} of {len(records)} training normals did not train the networks"
    assert images.shape == (1, 256, 256) and said in capsys.readouterr().out
    with pytest.raises(UsageError, match="no radiograph that trained the networks"):
        read_normals(model_that_trained_on(), config_of(study), "train")


@pytest.mark.parametrize("change", [{"height": 128}, {"fit": "pad"}, {"percentile_high": 99.0}, {"brightness": 0.2}])
def test_what_normals_show_depends_on_how_they_are_prepared(study, change):
    """What learnt on radiographs that were prepared otherwise did not learn the same (`tuned_before`)."""
    config = config_of(study)
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, **change))
    one, two = (read_normals(model_that_trained_on(), each, "val").pictures for each in (config, other))
    assert (one == two) == ("brightness" in change)


def test_without_a_validation_normal_that_did_not_train_there_is_no_threshold(study):
    with pytest.raises(UsageError, match="thresholds need radiographs that trained neither"):
        read_normals(model_that_trained_on("P2", "P3", "P4"), config_of(study), "val")[0]


def test_too_many_unreadable_validation_normals_stop_the_run_and_are_listed(study):
    (study / "images/3.png").write_bytes(b"not a picture")
    with (
        pytest.warns(UserWarning, match="1 of 3 files"),
        pytest.raises(UsageError, match=r"1 of 3 files .*max_bad_share"),
    ):
        read_normals(model_that_trained_on(), config_of(study), "val")[0]
    assert "3.png" in (study / "calibration" / "skipped_local_only.csv").read_text()


# ---------------------------------------------------------------- results


def listed(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_results_are_never_written_among_radiographs_or_masks(study, tmp_path):
    records = list_records(study, "auto")
    for out in (study, study / "images", tmp_path / "masks"):
        masked = dataclasses.replace(records[0], mask=tmp_path / "masks" / "a.png")
        with pytest.raises(UsageError, match="holds radiographs or masks"):
            refuse_to_write_among([*records, masked], out)
    refuse_to_write_among(records, study / "results")
    (study / "loop.png").symlink_to("loop.png")
    refuse_to_write_among([dataclasses.replace(records[0], path=study / "loop.png")], study / "results")


def results_of(folder, identity, **texts):
    """What an examination wrote, by name with _ for a dot."""
    fresh = Unfinished(folder, identity, resume=True)
    for name, text in texts.items():
        path = fresh.folder / name.replace("maps_", "maps/").replace("_png", ".png").replace("_csv", ".csv")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return fresh


def test_earlier_results_stay_until_the_new_ones_are_complete(tmp_path):
    results_of(tmp_path, "old", scores_csv="old", result_000_png="old", result_001_png="old", maps_x="old").publish()
    (tmp_path / "result_notes.png").write_text("somebody else's")
    fresh = results_of(tmp_path, "new", scores_csv="new", result_000_png="new")
    fresh.keep(0, np.zeros((4, 4)), None)
    assert (tmp_path / "scores.csv").read_text() == "old" and (tmp_path / "maps" / "x").exists()
    fresh.publish()
    assert listed(tmp_path) == ["examination.json", "result_000.png", "result_notes.png", "scores.csv"]
    assert (tmp_path / "scores.csv").read_text() == (tmp_path / "result_000.png").read_text() == "new"


def test_files_that_no_examination_wrote_are_refused(tmp_path):
    results_of(tmp_path, "old", scores_csv="old").publish()
    refuse_to_replace(tmp_path)
    refuse_to_replace(tmp_path / "nowhere")
    (tmp_path / "result_2019_jaw.png").write_text("a radiograph")
    with pytest.raises(UsageError, match="holds result_2019_jaw.png, which no examination of this version wrote"):
        refuse_to_replace(tmp_path)


def test_a_killed_move_leaves_no_file_without_an_owner(tmp_path, monkeypatch):
    results_of(tmp_path, "old", scores_csv="old", result_001_png="old").publish()
    fresh, replace = results_of(tmp_path, "new", scores_csv="new", result_000_png="new"), os.replace

    def killed(source, target):
        if str(target).endswith("scores.csv"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        fresh.publish()
    monkeypatch.undo()
    refuse_to_replace(tmp_path)
    results_of(tmp_path, "a third", scores_csv="third").publish()
    assert listed(tmp_path) == ["examination.json", "scores.csv"]


def test_results_that_were_moved_away_are_not_missed(tmp_path):
    results_of(tmp_path, "old", scores_csv="old", maps_x="old").publish()
    shutil.move(tmp_path / "maps", tmp_path / "archive")
    results_of(tmp_path, "new", scores_csv="new").publish()
    assert finished_entries(tmp_path, "new") == [] and listed(tmp_path / "archive") == ["x"]


@pytest.mark.parametrize("how", ["removed", "emptied"])
def test_an_interrupted_examination_that_lost_something_begins_anew(how, tmp_path):
    killed = results_of(tmp_path, "an identity", result_000_png="drawn")
    killed.entries.append({"index": 0})
    killed.save(1)
    assert Unfinished(tmp_path, "an identity", resume=True).done == 1
    if how == "removed":
        (killed.folder / "result_000.png").unlink()
    else:
        (killed.folder / "result_000.png").write_text("")
    assert Unfinished(tmp_path, "an identity", resume=True).done == 0


@pytest.mark.parametrize("name", ["result_000.png", "maps/000.npy", "report/000_outline.svg"])
def test_what_is_removed_while_an_examination_runs_ends_it(name, tmp_path):
    parts = [f"report/000_{part}" for part in ("original.png", "normal.png", "map.png", "outline.svg", "thumb.jpg")]
    running = Unfinished(tmp_path, "an identity", resume=True)
    for part in ("result_000.png", "maps/000.npy", *parts):
        write_json(running.folder / part, {})
    running.entries.append({"index": 0, "figure": "result_000.png", "map": "maps/000.npy", "report": {"outlined": 1}})
    running.save(1)
    (running.folder / name).unlink()
    with pytest.raises(UsageError, match=f"{name} was removed .*give the same command again"):
        running.publish()


@pytest.mark.parametrize("left", [("kept/0.npz",), ("examination.json",), ("kept/0.npz", "examination.json")])
def test_what_a_run_that_was_killed_at_its_very_end_left_is_removed(left, tmp_path):
    results_of(tmp_path, "an identity", scores_csv="index").publish()
    killed = Unfinished(tmp_path, "an identity", resume=True)
    killed.keep(0, np.zeros((4, 4)), None)
    killed.save(1)
    for path in {"kept/0.npz", "examination.json"} - set(left):
        (killed.folder / path).unlink()
    remove_what_was_published(tmp_path, "an identity")
    assert not killed.folder.exists() and listed(tmp_path) == ["examination.json", "scores.csv"]


def test_an_examination_that_goes_on_to_other_results_is_left_to_them(tmp_path):
    Unfinished(tmp_path, "another", resume=True).save(0)
    remove_what_was_published(tmp_path, "an identity")
    assert left_by(tmp_path, "another") is not None


def test_a_kept_map_that_rotted_is_refused_with_the_remedy(tmp_path):
    killed = Unfinished(tmp_path, "an identity", resume=True)
    killed.keep(0, np.random.default_rng(0).normal(size=(8, 8)), None)
    (path,) = killed.folder.glob("kept/*")
    content = bytearray(path.read_bytes())
    content[200:210] = b"XXXXXXXXXX"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="0.npz is damaged: give the command again with --runtime.resume False"):
        killed.kept(0)


def test_a_table_that_rotted_is_not_taken_for_finished(tmp_path):
    results_of(tmp_path, "an identity", scores_csv="index,name").publish()
    assert finished_entries(tmp_path, "an identity") == []
    (tmp_path / "scores.csv").write_text("imdex,name")
    assert finished_entries(tmp_path, "an identity") is None


@pytest.mark.parametrize(("identity", "resume"), [("another", True), ("an identity", False)])
def test_what_a_killed_examination_left_is_not_mixed_with_another(identity, resume, tmp_path):
    killed = Unfinished(tmp_path, "an identity", resume=True)
    killed.entries.append({"index": 0})
    killed.save(1)
    (killed.folder / "result_009.png").write_text("of the killed one")
    fresh = Unfinished(tmp_path, identity, resume)
    assert fresh.entries == [] and fresh.done == 0
    fresh.publish()
    assert listed(tmp_path) == ["examination.json"]


def test_half_a_file_of_a_killed_examination_does_not_become_a_result(tmp_path):
    killed = Unfinished(tmp_path, "an identity", resume=True)
    killed.save(0)
    (killed.folder / "report").mkdir()
    (killed.folder / "report" / ".003_map.png.4711.tmp").write_text("half of i")
    Unfinished(tmp_path, "an identity", resume=True).publish()
    assert listed(tmp_path) == ["examination.json"]


def test_a_killed_examination_goes_on_with_what_it_knew(tmp_path):
    killed, mask = Unfinished(tmp_path, "an identity", resume=True), np.eye(4, dtype=bool)
    killed.entries.append({"index": 0, "score": 0.1 + 0.2})
    killed.keep(0, np.full((4, 4), 0.1, np.float32), mask)
    killed.save(1)
    killed.entries.append({"index": 1})  # not known to be whole
    fresh = Unfinished(tmp_path, "an identity", resume=True)
    assert fresh.entries == [{"index": 0, "score": 0.1 + 0.2}] and fresh.done == 1
    kept = fresh.kept(0)
    np.testing.assert_array_equal(kept[0], np.full((4, 4), 0.1, np.float32))
    np.testing.assert_array_equal(kept[1], mask)
    fresh.keep(1, np.zeros((4, 4)), None)
    assert fresh.kept(1)[1] is None


def test_finished_results_are_known_while_all_of_them_are_there(tmp_path):
    fresh = Unfinished(tmp_path, "an identity", resume=True)
    fresh.entries.append({"index": 0})
    (fresh.folder / "scores.csv").write_text("new")
    assert finished_entries(tmp_path, "an identity") is None
    fresh.publish()
    assert finished_entries(tmp_path, "an identity") == [{"index": 0}]
    assert finished_entries(tmp_path, "another") is None
    (tmp_path / "scores.csv").unlink()
    assert finished_entries(tmp_path, "an identity") is None


def test_the_identity_of_an_examination_is_that_of_its_files_and_settings(study):
    records = list_records(study, "auto")
    known = identity_of(records, figures=3)
    assert known == identity_of(list_records(study, "auto"), figures=3) != identity_of(records, figures=4)
    assert known != identity_of(records[:-1], figures=3)
    other = dataclasses.replace(records[0], kind="something else")
    assert known != identity_of([other, *records[1:]], figures=3)
    os.utime(records[0].path, ns=(1, 1))
    changed = identity_of(records, figures=3)
    assert known != changed
    records[0].path.unlink()
    assert identity_of(records, figures=3) not in (known, changed)


def test_pseudonyms_are_the_same_in_the_next_run_and_others_elsewhere(tmp_path):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    first = Pseudonyms(here)
    name = first.name(0, Path("Smith.png"))
    first.save(here)
    assert Pseudonyms(here).name(3, Path("Smith.png")) == name != Pseudonyms(elsewhere).name(0, Path("Smith.png"))
    assert "Smith" not in name and "Smith" in (here / LOOKUP).read_text()


def test_figures_are_spread_over_the_kinds():
    record = Record(Path("x"), "test", 1, "cyst", None, "p", "file")
    kinds = ["cyst"] * 10 + ["caries"] * 2
    records = [dataclasses.replace(record, kind=kind) for kind in kinds]
    assert figures_to_draw(records, 4) == {0, 1, 10, 11}
    assert figures_to_draw(records, -1) == set(range(12)) and figures_to_draw(records, 0) == set()
