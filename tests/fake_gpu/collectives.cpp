// What NCCL does, by gloo on the same memory: it takes tensors of the device alone.

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/extension.h>

using at::Tensor;
Tensor on_host(const Tensor& t);

namespace c10d {

// DistributedDataParallel asks for one of the device.
struct NoTimer final : public Timer {
  explicit NoTimer(c10::Device) {}
  std::optional<int64_t> measureDifference(Event, Event) override { return std::nullopt; }
};
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, NoTimer)

using Tensors = std::vector<Tensor>;

static Tensor seen(const Tensor& t) {
  TORCH_CHECK(t.is_cuda(), "NCCL takes tensors of a GPU, but one of shape ", t.sizes(), " is on the CPU");
  TORCH_CHECK(t.is_contiguous(), "Tensors must be contiguous");
  return on_host(t);
}
static Tensors seen(const Tensors& all) {
  Tensors out;
  for (const auto& t : all) out.push_back(seen(t));
  return out;
}
static std::vector<Tensors> seen(const std::vector<Tensors>& all) {
  std::vector<Tensors> out;
  for (const auto& t : all) out.push_back(seen(t));
  return out;
}

struct Done final : public Work {
  c10::intrusive_ptr<c10::ivalue::Future> future;
  Tensors out;
  Done(Tensors results, OpType type) : Work(-1, type), out(std::move(results)) {
    std::vector<c10::Device> devices;
    if (!out.empty()) devices.push_back(out.front().device());
    future = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()), devices);
    future->markCompleted(c10::IValue(out));
  }
  bool isCompleted() override { return true; }
  bool isSuccess() const override { return true; }
  bool wait(std::chrono::milliseconds) override { return true; }
  void synchronize() override {}
  Tensors result() override { return out; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future; }
};

using Started = c10::intrusive_ptr<Work>;
static Started done(const Started& work, Tensors out, OpType type) {
  if (work) work->wait();
  return c10::make_intrusive<Done>(std::move(out), type);
}

struct Collectives final : public Backend {
  c10::intrusive_ptr<Backend> gloo;
  explicit Collectives(c10::intrusive_ptr<Backend> g) : Backend(g->getRank(), g->getSize()), gloo(std::move(g)) {}
  const std::string getBackendName() const override { return "nccl"; }

  // In place; gloo has no mean.
  void reduce_all(Tensors& host, ReduceOp op) {
    bool mean = op == ReduceOp::AVG || op == ReduceOp::PREMUL_SUM;
    AllreduceOptions options;
    options.reduceOp = mean ? ReduceOp(ReduceOp::SUM) : op;
    gloo->allreduce(host, options)->wait();
    if (mean)
      for (auto& t : host) t.div_(getSize());
  }
  Started allreduce(Tensors& all, const AllreduceOptions& options) override {
    for (const auto& t : all) {
      Tensors one{seen(t)};
      reduce_all(one, options.reduceOp);
    }
    return done(nullptr, all, OpType::ALLREDUCE);
  }
  Started allreduce_coalesced(Tensors& all, const AllreduceCoalescedOptions& options) override {
    return allreduce(all, options);
  }
  Started _reduce_scatter_base(Tensor& out, Tensor& in, const ReduceScatterOptions& options) override {
    Tensors whole{seen(in).clone()};
    reduce_all(whole, options.reduceOp);
    seen(out).copy_(whole[0].flatten().chunk(getSize())[getRank()].view(out.sizes()));
    return done(nullptr, {out}, OpType::_REDUCE_SCATTER_BASE);
  }
  Started reduce_scatter_tensor_coalesced(Tensors& out, Tensors& in, const ReduceScatterOptions& options) override {
    for (size_t i = 0; i < out.size(); ++i) _reduce_scatter_base(out[i], in[i], options);
    return done(nullptr, out, OpType::REDUCE_SCATTER);
  }
  Started _allgather_base(Tensor& out, Tensor& in, const AllgatherOptions& options) override {
    auto to = seen(out).view({-1}), from = seen(in).view({-1});
    return done(gloo->_allgather_base(to, from, options), {out}, OpType::_ALLGATHER_BASE);
  }
  Started allgather_into_tensor_coalesced(Tensors& out, Tensors& in, const AllgatherOptions& options) override {
    for (size_t i = 0; i < out.size(); ++i) _allgather_base(out[i], in[i], options);
    return done(nullptr, out, OpType::ALLGATHER);
  }
  Started allgather(std::vector<Tensors>& out, Tensors& in, const AllgatherOptions& options) override {
    auto to = seen(out);
    auto from = seen(in);
    return done(gloo->allgather(to, from, options), out[0], OpType::ALLGATHER);
  }
  Started alltoall_base(Tensor& out, Tensor& in, std::vector<int64_t>& out_sizes, std::vector<int64_t>& in_sizes,
                        const AllToAllOptions& options) override {
    auto to = seen(out), from = seen(in);
    return done(gloo->alltoall_base(to, from, out_sizes, in_sizes, options), {out}, OpType::ALLTOALL_BASE);
  }
  Started broadcast(Tensors& all, const BroadcastOptions& options) override {
    auto host = seen(all);
    return done(gloo->broadcast(host, options), all, OpType::BROADCAST);
  }
  Started reduce(Tensors& all, const ReduceOptions& options) override {
    auto host = seen(all);
    return done(gloo->reduce(host, options), all, OpType::REDUCE);
  }
  Started gather(std::vector<Tensors>& out, Tensors& in, const GatherOptions& options) override {
    auto to = seen(out);
    auto from = seen(in);
    return done(gloo->gather(to, from, options), {}, OpType::GATHER);
  }
  Started scatter(Tensors& out, std::vector<Tensors>& in, const ScatterOptions& options) override {
    auto to = seen(out);
    auto from = seen(in);
    return done(gloo->scatter(to, from, options), out, OpType::SCATTER);
  }
  Started send(Tensors& all, int rank, int tag) override {
    auto host = seen(all);
    return done(gloo->send(host, rank, tag), all, OpType::SEND);
  }
  Started recv(Tensors& all, int rank, int tag) override {
    auto host = seen(all);
    return done(gloo->recv(host, rank, tag), all, OpType::RECV);
  }
  Started barrier(const BarrierOptions& options) override { return done(gloo->barrier(options), {}, OpType::BARRIER); }
};

}  // namespace c10d

void bind_collectives(pybind11::module& m) {
  m.def("collectives", [](const c10::intrusive_ptr<c10d::Backend>& gloo) -> c10::intrusive_ptr<c10d::Backend> {
    return c10::make_intrusive<c10d::Collectives>(gloo);
  });
}
