// The CPU key: threads and scratch memory around the row kernels.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <memory>
#include <new>

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

// The gain as rows take it: itself when it has the accumulate dtype and rows take that in plain order, else a copy made
// once for all rows, for eight bits over their scale; ones when none is given, by which rows multiply exactly.
class WideWeight {
 public:
  explicit WideWeight(const SiteParams& p, const Quantization* quantization = nullptr) : data_(p.weight.data) {
    const DType wanted = accumulate_dtype(p.stream);
    const bool in_order = p.stream != DType::bf16 || kernels().bfloat_block == 1;
    if (data_ != nullptr && p.weight.dtype == wanted && in_order && !quantization) return;
    copy_.reset(new char[p.d * size_of(wanted)]);
    kernels().widen(p.weight, p.stream, quantization, p.d, copy_.get());
    data_ = copy_.get();
  }
  const void* data() const { return data_; }

 private:
  const void* data_;
  std::unique_ptr<char[]> copy_;
};

class Aligned {
 public:
  explicit Aligned(int64_t bytes) : data_(::operator new(bytes, kLine)) {}
  ~Aligned() { ::operator delete(data_, kLine); }
  Aligned(const Aligned&) = delete;
  void* get() const { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  void* data_;
};

void run_forward(const ForwardParams& p, const Tensor&) {
  const WideWeight weight(p, p.quantization ? &*p.quantization : nullptr);
  at::parallel_for(0, p.rows, rows_per_task(p.d),
                   [&](int64_t begin, int64_t end) { kernels().forward(p, weight.data(), begin, end); });
}

void run_backward(const BackwardParams& p, const Tensor&) {
  const WideWeight weight(p);
  const auto chunks = cpu::chunks_of(p.rows);
  // Aligned, so that the chunks of two threads share no line of memory where d is a multiple of one.
  const Aligned weight_partials(chunks.count * p.d * size_of(accumulate_dtype(p.stream)));
  const std::unique_ptr<double[]> lam_partials(new double[chunks.count]);
  const cpu::Partials partials{weight_partials.get(), lam_partials.get()};

  const int64_t chunks_per_task = (rows_per_task(p.d) + chunks.rows_per_chunk - 1) / chunks.rows_per_chunk;
  at::parallel_for(0, chunks.count, chunks_per_task, [&](int64_t begin, int64_t end) {
    kernels().backward(p, weight.data(), partials, begin, end);
  });
  if (p.grad_weight) {
    constexpr int64_t width = cpu::kColumnBlock;
    const int64_t per_task = std::max<int64_t>(1, kElementsPerThread / width / std::max<int64_t>(1, chunks.count));
    at::parallel_for(0, (p.d + width - 1) / width, per_task, [&](int64_t begin, int64_t end) {
      kernels().sum_weight(p, partials, begin * width, std::min(end * width, p.d));
    });
  }
  if (p.grad_lam) kernels().sum_lam(p, partials);
}

// Without a round through the dispatcher: a third of a microsecond per output.
Tensor allocate(at::IntArrayRef sizes, at::ScalarType dtype, const Tensor&) {
  return at::detail::empty_cpu(sizes, dtype, /*pin_memory=*/false, /*memory_format=*/std::nullopt);
}

}  // namespace

TORCH_LIBRARY_IMPL(bhyt, CPU, m) { register_ops<DeviceOps<run_forward, run_backward, allocate>>(m); }

}  // namespace bhyt
