"""Part: the last words of phase 4: how many were flagged, how sure that is, where to look."""

from pathlib import Path

from archive import report_objects
from calibration import Calibration
from config import Config
from progress import warn
from reporting.report import REPORT
from reporting.summary import metrics_table
from thresholds import false_positive_interval

MOST, ENOUGH = 0.8, 20  # share of flagged images, of so many or more, that speaks against the thresholds
REMARKS = {
    "coarser": "fewer pixels than the normals",
    "foreign": "unlike the normals",
    "known": "looks like a radiograph that trained",
}


def conclude(entries: list[dict], calibration: Calibration, metrics: dict | None, config: Config) -> None:
    """Say what an examination of these entries found; metrics is what metrics.json holds, None without labels."""
    settings, out, normals = config.inference, Path(config.inference.output), calibration.independent
    threshold = calibration.score_threshold(settings.image_fpr)
    low, high = false_positive_interval(normals, settings.image_fpr)
    examined = [entry for entry in entries if "row" in entry]
    flagged, skipped = sum(entry["row"][4] for entry in examined), len(entries) - len(examined)
    print(f"\n{len(examined)} images examined, {skipped} skipped, {flagged} flagged at score > {threshold:.4f}")
    coarser, foreign, known = (sum(entry[name] for entry in examined) for name in REMARKS)
    if coarser:
        warn(
            f"{coarser} of {len(examined)} files have fewer pixels than any validation normal: "
            "thresholds and p-values do not hold for them"
        )
    if foreign:
        warn(
            f"{foreign} of {len(examined)} images are unlike all normals (their latents lie out by more than "
            f"latent.outlier_std = {config.latent.outlier_std:g}), perhaps no panoramics: see the remarks in scores.csv"
        )
    if known:
        warn(
            f"{known} of {len(examined)} images look like radiographs that trained or validated the networks, perhaps "
            "copies: their scores flatter; see the remarks in scores.csv"
        )
    if len(examined) >= ENOUGH and flagged > MOST * len(examined):
        warn(
            f"{flagged} of {len(examined)} images are flagged: were they taken as the validation normals were? Another "
            "machine needs normals of its own to be judged by: README, Radiographs of elsewhere"
        )
    print(
        f"threshold from {calibration.normals_told} at a false-positive rate of {100 * settings.image_fpr:g} %: on "
        f"new normals expect {low:.1%} to {high:.1%} (95 % interval), or somewhat more, since the same normals chose "
        "the checkpoints"
    )
    print(
        f"map threshold {calibration.pixel_threshold:.4f}: {settings.pixel_fpr:.2%} of the pixels of normals lie above"
    )
    identity, vae = calibration.identity_error, calibration.vae_error
    print(
        f"validation normals: |x - G(x)| {identity:.4f}, |x - dec(enc(x))| {vae:.4f} (x{identity / max(vae, 1e-9):.2f})"
    )
    print(f"\n{metrics_table(metrics)}\n" if metrics else "no metrics: they need images labelled 0 and 1 in a manifest")
    report_objects(entries)
    written = [
        *([REPORT] if settings.report else []),
        "scores.csv",
        *(["maps/"] if settings.save_maps else []),
        *(["result_XXX.png"] if settings.figures else []),
    ]
    print(f"wrote {out}: {', '.join(written)}")
    drawn = [entry for entry in examined if entry["figure"]]
    if drawn:
        best = max(drawn, key=lambda entry: (entry["score"], entry["figure"]))
        print(f"look at {out / best['figure']}: the highest score of those drawn")
    if settings.report:
        print(f"open {out / REPORT} in a browser: every result, the highest score first")
