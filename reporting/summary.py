"""Metrics as people read them on a terminal."""

COLUMNS = ("auroc", "ap", "pixel_ap", "aupro", "dice", "best_dice")


def metrics_table(metrics: dict) -> str:
    """One line per kind of lesion, then all together and the mean of the kinds, from `metrics.summarize`."""
    header = f"{'kind':16s}{'images':>8s}" + "".join(f"{name:>11s}" for name in COLUMNS)
    entries = [*metrics["kinds"].items(), ("all kinds", metrics["overall"])]
    entries.append(("mean of kinds", metrics["mean_over_kinds"]))
    return "\n".join([header, *(_line(kind, entry) for kind, entry in entries)])


def _line(kind: str, entry: dict) -> str:
    values = ["-" if entry[name] is None else f"{entry[name]:.3f}" for name in COLUMNS]
    return f"{kind:16s}{entry.get('abnormal_images', ''):>8}" + "".join(f"{value:>11s}" for value in values)
