# Each target does all of its own set-up in .venv. A machine without an NVIDIA GPU gets the torch of
# constraints-cpu.txt; GPU users choose theirs (see README).
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
CONSTRAINTS := $(if $(HAS_GPU),,--constraint constraints-cpu.txt)
# Tests that need triton's interpreter run in a process of their own: it is chosen at import.
INTERPRETED := tests/test_kernels_interpreter.py tests/test_triton_backend.py

# Tests compute on tiny tensors: more threads only wait for each other.
test test-all: export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all lint gpu-test clean

demo: $(READY)
	$(VENV)/bin/packed-attn demo

test: lint
	$(PY) -m pytest tests -m "not slow and not gpu"
	TRITON_INTERPRET=1 $(PY) -m pytest $(INTERPRETED) -m "not slow and not gpu"
	TRITON_INTERPRET=1 $(PY) -m pytest tests/test_conformance.py -k "triton and exact" -m "not slow and not gpu"

test-all: lint
	$(PY) -m pytest tests -m "not gpu"
	TRITON_INTERPRET=1 $(PY) -m pytest $(INTERPRETED) -m "not gpu"
	TRITON_INTERPRET=1 $(PY) -m pytest tests/test_conformance.py -k triton -m "not gpu"

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PY)

# On a machine with its own torch and no network: make gpu-test PY=python3 READY=
gpu-test: $(READY)
	$(PY) -m pytest tests/test_conformance.py tests/test_triton_backend.py tests/test_varlen.py

$(READY): pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output
