"""What the workers of parallel tests share."""

import json
import os
from pathlib import Path
from typing import Any

from dist_lars import comm as ranks


def join(deterministic: bool = False) -> ranks.Comm:
    """The ranks of this job, through the backend that the test asked for."""
    name = os.environ.get("DIST_LARS_TEST_BACKEND", "horovod")
    return ranks.start(cpu=True, backend=ranks.Backend(name, deterministic))


def finish(rank: int, result: dict[str, Any]) -> None:
    """Hand this rank's result to the test that launched it."""
    (Path(os.environ["DIST_LARS_TEST_OUT"]) / f"rank{rank}.json").write_text(json.dumps(result))
