"""The real templates on a real SLURM of two nodes: launched every way, warned, cancelled, requeued, refused."""

import json
import os
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from dist_lars import checkpoint, runlog
from tests.cluster.slurm import Job, until
from tests.conftest import ROOT, environment

pytestmark = pytest.mark.cluster
TEMPLATE = "resnet18_8k"
README = (ROOT / "README.md").read_text()
LONG = (
    "--epochs",
    "40",
    "--log.eval_epochs",
    "20",
    "--resume.save_epochs",
    "20",
    "--resume.save_steps",
    "10",
)  # 320 steps


def same_weights(a: Path, b: Path) -> None:
    """Both runs ended with the same model and optimizer, bit by bit."""
    one, other = checkpoint.load(a), checkpoint.load(b)
    assert one["step"] == other["step"]
    assert all(torch.equal(one["model"][k], other["model"][k]) for k in one["model"])
    for i, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other["optimizer"]["state"][i][name]))


def starts(run_dir: Path) -> list[int]:
    """The step at which each start of a run began."""
    return [line["step"] for line in runlog.read(run_dir, "start")]


@pytest.fixture(scope="module")
def runs(slurm):
    """Where the run directories lie."""
    return slurm.work / "runs"


@pytest.fixture(scope="module")
def reference(slurm, images):
    """A run that nothing disturbs, by srun and PMIx: (its directory, its log)."""
    from tests.cluster.conftest import SMALL_JOB, SMALL_RUN

    job = slurm.submit(TEMPLATE, *SMALL_JOB, run=SMALL_RUN, LAUNCHER="srun", DIST_LARS_DATA=str(images))
    log = job.completes()
    return slurm.work / "runs" / f"{TEMPLATE}-{job.number}", log


def test_a_job_of_two_nodes_trains_and_evaluates(reference):
    run_dir, log = reference
    (start,) = runlog.read(run_dir, "start")
    assert start["hosts"] == ["n1", "n2"]
    assert start["plan"]["world_size"] == 2
    assert [line["count"] for line in runlog.read(run_dir, "eval")] == 4 * [11]
    assert runlog.read_status(run_dir)["state"] == "finished"
    assert re.search(r"^0: finished: top-1", log, re.M)  # labelled by srun
    assert "restart" not in log


def test_the_preflight_shows_every_node(reference):
    run_dir, log = reference
    assert re.search(r"^0: n1 +0 +1 x cpu", log, re.M)
    assert re.search(r"^0: n2 +1 +1 x cpu", log, re.M)
    checks = {c["name"]: c for c in json.loads((run_dir / "preflight.json").read_text())}
    assert set(checks) == {
        "ranks", "devices", "horovod", "versions", "processors", "scratch", "data", "run directory", "clocks",
        "all-reduce", "links",
    }  # fmt: skip
    assert checks["ranks"]["value"] == "2 launched, 2 joined"
    assert re.search(r"bus bandwidth [\d.]+ GB/s", checks["all-reduce"]["value"])
    assert re.search(r"n1 to n2 [\d.]+ GB/s", checks["links"]["value"])
    assert not [c for c in checks.values() if c["status"] == "FAIL"]


def test_auto_falls_back_to_mpirun_where_srun_makes_separate_jobs(submit, runs, reference):
    job = submit(TEMPLATE, MPI_TYPE="pmi2")  # which Open MPI 5 does not speak
    log = job.completes()
    assert "Horovod sees 1 on n1: the tasks are separate jobs" in log
    assert "no job of 2 ranks by srun" in log
    assert "preflight by mpirun" in log
    run_dir = runs / f"{TEMPLATE}-{job.number}"
    assert runlog.read(run_dir, "start")[0]["hosts"] == ["n1", "n2"]
    same_weights(run_dir, reference[0])


def test_the_wrong_pmi_alone_is_refused(submit, runs):
    job = submit(TEMPLATE, LAUNCHER="srun", MPI_TYPE="pmi2")
    began = time.monotonic()
    assert job.end() == "FAILED"
    assert time.monotonic() - began < 90  # a minute, and SLURM's own seconds
    assert "under srun use --mpi=pmix" in job.log()
    assert "preflight failed: nothing was started" in job.log()
    assert not (runs / f"{TEMPLATE}-{job.number}" / "log.jsonl").exists()


def test_horovodrun_makes_the_same_run(submit, runs, reference):
    job = submit(TEMPLATE, LAUNCHER="horovodrun", LAUNCHER_ARGS="--disable-cache")
    job.completes()
    run_dir = runs / f"{TEMPLATE}-{job.number}"
    assert runlog.read(run_dir, "start")[0]["hosts"] == ["n1", "n2"]
    same_weights(run_dir, reference[0])


@pytest.fixture
def slow_network(slurm):
    """Half a second per step, and no work for the processor meanwhile: 160 s to do something to a running job."""
    slurm.net["n2"].limit("6mbit")
    yield lambda: slurm.net["n2"].limit(None)
    slurm.net["n2"].limit(None)


@pytest.fixture(scope="module")
def long_reference(slurm, images):
    """The long run, undisturbed: its directory."""
    from tests.cluster.conftest import SMALL_JOB, SMALL_RUN

    job = slurm.submit(
        TEMPLATE, *SMALL_JOB, run=(*SMALL_RUN, *LONG), LAUNCHER="srun", PREFLIGHT="no", DIST_LARS_DATA=str(images)
    )
    job.completes()
    return slurm.work / "runs" / f"{TEMPLATE}-{job.number}"


def test_slurms_warning_leads_to_a_requeue_and_to_the_same_end(submit, runs, long_reference, slow_network):
    # SLURM looks at its clock twice a minute, and ahead: the warning comes 45 to 75 s after the start
    job = submit(TEMPLATE, "--time=2", "--signal=B:USR2@45", run=LONG, LAUNCHER="srun", PREFLIGHT="no")
    job.restart()
    slow_network()
    run_dir = runs / f"{TEMPLATE}-{job.number}"
    log = job.completes()
    assert "asked to stop by SIGUSR2: the run saves at its next step" in log
    assert f"requeued as job {job.number}" in log
    steps = starts(run_dir)
    assert steps[0] == 0
    assert 0 < steps[1] < 320
    assert job.facts()["Restarts"] == str(len(steps) - 1)
    assert not (run_dir / "STOP").exists()
    same_weights(run_dir, long_reference)


def preempt(slurm):
    words = ("--partition=urgent", "--nodes=2", "--exclusive", "--time=1", "--wrap=true")
    Job(slurm, slurm.on("sbatch", "--parsable", *words).strip()).completes()


def lose_a_node(slurm):
    slurm.lose("n2")


@pytest.mark.parametrize("happens", [preempt, lose_a_node])
def test_what_slurm_takes_away_it_starts_again(submit, slurm, runs, long_reference, slow_network, happens):
    job = submit(TEMPLATE, run=LONG, LAUNCHER="srun", PREFLIGHT="no")
    run_dir = runs / f"{TEMPLATE}-{job.number}"
    job.until(lambda: checkpoint.newest_good(run_dir)[0], "a checkpoint")
    happens(slurm)
    job.restart()
    slow_network()
    log = job.completes()
    assert "ended by SIGTERM" in log
    assert "not requeued" not in log
    steps = starts(run_dir)
    assert steps[0] == 0
    assert 10 <= steps[1] < 320
    assert job.facts()["Restarts"] == "1"
    same_weights(run_dir, long_reference)


def test_scancel_leaves_a_good_checkpoint_and_no_requeue(submit, slurm, runs, slow_network):
    job = submit(TEMPLATE, run=LONG, LAUNCHER="srun", PREFLIGHT="no")
    run_dir = runs / f"{TEMPLATE}-{job.number}"
    job.until(lambda: checkpoint.newest_good(run_dir)[0], "a checkpoint")
    slurm.on("scancel", job.number)
    assert job.end() == "CANCELLED"
    until(lambda: not slurm.leftovers(), "the end of all processes")
    assert job.facts()["Restarts"] == "0"
    path, damaged = checkpoint.newest_good(run_dir)
    assert path
    assert not damaged
    assert checkpoint.load(path)["step"] >= 10
    assert runlog.read_status(run_dir)["state"] == "stopped"


def test_requeues_end_at_their_limit(submit, runs):
    # the run's own clock stops it 10 s before --max_time, and so in its first steps
    job = submit(
        TEMPLATE, run=(*LONG, "--max_time", "00:00:12"), LAUNCHER="srun", PREFLIGHT="no", MAX_REQUEUES="1"
    )  # fmt: skip
    job.restart()
    assert job.end() == "FAILED"
    assert job.facts()["ExitCode"] == "75:0"
    assert job.facts()["Restarts"] == "1"
    assert "not requeued: stopped at step" in job.log()
    assert "this was start 2 with MAX_REQUEUES=1" in job.log()
    assert len(starts(runs / f"{TEMPLATE}-{job.number}")) == 2


def test_a_run_that_fails_is_not_requeued(submit, images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    broken = tmp_path / "images/train/class1/004.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    job = submit(TEMPLATE, LAUNCHER="srun", PREFLIGHT="no", DIST_LARS_DATA=str(tmp_path / "images"))
    assert job.end() == "FAILED"
    assert job.facts()["Restarts"] == "0"
    assert re.search(r"not requeued: failed .* cannot read image", job.log())


def test_a_rank_that_is_killed_ends_the_job(submit, slurm, runs, slow_network):
    job = submit(TEMPLATE, run=LONG, LAUNCHER="srun", PREFLIGHT="no")
    run_dir = runs / f"{TEMPLATE}-{job.number}"
    job.until(lambda: checkpoint.newest_good(run_dir)[0], "a checkpoint")
    (rank, *_) = [
        pid for pid, line in slurm.net["n2"].processes().items() if re.match(r"\S*python\S* -m dist_lars", line)
    ]
    os.kill(rank, signal.SIGKILL)
    began = time.monotonic()
    assert job.end() == "FAILED"
    assert time.monotonic() - began < 60
    assert "the ranks ended without a word" in job.log()
    assert job.facts()["Restarts"] == "0"


def test_fewer_ranks_continue_what_more_began(submit, runs):
    run_dir = runs / "moved"
    wide = submit(
        TEMPLATE, "--ntasks-per-node=2", run=(*LONG, "--micro_batch", "2"), LAUNCHER="srun", PREFLIGHT="no",
        RUN_DIR=str(run_dir),
    )  # fmt: skip
    wide.until(lambda: checkpoint.newest_good(run_dir)[0], "a checkpoint")
    (run_dir / "STOP").touch()
    assert wide.end() == "FAILED"
    assert wide.facts()["ExitCode"] == "75:0"
    assert "not requeued: stopped at step" in wide.log()  # by hand
    narrow = submit(TEMPLATE, run=(*LONG, "--micro_batch", "2"), LAUNCHER="srun", PREFLIGHT="no", RUN_DIR=str(run_dir))
    narrow.completes()
    wide_start, narrow_start = runlog.read(run_dir, "start")
    assert wide_start["hosts"] == ["n1", "n1", "n2", "n2"]
    assert narrow_start["hosts"] == ["n1", "n2"]
    assert 10 <= narrow_start["step"] < 320
    assert runlog.read_status(run_dir)["state"] == "finished"


def test_an_array_job_trains_one_seed_per_task(submit, slurm, runs):
    array = submit(TEMPLATE, "--nodes=1", "--array=0-1", PREFLIGHT="no", LAUNCHER="srun")
    for task in (0, 1):
        array.number = f"{array.number.split('_')[0]}_{task}"
        array.completes()
        (start,) = runlog.read(runs / f"{TEMPLATE}-{array.number}", "start")
        assert start["config"]["seed"] == task
        assert start["plan"]["world_size"] == 1


def test_an_array_task_under_mpirun_is_warned_and_goes_on(submit, slurm, runs, long_reference):
    """As under srun, with the preflight before each start; the task's seed is that of the reference."""
    job = submit(TEMPLATE, "--array=0", run=LONG, LAUNCHER="mpirun")
    job.number += "_0"
    run_dir = runs / f"{TEMPLATE}-{job.number}"
    job.until((run_dir / "preflight.json").exists, "the preflight, on a network as it should be")
    slurm.net["n2"].limit("6mbit")  # and then time to do something to the run
    try:
        job.until(lambda: checkpoint.newest_good(run_dir)[0], "a checkpoint")
        slurm.on("scancel", "--batch", "--signal=USR2", job.number)
        job.until(lambda: "asked to stop" in job.log(), "the warning")
    finally:
        slurm.net["n2"].limit(None)
    job.restart()
    log = job.completes()
    assert log.count("preflight by mpirun") == 2
    assert f"requeued as job {job.number}" in log
    steps = starts(run_dir)
    assert steps[0] == 0
    assert 10 <= steps[1] < 320
    same_weights(run_dir, long_reference)


def test_a_centre_that_hands_on_no_environment(slurm, images, runs):
    """sbatch --export=NONE, as some make it the default: what the job needs stands in the site file."""
    from tests.cluster.conftest import SMALL_JOB, SMALL_RUN

    told = environment(DIST_LARS_DATA=str(images), LAUNCHER="srun", PREFLIGHT="no")
    names = ("PATH", "PYTHONPATH", "DIST_LARS_DATA", "LAUNCHER", "PREFLIGHT")
    site = slurm.work / "slurm/site.sh"
    site.write_text("".join(f"export {name}={shlex.quote(told[name])}\n" for name in names))
    try:
        job = slurm.submit(TEMPLATE, "--export=NONE", *SMALL_JOB, run=SMALL_RUN)
        job.completes()
    finally:
        site.unlink()
    assert runlog.read(runs / f"{TEMPLATE}-{job.number}", "start")[0]["hosts"] == ["n1", "n2"]


def test_missing_data_are_refused_in_seconds(submit, runs, tmp_path):
    for path, words in (("", "no data: name an image folder"), (str(tmp_path / "no"), "not visible on any node")):
        job = submit(TEMPLATE, LAUNCHER="srun", DIST_LARS_DATA=path)
        assert job.end(120) == "FAILED"
        assert words in job.log()
        assert "preflight failed: nothing was started" in job.log()
        assert not (runs / f"{TEMPLATE}-{job.number}" / "log.jsonl").exists()


def test_the_first_job_of_the_readme_needs_no_data(slurm, runs, tmp_path):
    (line,) = re.findall(r"^sbatch (.*) slurm/resnet18_8k.sbatch (--preset quickstart)$", README, re.M)
    job = slurm.submit(
        TEMPLATE, *line[0].split(), "--gpus-per-node=0", "--cpus-per-task=1",
        run=(*line[1].split(), "--device", "cpu", "--epochs", "1"),
        LAUNCHER="srun", PREFLIGHT="no", DIST_LARS_CACHE=str(tmp_path),
    )  # fmt: skip
    job.completes()
    run_dir = runs / f"{TEMPLATE}-{job.number}"
    assert runlog.read(run_dir, "start")[0]["hosts"] == ["n1", "n2"]
    assert runlog.read(run_dir, "eval")[-1]["count"] == 297


def test_data_that_one_node_lacks(submit, slurm, images):
    local = slurm.folder / "local" / "images"
    slurm.net["n1"].run("cp", "-r", str(images), str(local))
    job = submit(TEMPLATE, LAUNCHER="srun", DIST_LARS_DATA=str(local))
    assert job.end() == "FAILED"
    assert re.search(r"FAIL +data +not visible on n2: .*/train: No such file", job.log())
    assert "sbatch --exclude=n2" in job.log()


def test_a_node_with_an_older_processor_is_named(submit, slurm):
    flags = slurm.folder / "cpuinfo"
    flags.write_text("model name\t: Old CPU\nflags\t\t: fpu sse2\n")
    slurm.net["n2"].run("mount", "--bind", str(flags), "/proc/cpuinfo")
    try:
        job = submit(TEMPLATE, LAUNCHER="srun")
        assert job.end() == "FAILED"
    finally:
        slurm.net["n2"].run("umount", "/proc/cpuinfo")
    assert re.search(r"n2 cannot train: horovod: .* CPUs with -m\w+, which this one lacks", job.log())
    assert "--exclude=n2" in job.log()


def test_a_full_inode_quota_is_told_from_a_full_disk(submit, slurm):
    scratch = slurm.folder / "local" / "scratch"
    for name, files in (("n1", 1000), ("n2", 1)):
        slurm.net[name].run("mkdir", str(scratch))
        slurm.net[name].run("mount", "-t", "tmpfs", "-o", f"nr_inodes={files},size=20m", "few", str(scratch))
    job = submit(TEMPLATE, run=("--data.stage", str(scratch)), LAUNCHER="srun")
    assert job.end() == "FAILED"
    assert re.search(
        r"FAIL +scratch +staging \S+: No space left on device, though .* no more files \(inodes\), on n2", job.log()
    )


def test_a_plan_that_does_not_come_out_even_is_refused_before_anything_starts(submit):
    job = submit(TEMPLATE, "--ntasks-per-node=3")
    assert job.end(120) == "FAILED"
    assert "batch_size 8" in job.log()
    assert "preflight" not in job.log()
    job = submit(TEMPLATE, "--gpus-per-node=4", "--ntasks-per-node=2")
    assert job.end(120) == "FAILED"
    assert "4 GPUs on each node, but 2 tasks: add --ntasks-per-node=4" in job.log()


@pytest.mark.parametrize("template", sorted(p.stem for p in (ROOT / "slurm").glob("*.sbatch")))
def test_slurm_accepts_the_template(slurm, template):
    said = slurm.on("sbatch", "--test-only", "--partition=paper", f"slurm/{template}.sbatch")
    text = (ROOT / f"slurm/{template}.sbatch").read_text()
    nodes = int(re.search(r"^#SBATCH --nodes=(\d+)", text, re.M)[1])
    cores = 32 if "--exclusive" in text else 1  # of a node
    assert re.search(rf"to start at .* using {cores * nodes} processors", said)


def test_slurm_refuses_what_it_does_not_have(slurm):
    said = slurm.on(
        "sbatch", "--test-only", "--partition=paper", "--gpus-per-node=8", "slurm/resnet18_8k.sbatch", check=False
    )
    assert "Requested node configuration is not available" in said


def test_nothing_is_left_running(slurm):
    until(lambda: not slurm.on("squeue", "-h"), "an empty queue")
    until(lambda: not slurm.leftovers(), "the end of all processes")
    assert slurm.leftovers() == {}
