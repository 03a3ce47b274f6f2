// What a kernel is given: raw pointers, sizes and row strides. No torch headers.
#pragma once

#include <cstdint>
#include <optional>

namespace bhyt {

// i8, u8 and f8 (float8_e4m3fn) are for quantised outputs alone.
enum class DType : int8_t { f16, bf16, f32, f64, i8, u8, f8 };

// The dtype of arithmetic, statistics and sums over rows.
constexpr DType accumulate_dtype(DType stream) { return stream == DType::f64 ? DType::f64 : DType::f32; }

constexpr int64_t size_of(DType t) {
  return t == DType::f64 ? 8 : t == DType::f32 ? 4 : t == DType::f16 || t == DType::bf16 ? 2 : 1;
}

// Row i starts at data + i * stride (elements); the d elements of a row are adjacent.
// stride 0 repeats one row; data == nullptr means "not given" or "not wanted".
struct Rows {
  const void* data = nullptr;
  int64_t stride = 0;
};

// A tensor of one element (lam, variance_offset) or of d elements (weight), in its own dtype and memory.
struct Values {
  const void* data = nullptr;
  DType dtype = DType::f32;
};

// One site, in the names of the formula:  a = lam / (kappa sqrt(v + offset + eps)),  y = weight * tanh(a x). v is the
// mean square of a row of the stream. `branch` is the dtype of y, `stream` the dtype of this row. The two differ only
// where a 16-bit branch is added to a wider residual stream. `x` has the ops' meaning: the branch in a forward, the row
// of the stream in a backward.
struct SiteParams {
  int64_t rows = 0;
  int64_t d = 0;
  DType branch = DType::f32;
  DType stream = DType::f32;
  bool exact = true;  // v is computed from the row; otherwise it is given
  Values weight;      // [d], optional: gain 1
  Values lam;         // one element
  Values offset;      // one element, optional: 0; approximate sites only
  double kappa = 10.0;
  double eps = 1e-6;
};

// y in eight bits: q = saturate(round_half_even(y / scale) + zero_point). y is not rounded before. A NaN becomes
// zero_point. In f8 zero_point is 0, and a NaN stays NaN.
struct Quantization {
  DType dtype = DType::i8;
  double inverse_scale = 1;  // a normal float32
  int zero_point = 0;        // within the limits of dtype

  constexpr double lowest() const { return dtype == DType::f8 ? -448 : dtype == DType::u8 ? 0 : -128; }
  constexpr double highest() const { return dtype == DType::f8 ? 448 : dtype == DType::u8 ? 255 : 127; }
};

struct ForwardParams : SiteParams {
  Rows x;                               // [rows, d] branch; without a residual also the stream
  Rows residual;                        // [rows, d] stream, optional
  void* y = nullptr;                    // [rows, d] branch, or quantization->dtype; contiguous
  void* sum = nullptr;                  // [rows, d] stream, contiguous; with a residual only
  const void* variance = nullptr;       // [rows] accumulate dtype; approximate sites
  void* variance_out = nullptr;         // [rows] accumulate dtype; exact sites
  std::optional<Quantization> quantization;
};

struct BackwardParams : SiteParams {
  Rows grad_y;                          // [rows, d] branch
  Rows grad_sum;                        // [rows, d] stream, optional
  Rows x;                               // [rows, d] stream: what the forward took, or its sum
  const void* variance = nullptr;       // [rows] accumulate dtype
  const void* grad_variance = nullptr;  // [rows] accumulate dtype, optional; exact sites
  void* grad_x = nullptr;               // [rows, d] stream, contiguous, optional
  void* grad_variance_out = nullptr;    // [rows] accumulate dtype, optional; approximate sites
  void* grad_weight = nullptr;          // [d] weight.dtype, optional
  void* grad_lam = nullptr;             // one element of lam.dtype, optional

  // Whether a wanted gradient needs S, the sum of g x over a row; whether a wanted gradient needs g.
  bool needs_sums() const { return grad_lam || (exact ? grad_x : grad_variance_out); }
  bool needs_g() const { return grad_x || needs_sums(); }
};

}  // namespace bhyt
