"""What all tests share: the device, reproducible property tests, and which machine runs what."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
import torch

from benchmarks import flash3_library

flash3_library.load()

# A GPU machine without a network may lack hypothesis; `make gpu-test` has no property tests.
if find_spec("hypothesis") is not None:
    from hypothesis import settings

    settings.register_profile("packed_attn", deadline=None, derandomize=True, max_examples=60)
    settings.load_profile("packed_attn")


@pytest.fixture(scope="session")
def device() -> str:
    """Where conformance runs: the GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` belong to `make gpu-test`: without a GPU they are not selected."""
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if "gpu" in item.keywords]
    config.hook.pytest_deselected(items=gpu)
    items[:] = [item for item in items if item not in gpu]


def pytest_collection_finish() -> None:
    """Test processes' server imports what they use while the first tests run."""
    if "tests.processes" in sys.modules:
        sys.modules["tests.processes"].server()
