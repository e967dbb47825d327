"""What a reader of the PNGs relies on: right colours, nothing left over from the image before, nothing in them but the
picture.
"""

import os

import numpy as np
import pytest
from PIL import Image

from reporting import figures

SCALE = figures.ColourScale(residual=0.5, l1=0.5, gradient=0.2, anomaly_map=1.0)


@pytest.fixture
def draw(tmp_path):
    """Draws a result of uniform grey 0 against `normalized`; gives the path of the PNG."""

    def draw(
        name="result.png", normalized=0.0, anomaly=0.0, mask=None, shape=(32, 32), title="image 003 | score 0.123"
    ):
        x, heat = np.zeros(shape), np.full(shape, anomaly)
        figures.save_result(tmp_path / name, x, np.full(shape, normalized), heat, heat, heat, title, SCALE, mask)
        return tmp_path / name

    return draw


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def panel_centre(path, row, column):
    """Colour in the middle of a panel, as the layout has three columns of equal pitch."""
    image = pixels(path)
    height, width = image.shape[:2]
    return image[int(height * (0.28 if row == 0 else 0.75)), int(width * (column / 3 + 0.13))]


def square_mask(shape=(32, 32)):
    mask = np.zeros(shape, dtype=bool)
    mask[8:16, 8:16] = True
    return mask


def test_residual_is_white_at_zero_red_where_x_is_brighter_and_blue_where_it_is_darker(draw):
    white, red, blue = (panel_centre(draw(normalized=n), 0, 2) for n in (0.0, -0.3, 0.3))
    assert white.min() > 240
    assert red[0] > red[2] + 80 and blue[2] > blue[0] + 80


def test_equal_values_have_equal_colours_whatever_else_is_in_the_image(tmp_path, draw):
    bright = np.full((32, 32), 0.5)
    bright[:4, :4] = 100
    figures.save_result(tmp_path / "outlier.png", bright, bright, bright, bright, bright, "", SCALE)
    assert (panel_centre(tmp_path / "outlier.png", 1, 2) == panel_centre(draw(anomaly=0.5), 1, 2)).all()


def test_the_mask_is_outlined_on_the_original_and_on_the_final_map_only(draw):
    changed = (pixels(draw(mask=square_mask())) != pixels(draw("plain.png"))).any(axis=2)
    height, width = changed.shape
    top, bottom = changed[int(0.06 * height) : height // 2], changed[height // 2 :]
    thirds = [part[:, i * width // 3 : (i + 1) * width // 3].any() for part in (top, bottom) for i in range(3)]
    assert thirds == [True, False, False, False, False, True]
    assert changed[: int(0.06 * height)].any()  # the legend


def test_a_figure_does_not_remember_the_image_before(draw):
    first = draw().read_bytes()
    draw("other.png", normalized=0.4, anomaly=0.9, mask=square_mask(), title="another")
    assert draw("again.png").read_bytes() == first


def test_an_outline_is_closed_also_where_the_mask_touches_the_edge():
    (line,) = figures.outline(np.ones((4, 6), dtype=bool))
    assert (line[0] == line[-1]).all()
    assert (line.min(axis=0) == -0.5).all() and (line.max(axis=0) == [5.5, 3.5]).all()  # the outer border of the pixels


@pytest.mark.parametrize("shape", [(32, 32), (16, 32), (128, 256), (256, 512)])
def test_images_fill_the_figure_at_any_aspect_ratio(draw, shape):
    image = pixels(draw(shape=shape, normalized=0.4, anomaly=0.5))  # no panel is white
    assert 1490 <= image.shape[1] <= 1850
    assert (image.min(axis=2) < 235).mean() > 0.62


def test_a_png_holds_nothing_but_the_picture(draw, tmp_path):
    path = draw()
    assert set(Image.open(path).info) <= {"dpi"}
    assert str(tmp_path).encode() not in path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["result.png"]


def test_a_failed_write_leaves_the_old_picture(draw, monkeypatch):
    path = draw()
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        draw(anomaly=1.0)
    assert path.read_bytes() == before


def test_sizes_that_differ_and_scales_without_a_width_are_refused(draw):
    with pytest.raises(ValueError, match="of one size"):
        draw(mask=np.ones((8, 8), dtype=bool))
    with pytest.raises(ValueError, match="colour scale of l1"):
        figures.ColourScale(residual=1, l1=0, gradient=1, anomaly_map=1)


def test_a_grid_continues_below_and_takes_a_residual_of_zero(tmp_path):
    images = np.zeros((5, 20, 40))
    for columns in (5, 3):
        figures.save_grid(
            tmp_path / f"{columns}.png",
            [("x", images), ("residual", images)],
            titles=list("abcde"),
            columns=columns,
            signed=["residual"],
        )
    one, two = (Image.open(tmp_path / f"{columns}.png").size for columns in (5, 3))
    assert two[0] < one[0] and two[1] == pytest.approx(2 * one[1], abs=8)


def test_a_grid_of_unequal_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rows of one shape"):
        figures.save_grid(tmp_path / "grid.png", [("x", np.zeros((3, 8, 8))), ("G(x)", np.zeros((2, 8, 8)))])


@pytest.mark.parametrize("values", [[3.0, 2.0, 1.0], [0.0, 0.0, 0.0], [1.0, -1.0, np.nan], []])
def test_curves_of_any_values_are_drawn(tmp_path, values):
    figures.save_curves(tmp_path / "curves.png", {"loss": (range(len(values)), values)}, "phase 1")
    assert Image.open(tmp_path / "curves.png").size == (1000, 500)


def test_more_curves_than_colours_are_refused(tmp_path):
    with pytest.raises(ValueError, match="split them"):
        figures.save_curves(tmp_path / "curves.png", {str(i): ([0], [1]) for i in range(9)}, "too many")


def test_growth_is_drawn_with_a_panel_for_each_measure_and_cause(tmp_path):
    curves = {"mean": ([50, 100, 200], [0.5, 0.6, 0.7]), "cyst": ([50, 100], [0.9, 0.95])}
    panels = {"steps": curves, "normals": {"mean": ([1, 2], [0.1, 0.2])}}
    for measures in (1, 2):
        rows = {f"measure {number}": panels for number in range(measures)}
        figures.save_growth(tmp_path / f"{measures}.png", rows, "what brings what")
    one, two = (Image.open(tmp_path / f"{measures}.png").size for measures in (1, 2))
    assert one[0] == two[0] > 900 and two[1] > one[1] + 300
    with pytest.raises(ValueError, match="split them"):
        figures.save_growth(tmp_path / "many.png", {"m": {"c": {str(i): ([1], [1]) for i in range(9)}}}, "too many")
