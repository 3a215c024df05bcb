"""The house rules: imports go downward, three libraries live in one room, files stay readable."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "dist_lars"
FILES = sorted(PACKAGE.rglob("*.py"))
LEVELS = [
    ["errors", "locks"],
    ["config", "rules", "schedule", "plan", "cli", "recipes", "launchers", "continuation"],
    ["optim", "models", "data", "metrics", "checkpoint", "runlog", "reducer", "ema", "guards", "stopping", "watchdog"],
    ["comm"],
    ["engine", "resources"],
    ["rundir", "state", "supervisor", "inputs", "run"],
    ["api", "launch"],
    [
        "train",
        "evaluate",
        "pack",
        "doctor",
        "build_horovod",
        "build_facts",
        "build_log",
        "pillow_simd",
        "doctor_host",
        "doctor_cluster",
        "doctor_node",
        "doctor_reach",
        "doctor_roll",
        "doctor_verdict",
    ],
]
LEVEL = {room: n for n, rooms in enumerate(LEVELS) for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; `from dist_lars import x` counts as dist_lars.x."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = node.module in ("dist_lars", "torch")
            found |= {f"{node.module}.{a.name}" for a in node.names} if inside else {node.module}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downward(path):
    room = room_of(path)
    if room == "__init__":
        assert not {m for m in imports_of(path) if m.split(".")[0] in ("torch", "horovod", "dist_lars")}
        return
    assert room in LEVEL, f"{room} has no place in the house: add it to LEVELS"
    for module in imports_of(path):
        parts = module.split(".")
        if parts[0] == "dist_lars" and len(parts) > 1 and parts[1] in LEVEL and parts[1] != room:
            # plan needs config and schedule, launch stands beside api: one level may lean on itself, never upward
            assert LEVEL[parts[1]] <= LEVEL[room], f"{room} imports {module}, which lives above it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_carries_gradients_lives_in_comm(path):
    """Each library in one file, so that another can take its place."""
    homes = {"horovod": ("comm/horovod_comm.py", "doctor.py"), "mpi4py": ("comm/mpi.py",),
             "torch.distributed": ("comm/torch_comm.py",)}  # fmt: skip
    here = str(path.relative_to(PACKAGE))
    for module in imports_of(path):
        for library, files in homes.items():
            if module == library or module.startswith(f"{library}."):
                assert here in files, f"{here} imports {module}"


@pytest.mark.parametrize("room", [*LEVELS[0], *LEVELS[1]])
def test_planning_needs_no_torch(room):
    assert not {m for m in imports_of(PACKAGE / f"{room}.py") if m.split(".")[0] in ("torch", "torchvision", "numpy")}


@pytest.mark.parametrize("room", LEVELS[2])
def test_tools_take_plain_values(room):
    files = [p for p in FILES if room_of(p) == room]
    assert not {m for p in files for m in imports_of(p)} & {"dist_lars.config", "dist_lars.comm"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_readable(path):
    assert len(path.read_text().splitlines()) <= 320
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno <= 50, f"{node.name} is too long"


def test_the_training_loop_fits_one_screen():
    tree = ast.parse((PACKAGE / "engine.py").read_text())
    sizes = {n.name: (n.end_lineno or 0) - n.lineno for n in tree.body if isinstance(n, ast.FunctionDef)}
    assert sizes["train"] + sizes["train_step"] <= 60
