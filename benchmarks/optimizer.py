"""Time of one optimizer step on the parameters of real networks, ours beside torch's, timm's and a plain loop.

    python -m benchmarks.optimizer [--models resnet18 resnet50 alexnet] [--rounds 25] [--threads 1]

All candidates of a network are timed in turn in one run, on one core, over the same weights and gradients; `x fused`
is the time relative to torch's fused SGD of the same round. Writes benchmarks/records/optimizer.json and .png. Without
timm its rows are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from benchmarks import record, show
from dist_lars.optim import LAMB, LARS, LAWS
from dist_lars.optim.tensors import Group, LossScale

#: An upper bound for a median ratio on ResNet-50: (slower, faster, at most).
CLAIMS = [
    ("LARS paper", "SGD fused", 1.9),
    ("LARS default", "SGD fused", 2.2),
    ("LARS paper", "timm Lars", 1 / 1.4),
    ("LARS default", "timm Lars", 1 / 1.4),
]
#: Tensors the size of the model that must pass between memory and core: weights, gradient and momentum read, weights
#: and momentum written; the norms read weights and gradient once more, because a layer does not fit the cache.
PASSES = {"SGD fused": 5, "SGD foreach": 5, "LARS paper": 7, "LARS default": 7, "LARS larc": 7, "LAMB": 9}


class LoopLARS(torch.optim.Optimizer):
    """LARS the way of torchlars (github.com/kakaobrain/torchlars): a loop that rescales p.grad, around torch's SGD."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "trust": 0.001, "eps": 1e-8})
        self.inner = torch.optim.SGD(params, lr=lr, momentum=momentum)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                w_norm, g_norm = p.norm(), p.grad.norm()
                ratio = group["trust"] * w_norm / (g_norm + group["weight_decay"] * w_norm + group["eps"])
                ratio = torch.where((w_norm > 0) & (g_norm > 0), ratio, 1.0)
                p.grad.add_(p, alpha=group["weight_decay"]).mul_(ratio)
        self.inner.step()


class MultiTensorLARS(LARS):
    """LARS on the path of accelerators, here on the CPU: what the fused path is measured against."""

    def _fused(self, parameters: list[Tensor], group: Group) -> Tensor | None:
        return self._foreach(parameters, group, LossScale())


def candidates(ps: list[nn.Parameter], twins: list[nn.Parameter]) -> dict[str, Callable[[], Any]]:
    """Steps by name; `twins` have gradients of their own, for the loop that changes them."""
    # A rate so small that the weights stay what they are through hundreds of steps.
    common = {"lr": 1e-5, "weight_decay": 5e-4}
    momentum = {**common, "momentum": 0.9}
    made: dict[str, torch.optim.Optimizer] = {
        "SGD fused": torch.optim.SGD(ps, **momentum, fused=True),
        "SGD foreach": torch.optim.SGD(ps, **momentum, foreach=True),
    }
    for name in ("default", "paper", "larc"):
        law = LAWS[name]
        form = {k: getattr(law, k) for k in ("denominator", "lr_placement", "eps", "min_norm", "clip")}
        made[f"LARS {name}"] = LARS(ps, **momentum, **form)
    made["LARS default, multi-tensor"] = MultiTensorLARS(ps, **momentum)
    made["LAMB"] = LAMB(ps, **common)
    made["torchlars-style loop"] = LoopLARS(twins, **momentum)
    try:
        from timm.optim import Lamb, Lars
    except ImportError:
        print("timm is not installed: its rows are left out (pip install timm)")
    else:
        made["timm Lars"] = Lars(ps, **momentum)
        made["timm Lars foreach"] = Lars(ps, **momentum, foreach=True)
        made["timm Lamb"] = Lamb(ps, **common)
    return {name: optimizer.step for name, optimizer in made.items()}


def parameters(name: str) -> list[nn.Parameter]:
    """Of the torchvision model as it is initialised, with random gradients."""
    torch.manual_seed(0)
    ps = list(torchvision.models.get_model(name).parameters())
    for p in ps:
        p.grad = torch.randn_like(p) * 0.01
    return ps


def peak_temporary(step: Callable[[], Any]) -> int:
    """The most bytes that one step held beyond what existed before it."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with quiet(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what C++ writes to the error stream away: torch's profiler announces each start and stop there."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123  a device, not a path
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def bandwidth(n: int) -> dict[str, Callable[[], Any]]:
    """What the memory gives: a copy, and a sum of squares that only reads."""
    x, y = torch.ones(n), torch.ones(n)
    return {"copy": lambda: x.copy_(y), "read": lambda: torch.dot(x, x)}


def measure(model: str, rounds: int, seconds: float) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Rows and raw times of one network."""
    ps, twins = parameters(model), parameters(model)
    n, largest = sum(p.numel() for p in ps), max(p.numel() for p in ps)
    steps, memory = candidates(ps, twins), bandwidth(n)
    times = record.compare({**steps, **memory}, rounds=rounds, seconds=seconds, warmup=3)
    rows = []
    for name, step in steps.items():
        seen = record.summary(times[name])
        relative = record.ratio(times[name], times["SGD fused"])
        rows.append(
            {
                "model": model,
                "optimizer": name,
                "ms": 1e3 * seen["median"],
                "ms p10": 1e3 * seen["p10"],
                "ms p90": 1e3 * seen["p90"],
                "x fused": relative["median"],
                "low": relative["low"],
                "high": relative["high"],
                "GB/s": 4e-9 * PASSES[name] * n / seen["median"] if name in PASSES else None,
                "peak MB": peak_temporary(step) / 1e6,
                "largest layer MB": 4 * largest / 1e6,
            }
        )
    for name, passes in (("copy", 2), ("read", 1)):
        seen = record.summary(times[name])
        rows.append(
            {
                "model": model,
                "optimizer": f"({name})",
                "ms": 1e3 * seen["median"],
                "GB/s": 4e-9 * passes * n / seen["median"],
            }
        )
    return rows, {f"{model} {name}": values for name, values in times.items()}


def norm_error(n: int) -> dict[str, float]:
    """Relative error of the float32 norm of n weights, ours and torch's: some CPU kernels add up in one float32."""
    w = torch.rand(n, generator=torch.Generator().manual_seed(0))
    true = w.double().norm().item()
    p = nn.Parameter(w)
    opt = LARS([("w", p)], lr=1.0, weight_decay=0.0, trust_coefficient=1.0, eps=0.0, denominator="sum_of_norms")
    p.grad = torch.zeros_like(w)
    p.grad[0] = 1.0
    opt.step()
    return {"elements": n, "ours": abs(opt.trust_ratios()["w"] / true - 1), "torch": abs(w.norm().item() / true - 1)}


def claims(raw: dict[str, list[float]]) -> list[dict[str, Any]]:
    """What the package says of itself, checked against this run."""
    rows = []
    for name, base, bound in CLAIMS:
        if f"resnet50 {base}" in raw and f"resnet50 {name}" in raw:
            ratio = record.ratio(raw[f"resnet50 {name}"], raw[f"resnet50 {base}"])
            claim = f"{name} takes at most {bound:.2f} of the time of {base}"
            measured = {"measured": ratio["median"], "low": ratio["low"], "high": ratio["high"]}
            rows.append({"claim": claim, **measured, "holds": ratio["median"] <= bound})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of one optimizer step.", allow_abbrev=False)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50", "alexnet"], help="names of torchvision")
    parser.add_argument("--rounds", type=int, default=25, help="times that each candidate is timed")
    parser.add_argument("--seconds", type=float, default=50.0, help="upper bound for the rounds of one network")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="optimizer", help="of the record")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if hasattr(os, "sched_setaffinity"):  # a thread that wanders between cores loses its cache
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-args.threads :])
    rows: list[dict[str, Any]] = []
    raw: dict[str, list[float]] = {}
    for model in args.models:
        print(f"timing {model} ...", flush=True)
        more, times = measure(model, args.rounds, args.seconds)
        rows, raw = rows + more, raw | times
    checked = claims(raw)
    path = record.write(args.name, rows, raw, claims=checked, norm_error=norm_error(37_748_736))
    bars = [row for row in rows if "x fused" in row and row["optimizer"] != "SGD fused"]
    show.plot(
        bars,
        path.with_suffix(".png"),
        x="model",
        y="x fused",
        series="optimizer",
        title="Time of one step, relative to torch's fused SGD (CPU)",
        references={"fused SGD": 1.0},
    )
    print(
        show.markdown(
            rows, ["model", "optimizer", "ms", "x fused", "low", "high", "GB/s", "peak MB", "largest layer MB"]
        )
    )
    if checked:
        print(show.markdown(checked))
    print(f"wrote {path.name} and its .png to benchmarks/records")


if __name__ == "__main__":
    main()
