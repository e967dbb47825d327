"""Metrics against scikit-learn, pyaupro, scipy.stats and their definitions spelled out."""

import json

import numpy as np
import pytest
import scipy.ndimage as ndi
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

import metrics


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def lesions_and_maps(rng, n=4, size=16, levels=None):
    """Random blobs as masks, maps that see them through noise; `levels` rounds the maps so that many values tie."""
    masks = ndi.gaussian_filter(rng.standard_normal((n, size, size)), (0, 1.5, 1.5)) > 0.25
    maps = masks + rng.standard_normal(masks.shape)
    return (maps if levels is None else np.round(maps * levels) / levels), masks


def aupro_by_definition(maps, masks, limit):
    """Flags at every distinct value, region by region; the curve is cut at the limit by its own straight line."""
    labelled = [ndi.label(m, np.ones((3, 3)))[0] for m in masks]
    regions = [(i, r == k) for i, r in enumerate(labelled) for k in range(1, r.max() + 1)]
    curve = [(0.0, 0.0)]
    for threshold in sorted({float(v) for v in np.ravel(maps)}, reverse=True):
        flagged = np.asarray(maps) >= threshold
        curve.append((flagged[~masks].mean(), np.mean([flagged[i][r].mean() for i, r in regions])))
    area = 0.0
    for (x0, y0), (x1, y1) in zip(curve[:-1], curve[1:], strict=True):
        if x0 < min(x1, limit):
            end = min(x1, limit)
            area += (end - x0) * (y0 + y0 + (y1 - y0) * (end - x0) / (x1 - x0)) / 2
    return area / limit


@pytest.mark.parametrize("digits", [8, 1])  # 1 digit: many ties
def test_image_metrics_are_scikit_learns(rng, digits):
    labels = rng.integers(0, 2, 60)
    scores = np.round(rng.standard_normal(60) + labels, digits)
    expected = {"auroc": roc_auc_score(labels, scores), "ap": average_precision_score(labels, scores)}
    assert metrics.image_metrics(scores, labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_has_no_image_metrics(label):
    assert all(np.isnan(v) for v in metrics.image_metrics([1.0, 2.0], [label, label]).values())


@pytest.mark.parametrize("levels", [None, 2])
def test_pixel_average_precision_is_scikit_learns(rng, levels):
    maps, masks = lesions_and_maps(rng, levels=levels)
    assert metrics.pixel_average_precision(maps, masks) == pytest.approx(
        average_precision_score(masks.ravel(), maps.ravel()), abs=1e-12
    )


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("levels", [None, 1, 4])
def test_aupro_is_its_definition(rng, levels, limit):
    maps, masks = lesions_and_maps(rng, levels=levels)
    masks[0] = False  # a normal image
    assert metrics.aupro(maps, masks, limit) == pytest.approx(aupro_by_definition(maps, masks, limit), abs=1e-12)


@pytest.mark.parametrize("levels", [None, 20])
def test_aupro_agrees_with_pyaupro(rng, levels):
    pyaupro, torch = pytest.importorskip("pyaupro"), pytest.importorskip("torch")
    maps, masks = lesions_and_maps(rng, n=6, size=64, levels=levels)
    curve = pyaupro.PerRegionOverlap(reference_implementation=True)
    curve.update(torch.from_numpy(maps), torch.from_numpy(masks.astype(np.int64)))
    expected = pyaupro.auc_compute(*curve.compute(), limit=0.3).item()
    assert metrics.aupro(maps, masks) == pytest.approx(expected, abs=1e-3)


def test_aupro_is_1_for_a_perfect_map_and_the_area_under_the_diagonal_for_a_constant_one(rng):
    _, masks = lesions_and_maps(rng)
    assert metrics.aupro(masks.astype(float), masks) == pytest.approx(1)
    assert metrics.aupro(np.zeros(masks.shape), masks, 0.3) == pytest.approx(0.3 / 2)


def test_aupro_joins_diagonal_neighbours_and_counts_small_regions_as_much_as_large_ones():
    mask, seen = np.zeros((2, 8, 8), dtype=bool)
    mask[[0, 1], [0, 1]] = mask[4:7, 4:7] = True
    seen[4:7, 4:7] = True  # the large one only
    assert metrics.aupro([seen.astype(float)], [mask], 0.3) == pytest.approx(0.5 + 0.5 * 0.3 / 2)


def test_pixel_metrics_of_images_without_lesions_are_nan():
    maps, masks = np.random.default_rng(0).random((2, 5, 5)), np.zeros((2, 5, 5), dtype=bool)
    values = [
        metrics.pixel_average_precision(maps, masks),
        metrics.aupro(maps, masks),
        metrics.dice_at(maps, masks, 0.5),
        *metrics.best_dice(maps, masks),
    ]
    assert np.isnan(values).all()


def test_dice_is_the_f1_score_of_the_pixels(rng):
    maps, masks = lesions_and_maps(rng)
    assert metrics.dice_at(maps, masks, 0.4) == pytest.approx(f1_score(masks.ravel(), maps.ravel() > 0.4))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_threshold_beats_best_dice_and_its_own_reaches_it(rng, dtype):
    maps, masks = lesions_and_maps(rng, levels=3)
    maps = maps.astype(dtype)
    best, threshold = metrics.best_dice(maps, masks)
    every = [metrics.dice_at(maps, masks, t) for t in np.append(np.unique(maps), -99)]
    assert best == max(every) == metrics.dice_at(maps, masks, threshold)


def test_bootstrap_of_a_mean_has_its_standard_error(rng):
    values = rng.standard_normal(400)
    low, high = metrics.bootstrap_interval(np.mean, [values], np.arange(400))
    expected = 1.96 * values.std() / 20
    assert (values.mean() - low, high - values.mean()) == pytest.approx((expected, expected), rel=0.15)


def test_bootstrap_redraws_patients_not_images(rng):
    once = rng.standard_normal(50)
    patients = [f"patient {i}" for i in range(50)]
    single = metrics.bootstrap_interval(np.mean, [once], patients)
    assert metrics.bootstrap_interval(np.mean, [np.tile(once, 9)], patients * 9) == pytest.approx(single)


def test_bootstrap_ignores_undefined_resamples_and_one_patient_has_no_interval():
    scores, labels = np.array([0.0, 1.0, 2.0]), np.array([0, 1, 1])
    assert metrics.bootstrap_interval(metrics.auroc, [scores, labels], ["a", "b", "c"]) == (1, 1)
    assert np.isnan(metrics.bootstrap_interval(metrics.auroc, [scores, labels], ["a", "a", "a"])).all()


def test_psnr_of_a_known_error():
    assert metrics.psnr(np.zeros((4, 4)), np.full((4, 4), 0.2)) == pytest.approx(20)
    assert metrics.psnr(np.ones(3), np.ones(3)) == np.inf


@pytest.fixture
def study(rng):
    """Six normals, six cysts with masks, four implants without."""
    kinds = ["normal"] * 6 + ["cyst"] * 6 + ["implant"] * 4
    maps, masks = lesions_and_maps(rng, n=16)
    masks = [None if kind != "cyst" else m for kind, m in zip(kinds, masks, strict=True)]
    labels = [int(kind != "normal") for kind in kinds]
    patients = list(range(6)) * 2 + [7] * 4
    return dict(
        scores=[m.max() for m in maps],
        labels=labels,
        kinds=kinds,
        maps=list(maps),
        masks=masks,
        pixel_threshold=0.5,
        patients=patients,
    )


def test_summary_compares_each_kind_with_all_normals(study):
    summary = metrics.summarize(**study)
    cyst, scores, labels = summary["kinds"]["cyst"], study["scores"][:12], study["labels"][:12]
    lesions = [np.zeros((16, 16), dtype=bool)] * 6 + study["masks"][6:12]
    assert (cyst["auroc"], cyst["ap"]) == pytest.approx(
        (roc_auc_score(labels, scores), average_precision_score(labels, scores))
    )
    assert cyst["auroc_interval"][0] <= cyst["auroc"] <= cyst["auroc_interval"][1]
    assert cyst["pixel_ap"] == pytest.approx(average_precision_score(np.ravel(lesions), np.ravel(study["maps"][:12])))
    assert cyst["aupro"] == pytest.approx(aupro_by_definition(np.stack(study["maps"][:12]), np.stack(lesions), 0.3))
    assert (cyst["normal_images"], cyst["abnormal_images"], cyst["patients"], cyst["masked_images"]) == (6, 6, 6, 6)


def test_summary_leaves_abnormal_images_without_a_mask_out_of_pixel_metrics_only(study):
    summary = metrics.summarize(**study)
    overall, implant, cyst = summary["overall"], summary["kinds"]["implant"], summary["kinds"]["cyst"]
    assert implant["auroc"] is not None and overall["abnormal_images"] == 10
    assert all(implant[name] is None and overall[name] == cyst[name] for name in metrics.PIXEL_METRICS)
    assert summary["mean_over_kinds"]["pixel_ap"] == cyst["pixel_ap"]
    assert summary["mean_over_kinds"]["auroc"] == pytest.approx((implant["auroc"] + cyst["auroc"]) / 2)


def test_summary_is_strict_json_even_where_nothing_is_defined(study):
    nothing = {key: value[:6] if isinstance(value, list) else value for key, value in study.items()} | {
        "maps": [None] * 6
    }
    for arguments in (study, nothing):
        summary = metrics.summarize(**arguments)
        assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["overall"]["auroc"] is None and summary["kinds"] == {}


def test_what_cannot_be_measured_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="leave images of unknown label out"):
        metrics.image_metrics([1.0, 2.0], [0, -1])
    with pytest.raises(ValueError, match="check the checkpoint"):
        metrics.aupro([np.full((2, 2), np.nan)], [np.eye(2)])
    with pytest.raises(ValueError, match="resize the masks"):
        metrics.dice_at([np.zeros((2, 2))], [np.eye(3)], 0.5)
