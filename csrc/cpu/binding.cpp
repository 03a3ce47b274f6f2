// The CPU key of the ops: threads and scratch memory around the row kernels.
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

const cpu::Kernels& kernels_for(DType stream) {
  const auto best = [](DType t) -> const cpu::Kernels& {
    return cpu::kernels_for(at::get_cpu_capability().c_str(), cpu::runnable_kernels(t));
  };
  static const cpu::Kernels &of_float32 = best(DType::f32), &of_float64 = best(DType::f64);
  return stream == DType::f64 ? of_float64 : of_float32;
}

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kElementsPerThread = 16384;

int64_t rows_per_task(int64_t d) { return std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, d)); }

// torch's allocator begins each block on a line of memory of its own, so no two threads share one. It reports the block
// to torch's profiler.
at::DataPtr scratch_memory(int64_t bytes) { return c10::GetCPUAllocator()->allocate(bytes); }

// The weight of a call in the form that the row kernels read: the caller's memory if it has this form, else a temporary
// copy.
class RowWeight {
 public:
  RowWeight(const cpu::Kernels& kernels, const SiteParams& p, const Quantization* quantization = nullptr)
      : prepared_{.data = p.weight.data} {
    const DType wanted = accumulate_dtype(p.stream);
    const bool in_order = p.stream != DType::bf16 || kernels.bfloat_block == 1;
    if (p.weight.data && p.weight.dtype == wanted && in_order && !quantization) return;
    copy_ = scratch_memory(p.d * size_of(wanted));
    prepared_ = kernels.prepare_weight(p, quantization, copy_.get());
  }
  cpu::PreparedWeight prepared() const { return prepared_; }

 private:
  cpu::PreparedWeight prepared_;
  at::DataPtr copy_;
};

void run_forward(const ForwardParams& p, const Tensor&) {
  const cpu::Kernels& kernels = kernels_for(p.stream);
  const RowWeight weight(kernels, p, p.quantization ? &*p.quantization : nullptr);
  at::parallel_for(0, p.rows, rows_per_task(p.d),
                   [&](int64_t begin, int64_t end) { kernels.forward(p, weight.prepared(), begin, end); });
}

void sum_weight(const cpu::Kernels& kernels, const BackwardParams& p, const cpu::Scratch& sums) {
  const int64_t chunks = cpu::chunks_of(p.rows).count;
  constexpr int64_t width = cpu::kColumnBlock;
  const int64_t per_task = std::max<int64_t>(1, kElementsPerThread / width / chunks);
  at::parallel_for(0, (p.d + width - 1) / width, per_task, [&](int64_t begin, int64_t end) {
    kernels.sum_weight(p, sums, begin * width, std::min(end * width, p.d));
  });
}

void run_backward(const BackwardParams& p, const Tensor&) {
  if (!p.needs_g() && !p.grad_weight) return;
  const cpu::Kernels& kernels = kernels_for(p.stream);
  std::optional<RowWeight> weight;
  if (p.needs_g()) weight.emplace(kernels, p);
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
    kernels.backward(p, weight ? weight->prepared() : cpu::PreparedWeight(), scratch, begin, end);
  });
  if (p.grad_weight) sum_weight(kernels, p, sums);
  if (p.grad_lam) kernels.sum_lam(p, sums);
}

// Not through the dispatcher, which takes a third of a microsecond per output.
Tensor allocate(at::IntArrayRef sizes, at::ScalarType dtype, const Tensor&) {
  return at::detail::empty_cpu(sizes, dtype, /*pin_memory=*/false, /*memory_format=*/std::nullopt);
}

}  // namespace

TORCH_LIBRARY_IMPL(bhyt, CPU, m) { register_ops<DeviceOps<run_forward, run_backward, allocate>>(m); }

}  // namespace bhyt
