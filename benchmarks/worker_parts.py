"""What is asked of a training rank beside its steps: layers, stand-alone all-reduces, a timeline, its memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from benchmarks import record
from dist_lars.engine import Job
from dist_lars.reducer import Reducer
from dist_lars.resources import free_memory


class Layers:
    """Seconds of every leaf module forward and backward while it is attached.

    A backward lasts from the gradient of the module's output to that of the next output, in the order in which autograd
    gets there, or to the last one of the parameters. What is done between two modules counts to the first of them.
    (Module hooks on backward would forbid activations in place.)
    """

    def __init__(self, model: nn.Module, synchronize: Callable[[], None]) -> None:
        self.synchronize, self.since = synchronize, 0.0
        self.leaves = {name: m for name, m in model.named_modules() if not list(m.children())}
        self.seconds = {name: {"forward": 0.0, "backward": 0.0} for name in self.leaves}
        self.before: Any = None  # what made the input of the module
        self.behind: str | None = None  # the module whose backward goes on

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, every forward and backward counts."""
        hooks = []
        for name, module in self.leaves.items():
            hooks.append(module.register_forward_pre_hook(lambda m, args: self._begin(args[0])))
            hooks.append(module.register_forward_hook(lambda m, args, out, name=name: self._forward(name, out)))
            for p in module.parameters(recurse=False):
                hooks.append(p.register_post_accumulate_grad_hook(lambda _, name=name: self._backward(name)))
        yield
        for hook in hooks:
            hook.remove()

    def _begin(self, x: torch.Tensor) -> None:
        self.synchronize()
        self.since, self.before, self.behind = time.perf_counter(), x.grad_fn, None

    def _forward(self, name: str, out: torch.Tensor) -> None:
        self.synchronize()
        self.seconds[name]["forward"] += time.perf_counter() - self.since
        if out.requires_grad and out.grad_fn is not self.before:  # what hands its input on has no backward
            out.register_hook(lambda _: self._backward(name))

    def _backward(self, name: str) -> None:
        self.synchronize()
        now = time.perf_counter()
        if self.behind is not None:
            self.seconds[self.behind]["backward"] += now - self.since
        self.since, self.behind = now, name

    def rows(self, steps: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
        """One per module that took time, per step, and one of what `steps` took outside of all modules."""
        whole = {what: sum(step[what] for step in steps) for what in ("forward", "backward")}
        rest = {what: s - sum(mine[what] for mine in self.seconds.values()) for what, s in whole.items()}
        of = {name: (type(m).__name__, sum(p.numel() for p in m.parameters())) for name, m in self.leaves.items()}
        return [
            {"layer": name, "kind": of[name][0], "parameters": of[name][1],
             **{f"{what} ms": 1e3 * s / len(steps) for what, s in seconds.items()}}
            for name, seconds in self.seconds.items() if any(seconds.values())
        ] + [{"layer": "unattributed", "kind": "", "parameters": 0,
              **{f"{what} ms": 1e3 * s / len(steps) for what, s in rest.items()}}]  # fmt: skip


def answer(job: Job, work: dict[str, Any]) -> Any:
    """To a request without steps."""
    if "standalone" in work:
        assert job.reducer is not None
        return standalone(job.reducer, work["standalone"])
    return memory(next(job.model.parameters()).device)


def memory(device: torch.device) -> dict[str, float]:
    """Bytes that this rank holds where it computes, and those that are free there."""
    if device.type == "cuda":
        return {
            "held": float(torch.cuda.max_memory_reserved(device)),
            "free": float(torch.cuda.mem_get_info(device)[0]),
        }
    return {"held": record.own_memory("RssAnon"), "free": free_memory()}


def standalone(reducer: Reducer, repeat: int) -> list[float]:
    """Seconds of all buckets' all-reduces with nothing else to do, `repeat` times."""
    flats = [torch.zeros(sum(p.numel() for p in bucket.parameters)) for bucket in reducer.buckets]
    flats = [flat.to(bucket.parameters[0]) for flat, bucket in zip(flats, reducer.buckets, strict=True)]
    found = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        handles = [reducer.start(flat, bucket.name) for flat, bucket in zip(flats, reducer.buckets, strict=True)]
        for handle in handles:
            reducer.wait(handle)
        found.append(time.perf_counter() - began)
    return found[1:]  # the first one warms up


@contextmanager
def horovod_timeline(path: str) -> Iterator[None]:
    """Inside, rank 0 of Horovod writes down what it does."""
    import horovod.torch as hvd

    hvd.start_timeline(path)
    yield
    hvd.stop_timeline()
