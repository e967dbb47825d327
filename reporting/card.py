"""The model card of an exported normalizer: README.md with the metadata header that a model hub reads."""

from dataclasses import dataclass

from reporting.summary import metrics_table

HEADER = """---
license: {licence}
library_name: dental-normalizer
pipeline_tag: image-segmentation
tags:
- medical
- dental
- panoramic-radiograph
- anomaly-detection
- unsupervised
- flow-matching
- safetensors
---
"""
BODY = """
# A normalizer for panoramic dental X-rays

`G(x)` maps a panoramic radiograph to its nearest normal version; what it changed is the anomaly. Trained on normal
radiographs alone.

**This is research software. It is not a medical device, it has not been validated for diagnosis, and nothing it says
may be used to decide about a patient.**

![A synthetic radiograph with a cyst: original, normalized, residual, components and final anomaly map](example.png)

*A phantom, drawn by a program: no patient is shown in this folder.*

## How to use it

In the repository that wrote this folder (Python 3.10 to 3.13, `pip install -r requirements.txt`{backbone}):

```python
from normalizer import Normalizer

normalizer = Normalizer.load({name})
result = normalizer.examine("patient.dcm")
result.map, result.score, result.p_value, result.flagged, result.normal
```

`result.map` has the size of the file, `result.normal` and `result.x` that of the model. Weights are safetensors and the
rest is JSON: nothing is unpickled. `contents.json` has the SHA-256 of every file.

## Data

{data}

## Settings

{settings}

## Figures

{figures}

## Intended use

Research on unsupervised anomaly detection: to compare methods, to look for what a data set holds, to show where a
radiograph differs from the normals that trained. Not for diagnosis, triage, or any decision about a person.

## Limits

{limits}
"""
LIMITS = (
    "What it calls normal is what its training set held: another clinic's devices, ages and restorations may be "
    "flagged for that alone. Thresholds and p-values hold for radiographs like the validation normals; calibrate "
    "on normals of your own before you trust a rate.",
    "At a false-positive rate of {fpr} about that share of normals is flagged, or somewhat more: the same normals "
    "chose the checkpoints.",
    "Small lesions (early caries) lie below what the image size shows; metal is found more readily than soft changes.",
    "A radiograph that is not flagged is not thereby healthy.",
    "{members}",
)


@dataclass(frozen=True)
class CardFacts:
    """What is known of a normalizer, none of it about a person."""

    name: str  # of the folder
    licence: str
    method: str
    size: tuple[int, int]  # rows and columns of the model's input
    fit: str
    radiographs: int | None  # that trained or validated; None where the checkpoints do not say
    normals: int  # that calibrated
    file_sizes: list[list[int]] | None  # of the smallest and the largest normal
    image_fpr: float
    threshold: float
    identity_error: float
    vae_error: float
    backbone: bool
    members: bool
    metrics: dict | None  # of phase 4, where labels were known
    identity: dict[str, str]


def model_card(facts: CardFacts) -> str:
    """README.md of the folder."""
    backbone = "; the reader's frozen ImageNet network comes with it as a package" if facts.backbone else ""
    limits = "\n".join(f"- {line.format(fpr=_percent(facts.image_fpr), members=_members(facts))}" for line in LIMITS)
    filled = {"backbone": backbone, "name": repr(facts.name), "data": _data(facts), "settings": _settings(facts)}
    body = BODY.format(**filled, figures=_figures(facts), limits=limits)
    return HEADER.format(licence=facts.licence) + body


def _percent(rate: float) -> str:
    return f"{100 * rate:g} %"  # 0.005 is not 0 %


def _data(facts: CardFacts) -> str:
    lines = []
    if facts.radiographs is not None:
        lines.append(f"- {facts.radiographs} normal radiographs trained or validated the networks")
    lines.append(f"- {facts.normals} validation normals gave thresholds, p-values and statistics")
    if facts.file_sizes:
        (rows, columns), (most_rows, most_columns) = facts.file_sizes
        lines.append(f"- files of {rows} x {columns} to {most_rows} x {most_columns} pixels (rows x columns)")
    kinds = ", ".join(facts.metrics["kinds"]) if facts.metrics else "none were labelled"
    lines.append(f"- kinds of abnormality among the test images: {kinds}; none was shown in training")
    return "\n".join(lines)


def _settings(facts: CardFacts) -> str:
    hashes = ", ".join(f"`{name}` {value[:16]}" for name, value in sorted(facts.identity.items()))
    return "\n".join(
        [
            f"- method `{facts.method}`, input {facts.size[0]} x {facts.size[1]}, fit `{facts.fit}`",
            f"- image threshold {facts.threshold:.4f} at a false-positive rate of {_percent(facts.image_fpr)}",
            f"- made of checkpoints {hashes}",
            "- everything else: `normalizer.json`",
        ]
    )


def _figures(facts: CardFacts) -> str:
    errors = (
        f"Validation normals: mean |x - G(x)| {facts.identity_error:.4f}, mean |x - dec(enc(x))| {facts.vae_error:.4f}."
    )
    if not facts.metrics:
        return f"{errors} No labelled test images were examined with these weights and settings."
    table = metrics_table(facts.metrics)
    return f"{errors} Labelled test images, thresholds from validation normals:\n\n```\n{table}\n```"


def _members(facts: CardFacts) -> str:
    if facts.members:
        return (
            "This folder holds salted hashes of patients and contents that trained, and fingerprints of their "
            "radiographs: they are refused or remarked on. Short patient numbers can be guessed from them: keep the "
            "folder at home."
        )
    return (
        "Who trained is not in this folder, so that nobody is refused for it: scores of patients who trained flatter."
    )
