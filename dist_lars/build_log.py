"""The log of a long build: progress while it grows, and the likely cause when it ends badly."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

CAUSES = (
    (r"No space left on device|Disk quota exceeded", "the disk is full: free 1 GB, or point TMPDIR elsewhere"),
    (
        r"Killed signal|Killed\b.*cc1plus|virtual memory exhausted|Cannot allocate memory",
        "the compiler ran out of memory: try again with MAKEFLAGS=-j1 (it takes up to 2 GB a job)",
    ),
    (r"Python\.h: No such file", "the headers of Python are missing: apt install python3-dev"),
    (
        r"C\+\+\d+ or later compatible compiler|unrecognized command.line option .-std|CXX_STANDARD is set to",
        "this compiler does not know the C++ standard that torch asks for: C++20 needs GCC 11 or Clang 14",
    ),
    (r"No CMAKE_CXX_COMPILER could be found", "there is no C++ compiler: apt install g++, or set CXX"),
    (r"Could NOT find MPI", "CMake cannot use this MPI: does MPI_HOME/bin/mpicxx compile a program?"),
    (r"Could NOT find NCCL", "NCCL's headers and library were not found: set HOROVOD_NCCL_HOME"),
    (r"Could NOT find CUDAToolkit|No CUDA toolset|nvcc: not found", "no CUDA toolkit: set HOROVOD_CUDA_HOME"),
    (r"does not support CUDA", "GPU operations were asked for, but this torch is a CPU build"),
    (r"No module named 'torch'|Could NOT find Pytorch", "torch is not installed in this environment"),
    (r"CMake [\d.]+ or higher is required", "CMake is too old: pip install cmake"),
)


def run_logged(command: list[str], env: dict[str, str], log: Path) -> int:
    """Run the build with its output in a file; show the percentage that make reports."""
    start, shown, live = time.monotonic(), -10, sys.stderr.isatty()
    with log.open("w") as file, subprocess.Popen(
        command, env=env, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:  # fmt: skip
        assert process.stdout
        for line in process.stdout:
            file.write(line)
            percent = re.match(r"\s*\[\s*(\d+)%\]", line)
            if percent and int(percent[1]) >= shown + (1 if live else 10):
                shown = int(percent[1])
                end = "\r" if live else "\n"
                print(f"building Horovod: {shown:3} %, {time.monotonic() - start:3.0f} s", end=end, file=sys.stderr)
    print(end="\n" if live else "", file=sys.stderr)
    return process.returncode


def explain(log: str) -> str:
    """The likely cause of a failed build and the lines of its log that show it.

    The last lines seldom do: after the error make and pip go on for a hundred lines.
    """
    lines = [line[:300] for line in log.splitlines() if line.strip()]
    pattern, cause = next(
        ((pattern, cause) for pattern, cause in CAUSES if re.search(pattern, log)),
        (r"(?i)\b(fatal )?error\b( at .*)?:|\*\*\*", "not a known one: read the log"),
    )
    at = next((i for i, line in enumerate(lines) if re.search(pattern, line)), len(lines))
    shown = lines[max(0, at - 12) : at + 13]
    return "\n".join(["Horovod's build failed:", *shown, "", f"Likely cause: {cause}"])
