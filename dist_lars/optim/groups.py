"""Parameter groups by the type of the module that owns each parameter, never by its name or its shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

EXCLUSIONS: dict[str, frozenset[str]] = {"none": frozenset(), "bn_bias": frozenset({"norm", "bias"})}
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    exclude_from_adaptation: str = "none",
    exclude_from_decay: str = "none",
    bias_lr_scale: float = 1.0,
    roles: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Put every parameter of `model` in exactly one group, and refuse a model where that is not possible.

    Each parameter has one role: `norm` (owned by a normalisation layer, its bias included), `bias` (a bias of any
    other module) or `weight`. Excluding `"bn_bias"` means the roles norm and bias: from adaptation they get ratio 1,
    from decay weight_decay 0, independently of one another. By default nothing is excluded, as in arXiv:1708.03888;
    MLPerf excludes both from both. `bias_lr_scale` multiplies the learning rate of the role bias (a net without
    BatchNorm under a peak rate of 10 needs it); the caller writes `group["lr"] = lr * group["lr_scale"]`.

    The groups hold plain values and the parameters' names, so they survive `torch.save`, `weights_only` loading and
    Horovod's rebuild of the optimizer from its groups.

    Args:
        model: the bare model (names of a compiled one carry its prefix).
        weight_decay: decay of every parameter that is not excluded from it.
        exclude_from_adaptation: "none" or "bn_bias".
        exclude_from_decay: "none" or "bn_bias".
        bias_lr_scale: learning rate of biases relative to the others.
        roles: names of parameters whose role the module type does not tell -> "norm", "bias" or "weight".

    Raises:
        ValueError: naming the parameters that are shared between modules, or whose role is unknown.
    """
    unadapted = _roles_of("exclude_from_adaptation", exclude_from_adaptation)
    undecayed = _roles_of("exclude_from_decay", exclude_from_decay)
    groups: dict[tuple[bool, float, float], list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter, role in _classified(model, roles or {}):
        decay = 0.0 if role in undecayed else float(weight_decay)
        scale = float(bias_lr_scale) if role == "bias" else 1.0
        groups[role not in unadapted, decay, scale].append((name, parameter))
    return [_group(named, *key) for key, named in groups.items()]


def _group(named: list[tuple[str, nn.Parameter]], adapt: bool, weight_decay: float, lr_scale: float) -> dict[str, Any]:
    names, parameters = zip(*named, strict=True)
    settings = {"adapt": adapt, "weight_decay": weight_decay, "lr_scale": lr_scale}
    return {"params": list(parameters), "param_names": list(names), **settings}


def _roles_of(option: str, value: str) -> frozenset[str]:
    if value not in EXCLUSIONS:
        raise ValueError(f"{option} is {value!r}; known: {', '.join(EXCLUSIONS)}")
    return EXCLUSIONS[value]


def _classified(model: nn.Module, given: Mapping[str, str]) -> list[tuple[str, nn.Parameter, str]]:
    owned = list(_owned(model))
    _refuse_shared(owned)
    _refuse_strangers(given, {name for name, _, _ in owned})
    found = [(name, parameter, given.get(name) or _role(name, parameter, owner)) for name, parameter, owner in owned]
    unknown = [name for name, _, role in found if role not in ("norm", "bias", "weight")]
    if unknown:
        raise ValueError(
            f"the module type does not tell the role of {', '.join(unknown)};"
            f" give it, for example roles={{{unknown[0]!r}: 'weight'}} (or 'norm', 'bias')"
        )
    return found


def _owned(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield f"{prefix}.{name}".lstrip("."), parameter, module


def _role(name: str, parameter: nn.Parameter, owner: nn.Module) -> str:
    attribute = name.rpartition(".")[2]
    if isinstance(owner, NORMS):
        return "norm"
    if attribute == "bias" or (isinstance(owner, nn.RNNBase | nn.MultiheadAttention) and "bias" in attribute):
        return "bias"
    # A bare vector of a module of the user's own may be a scale, a shift or a token: guessing would be silent.
    return "weight" if attribute == "weight" or parameter.dim() > 1 else "unknown"


def _refuse_shared(owned: list[tuple[str, nn.Parameter, nn.Module]]) -> None:
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter, _ in owned:
        names[id(parameter)].append(name)
    shared = [" = ".join(same) for same in names.values() if len(same) > 1]
    if shared:
        raise ValueError(f"one tensor under several names has no single role: {'; '.join(shared)}")


def _refuse_strangers(given: Mapping[str, str], known: set[str]) -> None:
    strangers = sorted(set(given) - known)
    if strangers:
        raise ValueError(f"roles names parameters that the model does not have: {', '.join(strangers)}")
