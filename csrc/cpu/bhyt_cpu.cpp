// The CPU key: threads and scratch memory around the row kernels.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <optional>

#include "cpu/kernels.h"
#include "ops/device.h"

namespace bhyt {
namespace {

const cpu::Kernels& kernels() {
  static const cpu::Kernels& table = cpu::kernels_for(at::get_cpu_capability().c_str());
  return table;
}

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kElementsPerThread = 16384;

int64_t rows_per_task(int64_t d) { return std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, d)); }

// Memory of torch's allocator: on a line of its own, so that two threads share none, and seen by torch's profiler.
at::DataPtr scratch_memory(int64_t bytes) { return c10::GetCPUAllocator()->allocate(bytes); }

// The gain as rows take it: itself when it has the accumulate dtype and rows take that in plain order, else a copy made
// once for all rows, for eight bits over their scale; ones when none is given, by which rows multiply exactly.
class WideWeight {
 public:
  explicit WideWeight(const SiteParams& p, const Quantization* quantization = nullptr) : data_(p.weight.data) {
    const DType wanted = accumulate_dtype(p.stream);
    const bool in_order = p.stream != DType::bf16 || kernels().bfloat_block == 1;
    if (data_ != nullptr && p.weight.dtype == wanted && in_order && !quantization) return;
    copy_ = scratch_memory(p.d * size_of(wanted));
    kernels().widen(p.weight, p.stream, quantization, p.d, copy_.get());
    data_ = copy_.get();
  }
  const void* data() const { return data_; }

 private:
  const void* data_;
  at::DataPtr copy_;
};

void run_forward(const ForwardParams& p, const Tensor&) {
  const WideWeight weight(p, p.quantization ? &*p.quantization : nullptr);
  at::parallel_for(0, p.rows, rows_per_task(p.d),
                   [&](int64_t begin, int64_t end) { kernels().forward(p, weight.data(), begin, end); });
}

void sum_weight(const BackwardParams& p, const cpu::Scratch& sums, int64_t chunks) {
  constexpr int64_t width = cpu::kColumnBlock;
  const int64_t per_task = std::max<int64_t>(1, kElementsPerThread / width / chunks);
  at::parallel_for(0, (p.d + width - 1) / width, per_task, [&](int64_t begin, int64_t end) {
    kernels().sum_weight(p, sums, begin * width, std::min(end * width, p.d));
  });
}

void run_backward(const BackwardParams& p, const Tensor&) {
  if (!p.needs_g() && !p.grad_weight) return;
  std::optional<WideWeight> weight;
  if (p.needs_g()) weight.emplace(p);
  const auto chunks = cpu::chunks_of(p.rows);
  const int64_t row_bytes = p.d * size_of(accumulate_dtype(p.stream));
  const at::DataPtr weight_sums = scratch_memory(p.grad_weight ? chunks.count * row_bytes : 0);
  const at::DataPtr lam_sums = scratch_memory(p.grad_lam ? chunks.count * int64_t{sizeof(double)} : 0);
  const cpu::Scratch sums{weight_sums.get(), static_cast<double*>(lam_sums.get())};

  const int64_t chunks_per_task = (rows_per_task(p.d) + chunks.rows_per_chunk - 1) / chunks.rows_per_chunk;
  at::parallel_for(0, chunks.count, chunks_per_task, [&](int64_t begin, int64_t end) {
    const at::DataPtr g = scratch_memory(p.exact && p.grad_x ? row_bytes : 0);
    cpu::Scratch scratch = sums;
    scratch.g = g.get();
    kernels().backward(p, weight ? weight->data() : nullptr, scratch, begin, end);
  });
  if (p.grad_weight) sum_weight(p, sums, chunks.count);
  if (p.grad_lam) kernels().sum_lam(p, sums);
}

// Without a round through the dispatcher: a third of a microsecond per output.
Tensor allocate(at::IntArrayRef sizes, at::ScalarType dtype, const Tensor&) {
  return at::detail::empty_cpu(sizes, dtype, /*pin_memory=*/false, /*memory_format=*/std::nullopt);
}

}  // namespace

TORCH_LIBRARY_IMPL(bhyt, CPU, m) { register_ops<DeviceOps<run_forward, run_backward, allocate>>(m); }

}  // namespace bhyt
