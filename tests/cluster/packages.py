"""Debian packages that a test needs: installed where they are missing, without starting their daemons."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
POLICY = Path("/usr/sbin/policy-rc.d")
# A machine that has just started may be updating itself.
APT = ("apt-get", "-o", "DPkg::Lock::Timeout=300")


def obstacle(programs: Mapping[str, str]) -> str | None:
    """Why these programs cannot be had, given as {program or file: its package}; None when all of them are there."""
    missing = _missing(programs)
    if not missing:
        return None
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return f"needs root and apt-get, or: apt install {' '.join(missing)}"
    try:
        _install(missing)
    except subprocess.CalledProcessError as e:
        return f"apt-get install {' '.join(missing)}: {(e.stdout or '').strip()[-500:]}"
    return f"still missing: {', '.join(_missing(programs))}" if _missing(programs) else None


def _missing(programs: Mapping[str, str]) -> list[str]:
    absent = {
        package for what, package in programs.items() if not (Path(what).exists() or shutil.which(what, path=PATH))
    }
    return sorted(absent)


def _install(packages: list[str]) -> None:
    ours = not POLICY.exists()
    if ours:  # apt asks this file whether it may start a daemon; 101 is no
        POLICY.write_text("#!/bin/sh\nexit 101\n")
        POLICY.chmod(0o755)
    try:
        words = [*APT, "install", "-y", "-q", "--no-install-recommends", *packages]
        if _apt(words).returncode:  # lists that are absent or old
            _apt([*APT, "update", "-q"]).check_returncode()
            _apt(words).check_returncode()
    finally:
        if ours:
            POLICY.unlink()


def _apt(words: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        words, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=900,
    )  # fmt: skip
