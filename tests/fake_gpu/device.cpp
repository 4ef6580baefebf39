// A CUDA device of host memory. See __init__.py.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <functional>
#include <memory>
#include <string>
#include <unordered_set>

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;

static thread_local DeviceIndex current = 0;
static constexpr DeviceIndex kDevices = 2;

static Device cuda(DeviceIndex index) { return Device(DeviceType::CUDA, index); }
static const Device kHost(DeviceType::CPU);

static DeviceIndex exchange(DeviceIndex index) {
  TORCH_CHECK(index < kDevices, "CUDA error: invalid device ordinal");
  auto before = current;
  current = index;
  return before;
}

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  static c10::Stream only(Device d) { return c10::Stream(c10::Stream::DEFAULT, d); }
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device d) const override { return cuda(exchange(d.index())); }
  Device getDevice() const override { return cuda(current); }
  void setDevice(Device d) const override { exchange(d.index()); }
  void uncheckedSetDevice(Device d) const noexcept override { current = d.index(); }
  c10::Stream getStream(Device d) const override { return only(d); }
  c10::Stream getDefaultStream(Device d) const override { return only(d); }
  c10::Stream getNewStream(Device d, int) const override { return only(d); }
  c10::Stream getStreamFromGlobalPool(Device d, bool) const override { return only(d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return s; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// Looked up by this name, once, as torch is imported.
struct CUDAHooks final : public at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool isPinnedPtr(const void*) const override { return true; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  Device getDeviceFromPtr(void*) const override { return cuda(current); }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  int getNumGPUs() const override { return kDevices; }
  void deviceSynchronize(DeviceIndex) const override {}
  DeviceIndex current_device() const override { return current; }
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex d) const override { exchange(d); }
  DeviceIndex exchangeDevice(DeviceIndex d) const override { return exchange(d); }
  DeviceIndex maybeExchangeDevice(DeviceIndex d) const override { return d < 0 ? current : exchange(d); }
};
using at::CUDAHooksArgs;
using at::CUDAHooksInterface;
using at::CUDAHooksRegistry;
namespace at {
using ::CUDAHooks;
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

static void release_memory(void* p) { free(p); }
struct Allocator final : public c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* p = nullptr;
    TORCH_CHECK(bytes == 0 || posix_memalign(&p, 64, bytes) == 0, "CUDA out of memory");
    if (bytes) memset(p, 0xFF, bytes);  // NaN in any float: what nothing writes shows
    return {p, p, &release_memory, cuda(current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_memory; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { memcpy(to, from, bytes); }
};
static Allocator allocator;

// The same memory as a tensor of another device, which keeps it.
static void release_storage(void* p) { delete static_cast<c10::Storage*>(p); }
static Tensor as_seen_from(const Tensor& t, Device device) {
  auto* held = new c10::Storage(t.storage());
  c10::DataPtr memory(held->mutable_data(), held, &release_storage, device);
  c10::Allocator* maker = device.is_cuda() ? &allocator : c10::GetCPUAllocator();
  c10::Storage storage(c10::Storage::use_byte_size_t(), held->nbytes(), std::move(memory), maker, true);
  auto key = device.is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
  auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), t.dtype());
  auto* impl = out.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  if (t.is_conj()) out._set_conj(true);
  if (t.is_neg()) out._set_neg(true);
  return out;
}
Tensor on_host(const Tensor& t) { return as_seen_from(t, kHost); }

// A CUDA graph: what was asked for between a capture's begin and its end, in its order.
using Graph = std::vector<std::function<void()>>;
static std::shared_ptr<Graph> capture;  // the one under way

// Called where the host of a CUDA device would wait for it, with the name of the operator.
static PyObject* observer = nullptr;
static void wait(const std::string& name) {
  TORCH_CHECK(!capture, name, ": operation not permitted when stream is capturing");
  if (observer == nullptr) return;
  py::gil_scoped_acquire held;
  py::reinterpret_borrow<py::object>(observer)(name);
}

// Those whose result has a size, or is a number, that the device must tell the host.
static const std::unordered_set<std::string> WAITING = {
    "aten::nonzero", "aten::masked_select", "aten::_unique", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::unique_dim_consecutive", "aten::bincount", "aten::equal"};

// Those whose indices may be on the host, and copies.
static const std::unordered_set<std::string> MIXED = {
    "aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_",
    "aten::_index_put_impl_", "aten::_unsafe_index_put", "aten::copy_"};

// One call of an operator: its arguments seen from the host, and what becomes of its results.
struct Call {
  const std::string& name;
  std::optional<Device> device;
  std::string host_shape;
  std::vector<std::pair<Tensor, Tensor>> written;  // the tensor, and the one the host sees

  Tensor taken(const Tensor& t, bool writes) {
    if (!t.defined()) return t;
    if (t.device().is_cpu()) {
      if (t.dim() > 0 || writes) host_shape = c10::str(t.sizes());
      return t;
    }
    bool meets = device && *device != t.device() && t.dim() > 0 && !MIXED.count(name);
    TORCH_CHECK(!meets, name, ": tensors are on ", *device, " and on ", t.device());
    device = t.device();
    auto seen = on_host(t);
    if (writes) written.emplace_back(t, seen);
    return seen;
  }
  c10::IValue taken(c10::IValue v, bool writes) {
    if (v.isTensor()) return taken(v.toTensor(), writes);
    if (v.isTensorList()) {
      std::vector<Tensor> out;
      for (const auto& t : v.toTensorVector()) out.push_back(taken(t, writes));
      return out;
    }
    if (v.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> out;
      for (std::optional<Tensor> t : v.toOptionalTensorList()) out.push_back(t ? taken(*t, writes) : t);
      return out;
    }
    if (v.isDevice() && v.toDevice().is_cuda()) {
      device = cuda(v.toDevice().has_index() ? v.toDevice().index() : current);
      return kHost;
    }
    return v;
  }
  // An index by a mask, or from the host. A number of the host is put where a mask says without
  // waiting, and elsewhere copied.
  bool waits_for_an_index(const c10::List<std::optional<Tensor>>& indices, const torch::jit::Stack& stack) const {
    bool masks = false, from_host = false;
    for (std::optional<Tensor> t : indices) {
      if (!t || !t->defined()) continue;
      masks |= t->scalar_type() == at::kBool || t->scalar_type() == at::kByte;
      from_host |= t->device().is_cpu();
    }
    bool puts = name.find("put") != std::string::npos;
    const auto* value = puts ? &stack[stack.size() - (name == "aten::_index_put_impl_" ? 3 : 2)] : nullptr;
    bool number = value && value->toTensor().numel() == 1 && value->toTensor().device().is_cpu();
    return from_host || masks != number;
  }
  bool waits(const torch::jit::Stack& stack, size_t first) const {
    if (WAITING.count(name)) return true;
    if (name == "aten::repeat_interleave") return stack.back().isNone();
    return MIXED.count(name) && stack.size() > first + 1 && stack[first + 1].isOptionalTensorList() &&
           waits_for_an_index(stack[first + 1].toOptionalTensorList(), stack);
  }
  void check() const {
    bool meets = device && !host_shape.empty() && !MIXED.count(name);
    TORCH_CHECK(!meets, name, ": Expected all tensors to be on the same device, but one is on ", *device,
                " and one of shape ", host_shape, " on the CPU");
  }
  Tensor given(const Tensor& t) const {
    if (!t.defined() || !t.device().is_cpu()) return t;
    for (const auto& [ours, seen] : written)
      if (seen.is_same(t)) return ours;
    return as_seen_from(t, device.value_or(cuda(current)));
  }
  c10::IValue given(c10::IValue v) const {
    if (v.isTensor()) return given(v.toTensor());
    if (!v.isTensorList()) return v;
    std::vector<Tensor> out;
    for (const auto& t : v.toTensorVector()) out.push_back(given(t));
    return out;
  }
  // What an operator has resized, or set to other memory.
  void follow() const {
    for (const auto& [ours, seen] : written) {
      bool same = seen.sizes() == ours.sizes() && seen.strides() == ours.strides();
      if (same && seen.storage().data() == ours.storage().data()) continue;
      auto back = as_seen_from(seen, ours.device());
      ours.unsafeGetTensorImpl()->set_storage_keep_dtype(back.storage());
      ours.unsafeGetTensorImpl()->set_sizes_and_strides(seen.sizes(), seen.strides(), seen.storage_offset());
    }
  }
};

static void run_again(const c10::OperatorHandle& op, torch::jit::Stack given, const torch::jit::Stack& made);

static void on_the_host(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  Call call{schema.name()};
  const auto first = stack->size() - schema.arguments().size();
  if ((observer != nullptr || capture) && call.waits(*stack, first)) wait(call.name);
  torch::jit::Stack given;
  if (capture) given.assign(stack->begin() + first, stack->end());
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const auto* info = schema.arguments()[i].alias_info();
    (*stack)[first + i] = call.taken((*stack)[first + i], info && info->isWrite());
  }
  call.check();
  op.callBoxed(stack);
  call.follow();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i)
    (*stack)[i] = call.given((*stack)[i]);
  if (!capture) return;
  torch::jit::Stack made(stack->end() - schema.returns().size(), stack->end());
  capture->push_back([op, given, made] { run_again(op, given, made); });
}

// Into the memory that it has written before; a view of that needs nothing.
static void write_again(const Tensor& before, const Tensor& now) {
  if (before.defined() && before.storage().data() != now.storage().data()) on_host(before).copy_(on_host(now));
}
static void run_again(const c10::OperatorHandle& op, torch::jit::Stack given, const torch::jit::Stack& made) {
  on_the_host(op, {}, &given);
  for (size_t i = 0; i < made.size(); ++i) {
    if (made[i].isTensor()) write_again(made[i].toTensor(), given[i].toTensor());
    if (!made[i].isTensorList()) continue;
    auto before = made[i].toTensorVector(), now = given[i].toTensorVector();
    for (size_t j = 0; j < before.size(); ++j) write_again(before[j], now[j]);
  }
}
static void replay(const Graph& graph) {
  at::AutoDispatchBelowAutograd as_captured;
  for (const auto& step : graph) step();
}

// Makes memory on a device that need not be the current one.
template <typename Make>
static Tensor made(std::optional<Device> device, Make make) {
  auto before = current;
  if (device && device->has_index()) exchange(device->index());
  auto out = make();
  current = before;
  if (capture) {
    auto memory = out.storage();
    capture->push_back([memory] { memset(memory.mutable_data(), 0xFF, memory.nbytes()); });
  }
  return out;
}
static c10::ScalarType kind(std::optional<at::ScalarType> dtype) {
  return dtype.value_or(c10::get_default_dtype_as_scalartype());
}
static const c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);
static Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                    std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return made(device, [&] { return at::detail::empty_generic(size, &allocator, kKeys, kind(dtype), format); });
}
static Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                            std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  return made(device, [&] { return at::detail::empty_strided_generic(size, stride, &allocator, kKeys, kind(dtype)); });
}
static Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  bool over = to.device().is_cuda() != from.device().is_cuda();
  TORCH_CHECK(!capture || !over, "a CUDA graph would read or write memory of the host that may be gone");
  if (over && !non_blocking) wait("aten::copy_");
  auto seen = to.device().is_cuda() ? on_host(to) : to;
  auto source = from.device().is_cuda() ? on_host(from) : from;
  seen.copy_(source);
  if (capture) capture->push_back([seen, source] { seen.copy_(source); });
  return to;
}
static void resize_memory(const Tensor& t, int64_t bytes) {
  auto* storage = t.storage().unsafeGetStorageImpl();
  auto before = exchange(t.device().index());
  auto fresh = allocator.allocate(bytes);
  current = before;
  auto kept = std::min<size_t>(bytes, storage->nbytes());
  if (kept) memcpy(fresh.get(), storage->data(), kept);
  storage->set_data_ptr_noswap(std::move(fresh));
  storage->set_nbytes(bytes);
}
static const Tensor& resize_(const Tensor& t, c10::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto bytes = (c10::multiply_integers(size) + t.storage_offset()) * t.itemsize();
  if (static_cast<int64_t>(t.storage().nbytes()) < bytes) resize_memory(t, bytes);
  t.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  if (format) t.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return t;
}
static Tensor as_strided(const Tensor& t, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(t, size, stride, offset);
}
static at::Scalar item(const Tensor& t) {
  wait("aten::item");
  return on_host(t).item();
}
static Tensor& set_memory(Tensor& t, at::Storage storage, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  t.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  std::vector<int64_t> steps(size.size(), 1);
  for (auto i = static_cast<int64_t>(size.size()) - 2; i >= 0; --i) steps[i] = steps[i + 1] * std::max<int64_t>(size[i + 1], 1);
  t.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride.empty() ? c10::IntArrayRef(steps) : stride, offset);
  return t;
}
static Tensor& set_all_memory(Tensor& t, at::Storage storage) {
  int64_t elements = storage.nbytes() / t.itemsize(), step = 1;
  return set_memory(t, std::move(storage), 0, elements, step);
}
static Tensor& set_tensor(Tensor& t, const Tensor& from) {
  return set_memory(t, from.storage(), from.storage_offset(), from.sizes(), from.strides());
}
static bool is_pinned(const Tensor&, std::optional<Device>) { return false; }

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_host>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  // Where torch itself would choose kernels by the device.
  for (const char* name : {"convolution", "convolution_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_the_host>());
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("resize_", resize_);
  m.impl("as_strided", as_strided);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("_local_scalar_dense", item);
  m.impl("set_.source_Storage_storage_offset", set_memory);
  m.impl("set_.source_Storage", set_all_memory);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("is_pinned", is_pinned);
}

void bind_collectives(pybind11::module& m);

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  bind_collectives(m);
  m.def("exchange_device", [](int index) { return static_cast<int>(exchange(index)); });
  m.def("current_device", [] { return static_cast<int>(current); });
  m.def("observe_waits", [](py::object called) {
    Py_XDECREF(observer);
    observer = called.is_none() ? nullptr : called.release().ptr();
  });
  m.def("capture_begin", [] {
    TORCH_CHECK(!capture, "a capture is under way");
    capture = std::make_shared<Graph>();
  });
  m.def("capture_end", [] {
    auto graph = std::move(capture);
    return py::cpp_function([graph] { replay(*graph); });
  });
  m.def("is_capturing", [] { return static_cast<bool>(capture); });
  // What does not come by an operator: a kernel that is interpreted.
  m.def("captured", [](py::function step) {
    if (capture) capture->push_back([step] { step(); });
  });
  m.def("on_host", &on_host);
  m.def("resize_memory", &resize_memory);
}
