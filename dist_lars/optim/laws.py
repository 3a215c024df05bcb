"""The published meanings of "LARS", as one table."""

from __future__ import annotations

from dataclasses import dataclass

DENOMINATORS = ("norm_of_sum", "sum_of_norms")
PLACEMENTS = ("inside", "outside")


@dataclass(frozen=True)
class Law:
    """Everything that tells one LARS from another; peak learning rates do not carry over between two of them."""

    denominator: str  #: one of DENOMINATORS
    lr_placement: str  #: one of PLACEMENTS: is the learning rate inside the momentum buffer?
    eps: float  #: added to the denominator
    min_norm: float  #: below this weight norm the ratio is 1
    clip: bool  #: LARC: min(lr, local_lr) takes the place of lr * local_lr
    exclude_from_adaptation: str  #: "none" or "bn_bias", for `param_groups`
    exclude_from_decay: str  #: "none" or "bn_bias", for `param_groups`
    equation: str
    source: str


LAWS = {
    "default": Law(
        "norm_of_sum", "inside", 1e-9, 1e-3, False, "none", "none",
        "local_lr = trust |w| / (|g + wd w| + eps), 1 where |w| < min_norm; v = m v + lr local_lr (g + wd w); w -= v",
        "this package; the ratio of optax.lars and tensorflow/models, the momentum of arXiv:1708.03888",
    ),
    "paper": Law(
        "sum_of_norms", "inside", 0.0, 0.0, False, "none", "none",
        "local_lr = trust |w| / (|g| + wd |w|); v = m v + lr local_lr (g + wd w); w -= v",
        "arXiv:1708.03888, Algorithm 1",
    ),
    "mlperf": Law(
        "sum_of_norms", "inside", 0.0, 0.0, False, "bn_bias", "bn_bias",
        "as paper; BatchNorm and biases: no decay, local_lr = 1",
        "github.com/mlcommons/training, retired_benchmarks/resnet-tf2/tensorflow2/lars_optimizer.py",
    ),
    "outside": Law(
        "sum_of_norms", "outside", 1e-8, 0.0, False, "none", "none",
        "local_lr = trust |w| / (|g| + wd |w| + eps); v = m v + local_lr (g + wd w); w -= lr v",
        "github.com/kakaobrain/torchlars, torchlars/lars.py around torch's SGD; timm's and lightning-bolts' form",
    ),
    "larc": Law(
        "sum_of_norms", "outside", 1e-8, 0.0, True, "none", "none",
        "local_lr = trust |w| / (|g| + wd |w| + eps); v = m v + min(1, local_lr / lr) (g + wd w); w -= lr v",
        "github.com/NVIDIA/apex at 0bfb8300, apex/parallel/LARC.py, clip=True",
    ),
}  # fmt: skip
