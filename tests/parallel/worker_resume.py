"""A run without saves, one that saves after every step, and one from each of its checkpoints: what is different.

worker_resume.py [STOP ...]     the steps to stop after; all of them without
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from dist_lars import api, checkpoint, runlog
from dist_lars import comm as ranks
from dist_lars.cli import load_config
from tests.parallel.worker_tools import finish, join

STEPS = 12  # of three to an epoch; a line of the log every two


def train(folder: Path, comm: ranks.Comm, **more: Any) -> dict[str, Any]:
    """A short run with BatchNorm and averaged weights on random images: its last checkpoint and its log."""
    options = {
        "data.kind": "synthetic", "data.image_size": 16, "data.resize": 16, "data.train_images": 36,
        "data.val_images": 8, "data.classes": 4, "data.workers": 0, "model.name": "resnet_small", "epochs": 4,
        "batch_size": 12, "micro_batch": 2, "schedule.warmup_epochs": 1, "optim.lr": 5.0, "optim.ema_decay": 0.6,
        "comm.bucket_mb": 0.1, "log.every_steps": 2, "log.tensorboard": False, "log.progress": False,
        "resume.keep": 99, "resume.save_epochs": 100, "comm.deterministic": comm.size > 2,
    }  # fmt: skip
    api.train(load_config(overrides={**options, "run_dir": str(folder), **more}), comm)
    told = ("loss", "top1", "top5", "count", "lr", "gradient_norm")
    lines = {
        (line["kind"], line["step"]): {k: line.get(k) for k in told}
        for line in runlog.read(folder) if line["kind"] in ("train", "eval")
    }  # fmt: skip
    return {"state": checkpoint.load(folder), "lines": lines}


def different(a: dict[str, Any], b: dict[str, Any], since: int = 0) -> list[str]:
    """Names of what is not the same to the last bit."""
    x, y = a["state"], b["state"]
    found = [f"{k} {n}" for k in ("model", "ema") for n in x[k] if not torch.equal(x[k][n], y[k][n])]
    found += [k for k in ("buffers", "ema_buffers") for p, q in zip(x[k], y[k], strict=True) if not torch.equal(p, q)]
    for i, kept in x["optimizer"]["state"].items():
        other = y["optimizer"]["state"][i]
        found += [f"{n} {i}" for n, v in kept.items() if not torch.equal(torch.as_tensor(v), torch.as_tensor(other[n]))]
    expected = {key: line for key, line in a["lines"].items() if key[1] > since}
    if set(expected) != set(b["lines"]):
        found.append(f"lines {sorted(expected)}, {sorted(b['lines'])}")
    return found + [f"line {key}" for key, line in expected.items() if b["lines"].get(key) != line]


def main() -> None:
    torch.set_num_threads(1)
    comm = join(deterministic=len(sys.argv) > 1)
    root = Path(comm.broadcast(tempfile.mkdtemp() if comm.rank == 0 else "", "folder"))
    whole = train(root / "whole", comm)
    saving = train(root / "saving", comm, **{"resume.save_steps": 1})
    result = {"saving": different(whole, saving)}
    for stop in map(int, sys.argv[1:] or range(1, STEPS)):
        path = str(root / "saving" / "checkpoints" / f"step-{stop:09d}.pt")
        result[str(stop)] = different(whole, train(root / f"from{stop}", comm, **{"resume.from": path}), stop)
    own = whole["state"]["buffers"]
    result["own"] = len(own) == comm.size and not all(torch.equal(own[0], b) for b in own[1:])
    comm.barrier()
    if comm.rank == 0:
        shutil.rmtree(root)
    finish(comm.rank, result)
    comm.close()


if __name__ == "__main__":
    main()
