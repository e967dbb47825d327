"""Public data sets as miniatures of their true layout: what was annotated is read back from the manifest."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pipeline import table as table_of

from checks import UsageError
from config import DataConfig
from dataset import read_sample
from radiographs.adapters import dc1000, dentex, plain, tufts, ufba
from radiographs.adapters.__main__ import main
from radiographs.adapters.drawing import draw
from radiographs.adapters.rows import Row
from radiographs.adapters.writing import DUPLICATES, _patients
from radiographs.manifest import list_records, split_records

SIZE = (64, 128)
CONFIG = DataConfig(height=64, width=128)
DISEASES = "training_data/quadrant-enumeration-disease"


def image(path, seed):
    """A picture of its own for each seed, of SIZE."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (16, 17), dtype=np.uint8)
    Image.fromarray(coarse).resize(SIZE[::-1], Image.Resampling.NEAREST).convert("L").save(path)


def mask_file(path, rows=slice(0), columns=slice(0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(255 * inside(rows, columns).astype(np.uint8)).save(path)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def inside(rows, columns):
    """A mask of SIZE, True there."""
    mask = np.zeros(SIZE, bool)
    mask[rows, columns] = True
    return mask


def coco(names, teeth):
    """DENTEX's JSON: an entry for each name, and teeth as (name, id of the diagnosis, bbox, segmentation)."""
    height, width = SIZE
    return {
        "images": [{"id": 7 + i, "file_name": name, "height": height, "width": width} for i, name in enumerate(names)],
        "annotations": [
            {"image_id": 7 + names.index(name), "bbox": box, "segmentation": outline}
            | {"category_id_1": 0, "category_id_2": 3, "category_id_3": diagnosis}
            for name, diagnosis, box, outline in teeth
        ],
        "categories_1": [{"id": i, "name": i + 1} for i in range(4)],
        "categories_2": [{"id": i, "name": i + 1} for i in range(8)],
        "categories_3": [
            {"id": i, "name": name} for i, name in enumerate(["Impacted", "Caries", "Periapical Lesion", "Deep Caries"])
        ],
    }


@pytest.fixture
def small_dentex(tmp_path):
    names = ["train_0.png", "train_1.png", "train_2.png"]
    for i, name in enumerate(names):
        image(tmp_path / DISEASES / "xrays" / name, i)
        image(tmp_path / "training_data/quadrant/xrays" / name, 10 + i)
    square = [[40, 20, 59, 20, 59, 29, 40, 29]]
    teeth = [("train_0.png", 1, [10, 4, 20, 8], []), ("train_0.png", 3, [70, 4, 9.5, 3.2], [])]
    teeth += [("train_1.png", 0, [40, 20, 20, 10], square)]
    write(tmp_path / DISEASES / "train_quadrant_enumeration_disease.json", coco(names, teeth))
    image(tmp_path / "validation_data/validation_data/quadrant_enumeration_disease/xrays/val_0.png", 20)
    write(tmp_path / "validation_triple.json", coco(["val_0.png"], [("val_0.png", 2, [0, 0, 5, 5], [])]))
    for i, label in enumerate(["1-çürük-46", "0-saglam-11"]):
        image(tmp_path / f"test_data/disease/input/test_{i}.png", 30 + i)
        shapes = [{"label": label, "points": [[90, 30], [99, 30], [99, 39], [90, 39]]}]
        content = {"shapes": shapes, "imageHeight": SIZE[0], "imageWidth": SIZE[1]}
        write(tmp_path / f"test_data/disease/label/test_{i}.json", content)
    return tmp_path


@pytest.fixture
def small_tufts(tmp_path):
    findings = {
        "1": [{"title": "None", "polygons": "none"}],
        "245": [{"title": "Periapical", "polygons": [[[20, 10], [39, 10], [39, 19], [20, 19]], [[1, 1], [2, 2]]]}],
        "1051": [
            {"title": "Non-Odontogenic", "polygons": [[[0, 50], [9, 50], [9, 59], [0, 59]]]},
            {"title": "Pericoronal", "polygons": [[[0, 50], [9, 50], [9, 59], [0, 59]]]},
        ],
    }
    for number in (*findings, "2"):
        image(tmp_path / f"Radiographs/{number}.JPG", int(number))
    records = [
        {"External ID": f"{number}.jpg", "Description": "", "Label": {"objects": objects}}
        for number, objects in findings.items()
    ]
    write(tmp_path / "Expert/expert.json", records)
    mask_file(tmp_path / "Expert/mask/245.jpg")
    return tmp_path


def read_back(folder):
    """What the phases see of a manifest: record by the name of its file, and its mask (k H, k W)."""
    records = list_records(folder)
    samples = {record.path.name: read_sample(record, CONFIG) for record in records}
    return {record.path.name: record for record in records}, {name: each.mask for name, each in samples.items()}


def test_dentex_boxes_and_outlines_become_masks_and_diagnoses_kinds(small_dentex, capsys):
    main(["dentex", str(small_dentex)])
    rows = {row["image"]: row for row in table_of(small_dentex / "manifest.csv")}
    records = {record.path.relative_to(small_dentex).as_posix(): record for record in list_records(small_dentex)}
    masks = {name: read_sample(record, CONFIG).mask for name, record in records.items()}
    both = inside(slice(4, 12), slice(10, 30)) | inside(slice(4, 8), slice(70, 80))
    np.testing.assert_array_equal(masks[f"{DISEASES}/xrays/train_0.png"], both)
    np.testing.assert_array_equal(masks[f"{DISEASES}/xrays/train_1.png"], inside(slice(20, 30), slice(40, 60)))
    np.testing.assert_array_equal(masks["test_data/disease/input/test_0.png"], inside(slice(30, 40), slice(90, 100)))
    told = {name: (record.split, record.label, record.kind) for name, record in records.items()}
    assert told[f"{DISEASES}/xrays/train_0.png"] == ("train", 1, "caries + deep caries")
    assert told[f"{DISEASES}/xrays/train_2.png"] == ("train", 0, "normal")
    assert told["training_data/quadrant/xrays/train_0.png"] == ("train", None, "")
    assert told["test_data/disease/input/test_0.png"] == ("test", 1, "caries")
    assert told["test_data/disease/input/test_1.png"] == ("test", 0, "normal")
    sources = [rows[f"{DISEASES}/xrays/train_{i}.png"]["mask_from"] for i in range(3)]
    assert sources == ["box", "polygon", ""] and len(records) == 9
    assert {record.split for name, record in records.items() if "val_0" in name} == {"val"}
    said = capsys.readouterr().out
    assert "CC BY-NC-SA" in said and "2 from box, 2 from polygon" in said and "2305.19112" in said


@pytest.mark.filterwarnings("ignore:.*split val are left out")
def test_a_file_of_dentex_is_a_patient_of_its_own_in_each_part(small_dentex, capsys):
    """train_0.png of one part is another radiograph than that of the next."""
    main(["dentex", str(small_dentex)])
    records = list_records(small_dentex)
    assert len({record.patient for record in records}) == len(records)
    with pytest.warns(UserWarning, match="abnormal radiographs of the split train are left out"):
        assert {name: len(split) for name, split in split_records(records, CONFIG).items()}["test"] == 2


def test_the_manifest_of_a_set_is_written_again_to_the_last_byte(small_dentex, capsys):
    main(["dentex", str(small_dentex)])
    before = (small_dentex / "manifest.csv").read_bytes()
    main(["dentex", str(small_dentex)])
    assert (small_dentex / "manifest.csv").read_bytes() == before


def test_tufts_outlines_are_masks_and_none_is_normal(small_tufts, capsys):
    main(["tufts", str(small_tufts)])
    records, masks = read_back(small_tufts)
    kinds = {name: (record.label, record.kind) for name, record in records.items()}
    assert kinds == {
        "1.JPG": (0, "normal"),
        "245.JPG": (1, "periapical"),
        "1051.JPG": (1, "non-odontogenic + pericoronal"),
        "2.JPG": (None, ""),
    }
    np.testing.assert_array_equal(masks["245.JPG"], inside(slice(10, 20), slice(20, 40)))
    np.testing.assert_array_equal(masks["1051.JPG"], inside(slice(50, 60), slice(0, 10)))  # outlined twice
    assert masks["1.JPG"] is None and {record.split for record in records.values()} == {None}


def test_categories_of_ufba_are_kinds_and_masks_of_teeth_are_no_radiographs(tmp_path, capsys):
    home = tmp_path / "bb_u_net_dataset"
    for category in range(1, 11):
        image(home / f"panoramic_x_rays/cate{category}-00002.jpg", category)
    mask_file(home / "labels/cat 10 - export/cate10-00002_11.ome.tiff")
    mask_file(tmp_path / "masks/cate8-00002.jpg")
    image(tmp_path / "yolo/cate9-00034_jpg.rf.83b481150a51.jpg", 99)
    main(["ufba", str(tmp_path)])
    records, _ = read_back(tmp_path)
    kinds = [records[f"cate{category}-00002.jpg"].kind for category in range(1, 11)]
    assert kinds == ["appliance", "normal", "appliance", "normal", "implant", "supernumerary",
                     "appliance", "normal", "appliance", "normal"]  # fmt: skip
    assert len(records) == 10


def test_dc1000_takes_the_masks_of_the_set_and_leaves_the_pieces_alone(tmp_path, capsys):
    home = tmp_path / "DC1000_dataset"
    for number, part in ((1, "org_train_dataset"), (2, "org_train_dataset"), (1008, "org_test_dataset")):
        image(home / part / f"images/{number}.png", number)
    mask_file(home / "org_train_dataset/labels_clean/1.png", slice(3, 5), slice(6, 9))
    mask_file(home / "org_train_dataset/labels_clean/2.png")
    mask_file(home / "org_test_dataset/labels/1008.png", slice(3, 5), slice(6, 9))
    image(home / "train/images/5.png", 5)
    image(tmp_path / "dataset/test/images_cut/6.png", 6)
    main(["dc1000", str(tmp_path)])
    records, masks = read_back(tmp_path)
    told = {name: (record.split, record.kind) for name, record in records.items()}
    assert told == {"1.png": ("train", "caries"), "2.png": ("train", "normal"), "1008.png": ("test", "caries")}
    np.testing.assert_array_equal(masks["1008.png"], inside(slice(3, 5), slice(6, 9)))
    assert not (tmp_path / "masks").exists() and not masks["2.png"].any()


def test_two_folders_of_ones_own_train_and_test(tmp_path, capsys):
    for i in range(3):
        image(tmp_path / f"healthy/{i}.png", i)
    image(tmp_path / "new/normal/3.png", 3)
    image(tmp_path / "new/Cyst/4.png", 4)
    main(["folder", str(tmp_path / "healthy"), str(tmp_path / "new")])
    records, _ = read_back(tmp_path)
    assert [(record.split, record.label) for record in records.values()] == [("train", 0)] * 3 + [("test", None)] * 2
    main(["folder", str(tmp_path / "healthy"), str(tmp_path / "new"), "--kinds"])
    records, _ = read_back(tmp_path)
    assert (records["3.png"].kind, records["4.png"].kind) == ("normal", "cyst")
    assert {row["patient"] for row in table_of(tmp_path / "manifest.csv")} == {""}  # headers and folders say


def test_copies_inside_a_set_and_between_train_and_test_are_listed(small_dentex, capsys):
    training, tests = small_dentex / "training_data/quadrant/xrays", small_dentex / "test_data/disease/input"
    shutil.copy(training / "train_0.png", training / "train_9.png")
    with Image.open(training / "train_1.png") as original:
        original.resize((64, 32)).resize(SIZE[::-1]).save(tests / "test_0.png")
    main(["dentex", str(small_dentex)])
    listed = small_dentex / DUPLICATES
    pairs = {(row["image"].split("/")[-1], row["looks_like"].split("/")[-1]) for row in table_of(listed)}
    assert pairs == {("train_0.png", "train_9.png"), ("train_1.png", "test_0.png")}
    assert "2 pairs of radiographs are one picture, 1 of them between test and the rest" in capsys.readouterr().out
    assert stat.S_IMODE(listed.stat().st_mode) == 0o600


def test_copies_in_a_set_without_splits_stay_together(small_tufts, capsys):
    shutil.copy(small_tufts / "Radiographs/1.JPG", small_tufts / "Radiographs/3.JPG")
    main(["tufts", str(small_tufts)])
    records, _ = read_back(small_tufts)
    assert records["3.JPG"].patient == records["1.JPG"].patient != records["2.JPG"].patient


@pytest.mark.parametrize("adapter", [dentex, tufts, ufba, dc1000])
def test_a_folder_of_something_else_is_refused_with_the_layout(adapter, tmp_path):
    image(tmp_path / "holiday.png", 0)
    with pytest.raises(UsageError, match="is not laid out as .* is: it needs"):
        adapter.rows(tmp_path)


def test_two_copies_of_a_set_are_not_mixed(small_tufts, tmp_path):
    shutil.copytree(tmp_path / "Radiographs", tmp_path / "again/Radiographs")
    with pytest.raises(UsageError, match="holds Radiographs 2 times"):
        tufts.rows(small_tufts)


def test_folders_in_each_other_are_no_normals_and_tests(tmp_path):
    image(tmp_path / "all/new/0.png", 0)
    with pytest.raises(UsageError, match="lie in each other"):
        plain.rows(tmp_path / "all", tmp_path / "all/new")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda home: (home / "manifest.csv").write_text("image,label\nmine.png,0\n"), "was not made here"),
        (lambda home: (home / "Expert/expert.json").write_text("{"), "cannot be read as JSON"),
        (lambda home: (home / "Expert/expert.json").write_text('[{"External ID": "1.jpg"}]'), "is not as tufts has it"),
        (lambda home: shutil.rmtree(home / "Radiographs"), "it needs Radiographs/"),
    ],
)
def test_what_cannot_be_done_is_one_line(small_tufts, capsys, spoil, words):
    spoil(small_tufts)
    with pytest.raises(SystemExit) as end:
        main(["tufts", str(small_tufts)])
    error = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and error.startswith("error: ") and words in error


def test_a_manifest_outside_of_the_set_is_refused(small_tufts, tmp_path_factory, capsys):
    with pytest.raises(SystemExit):
        main(["tufts", str(small_tufts), "--out", str(tmp_path_factory.mktemp("else") / "manifest.csv")])
    assert "which a manifest must" in capsys.readouterr().err


def test_files_that_are_not_there_or_cannot_be_read_are_counted(small_dentex, capsys):
    (small_dentex / DISEASES / "xrays/train_1.png").unlink()
    (small_dentex / "training_data/quadrant/xrays/train_2.png").write_bytes(b"no picture")
    main(["dentex", str(small_dentex)])
    said = capsys.readouterr().out
    assert "1 files that the annotation names are not there" in said and "1 files cannot be read" in said
    assert len(list_records(small_dentex)) == 8


def test_an_annotation_for_another_size_is_refused(small_tufts):
    row = Row(small_tufts / "1.JPG", boxes=((0, 0, 4, 4),), size=(32, 64))
    with pytest.raises(UsageError, match="made for 32 x 64"):
        draw(row, SIZE)


@pytest.mark.parametrize(
    ("box", "covered"),
    [
        ((10, 20, 5, 4), inside(slice(20, 24), slice(10, 15))),
        ((-3, -3, 5, 5), inside(slice(0, 2), slice(0, 2))),
        ((10.4, 20.6, 0.2, 0.2), inside(slice(20, 21), slice(10, 11))),
        ((120, 60, 50, 50), inside(slice(60, 64), slice(120, 128))),
    ],
)
def test_a_box_covers_every_pixel_that_it_touches(box, covered, tmp_path):
    drawn = draw(Row(tmp_path, boxes=(box,)), SIZE)
    np.testing.assert_array_equal(drawn, 255 * covered.astype(np.uint8))


def test_a_name_that_a_spreadsheet_would_execute_still_names_its_file(tmp_path, capsys):
    image(tmp_path / "normals/0.png", 0)
    image(tmp_path / "=new/1.png", 1)
    main(["folder", str(tmp_path / "normals"), str(tmp_path / "=new")])
    assert list_records(tmp_path)[1].path.is_file()


def test_help_lists_the_sets_and_the_layout_of_one(capsys):
    for words, expected in (
        (["--help"], ["dentex", "tufts", "ufba", "dc1000", "folder"]),
        (["tufts", "-h"], ["Expert/"]),
    ):
        with pytest.raises(SystemExit) as end:
            main(words)
        said = capsys.readouterr().out
        assert end.value.code == 0 and all(word in said for word in expected)


# ---------------------------------------------------------------- names, and what is there already


def refused(capsys, *words):
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    said = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(said) == 1 and said[0].startswith("error: ")
    return said[0]


def marked(home, names):
    """A set of DENTEX's layout of which each image has a box of its own, at column 4 times its position."""
    for i, name in enumerate(names):
        image(home / DISEASES / "xrays" / name, i)
    teeth = [(name, 1, [4 * i, 0, 4, 4], []) for i, name in enumerate(names)]
    write(home / DISEASES / "train_quadrant_enumeration_disease.json", coco(names, teeth))
    return home


def test_names_that_differ_in_a_suffix_or_a_folder_keep_their_own_masks_and_patients(tmp_path, capsys):
    names = ["1.png", "1.jpg", "x/y.png", "x__y.png", "train_0.tif", f"{'a' * 245}.png"]
    main(["dentex", str(marked(tmp_path, names))])
    records = list_records(tmp_path)
    for i, record in enumerate(records):
        expected = inside(slice(0, 4), slice(4 * i, 4 * i + 4))
        np.testing.assert_array_equal(read_sample(record, CONFIG).mask, expected)
    assert len(records) == len({record.patient for record in records}) == len(names)


def test_whoever_looks_like_two_others_makes_one_patient_of_three(tmp_path):
    rows = [Row(tmp_path / f"{i}.png") for i in range(5)]
    patients = _patients(rows, [(1, 2), (0, 2), (3, 4)], tmp_path, "set")
    assert patients == ["set/0.png"] * 3 + ["set/3.png"] * 2
    assert _patients(rows, [(0, 2), (1, 2)], tmp_path, "set") == ["set/0.png"] * 3 + ["set/3.png", "set/4.png"]


def test_names_that_no_manifest_holds_are_left_out_and_counted(tmp_path, capsys):
    for folder in ("normals", "new"):
        image(tmp_path / folder / "0.png", len(folder))
        shutil.copy(tmp_path / folder / "0.png", os.fsencode(tmp_path / folder) + b"/\xff\xe9.png")
    image(tmp_path / "new/ 1.png", 1)
    main(["folder", str(tmp_path / "normals"), str(tmp_path / "new")])
    assert "2 files whose names are not UTF-8" in capsys.readouterr().out
    records = list_records(tmp_path)
    assert len(records) == 3 and all(record.path.is_file() for record in records)


def test_a_set_in_a_folder_of_any_bytes_is_listed_and_printed(small_tufts, capsys):
    home = Path(os.fsdecode(os.fsencode(small_tufts) + b"/\xff"))
    home.mkdir()
    for name in ("Radiographs", "Expert"):
        shutil.move(small_tufts / name, home / name)
    main(["tufts", str(home)])
    assert "\\udcff/manifest.csv" in capsys.readouterr().out and len(list_records(home)) == 4


@pytest.mark.parametrize("kind", ["Cyst ", "NORMAL", "fracture of the jaw, old"])
def test_the_name_of_a_kind_is_read_back_as_it_was_listed(tmp_path, capsys, kind):
    image(tmp_path / "normals/0.png", 0)
    image(tmp_path / "new" / kind / "1.png", 1)
    main(["folder", str(tmp_path / "normals"), str(tmp_path / "new"), "--kinds"])
    record = list_records(tmp_path)[1]
    assert record.kind == kind.strip().lower() and record.label == int(record.kind != "normal")


@pytest.mark.parametrize("kind", ["=cmd", " =cmd", "@x", "  "])
def test_a_kind_that_a_manifest_would_change_is_refused(tmp_path, capsys, kind):
    image(tmp_path / "normals/0.png", 0)
    image(tmp_path / "new" / kind / "1.png", 1)
    words = refused(capsys, "folder", tmp_path / "normals", tmp_path / "new", "--kinds")
    assert repr(kind.strip()) in words and not (tmp_path / "manifest.csv").exists()


def test_files_of_a_hand_are_not_overwritten(tmp_path, capsys):
    marked(tmp_path, ["1.png"])
    main(["dentex", str(tmp_path)])
    (mask,) = (tmp_path / "masks/dentex").iterdir()
    own = mask.read_bytes()
    for path in (mask, tmp_path / DUPLICATES):
        (tmp_path / "manifest.csv").unlink(missing_ok=True)
        (tmp_path / DUPLICATES).unlink(missing_ok=True)
        path.write_bytes(b"a hand's")
        words = refused(capsys, "dentex", tmp_path)
        assert f"{path} is there already" in words and "move it away" in words
        assert path.read_bytes() == b"a hand's" and not (tmp_path / "manifest.csv").exists()
        path.unlink()
    mask.write_bytes(own)  # what an interrupted run leaves
    main(["dentex", str(tmp_path)])


def test_masks_that_an_earlier_manifest_lists_are_drawn_anew(tmp_path, capsys):
    main(["dentex", str(marked(tmp_path, ["1.png"]))])
    content = coco(["1.png"], [("1.png", 1, [0, 0, 9, 9], [])])
    write(tmp_path / DISEASES / "train_quadrant_enumeration_disease.json", content)
    main(["dentex", str(tmp_path)])
    np.testing.assert_array_equal(read_sample(list_records(tmp_path)[0], CONFIG).mask, inside(slice(0, 9), slice(0, 9)))


# ---------------------------------------------------------------- annotations that are damaged


@pytest.mark.parametrize(
    "shapes",
    [
        {"polygons": (((0, 0), (float("nan"), 0), (5, 5)),)},
        {"polygons": (((0, 0), (1e12, 0), (5, 5)),)},
        {"polygons": (((0, 0), (5,), (5, 5)),)},
        {"polygons": (tuple((i % 100, i % 7) for i in range(200_000)),)},
        {"polygons": (((0, 0), (9, 0), (9, 9)),) * 5000},
        {"boxes": ((0, 0, float("inf"), 5),)},
        {"boxes": ((10**400, 0, 5, 5),)},
        {"boxes": ((0, 0, 5, 5),) * 5000},
    ],
)
def test_what_cannot_be_drawn_names_the_image(tmp_path, shapes):
    with pytest.raises(UsageError, match=r"the annotation of 7\.png has .* expected are"):
        draw(Row(tmp_path / "7.png", **shapes), SIZE)


def test_an_outline_that_leaves_the_picture_is_cut_there(tmp_path):
    drawn = draw(Row(tmp_path, polygons=(((-500, 10), (60_000, 10), (60_000, 19), (-500, 19)),)), SIZE)
    np.testing.assert_array_equal(drawn > 0, inside(slice(10, 20), slice(None)))


def one_tooth(home, **changed):
    """A set of one image whose tooth or entry has something else there, and its annotation."""
    marked(home, ["1.png"])
    annotation = home / DISEASES / "train_quadrant_enumeration_disease.json"
    content = json.loads(annotation.read_text())
    for place in (content["annotations"][0], content["images"][0]):
        place |= {name: value for name, value in changed.items() if name in place}
    write(annotation, content)
    return annotation


@pytest.mark.parametrize(
    "changed",
    [
        {"bbox": ["a", "b", "c", "d"]},
        {"bbox": [1, 2]},
        {"bbox": [1, 2, 3, float("nan")]},
        {"bbox": [1, 2, 3, 10**400]},
        {"bbox": "1234"},
        {"bbox": None},
        {"segmentation": [["a", "b", "c", "d", "e", "f"]]},
        {"segmentation": [[1, 2, 3, 4, 5]]},
        {"segmentation": ["abcdef"]},
        {"height": "forty"},
        {"height": None},
        {"image_id": []},
        {"file_name": 5},
    ],
)
def test_a_damaged_annotation_is_named_with_what_is_expected(tmp_path, capsys, changed):
    annotation = one_tooth(tmp_path, **changed)
    words = refused(capsys, "dentex", tmp_path)
    assert str(annotation) in words and "is not as dentex has it" in words and "expected" in words


def test_numbers_may_be_text_and_an_empty_outline_leaves_the_box(tmp_path, capsys):
    one_tooth(tmp_path, height="64", bbox=["0", "0", "4.0", "8"], segmentation=[[]])
    main(["dentex", str(tmp_path)])
    np.testing.assert_array_equal(read_sample(list_records(tmp_path)[0], CONFIG).mask, inside(slice(0, 8), slice(0, 4)))


@pytest.mark.parametrize("name", ["a" * 5000 + ".png", "a\0.png", "\ud800.png"])
def test_names_that_no_file_can_have_are_not_there(tmp_path, capsys, name):
    one_tooth(tmp_path, file_name=name)
    assert "none of the 1 radiographs" in refused(capsys, "dentex", tmp_path)


@pytest.mark.parametrize("ring", [[[1, 2], [3], [4, 5]], [["a", 1], ["b", 2], ["c", 3]], "abc", 5, [1, 2, 3]])
def test_a_damaged_outline_of_tufts_is_named(small_tufts, capsys, ring):
    content = [{"External ID": "1.jpg", "Label": {"objects": [{"title": "Cyst", "polygons": [ring]}]}}]
    write(small_tufts / "Expert/expert.json", content)
    words = refused(capsys, "tufts", small_tufts)
    assert "expert.json is not as tufts has it" in words and "expected is a list of" in words


def test_a_damaged_label_of_the_test_is_named(small_dentex, capsys):
    path = small_dentex / "test_data/disease/label/test_1.json"
    write(path, {"shapes": [{"label": "1-kanal-3", "points": [[1, 2], [3]]}], "imageHeight": 64, "imageWidth": 128})
    assert f"{path} is not as dentex has it" in refused(capsys, "dentex", small_dentex)


def test_json_that_is_nested_too_deep_is_one_line(small_tufts, capsys):
    (small_tufts / "Expert/expert.json").write_text("[" * 200_000 + "]" * 200_000)
    assert "expert.json cannot be read as JSON" in refused(capsys, "tufts", small_tufts)


def test_a_radiograph_that_is_listed_twice_is_refused(tmp_path, capsys):
    marked(tmp_path, ["1.png"])
    content = coco(["1.png", "1.png"], [])
    write(tmp_path / DISEASES / "train_quadrant_enumeration_disease.json", content)
    assert "names 1.png 2 times" in refused(capsys, "dentex", tmp_path)


# ---------------------------------------------------------------- outputs that cannot be written


def test_an_out_that_is_a_folder_is_refused(small_tufts, capsys):
    (small_tufts / "out").mkdir()
    assert "give --out a file" in refused(capsys, "tufts", small_tufts, "--out", small_tufts)
    (small_tufts / "manifest.csv").mkdir()
    assert "give --out a file" in refused(capsys, "tufts", small_tufts)


def test_masks_that_is_a_file_is_one_line(small_tufts, capsys):
    (small_tufts / "masks").write_text("mine")
    assert str(small_tufts / "masks") in refused(capsys, "tufts", small_tufts)
    assert (small_tufts / "masks").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_one_line(small_tufts, capsys, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "manifest.csv")

    monkeypatch.setattr("files.os.replace", denied)  # root may write anywhere
    assert "Permission denied: manifest.csv: see to its rights" in refused(capsys, "tufts", small_tufts)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_output_that_nobody_can_read_is_one_line(small_tufts):
    command = [sys.executable, "-m", "radiographs.adapters", "tufts", str(small_tufts)]
    with open("/dev/full", "w") as full:
        ran = subprocess.run(command, cwd=Path(__file__).parent.parent, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and "summary cannot be printed" in ran.stderr
