"""The templates: resources, one launch line, and a global batch that is exactly the recipe's."""

import re
import subprocess
from pathlib import Path

import pytest

from dist_lars.cli import load_config
from dist_lars.plan import make_plan

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = sorted((ROOT / "slurm").glob("*.sbatch"))
WANTED = {"resnet18_8k", "resnet18_16k", "resnet18_32k", "alexnet_bn_8k", "alexnet_bn_16k", "alexnet_bn_32k",
          "resnet50_8k", "resnet50_32k"}  # fmt: skip
SAME = {
    "cpus-per-task": "8", "mem": "0", "exclusive": "", "time": "24:00:00", "signal": "B:USR2@300", "requeue": "",
    "open-mode": "append", "output": "%x-%j.log", "gpus-per-node": "4", "ntasks-per-node": "4",
}  # fmt: skip


def options(template: Path) -> dict[str, str]:
    """{option: value} of the #SBATCH lines."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", template.read_text(), re.M))


def test_every_recipe_of_8k_and_more_has_one():
    assert {t.stem for t in TEMPLATES} >= WANTED


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.stem)
def test_the_batch_is_exactly_that_of_the_preset(template):
    told, config = options(template), load_config(template.stem)
    ranks = int(told["nodes"]) * int(told["ntasks-per-node"])
    plan = make_plan(config, ranks, config.data.train_images, config.data.val_images)
    assert plan.batch_size == {"8k": 8192, "16k": 16384, "32k": 32768}[template.stem.split("_")[-1]]
    assert ranks * plan.micro_batch * plan.accumulation == plan.batch_size
    said = re.search(
        r"global batch ([\d,]+): (\d+) nodes x (\d+) GPUs x (\d+) images x (\d+) passes", template.read_text()
    )
    assert [int(n.replace(",", "")) for n in said.groups()] == [
        plan.batch_size, int(told["nodes"]), 4, plan.micro_batch, plan.accumulation,
    ]  # fmt: skip
    full = int(re.search(r"--nodes=(\d+) slurm/", template.read_text())[1])
    assert make_plan(config, 4 * full, config.data.train_images, config.data.val_images).accumulation == 1


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.stem)
def test_a_template_is_resources_and_one_launch_line(template):
    text = template.read_text()
    told = options(template)
    assert told.pop("job-name") == template.stem
    told.pop("nodes")
    assert told == SAME
    code = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert code == [
        'source "${SLURM_SUBMIT_DIR:?submit it by sbatch, from the folder that holds slurm/}/slurm/common.sh"',
        f'train --preset {template.stem} "$@"',
    ]


def test_outside_of_slurm_a_template_says_how_to_use_it():
    done = subprocess.run(["bash", str(TEMPLATES[0])], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "submit it by sbatch, from the folder that holds slurm/" in done.stderr


def test_every_variable_of_the_shared_file_is_documented():
    """Whatever a user may set is listed at its top, with the default that it really has."""
    text = (ROOT / "slurm/common.sh").read_text()
    head, body = text.split("set -euo pipefail", 1)
    told = dict(re.findall(r"^#   ([A-Z_]+)=(\S+)", head, re.M))
    read = dict(re.findall(r"\$\{([A-Z][A-Z_]+):-([^}]*)\}", body))
    ours = {name for name in read if not name.startswith(("SLURM_", "NCCL_"))} - {"JOB", "PATIENCE"}
    assert set(told) == ours | {"DIST_LARS_DATA", "INTERFACE"}
    for name in ("LAUNCHER", "MPI_TYPE", "MAX_REQUEUES", "PREFLIGHT"):
        assert told[name] == read[name]
