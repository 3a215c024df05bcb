"""Loss and hits as sums and exact counts, kept on the device until somebody asks."""

import torch
from torch.nn import functional

Sums = dict[str, float]


class Counts:
    """Sums over images: loss (float64), top-1 and top-5 hits, images. Adding never waits for the device."""

    NAMES = ("loss", "top1", "top5", "count")

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """`loss` is the mean over the batch, `logits` [N, classes], `labels` int64 [N]."""
        n = len(labels)
        best = logits.detach().topk(min(5, logits.shape[1])).indices == labels[:, None]
        self.sums[0] += loss.detach().double() * n
        self.sums[1] += best[:, 0].sum()
        self.sums[2] += best.sum()
        self.sums[3] += n

    def take(self) -> Sums:
        """The sums so far as Python numbers (waits for the device), and start again from zero."""
        values = dict(zip(self.NAMES, self.sums.tolist(), strict=True))
        self.sums.zero_()
        return values


def means(sums: Sums) -> dict[str, float]:
    """{"loss", "top1", "top5"} per image (top-k in percent), and the count they are means of."""
    n = sums["count"]
    if n == 0:
        return {"loss": float("nan"), "top1": float("nan"), "top5": float("nan"), "count": 0}
    return {
        "loss": sums["loss"] / n,
        "top1": 100 * sums["top1"] / n,
        "top5": 100 * sums["top5"] / n,
        "count": int(n),
    }


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Mean cross-entropy in at least float32: half precision loses small losses.

    `smoothing` s gives the true class 1 - s + s / K of the label and every other of the K classes s / K (Szegedy et al.
    2015, arXiv 1512.00567, section 7). The rival convention leaves the true class 1 - s and the others s / (K - 1).
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(wide, labels, label_smoothing=smoothing)
