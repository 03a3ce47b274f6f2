// From a Site to the params of a kernel: allocation and row views, shared by every device that has kernels.
// A device file adds only what is its own: threads on the CPU, guard and stream on CUDA.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <array>
#include <limits>

#include "adapters.h"
#include "params.h"

namespace bhyt {

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

// The memory of t. Null only where t has no elements.
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

// Row views of a call's inputs. Owns copies of the inputs whose strides no kernel takes.
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

// Fills in the fields that a Site and a SiteGradients share.
template <class Call>
void describe_site(SiteParams& p, RowViews& view, const Call& s, const Tensor& stream) {
  p.d = stream.size(-1);
  p.rows = c10::multiply_integers(stream.sizes().slice(0, stream.dim() - 1));
  p.stream = dtype_of(stream);
  if (s.weight) p.weight = {view.dense(*s.weight), dtype_of(*s.weight)};
  p.lam = values_of(s.lam);
  if (s.offset) p.offset = values_of(*s.offset);
  p.kappa = s.kappa;
  p.eps = s.eps;
}

// Kernels read and write element by element, so y may take the memory of x, and sum that of residual. With any other
// overlap a kernel would read its own output.
inline void check_memory(const Site& s) {
  struct Named {
    const char* name;
    const Tensor* tensor;
    const Named* in_place_of = nullptr;  // the input whose memory an output may take
  };
  const Named x{"x", &s.x}, residual{"residual", s.residual};
  const std::array outputs{Named{"y", &s.into->y, &x}, Named{"sum", &s.into->sum, &residual},
                           Named{"variance", &s.into->variance}};
  const Named inputs[] = {x, residual, {"variance", s.variance}, {"variance_offset", s.offset ? &*s.offset : nullptr},
                          {"weight", s.weight ? &*s.weight : nullptr}, {"lam", &s.lam}};
  const auto given = [](const Named& n) { return n.tensor && n.tensor->defined() && n.tensor->numel() > 0; };
  const auto range = [](const Tensor& t) {
    int64_t last = 0;
    for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
    const auto* begin = static_cast<const char*>(data_of(t));
    return std::pair(begin, begin + (last + 1) * static_cast<int64_t>(t.element_size()));
  };
  const auto refuse_overlap = [&](const Named& out, const Named& other) {
    if (!given(out) || !given(other)) return;
    const auto [begin, end] = range(*out.tensor);
    const auto [other_begin, other_end] = range(*other.tensor);
    const bool in_place = out.in_place_of && out.in_place_of->tensor == other.tensor && begin == other_begin &&
                          other.tensor->is_contiguous();
    TORCH_CHECK_VALUE(in_place || end <= other_begin || other_end <= begin, "bhyt: ", out.name,
                      ": expected memory of its own", out.in_place_of ? ", or all of that of " : "",
                      out.in_place_of ? out.in_place_of->name : "", "; it overlaps ", other.name);
  };
  for (size_t i = 0; i < outputs.size(); ++i) {
    for (const Named& input : inputs) refuse_overlap(outputs[i], input);
    for (size_t j = 0; j < i; ++j) refuse_overlap(outputs[i], outputs[j]);
  }
}

// How a device makes an output: the sizes and dtype given, on x's device.
using Allocate = Tensor (*)(at::IntArrayRef sizes, at::ScalarType dtype, const Tensor& x);

inline Tensor allocate_by_dispatch(at::IntArrayRef sizes, at::ScalarType dtype, const Tensor& x) {
  return at::empty(sizes, x.options().dtype(dtype));
}

// The ops of a device whose kernels run a ForwardParams or a BackwardParams. `x` is given for its device.
template <void (*run_forward)(const ForwardParams&, const Tensor& x),
          void (*run_backward)(const BackwardParams&, const Tensor& x), Allocate allocate = allocate_by_dispatch>
struct DeviceOps {
  static Outputs forward(const Site& s) {
    check(s);
    RowViews view;
    ForwardParams p;
    Outputs out;
    describe_site(p, view, s, s.stream());
    p.branch = dtype_of(s.x);
    p.exact = !s.variance;
    p.x = view(s.x);
    if (s.into) {
      check_memory(s);
      out = *s.into;
    }
    const auto made = [&](Tensor& t, at::IntArrayRef sizes, at::ScalarType dtype) {
      if (!s.into) t = allocate(sizes, dtype, s.x);
      return t.mutable_data_ptr();
    };
    p.y = made(out.y, s.x.sizes(), s.y_dtype());
    if (const auto& to = s.quantized)
      p.quantization = {dtype_of(out.y), 1 / to->scale, static_cast<int>(to->zero_point)};
    if (s.residual) {
      p.residual = view(*s.residual);
      p.sum = made(out.sum, s.x.sizes(), s.residual->scalar_type());
    }
    if (s.variance) {
      p.variance = view.dense(*s.variance);
    } else {
      at::DimVector shape(s.x.sizes());
      shape.back() = 1;
      p.variance_out = made(out.variance, shape, checks::accumulate_type(s.stream().scalar_type()));
    }
    if (s.x.numel() > 0)
      run_forward(p, s.x);
    else if (out.variance.defined())
      out.variance.fill_(std::numeric_limits<double>::quiet_NaN());  // the mean of nothing
    return out;
  }

  static Gradients backward(const SiteGradients& s) {
    check(s);
    RowViews view;
    BackwardParams p;
    Gradients grads;
    describe_site(p, view, s, s.x);
    p.branch = dtype_of(s.grad_y);
    p.exact = s.exact;
    p.x = view(s.x);
    p.grad_y = view(s.grad_y);
    if (s.grad_sum) p.grad_sum = view(*s.grad_sum);
    p.variance = view.dense(s.variance);
    if (s.grad_variance) p.grad_variance = view.dense(*s.grad_variance);
    const auto gradient_of = [&](const Tensor& t, Tensor& grad) {
      return (grad = allocate(t.sizes(), t.scalar_type(), s.x)).mutable_data_ptr();
    };
    if (s.wanted.x) p.grad_x = gradient_of(s.x, grads.x);
    if (s.wanted.variance) p.grad_variance_out = gradient_of(s.variance, grads.variance);
    if (s.wanted.weight && s.weight) p.grad_weight = gradient_of(*s.weight, grads.weight);
    if (s.wanted.lam) p.grad_lam = gradient_of(s.lam, grads.lam);
    if (s.x.numel() > 0) {
      run_backward(p, s.x);
    } else {
      for (Tensor* grad : {&grads.x, &grads.variance, &grads.weight, &grads.lam})
        if (grad->defined()) grad->zero_();
    }
    return grads;
  }
};

}  // namespace bhyt
