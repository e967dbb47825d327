"""Arrays on disk for work that is larger than memory: their room is taken at once, and is free again."""

import numpy as np
import pytest

from checks import UsageError
from scratch import array_at, nameless_array


def test_what_is_written_is_read_and_no_file_has_a_name(tmp_path):
    array = nameless_array(tmp_path / "new", np.float16, (3, 4, 5))
    array[1] = 7
    assert array.shape == (3, 4, 5) and array[1].min() == 7 and array[[0, 2]].max() == 0
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("make", [lambda folder, *of: array_at(folder / "a.npy", *of), nameless_array])
def test_a_disk_without_room_is_an_error_before_anything_is_written(make, small_disk):
    with pytest.raises(UsageError, match=r"disk needs 1 MiB for a while and has 0: make room there"):
        make(small_disk, np.float32, (2**18,))
