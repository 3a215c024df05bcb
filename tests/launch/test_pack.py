"""Packing and training from what was packed, with the user's own commands."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from dist_lars import runlog
from tests.conftest import MPIRUN, SMALL_RUN, environment

pytestmark = pytest.mark.launch
PACK = ("python", "-m", "dist_lars.pack")
SMALL = (*SMALL_RUN, "--epochs", "2", "--log.tensorboard", "false", "--device", "cpu")


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def packed(image_folder, tmp_path_factory):
    """The tiny folder as shards with its own bytes."""
    from tests.conftest import run_command

    root = tmp_path_factory.mktemp("packed")
    words = [*PACK, str(image_folder), str(root / "shards"), "--size", "none", "--shard_mb", "0.02"]
    done = run_command(words, 120, cwd=root, DIST_LARS_CACHE=str(root / "cache"))
    assert done.returncode == 0, done.stdout[-3000:]
    assert "train: 24 of 24 images" in done.stdout
    return root / "shards"


def train(command, path, run_dir, *words, ranks=2):
    launcher = [*MPIRUN, "-np", str(ranks)] if ranks > 1 else []
    return command(*launcher, "python", "-m", "dist_lars.train", *SMALL, "--data.path", str(path), "--run_dir",
                   str(run_dir), *words, timeout=170, DIST_LARS_CACHE=str(Path(run_dir).parent / "cache"))  # fmt: skip


def losses(run_dir):
    return [line["loss"] for line in runlog.read(run_dir) if line["kind"] in ("train", "eval")]


def test_training_from_shards_is_training_from_the_folder(command, image_folder, packed, tmp_path):
    options = {"folder": image_folder, "shards": packed, "staged": packed, "cached": image_folder}
    extra = {
        "staged": ("--data.stage", str(tmp_path / "scratch"), "--data.workers", "1"),
        "cached": ("--data.cache", "bytes", "--data.cache_val", "false"),
    }
    seen = {}
    for name, path in options.items():
        done = train(command, path, tmp_path / name, *extra.get(name, ()))
        assert done.returncode == 0, done.stdout[-3000:]
        seen[name] = losses(tmp_path / name)
    assert seen["folder"] == seen["shards"] == seen["staged"] == seen["cached"]
    staged = list((tmp_path / "scratch").iterdir())
    assert len(staged) == 2  # training and validation, once for both ranks
    again = train(command, packed, tmp_path / "again", *extra["staged"], "--data.stage_keep", "false", ranks=1)
    assert again.returncode == 0, again.stdout[-3000:]
    assert not list((tmp_path / "scratch").iterdir())  # cleaned by request


def test_skipped_files_are_in_the_log_and_ranks_do_not_matter(command, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "images")
    for name in ("train/class0/003.jpg", "train/class1/010.jpg", "val/class2/005.jpg"):
        (tmp_path / "images" / name).write_bytes(b"")
    refused = train(command, tmp_path / "images", tmp_path / "fails", ranks=1)
    assert refused.returncode == 2
    assert "cannot read image" in refused.stdout
    assert "Traceback" not in refused.stdout
    runs = {}
    for ranks in (1, 2):
        folder = tmp_path / f"ranks{ranks}"
        done = train(
            command, tmp_path / "images", folder, "--data.on_error", "skip", "--data.workers", "0", ranks=ranks
        )
        assert done.returncode == 0, done.stdout[-3000:]
        names = sorted(line["file"].split("images/")[1] for line in runlog.read(folder, "skipped"))
        assert names == ["train/class0/003.jpg", "train/class1/010.jpg", "val/class2/005.jpg"]
        assert runlog.read(folder, "eval")[-1]["count"] == 10
        runs[ranks] = [line["step"] for line in runlog.read(folder, "train")]
    assert runs[1] == runs[2]  # equal steps
    too_many = train(command, tmp_path / "images", tmp_path / "x", "--data.on_error", "skip", "--data.max_skipped", "1")
    assert too_many.returncode != 0
    assert "--data.max_skipped 1 allows no more" in too_many.stdout


def test_staging_wants_shards(command, image_folder, tmp_path):
    done = train(command, image_folder, tmp_path / "r", "--data.stage", str(tmp_path / "s"), ranks=1)
    assert done.returncode == 2
    assert "is an image folder: python -m dist_lars.pack makes them" in done.stdout


def many_images(folder: Path, copies: int, source: Path) -> Path:
    for i in range(copies):
        for file in (source / "train").rglob("*.jpg"):
            target = folder / "src" / file.parent.name / f"{i}-{file.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    return folder / "src"


def processes_naming(text: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if text in (entry / "environ").read_bytes().decode(errors="replace"):
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
    return found


@pytest.mark.faults
def test_kill_9_in_the_middle_of_packing_then_resume_gives_identical_shards(command, image_folder, tmp_path):
    source = many_images(tmp_path, 100, image_folder)
    options = ("--size", "32", "--shard_mb", "0.1", "--workers", "2")
    cache = {"DIST_LARS_CACHE": str(tmp_path / "cache")}
    assert command(*PACK, str(source), str(tmp_path / "whole"), *options, **cache).returncode == 0
    words = [*PACK, str(source), str(tmp_path / "killed"), *options]
    process = subprocess.Popen(
        words, env=environment(**cache, DIST_LARS_MARK=str(tmp_path)), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "killed").glob("shard-*.tar"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None, "too fast to be killed"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "shards.json").exists()
    deadline = time.monotonic() + 15
    while left := processes_naming(f"DIST_LARS_MARK={tmp_path}"):  # its workers end with it
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    resumed = command(*words, **cache)
    assert resumed.returncode == 0, resumed.stdout[-2000:]
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert json.loads((tmp_path / "killed" / "shards.json").read_text())["images"] == 2400
