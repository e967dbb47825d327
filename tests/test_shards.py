"""One phase by several: by the processes of torchrun, by jobs of their own, by a script of Slurm; the result of one."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from pipeline import ENVIRONMENT, ROOT, flags_of, shell, sources, strict_json, table

import inference
import results
from extract_latents import keys_of_shard
from files import SEAL
from holding import hold
from merging import Whole
from normalizer import Normalizer
from reporting.lookup import LOOKUP
from results import KEPT, UNFINISHED
from shards import Shard, remove_shards, wait_for

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
QUIET = ["--inference.figures", 0, "--inference.save-maps", "False", "--inference.report", "False"]
NEW_EACH_TIME = {".results.lock", ".together.json", "examination.json"}  # an owner, a token, times of files


# ---------------------------------------------------------------- who does what


@pytest.mark.parametrize(("total", "size", "count"), [(9, 2, 2), (9, 8, 3), (1000, 8, 7), (3, 8, 5), (16, 4, 4)])
def test_shards_have_every_row_once_in_batches_of_a_single_run(total, size, count):
    parts = [shard.rows(total, size) for shard in Shard(1, count).everyone]
    assert [row for part in parts for row in part] == list(range(total))
    assert all(part.start % size == 0 for part in parts if part)
    batches = [-(-len(part) // size) for part in parts]
    assert max(batches) - min(batches) <= 1


@pytest.mark.parametrize(("rows", "copies", "size", "count"), [(12, 2, 8, 2), (5, 1, 2, 3), (3, 4, 4, 9), (7, 0, 3, 2)])
def test_batches_of_phase_2_are_those_of_a_single_run_whoever_makes_them(rows, copies, size, count):
    def batches(keys):
        parts = [[key for key in keys if key[0] == 0], [key for key in keys if key[0]]]
        return [part[first : first + size] for part in parts for first in range(0, len(part), size)]

    keys = list(itertools.product(range(1 + copies), range(rows)))
    shares = [keys_of_shard(keys, shard, size) for shard in Shard(1, count).everyone]
    assert sum(map(batches, shares), []) == batches(keys)


def test_who_waits_for_a_torchrun_that_was_killed_ends_and_says_so():
    """Its processes would outlive it, and wait for ever."""
    waits = "import shards; shards.wait_for(lambda: print(1, flush=True))"
    starts = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {waits!r}]); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", starts], cwd=ROOT, stdout=-1, stderr=-1, text=True)
    parent.stdout.readline()
    parent.kill()
    assert "torchrun was ended while its processes waited" in parent.stderr.read()
    assert wait_for(iter([None, None, 3]).__next__) == 3


def test_a_shard_in_which_somebody_works_is_not_removed(tmp_path, capsys):
    for number in (1, 2):
        hold(tmp_path / f"shard_{number}_of_2", "shard").close()
    (tmp_path / "shard_3_of_x").mkdir()
    with hold(tmp_path / "shard_1_of_2", "shard"):
        remove_shards(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"shard_1_of_2", "shard_3_of_x"}
    assert "another run is writing" in capsys.readouterr().out


# ---------------------------------------------------------------- torchrun


def test_two_processes_encode_what_one_does_to_the_last_byte(call, made, tmp_path):
    words = flags_of(tmp_path, made.phantoms, *sources("extract_latents", made))
    result, out = shell(*TORCHRUN, "extract_latents.py", *words), tmp_path / "phase2_latents"
    assert result.returncode == 0 and "2 process(es)" in result.stdout, result.stderr[-3000:]
    names = {path.name for path in made.phase2.iterdir()}
    assert {path.name for path in out.iterdir()} == names | {".together.json"}
    for name in names - {"latents.json", ".latents.lock"}:
        assert (out / name).read_bytes() == (made.phase2 / name).read_bytes(), name
    ours, theirs = (strict_json(folder / "latents.json") for folder in (out, made.phase2))
    changed = {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}
    assert changed == {"members", SEAL}  # their salt is new each time
    assert "holds these latents already" in call("extract_latents").out


def in_it(folder):
    """Every file of an examination that follows from what was examined, by name; of the report all but its date."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name not in NEW_EACH_TIME)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}
    if "report.html" in files:
        files["report.html"] = re.sub(rb"\d{4}-\d\d-\d\d \d\d:\d\d [+-]\d{4}", b"", files["report.html"])
    return files


def differing(folder, other):
    """The names of files that are not the same in both folders."""
    ours, theirs = in_it(folder), in_it(other)
    return {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}


def same_numbers(folder, other):
    """Whether tables and metrics are the same, whatever else was asked for."""
    return not differing(folder, other) & {"scores.csv", "metrics.json", LOOKUP}


@pytest.fixture
def out(tmp_path, examined):
    """Where results will lie; the names of images are those of `examined`, since the salt is."""
    folder = tmp_path / "phase4_inference"
    folder.mkdir()
    shutil.copy(examined.phase4 / LOOKUP, folder)
    return folder


def test_two_processes_examine_what_one_does_to_the_last_byte(made, examined, out, tmp_path):
    """And the first makes the calibration meanwhile."""
    words = flags_of(tmp_path, made.phantoms, *sources("inference", made))
    result = shell(*TORCHRUN, "inference.py", *words)
    assert result.returncode == 0 and "9 images examined, 0 skipped" in result.stdout, result.stderr[-3000:]
    assert {"scores.csv", "metrics.json", "report.html", "maps/008.npy"} <= in_it(out).keys()
    assert not differing(out, examined.phase4)
    assert (tmp_path / "calibration/statistical.json").is_file() and result.stdout.count("to examine: 9") == 1


# ---------------------------------------------------------------- jobs


@pytest.fixture
def job(call, examined, out):
    """Run phase 4 as one job of several, under the calibration of `examined`."""

    def job(part, *flags, **how):
        known = ["--inference.calibration", examined.out / "calibration", "--inference.shard", part]
        return call("inference", *known, *flags, **how)

    return job


@pytest.mark.parametrize("count", [2, 3])
def test_shards_in_any_order_are_merged_into_the_folder_of_a_single_run(count, job, examined, out):
    """Two batches in three shards leave one of them empty."""
    for number in range(count, 0, -1):
        done = job(f"{number}/{count}")
        assert done.code == 0 and "is ready to be merged" in done.out
        assert {path.name for path in out.iterdir() if path.is_file()} == {LOOKUP}
    merged = job("merge")
    assert merged.code == 0 and "9 images examined, 0 skipped" in merged.out
    assert not differing(out, examined.phase4) and not list(out.glob("shard_*"))
    again = job("merge")
    assert again.code == 0 and "holds these results already" in again.out
    assert "holds these results already" in job("").out


def test_shards_leave_out_what_cannot_be_read_as_a_single_run_does(job, call, examined, out, tmp_path):
    data = shutil.copytree(examined.phantoms, tmp_path / "phantoms")
    bad = [row["image"] for row in table(data / "manifest.csv") if row["split"] == "test"][3]
    (data / bad).write_bytes(b"no picture")
    flags = ["--inference.batch-size", 2, "--data.max-bad-share", 0.2, *QUIET]
    with pytest.warns(UserWarning, match="files cannot be read"):
        for part in ("1/2", "2/2", "merge"):
            result = job(part, *flags, data=data)
        assert result.code == 0 and "8 images examined, 1 skipped" in result.out
        whole = tmp_path / "whole/phase4_inference"
        whole.mkdir(parents=True)
        shutil.copy(out / LOOKUP, whole)
        job("", *flags, data=data, outputs=tmp_path / "whole")
    assert not differing(out, whole) and "skipped_local_only.csv" in in_it(out)


def test_too_many_bad_files_end_a_shard_and_the_merge(job, examined, tmp_path):
    data = shutil.copytree(examined.phantoms, tmp_path / "phantoms")
    bad = [row["image"] for row in table(data / "manifest.csv") if row["split"] == "test"][0]
    (data / bad).write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="1 of 8 files cannot be read"):
        ended = job("1/2", *QUIET, data=data)
    assert ended.code == 2 and "of 9 files cannot be read" in ended.error and "shard_1_of_2" in ended.error


@pytest.mark.parametrize(
    ("before", "flags", "words"),
    [
        ([], [], r"has no shards: run python inference.py with --inference.shard 1/8 to 8/8 first"),
        (["2/2"], [], r"lacks shard_1_of_2: run python inference.py .* --inference.shard 1/2$"),
        (["1/2", "3/3"], [], r"has shards of 2 and of 3: remove the folders"),
        (
            ["1/1"],
            ["--inference.image-fpr", 0.2],
            r"shard_1_of_1 belongs to another .*image_fpr was 0.05, now 0.2.*1/1",
        ),
    ],
)
def test_what_is_missing_or_foreign_is_not_merged(before, flags, words, job, out):
    for part in before:
        assert job(part, *QUIET).code == 0
    result = job("merge", *QUIET, *flags)
    assert result.code == 2 and re.search(words, result.error), result.error
    assert not (out / "scores.csv").exists()


def test_shards_of_two_precisions_are_told_by_their_names(out):
    def made_of(**walk):
        shaping = {"calibration": {"belongs_to": walk}, "settings": {"batch_size": 8}}
        shaping |= {"preprocessing": {}, "recipe": 1, "torch": "2"}
        return Whole.of(out, "", [], shaping, "cpu").made_of

    told = made_of().changes_since(made_of(precision="bf16").plain())
    assert told["inference.precision"] == "inference.precision was bf16, now float32"


def test_shards_of_other_radiographs_are_not_merged(job, examined, tmp_path):
    data = shutil.copytree(examined.phantoms, tmp_path / "phantoms")
    assert job("1/1", *QUIET, data=data).code == 0
    rows = (data / "manifest.csv").read_text().splitlines()
    (data / "manifest.csv").write_text("\n".join(rows[:-1]))
    result = job("merge", *QUIET, data=data)
    assert result.code == 2 and "(the radiographs changed)" in result.error


def test_a_shard_that_was_stopped_is_not_merged_and_goes_on(job, call, examined, out, monkeypatch):
    examine, seen = Normalizer.examine, []

    def examine_and_be_told(self, images, times):
        seen.append(len(images))
        if len(seen) == 2:
            inference.Steps.under_way.number = signal.SIGTERM
        return examine(self, images, times)

    monkeypatch.setattr(Normalizer, "examine", examine_and_be_told)
    flags = ["--inference.batch-size", 2, *QUIET]
    stopped = job("2/2", *flags)
    assert stopped.code == 143 and stopped.error.endswith("goes on after 4 of 5 images of this shard")
    assert job("1/2", *flags).code == 0
    unfinished = job("merge", *flags)
    assert unfinished.code == 2 and "shard_2_of_2 is not finished (4 of 5 images)" in unfinished.error
    assert "continuing after 4 of 5 images" in job("2/2", *flags).out and sum(seen) == 9
    assert job("merge", *flags).code == 0 and len(table(out / "scores.csv")) == 9


@pytest.mark.parametrize("where", ["results._second_name", "inference.remove_shards"])  # while files are taken, after
def test_a_merge_that_was_killed_is_given_again(where, job, examined, out, monkeypatch):
    links, second_name = [], results._second_name

    def killed(*given):
        links.append(given)
        if where == "inference.remove_shards" or len(links) == 5:
            raise KeyboardInterrupt
        second_name(*given)

    for part in ("1/2", "2/2"):
        assert job(part, *QUIET).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(where, killed)
        assert job("merge", *QUIET).code == 130
    assert job("merge", *QUIET).code == 0 and not list(out.glob("shard_*")) and same_numbers(out, examined.phase4)


def test_shards_are_merged_where_the_disk_has_no_second_names(job, examined, out, monkeypatch):
    def no_links(*given):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    assert all(job(part, *QUIET).code == 0 for part in ("1/2", "2/2", "merge"))
    assert same_numbers(out, examined.phase4)


def test_two_jobs_of_one_shard_are_told_apart(job, out):
    with hold(out / "shard_1_of_2", "shard"):
        second = job("1/2", *QUIET)
    assert second.code == 2 and "another run is writing into" in second.error


def test_shards_share_a_calibration_and_say_which_command_makes_it(call, tmp_path):
    flags = ["--inference.method", "plain", *QUIET]
    refused = call("inference", *flags, "--inference.shard", "1/2")
    assert refused.code == 2 and refused.error.endswith("and --inference.shard calibrate first")
    assert call("inference", *flags, "--inference.shard", "calibrate").code == 0
    assert not (tmp_path / "phase4_inference").exists()
    assert call("inference", *flags, "--inference.shard", "1/2").code == 0
    other = call("inference", *flags, "--inference.shard", "1/2", "--inference.precision", "bf16")
    assert other.code == 2 and "was made in float32, and here phase 4 reads in bf16: add --inference.pre" in other.error


@pytest.mark.parametrize("part", ["0/8", "9/8", "1/0", "8", "1/2/3", "-1/8", "1 / 2", "all"])
def test_a_part_that_is_none_is_refused(part, call):
    result = call("inference", f"--inference.shard={part}")
    assert result.code == 2 and "inference.shard must be calibrate, merge, or a part such as 2/8" in result.error


# ---------------------------------------------------------------- Slurm

STAND_INS = {
    "srun": '#!/bin/bash\nshift 2\nexec "$@"\n',  # it has --cpus-per-task 1
    "scontrol": '#!/bin/bash\n[ "$1" = show ] && echo localhost || echo "$@" >> "$(dirname "$0")/asked"\n',
}


def submit(folder, words, **variables):
    """The script as Slurm runs it, with a srun and a scontrol that stand in for Slurm's."""
    folder.mkdir()
    for name, text in STAND_INS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1"}
    around = ENVIRONMENT | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": sys.executable} | job | variables
    return subprocess.Popen(["bash", "scripts/slurm.sbatch", *words], cwd=ROOT, env=around, stdout=-1, stderr=-1)


def test_a_job_of_slurm_that_is_preempted_is_written_and_goes_on_as_shards(call, made, tmp_path):
    """torchrun and jobs of their own leave the same shards: what one began the others can end."""
    slow = ["--inference.method", "plain", "--inference.solver", "euler", "--inference.steps", 16, *QUIET]
    slow += ["--inference.batch-size", 1, "--inference.calibration", tmp_path / "calibration"]
    assert call("inference", *slow, outputs=tmp_path / "whole").code == 0
    out, whole = tmp_path / "phase4_inference", tmp_path / "whole/phase4_inference"
    words = ["inference.py", *flags_of(tmp_path, made.phantoms, *sources("inference", made), *slow)]
    job = submit(tmp_path / "bin", words, SLURM_GPUS_ON_NODE="2")
    kept = [out / f"shard_{number}_of_2" / UNFINISHED / KEPT for number in (1, 2)]
    while job.poll() is None and not all(any(folder.glob("*.npz")) for folder in kept):
        time.sleep(0.005)
    job.send_signal(signal.SIGTERM)
    said = job.communicate(timeout=200)[1].decode()
    assert job.returncode not in (0, None) and "the same command goes on after" in said, said[-3000:]
    assert (tmp_path / "bin/asked").read_text() == f"requeue {os.getpid()}\n"
    shutil.copy(whole / LOOKUP, out)
    finished = [call("inference", *slow, "--inference.shard", part) for part in ("1/2", "2/2", "merge")]
    assert [each.code for each in finished] == [0, 0, 0] and "continuing after" in finished[0].out + finished[1].out
    assert not differing(out, whole)


def test_an_array_of_slurm_examines_a_shard_each(made, tmp_path):
    job = submit(tmp_path / "bin", ["-c", "import sys; print(*sys.argv[1:])", "inference.py"], SLURM_ARRAY_TASK_ID="2",
                 SLURM_ARRAY_TASK_COUNT="8")  # fmt: skip
    assert job.communicate(timeout=60)[0] == b"inference.py --inference.shard 2/8\n" and job.returncode == 0


def test_the_script_of_slurm_asks_for_what_it_handles():
    lines = (ROOT / "scripts/slurm.sbatch").read_text().splitlines()
    assert {"#SBATCH --requeue", "#SBATCH --signal=B:TERM@120", "#SBATCH --open-mode=append"} <= set(lines)
