"""LARS and LAMB once more, in NumPy float64, one tensor at a time and one line per line of the equations.

Slow, and shares nothing with the package: what the multi-tensor code must equal.
"""

import numpy as np

Array = np.ndarray


class LarsOracle:
    """One tensor under LARS; the keywords are those of `dist_lars.optim.LARS`."""

    def __init__(
        self,
        w: Array,
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
        self.w = np.array(w, dtype=np.float64)
        self.v = np.zeros_like(self.w)
        self.m, self.wd, self.trust, self.eps, self.min_norm = momentum, weight_decay, trust_coefficient, eps, min_norm
        self.denominator, self.lr_placement = denominator, lr_placement
        self.nesterov, self.adapt, self.clip, self.sign = nesterov, adapt, clip, -1.0 if maximize else 1.0

    def rate(self, g: Array, d: Array, lr: float) -> float:
        """lr * local_lr, or what stands in its place."""
        w_norm, g_norm, d_norm = (float(np.linalg.norm(x.ravel())) for x in (self.w, g, d))
        of_sum = self.denominator == "norm_of_sum"
        if not self.adapt or w_norm < self.min_norm or w_norm == 0 or (d_norm if of_sum else g_norm) == 0:
            return lr
        local_lr = self.trust * w_norm / ((d_norm if of_sum else g_norm + self.wd * w_norm) + self.eps)
        return min(lr, local_lr) if self.clip else lr * local_lr

    def step(self, g: Array, lr: float) -> Array:
        g = self.sign * np.asarray(g, dtype=np.float64)
        d = g + self.wd * self.w
        rate = self.rate(g, d, lr)
        term = rate * d if self.lr_placement == "inside" else (rate / lr) * d
        self.v = self.m * self.v + term
        move = term + self.m * self.v if self.nesterov else self.v
        self.w = self.w - (move if self.lr_placement == "inside" else lr * move)
        return self.w


class LambOracle:
    """One tensor under LAMB; the keywords are those of `dist_lars.optim.LAMB`."""

    def __init__(
        self,
        w: Array,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        adapt: bool = True,
        maximize: bool = False,
    ) -> None:
        self.w = np.array(w, dtype=np.float64)
        self.m, self.v, self.t = np.zeros_like(self.w), np.zeros_like(self.w), 0
        self.betas, self.eps, self.wd, self.adapt, self.sign = (
            betas,
            eps,
            weight_decay,
            adapt,
            -1.0 if maximize else 1.0,
        )

    def step(self, g: Array, lr: float) -> Array:
        g = self.sign * np.asarray(g, dtype=np.float64)
        beta1, beta2 = self.betas
        self.t += 1
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g * g
        m_hat = self.m / (1 - beta1**self.t)
        v_hat = self.v / (1 - beta2**self.t)
        u = m_hat / (np.sqrt(v_hat) + self.eps) + self.wd * self.w
        w_norm, u_norm = np.linalg.norm(self.w.ravel()), np.linalg.norm(u.ravel())
        ratio = w_norm / u_norm if self.adapt and w_norm > 0 and u_norm > 0 else 1.0
        self.w = self.w - lr * ratio * u
        return self.w
