"""Who trained is recognised by name and by content, in any file and format, and nobody can be read off the hashes."""

import json

import numpy as np
import pytest
from PIL import Image
from test_reading import noise, write_dicom

from config import DataConfig
from dataset import read_sample
from radiographs.manifest import list_records
from radiographs.membership import Membership


def digest_of(folder, name):
    """Of the one file of that name below the folder."""
    (record,) = (record for record in list_records(folder) if record.path.name == name)
    return read_sample(record, DataConfig(height=32, width=32)).digest


def membership(digests=("d1", "d2")):
    return Membership.of({"train": ["Jane Doe"], "val": ["Joe Bloggs"]}, {"train": digests, "val": ["d3"]})


def test_a_patient_who_trained_is_known_by_name_whatever_the_file_holds():
    assert membership().trained("Jane Doe", "another radiograph")
    assert not membership().trained("Joe Bloggs", "d3"), "validated, not trained"
    assert not membership().trained("Jane Do", "another radiograph") and not membership().trained(None, "Jane Doe")


def test_a_radiograph_that_trained_is_known_under_any_name():
    assert membership().trained("somebody else", "d2") and membership().trained(None, "d1")


@pytest.mark.parametrize("bits", [8, 16])
def test_the_same_pixels_in_another_file_name_and_format_are_the_same_radiograph(tmp_path, bits):
    for name in ("a.png", "renamed.png", "a.tif", "a.bmp" if bits == 8 else "b.tiff"):
        Image.fromarray(noise(bits)).save(tmp_path / name)
    write_dicom(tmp_path / "a.dcm", noise(bits))
    names = [record.path.name for record in list_records(tmp_path)]
    trained = membership([digest_of(tmp_path, "a.png")])
    assert len(names) == 5 and all(trained.trained(None, digest_of(tmp_path, name)) for name in names)


def test_a_grey_picture_saved_in_colour_or_on_its_side_is_the_same_radiograph(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be turned a quarter clockwise
    Image.fromarray(noise(8)).save(tmp_path / "a.png")
    Image.fromarray(noise(8)).convert("RGB").save(tmp_path / "colour.png")
    Image.fromarray(np.rot90(noise(8)).copy()).save(tmp_path / "side.png", exif=exif)
    assert len({digest_of(tmp_path, name) for name in ("a.png", "colour.png", "side.png")}) == 1


def test_another_grey_level_or_another_shape_is_another_radiograph(tmp_path):
    pixels, changed = noise(8), noise(8)
    changed[3, 4] ^= 1
    for name, array in (("a.png", pixels), ("changed.png", changed), ("reshaped.png", pixels.reshape(50, 40))):
        Image.fromarray(array).save(tmp_path / name)
    assert len({digest_of(tmp_path, name) for name in ("a.png", "changed.png", "reshaped.png")}) == 3


def test_it_survives_json_and_says_nothing_of_the_order():
    once, again = membership(), membership()
    stored = json.loads(json.dumps(once.plain()))
    assert Membership.from_plain(stored) == once
    assert stored["train"] == sorted(stored["train"]) and len(stored["train"]) == 3
    assert not set(stored["train"]) & set(again.plain()["train"]), "every checkpoint has a salt of its own"


def test_neither_names_nor_contents_can_be_read_off_it():
    text = json.dumps(membership().plain())
    assert not any(
        plain in text for plain in ("Jane", "Doe", "Joe", "Bloggs", '"d1"', '"d2"', '"d3"')
    )  # hashes may end so


def test_a_name_that_equals_a_content_is_not_taken_for_it():
    assert not Membership.of({"train": ["x"], "val": []}, {"train": [], "val": []}).trained(None, "x")


def test_a_radiograph_that_looks_like_one_that_trained_is_known_also_from_a_checkpoint_and_not_from_older_ones():
    random = np.random.default_rng(0)
    prints = random.integers(0, 256, (5, 32), dtype=np.uint8)
    known = Membership.of({"train": ["x"], "val": []}, {"train": ["d"], "val": []}, list(prints))
    copy, other = prints[3].copy(), random.integers(0, 256, 32, dtype=np.uint8)
    copy[:2] ^= 0b00000111  # six signs
    stored = json.loads(json.dumps(known.plain()))
    for each in (known, Membership.from_plain(stored)):
        assert each.looks_known(copy) and not each.looks_known(other)
    del stored["prints"]
    assert not Membership.from_plain(stored).looks_known(copy)
