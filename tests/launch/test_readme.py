"""README.md and docs/ stay true: commands exist and start, messages are the program's, links lead somewhere."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dist_lars.config import LEAVES

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = "".join(path.read_text() for path in PAGES)
SOURCES = [
    ROOT / "Makefile", ROOT / "slurm/common.sh", ROOT / "docker/Dockerfile", *(ROOT / "dist_lars").rglob("*.py")
]  # fmt: skip


def commands() -> list[str]:
    """Every line of README's code blocks, without its comment."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", README, re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return sorted({re.sub(r"\s+#.*", "", line).strip() for line in lines} - {""})


@pytest.mark.parametrize("line", [line for line in commands() if re.match(r"([A-Z_]+=\S+ )*make\b", line)])
def test_make_knows_the_command(line, tmp_path):
    words = shlex.split(line)
    names = [word for word in words if "=" not in word and word != "make"]
    done = subprocess.run(
        ["make", "-n", f"VENV={tmp_path}/env", *names], cwd=ROOT, env={**os.environ}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


QUICK = ("--dry_run", "--list_presets", "--help")  # the training ones are run by test_train.py


@pytest.mark.parametrize(
    "line", [line for line in commands() if line.startswith("python") and any(word in line for word in QUICK)]
)
def test_the_quick_commands_run(line, command):
    words = shlex.split(line)
    assert command(sys.executable, *words[1:]).returncode == 0


OPTION = r"--([a-z_]+(?:\.[a-z_]+)?)\b"
BENCHMARK = r"python -m benchmarks\.(\w+)([^`\n]*)"


def chapter(title: str) -> str:
    """The text of a chapter."""
    return README.split(f"## {title}\n")[1].split("\n## ")[0]


def options() -> list[str]:
    """The trainer's options that README names; before a template they are sbatch's."""
    cluster = chapter("On your cluster")
    ours = README.split("## Training")[1].replace(cluster, "".join(re.findall(r"\.sbatch (--.*)", cluster)))
    return sorted(set(re.findall(OPTION, re.sub(rf"{BENCHMARK}|torchrun --nproc-per-node", "", ours))))


@pytest.mark.parametrize("name", options())
def test_the_option_exists(name):
    others = {"help", "preset", "config", "dry_run", "world_size", "json", "list_presets", "gloo", "checkpoint", "size"}
    # Of benchmarks.study, doctor, evaluate, sbatch.
    others |= {"array", "launch", "list", "report", "workers", "records", "cluster", "test", "export", "backend"}
    assert name in LEAVES or name in others


@pytest.mark.parametrize(("module", "words"), sorted(set(re.findall(BENCHMARK, TEXT))))
def test_the_benchmark_has_these_options(module, words):
    source = (ROOT / "benchmarks" / f"{module}.py").read_text()
    source += (ROOT / "benchmarks/group.py").read_text() if "launch_options(parser)" in source else ""
    own = [n for n in re.findall(OPTION, words) if not (module == "study" and n in LEAVES)]  # it hands these on
    for name in own:
        assert f'"--{name}"' in source, f"benchmarks.{module} has no --{name}"


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m (dist_lars\.\w+)", TEXT))))
def test_the_module_is_there(module):
    assert importlib.util.find_spec(module)


def messages() -> list[str]:
    """The first column of the tables of failures."""
    tables = [README.split(title)[1].split("\n#")[0] for title in ("What a failure means", "Before anything is spent")]
    return re.findall(r"^\| (`.*?) \|", "".join(tables), re.M)


def test_the_templates_are_those_of_the_table():
    rows = re.findall(r"^\| (`.*) \| (\d+) x 4 x (\d+) x (\d+) \| ([\d,]+) \|$", chapter("On your cluster"), re.M)
    told = {name: row[1:] for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    files = {path.stem: path.read_text() for path in (ROOT / "slurm").glob("*.sbatch")}
    assert set(told) == set(files) - {"scaling", "study"}
    for name, (nodes, images, passes, batch) in told.items():
        assert f"global batch {batch}: {nodes} nodes x 4 GPUs x {images} images x {passes} passes" in files[name]


@pytest.mark.parametrize("message", messages())
def test_the_message_is_one_that_we_print(message):
    """The pieces of a message between its examples occur in the source, in one file."""
    pieces = [piece for text in re.findall("`(.*?)`", message) for piece in re.split(r" \.\.\.|/\S+|[\d.]{3,}", text)]
    words = [piece.strip(" ,") for piece in pieces if len(piece.strip(" ,")) > 7]
    assert words
    assert any(all(word in path.read_text() for word in words) for path in SOURCES), words


@pytest.mark.parametrize("option", re.findall(r"^\| `([A-Z_]{4,})=", README, re.M))
def test_the_option_is_read_somewhere(option):
    family = "_".join(option.split("_")[:2])
    assert any(option in path.read_text() or f"{{!{family}" in path.read_text() for path in SOURCES)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("number", sorted(set(re.findall(r"\d+\.\d+ ± \d+\.\d+ \(\d+\)", " ".join(TEXT.split())))))
def test_an_accuracy_with_its_spread_is_one_of_a_study(number):
    reports = [path.read_text() for path in (ROOT / "benchmarks/records").glob("study-*.md")]
    assert any(number in text for text in reports)
