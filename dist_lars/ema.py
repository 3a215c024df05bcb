"""A running average of the weights, evaluated in their place."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


class Ema:
    """average = d * average + (1 - d) * weights after every step, with d = min(decay, step / (step + 9)).

    The ramp makes the average forget the initial weights: step 0 copies, and early averages are short. It is that of
    TensorFlow's ExponentialMovingAverage with `num_updates` = step - 1; the rival is the constant decay of
    torch.optim.swa_utils. `tensors` are the weights and whatever else belongs to an evaluation (BatchNorm's running
    statistics, each rank its own); no step ever reads the average back.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], decay: float) -> None:
        self.tensors = list(tensors)
        self.average = [t.detach().clone() for t in self.tensors]
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step`."""
        torch._foreach_lerp_(self.average, self.tensors, 1 - min(self.decay, step / (step + 9)))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the tensors hold the average (and the average the tensors): evaluate, save or load it as a model."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, tensor in enumerate(self.tensors):  # storages change hands, nothing is copied
            tensor.data, self.average[i] = self.average[i], tensor.data
