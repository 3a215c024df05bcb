"""The directory of a run: made, locked, refused when it belongs to another run. For rank 0."""

import time
from pathlib import Path
from typing import IO, Any

from dist_lars import checkpoint
from dist_lars.config import Config, as_flat, flat_yaml, to_yaml
from dist_lars.continuation import differences
from dist_lars.errors import UserError
from dist_lars.locks import lock
from dist_lars.runlog import LINES


def open_run_dir(config: Config) -> tuple[Path, IO[Any]]:
    """Make the run's directory, lock it and refuse another run's; (directory, lock to keep open)."""
    run_dir = Path(config.run_dir or f"runs/{config.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        held = lock_run_dir(run_dir)
        _refuse_another_run(config, run_dir)
    except OSError as e:
        raise _unwritable(run_dir, e) from e
    return run_dir, held


def write_config(config: Config, run_dir: Path) -> None:
    """RUN_DIR/config.yaml: from now on this is the run. Not before its checkpoint is known to fit these options."""
    try:
        checkpoint.write_aside(run_dir / "config.yaml", to_yaml(config).encode())
    except OSError as e:
        raise _unwritable(run_dir, e) from e


def _unwritable(run_dir: Path, error: OSError) -> UserError:
    return UserError(f"cannot write to run directory {run_dir}: {error.strerror}")


def lock_run_dir(run_dir: Path) -> IO[Any]:
    """Hold RUN_DIR/.lock until this process ends, however it ends; refuse when another job holds it."""
    try:
        return lock(run_dir / ".lock")
    except BlockingIOError as e:
        raise UserError(
            f"run directory {run_dir} is in use by another job; wait for it, stop it (touch {run_dir}/STOP), or choose "
            f"another --run_dir"
        ) from e


def _refuse_another_run(config: Config, run_dir: Path) -> None:
    stored = run_dir / "config.yaml"
    if not stored.exists() or not _begun(run_dir):
        return
    different = differences(flat_yaml(stored.read_text(encoding="utf-8"), str(stored)), as_flat(config))
    if different:
        raise UserError(
            f"run directory {run_dir} holds another run ({some(different)}); choose another --run_dir, or give the "
            f"options of {stored} to continue it, or allow the difference: --resume.allow '[{keys(different)}]'"
        )
    if config.resume.start == "never" and checkpoint.find(run_dir):
        raise UserError(
            f"run directory {run_dir} holds a run, and --resume.from never would overwrite it; choose another"
        )


def _begun(run_dir: Path) -> bool:
    """Whether anything was done there: a start that was refused, for a misspelt file say, leaves no run behind."""
    log = run_dir / LINES
    return checkpoint.find(run_dir) is not None or (log.exists() and log.stat().st_size > 0)


def resume_path(config: Config, run_dir: Path) -> tuple[str | None, list[str]]:
    """(the checkpoint to continue from, as `--resume.from` says, None for a fresh start; damaged ones passed over).

    It is a file, for a pointer of a run that still saves may name another one a moment later.
    """
    if config.resume.start == "never":
        return None, []
    own, damaged = checkpoint.newest_good(run_dir)  # a run begun from a checkpoint goes on where it stopped itself
    passed_over = [str(path) for path in damaged]
    if own is not None or config.resume.start == "auto":
        return (str(own) if own else None), passed_over
    return str(checkpoint.file_of(config.resume.start)), passed_over


def some(lines: list[str]) -> str:
    """The first few of many."""
    return "; ".join(lines[:4]) + (f"; and {len(lines) - 4} more" if len(lines) > 4 else "")


def keys(lines: list[str]) -> str:
    """The option names of `differences`."""
    return ", ".join(line.partition(":")[0] for line in lines)
