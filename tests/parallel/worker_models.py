"""Train the four networks for three steps at 224 px, and a small one with averaged weights, whole and resumed."""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from dist_lars import api, checkpoint, engine
from dist_lars import comm as ranks
from dist_lars.cli import load_config
from dist_lars.metrics import Counts
from dist_lars.plan import make_plan
from tests.parallel.worker_tools import finish

NETS = {
    "alexnet": {"model.bias_init": 0.1, "optim.law": "paper", "optim.lr": 2.0},
    "alexnet_bn": {"optim.law": "paper", "optim.lr": 2.0},
    "resnet18": {"model.zero_gamma": True, "model.fc_std": 0.01, "optim.law": "mlperf", "optim.lr": 2.0},
    "resnet50": {"model.zero_gamma": True, "model.fc_std": 0.01, "optim.law": "mlperf", "optim.lr": 2.0},
}
STEPS, CLASSES, MICRO = 3, 10, 2


def three_steps(name: str, comm: ranks.Comm) -> dict[str, Any]:
    """The same two images per rank, three times: losses, where the weights went, and equality of the replicas."""
    options = {"model.name": name, "batch_size": MICRO * comm.size, "micro_batch": MICRO, "epochs": 1, "device": "cpu"}
    config = load_config(overrides={**options, "schedule.warmup_epochs": 0, "precision": "bf16", **NETS[name]})
    torch.manual_seed(0)
    plan = make_plan(config, comm.size, STEPS * config.batch_size, 4)
    job = api.make_job(config, comm, plan, CLASSES, torch.device("cpu"), torch.bfloat16)
    ranks.sync_parameters(job.model, comm)
    before = ranks.checksum(job.model)
    rng = torch.Generator().manual_seed(comm.rank)
    batch = torch.randint(0, 256, (MICRO, 224, 224, 3), dtype=torch.uint8, generator=rng), torch.arange(MICRO)
    counts, losses = Counts(job.device), []
    for step in range(STEPS):
        engine.set_lr(job.optimizer, engine.lr_at(step, plan.rate))
        engine.train_step(job, iter([batch]), step, counts, engine.Clock())
        total = comm.sum(counts.take())
        losses.append(total["loss"] / total["count"])
    return {"losses": losses, "before": before, "after": ranks.checksum(job.model)}


def small(folder: str, comm: ranks.Comm, **more: Any) -> api.Result:
    """A short run with BatchNorm and averaged weights on random images."""
    options = {
        "data.kind": "synthetic", "data.image_size": 16, "data.resize": 16, "data.train_images": 32,
        "data.val_images": 8, "data.classes": 4, "data.workers": 0, "model.name": "resnet_small", "epochs": 4,
        "batch_size": 8, "micro_batch": 2, "schedule.warmup_epochs": 1, "optim.lr": 5.0, "optim.ema_decay": 0.6,
        "log.tensorboard": False, "log.progress": False, "resume.keep": 9, "comm.deterministic": True,
    }  # fmt: skip
    return api.train(load_config(overrides={**options, "run_dir": folder, **more}), comm)


def resumed(comm: ranks.Comm) -> dict[str, Any]:
    """Run a whole; run b from a's checkpoint in the middle: what is different at the end."""
    root = Path(comm.broadcast(tempfile.mkdtemp() if comm.rank == 0 else "", "folder"))
    a = small(str(root / "a"), comm)
    b = small(str(root / "b"), comm, **{"resume.from": str(root / "a" / "checkpoints" / "step-000000008.pt")})
    x, y = checkpoint.load(a.run_dir), checkpoint.load(b.run_dir)
    different = [k for k in ("model", "ema") for n in x[k] if not torch.equal(x[k][n], y[k][n])]
    different += [
        k for k in ("buffers", "ema_buffers") for p, q in zip(x[k], y[k], strict=True) if not torch.equal(p, q)
    ]
    comm.barrier()
    if comm.rank == 0:
        shutil.rmtree(root)
    return {
        "different": different,
        "scores": [a[1:6], b[1:6]],
        "averaged": not torch.equal(x["ema"]["0.weight"], x["model"]["0.weight"]),
        "own": not torch.equal(x["ema_buffers"][0], x["ema_buffers"][1]),
    }


def main() -> None:
    torch.set_num_threads(1)
    comm = ranks.start(cpu=True, deterministic=True)
    result = {name: three_steps(name, comm) for name in NETS} if "nets" in sys.argv else resumed(comm)
    finish(comm.rank, result)
    comm.close()


if __name__ == "__main__":
    main()
