"""LARS: layer-wise adaptive rate scaling (You, Gitman, Ginsburg, arXiv:1708.03888)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import compress
from operator import not_
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, required

from dist_lars.optim import foreach, fused
from dist_lars.optim.eager import EagerOptimizer
from dist_lars.optim.laws import DENOMINATORS, PLACEMENTS
from dist_lars.optim.tensors import (
    Group,
    LossScale,
    Ratios,
    by_kind,
    gradients,
    in_memory_order,
    is_dense,
    labelled,
    refuse_sharded,
    same_order,
    with_gradients,
)


class LARS(EagerOptimizer):
    r"""SGD with momentum whose every tensor w ("layer") moves in proportion to its own norm.

    The default law, for the gradient g, decay wd, momentum m and learning rate lr of the tensor's group::

        g'       = g + wd w
        local_lr = trust_coefficient |w| / (|g'| + eps)        1 where |w| < min_norm
        v        = m v + lr local_lr g'
        w        = w - v

    Public code calls several laws by this name. Peak learning rates do not carry over between them: while the rate
    warms up, lr outside the momentum takes steps up to 1.6 times larger.

    ============ ========================== ========= ======= ======== ========== ======================================
    `law`        denominator                lr        eps     min_norm excluded   source
    ============ ========================== ========= ======= ======== ========== ======================================
    default      ``|g + wd w| + eps``       inside    1e-9    1e-3     nothing    ratio of optax.lars, momentum of paper
    paper        ``|g| + wd |w|``           inside    0       0        nothing    arXiv:1708.03888, Algorithm 1
    mlperf       ``|g| + wd |w|``           inside    0       0        BN, biases mlcommons/training lars_optimizer.py
    outside      ``|g| + wd |w| + eps``     outside   1e-8    0        nothing    kakaobrain/torchlars, timm
    larc         ``|g| + wd |w| + eps``     outside   1e-8    0        nothing    NVIDIA/apex LARC.py, clip=True
    ============ ========================== ========= ======= ======== ========== ======================================

    ``denominator="sum_of_norms"`` (paper, MLPerf) takes ``|g| + wd |w| + eps`` where the default takes the norm of the
    sum. ``lr_placement="outside"`` (timm, torchlars, apex) is ``v = m v + local_lr g'; w -= lr v`` where the default
    has lr inside v. ``clip=True`` (LARC) puts ``min(lr, local_lr)`` in the place of ``lr local_lr``.

    Nothing is excluded by default: BatchNorm and biases are adapted and decayed like the rest. A group with
    ``adapt=False`` has ratio 1 (then the law is torch's SGD at learning rate lr), one with ``weight_decay=0`` has no
    decay, and the two are independent: a decay of 0 does not switch the adaptation off. `param_groups` makes the
    usual groups. The ratio is also 1 where its fraction means nothing, at |w| = 0 or where the norm that the
    denominator starts from (|g'|, or |g|) is 0; the decay still acts there.

    Every option lives in `param_groups`, so the optimizer survives `type(opt)(opt.param_groups)`, which is how
    `horovod.torch.DistributedOptimizer` rebuilds it. Norms are taken in float32 at least. Gradients are never modified.
    Sharded parameters (DTensor) are refused, for their norms would need the other ranks. A step reads nothing back from
    an accelerator, and needs one portion of temporary memory, no larger than the largest tensor. Under
    `torch.amp.GradScaler` it unscales by itself. Momentum is allocated with the group, so that code which takes a blind
    step to fill an empty state (`horovod.torch.broadcast_optimizer_state`) has no reason to.

    Args:
        params: tensors, named tensors or groups.
        lr: learning rate, a number or a tensor; required, because published rates run from 1 to 40.
        momentum: m; 0 keeps no buffer.
        weight_decay: wd, L2 decay that is part of g'.
        trust_coefficient: the paper's eta.
        eps: added to the denominator.
        min_norm: tensors with a smaller weight norm have ratio 1.
        denominator: "norm_of_sum" or "sum_of_norms".
        lr_placement: "inside" or "outside" the momentum.
        nesterov: step by ``(gradient term) + m v`` in place of v.
        adapt: False for ratio 1.
        clip: LARC.
        maximize: ascend, with the decay still pulling towards zero.
    """

    # GradScaler then leaves its scale and overflow flag on the optimizer and the gradients as they are.
    _step_supports_amp_scaling = True
    _last: Ratios = ()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = required,  # type: ignore[assignment]  # a sentinel: a group may bring its own
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        trust_coefficient: float = 0.001,
        eps: float = 1e-9,
        min_norm: float = 1e-3,
        denominator: str = "norm_of_sum",
        lr_placement: str = "inside",
        nesterov: bool = False,
        adapt: bool = True,
        clip: bool = False,
        maximize: bool = False,
    ) -> None:
        given = dict(locals())  # a copy: what a debugger reads changes the original under Python 3.12
        options = {k: v for k, v in given.items() if k not in ("self", "params", "__class__")}
        super().__init__(params, options)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; what it does not say comes from the constructor's arguments."""
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        refuse_sharded(self, group["params"])
        for p in group["params"]:
            if group["momentum"] and p.requires_grad:
                self._velocity(p)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = LossScale.of(self)
        self._last = [
            (group, ws, ratios)
            for group, parameters in with_gradients(self)
            for ws in by_kind(parameters)
            for ws, ratios in self._update(ws, group, scale)
        ]
        return loss

    def trust_ratios(self) -> dict[str, float]:
        """Ratios of the last step by parameter name; this waits for the device, the step itself does not.

        A ratio is what multiplies the group's learning rate: `local_lr`, or with `clip` min(1, local_lr / lr). Tensors
        of groups with `adapt=False` are left out. Parameters without a name are called by group and place.
        """
        return labelled(self.param_groups, self._last)

    def _velocity(self, w: Tensor) -> Tensor:
        v: Tensor | None = self.state[w].get("momentum_buffer")
        if v is None:
            v = self.state[w]["momentum_buffer"] = torch.zeros_like(w)
        elif not _follows(v, w):  # the model changed its memory format, device or dtype after the optimizer was made
            v = self.state[w]["momentum_buffer"] = torch.empty_like(w).copy_(v)
        return v

    def _update(self, ws: list[Tensor], group: Group, scale: LossScale) -> Iterator[tuple[list[Tensor], Tensor]]:
        fusible = fused.suits_kind(ws[0]) and scale.idle and not group["nesterov"]
        fits = [fusible and fused.suits_layout(w, g) for w, g in zip(ws, gradients(ws), strict=True)]
        quick, rest = list(compress(ws, fits)), list(compress(ws, map(not_, fits)))
        if quick and (ratios := self._fused(quick, group)) is not None:
            yield quick, ratios
        if rest and (ratios := self._foreach(rest, group, scale)) is not None:
            yield rest, ratios

    def _fused(self, parameters: list[Tensor], group: Group) -> Tensor | None:
        ws, gs = _flat(parameters), _flat(gradients(parameters))
        vs = _flat([self._velocity(p) for p in parameters]) if group["momentum"] else []
        ratios = _ratios(*fused.measure(ws, gs, group), group) if group["adapt"] else None
        fused.update(ws, gs, vs, [1.0] * len(ws) if ratios is None else ratios.tolist(), group)
        return ratios

    def _foreach(self, ws: list[Tensor], group: Group, scale: LossScale) -> Tensor | None:
        gs = gradients(ws)
        vs = [self._velocity(w) for w in ws] if group["momentum"] else []
        ratios = _ratios(*foreach.measure(ws, gs, group, scale), group) if group["adapt"] else None
        foreach.update(ws, gs, vs, ratios, group, scale)
        return ratios


def _flat(tensors: list[Tensor]) -> list[Tensor]:
    return [in_memory_order(t) for t in tensors]


def _ratios(w_norm: Tensor, x_norm: Tensor, group: Group) -> Tensor:
    decay = group["weight_decay"] * w_norm if group["denominator"] == "sum_of_norms" else 0.0
    ratio = group["trust_coefficient"] * w_norm / (x_norm + decay + group["eps"])
    if group["clip"]:
        ratio = (ratio / group["lr"]).clamp(max=1.0)
    meaningless = (w_norm < group["min_norm"]) | (w_norm == 0) | (x_norm == 0)
    return torch.where(meaningless, 1.0, ratio)


def _follows(v: Tensor, w: Tensor) -> bool:
    same = v.dtype == w.dtype and v.device == w.device
    return same and (same_order(v, w) or not is_dense(w))


def _check(group: Group) -> None:
    for name, known in (("denominator", DENOMINATORS), ("lr_placement", PLACEMENTS)):
        if group[name] not in known:
            raise ValueError(f"{name} is {group[name]!r}; known: {', '.join(known)}")
    for name in ("lr", "momentum", "weight_decay", "trust_coefficient", "eps", "min_norm"):
        value = group[name]
        if value is not required and not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"{name} is {value}; it must be 0 or more")
    if group["nesterov"] and group["momentum"] == 0:
        raise ValueError("nesterov needs a momentum above 0")
