"""An array that grows on disk: whole or not there, and gone on with where it is certain."""

import json

import numpy as np
import pytest

from growing import GrowingArray

ROWS = np.random.default_rng(0).normal(size=(7, 2, 3)).astype(np.float32)


def grow(path, upto, resume=True, made_from="radiographs", save_at=()):
    array = GrowingArray(path, ROWS.shape, {"made from": made_from}, resume)
    begun = array.rows
    for row in range(begun, upto):
        array.append(ROWS[row : row + 1])
        if row + 1 in save_at:
            array.save()
    if upto == len(ROWS):
        array.finish()
    else:
        array.file.close()
    return begun, array


def test_rows_become_an_array_that_numpy_maps(tmp_path):
    _, array = grow(tmp_path / "deeper" / "x.npy", 7)
    array.forget()
    np.testing.assert_array_equal(np.load(tmp_path / "deeper" / "x.npy", mmap_mode="r", allow_pickle=False), ROWS)
    assert [path.name for path in (tmp_path / "deeper").iterdir()] == ["x.npy"]


def test_a_run_goes_on_after_the_rows_that_were_saved(tmp_path):
    grow(tmp_path / "x.npy", 5, save_at=(3,))  # two more were written, and are not known to be whole
    assert not (tmp_path / "x.npy").exists()
    assert grow(tmp_path / "x.npy", 7)[0] == 3
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), ROWS)


def test_a_finished_array_is_taken_as_it_is_until_it_is_forgotten(tmp_path):
    grow(tmp_path / "x.npy", 7)
    begun, array = grow(tmp_path / "x.npy", 7)
    assert begun == 7
    array.forget()
    assert grow(tmp_path / "x.npy", 7)[0] == 0
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), ROWS)


def flip(path):
    content = bytearray(path.read_bytes())
    content[150] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda part, note: flip(part),
        lambda part, note: part.write_bytes(part.read_bytes()[:150]),
        lambda part, note: part.unlink(),
        lambda part, note: note.unlink(),
        lambda part, note: note.write_text("[1"),
        lambda part, note: note.write_text(json.dumps(json.loads(note.read_text()) | {"rows": 4})),
        lambda part, note: None,
    ],
    ids=["rotted", "cut", "no rows", "no note", "junk", "another note", "not to be resumed"],
)
def test_what_cannot_be_trusted_is_made_anew(spoil, tmp_path, request):
    grow(tmp_path / "x.npy", 5, save_at=(5,))
    spoil(tmp_path / ".x.npy.part", tmp_path / ".x.npy.json")
    resume = request.node.callspec.id != "not to be resumed"
    assert grow(tmp_path / "x.npy", 7, resume)[0] == 0
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), ROWS)


def test_rows_of_something_else_are_not_gone_on_with(tmp_path):
    grow(tmp_path / "x.npy", 5, save_at=(5,))
    assert grow(tmp_path / "x.npy", 7, made_from="other radiographs")[0] == 0
