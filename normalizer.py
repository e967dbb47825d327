"""The normalizer G with its networks, loaded from the checkpoints of phases 1 and 3: a radiograph to its nearest
normal version.

    G = Normalizer.load("outputs/phase1_vae/checkpoint_best.pt", "outputs/phase3_flowdiff/checkpoint_best.pt")
    x = G.read("radiograph.dcm")            # (1, 1, H, W) in [-1, 1], prepared as in training
    normal = G(x)                           # the same shape; what it changed is the anomaly

or from one folder that export.py wrote (exported.py), where `examine` takes a file, too, and gives map and score:

    result = Normalizer.load("exported").examine("radiograph.dcm")

`examine` of a batch says more: G's one-step estimates at several noise levels and what the networks felt on the way,
which `anomaly.py` and `reader.py` look at; nothing is decoded before somebody asks for it. Images are (B, 1, H, W).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from checks import UsageError
from config import DataConfig, InferenceConfig, UNetConfig, rebuild_phase
from files import load_checkpoint, sha256
from flowdiff_model import FlowDiffUNet
from flowdiff_process import at_unit_variance, clean_from_noise, clean_from_velocity, interpolate, normalizer, two_heads
from latent_dataset import LatentStandard
from model import RadiographVAE, rebuild_vae
from radiographs.geometry import fit_image
from radiographs.membership import Membership
from radiographs.reading import ImageReadError, read_radiograph, rescale
from runtime import generator, reading_precision

if TYPE_CHECKING:
    from exported import Judged


@dataclass(frozen=True)
class Estimate:
    """The clean estimates from one noise level in one step, each the mean over the draws."""

    z: Tensor  # of the flow head, standardized, (B, C, h, w)
    z_diffusion: Tensor  # of the diffusion head
    features: Tensor  # of the last layer that the two heads share, (B, F, h, w)
    decoded: Callable[[Tensor], Tensor]

    @cached_property
    def x(self) -> Tensor:
        """The estimate of the flow head as an image, clipped to [-1, 1], (B, 1, H, W)."""
        return self.decoded(self.z)


class Examined:
    """What the networks say of a batch before any judgement, each made when it is first asked for.

    detail (B, 1, k H, k W) is the batch as it was read, k = 1 or more; x (B, 1, H, W), its k x k means, is what the
    networks see, as in training (radiographs.geometry.fit_detail).
    """

    def __init__(self, model: "Normalizer", detail: Tensor, magnification: int = 1):
        self.model = model
        self.detail = detail.to(model.device)
        self.x = F.avg_pool2d(self.detail, magnification) if magnification > 1 else self.detail
        self._estimates: dict[float, Estimate] = {}

    @cached_property
    def _with_features(self) -> tuple[Tensor, list[Tensor]]:
        return self.model.encode_with_features(self.x)

    @cached_property
    def z(self) -> Tensor:
        """The latent of x, standardized, (B, C, h, w)."""
        known = "_with_features" in self.__dict__
        return self._with_features[0] if known else self.model.encode(self.x)

    @property
    def encoder_features(self) -> list[Tensor]:
        """What the encoder felt at strides 1, 2 and 4 of x, (B, F, H, W) and smaller; ask before z to encode once."""
        return self._with_features[1]

    @cached_property
    def normal(self) -> Tensor:
        """G(x), clipped to [-1, 1], shape of x."""
        return self.model.decode(self.model.normal_latent(self.z))

    @cached_property
    def reconstruction(self) -> Tensor:
        """dec(enc(x)), clipped to [-1, 1]: the error G would make if it changed nothing."""
        return self.model.decode(self.z)

    def estimate(self, level: float) -> Estimate:
        """The one-step estimates from this noise level."""
        if level not in self._estimates:
            self._estimates[level] = self.model.estimate(self.z, level)
        return self._estimates[level]


class Normalizer:
    """G with the networks of phases 1 and 3, each rebuilt from its own checkpoint.

    Weights and what comes out are float32; between them the networks compute in settings.precision.
    """

    def __init__(
        self,
        vae: RadiographVAE,
        network: FlowDiffUNet,
        standard: LatentStandard,
        settings: InferenceConfig = InferenceConfig(),  # noqa: B008 (frozen)
        seed: int = 0,
    ):
        self.vae, self.network, self.standard = vae, network, standard
        self.settings, self.seed = settings, seed
        self.artefact: dict = {}  # preprocessing, split and UNet, as the checkpoint says
        self.identity: dict[str, str] = {}  # SHA-256 of both checkpoints
        self.members: list[Membership] = []
        self.judge: Callable[[str | Path], Judged] | None = None  # where it comes with what normals say

    @classmethod
    def load(
        cls,
        source: str | Path,
        flow_checkpoint: str | Path | None = None,
        settings: InferenceConfig | None = None,
        seed: int | None = None,
        device: torch.device | str = "cpu",
    ) -> "Normalizer":
        """From a folder that export.py wrote, or from the checkpoints of phases 1 (source) and 3.

        settings says how far out G walks and how back, seed fixes its noise; an exported folder has its own. UsageError
        if a file is missing or damaged, or if the flow belongs to another VAE.
        """
        if flow_checkpoint is None:
            return _exported(source, settings, seed, device)
        vae_checkpoint, settings, seed = source, settings or InferenceConfig(), seed or 0
        vae_content = load_checkpoint(vae_checkpoint, "vae", "python train_vae.py")
        flow_content = load_checkpoint(flow_checkpoint, "flowdiff", "python train_flowdiff.py")
        identity = {"vae_sha256": sha256(vae_checkpoint), "flow_sha256": sha256(flow_checkpoint)}
        if flow_content["vae_sha256"] != identity["vae_sha256"]:
            raise UsageError(
                f"{flow_checkpoint} was trained on latents of another VAE than {vae_checkpoint}: give the VAE it was "
                "trained with, or rerun python extract_latents.py and python train_flowdiff.py"
            )
        try:
            unet = rebuild_phase(UNetConfig, flow_content["config"]["unet"])
            network = FlowDiffUNet(unet, flow_content["latent_channels"])
            network.load_state_dict(flow_content["weights"])
            standard = LatentStandard(tuple(flow_content["mean"]), tuple(flow_content["std"]))
            artefact = {name: flow_content[name] for name in ("preprocessing", "split")}
            members = [Membership.from_plain(stored) for stored in flow_content["members"]]
        except (KeyError, TypeError, RuntimeError) as error:  # the right kind and format, and not what phase 3 writes
            raise UsageError(f"{flow_checkpoint} is damaged: run python train_flowdiff.py again") from error
        network.to(device).requires_grad_(False).eval()
        loaded = cls(rebuild_vae(vae_content).to(device), network, standard, settings, seed)
        loaded.artefact = artefact | {"unet": flow_content["config"]["unet"]}
        loaded.identity, loaded.members = identity, members
        return loaded

    @property
    def device(self) -> torch.device:
        """Where the networks are, and where results lie."""
        return next(self.network.parameters()).device

    def computing(self) -> torch.autocast:
        """The precision of whoever reads a radiograph with this G, as a context."""
        enabled = reading_precision(self.settings, self.device) == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def trained_on(self, patient: str | None, digest: str) -> bool:
        """Whether this patient, or this very picture, trained one of the two networks."""
        return any(members.trained(patient, digest) for members in self.members)

    def knows(self, patient: str | None, digest: str) -> bool:
        """Whether this patient, or this very picture, trained or validated one of them."""
        return any(members.knows(patient, digest) for members in self.members)

    def looks_known(self, fingerprint: np.ndarray) -> bool:
        """Whether one that looks like it (radiographs.likeness) trained or validated one of them."""
        return any(members.looks_known(fingerprint) for members in self.members)

    def read(self, path: str | Path) -> Tensor:
        """One file as the networks know radiographs, (1, 1, H, W) in [-1, 1]; ImageReadError if it is none."""
        how = DataConfig(**self.artefact["preprocessing"])
        try:
            x = rescale(read_radiograph(path), how.percentile_low, how.percentile_high)
        except ValueError as error:  # an image without contrast
            raise ImageReadError(path, str(error)) from error
        return torch.from_numpy(fit_image(x, how.height, how.width, how.fit))[None, None]

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """G(x), clipped to [-1, 1], shape of x."""
        return self.decode(self.normal_latent(self.encode(x.to(self.device))))

    @overload
    def examine(self, detail: Tensor, magnification: int = 1) -> Examined: ...

    @overload
    def examine(self, detail: str | Path) -> "Judged": ...

    def examine(self, detail: Tensor | str | Path, magnification: int = 1) -> "Examined | Judged":
        """Everything about a batch (B, 1, k H, k W) in [-1, 1], k the magnification; it is made when asked for.

        Of a file, its map, score and p-value as phase 4 has them, which only an exported folder knows: UsageError
        without.
        """
        if isinstance(detail, Tensor):
            return Examined(self, detail, magnification)
        if self.judge is None:
            raise UsageError(
                "checkpoints alone know no thresholds: load a folder that python export.py wrote, or examine a batch"
            )
        return self.judge(detail)

    def encode(self, x: Tensor) -> Tensor:
        """The standardized latent of x, (B, C, h, w)."""
        with self.computing():
            mean, _ = self.vae.encode(x)
        return self.standard.standardize(mean.float())

    @torch.no_grad()
    def encode_with_features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The standardized latent of x, and what the encoder felt on the way at strides 1, 2 and 4."""
        with self.computing():
            mean, features = self.vae.encode_with_features(x)
        return self.standard.standardize(mean.float()), [part.float() for part in features]

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """The image of a standardized latent, clipped to [-1, 1]."""
        with self.computing():
            x = self.vae.decode(self.standard.raw(z))
        return x.float().clamp(-1, 1)

    @torch.no_grad()
    def normal_latent(self, z: Tensor) -> Tensor:
        """G(z), the mean over the draws, (B, C, h, w)."""
        level, steps, solver = self.settings.noise_level, self.settings.steps, self.settings.solver
        heads = two_heads(self.network)
        with self.computing():
            walked = [normalizer(heads, z, level, noise, steps, solver) for noise in self.draws(z)]
        return torch.stack(walked).mean(0)

    @torch.no_grad()
    def estimate(self, z: Tensor, level: float) -> Estimate:
        """One step back from this noise level by each head, the mean over the draws."""
        by_flow, by_diffusion, features = torch.zeros_like(z), torch.zeros_like(z), 0
        t = torch.full((len(z),), level, device=z.device)
        for noise in self.draws(z):
            z_t = interpolate(z, noise, level)
            with self.computing():
                noise_hat, velocity, shared = self.network.heads_and_features(at_unit_variance(z_t, t), t)
            by_flow += clean_from_velocity(z_t, velocity, t) / self.settings.draws
            by_diffusion += clean_from_noise(z_t, noise_hat, t) / self.settings.draws
            features = features + shared.float() / self.settings.draws
        return Estimate(by_flow, by_diffusion, features, self.decode)

    def draws(self, z: Tensor) -> list[Tensor]:
        """The noise of each draw, the shape of z.

        Every image gets the same: its score must not depend on its neighbours.
        """
        keys = [(self.seed, "inference", draw) for draw in range(self.settings.draws)]
        noises = (torch.randn(z.shape[1:], generator=generator(*key)) for key in keys)
        return [noise.to(z.device).expand_as(z) for noise in noises]


def _exported(
    folder: str | Path, settings: InferenceConfig | None, seed: int | None, device: torch.device | str
) -> Normalizer:
    from exported import load  # here, since what is exported is made of this

    if settings is not None or seed is not None:
        raise UsageError("an exported folder has its own settings and seed: leave them out, or export it with others")
    return load(folder, device)
