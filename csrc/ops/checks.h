// One validator for every device. Each message names the argument, what was expected and what was given.
// Sizes are compared as SymInts, so that the same checks serve symbolic shapes.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <optional>

namespace bhyt::checks {

using at::ScalarType;
using at::Tensor;

inline bool is_supported(ScalarType t) {
  return t == at::kFloat || t == at::kBFloat16 || t == at::kHalf || t == at::kDouble;
}

// Python's name: int64, where c10 says Long.
inline const char* name_of(ScalarType t) {
  switch (t) {
    case at::kFloat: return "float32";
    case at::kDouble: return "float64";
    case at::kHalf: return "float16";
    case at::kBFloat16: return "bfloat16";
    case at::kLong: return "int64";
    case at::kInt: return "int32";
    case at::kShort: return "int16";
    case at::kChar: return "int8";
    case at::kByte: return "uint8";
    case at::kBool: return "bool";
    case at::kFloat8_e4m3fn: return "float8_e4m3fn";
    case at::kComplexFloat: return "complex64";
    case at::kComplexDouble: return "complex128";
    default: return c10::toString(t);
  }
}

inline ScalarType accumulate_type(ScalarType stream) { return stream == at::kDouble ? at::kDouble : at::kFloat; }

inline bool same(const c10::SymInt& a, const c10::SymInt& b) {
  return a.sym_eq(b).expect_true(__FILE__, __LINE__);
}

inline void floating(const char* name, const Tensor& t) {
  TORCH_CHECK_TYPE(is_supported(t.scalar_type()), "bhyt: ", name,
                   ": expected dtype float32, float64, float16 or bfloat16, got ", name_of(t.scalar_type()));
}

inline void same_device(const char* name, const Tensor& t, const Tensor& x) {
  TORCH_CHECK_VALUE(t.device() == x.device(), "bhyt: ", name, ": expected device ", x.device(), " (that of x), got ",
                    t.device());
}

inline void same_dtype(const char* name, const Tensor& t, ScalarType expected) {
  TORCH_CHECK_TYPE(t.scalar_type() == expected, "bhyt: ", name, ": expected dtype ", name_of(expected), ", got ",
                   name_of(t.scalar_type()));
}

inline void same_shape(const char* name, const Tensor& t, const Tensor& x) {
  const auto given = t.sym_sizes(), expected = x.sym_sizes();
  bool equal = given.size() == expected.size();
  for (size_t i = 0; equal && i < given.size(); ++i) equal = same(given[i], expected[i]);
  TORCH_CHECK_VALUE(equal, "bhyt: ", name, ": expected shape ", expected, " (that of x), got ", given);
}

inline void one_element(const char* name, const Tensor& t, const Tensor& x) {
  floating(name, t);
  TORCH_CHECK_VALUE(same(t.sym_numel(), 1), "bhyt: ", name, ": expected one element, got shape ", t.sym_sizes());
  same_device(name, t, x);
}

// One number per row, kept as [..., 1] in the accumulate dtype of the stream.
inline void per_row(const char* name, const Tensor& t, const Tensor& x) {
  same_dtype(name, t, accumulate_type(x.scalar_type()));
  const auto given = t.sym_sizes(), like = x.sym_sizes();
  bool equal = given.size() == like.size() && same(given.back(), 1);
  for (size_t i = 0; equal && i + 1 < given.size(); ++i) equal = same(given[i], like[i]);
  TORCH_CHECK_VALUE(equal, "bhyt: ", name, ": expected shape [..., 1] with the leading dimensions of x ", like,
                    ", got ", given);
  same_device(name, t, x);
}

inline void row_tensor(const char* name, const Tensor& t) {
  floating(name, t);
  TORCH_CHECK_VALUE(t.dim() >= 1, "bhyt: ", name, ": expected at least one dimension, [..., d], got a scalar");
}

// `narrow` is added to, or comes back from, a stream that may be wider: bf16 branches on a float32 stream.
inline void at_most_as_wide(const char* name, const Tensor& narrow, const char* wide_name, const Tensor& wide) {
  floating(name, narrow);
  TORCH_CHECK_TYPE(c10::promoteTypes(narrow.scalar_type(), wide.scalar_type()) == wide.scalar_type(), "bhyt: ",
                   wide_name, ": expected the dtype of ", name, " (", name_of(narrow.scalar_type()),
                   ") or a wider one, got ", name_of(wide.scalar_type()));
}

inline void site(const Tensor& x, const std::optional<Tensor>& weight, const Tensor& lam, double kappa, double eps) {
  row_tensor("x", x);
  if (weight) {
    floating("weight", *weight);
    TORCH_CHECK_VALUE(weight->dim() == 1 && same(weight->sym_size(0), x.sym_size(-1)), "bhyt: weight: expected shape [",
                      x.sym_size(-1), "] (the last dimension of x), got ", weight->sym_sizes());
    same_device("weight", *weight, x);
  }
  one_element("lam", lam, x);
  TORCH_CHECK_VALUE(kappa > 0, "bhyt: kappa: expected a number > 0, got ", kappa);
  TORCH_CHECK_VALUE(eps >= 0, "bhyt: eps: expected a number >= 0, got ", eps);
}

inline void residual(const Tensor& x, const Tensor& residual) {
  row_tensor("x", x);
  floating("residual", residual);
  same_shape("residual", residual, x);
  at_most_as_wide("x", x, "residual", residual);
  same_device("residual", residual, x);
}

inline void given_variance(const Tensor& stream, const Tensor& variance, const std::optional<Tensor>& offset) {
  per_row("variance", variance, stream);
  if (offset) one_element("variance_offset", *offset, stream);
}

inline void contiguous(const char* name, const Tensor& t) {
  TORCH_CHECK_VALUE(t.is_contiguous(), "bhyt: ", name, ": expected a contiguous tensor to write to, got strides ",
                    t.sym_strides());
}

// Tensors that a caller gives for the outputs. Nothing is resized.
inline void output(const char* name, const Tensor& t, const Tensor& x, ScalarType dtype) {
  same_dtype(name, t, dtype);
  same_shape(name, t, x);
  same_device(name, t, x);
  contiguous(name, t);
}

inline void output_per_row(const char* name, const Tensor& t, const Tensor& x) {
  per_row(name, t, x);
  contiguous(name, t);
}

// The lowest integer of a dtype. For float8 it is 0, the only zero_point that float8 has.
inline int64_t lowest(ScalarType t) { return t == at::kChar ? -128 : 0; }

// Within these limits 1 / scale is a normal float32.
inline void quantization(double scale, int64_t zero_point, ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype == at::kChar || dtype == at::kByte || dtype == at::kFloat8_e4m3fn,
                   "bhyt: dtype: expected int8, uint8 or float8_e4m3fn, got ", name_of(dtype));
  TORCH_CHECK_VALUE(scale >= 0x1p-126 && scale <= 0x1p126, "bhyt: scale: expected a number > 0 (2^-126 to 2^126), got ",
                    scale);
  const int64_t highest = dtype == at::kFloat8_e4m3fn ? 0 : lowest(dtype) + 255;
  TORCH_CHECK_VALUE(zero_point >= lowest(dtype) && zero_point <= highest, "bhyt: zero_point: expected an integer from ",
                    lowest(dtype), " to ", highest, " for ", name_of(dtype), ", got ", zero_point);
}

inline void gradients(const Tensor& grad_y, const std::optional<Tensor>& grad_sum, const Tensor& x) {
  at_most_as_wide("grad_y", grad_y, "x", x);
  same_shape("grad_y", grad_y, x);
  same_device("grad_y", grad_y, x);
  if (grad_sum) {
    same_dtype("grad_sum", *grad_sum, x.scalar_type());
    same_shape("grad_sum", *grad_sum, x);
    same_device("grad_sum", *grad_sum, x);
  }
}

}  // namespace bhyt::checks
