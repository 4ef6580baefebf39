# Each target does all of its own set-up in .venv. A machine without an NVIDIA GPU gets the torch of
# constraints-cpu.txt; GPU users choose theirs (see README).
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
CONSTRAINTS := $(if $(HAS_GPU),,--constraint constraints-cpu.txt)
# Tests that need triton's interpreter run in a process of their own: it is chosen at import.
INTERPRETED := tests/test_kernels_interpreter.py tests/test_triton_backend.py tests/test_bug_classes.py tests/test_tune.py tests/test_bookkeeping.py tests/test_hopper_kernels.py tests/test_liger.py

# Tests compute on tiny tensors: more threads only wait for each other.
test test-all: export OMP_NUM_THREADS ?= 1

# GPU targets also run where nothing may be installed: make gpu-test PY=python3 READY=
gpu-test gpu-bench resources: export PYTHONPATH := .:kernels:patches$(if $(PYTHONPATH),:$(PYTHONPATH))
# The oldest triton that is supported, in an environment of its own; its interpreter needs this numpy.
OLDEST := .venv-triton36

.PHONY: demo test test-all oldest-triton resources lint gpu-test gpu-bench clean

demo: $(READY)
	$(VENV)/bin/packed-attn demo

test: lint
	$(PY) -m pytest tests -m "not slow and not gpu"
	TRITON_INTERPRET=1 $(PY) -m pytest $(INTERPRETED) -m "not slow and not gpu"
	TRITON_INTERPRET=1 $(PY) -m pytest tests/test_conformance.py -k "triton and exact" -m "not slow and not gpu"

test-all: lint oldest-triton
	$(PY) -m pytest tests -m "not gpu"
	TRITON_INTERPRET=1 $(PY) -m pytest $(INTERPRETED) -m "not gpu"
	TRITON_INTERPRET=1 $(PY) -m pytest tests/test_conformance.py -k triton -m "not gpu"

# The compile gate and the kernels' results on the oldest triton.
oldest-triton: export OMP_NUM_THREADS ?= 1
oldest-triton: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest tests/test_compile_gate.py
	TRITON_INTERPRET=1 $(OLDEST)/bin/python -m pytest tests/test_kernels_interpreter.py tests/test_hopper_kernels.py -m "not slow"
	TRITON_INTERPRET=1 $(OLDEST)/bin/python -m pytest tests/test_conformance.py -k "triton and exact" -m "not gpu"

# Writes benchmarks/results/sm90_resources.md, which the compile gate holds machine code against.
resources: $(READY) $(OLDEST)/.ready
	$(PY) -m benchmarks.sm90_resources
	$(OLDEST)/bin/python -m benchmarks.sm90_resources

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PY)

# Conformance on the GPU, then compute-sanitizer where it is installed; writes benchmarks/results/gpu_test.json.
gpu-test: $(READY)
	$(PY) -m benchmarks.gpu_test

# Within 8 minutes; writes attention.json and training_step_gpu.json under benchmarks/results/.
gpu-bench: $(READY)
	$(PY) -m benchmarks.suite attention training_step_gpu

$(READY): pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e ".[dev]"
	touch $(READY)

# torch before triton, which the CUDA builds of torch would choose themselves.
$(OLDEST)/.ready: constraints-cpu.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-cpu.txt torch pytest hypothesis "numpy<2.4"
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "triton==3.6.*"
	touch $(OLDEST)/.ready

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info demo-output bench-report
