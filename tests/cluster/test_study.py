"""A study as an array job on a real SLURM: two tasks share its runs, each on two ranks; one is warned and goes on."""

import json

import pytest
import yaml

from tests.cluster.slurm import Job
from tests.conftest import TINY_STUDY

pytestmark = pytest.mark.cluster
STUDY = {
    "name": "tiny",
    "data": "the handwritten digits of scikit-learn",
    "base": {
        **TINY_STUDY, "batch_size": 256, "epochs": 12, "schedule": {"warmup_epochs": 0}, "resume": {"save_steps": 5},
    },
    "axes": {
        "arm": {"SGD": {"optim.name": "sgd_momentum", "optim.lr": 0.2}, "LARS": {"optim.name": "lars", "optim.lr": 8}},
    },
    "final": {"seeds": [1, 2]},
    "report": {"series": "arm"},
}  # fmt: skip


def test_an_array_shares_a_study_and_goes_on_after_a_warning(slurm, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(STUDY))
    folders = ("--records", str(tmp_path / "records"), "--work", str(tmp_path / "work"))
    array = slurm.submit(
        "study", "--array=3-4", "--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1",
        "--time=10", run=(str(tmp_path / "tiny.yaml"), *folders), DIST_LARS_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    warned, other = (Job(slurm, f"{array.number}_{task}") for task in (3, 4))
    logs = tmp_path / "work/study-tiny"
    warned.until(lambda: len([p for p in logs.glob("*/checkpoints/latest")]) == 2, "two runs with checkpoints")
    slurm.on("scancel", "--batch", "--signal=USR2", warned.number)
    warned.restart()
    log = warned.completes()
    other.completes()
    assert "task 0 of 2, 1 x 2 ranks (n1) by srun" in log
    assert "stopped (SIGTERM); the same command goes on from here" in log
    assert f"requeued as job {warned.number}, which SLURM starts in about two minutes: asked to stop by SIGUSR2" in log
    lines = [json.loads(line) for line in (tmp_path / "records/study-tiny.jsonl").read_text().splitlines()]
    runs = [line for line in lines if line["kind"] == "run"]
    names = sorted(f"{run['cell']['arm']} {run['seed']}" for run in runs)
    assert names == ["LARS 1", "LARS 2", "SGD 1", "SGD 2"]
    assert {(run["state"], run["ranks"]) for run in runs} == {("finished", 2)}
    assert all(len(run["train_loss"]) == 12 for run in runs)  # an epoch each, none lost and none twice
    assert ": starts" in other.log()
    assert (tmp_path / "records/study-tiny.md").exists()
