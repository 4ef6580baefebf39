"""`torch.cuda` over the device of device.cpp. To be imported before torch, which looks for CUDA
as it is imported."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from tests.fake_gpu.build import LIBRARIES, NAME, built, torch_folder

COUNT = 2

assert "torch" not in sys.modules, "import tests.fake_gpu.install before torch"
_LIBRARY = built()
for _name in LIBRARIES:
    ctypes.CDLL(str(torch_folder() / "lib" / f"lib{_name}.so"), ctypes.RTLD_GLOBAL)
ctypes.CDLL(str(_LIBRARY), ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
import torch._dynamo  # noqa: E402  # which looks for a CUDA that it would take for a real one
import torch._inductor.utils  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.distributed_c10d as c10d  # noqa: E402

_spec = importlib.util.spec_from_file_location(NAME, _LIBRARY)
assert _spec is not None
assert _spec.loader is not None
native: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(native)


def index_of(device: Any = None) -> int:
    """Of a device as torch.cuda takes it, the current one where it names none."""
    if isinstance(device, str):
        device = torch.device(device)
    index = device if isinstance(device, int) else getattr(device, "index", None)
    return native.current_device() if index is None or index < 0 else index


class Stream:
    """The only one: what is asked for is done when the call returns."""

    device_type, stream_id, cuda_stream, priority = 1, 0, 0, 0

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device_index = index_of(device)
        self.device = torch.device("cuda", self.device_index)

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return native.is_capturing()

    def wait_event(self, event: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def synchronize(self) -> None: ...


class Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)

    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class CUDAGraph:
    """A replay runs the operators again, on the same memory, without the Python that asked."""

    def capture_begin(self, *_: Any, **__: Any) -> None:
        native.capture_begin()

    def capture_end(self) -> None:
        self.replay = native.capture_end()

    def reset(self) -> None: ...
    def register_generator_state(self, state: Any) -> None: ...

    def pool(self) -> tuple[int, int]:
        return 0, 0


@contextmanager
def stream(_: Any) -> Iterator[None]:
    yield


def nothing(*_: Any, **__: Any) -> None: ...


def set_device(device: Any) -> None:
    native.exchange_device(index_of(device))


def exchange_device(index: int) -> int:
    return -1 if index < 0 else native.exchange_device(index)


def warn(operator: str) -> None:
    """In torch's words, as `refuse`."""
    warnings.warn(f"called a synchronizing CUDA operation: {operator}", stacklevel=2)


def refuse(operator: str) -> None:
    raise RuntimeError(f"called a synchronizing CUDA operation: {operator}")


def set_sync_debug_mode(mode: int | str) -> None:
    """As torch's; `native.observe_waits` takes any other observer."""
    observers = {"default": None, "warn": warn, "error": refuse}
    native.observe_waits(observers[mode] if isinstance(mode, str) else [*observers.values()][mode])


# No backend of the package runs on it by itself: attention is the reference's (see plugin.py).
PROPERTIES = SimpleNamespace(
    name="no GPU", major=7, minor=5, total_memory=2**36, multi_processor_count=8, warp_size=32
)
CUDA: dict[str, Any] = {
    "CUDAGraph": CUDAGraph,
    "Event": Event,
    "Stream": Stream,
    "_exchange_device": exchange_device,
    "_is_compiled": lambda: True,
    "_lazy_init": nothing,
    "_maybe_exchange_device": exchange_device,
    "current_device": native.current_device,
    "current_stream": Stream,
    "default_stream": Stream,
    "device_count": lambda: COUNT,
    "empty_cache": nothing,
    "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
    "get_device_name": lambda device=None: PROPERTIES.name,
    "get_device_properties": lambda device=None: PROPERTIES,
    "init": nothing,
    "ipc_collect": nothing,
    "is_available": lambda: True,
    "is_bf16_supported": lambda *_: True,
    "graph_pool_handle": lambda: (0, 0),
    "is_current_stream_capturing": native.is_capturing,
    "is_initialized": lambda: True,
    "mem_get_info": lambda device=None: (2**36, 2**36),
    "memory_stats": lambda device=None: {},
    "reset_peak_memory_stats": nothing,
    "set_device": set_device,
    "set_stream": nothing,
    "set_sync_debug_mode": set_sync_debug_mode,
    "stream": stream,
    "synchronize": nothing,
    **dict.fromkeys(
        ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"),
        lambda device=None: 0,
    ),
}
# Numbers are drawn by the CPU's generator.
RANDOM: dict[str, Any] = {
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "get_rng_state_all": lambda: [torch.get_rng_state()] * COUNT,
    "manual_seed": nothing,
    "manual_seed_all": nothing,
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state.cpu()),
    "set_rng_state_all": lambda states: torch.set_rng_state(states[0].cpu()),
}
ACCELERATOR: dict[str, Any] = {
    "current_accelerator": lambda check_available=False: torch.device("cuda"),
    "current_device_index": native.current_device,
    "current_stream": Stream,
    "device_count": lambda: COUNT,
    "empty_cache": nothing,
    "is_available": lambda: True,
    "set_device_index": set_device,
    "set_stream": nothing,
    "synchronize": nothing,
}


def bytes_of(storage: Any) -> torch.Tensor:
    """A storage's bytes, as the host sees them."""
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return native.on_host(whole) if whole.is_cuda else whole


def storage_on(storage: Any, device: Any) -> Any:
    """A copy."""
    made = torch.empty(storage.nbytes(), dtype=torch.uint8, device=device).untyped_storage()
    bytes_of(made).copy_(bytes_of(storage))
    return made


def _put_on_storages() -> None:
    """What torch does by CUDA's own code, on which this build of it has none."""
    storages: Any = torch.UntypedStorage
    resize = storages.resize_

    def copy_(self: Any, other: Any, non_blocking: bool = False) -> Any:
        bytes_of(self).copy_(bytes_of(other))
        return self

    def to(self: Any, *, device: Any, non_blocking: bool = False) -> Any:
        return self if torch.device(device) == self.device else storage_on(self, device)

    def resize_(self: Any, size: int) -> Any:
        if self.device.type != "cuda":
            return resize(self, size)
        whole = torch.empty(0, dtype=torch.uint8, device=self.device).set_(self)
        native.resize_memory(whole, size)
        return self

    def cuda(self: Any, device: Any = None, non_blocking: bool = False) -> Any:
        return storage_on(self, torch.device("cuda", index_of(device)))

    storages.copy_, storages.to, storages.resize_, storages.cuda = copy_, to, resize_, cuda
    storages.clone = lambda self: storage_on(self, self.device)
    storages.cpu = lambda self: storage_on(self, "cpu")


def _put_on_processes() -> None:
    """ "nccl" is the backend of collectives.cpp."""

    def made(store: Any, rank: int, size: int, timeout: Any) -> Any:
        return native.collectives(dist.ProcessGroupGloo(store, rank, size, timeout))

    dist.Backend.register_backend("fakenccl", made, devices=["cuda"])
    begin, group = dist.init_process_group, dist.new_group

    def named(backend: str | None) -> str | None:
        return backend and backend.replace("fakenccl", "nccl").replace("nccl", "fakenccl")

    def init_process_group(
        backend: Any = None, *args: Any, device_id: Any = None, **rest: Any
    ) -> None:
        begin(named(backend) or "cpu:gloo,cuda:fakenccl", *args, **rest)

    def new_group(
        ranks: Any = None, timeout: Any = None, backend: Any = None, *args: Any, **rest: Any
    ) -> Any:
        rest.pop("device_id", None)
        return group(ranks, timeout, named(backend), *args, **rest)

    for module in (dist, c10d):
        at: Any = module
        at.init_process_group, at.new_group = init_process_group, new_group
        at.is_nccl_available = lambda: True


for _module, _entries in (
    (torch.cuda, CUDA),
    (torch.cuda, RANDOM),
    (torch.cuda.random, RANDOM),
    (torch.accelerator, ACCELERATOR),
):
    for _name, _value in _entries.items():
        setattr(_module, _name, _value)
_torch: Any = torch._C
_torch._host_emptyCache = nothing
_tensor: Any = torch.Tensor
_tensor.record_stream = nothing
_tensor.pin_memory = lambda self, *_: self
_tensor.is_pinned = lambda self, *_: not self.is_cuda
_put_on_storages()
_put_on_processes()
