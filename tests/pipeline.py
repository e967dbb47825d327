"""The pipeline as tests run it: tiny settings, a dozen phantoms, each phase as a process or in this one."""

import csv
import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from runtime import run_script

ROOT = Path(__file__).parent.parent
TRAINING = ["train_vae", "extract_latents", "train_flowdiff"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
COPIES = 2
PARTS = {"phase1": "phase1_vae", "phase2": "phase2_latents", "phase3": "phase3_flowdiff", "phase4": "phase4_inference"}
SETTINGS = f"""
    --preset demo --data.height 64 --data.width 128 --runtime.precision no
    --vae.pretrained scratch --vae.freeze-encoder False --vae.scratch-channels 8 8 16 16
    --vae.steps 6 --vae.validate-every 3 --vae.batch-size 2
    --latent.augmented-copies {COPIES}
    --flowdiff.total-steps 8 --flowdiff.phase1-steps 4
    --flowdiff.identity-warmup-start 3 --flowdiff.identity-warmup-end 6
    --flowdiff.validate-every 4 --flowdiff.sample-every 4 --flowdiff.batch-size 4
    --unet.channels 16 32 --unet.attention False True --unet.norm-groups 8 --unet.attention-head-dim 8
    --inference.method statistical --inference.figures 3 --inference.top-share 0.01 --calibration.corrupted 16
""".split()


def run_benchmark(main, monkeypatch, *flags):
    """A benchmark in this process, on one thread, with the files of the repository where it looks for them."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, flags)])
    torch.set_num_threads(1)
    main()


def flags_of(outputs, data, *more):
    """The command line of every phase on the tiny settings."""
    return [*SETTINGS, "--outputs", str(outputs), "--data.root", str(data), *map(str, more)]


def shell(*command):
    """Run python from the repository, as a user does."""
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


def run_or_tell(script, folder):
    """A phase of the pipeline in `folder`: what it printed."""
    result = shell(f"{script}.py", *flags_of(folder / "run", folder / "phantoms"))
    assert result.returncode == 0, f"{script}.py:\n{result.stderr}"
    return result.stdout


def namespace(folder, printed):
    """Where the pipeline in `folder` left what, by phase."""
    out = folder / "run"
    places = {name: out / part for name, part in PARTS.items()}
    return SimpleNamespace(folder=folder, phantoms=folder / "phantoms", out=out, printed=printed, **places)


def sources(script, made):
    """The flags that make a phase read what `made` left."""
    vae, flow = made.phase1 / "checkpoint_best.pt", made.phase3 / "checkpoint_best.pt"
    both = ["--inference.vae-checkpoint", vae, "--inference.flow-checkpoint", flow]
    return {
        "train_vae": [],
        "extract_latents": ["--latent.vae-checkpoint", vae],
        "train_flowdiff": ["--flowdiff.vae-checkpoint", vae, "--flowdiff.latents", made.phase2],
        "inference": both,
        "export": both,
    }[script]


def run_here(script, words, monkeypatch, capsys):
    """Run a phase in this process, where torch is imported already: exit code, stdout, last line of stderr."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
    code = 0
    try:
        run_script(importlib.import_module(script).main)
    except SystemExit as end:
        code = end.code
    shown = capsys.readouterr()
    error = (shown.err.replace("\r", "\n").splitlines() or [""])[-1]
    return SimpleNamespace(code=code, out=shown.out, error=error)


def next_line(script, words):
    """The last line of the phase before `script`, ready to be pasted."""
    return f"next: {shlex.join(['python', f'{script}.py', *map(str, words)])}"


def table(path):
    """The rows of a .csv as dicts."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def opens(path):
    """Whether this is a whole PNG of some size."""
    with Image.open(path) as image:
        image.load()
        return image.format == "PNG" and path.stat().st_size > 10_000


def strict_json(path):
    """JSON without NaN and Infinity."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
