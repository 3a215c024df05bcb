"""Replace Pillow by pillow-simd, which decodes and resizes JPEGs faster with AVX2.

`python -m dist_lars.pillow_simd` is the last step of an installation: pillow-simd takes the
place of Pillow's files under another name, so whatever installs "pillow" later undoes it, and
`pip check` calls "pillow" missing from then on. Where it cannot be built Pillow stays.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

from dist_lars.build_facts import BuildError, cpu_flags
from dist_lars.build_horovod import cache, cached_wheel, header_folders, pip, store

VERSION = "12.1.1.post0"
COST = "training works; JPEG files are decoded by simplejpeg either way"


def installed() -> bool:
    """Whether pillow-simd is what `import PIL` finds."""
    names = {dist.metadata["Name"].lower() for dist in metadata.distributions()}
    return "pillow-simd" in names and "pillow" not in names


def obstacle() -> str | None:
    """What this machine lacks for it, if anything."""
    if "avx2" not in cpu_flags():
        return "this CPU has no AVX2"
    for header, package in (("jpeglib.h", "libjpeg-dev"), ("zlib.h", "zlib1g-dev")):
        source = f"#include <stdio.h>\n#include <{header}>\n"
        try:
            run = subprocess.run(["cc", "-E", "-xc", "-"], input=source, capture_output=True, text=True)
        except FileNotFoundError:
            return "there is no C compiler (apt install gcc)"
        if run.returncode:
            return f"{header} is missing (apt install {package})"
    return None


def build(folder: Path) -> Path:
    """Compile the wheel for AVX2 and keep it in the cache."""
    with tempfile.TemporaryDirectory(prefix="pillow-simd-") as name:
        work = Path(name)
        cpath = [str(path) for path in header_folders(work)] + [os.environ.get("CPATH", "")]
        env = {**os.environ, "CC": "cc -mavx2", "CPATH": os.pathsep.join(filter(None, cpath))}
        command = ["wheel", "-q", "--no-cache-dir", "--no-deps", "--no-binary=pillow-simd", "-w", name]
        done = subprocess.run([*pip(), *command, f"pillow-simd=={VERSION}"], env=env, capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"it did not build: {done.stderr.strip()[-500:]}")
        folder.mkdir(parents=True, exist_ok=True)
        return store(next(work.glob("*.whl")), folder)


def replace_pillow() -> None:
    """Install the wheel in the place of Pillow; build it first, so that a failure changes nothing."""
    key = f"pillow-simd-{VERSION}-avx2-{sysconfig.get_config_var('SOABI')}"
    wheel = cached_wheel(key, "pillow_simd-*.whl") or build(cache() / key)
    subprocess.run([*pip(), "uninstall", "-qq", "-y", "pillow", "pillow-simd"], check=True)
    subprocess.run([*pip(), "install", "-q", "--no-deps", str(wheel)], check=True)


def main() -> int:
    """Do it where it can be done; say in one line what holds."""
    if installed():
        return 0
    try:
        if reason := obstacle():
            raise BuildError(reason)  # noqa: TRY301
        replace_pillow()
    except (BuildError, OSError) as error:
        print(f"Pillow stays in place of pillow-simd: {error}; {COST}", file=sys.stderr)
    else:
        print(f"pillow-simd {VERSION} decodes images; `pip check` now misses pillow, which is as it should be")
    return 0


if __name__ == "__main__":
    sys.exit(main())
