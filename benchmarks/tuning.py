"""The tuned backbone alone, judged without a label: python benchmarks/tuning.py --preset cpu --reader.tuned-steps 4800

Takes the flags of rehearsal.py, trains nothing of the reader but its tuned backbone, for reader.tuned_steps steps, and
shows that one the same things: what longer tuning, another learning rate or other corruptions bring, without the time
that the features of a whole reader take. A tuning that was killed goes on; give each one that is tried its own
--inference.calibration. Writes tuning.csv beside the figures of phase 4.
"""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rehearsal import rehearse, write_table

from command_line import parse_command
from examination import open_normalizer, read_normals
from reader import WHOLE, positions
from runtime import run_script
from tuned_backbone import TunedBackbone
from tuned_training import fit_tuned

AS_THEY_ARE = SimpleNamespace(examine=lambda batch, times: batch)  # stands where G would, which nobody asks here


class Alone:
    """Stands where a reader would: what the tuned backbone says of images, and nothing else."""

    def __init__(self, network: TunedBackbone, size: tuple[int, int], mirror: bool, device: torch.device):
        self.network, self.mirror, self.device = network, mirror, device
        self.places = positions(size, [WHOLE], device)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        images = images.to(self.device)
        return self.network.look(images, self.places.expand(len(images), -1, -1, -1), self.mirror)


def main() -> None:
    model, config = open_normalizer(parse_command(__doc__))
    config = replace(config, inference=replace(config.inference, method="reader"))
    training = read_normals(model, config, "train").images
    identity = {"tuned alone": repr(config.reader), "seed": config.runtime.seed, **model.identity}
    last = Path(config.inference.calibration) / "tuning_last.pt"
    network = fit_tuned(training, config, identity, last, model.device)
    normals = read_normals(model, config, "val")
    alone = Alone(network, normals.images.shape[1:], config.reader.tuned_mirror, model.device)
    rows = rehearse(AS_THEY_ARE, alone, normals.images, config, normals.patients)
    write_table(rows, Path(config.inference.output) / "tuning.csv")


if __name__ == "__main__":
    run_script(main)
