"""What a researcher opens: the numbers and pictures of the report, that it tells nothing it must not, and the page in a
real browser.
"""

import base64
import hashlib
import json
import re
import shutil
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image
from pipeline import table
from sklearn.metrics import auc, average_precision_score, roc_curve

from config import InferenceConfig
from normalizer import Normalizer
from reporting import charts
from reporting.layers import FOLDER, Layers, grey, outline_svg, save_layers
from reporting.report import (
    Findings,
    charts_of,
    data_of,
    settings_told,
    summary,
    table_of_kinds,
    with_interval,
    write_report,
)

DATE = datetime(2031, 4, 5, 6, 7, tzinfo=timezone.utc)
NASTY = "<script>alert(1)</script>.png"
MARKUP = "<img src=x onerror=alert(2)> & \"cyst\" 'x' </script>"
SHAPING = {
    "calibration": {
        "belongs_to": {"vae_sha256": "a" * 64, "flow_sha256": "b" * 64, "method": "plain", "blurs": [0.5, 1.0]},
        "scores": [0.1, 0.2, 0.3, 0.4],
        "pixel_threshold": 0.5,
        "scale": {"anomaly_map": 1.0},
    },
    "settings": {"image_fpr": 0.05, "figures": 3},
    "preprocessing": {"height": 64},
    "recipe": 2,
    "torch": "2.0",
}


def entry(index, score, label="", kind="", remarks="", name=None, shape=(64, 128), outlined=False):
    """What an examination keeps of one image; flagged above 0.55."""
    row = [f"{index:03d}", name or f"image-{index:010x}", f"{score:.6f}", "0.2000", int(score > 0.55), label, kind]
    shown = {"shape": list(shape), "outlined": outlined}
    return {"index": index, "row": [*row, remarks], "score": score, "figure": "", "report": shown}


def found_of(entries, metrics=None):
    return Findings(
        entries,
        SHAPING,
        threshold=0.55,
        expected_rate=0.06,
        false_positives=(0.01, 0.2),
        metrics=metrics,
        normals_told="40 validation normals of 10 patients",
    )


def text_of(page):
    """The words that a reader of the page sees, and its tags."""

    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.words, self.tags = [], []

        def handle_starttag(self, tag, attrs):
            self.tags.append((tag, dict(attrs)))

        def handle_data(self, data):
            self.words.append(data)

    reader = Reader()
    reader.feed(page)
    return " ".join(reader.words), reader.tags


# ---------------------------------------------------------------- pictures


def test_grey_levels_run_from_black_to_white_and_no_further():
    assert grey(np.array([[-2, -1, 0, 1, 2]])).tolist() == [[0, 0, 128, 255, 255]]


def test_a_map_has_the_colours_of_the_figures_and_lets_the_original_through_where_it_is_low(tmp_path):
    ramp = np.linspace(-0.5, 3, 256).reshape(8, 32)
    flat = np.zeros((8, 32))
    save_layers(tmp_path, 7, Layers(flat, flat, ramp, None, (8, 32)), end=2.0)
    pixels = np.asarray(Image.open(tmp_path / "007_map.png").convert("RGBA"))
    expected = colormaps["magma"](np.clip(ramp / 2, 0, 1), bytes=True)[..., :3].astype(int)
    assert np.abs(pixels[..., :3].astype(int) - expected).max() <= 4  # one place of 256
    opaque = pixels[..., 3]
    assert (opaque[ramp <= 0] == 0).all() and (opaque[ramp >= 1.01] == 255).all()
    assert (np.diff(opaque.ravel().astype(int)) >= 0).all()


def test_every_picture_of_an_image_is_there_and_the_outline_only_where_there_is_a_mask(tmp_path):
    flat, lesion = np.zeros((16, 32)), np.zeros((16, 32), bool)
    lesion[4:8, 4:8] = True
    both = [Layers(flat, flat[::2, ::2], flat, mask, (90, 200)) for mask in (np.zeros_like(lesion), lesion)]
    for index, layers in enumerate(both):
        save_layers(tmp_path, index, layers, 1.0)
    assert [layers.told() for layers in both] == [{"shape": [90, 200], "outlined": each} for each in (False, True)]
    names = {path.name for path in tmp_path.iterdir()}
    usual = {"original.png", "normal.png", "map.png", "thumb.jpg"}
    assert names == {f"{index:03d}_{name}" for index in range(2) for name in usual} | {"001_outline.svg"}
    assert Image.open(tmp_path / "001_thumb.jpg").size == (240, 108)
    assert Image.open(tmp_path / "001_normal.png").size == (16, 8)


def test_an_outline_lies_around_its_mask_in_pixels_of_the_mask():
    mask = np.zeros((10, 20), bool)
    mask[2:5, 8:12] = True
    drawing = ElementTree.fromstring(outline_svg(mask))
    assert drawing.get("viewBox") == "0 0 20 10"
    path = drawing.find(".//{*}path").get("d")
    points = np.array([list(map(float, pair.split(","))) for pair in re.findall(r"[\d.]+,[\d.]+", path)])
    assert points.min(axis=0).tolist() == [8, 2] and points.max(axis=0).tolist() == [12, 5]


# ---------------------------------------------------------------- numbers


@pytest.fixture
def judged():
    """Scores with ties, and labels."""
    random = np.random.default_rng(3)
    return random.normal(size=60).round(1), random.integers(0, 2, 60)


def test_roc_points_are_those_of_scikit_learn(judged):
    scores, labels = judged
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    np.testing.assert_allclose(np.stack(charts.roc_points(scores, labels)), np.stack([fpr, tpr]))


def test_the_area_under_the_precision_recall_steps_is_the_average_precision(judged):
    scores, labels = judged
    recall, precision = charts.precision_recall_points(scores, labels)
    assert auc(recall, precision) == pytest.approx(average_precision_score(labels, scores))


def test_the_bars_of_a_histogram_hold_every_score_also_those_beyond_the_axis():
    scores = np.concatenate([np.linspace(0, 1, 999), [1e6]])
    chart = charts.histogram(scores, [("examined", "examined-unknown", [-1e6, 0.5])], threshold=0.5)
    for series in chart.series:
        heights = [float(pair.split(",")[1]) for pair in series.points.split()][1:-1:2]
        shares = (charts.BOTTOM - np.array(heights)) / (charts.BOTTOM - charts.TOP)
        assert shares.sum() == pytest.approx(1 / 0.5, abs=0.02)  # they add up to 1, in units of the highest of all
    low, high = charts.score_range(np.concatenate([scores, [-1e6, 0.5]]), 0.5)
    assert charts.LEFT < chart.rule < charts.RIGHT and high < 2


@pytest.mark.parametrize("scores", [[0.0], [5.0, 5.0], [-3.0, 1e5], [1e-9, 2e-9]])
def test_an_axis_has_a_width_whatever_the_scores(scores):
    low, high = charts.score_range(np.array(scores), scores[0])
    assert low < min(scores[0], high) and np.isfinite([low, high]).all()
    ticks = charts.round_values(low, high)
    assert 2 <= len(ticks) <= 6 and min(ticks) >= low - 1e-9 and max(ticks) <= high + 1e-9


def test_the_dot_on_the_curves_is_what_the_threshold_does():
    scores, labels = [0.9, 0.8, 0.7, 0.2], [1, 0, 1, 0]
    chart = charts.roc(scores, labels, 0.75, "AUROC 0.75")
    across, up = (
        (charts.LEFT + charts.RIGHT) / 2,
        (charts.TOP + charts.BOTTOM) / 2,
    )  # half of the normals, of the others
    assert chart.mark == (across, up) and "50.0% of the abnormal and 50.0% of the normal" in chart.description
    assert charts.precision_recall(scores, labels, 5.0, "AP 1").mark is None


def test_false_alarms_are_told_for_as_many_as_were_examined():
    entries = [entry(0, 0.9, 1, "cyst"), entry(1, 0.6, 0, "normal"), entry(2, 0.1, 0, "normal", "a; b")]
    told = summary(found_of([*entries, {"index": 3, "error": "unreadable"}]))
    assert (told["examined"], told["skipped"], told["flagged"]) == (3, 1, 2)
    assert told["expected"] == pytest.approx(0.18) and told["expected_interval"] == pytest.approx([0.03, 0.6])
    assert (told["normals_flagged"], told["normals"]) == (1, 2) and told["remarks"] == {"a": 1, "b": 1}


def test_kinds_are_counted_by_label_and_carry_the_metrics_of_their_kind():
    means = dict.fromkeys(("auroc", "ap", "pixel_ap", "aupro", "dice"))
    measured = means | {"auroc": 0.8125, "auroc_interval": [0.5, 1.0]}
    metrics = {"kinds": {"cyst": measured}, "overall": measured, "mean_over_kinds": means}
    entries = [entry(0, 0.9, 1, "cyst"), entry(1, 0.3, 1, "cyst"), entry(2, 0.1, 0, "cyst"), entry(3, 0.7)]
    lines = table_of_kinds(found_of(entries, metrics))
    assert [(line["kind"], line["label"], line["images"], line["flagged"]) for line in lines[:3]] == [
        ("(no kind)", "unknown", 1, 1),
        ("cyst", "normal", 1, 0),
        ("cyst", "abnormal", 2, 1),
    ]
    by_label = {line["label"]: line for line in lines[:3]}
    assert by_label["abnormal"]["auroc"] == "0.812 (0.500 to 1.000)" and by_label["abnormal"]["dice"] == "-"
    assert by_label["normal"]["auroc"] == "" and by_label["abnormal"]["median"] == "0.6000"


def test_a_metric_without_an_interval_is_told_without_one():
    assert with_interval({"ap": 0.5, "ap_interval": [None, None]}, "ap") == "0.500"
    assert with_interval({"ap": None}, "ap") == "-"


def test_settings_are_told_without_the_hashes_that_stand_above():
    told = settings_told(SHAPING)
    assert told["blurs"] == "0.5, 1" and told["image_fpr"] == "0.05" and "vae_sha256" not in told


# ---------------------------------------------------------------- the page as text


@pytest.fixture
def page(tmp_path):
    """The text of a report with names and kinds that want to be markup."""
    entries = [entry(0, 0.9, 1, MARKUP, name=NASTY), entry(1, 0.1, 0, "bad \udce9 byte", remarks="<u>remark</u>")]
    write_report(tmp_path, found_of(entries), DATE)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_names_kinds_and_remarks_are_text_and_no_markup(page):
    words, tags = text_of(page)
    names = [tag for tag, _ in tags]
    assert names.count("script") == 2 and "u" not in names
    assert names.count("img") == 4  # those of the viewer
    assert not [attributes for _, attributes in tags if any(name.startswith("on") for name in attributes)]
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))
    assert [image["name"] for image in data["images"]][0] == NASTY and data["images"][0]["kind"] == MARKUP
    assert MARKUP in words and "comes from 40 validation normals of 10 patients at" in words


def test_the_page_lets_its_own_script_and_style_pass_and_asks_nobody(page):
    policy = next(attributes["content"] for tag, attributes in text_of(page)[1] if "http-equiv" in attributes)
    for tag in ("script", "style"):
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        (digest,) = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inside)
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "://" not in page and "fetch(" not in page and "XMLHttpRequest" not in page


def test_the_page_says_what_it_is_when_it_was_made_and_with_what(page):
    words, _ = text_of(page)
    for told in ("Research software, not a medical device", "2031-04-05 06:07 +0000", "a" * 64, "b" * 64, "image_fpr"):
        assert told in words


def test_scores_of_any_label_have_a_histogram_and_curves_only_where_there_are_metrics():
    unlabelled = found_of([entry(0, 0.9), entry(1, 0.1)])
    assert data_of(unlabelled)["images"][0]["label"] == "unknown"
    assert [chart.title for chart in charts_of(unlabelled)] == ["Scores"]
    means = dict.fromkeys(("auroc", "ap", "pixel_ap", "aupro", "dice"))
    metrics = {"kinds": {}, "overall": means | {"auroc": 1.0}, "mean_over_kinds": means}
    both = found_of([entry(0, 0.9, 1, "cyst"), entry(1, 0.1, 0, "normal")], metrics)
    assert [chart.title for chart in charts_of(both)] == ["Scores", "ROC", "Precision and recall"]


# ---------------------------------------------------------------- as phase 4 writes it

KNOWN = ["--inference.figures", 0, "--inference.save-maps", "False"]


def data_in(folder):
    """What the page in a folder gives to its script."""
    page = (folder / "report.html").read_text()
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))


def pictures_in(folder):
    return sorted(path.name for path in (folder / FOLDER).glob("*"))


def test_the_report_says_of_every_image_what_scores_csv_says(examined):
    rows, data = table(examined.phase4 / "scores.csv"), data_in(examined.phase4)
    assert len(data["images"]) == len(rows) == 9
    for row, image in zip(rows, data["images"], strict=True):
        assert [image[name] for name in ("index", "name", "p_value", "kind", "remarks")] == [
            row[name] for name in ("index", "name", "p_value", "kind", "remarks")
        ]
        assert image["score"] == pytest.approx(float(row["score"]), abs=1e-6)
        assert image["flagged"] == bool(int(row["flagged"])) == (image["score"] > data["threshold"])
        assert image["label"] == {"0": "normal", "1": "abnormal"}[row["label"]]
        assert image["figure"] == "" or (examined.phase4 / image["figure"]).is_file()


def test_every_image_has_its_pictures_and_an_outline_where_the_manifest_has_a_mask(examined):
    listed = [row for row in table(examined.phantoms / "manifest.csv") if row["split"] == "test"]
    names = [f"{index:03d}_{name}" for index in range(9) for name in ("original.png", "normal.png", "map.png")]
    names += [f"{index:03d}_thumb.jpg" for index in range(9)]
    names += [f"{index:03d}_outline.svg" for index, row in enumerate(listed) if row["mask"]]
    assert pictures_in(examined.phase4) == sorted(names)
    outlined = [image["outlined"] for image in data_in(examined.phase4)["images"]]
    assert outlined == [bool(row["mask"]) for row in listed] and any(outlined)


def test_the_pictures_are_those_of_the_file_and_of_g_and_of_the_map(examined):
    settings = InferenceConfig(solver="one_step", draws=2)  # as the preset says
    G = Normalizer.load(examined.phase1 / "checkpoint_best.pt", examined.phase3 / "checkpoint_best.pt", settings)
    listed = [row for row in table(examined.phantoms / "manifest.csv") if row["split"] == "test"]
    scale = json.loads((examined.out / "calibration/statistical.json").read_text())["scale"]["anomaly_map"]
    for index in (0, 5):
        x = G.read(examined.phantoms / listed[index]["image"])
        shown = [
            np.asarray(Image.open(examined.phase4 / FOLDER / f"{index:03d}_{name}.png"))
            for name in ("original", "normal")
        ]
        for picture, image in zip(shown, (x, G(x)), strict=True):
            assert np.abs(picture / 127.5 - 1 - image[0, 0].numpy()).max() < 0.006
        levels = np.asarray(Image.open(examined.phase4 / FOLDER / f"{index:03d}_map.png"))
        anomaly_map = np.load(examined.phase4 / "maps" / f"{index:03d}.npy")
        assert np.abs(levels / 255 - np.clip(anomaly_map / scale, 0, 1)).max() < 0.003


def test_the_report_names_no_source(examined):
    pages = (examined.phase4 / "report.html").read_text() + "".join(pictures_in(examined.phase4))
    for row in table(examined.phantoms / "manifest.csv"):
        assert Path(row["image"]).stem not in pages and row["patient"] not in pages
    assert str(examined.folder) not in pages


def test_a_report_that_is_switched_off_or_on_is_gone_or_there(call, examined, tmp_path):
    known, out = ["--inference.calibration", examined.out / "calibration", *KNOWN], tmp_path / "phase4_inference"
    off = ["--inference.report", "False"]
    assert call("inference", *known, *off).code == 0
    assert not (out / "report.html").exists() and not (out / FOLDER).exists()
    on = call("inference", *known)
    assert f"open {out / 'report.html'}" in on.out and len(data_in(out)["images"]) == 9 and pictures_in(out)
    again = call("inference", *known, *off)
    assert "report.html" not in again.out and not (out / "report.html").exists() and not pictures_in(out)


@pytest.mark.parametrize("lost", ["report.html", "report/003_map.png"])
def test_a_report_that_lost_a_part_is_made_anew(lost, call, examined, tmp_path):
    known, out = ["--inference.calibration", examined.out / "calibration", *KNOWN], tmp_path / "phase4_inference"
    assert call("inference", *known).code == 0
    whole = (out / lost).stat().st_size
    (out / lost).unlink()
    assert "already" not in call("inference", *known).out and (out / lost).stat().st_size == whole
    assert "already" in call("inference", *known).out


def test_a_report_tells_nothing_of_an_earlier_examination(call, examined, tmp_path):
    """Other images in the same folder, and another rate: pictures, counts and verdicts are those of now."""
    out = shutil.copytree(examined.phase4, tmp_path / "phase4_inference")
    few = tmp_path / "few"
    few.mkdir()
    for number, row in enumerate(row for row in table(examined.phantoms / "manifest.csv") if row["split"] == "test"):
        if number < 2:
            place = few / f"<script>alert({number})<" / "script>.dcm"  # a name that would end a script
            place.parent.mkdir()
            shutil.copy(examined.phantoms / row["image"], place)
    assert call("inference", "--data.test", few, "--inference.image-fpr", 0.5).code == 0
    images = data_in(out)["images"]
    assert len(images) == 2 and {name[:3] for name in pictures_in(out)} == {"000", "001"}
    assert "alert(" not in (out / "report.html").read_text() and all(image["label"] == "unknown" for image in images)
