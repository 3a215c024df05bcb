"""The templates: resources, one launch line, and a global batch that is exactly the recipe's."""

import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from dist_lars.cli import load_config
from dist_lars.plan import make_plan
from tests.conftest import environment

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = sorted(p for p in (ROOT / "slurm").glob("*.sbatch") if p.stem not in ("scaling", "study"))
WANTED = {"resnet18_8k", "resnet18_16k", "resnet18_32k", "alexnet_bn_8k", "alexnet_bn_16k", "alexnet_bn_32k",
          "resnet50_8k", "resnet50_32k"}  # fmt: skip
SAME = {
    "cpus-per-task": "8", "mem": "0", "exclusive": "", "time": "24:00:00", "signal": "B:USR2@300", "requeue": "",
    "open-mode": "append", "output": "%x-%j.log", "gpus-per-node": "4", "ntasks-per-node": "4",
}  # fmt: skip

BEGINNING = """\
cd "${SLURM_SUBMIT_DIR:?submit it by sbatch, from the folder that holds slurm/}"
[ -e slurm/common.sh ] || { echo "refused: submit from the folder that holds slurm/, not from $PWD" >&2; exit 2; }
source slurm/common.sh
""".splitlines()


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
        *BEGINNING,
        f'train --preset {template.stem} "$@"',
    ]


@pytest.mark.parametrize(
    ("nodes", "per_node", "sizes"),
    [(1, 1, "1"), (1, 4, "1,4"), (3, 4, "1,4,8,12"), (4, 4, "1,4,8,16"), (6, 1, "1,2,4,6")],
)
def test_the_sweep_ends_with_all_of_the_allocation(nodes, per_node, sizes):
    code = re.search(r"^sizes=1\n.*?^case [^\n]*$", (ROOT / "slurm/scaling.sbatch").read_text(), re.M | re.S)[0]
    words = ["bash", "-euc", f'NODES={nodes} PER_NODE={per_node}\n{code}\necho "$sizes"']
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip() == sizes


def test_outside_of_slurm_a_template_says_how_to_use_it():
    done = subprocess.run(["bash", str(TEMPLATES[0])], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "submit it by sbatch, from the folder that holds slurm/" in done.stderr


def test_submitted_from_elsewhere_it_says_from_where(tmp_path):
    env = {"PATH": "/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(["bash", str(TEMPLATES[0])], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"submit from the folder that holds slurm/, not from {tmp_path}" in done.stderr


def test_every_variable_of_the_shared_file_is_documented():
    """Whatever a user may set is listed at its top, with the default that it really has."""
    text = (ROOT / "slurm/common.sh").read_text()
    head, body = text.split("set -euo pipefail", 1)
    told = dict(re.findall(r"^#   ([A-Z_]+)=(\S+)", head, re.M))
    read = dict(re.findall(r"\$\{([A-Z][A-Z_]+):-([^}]*)\}", body))
    ours = {name for name in read if not name.startswith(("SLURM_", "NCCL_"))} - {"JOB", "PATIENCE", "TMPDIR"}
    assert set(told) == ours | {"DIST_LARS_DATA", "INTERFACE"}
    for name in ("LAUNCHER", "MPI_TYPE", "MAX_REQUEUES", "PREFLIGHT"):
        assert told[name] == read[name]


# --- what is launched: srun and apptainer are stand-ins that write down how they are called, for neither Pyxis nor
# --- Apptainer can be installed from Debian. tests/cluster runs the same file on a real SLURM.

STAND_IN = """#!/bin/bash
told="ranks=${DIST_LARS_RANKS:-} cpus=${SRUN_CPUS_PER_TASK:-} nccl=${NCCL_SOCKET_IFNAME:-}"
echo "$(basename "$0") $* | $told" >> "$CALLS"
"""
NO_PYTHON = "#!/bin/sh\necho Traceback\necho No module named jsonargparse\nexit 1\n"
ALLOCATION = {
    "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "job", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_GPUS_PER_NODE": "a100:4", "SLURM_CPUS_PER_TASK": "8", "SLURM_JOB_NODELIST": "n[1-2]",
}  # fmt: skip


@pytest.fixture
def calls(tmp_path):
    """`calls(NAME=value...)` runs a template with stand-ins -> (its output, one line per call)."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm", ignore=shutil.ignore_patterns("site.sh"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "empty/bin").mkdir(parents=True)
    for name in ("images", "elsewhere"):
        (tmp_path / name).mkdir()
    for name in ("bin/srun", "bin/mpirun", "bin/apptainer", "bin/scontrol", "empty/bin/python"):
        (tmp_path / name).write_text(NO_PYTHON if "python" in name else STAND_IN)
        (tmp_path / name).chmod(0o755)

    def run(*options, **extra):
        env = {
            **environment(), **ALLOCATION, "SLURM_SUBMIT_DIR": str(tmp_path), "CALLS": str(tmp_path / "calls"),
            "PREFLIGHT": "no", "DIST_LARS_DATA": f"{tmp_path}/images", "TMPDIR": "", **extra,
        }  # fmt: skip
        env["PATH"] = f"{tmp_path}/bin:{env['PATH']}"
        words = ["bash", str(tmp_path / "slurm/resnet18_8k.sbatch"), "--epochs", "3", *options]
        done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        log = tmp_path / "calls"
        return done.stdout + done.stderr, log.read_text().splitlines() if log.exists() else []

    return run


TRAIN = "python -m dist_lars.train --preset resnet18_8k --epochs 3 --run_dir runs/job-7"


def test_srun_gets_the_cores_the_ranks_and_the_network(calls):
    _, (line,) = calls(LAUNCHER="srun", INTERFACE="ib0", MPI_TYPE="cray_shasta", LAUNCHER_ARGS="--nice=5 --quiet")
    words, _, told = line.partition(" | ")
    assert words == (
        "srun --nodes=2 --ntasks=8 --ntasks-per-node=4 --mpi=cray_shasta --gpu-bind=none --kill-on-bad-exit=1 "
        f"--wait=60 --label --nice=5 --quiet {TRAIN}"
    )
    assert told == "ranks=8 cpus=8 nccl=ib0"


def test_mpirun_gives_its_daemons_all_cores(calls):
    """An srun of its own starts them, and would give the one that forks all ranks of a node SRUN_CPUS_PER_TASK."""
    _, (line,) = calls(LAUNCHER="mpirun")
    assert line.startswith("mpirun -np 8")
    assert " cpus= " in line


def test_slow_imports_get_more_time_and_the_same_launcher(calls, tmp_path):
    """srun stands in for ranks that still import torch at the first trial and are well at the second."""
    run_dir = tmp_path / "runs/job-7"
    slow = f"mkdir -p {run_dir}/preflight; touch {run_dir}/preflight/importing; exit 5"
    (tmp_path / "bin/srun").write_text(STAND_IN + f'[[ "$*" != *"--limit 22"* ]] || {{ {slow}; }}\n')
    output, lines = calls(LAUNCHER="auto", PREFLIGHT="yes")
    told = [re.search(r"doctor --cluster --limit (\d+)|dist_lars.(train)", line).group(1, 2) for line in lines]
    assert told == [("22", None), ("300", None), (None, "train")]
    assert all(line.startswith("srun") for line in lines), output


def test_a_run_directory_is_of_one_job(calls, tmp_path):
    """squeue stands in for a job 8 that runs, then for one that has ended."""
    squeue, run_dir = tmp_path / "bin/squeue", tmp_path / "runs/job-7"
    squeue.write_text("#!/bin/bash\n[[ $* != *' 8 '* ]] || echo 8\n")
    squeue.chmod(0o755)
    run_dir.mkdir(parents=True)
    (run_dir / "STOP").touch()
    (run_dir / ".job").write_text("8\n")
    output, lines = calls(LAUNCHER="srun")
    assert "refused: job 8 trains in runs/job-7: wait for it, stop it (touch runs/job-7/STOP)" in output
    assert not lines
    assert (run_dir / "STOP").exists(), "it is the other job's"
    squeue.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1\n")
    assert calls(LAUNCHER="srun")[1]
    assert (run_dir / ".job").read_text() == "7\n"
    assert calls(LAUNCHER="srun")[1], "its own next start"


def test_a_short_time_limit_is_told(calls):
    soon = calls(LAUNCHER="srun", SLURM_JOB_END_TIME=str(int(time.time()) + 290))[0]
    assert "4 minutes until the time limit, and the warning to save comes 5 minutes before it: a longer --time" in soon
    assert "time limit" not in calls(LAUNCHER="srun", SLURM_JOB_END_TIME=str(int(time.time()) + 3600))[0]


def test_a_site_file_that_fails_is_named(calls, tmp_path):
    (tmp_path / "slurm/site.sh").write_text("module load gcc\n")
    output, lines = calls(LAUNCHER="srun")
    assert "refused: slurm/site.sh failed, see above" in output
    assert not lines


def test_apptainer_stands_between_launcher_and_python(calls, tmp_path):
    output, lines = calls(LAUNCHER="mpirun", CONTAINER="dist_lars.sif", CONTAINER_ARGS="--bind /scratch")
    inside = f"exec --bind {tmp_path},{tmp_path}/images --pwd {tmp_path} --nv --bind /scratch dist_lars.sif"
    assert lines[0].startswith(
        f"apptainer {inside} python -m dist_lars.train --preset resnet18_8k --epochs 3 --dry_run"
    )
    assert f"{tmp_path}/bin/apptainer {inside} {TRAIN}" in lines[1]
    assert lines[1].startswith("mpirun -np 8 --map-by ppr:4:node --bind-to none")
    assert "-x DIST_LARS_DATA" in lines[1]


def test_pyxis_is_an_option_of_srun(calls, tmp_path):
    lines = [line for line in calls(CONTAINER="centre#dist_lars:1")[1] if line.startswith("srun")]
    image = (
        f"--container-image=centre#dist_lars:1 --container-mounts={tmp_path}:{tmp_path},{tmp_path}/images:{tmp_path}"
    )
    assert all(image in line for line in lines)
    assert "--overlap" in lines[0]
    assert "--dry_run --world_size 8" in lines[0]
    assert TRAIN in lines[1]
    # Pyxis would look for a word without / on Docker Hub, and of two lists of mounts it reads the last.
    line = calls(CONTAINER="x.sqsh", CONTAINER_ARGS="--container-mounts=/scratch:/scratch --no-container-entrypoint")[
        1
    ][-1]
    assert "--container-image=./x.sqsh" in line
    assert re.findall(r"--container-mounts=\S+images,/scratch:/scratch ", line)
    assert line.count("--container-mounts") == 1
    assert "--no-container-entrypoint" in line
    output, lines = calls(CONTAINER="x.sqsh", LAUNCHER="mpirun")
    assert "works with LAUNCHER=srun, not mpirun" in output


def test_a_container_sees_every_folder_of_the_run(calls, tmp_path):
    """Those that exist: of another the checks tell more than Apptainer would."""
    place = str(tmp_path / "elsewhere")
    bound = lambda *options, **extra: re.search(  # noqa: E731
        r"--bind (\S+)", calls(*options, CONTAINER="x.sif", LAUNCHER="srun", **extra)[1][-1]
    )[1].split(",")
    assert bound("--data.path", place, DIST_LARS_DATA="/nowhere") == [str(tmp_path), place]
    assert bound(f"--data.path={place}", DIST_LARS_DATA="") == [str(tmp_path), place]
    assert bound(RUN_DIR=f"{place}/run", DIST_LARS_DATA="") == [str(tmp_path), place]
    (tmp_path / "elsewhere/mine.yaml").touch()
    assert bound("--data.stage", place, DIST_LARS_DATA="") == [str(tmp_path), place]
    assert bound("--config", f"{place}/mine.yaml", DIST_LARS_DATA="") == [str(tmp_path), place]
    assert bound(STAGE=place, DIST_LARS_DATA="") == [str(tmp_path), place]
    assert bound(TMPDIR=place, DIST_LARS_DATA="") == [str(tmp_path), place]
    assert bound(RUN_DIR=f"{place}/new/run", DIST_LARS_DATA="") == [str(tmp_path), f"{place}/new"]
    assert bound(STAGE="$SLURM_TMPDIR", DIST_LARS_DATA=place) == [str(tmp_path), place]


def test_staging_is_left_to_the_nodes(calls):
    """`$SLURM_TMPDIR` is another folder on each node, so it must reach the ranks as it is."""
    _, (line,) = calls(LAUNCHER="srun", STAGE="$SLURM_TMPDIR")
    assert "--epochs 3 --data.stage $SLURM_TMPDIR --run_dir" in line


# Of each block of site.example.sh, by its number: variables of a site that it needs, and what it must lead to.
SITES = {
    "1": ({}, "module load gcc/12 cuda/13.0 python/3.11", "srun --nodes=2", "nccl=ib0"),
    "2": ({}, "module load apptainer", "--nv --bind /scratch /project/images/dist_lars.sif python -m dist_lars.train",
          "ranks=8"),
    "3": ({"CRAY_LD_LIBRARY_PATH": "/opt/cray"}, "module load PrgEnv-gnu", "--mpi=cray_shasta", "nccl=hsn0"),
}  # fmt: skip


@pytest.mark.parametrize("number", SITES)
def test_a_block_of_the_site_file_does_what_it_says(calls, tmp_path, number):
    """Uncommented as its reader would, except for the second container of block 2."""
    head, *blocks = re.split(r"^# --- (?=\d)", (ROOT / "slurm/site.example.sh").read_text(), flags=re.M)
    assert [block[0] for block in blocks] == list(SITES)
    lines = blocks[int(number) - 1].split("# Pyxis instead")[0].splitlines()[1:]
    module = 'module() { echo "module $*" >>"$CALLS"; }'
    site = "\n".join([module, head, *(line.removeprefix("#") for line in lines if not line.startswith("# "))])
    (tmp_path / "slurm/site.sh").write_text(site)
    extra, *wanted = SITES[number]
    output, told = calls(**extra)
    for words in wanted:
        assert any(words in line for line in told), (output, told)
    assert "--data.stage $SLURM_TMPDIR" in told[-1] or number != "1"


def test_the_environment_of_sbatch_comes_before_the_site_file(calls, tmp_path):
    shutil.copy(ROOT / "slurm/site.example.sh", tmp_path / "slurm/site.sh")
    with (tmp_path / "slurm/site.sh").open("a") as site:
        site.write("LAUNCHER=${LAUNCHER:-srun}\nINTERFACE=ib7\n")
    _, (line,) = calls(LAUNCHER="mpirun")
    assert line.startswith("mpirun -np 8")
    assert line.endswith("nccl=ib7")


def test_the_functions_of_a_site_may_read_what_nobody_has_set(calls, tmp_path):
    (tmp_path / "slurm/site.sh").write_text('module() { echo "$LMOD_NEVER_SET"; }\nmodule load gcc\n')
    assert calls(LAUNCHER="srun")[1][-1].startswith("srun")
    (tmp_path / "slurm/site.sh").write_text("false\n")  # a module that is not there
    before = len(calls()[1])
    assert len(calls()[1]) == before


def test_an_array_task_is_told_how_to_go_on(calls):
    output, _ = calls(LAUNCHER="srun", SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="2")
    assert "RUN_DIR=runs/job-5_2 sbatch ... with the same template and options, --seed 2 in place of --array" in output


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"LAUNCHER": "pmi"}, "LAUNCHER=pmi, but it must be srun, mpirun, horovodrun or auto"),
        ({"SLURM_GPUS_PER_NODE": "8"}, "8 GPUs on each node, but 4 tasks: add --ntasks-per-node=8"),
        ({"SLURM_RESTART_COUNT": "21"}, "was restarted 21 times, by SLURM itself, and MAX_REQUEUES is 20"),
        ({"SLURM_JOB_NUM_NODES": "3", "SLURM_GPUS_PER_NODE": ""}, "batch_size 8192"),
        ({"CONTAINER": "x.sif", "LAUNCHER": "horovodrun"}, "use srun or mpirun"),
        ({"VENV": "nowhere"}, "VENV=nowhere, but there is no environment"),
        ({"VENV": "empty"}, "cannot run dist_lars (No module named jsonargparse): run `make install` on the"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(calls, extra, words):
    output, lines = calls(**extra)
    assert words in output
    assert not lines


def test_what_an_earlier_start_left_is_not_taken_for_the_outcome(calls, tmp_path):
    (tmp_path / "runs/job-7").mkdir(parents=True)
    (tmp_path / "runs/job-7/status.json").write_text('{"state": "stopped", "reason": "time limit"}')
    output, lines = calls(LAUNCHER="srun")  # the stand-in ends well, and trains nothing
    assert "not requeued: the run did not begin" in output
    assert not [line for line in lines if "requeue" in line]
