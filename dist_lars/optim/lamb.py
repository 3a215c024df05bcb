"""LAMB: layer-wise adaptive moments (You et al., arXiv:1904.00962)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, required

from dist_lars.optim.eager import EagerOptimizer
from dist_lars.optim.tensors import (
    Group,
    Ratios,
    by_kind,
    gradients,
    labelled,
    norms,
    portions,
    refuse_sharded,
    wide,
    with_gradients,
)


class LAMB(EagerOptimizer):
    r"""Adam whose every tensor moves in proportion to its own norm.

    The paper's Algorithm 2 with phi(z) = z, for the gradient g and step t of each parameter::

        m = beta1 m + (1 - beta1) g                m' = m / (1 - beta1^t)
        v = beta2 v + (1 - beta2) g^2              v' = v / (1 - beta2^t)
        u = m' / (sqrt(v') + eps) + wd w
        w = w - lr (|w| / |u|) u                   ratio 1 where |w| or |u| is 0

    Rival forms leave the bias correction out (the first release of the authors' TensorFlow code), clip the gradient by
    its global norm first (NVIDIA's FusedLAMB), or limit |w| to 10 (phi); none of that happens here. The decay is
    decoupled from the moments and inside the ratio.

    Nothing is excluded by default; the authors leave BatchNorm and biases without ratio and decay on ImageNet, which
    `param_groups(..., exclude_from_adaptation="bn_bias", exclude_from_decay="bn_bias")` does. As with `LARS`, every
    option lives in `param_groups`, gradients are never modified, norms are float32 at least, and a step reads nothing
    back from an accelerator. GradScaler unscales the gradients and skips a step after an overflow itself.

    Args:
        params: tensors, named tensors or groups.
        lr: learning rate, a number or a tensor; required.
        betas: decay rates of the two moments.
        eps: added to the square root of the second moment.
        weight_decay: wd.
        adapt: False for ratio 1, which makes it AdamW with an undiluted decay.
        maximize: ascend.
    """

    _last: Ratios = ()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = required,  # type: ignore[assignment]  # a sentinel: a group may bring its own
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        adapt: bool = True,
        maximize: bool = False,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": adapt}
        super().__init__(params, {**options, "maximize": maximize})

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; what it does not say comes from the constructor's arguments."""
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        refuse_sharded(self, self.param_groups[-1]["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._last = [
            (group, ws[part], ratios)
            for group, parameters in with_gradients(self)
            for ws in by_kind(parameters)
            for part in portions(ws)
            if (ratios := self._update(ws[part], group)) is not None
        ]
        return loss

    def trust_ratios(self) -> dict[str, float]:
        """Ratios |w| / |u| of the last step by parameter name, without the groups that are not adapted."""
        return labelled(self.param_groups, self._last)

    def _update(self, ws: list[Tensor], group: Group) -> Tensor | None:
        update = self._decayed_direction(ws, group)
        ratios = _ratios(norms(ws), norms(update)) if group["adapt"] else None
        torch._foreach_mul_(update, group["lr"] if ratios is None else (group["lr"] * ratios).unbind())
        torch._foreach_sub_(ws, update)
        return ratios

    def _decayed_direction(self, ws: list[Tensor], group: Group) -> list[Tensor]:
        (beta1, beta2), (ms, vs, steps) = group["betas"], self._moments(ws)
        gs = gradients(ws)
        torch._foreach_mul_(ms, beta1)
        torch._foreach_add_(ms, gs, alpha=(beta1 - 1) if group["maximize"] else (1 - beta1))
        torch._foreach_mul_(vs, beta2)
        torch._foreach_addcmul_(vs, gs, gs, 1 - beta2)
        # One temporary: it is sqrt(v'), then 1 / (sqrt(v') + eps), then u.
        update = [v.to(wide(v.dtype), copy=True) for v in vs]
        torch._foreach_div_(update, [1 - beta2**t for t in steps])
        torch._foreach_sqrt_(update)
        torch._foreach_add_(update, group["eps"])
        torch._foreach_reciprocal_(update)
        torch._foreach_mul_(update, ms)
        torch._foreach_div_(update, [1 - beta1**t for t in steps])
        torch._foreach_add_(update, ws, alpha=group["weight_decay"])
        return update

    def _moments(self, ws: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[int]]:
        states = [self.state[w] for w in ws]
        for w, state in zip(ws, states, strict=True):
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(w), exp_avg_sq=torch.zeros_like(w))
            state["step"] += 1
        return [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [s["step"] for s in states]


def _ratios(w_norm: Tensor, u_norm: Tensor) -> Tensor:
    return torch.where((w_norm == 0) | (u_norm == 0), 1.0, w_norm / u_norm)


def _check(group: Group) -> None:
    for name in ("lr", "eps", "weight_decay"):
        value = group[name]
        if value is not required and not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"{name} is {value}; it must be 0 or more")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas are {group['betas']}; each must be in [0, 1)")
