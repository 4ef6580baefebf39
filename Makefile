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

# All minimums of pyproject.toml together.
LOWEST := .venv-lowest

# Packages of token mixers: of mamba_ssm the Python alone, as its CUDA code needs a compiler.
MIXERS := .venv-mixers
MAMBA := mamba_ssm-2.3.2.post1

.PHONY: demo test test-all lower-bounds oldest-triton packaged-mixers fake-gpu resources lint gpu-test gpu-bench clean

demo: $(READY)
	$(VENV)/bin/packed-attn demo

test: lint
	$(PY) -m pytest tests -m "not slow and not gpu"
	TRITON_INTERPRET=1 $(PY) -m pytest $(INTERPRETED) -m "not slow and not gpu"
	TRITON_INTERPRET=1 $(PY) -m pytest tests/test_conformance.py -k "triton and exact" -m "not slow and not gpu"

test-all: lint lower-bounds oldest-triton packaged-mixers $(if $(HAS_GPU),,fake-gpu)
	$(PY) -m pytest tests -m "not gpu"
	TRITON_INTERPRET=1 $(PY) -m pytest $(INTERPRETED) -m "not gpu"
	TRITON_INTERPRET=1 $(PY) -m pytest tests/test_conformance.py -k triton -m "not gpu"

# The tests on the lowest version of every package that pyproject.toml allows.
lower-bounds: export OMP_NUM_THREADS ?= 1
lower-bounds: $(LOWEST)/.ready
	$(LOWEST)/bin/python -m pytest tests -m "not slow and not gpu"
	TRITON_INTERPRET=1 $(LOWEST)/bin/python -m pytest $(INTERPRETED) -m "not slow and not gpu"
	TRITON_INTERPRET=1 $(LOWEST)/bin/python -m pytest tests/test_conformance.py -k "triton and exact" -m "not slow and not gpu"

# The compile gate and the kernels' results on the oldest triton.
oldest-triton: export OMP_NUM_THREADS ?= 1
oldest-triton: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest tests/test_compile_gate.py
	TRITON_INTERPRET=1 $(OLDEST)/bin/python -m pytest tests/test_kernels_interpreter.py tests/test_hopper_kernels.py -m "not slow"
	TRITON_INTERPRET=1 $(OLDEST)/bin/python -m pytest tests/test_conformance.py -k "triton and exact" -m "not gpu"

# flash-linear-attention's and mamba_ssm's own kernels, interpreted.
packaged-mixers: export OMP_NUM_THREADS ?= 1
packaged-mixers: $(MIXERS)/.ready
	TRITON_INTERPRET=1 PYTHONPATH=$(MIXERS):$(MIXERS)/$(MAMBA) $(PY) -m pytest tests/test_packaged_mixers.py

# Everything around attention on two devices that must not meet (tests/fake_gpu); needs a C++ compiler,
# and a torch without CUDA, in whose place they stand.
fake-gpu: export OMP_NUM_THREADS ?= 1
fake-gpu: $(READY)
	$(PY) -m pytest -p tests.fake_gpu.plugin tests/fake_gpu/checks.py
	TRITON_INTERPRET=1 $(PY) -m pytest -p tests.fake_gpu.plugin tests/test_gpu_models.py tests/test_gpu_training.py -k "not compiled and not memory"

# Writes benchmarks/results/sm*_resources.md, which the compile gate holds machine code against.
resources: $(READY) $(OLDEST)/.ready
	$(PY) -m benchmarks.resources
	$(OLDEST)/bin/python -m benchmarks.resources --sm 90 86

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

# uv takes the lowest versions; the oldest torch comes with its CUDA libraries, 5 GB in all.
$(LOWEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct -e ".[dev]"
	touch $(LOWEST)/.ready

$(MIXERS)/.ready: $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $(MIXERS) fla-core==0.6.0 flash-linear-attention==0.6.0 einops
	$(PY) -m pip install --quiet --disable-pip-version-check wheel
	MAMBA_SKIP_CUDA_BUILD=TRUE $(PY) -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-binary :all: --dest $(MIXERS) $(subst -,==,$(MAMBA))
	tar -xzf $(MIXERS)/$(MAMBA).tar.gz -C $(MIXERS)
	touch $(MIXERS)/.ready

clean:
	rm -rf $(VENV) $(OLDEST) $(LOWEST) $(MIXERS) build dist *.egg-info demo-output bench-report
