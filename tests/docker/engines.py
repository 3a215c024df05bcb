"""The image of docker/Dockerfile, built and run by what this machine has: Docker, Podman, or buildah without an engine.

    engine = engines.find()            # NoEngine: why there is none
    engine.build()
    engine.run("python", "-m", "dist_lars.doctor", user="1234")

buildah needs no daemon and no registry: it builds in a chroot, as root, and its base image is bootstrapped from
Debian's packages under the name that the Dockerfile asks for. It keeps its layers in ~/.cache/dist_lars/docker;
`make clean-docker` removes them.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dist_lars.build_horovod import cache
from tests.cluster import packages
from tests.conftest import ROOT, Finished

TAG = "localhost/dist_lars:test"
BASE = "docker.io/library/debian:bookworm-slim"
ROOM = 30e9  # bytes that the layers of earlier builds may take before all are thrown away
NEEDED = 20e9  # bytes that a build from nothing takes on its way; 13 GB stay
MINUTES = 40  # for torch from a slow index, and Horovod's compilation
PROGRAMS = {"buildah": "buildah", "debootstrap": "debootstrap"}


class NoEngine(Exception):
    """Why no image can be built here."""


class Client:
    """`docker` or `podman` with a working engine behind it."""

    def __init__(self, program: str) -> None:
        self.program = program

    def build(self) -> str:
        """Build the image and return what was printed."""
        return call(self.program, "build", "-t", TAG, "-f", "docker/Dockerfile", ".").stdout

    def run(self, *command: str, user: str | None = None, mounts: Sequence[Path] = (), timeout: float = 600,
            **env: str) -> Finished:  # fmt: skip
        """A command in a fresh container; `mounts` appear where they lie here."""
        words = [self.program, "run", "--rm", "--init", "--shm-size=1g"]
        words += [f"--user={user}:{user}"] if user else []
        words += [f"--volume={path}:{path}" for path in mounts] + [f"--env={k}={v}" for k, v in env.items()]
        return call(*words, TAG, *command, timeout=timeout, check=False)

    def close(self) -> None:
        """Nothing is left: each container is removed as it ends, and the layers are the user's own cache."""


class Buildah:
    """No engine: chroot isolation, as root."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.words = ["buildah", f"--root={folder}/store", f"--runroot={folder}/run"]
        self.containers: list[str] = []

    def build(self) -> str:
        """Build the image and return what was printed."""
        if folder_size(self.folder) > ROOM or free(self.folder) < NEEDED:
            self.clean()
        (self.folder / "wheels").mkdir(parents=True, exist_ok=True)
        if self("inspect", "--type=image", BASE, check=False).returncode:
            self._bootstrap()
        self("rm", "--all", check=False)  # of a build that was interrupted
        options = (
            "--isolation=chroot",
            "--network=host",
            "--uts=host",
            "--pull-never",
            "--layers",
            # what an interrupted build compiled, and one before a change that Horovod does not depend on
            f"--volume={self.folder}/wheels:/root/.cache/dist_lars/wheels",
            *site(self.folder / "pip.conf"),
        )
        return self("build", *options, "-t", TAG, "-f", "docker/Dockerfile", ".", timeout=60 * MINUTES).stdout

    def run(self, *command: str, user: str | None = None, mounts: Sequence[Path] = (), timeout: float = 600,
            **env: str) -> Finished:  # fmt: skip
        """A command in a container that all calls share; `mounts` appear where they lie here."""
        if not self.containers:
            self.container("one")
        words = self.start_words("one", user, {str(path): str(path) for path in mounts}, env)
        return call(*words, *command, timeout=timeout, check=False)

    def start_words(self, container: str, user: str | None, mounts: Mapping[str, str], env: Mapping[str, str]
                    ) -> list[str]:  # fmt: skip
        """The words that run what follows them in a container, on the network and under the name of the caller."""
        options = [f"--user={user}:{user}"] if user else []
        options += [f"--volume={a}:{b}" for a, b in mounts.items()]
        options += [f"--env={k}={v}" for k, v in {"HOME": "/home/lars", **env}.items()]
        return [*self.words, "run", "--isolation=chroot", "--network=host", "--uts=host", *options, container, "--"]

    def container(self, name: str) -> str:
        """Make a container; it is removed in the end. Returns its name."""
        self("rm", name, check=False)
        self("from", "--pull-never", f"--name={name}", TAG)
        self.containers.append(name)
        return name

    def close(self) -> None:
        """Remove the containers; the layers stay for the next build."""
        for name in self.containers:
            self("rm", name, check=False)
        self.containers.clear()
        self.unmount()

    def clean(self) -> None:
        """Remove everything that was ever built."""
        if self.folder.exists():
            for kind in ("rm", "rmi"):
                self(kind, "--all", *(["--force"] if kind == "rmi" else []), check=False)
            self.unmount()
            shutil.rmtree(self.folder)

    def unmount(self) -> None:
        """Its storage mounts itself; unmounted, no process has to know of it."""
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            if line.split()[1].startswith(f"{self.folder}/"):
                subprocess.run(["umount", "-l", line.split()[1]], check=False)

    def _bootstrap(self) -> None:
        print(f"making {BASE} from Debian's packages", file=sys.stderr, flush=True)
        name = self("from", "scratch").stdout.split()[-1]
        try:
            root = self("mount", name).stdout.split()[-1]
            call("debootstrap", "--variant=minbase", "bookworm", root, timeout=600)
            shutil.rmtree(f"{root}/var/cache/apt/archives")
            self("umount", name)
            self("commit", "--format=docker", name, BASE)
        finally:
            self("rm", name, check=False)

    def __call__(self, *words: str, timeout: float = 300, check: bool = True) -> Finished:
        return call(*self.words, *words, timeout=timeout, check=check)


Engine = Client | Buildah


def find() -> Engine:
    """The first that works: an engine counts only if it has already run the base image."""
    for program in ("docker", "podman"):
        if shutil.which(program) and works(program):
            return Client(program)
    if os.geteuid() != 0:
        raise NoEngine("neither Docker nor Podman runs containers here, and buildah wants uid 0")
    if reason := packages.obstacle(PROGRAMS):
        raise NoEngine(f"neither Docker nor Podman runs containers here, and of buildah's packages {reason}")
    if (room := free(store()) + folder_size(store())) < NEEDED:
        raise NoEngine(
            f"an image and its layers take {NEEDED / 1e9:.0f} GB, and {store()} has room for {room / 1e9:.1f}: free "
            f"some, or set DIST_LARS_CACHE to a folder of another disk"
        )
    return Buildah(store())


def works(program: str) -> bool:
    """Whether it can fetch the base image and run a command in it."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return call(program, "run", "--rm", BASE, "true", timeout=120, check=False).returncode == 0
    return False


def store() -> Path:
    """Where buildah keeps its layers."""
    return cache().parent / "docker"


def site(conf: Path) -> list[str]:
    """Mounts that give pip this machine's own settings (index, certificate, folders of wheels) while it builds.

    Mounted, not copied: nothing of a site may be found in an image.
    """
    lines = call(sys.executable, "-m", "pip", "config", "list").stdout
    settings: dict[str, str] = {}
    for level in ("global", "user", "site", ":env:"):  # pip's order: the last one wins
        settings |= re.findall(rf"^{level}\.([\w-]+)='(.*)'$", lines, re.M)
    mounts = {conf: "/etc/pip.conf"}
    for name, value in settings.items():
        words = value.split()
        for n, word in enumerate(words):
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                # an index of files links to what lies beside it
                path = path.parent if word.startswith("file://") else path
                words[n] = word.replace(str(path), mounts.setdefault(path, f"/run/site/{len(mounts)}"))
        settings[name] = " ".join(words)
    conf.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    return [f"--volume={path}:{place}:ro" for path, place in mounts.items()]


def free(folder: Path) -> int:
    """Bytes that may still be written to a folder that is there or will be."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


def folder_size(folder: Path) -> int:
    """Bytes below a folder, 0 if there is none."""
    if not folder.exists():
        return 0
    return int(call("du", "-sx", "--block-size=1", str(folder), check=False).stdout.split()[0])


def call(*words: str, timeout: float = 300, check: bool = True) -> Finished:
    """Run a command in the clone; on a failure show the end of what it printed. A time-out ends all that it started."""
    process = subprocess.Popen(
        words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    done = Finished(words, process.returncode, output)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}\n{done.stdout[-6000:]}")
    return done


if __name__ == "__main__":
    if sys.argv[1:] == ["clean"]:
        Buildah(store()).clean()
