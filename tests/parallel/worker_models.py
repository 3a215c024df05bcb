"""Train the four networks for three steps at 224 px, and a small one with averaged weights, whole and resumed."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from dist_lars import api, checkpoint, engine
from dist_lars import comm as ranks
from dist_lars.cli import load_config
from dist_lars.guards import tensor_sums
from dist_lars.metrics import Counts
from dist_lars.plan import make_plan
from dist_lars.resources import pick_autocast
from tests.parallel.worker_tools import finish, join

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
    config = load_config(overrides={**options, "schedule.warmup_epochs": 0, **NETS[name]})
    torch.manual_seed(0)
    plan = make_plan(config, comm.size, STEPS * config.batch_size, 4)
    cpu = torch.device("cpu")
    job = api.make_job(config, comm, plan, CLASSES, cpu, pick_autocast(config.precision, cpu))
    ranks.sync_parameters(job.model, comm)
    before = tensor_sums(job.model.parameters())
    rng = torch.Generator().manual_seed(comm.rank)
    batch = torch.randint(0, 256, (MICRO, 224, 224, 3), dtype=torch.uint8, generator=rng), torch.arange(MICRO)
    counts, losses = Counts(job.device), []
    for step in range(STEPS):
        engine.set_lr(job.optimizer, engine.lr_at(step, plan.rate))
        engine.train_step(job, iter([batch]), step, counts, engine.Clock())
        total = comm.sum(counts.take())
        losses.append(total["loss"] / total["count"])
    return {"losses": losses, "before": before, "after": tensor_sums(job.model.parameters())}


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


def switched_on(comm: ranks.Comm) -> dict[str, Any]:
    """Run a without averages; run b goes on from its middle with them: the average against its own definition."""
    root = Path(comm.broadcast(tempfile.mkdtemp() if comm.rank == 0 else "", "folder"))
    a = small(str(root / "a"), comm, **{"optim.ema_decay": 0.0})
    more = {"resume.from": str(root / "a" / "checkpoints" / "step-000000008.pt"), "resume.save_steps": 1}
    b = small(str(root / "b"), comm, **more, **{"resume.allow": ["optim.ema_decay"]})
    x, y = checkpoint.load(a.run_dir), checkpoint.load(b.run_dir)
    average = checkpoint.load(more["resume.from"])["model"]["0.weight"]
    for step in range(8, 16):  # the first is step 0, and a checkpoint is named by how many are done
        weights = checkpoint.load(root / "b" / "checkpoints" / f"step-{step + 1:09d}.pt")["model"]["0.weight"]
        average = average + (1 - min(0.6, step / (step + 9))) * (weights - average)
    comm.barrier()
    if comm.rank == 0:
        shutil.rmtree(root)
    return {
        "trained_alike": all(torch.equal(x["model"][k], v) for k, v in y["model"].items() if "running" not in k),
        "off": (y["ema"]["0.weight"] - average).abs().max().item(),
        "moved": (y["ema"]["0.weight"] - y["model"]["0.weight"]).abs().max().item(),
    }


def main() -> None:
    torch.set_num_threads(1)
    comm = join(deterministic=True)
    nets = {name: three_steps(name, comm) for name in NETS}
    finish(comm.rank, {**nets, "resume": resumed(comm), "ema": switched_on(comm)})
    comm.close()


if __name__ == "__main__":
    main()
