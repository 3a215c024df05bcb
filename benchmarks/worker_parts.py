"""What is asked of a training rank beside its steps: layers, stand-alone all-reduces, a timeline, its memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from benchmarks import record
from dist_lars.engine import Job
from dist_lars.reducer import Reducer
from dist_lars.resources import free_memory


class Layers:
    """Seconds of every leaf module forward, and backward where it has parameters, while it is attached.

    A backward lasts from the gradient of the output to the last one of the parameters. (Module hooks on backward would
    forbid activations in place.)
    """

    def __init__(self, model: nn.Module, synchronize: Callable[[], None]) -> None:
        self.synchronize, self.steps, self.since = synchronize, 0, 0.0
        self.leaves = {name: m for name, m in model.named_modules() if not list(m.children())}
        self.seconds = {name: {"forward": 0.0, "backward": 0.0} for name in self.leaves}
        self.last: dict[str, float] = {}  # when the backward of a module began, or had its gradient so far

    @contextmanager
    def attached(self, steps: int) -> Iterator[None]:
        """Inside, every forward and backward counts; `steps` of them are averaged."""
        self.steps, hooks = steps, []
        for name, module in self.leaves.items():
            hooks.append(module.register_forward_pre_hook(lambda *_: self._begin()))
            hooks.append(module.register_forward_hook(lambda m, x, out, name=name: self._forward(name, out)))
            for p in module.parameters(recurse=False):
                hooks.append(p.register_post_accumulate_grad_hook(lambda _, name=name: self._gradient(name)))
        yield
        for hook in hooks:
            hook.remove()

    def _begin(self) -> None:
        self.synchronize()
        self.since = time.perf_counter()

    def _forward(self, name: str, out: torch.Tensor) -> None:
        self.synchronize()
        self.seconds[name]["forward"] += time.perf_counter() - self.since
        if out.requires_grad and list(self.leaves[name].parameters(recurse=False)):
            out.register_hook(lambda _: self._arrived(name))

    def _arrived(self, name: str) -> None:
        self.synchronize()
        self.last[name] = time.perf_counter()

    def _gradient(self, name: str) -> None:
        self.synchronize()
        now = time.perf_counter()
        self.seconds[name]["backward"] += now - self.last[name]
        self.last[name] = now

    def rows(self) -> list[dict[str, Any]]:
        """One per module that took time."""
        return [
            {"layer": name, "kind": type(self.leaves[name]).__name__,
             "parameters": sum(p.numel() for p in self.leaves[name].parameters()),
             **{f"{what} ms": 1e3 * s / self.steps for what, s in seconds.items()}}
            for name, seconds in self.seconds.items() if any(seconds.values())
        ]  # fmt: skip


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
