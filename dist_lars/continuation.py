"""Which options a run may change when it continues."""

from typing import Any

from dist_lars.config import LEAVES, plain

# Keys that may differ when a run continues: they change where it runs and what it prints, not what it computes.
MAY_DIFFER_ON_RESUME = (
    "run_dir", "name", "max_time", "data.path", "data.val", "data.workers", "data.on_error",
    "data.max_skipped", "data.stage", "data.cache_val", "device", "resume.", "guard.", "log.",
    "comm.backend", "comm.bucket_mb", "comm.cycle_ms", "comm.fusion_mb", "comm.cache", "comm.hierarchical",
)  # fmt: skip


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines `key: old -> new` for every option that matters to a resumed run and differs; `resume.allow` is excused.

    An option that one side does not know yet counts as its default.
    """
    excused = (*MAY_DIFFER_ON_RESUME, *new.get("resume.allow", ()))
    keys = [k for k in {**old, **new} if not k.startswith(excused)]
    defaults = {k: leaf.default for k, leaf in LEAVES.items()}
    old, new = plain(defaults | old), plain(defaults | new)
    pairs = [(k, old.get(k, "(absent)"), new.get(k, "(absent)")) for k in keys]
    return [f"{k}: {a} -> {b}" for k, a, b in pairs if a != b]
