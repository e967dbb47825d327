"""Write the VAE of a phase-1 checkpoint as a diffusers folder in float16: python benchmarks/export_vae.py CHECKPOINT FOLDER

The folder can be given as vae.pretrained, or loaded with AutoencoderKL.from_pretrained. assets/phantom_vae was written by this.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from files import load_checkpoint
from model import rebuild_vae
from runtime import run_script


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    vae = rebuild_vae(load_checkpoint(sys.argv[1], "vae", "python train_vae.py"))
    vae.autoencoder.to(torch.float16).save_pretrained(sys.argv[2], safe_serialization=True)
    size = sum(file.stat().st_size for file in Path(sys.argv[2]).iterdir())
    print(f"wrote {sys.argv[2]}, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    run_script(main)
