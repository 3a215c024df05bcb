"""Checkpoints as files: written aside, flushed to disk, renamed; `latest` and `best` point at them.

Knows files, not ranks. Loading uses `weights_only=True`: a checkpoint cannot run code.
"""

import hashlib
import io
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import torch

from dist_lars.errors import UserError

FORMAT = 1


def write_aside(path: Path, data: bytes) -> None:
    """Replace a file so that readers see the old content or the new one, never a part."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)  # a part of it would only keep a full disk full
        raise


def save(folder: Path, state: dict[str, Any], *, best: bool, keep: int) -> Path:
    """Write FOLDER/step-N.pt for `state["step"]`, then move the pointers, then drop all but `keep` and the best."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{state['step']:09d}.pt"
    write_aside(path, to_bytes(state))
    _sync_folder(folder)  # the rename itself must be on disk before the pointer names it
    write_aside(folder / "latest", path.name.encode())
    if best:
        write_aside(folder / "best", path.name.encode())
    _drop_old(folder, keep)
    return path


COMMENT = b"sha256:"  # then 64 hex digits: the comment field at the very end of a zip file


def to_bytes(state: dict[str, Any]) -> bytes:
    """What torch.save writes, a zip file, with its SHA-256 as the zip's comment: torch.load still reads it."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    plain = buffer.getvalue()
    comment = COMMENT + hashlib.sha256(plain).hexdigest().encode()
    return plain[:-2] + struct.pack("<H", len(comment)) + comment


def verify(data: bytes) -> bool:
    """Whether these are the bytes that `to_bytes` made."""
    size = len(COMMENT) + 64
    plain, length, comment = data[: -size - 2], data[-size - 2 : -size], data[-size:]
    digest = hashlib.sha256(plain + b"\0\0").hexdigest().encode()
    return length == struct.pack("<H", size) and comment == COMMENT + digest


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _drop_old(folder: Path, keep: int) -> None:
    pointed = {pointed_at(folder, "latest"), pointed_at(folder, "best")}
    for path in sorted(folder.glob("step-*.pt"))[:-keep]:
        if path not in pointed:
            path.unlink()
    for leftover in folder.glob(".step-*.pt.*"):  # of a job that was killed while it saved
        leftover.unlink()


POINTERS = ("latest", "best")


def pointed_at(folder: Path, pointer: str) -> Path | None:
    """The checkpoint that `latest` or `best` names; None when there is none yet."""
    try:
        return folder / (folder / pointer).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None


def find(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run; None when it has not saved one yet."""
    return pointed_at(run_dir / "checkpoints", "latest")


def newest_good(run_dir: Path) -> tuple[Path | None, list[Path]]:
    """(the newest checkpoint that verifies, newer ones that are damaged, or that the disk does not give back)."""
    damaged: list[Path] = []
    for path in sorted((run_dir / "checkpoints").glob("step-*.pt"), reverse=True):
        try:
            good = verify(path.read_bytes())
        except OSError:
            good = False
        if good:
            return path, damaged
        damaged.append(path)
    return None, damaged


def file_of(path: str | Path) -> Path:
    """The .pt file that a path means: itself, a run directory's latest, or RUN_DIR/checkpoints/latest or best."""
    path = Path(path)
    if path.is_dir():
        found = find(path)
        if found is None:
            raise UserError(f"{path} holds no checkpoint; expected {path}/checkpoints/latest, or name a .pt file")
        path = found
    elif path.name in POINTERS:
        path = pointed_at(path.parent, path.name) or path
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    return path


def load(path: str | Path) -> dict[str, Any]:
    """The saved state, on the CPU; raises `UserError` for what is not a whole checkpoint of ours.

    `path` is what `file_of` takes.
    """
    path = file_of(path)
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UserError(f"checkpoint {path} cannot be read: {e.strerror}") from e
    if not verify(data):
        raise UserError(f"checkpoint {path} is damaged, or not one of ours: its checksum does not hold")
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as e:  # whole, but of things that a checkpoint never holds
        raise UserError(f"checkpoint {path} cannot be read: {str(e).splitlines()[0]}") from e
    if state.get("format") != FORMAT:
        raise UserError(f"{path} has format {state.get('format')}, this version of dist_lars reads {FORMAT}")
    return state


def evaluated(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint that the run evaluated: their running average where it kept one."""
    return state.get("ema") or state["model"]


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights in a file: the evaluated ones of a checkpoint of ours (or run directory), or a plain state_dict."""
    path = Path(path)
    if path.is_dir() or path.name in POINTERS:
        return evaluated(load(path))
    if not path.is_file():
        raise UserError(f"model.weights: {path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch's reader may raise anything on bytes that are none of its own
        raise UserError(f"model.weights: {path} cannot be read: {str(e).splitlines()[0]}") from e
    if isinstance(state, dict) and "format" in state:
        return evaluated(load(path))
    if not (isinstance(state, dict) and state and all(isinstance(v, torch.Tensor) for v in state.values())):
        raise UserError(f"model.weights: {path} is neither a checkpoint of ours nor a state_dict {{name: tensor}}")
    return state


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], origin: str) -> None:
    """`load_state_dict` that names what does not fit."""
    # BatchNorm's counter steers nothing here, and files of old PyTorch (torchvision's among them) lack it.
    counters = {k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}
    weights = counters | weights
    wanted = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    given = {k: tuple(v.shape) for k, v in weights.items()}
    wrong = [k for k in {**wanted, **given} if wanted.get(k) != given.get(k)]
    if wrong:
        k = wrong[0]
        raise UserError(
            f"{origin} is of another model: {len(wrong)} of {len(wanted)} tensors differ, first {k}: "
            f"{given.get(k, 'absent')} in the checkpoint, {wanted.get(k, 'absent')} in the model"
        )
    model.load_state_dict(weights)
