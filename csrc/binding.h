// From tensors to params: checks, allocation and row views, shared by every device that has kernels.
// A device file adds only what is its own: threads on the CPU, guard and stream on CUDA.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <array>
#include <optional>
#include <tuple>

#include "checks.h"
#include "params.h"

namespace bhyt {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kHalf: return DType::f16;
    case at::kBFloat16: return DType::bf16;
    case at::kDouble: return DType::f64;
    case at::kChar: return DType::i8;
    case at::kByte: return DType::u8;
    case at::kFloat8_e4m3fn: return DType::f8;
    default: return DType::f32;  // checks.h has refused everything else
  }
}

// Null only where there is nothing to read.
inline const void* data_of(const Tensor& t) {
  const void* data = t.const_data_ptr();
  TORCH_CHECK_VALUE(data != nullptr || t.numel() == 0, "bhyt: expected tensors with data, got one of shape ", t.sizes(),
                    " whose storage has been freed");
  return data;
}

inline Values values_of(const Tensor& t) { return {data_of(t), dtype_of(t)}; }

// The distance between rows when the leading dimensions of t step evenly and its last is dense; else -1.
inline int64_t even_row_stride(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t last = t.dim() - 1;
  if (strides[last] != 1 && sizes[last] > 1) return -1;
  int64_t stride = sizes[last], rows = 0;  // rows == 0: no dimension of more than one row seen yet
  for (int64_t i = last - 1; i >= 0; --i) {
    if (sizes[i] == 1) continue;
    if (rows == 0) {
      stride = strides[i];
      rows = sizes[i];
    } else {
      if (strides[i] != stride * rows) return -1;
      rows *= sizes[i];
    }
  }
  return stride;
}

// Row views of a call's inputs; owns the copies of those whose strides no kernel takes.
class RowViews {
 public:
  Rows operator()(const Tensor& t) {
    const void* data = data_of(t);
    if (t.numel() == 0) return {data, 0};
    if (t.is_contiguous()) return {data, t.size(-1)};
    if (const int64_t stride = even_row_stride(t); stride >= 0) return {data, stride};
    return {dense(t), t.size(-1)};
  }

  const void* dense(const Tensor& t) {
    const void* data = data_of(t);
    if (t.is_contiguous()) return data;
    return (kept_[count_++] = t.contiguous()).const_data_ptr();
  }

 private:
  std::array<Tensor, 6> kept_;  // a backward has six inputs beside lam and variance_offset
  int count_ = 0;
};

inline void describe_site(SiteParams& p, RowViews& view, const Tensor& stream, const OptionalTensor& weight,
                          const Tensor& lam, double kappa, double eps) {
  p.d = stream.size(-1);
  p.rows = c10::multiply_integers(stream.sizes().slice(0, stream.dim() - 1));
  p.stream = dtype_of(stream);
  if (weight) p.weight = {view.dense(*weight), dtype_of(*weight)};
  p.lam = values_of(lam);
  p.kappa = kappa;
  p.eps = eps;
}

// How a device makes an output: the sizes and dtype given, on x's device.
using Allocate = Tensor (*)(at::IntArrayRef sizes, at::ScalarType dtype, const Tensor& x);

// How a call asks for y in eight bits, in the names of the schemas.
struct Quantized {
  double scale;
  int64_t zero_point;
  at::ScalarType dtype;
};

// A forward call, exact (no variance given) or approximate, with or without a residual, quantised or not.
struct ForwardCall {
  ForwardParams params;
  Tensor y, sum, variance;  // sum: with a residual only; variance: of exact sites only

  ForwardCall(Allocate allocate, const Tensor& x, const Tensor* residual, const Tensor* given_variance,
              const OptionalTensor& offset, const OptionalTensor& weight, const Tensor& lam, double kappa, double eps,
              const std::optional<Quantized>& quantized = {}) {
    if (residual) checks::residual(x, *residual);
    const Tensor& stream = residual ? *residual : x;
    checks::site(x, weight, lam, kappa, eps);
    if (given_variance) checks::given_variance(stream, *given_variance, offset);
    if (quantized) checks::quantization(quantized->scale, quantized->zero_point, quantized->dtype);

    describe_site(params, view_, stream, weight, lam, kappa, eps);
    params.branch = dtype_of(x);
    params.exact = given_variance == nullptr;
    params.x = view_(x);
    y = allocate(x.sizes(), quantized ? quantized->dtype : x.scalar_type(), x);
    if (quantized)
      params.quantization = {dtype_of(y), 1 / quantized->scale, static_cast<int>(quantized->zero_point)};
    params.y = y.mutable_data_ptr();
    if (residual) {
      params.residual = view_(*residual);
      sum = allocate(x.sizes(), residual->scalar_type(), x);
      params.sum = sum.mutable_data_ptr();
    }
    if (given_variance) {
      params.variance = view_.dense(*given_variance);
      if (offset) params.offset = values_of(*offset);
    } else {
      at::DimVector shape(x.sizes());
      shape.back() = 1;
      variance = allocate(shape, checks::accumulate_type(stream.scalar_type()), x);
      params.variance_out = variance.mutable_data_ptr();
    }
  }

 private:
  RowViews view_;
};

// A backward call; outputs that the mask leaves out stay undefined.
struct BackwardCall {
  BackwardParams params;
  Tensor grad_x, grad_variance, grad_weight, grad_lam;
  bool empty = false;  // no element to work on: the gradients are zeros already

  struct Wanted {
    bool x, variance, weight, lam;
  };

  BackwardCall(Allocate allocate, bool exact, const Tensor& grad_y, const OptionalTensor& grad_variance_in,
               const OptionalTensor& grad_sum, const Tensor& x, const Tensor& variance, const OptionalTensor& offset,
               const OptionalTensor& weight, const Tensor& lam, double kappa, double eps, Wanted wanted) {
    checks::site(x, weight, lam, kappa, eps);
    checks::gradients(grad_y, grad_sum, x);
    checks::given_variance(x, variance, offset);
    if (grad_variance_in) checks::per_row("grad_variance", *grad_variance_in, x);

    describe_site(params, view_, x, weight, lam, kappa, eps);
    params.branch = dtype_of(grad_y);
    params.exact = exact;
    params.x = view_(x);
    params.grad_y = view_(grad_y);
    if (grad_sum) params.grad_sum = view_(*grad_sum);
    params.variance = view_.dense(variance);
    if (grad_variance_in) params.grad_variance = view_.dense(*grad_variance_in);
    if (offset) params.offset = values_of(*offset);
    const auto gradient_of = [&](const Tensor& t, Tensor& grad) {
      return (grad = allocate(t.sizes(), t.scalar_type(), x)).mutable_data_ptr();
    };
    if (wanted.x) params.grad_x = gradient_of(x, grad_x);
    if (wanted.variance && !exact) params.grad_variance_out = gradient_of(variance, grad_variance);
    if (wanted.weight && weight) params.grad_weight = gradient_of(*weight, grad_weight);
    if (wanted.lam) params.grad_lam = gradient_of(lam, grad_lam);
    if (empty = x.numel() == 0; empty)
      for (Tensor* grad : {&grad_x, &grad_variance, &grad_weight, &grad_lam})
        if (grad->defined()) grad->zero_();
  }

 private:
  RowViews view_;
};

inline Tensor allocate_by_dispatch(at::IntArrayRef sizes, at::ScalarType dtype, const Tensor& x) {
  return at::empty(sizes, x.options().dtype(dtype));
}

// The ops of a device whose kernels run a ForwardParams or a BackwardParams. `x` is given for its device.
template <void (*run_forward)(const ForwardParams&, const Tensor& x),
          void (*run_backward)(const BackwardParams&, const Tensor& x), Allocate allocate = allocate_by_dispatch>
struct DeviceOps {
  static std::tuple<Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& weight, const Tensor& lam,
                                            double kappa, double eps) {
    ForwardCall call(allocate, x, nullptr, nullptr, {}, weight, lam, kappa, eps);
    run_forward(call.params, x);
    return {std::move(call.y), std::move(call.variance)};
  }

  static Tensor forward_approx(const Tensor& x, const Tensor& variance, const OptionalTensor& variance_offset,
                               const OptionalTensor& weight, const Tensor& lam, double kappa, double eps) {
    ForwardCall call(allocate, x, nullptr, &variance, variance_offset, weight, lam, kappa, eps);
    run_forward(call.params, x);
    return std::move(call.y);
  }

  static std::tuple<Tensor, Tensor, Tensor> add_forward(const Tensor& x, const Tensor& residual,
                                                        const OptionalTensor& weight, const Tensor& lam, double kappa,
                                                        double eps) {
    ForwardCall call(allocate, x, &residual, nullptr, {}, weight, lam, kappa, eps);
    run_forward(call.params, x);
    return {std::move(call.y), std::move(call.sum), std::move(call.variance)};
  }

  static std::tuple<Tensor, Tensor> add_forward_approx(const Tensor& x, const Tensor& residual, const Tensor& variance,
                                                       const OptionalTensor& variance_offset,
                                                       const OptionalTensor& weight, const Tensor& lam, double kappa,
                                                       double eps) {
    ForwardCall call(allocate, x, &residual, &variance, variance_offset, weight, lam, kappa, eps);
    run_forward(call.params, x);
    return {std::move(call.y), std::move(call.sum)};
  }

  static std::tuple<Tensor, Tensor> forward_quantized(const Tensor& x, const OptionalTensor& weight, const Tensor& lam,
                                                      double scale, int64_t zero_point, at::ScalarType dtype,
                                                      double kappa, double eps) {
    ForwardCall call(allocate, x, nullptr, nullptr, {}, weight, lam, kappa, eps, Quantized{scale, zero_point, dtype});
    run_forward(call.params, x);
    return {std::move(call.y), std::move(call.variance)};
  }

  static Tensor forward_approx_quantized(const Tensor& x, const Tensor& variance, const OptionalTensor& variance_offset,
                                         const OptionalTensor& weight, const Tensor& lam, double scale,
                                         int64_t zero_point, at::ScalarType dtype, double kappa, double eps) {
    ForwardCall call(allocate, x, nullptr, &variance, variance_offset, weight, lam, kappa, eps,
                     Quantized{scale, zero_point, dtype});
    run_forward(call.params, x);
    return std::move(call.y);
  }

  static std::tuple<Tensor, Tensor, Tensor> add_forward_quantized(const Tensor& x, const Tensor& residual,
                                                                  const OptionalTensor& weight, const Tensor& lam,
                                                                  double scale, int64_t zero_point,
                                                                  at::ScalarType dtype, double kappa, double eps) {
    ForwardCall call(allocate, x, &residual, nullptr, {}, weight, lam, kappa, eps, Quantized{scale, zero_point, dtype});
    run_forward(call.params, x);
    return {std::move(call.y), std::move(call.sum), std::move(call.variance)};
  }

  static std::tuple<Tensor, Tensor> add_forward_approx_quantized(
      const Tensor& x, const Tensor& residual, const Tensor& variance, const OptionalTensor& variance_offset,
      const OptionalTensor& weight, const Tensor& lam, double scale, int64_t zero_point, at::ScalarType dtype,
      double kappa, double eps) {
    ForwardCall call(allocate, x, &residual, &variance, variance_offset, weight, lam, kappa, eps,
                     Quantized{scale, zero_point, dtype});
    run_forward(call.params, x);
    return {std::move(call.y), std::move(call.sum)};
  }

  static std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const OptionalTensor& grad_variance,
                                                     const OptionalTensor& grad_sum, const Tensor& x,
                                                     const Tensor& variance, const OptionalTensor& weight,
                                                     const Tensor& lam, double kappa, double eps,
                                                     std::array<bool, 3> output_mask) {
    BackwardCall call(allocate, true, grad_y, grad_variance, grad_sum, x, variance, {}, weight, lam, kappa, eps,
                      {output_mask[0], false, output_mask[1], output_mask[2]});
    if (!call.empty) run_backward(call.params, x);
    return {std::move(call.grad_x), std::move(call.grad_weight), std::move(call.grad_lam)};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward_approx(
      const Tensor& grad_y, const OptionalTensor& grad_sum, const Tensor& x, const Tensor& variance,
      const OptionalTensor& variance_offset, const OptionalTensor& weight, const Tensor& lam, double kappa, double eps,
      std::array<bool, 4> output_mask) {
    BackwardCall call(allocate, false, grad_y, {}, grad_sum, x, variance, variance_offset, weight, lam, kappa, eps,
                      {output_mask[0], output_mask[1], output_mask[2], output_mask[3]});
    if (!call.empty) run_backward(call.params, x);
    return {std::move(call.grad_x), std::move(call.grad_variance), std::move(call.grad_weight),
            std::move(call.grad_lam)};
  }
};

}  // namespace bhyt
