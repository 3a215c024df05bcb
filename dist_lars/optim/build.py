"""One way to make any of the optimizers, from plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch.optim import Optimizer

from dist_lars.optim.lamb import LAMB
from dist_lars.optim.lars import LARS
from dist_lars.optim.laws import LAWS

# torch's fused kernels: on one CPU core its fused SGD takes 0.4 of the time of its foreach SGD
# (benchmarks/records/optimizer.json), and they exist for every device that trains.
_MAKERS: dict[str, Callable[..., Optimizer]] = {
    "lars": lambda groups, *, law, momentum, nesterov, trust_coefficient, eps, min_norm, **_: LARS(
        groups, momentum=momentum, nesterov=nesterov, trust_coefficient=trust_coefficient, **_law(law, eps, min_norm)
    ),
    "lamb": lambda groups, *, betas, eps, **_: LAMB(groups, betas=betas, eps=_or(eps, 1e-6)),
    "sgd": lambda groups, **_: torch.optim.SGD(groups, fused=True),
    "sgd_momentum": lambda groups, *, momentum, nesterov, **_: torch.optim.SGD(
        groups, momentum=momentum, nesterov=nesterov, fused=True
    ),
    "nesterov": lambda groups, *, momentum, **_: torch.optim.SGD(groups, momentum=momentum, nesterov=True, fused=True),
    "adam": lambda groups, *, betas, eps, **_: torch.optim.Adam(groups, betas=betas, eps=_or(eps, 1e-8), fused=True),
    "adamw": lambda groups, *, betas, eps, **_: torch.optim.AdamW(groups, betas=betas, eps=_or(eps, 1e-8), fused=True),
}
NAMES = tuple(_MAKERS)


def build(
    name: str,
    groups: Iterable[Mapping[str, Any]],
    *,
    lr: float | torch.Tensor,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    law: str = "default",
    trust_coefficient: float = 0.001,
    eps: float | None = None,
    min_norm: float | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    nesterov: bool = False,
) -> Optimizer:
    """Build the optimizer `name` over `groups` (see `param_groups`), with every hyper-parameter in its groups.

    `sgd` is plain, `sgd_momentum` and `nesterov` add momentum; `adam` adds the decay to the gradient (L2) and `adamw`
    decouples it. `law` and `trust_coefficient` speak to LARS only, `betas` to LAMB, Adam and AdamW only. A group's
    own values win over the arguments, and its `lr_scale` multiplies `lr`. What a law excludes is a matter of the
    groups: give `LAWS[law].exclude_from_adaptation` and `.exclude_from_decay` to `param_groups`.

    Args:
        name: one of `NAMES`.
        groups: dicts with "params" and, as wished, "weight_decay", "adapt", "lr_scale", "param_names".
        lr: learning rate; whoever owns the schedule writes it into the groups before each step.
        momentum: of LARS and SGD.
        weight_decay: of the groups that do not bring their own.
        law: one of `LAWS`.
        trust_coefficient: of LARS.
        eps: None for the law's or the optimizer's own.
        min_norm: of LARS, the weight norm below which the ratio is 1; None for the law's own.
        betas: decay rates of the two moments.
        nesterov: look-ahead for LARS and `sgd_momentum`.
    """
    make = _MAKERS[_known("optimizer", name, NAMES)]
    full = [
        {**group, "lr": lr * group.get("lr_scale", 1.0), "weight_decay": group.get("weight_decay", weight_decay)}
        for group in groups
    ]
    return make(
        full,
        law=_known("law", law, LAWS),
        momentum=momentum,
        nesterov=nesterov,
        trust_coefficient=trust_coefficient,
        eps=eps,
        min_norm=min_norm,
        betas=betas,
    )


def _law(name: str, eps: float | None, min_norm: float | None) -> dict[str, Any]:
    law = LAWS[name]
    form = {"denominator": law.denominator, "lr_placement": law.lr_placement, "clip": law.clip}
    return {**form, "min_norm": _or(min_norm, law.min_norm), "eps": _or(eps, law.eps)}


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value  # not `value or otherwise`: an eps of 0 stays 0


def _known(what: str, name: str, names: Iterable[str]) -> str:
    if name in names:
        return name
    near = get_close_matches(str(name), list(names), n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"unknown {what} {name!r}{hint}; known: {', '.join(names)}")
