"""A small study and made-up records of it, shared by the tests of `benchmarks.study`."""

from pathlib import Path
from typing import Any

import yaml

from benchmarks import study_grid
from benchmarks.study_grid import Run, Study

TINY: dict[str, Any] = {
    "name": "tiny",
    "title": "Does it work?",
    "data": "no images at all",
    "base": {
        "data": {"kind": "digits", "train_images": 1500, "val_images": 297, "image_size": 16, "resize": 16},
        "model": {"name": "cnn_small"},
        "micro_batch": 32,
        "epochs": 4,
        "schedule": {"base_lr": 0.1, "base_batch": 64, "warmup_epochs": 1},
    },
    "axes": {
        "batch_size": [64, 256],
        "arm": {
            "SGD": {"optim.name": "sgd_momentum"},
            "LARS": {"optim.name": "lars", "schedule": {"base_lr": "4e+0", "scaling": "sqrt"}},
        },
    },
    "select": {"hold_out": 0.2, "epochs": 2, "factors": [0.5, 1, 2], "extend": 2},
    "final": {"seeds": [1, 2, 3]},
    "report": {"x": "batch_size", "series": "arm", "reference": "LARS"},
}


def study(folder: Path, **changes: Any) -> Study:
    """TINY with these keys replaced, through a file as users have it."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}, sort_keys=False))
    return study_grid.load(path)


def record(run: Run, top1: float | None) -> dict[str, Any]:
    """What a run leaves behind that reached this accuracy; None: it diverged."""
    plan = run.plan()
    curve = [10.0 + 10 * epoch for epoch in range(plan.epochs)]
    traced = {"trust_steps": [1, 2], "trust_quantiles": [[1e-4] * 5] * 2}
    return {
        "kind": "run",
        "id": run.id,
        "cell": run.cell.labels,
        "stage": run.stage,
        "factor": run.factor,
        "lr": plan.rate.peak,
        "seed": run.seed,
        "state": "diverged" if top1 is None else "finished",
        "top1": top1,
        "top5": None if top1 is None else 99.0,
        "loss": None if top1 is None else 1.0,
        "epochs": plan.epochs,
        "steps_per_epoch": plan.steps_per_epoch,
        "images": [plan.train_images, plan.val_images],
        "classes": 10,
        "ranks": 1,
        "seconds": 10.0,
        "cpu_seconds": 12.0,
        "options": {"model.name": "cnn_small", "batch_size": run.options["batch_size"]},
        "train_loss": [2.0 for _ in curve],
        "train_top1": curve,
        "held_out_top1": [],
        **(traced if run.options.get("optim.name") == "lars" else {}),
        **(
            {"trust_ratios": {"0.weight": [1e-4, 2e-4], "0.bias": [1e-3, 2e-3]}}
            if run.options.get("optim.name") == "lars" and run.stage == "final"
            else {}
        ),
    }


def finish(wanted: Study, accuracy: Any) -> dict[str, dict[str, Any]]:
    """Records of every run there comes to be, with the accuracies that `accuracy(run)` gives."""
    records: dict[str, dict[str, Any]] = {}
    while missing := [run for run in study_grid.runs(wanted, records) if run.id not in records]:
        for run in missing:
            records[run.id] = record(run, accuracy(run))
    return records
