"""Files that appear whole or not at all, checkpoints that refuse to be misread, runs that know what they continue."""

import errno
import json
import os

import pytest
import torch

from checks import UsageError
from config import Config, RuntimeConfig
from files import (
    FORMAT,
    RunIdentity,
    load_checkpoint,
    remove_files,
    resume_point,
    save_checkpoint,
    sha256,
    unsealed,
    weights_sha256,
    write_atomically,
    write_json,
    write_sealed_json,
)
from runtime import plain

MADE_BY = "python phase.py"


# ---------------------------------------------------------------- files that appear whole


def half_then_fail(path):
    path.write_text("ha")
    raise OSError("disk full")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_atomically(tmp_path / "x.txt", lambda path: path.write_text("old"))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "x.txt", half_then_fail)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x.txt": "old"}


def test_a_file_is_flushed_before_it_takes_its_place(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (order.append(name), real(*args)))
    write_atomically(tmp_path / "new" / "x.txt", lambda path: path.write_text("whole"))
    assert order == ["fsync", "replace"] and (tmp_path / "new" / "x.txt").read_text() == "whole"


def test_json_is_strict(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"auroc": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_sealed_json_says_whether_it_is_what_was_written(tmp_path):
    content = {"mean": [0.1 + 0.2, 1e-17], "rows": {"train": 3}, "name": "Zahn\u00e4rzte", "none": None}
    write_sealed_json(tmp_path / "x.json", content)
    stored = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert unsealed(stored) == content
    for name in stored:
        with pytest.raises(ValueError, match="not what was written"):
            unsealed(stored | {name: "x"})
        with pytest.raises(ValueError, match="not what was written"):
            unsealed({key: value for key, value in stored.items() if key != name})


def test_a_full_disk_is_one_line_and_what_was_there_stays_whole(small_disk):
    path = small_disk / "x.pt"
    save_checkpoint(path, "vae", {"weights": torch.zeros(20_000)})
    for size in (40_000, 41_001, 60_000, 300_000):  # torch fails in another place each time
        with pytest.raises(UsageError, match=r"x.pt cannot be written, the disk is full .*: make room"):
            save_checkpoint(path, "vae", {"weights": torch.ones(size)})
        with pytest.raises(UsageError, match=r"y.json cannot be written, the disk is full"):
            write_json(small_disk / "y.json", {"rows": ["x" * 100] * size})
        assert [each.name for each in small_disk.iterdir()] == ["x.pt"]
    assert load_checkpoint(path, "vae", MADE_BY)["weights"].shape == (20_000,)


def test_what_fails_for_another_reason_says_its_own(tmp_path):
    for error in (OSError(errno.EIO, "Input/output error"), RuntimeError("no such operator")):
        with pytest.raises(type(error), match=str(error.args[-1])):
            write_atomically(tmp_path / "x", lambda beside, error=error: (_ for _ in ()).throw(error))


def test_sha256_is_that_of_the_standard(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_reads_back(tmp_path):
    save_checkpoint(tmp_path / "x.pt", "vae", {"weights": {"w": torch.arange(3.0)}, "step": 7})
    content = load_checkpoint(tmp_path / "x.pt", "vae", MADE_BY)
    assert (content["format"], content["kind"], content["step"]) == (FORMAT, "vae", 7) and content["weights"][
        "w"
    ].tolist() == [0, 1, 2]


class Malice:
    """What a hostile .pt holds: unpickling it runs a command."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (self.witness,)


def truncated(path):
    save_checkpoint(path, "vae", {"weights": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:2000])


SPOILT = {
    "missing": (lambda path: None, "is missing: run python phase.py first"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read .*run python phase.py again"),
    "garbage": (lambda path: path.write_bytes(b"not a checkpoint"), "cannot be read .*run python phase.py again"),
    "truncated": (truncated, "cannot be read .*run python phase.py again"),
    "wrong kind": (
        lambda path: save_checkpoint(path, "flowdiff", {}),
        "is no vae checkpoint: give the file that python phase.py wrote",
    ),
    "a bare tensor": (
        lambda path: torch.save(torch.zeros(3), path),
        "is no vae checkpoint: give the file that python phase.py wrote",
    ),
    "a state dict": (
        lambda path: torch.save({"weight": torch.zeros(3)}, path),
        "is no vae checkpoint: give the file that python phase.py wrote",
    ),
    "newer format": (
        lambda path: torch.save({"kind": "vae", "format": FORMAT + 1}, path),
        f"has format {FORMAT + 1}, this code reads {FORMAT}: use the",
    ),
    "no format": (lambda path: torch.save({"kind": "vae"}, path), "run python phase.py again"),
    "a folder": (lambda path: path.mkdir(), "python phase.py"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_checkpoint_is_refused_with_the_remedy(name, tmp_path):
    spoil, remedy = SPOILT[name]
    spoil(tmp_path / "x.pt")
    with pytest.raises(UsageError, match=f"x.pt {remedy}" if remedy[:3] != "run" and name != "a folder" else remedy):
        load_checkpoint(tmp_path / "x.pt", "vae", MADE_BY)


def test_a_checkpoint_that_rotted_is_refused_or_says_what_was_written(tmp_path):
    """One bit at a time, anywhere: a byte of no consequence may change, a weight may not."""
    path, written = tmp_path / "x.pt", {"weights": {"w": torch.randn(40)}, "mean": [0.25, 3.0], "step": 7}
    save_checkpoint(path, "vae", written)
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 3):
        rotted = bytearray(whole)
        rotted[place] ^= 1 << place % 8
        path.write_bytes(rotted)
        try:
            content = load_checkpoint(path, "vae", MADE_BY)
        except UsageError as error:
            refused += 1
            assert "run python phase.py again" in str(error) or "use the matching" in str(error)
        else:
            assert torch.equal(content.pop("weights")["w"], written["weights"]["w"])
            assert content == {"format": FORMAT, "kind": "vae", "mean": [0.25, 3.0], "step": 7}
    weights = whole.index(written["weights"]["w"].numpy().tobytes())
    path.write_bytes(whole[: weights + 9] + bytes([whole[weights + 9] ^ 4]) + whole[weights + 10 :])
    with pytest.raises(UsageError, match=r"is damaged \(the checksum of a part is wrong\): run python phase.py again"):
        load_checkpoint(path, "vae", MADE_BY)
    assert refused > 100


def test_code_hidden_in_a_checkpoint_does_not_run(tmp_path):
    torch.save({"kind": "vae", "format": FORMAT, "weights": Malice(str(tmp_path / "witness"))}, tmp_path / "x.pt")
    with pytest.raises(UsageError, match="cannot be read"):
        load_checkpoint(tmp_path / "x.pt", "vae", MADE_BY)
    assert not (tmp_path / "witness").exists()
    torch.load(tmp_path / "x.pt", weights_only=False)  # it would have
    assert (tmp_path / "witness").exists()


def test_a_config_in_a_checkpoint_is_plain_and_survives(tmp_path):
    save_checkpoint(tmp_path / "x.pt", "vae", {"config": plain(Config())})
    stored = load_checkpoint(tmp_path / "x.pt", "vae", MADE_BY)["config"]
    assert stored == json.loads(json.dumps(stored)) == plain(Config())


def test_weights_are_known_by_content_not_by_file():
    one, same, other = (torch.nn.Linear(2, 2) for _ in range(3))
    same.load_state_dict(one.state_dict())
    hashes = [weights_sha256(network.state_dict()) for network in (one, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_only_the_files_of_a_run_are_removed(tmp_path):
    for name in ("val_000500.png", "val_notes.png", "checkpoint_best.pt", "notes.txt", "config.json"):
        (tmp_path / name).write_text("")
    remove_files(tmp_path, ("val_[0-9]*.png", "checkpoint_*.pt"))
    assert {path.name for path in tmp_path.iterdir()} == {"val_notes.png", "notes.txt", "config.json"}
    remove_files(tmp_path / "nowhere", ("*",))


def test_files_that_no_run_wrote_are_refused_and_stay(tmp_path):
    (tmp_path / "checkpoint_best.pt").write_text("of somebody else")
    with pytest.raises(UsageError, match="checkpoint_best.pt was not written by this phase: move it away"):
        remove_files(tmp_path, ("checkpoint_*.pt",))
    assert (tmp_path / "checkpoint_best.pt").is_file()


# ---------------------------------------------------------------- a run that goes on


SETTINGS = {"vae": {"lr": 1.0, "steps": 5}, "runtime": {"seed": 0}, "number of processes": 1, "precision": "float32"}
INPUTS = {"the training radiographs": "a" * 64}
ADJUSTABLE = ("vae.lr", "vae.steps")


@pytest.fixture
def resume(tmp_path):
    """Try to resume a run of 3 steps under other settings or inputs."""
    stored = RunIdentity(SETTINGS, INPUTS, ADJUSTABLE).plain()
    save_checkpoint(tmp_path / "x.pt", "vae", {"identity": stored, "step": 3})

    def resume(settings=SETTINGS, inputs=INPUTS, total=5, **options):
        identity = RunIdentity(settings, inputs, ADJUSTABLE)
        return resume_point(tmp_path / "x.pt", "vae", identity, RuntimeConfig(**options), MADE_BY, total)

    return resume


def test_resuming_is_a_choice_and_needs_a_file(resume, tmp_path):
    assert resume()["step"] == 3
    assert resume(settings={"vae": {}}, resume=False) is None
    (tmp_path / "x.pt").unlink()
    assert resume() is None


def test_another_run_is_refused_by_everything_that_changed(resume):
    settings = {"vae": {"lr": 2.0, "added": 1}, "runtime": {"seed": 4}, "number of processes": 2, "precision": "bf16"}
    with pytest.raises(UsageError) as refusal:
        resume(settings, {"the training radiographs": "b" * 64}, resume_changed=True)
    said = str(refusal.value).split("(")[1].split(")")[0].split("; ")
    assert sorted(said) == [
        "number of processes was 1, now 2",
        "precision was float32, now bf16",
        "runtime.seed was 0, now 4",
        "the training radiographs changed",
        "vae.added was not set, now 1",
        "vae.lr was 1.0, now 2.0",
        "vae.steps was 5, now not set",
    ]
    assert "--runtime.resume False" in str(refusal.value) and "resume-changed" not in str(refusal.value)


def test_a_longer_run_at_a_lower_rate_goes_on_if_one_says_so(resume):
    longer = SETTINGS | {"vae": {"lr": 0.5, "steps": 9}}
    with pytest.raises(
        UsageError, match=r"vae.lr was 1.0, now 0.5; vae.steps was 5, now 9.*--runtime.resume-changed True"
    ):
        resume(longer, total=9)
    assert resume(longer, total=9, resume_changed=True)["step"] == 3


def test_fewer_steps_than_are_taken_already_are_refused(resume):
    with pytest.raises(UsageError, match="has taken 3 steps already, and 2 are asked for"):
        resume(SETTINGS | {"vae": {"lr": 1.0, "steps": 2}}, total=2, resume_changed=True)
