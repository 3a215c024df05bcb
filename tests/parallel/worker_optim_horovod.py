"""Steps of SGD, LARS and LAMB under horovod.torch.DistributedOptimizer, each rank with images of its own."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from torch import nn

from dist_lars.optim import LAWS, build, param_groups

STEPS = 4


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def wrapped(name: str, model: nn.Module, **options: Any) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    groups = param_groups(model, weight_decay=0.01, exclude_from_decay="bn_bias", bias_lr_scale=0.5)
    inner = build(name, groups, lr=1.0, **options)
    return inner, hvd.DistributedOptimizer(inner, named_parameters=model.named_parameters())


def train(name: str, **options: Any) -> dict[str, Any]:
    """Ratios of every step, the digest of the weights, and the collectives that Horovod's timeline saw."""
    model = net()
    inner, opt = wrapped(name, model, **options)
    kept = _settings(inner) == _settings(opt)
    timeline = Path(os.environ["DIST_LARS_TEST_OUT"]) / f"{name}-{options.get('law')}.timeline.json"
    hvd.barrier()
    hvd.start_timeline(str(timeline))
    generator = torch.Generator().manual_seed(hvd.rank())
    ratios = []
    for _ in range(STEPS):
        opt.zero_grad()
        model(torch.randn(6, 3, 4, 4, generator=generator)).square().mean().backward()
        opt.step()
        ratios.append(opt.trust_ratios() if hasattr(opt, "trust_ratios") else {})
    hvd.stop_timeline()
    hvd.barrier()
    digest = sum(p.detach().double().sum().item() for p in model.parameters())
    return {"ratios": ratios, "digest": digest, "kept": kept, "collectives": _collectives(timeline)}


def _settings(opt: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]


def _collectives(timeline: Path) -> dict[str, int]:
    """Negotiations by kind, one per collective; the barrier that ends the recording is not part of the training."""
    if hvd.rank() != 0:
        return {}
    text = timeline.read_text().rstrip().rstrip(",").removesuffix("]")
    events = json.loads(text + "]")
    names = [e["name"] for e in events if e.get("ph") == "B"]
    return dict(Counter(n for n in names if n.startswith("NEGOTIATE_") and n != "NEGOTIATE_BARRIER"))


def blind_step() -> float:
    """Largest change of the weights by Horovod's broadcast of the optimizer state, as third-party scripts call it."""
    model = net()
    _, opt = wrapped("lars", model)
    before = [p.detach().clone() for p in model.parameters()]
    hvd.broadcast_optimizer_state(opt, root_rank=0)
    return max((p.detach() - b).abs().max().item() for p, b in zip(model.parameters(), before, strict=True))


def report(_: Any) -> dict[str, Any]:
    runs = {"sgd": train("sgd_momentum"), "lamb": train("lamb")}
    runs |= {law: train("lars", law=law) for law in LAWS}
    return {"runs": runs, "blind_step": blind_step()}
