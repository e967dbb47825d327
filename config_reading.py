"""Every number of how phase 4 reads what G changed: the two methods that learn from normals, statistical and reader.

Overridden like those of config.py, such as --reader.steps 4000. Lengths in an image are shares of its height.
"""

from dataclasses import asdict, dataclass
from typing import Literal

from checks import require, require_positive, require_ranges


@dataclass(frozen=True)
class CalibrationConfig:
    """Phase 4, method statistical: how views of what G changed become one map."""

    views: tuple[str, ...] = (  # anomaly.py says what each is
        *("vae_residual", "residual", "change", "formula", "formula_of_change"),
        *("latent_distance", "heads", "latent_change"),
    )
    levels: tuple[float, ...] = (0.1, 0.2, 0.3)  # noise levels of the views: low keep detail, high remove more
    blurs: tuple[float, ...] = (0.004, 0.008, 0.016)  # of each view, as shares of the height: half a lesion's radius
    alignment: float = 0.012  # sigma of the neighbourhood that shares its statistics: panoramics align only roughly
    smallest_spread: float = 0.3  # of a view's mean spread; a pixel's own spread below it (in air) is not believed
    largest_deviation: float = 10.0  # standard deviations; beyond, more of the same says nothing new
    regularization: float = 0.01  # C of the logistic regression; less: smaller weights, as the views are much alike
    corrupted: int = 160  # corrupted validation normals that the fusion of the views is fitted to
    pixels_inside: int = 300  # drawn from what changed in each corrupted image
    pixels_outside: int = 600  # drawn from the rest of it
    pixels_normal: int = 2000  # drawn from each normal, and 100,000 from all of them at most
    smallest_corruption: float = 0.012  # radius of a corruption as a share of the height, log-uniform from here
    largest_corruption: float = 0.20  # up to here
    fewest_corruptions: int = 1  # in one image, at least
    most_corruptions: int = 4  # in one image, at most
    least_change: float = 0.08  # mean change inside a corruption, in units of [-1, 1], that counts as one
    # how a corruption is filled, drawn from these; corruption.py says what each is, and a name given twice counts twice
    fills: tuple[str, ...] = ("level", "offset", "offset", "shade", "shade", "texture", "paste", "smear", "rim")

    def __post_init__(self):
        inside = len(self.levels) > 0 and all(0 < level < 1 for level in self.levels)
        require(inside, f"calibration.levels needs noise levels in (0, 1), got {self.levels}")
        require(len(self.views) > 0, "calibration.views needs at least one view; anomaly.py names them")
        inside = len(self.blurs) > 0 and all(0 <= blur < 1 for blur in self.blurs)
        require(inside, f"calibration.blurs needs shares of the height in [0, 1), got {self.blurs}")
        require_ranges("calibration", self, ("alignment", "smallest_spread"), 0, 1)
        require_positive("calibration", self, ("regularization",))
        require_ranges("calibration", self, ("largest_deviation",), 0.1, 1e4)
        require_ranges("calibration", self, ("corrupted", "pixels_inside", "pixels_outside", "pixels_normal"), 1, 10**6)
        _require_corruptions("calibration", self)


@dataclass(frozen=True)
class ReaderConfig:
    """Phase 4, method reader: small networks that learn on corrupted normals how a foreign place looks."""

    # the reader sees the radiograph at this many times the model's size: small lesions need more pixels than G
    magnification: int = 2
    # what it reads; features.py says what each is. encoder helps where there is no backbone
    features: tuple[str, ...] = ("image", "residual", "latent", "trunk", "backbone")
    backbone: Literal["auto", "efficientnet-lite0", "none"] = "auto"  # frozen ImageNet features; auto: where installed
    levels: tuple[float, ...] = (0.1, 0.25, 0.4)  # noise levels at which G is read
    stride: Literal[2, 4, 8] = 4  # pixels of the magnified image per place that gets a verdict
    width: int = 64  # features of the reader's hidden layers
    # a verdict hears of what lies so many places away (of stride pixels each), and again of what those heard
    distances: tuple[int, ...] = (1, 2, 4, 8)
    mirror: bool = True  # it hears of the same place on the other side of the jaw, too
    members: int = 3  # networks whose verdicts are averaged: errs less, learns longer
    normals: int = 1_000  # training normals it learns on at most, spread evenly
    copies: int = 8  # corrupted copies of each normal, beside the plain one
    steps: int = 8_000  # optimizer steps
    crops: int = 4  # per step and member, each a quarter of an image
    lr: float = 1e-3  # AdamW learning rate after warm-up
    lr_warmup_steps: int = 50  # linear warm-up, then cosine to a tenth of lr
    weight_decay: float = 0.01  # AdamW weight decay
    ema_decay: float = 0.99  # what learns is read with a moving average of its weights; 0: with those of the last step
    dropout: float = 0.1  # share of the inputs left out at random: no single feature is relied on
    # a copy of the backbone that learns on, as many steps, on corruptions it never saw before: it finds small things.
    # 0 does without, and so does whoever has no backbone
    tuned_steps: int = 8_000
    tuned_lr: float = 2e-4  # of what ImageNet taught; what is new learns at lr
    tuned_turn: float = 6.0  # degrees up to which a normal is turned before it is corrupted
    tuned_stretch: float = 0.15  # share up to which each axis is stretched; at 0 large shapes are learnt by heart
    tuned_unchanged: float = 0.15  # share of normals that are not corrupted
    tuned_share: float = 0.5  # how much of the reader's verdict is its
    tuned_mirror: bool = True  # it looks at the mirror image, too, and says the mean: finds more, looks twice as long
    positive_weight: float = 3.0  # weight of changed places in the loss
    largest_deviation: float = 8.0  # standard deviations; beyond, more of the same says nothing new
    smallest_spread: float = 0.3  # of a feature's mean spread; a place's own spread below it (in air) is not believed
    alignment: float = 0.016  # sigma of the neighbourhood that shares its statistics, a share of the height
    # the same floor for the reader's verdict: where normals are quieter than on average, it is not made louder
    smallest_verdict_spread: float = 1.0
    top_share: float = 0.0005  # what the map says of an image is the mean of this share of its highest values
    # what an image's score hears beside the reader, whose weight is 1: second eyes for metal, which no corruption looks
    # like. Both in standard deviations of normals; chosen on phantoms of seeds 8 and 9, which no table reports
    plain_weight: float = 0.25  # of the plain map
    residual_weight: float = 0.75  # of |x - dec(enc(x))|
    smallest_corruption: float = 0.004  # radius of a corruption as a share of the height, log-uniform from here
    largest_corruption: float = 0.12  # up to here
    fewest_corruptions: int = 8  # in one image, at least
    most_corruptions: int = 20  # in one image, at most: each copy costs time, and what lies in it does not
    least_change: float = 0.06  # mean change inside a corruption, in units of [-1, 1], that counts as one
    # as other machines take a radiograph: half of the corrupted copies, and of what the tuned backbone learns on, are
    # blurred and noisy as a whole, up to these
    machine_blur: float = 0.0  # sigma as a share of the height, 0.003 is 1.5 px of 512; 0 does without
    machine_noise: float = 0.0  # standard deviation of white noise in units of [-1, 1], such as 0.06; 0 does without
    # how a corruption is filled, drawn from these; corruption.py says what each is. Twice what metal does to a film
    fills: tuple[str, ...] = (
        *("level", "offset", "shade", "texture", "paste", "smear", "rim"),
        *("saturate", "saturate", "noise", "graft", "warp", "remove"),
    )
    checkpoint_every: int = 200  # optimizer steps between writes of what a killed training goes on from

    def __post_init__(self):
        require_ranges("reader", self, ("magnification",), 1, 8)
        inside = len(self.levels) > 0 and all(0 < level < 1 for level in self.levels)
        require(inside, f"reader.levels needs noise levels in (0, 1), got {self.levels}")
        require(len(self.features) > 0, "reader.features needs at least one; features.py names them")
        near = len(self.distances) > 0 and all(1 <= distance <= 64 for distance in self.distances)
        require(near, f"reader.distances needs numbers of places from 1 to 64, got {self.distances}")
        counts = ("width", "normals", "copies", "steps", "crops", "checkpoint_every")
        require_ranges("reader", self, counts, 1, 10**7)
        require_ranges("reader", self, ("members",), 1, 100)
        require_positive("reader", self, ("lr", "tuned_lr", "positive_weight"))
        require_ranges("reader", self, ("lr_warmup_steps", "weight_decay", "tuned_steps"), 0)
        require_ranges("reader", self, ("tuned_share", "tuned_unchanged"), 0, 1)
        require_ranges("reader", self, ("tuned_turn",), 0, 180)
        require_ranges("reader", self, ("tuned_stretch",), 0, 0.9)
        require_ranges("reader", self, ("plain_weight", "residual_weight"), 0, 1e6)
        require_ranges("reader", self, ("dropout",), 0, 0.9)
        require_ranges("reader", self, ("ema_decay",), 0, 0.99999)
        require_ranges("reader", self, ("machine_blur", "machine_noise"), 0, 0.5)
        require_ranges("reader", self, ("alignment", "smallest_spread", "smallest_verdict_spread"), 0, 1)
        require_ranges("reader", self, ("largest_deviation",), 0.1, 1e4)
        require(0 < self.top_share <= 1, f"reader.top_share must lie in (0, 1], got {self.top_share}")
        _require_corruptions("reader", self)


def told_of(settings: ReaderConfig) -> dict[str, object]:
    """The settings as a reader's identity has them: what came later is without a word where it is not used."""
    return {name: value for name, value in asdict(settings).items() if value or not name.startswith("machine_")}


def _require_corruptions(phase: str, settings: "CalibrationConfig | ReaderConfig") -> None:
    require_ranges(phase, settings, ("least_change",), 0.001, 0.5)  # more, and few corruptions would reach it
    require_ranges(phase, settings, ("fewest_corruptions", "most_corruptions"), 1, 100)
    ordered = settings.fewest_corruptions <= settings.most_corruptions
    require(ordered, f"{phase}.fewest_corruptions must not lie above most_corruptions")
    ordered = 0 < settings.smallest_corruption <= settings.largest_corruption < 1
    require(ordered, f"{phase}.smallest_corruption must not lie above largest_corruption, both in (0, 1)")
    require(len(settings.fills) > 0, f"{phase}.fills needs at least one; corruption.py names them")
