"""Write the VAE of a phase-1 checkpoint as a diffusers folder in float16.

    python benchmarks/export_vae.py CHECKPOINT FOLDER

The folder can be given as vae.pretrained, or loaded with AutoencoderKL.from_pretrained. assets/phantom_vae was written
by this.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from files import load_checkpoint, write_atomically
from model import rebuild_vae
from runtime import run_script


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    checkpoint, folder = sys.argv[1], Path(sys.argv[2])
    vae = rebuild_vae(load_checkpoint(checkpoint, "vae", "python train_vae.py"))
    with tempfile.TemporaryDirectory() as drafts:
        vae.autoencoder.to(torch.float16).save_pretrained(drafts, safe_serialization=True)
        for draft in Path(drafts).iterdir():
            write_atomically(folder / draft.name, lambda beside, draft=draft: shutil.copyfile(draft, beside))
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"wrote {folder}, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    run_script(main)
