"""Images without files: random pixels for speed, handwritten digits for a first run."""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from dist_lars.errors import UserError

POOL = 64  # distinct random images: drawing one costs more than copying it


@dataclass(frozen=True)
class SyntheticImages:
    """`n` random images of `classes` classes; the same for any rank, worker and epoch."""

    n: int
    classes: int
    size: int
    seed: int
    on_error: ClassVar[str] = "fail"  # there are no files that could be broken
    max_skipped: ClassVar[int] = 0
    remember: ClassVar[bool] = False

    def __post_init__(self) -> None:
        rng = np.random.RandomState([self.seed & 0xFFFFFFFF, self.seed >> 32])
        pool = rng.randint(0, 256, (min(POOL, self.n), self.size, self.size, 3), dtype=np.uint8)
        object.__setattr__(self, "pool", pool)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, int]:
        i = key[1]
        return self.pool[i % len(self.pool)], i % self.classes  # type: ignore[attr-defined]


def digits_folder(cache: str, size: int) -> str:
    """Write scikit-learn's 1,797 handwritten digits once as CACHE/digits-SIZE/{train,val}/CLASS/*.jpg; its path."""
    target = Path(cache) / f"digits-{size}"
    if target.is_dir():
        return str(target)
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise UserError("the handwritten digits come with scikit-learn: pip install 'dist_lars[quickstart]'") from e
    digits = load_digits()
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=target.name, dir=target.parent))
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "val" if i >= 1500 else "train"
        folder = aside / split / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.uint8(pixels * (255 / 16))).resize((size, size), Image.Resampling.BICUBIC)
        image.save(folder / f"{i:04d}.jpg", quality=95)
    aside.chmod(0o755)
    try:
        aside.rename(target)
    except OSError:  # another job was faster: its folder is as good
        shutil.rmtree(aside)
        if not target.is_dir():
            raise
    return str(target)


def cache_dir() -> str:
    """Where things made once are kept: $DIST_LARS_CACHE, else dist_lars below the user's cache folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return os.environ.get("DIST_LARS_CACHE") or str(base / "dist_lars")
