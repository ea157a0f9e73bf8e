# `make demo` and `make test` set up everything they need in .venv; either can be the first command.
PYTHON ?= python3
PY := .venv/bin/python
# Architectures to build the kernels for: the GPUs that are here, else Hopper
CAPABILITIES := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u)
export TORCH_CUDA_ARCH_LIST ?= $(or $(CAPABILITIES),9.0)
# Waiting threads sleep: spinning ones starve each other where processes outnumber cores
export OMP_WAIT_POLICY ?= PASSIVE
KERNELS := kernels/selective_scan
VERSION := $(KERNELS)/selective_scan/VERSION
KERNEL_SOURCES := $(KERNELS)/setup.py $(KERNELS)/pyproject.toml $(VERSION) $(wildcard $(KERNELS)/csrc/*)

.PHONY: demo test lint mutants kernels clean

demo: .venv/.ready .venv/.kernels
	$(PY) tools/make_digits.py datasets/digits
	$(PY) main.py --cfg configs/digits.yaml

test: .venv/.ready .venv/.kernels lint
	$(PY) -m pytest

# Small faults, one at a time, and whether a test sees them; MUTANTS: --seed, --count, --only
mutants: .venv/.ready .venv/.kernels
	$(PY) tests/mutants.py $(MUTANTS)

lint: .venv/.ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

kernels: .venv/.kernels

.venv/.ready: constraints.txt requirements.txt setup.py pyproject.toml $(VERSION)
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -qq -c constraints.txt setuptools wheel ninja
	$(PY) -m pip install -qq -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

.venv/.kernels: .venv/.ready $(KERNEL_SOURCES)
	$(PY) -m pip install -qq --no-build-isolation --no-deps -e $(KERNELS)
	touch $@

clean:
	rm -rf .venv build *.egg-info output datasets
