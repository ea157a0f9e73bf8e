# `make demo` and `make test` set up everything they need in .venv; either can be the first command.
PYTHON ?= python3
PY := .venv/bin/python
NPROC ?= 2
KERNEL_SOURCES := $(shell find kernels/selective_scan -name '*.py' -o -name '*.c*' -o -name '*.h' -o -name '*.toml' | grep -v -e build -e egg-info)

.PHONY: demo test lint kernels clean

demo: .venv/.ready .venv/.kernels
	$(PY) tools/make_digits.py datasets/digits
	$(PY) main.py --cfg configs/digits.yaml

test: .venv/.ready .venv/.kernels lint
	$(PY) -m pytest

lint: .venv/.ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

kernels: .venv/.kernels

.venv/.ready: constraints.txt requirements.txt setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -c constraints.txt setuptools wheel ninja
	$(PY) -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

.venv/.kernels: .venv/.ready $(KERNEL_SOURCES)
	$(PY) -m pip install -q --no-build-isolation --no-deps -e kernels/selective_scan
	touch $@

clean:
	rm -rf .venv build *.egg-info output datasets
