"""The records of a study: one JSON object per line, a file small enough for git.

A line of kind `study` says what was asked, one of kind `machine` where and with what it was measured (runs name it by
`on`), one of kind `run` what one run did. Lines are added by rewriting the file aside and renaming it, under a lock,
so that many processes and nodes may share it.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import yaml

from benchmarks import record
from dist_lars import runlog
from dist_lars.checkpoint import write_aside
from dist_lars.config import Config, data_path, from_flat
from dist_lars.continuation import MAY_DIFFER_ON_RESUME
from dist_lars.data import cache_dir, list_folders
from dist_lars.data.packing import digest_of
from dist_lars.errors import UserError
from dist_lars.locks import lock

Line = dict[str, Any]


class Store:
    """study-NAME.jsonl in a folder; `shared`: by jobs on several nodes, for which its file system must have locks."""

    def __init__(self, folder: Path, name: str, shared: bool = False) -> None:
        self.folder, self.path, self.shared = folder, folder / f"study-{name}.jsonl", shared

    def make(self) -> None:
        """Refuse a folder that cannot be written now, not after the first run."""
        try:
            self._lock().close()
        except OSError as e:
            raise UserError(f"--records {self.folder} cannot be written: {e.strerror}") from e

    def _lock(self) -> IO[Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        return lock(self.folder / f".{self.path.stem}.lock", wait=True, needed=self.shared)

    def lines(self) -> list[Line]:
        """All of them, oldest first."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def runs(self) -> dict[str, Line]:
        """{id: record} of the runs that are done."""
        return {line["id"]: line for line in self.lines() if line["kind"] == "run"}

    def elsewhere(self, header: Line) -> dict[str, tuple[Line, Line]]:
        """{id: (record, its machine)} of the other studies in this folder that speak of the same images."""
        found = {}
        for path in sorted(self.folder.glob("study-*.jsonl")):
            lines = Store(self.folder, path.stem.removeprefix("study-")).lines() if path != self.path else []
            machines = {line["id"]: line for line in lines if line["kind"] == "machine"}
            if any(line["kind"] == "study" and _same_images(line, header) for line in lines):
                found |= {line["id"]: (line, machines[line["on"]]) for line in lines if line["kind"] == "run"}
        return found

    def share(self, run: Any, line: Line, machine: Line, study: Line) -> None:
        """Add another study's record of `run`, a `study_grid.Run`, under the labels that the run has here."""
        own = {"cell": run.cell.labels, "stage": run.stage, "factor": run.factor}
        self.add({k: v for k, v in (line | own).items() if k not in ("kind", "on")}, _content(machine), study)

    def add(self, run: Line, machine: Line, study: Line) -> None:
        """Add a run, where it was measured and what study it is of, each once."""
        on = _digest(machine)
        with self._lock():
            lines = self.lines()
            _refuse_other_images(self.path, lines, run)
            refuse_other_files(self.path, lines, study)
            refuse_other_precision(self.path, lines, machine)
            lines = [{"kind": "study", **study}, *(line for line in lines if line["kind"] != "study")]
            if not any(line["kind"] == "machine" and line["id"] == on for line in lines):
                lines.append({"kind": "machine", "id": on, **machine})
            if not any(line["kind"] == "run" and line["id"] == run["id"] for line in lines):
                lines.append({"kind": "run", **run, "on": on})
            write_aside(self.path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _content(machine: Line) -> Line:
    return {k: v for k, v in machine.items() if k not in ("kind", "id")}


def _digest(content: Line) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def _refuse_other_images(path: Path, lines: list[Line], run: Line) -> None:
    """Accuracies on different images are not to stand in one table."""
    for line in lines:
        if line["kind"] == "run" and line["stage"] == run["stage"] and line["images"] != run["images"]:
            raise UserError(
                f"{path} holds runs on {line['images']} images (training, evaluated), and this one had "
                f"{run['images']}: other images belong into other records, --records DIR"
            )


def _same_images(a: Line, b: Line) -> bool:
    """By what the studies say, and by their files where both have seen them: JPEG copies are not the PNG originals."""
    return a.get("data") == b.get("data") and not _other_files(a, b)


def _other_files(a: Line, b: Line) -> bool:
    return len({a.get("files"), b.get("files")} - {None}) > 1


def refuse_other_files(path: Path, lines: list[Line], study: Line) -> None:
    """As many images of other names, such as the JPEG copies of a PNG folder, are other images."""
    for line in lines:
        if line["kind"] == "study" and _other_files(line, study):
            raise UserError(
                f"{path} holds runs on image files of other names than those of --data.path now: other images belong "
                f"into other records, --records DIR"
            )


def names_of_files(config: Config) -> str | None:
    """A digest of the names of all images, as the folder has them or had them when it was packed; None without one.

    Raises `UserError` where there are more or fewer than the study plans with.
    """
    path = data_path(config)
    if path is None:
        return None
    train, val = indexes = list_folders(path, config.data.val, cache_dir())
    if (len(train), len(val)) != (config.data.train_images, config.data.val_images):
        raise UserError(
            f"{path} has {len(train):,} + {len(val):,} images in {len(train.classes)} classes, but the study has "
            f"{config.data.train_images:,} + {config.data.val_images:,}; if these are the images that it is about: "
            f"--data.train_images {len(train)} --data.val_images {len(val)}, or the same in its file"
        )
    return hashlib.sha256("".join(map(digest_of, indexes)).encode()).hexdigest()[:12]


def refuse_other_precision(path: Path, lines: list[Line], machine: Line) -> None:
    """`precision: auto` is another one on another machine, and runs are known by their options."""
    for line in lines:
        if line["kind"] == "machine" and line.get("precision") != machine.get("precision"):
            raise UserError(
                f"{path} holds runs in {line.get('precision')}, and here they compute in {machine.get('precision')}: "
                f"they belong into other records, --records DIR"
            )


# --- one run ----------------------------------------------------------------------------------------------------------


def summary(run: Any, run_dir: Path, cpu_seconds: float) -> Line:
    """What the log of a finished or diverged run says of `run`, a `study_grid.Run`."""
    status = runlog.read_status(run_dir) or {}
    start = runlog.read(run_dir, "start")[-1]
    plan, train = start["plan"], _lines(run_dir, "train")
    end = (runlog.read(run_dir, "end") or [{}])[-1]
    scores = {key: _short(end[key]) if key in end else None for key in ("top1", "top5", "loss")}
    checks = _lines(run_dir, "eval") if run.stage == "select" else []
    return {
        "id": run.id,
        "cell": run.cell.labels,
        "stage": run.stage,
        "factor": run.factor,
        "lr": plan["peak_lr"],
        "seed": run.seed,
        "state": "finished" if end else "diverged",
        **({} if end else {"reason": status.get("reason"), "step": status.get("step")}),
        **scores,
        "epochs": plan["epochs"],
        "steps_per_epoch": plan["steps_per_epoch"],
        "images": [plan["train_images"], plan["val_images"]],
        "classes": start["classes"],
        "ranks": plan["world_size"],
        "seconds": round(sum(line["count"] / line["images_per_s"] for line in train), 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "python -m dist_lars.train --config OPTIONS.yaml",
        "options": {k: v for k, v in run.options.items() if not k.startswith(MAY_DIFFER_ON_RESUME)},
        "train_loss": [_short(line["loss"]) for line in train],
        "train_top1": [_short(line["top1"]) for line in train],
        "held_out_top1": [_short(line["top1"]) for line in checks],
        **_trust(run_dir, layers=run.stage == "final"),
    }


def _lines(run_dir: Path, kind: str) -> list[Line]:
    """One line per step: a run that was killed and went on from a checkpoint has told some of them twice."""
    return list({line["step"]: line for line in runlog.read(run_dir, kind)}.values())


def _trust(run_dir: Path, layers: bool) -> Line:
    """Trust ratios over time: their quantiles, of whole runs every tensor's."""
    lines = _lines(run_dir, "trust")
    if not lines:
        return {}
    found: Line = {
        "trust_steps": [line["step"] for line in lines],
        "trust_quantiles": [[_short(q) for q in line["quantiles"]] for line in lines],
    }
    if layers:
        names = list(lines[0]["ratios"])
        found["trust_ratios"] = {name: [_short(line["ratios"][name], 3) for line in lines] for name in names}
    return found


def _short(value: float, digits: int = 5) -> float:
    return float(f"{value:.{digits}g}")


def machine(precision: str) -> Line:
    """Where this process runs; `precision` as the runs compute."""
    facts = record.circumstances()
    facts["machine"].pop("threads")
    return {**facts, "precision": precision}


def options_file(path: Path, options: dict[str, Any]) -> None:
    """What `--config` reads."""
    from_flat(options)
    path.write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")
