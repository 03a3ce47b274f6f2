// What the tests of the kernels share: tensors with guarded memory, a float64 evaluation of the formula, errors in ulp.
// Written from the formula, not from the kernels; only params.h is common.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/params.h"

namespace rows {

using bhyt::DType;

inline const char* name(DType t) {
  const char* const names[] = {"f16", "bf16", "f32", "f64", "i8", "u8", "f8"};
  return names[int(t)];
}
inline int mantissa_bits(DType t) { return t == DType::f16 ? 10 : t == DType::bf16 ? 7 : t == DType::f32 ? 23 : 52; }
inline int lowest_exponent(DType t) { return t == DType::f16 ? -14 : t == DType::f64 ? -1022 : -126; }
inline double largest(DType t) {
  if (t == DType::f64) return 0x1.fffffffffffffp1023;
  return t == DType::f16 ? 65504. : t == DType::bf16 ? 0x1.fep127 : 0x1.fffffep127;
}

inline double ulp(double v, DType t) {
  int e = 0;
  if (v != 0) std::frexp(v, &e);
  return std::ldexp(1., std::max(e - 1, lowest_exponent(t)) - mantissa_bits(t));
}

inline double rounded(double v, DType t) {
  if (!std::isfinite(v) || t == DType::f64) return v;
  const double r = std::nearbyint(v / ulp(v, t)) * ulp(v, t);
  return std::fabs(r) > largest(t) ? std::copysign(INFINITY, v) : r;
}

// [rows, d] of a dtype, `offset` elements into its memory, rows `stride` apart; guards in front, between and behind.
class Tensor {
 public:
  Tensor() = default;
  Tensor(DType t, int64_t rows, int64_t d, int64_t stride = -1, int64_t offset = 0)
      : dtype(t), rows(rows), d(d), stride(stride < 0 ? d : stride), offset(offset) {
    const int64_t span = (rows > 0 ? (rows - 1) * this->stride : 0) + d;
    memory_.assign((kGuard + offset + span + kGuard) * bhyt::size_of(t) + 64, char(0xff));  // NaN in every dtype
    const auto base = (reinterpret_cast<uintptr_t>(memory_.data()) + 63) & ~uintptr_t(63);
    data_ = reinterpret_cast<char*>(base) + (kGuard + offset) * bhyt::size_of(t);
  }
  Tensor(Tensor&&) = default;
  Tensor& operator=(Tensor&&) = default;

  explicit operator bool() const { return data_ != nullptr; }
  void* data() const { return data_; }
  bhyt::Rows view() const { return {data_, stride}; }
  bhyt::Values values() const { return {data_, dtype}; }

  double get(int64_t row, int64_t i) const {
    const char* at = data_ + (row * stride + i) * bhyt::size_of(dtype);
    if (dtype == DType::f64) return read<double>(at);
    if (dtype == DType::f32) return read<float>(at);
    if (dtype == DType::i8) return read<int8_t>(at);
    if (dtype == DType::u8) return read<uint8_t>(at);
    if (dtype == DType::f8) return read_float8(read<uint8_t>(at));
    const uint32_t bits = read<uint16_t>(at);
    if (dtype == DType::bf16) return read_bits(bits << 16);
    const int e = bits >> 10 & 31, m = bits & 1023;
    const double v = e == 31 ? (m ? NAN : INFINITY) : e ? std::ldexp(1024 + m, e - 25) : std::ldexp(m, -24);
    return bits & 0x8000 ? -v : v;
  }

  void set(int64_t row, int64_t i, double v) {
    char* at = data_ + (row * stride + i) * bhyt::size_of(dtype);
    v = rounded(v, dtype);
    if (dtype == DType::f64) return write(at, v);
    const float f = static_cast<float>(v);
    if (dtype == DType::f32) return write(at, f);
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if (dtype == DType::bf16) return write(at, static_cast<uint16_t>(bits >> 16));
    const double m = std::fabs(v);
    int e = 0;
    std::frexp(m, &e);
    uint32_t half = 0;
    if (std::isnan(v))
      half = 0x7e00;
    else if (std::isinf(v))
      half = 0x7c00;
    else if (m != 0 && e - 1 < -14)
      half = static_cast<uint32_t>(std::ldexp(m, 24));
    else if (m != 0)
      half = (uint32_t(e + 14) << 10) + static_cast<uint32_t>(std::ldexp(m, 11 - e)) - 1024;
    write(at, static_cast<uint16_t>(half | (std::signbit(v) ? 0x8000 : 0)));
  }

  bool same_bits(const Tensor& other, int64_t row, int64_t other_row) const {
    return std::memcmp(data_ + row * stride * bhyt::size_of(dtype),
                       other.data_ + other_row * other.stride * bhyt::size_of(dtype), d * bhyt::size_of(dtype)) == 0;
  }

  // Nothing but the rows was written.
  bool guards_hold() const {
    const int64_t size = bhyt::size_of(dtype);
    const auto untouched = [](const char* from, const char* to) {
      for (; from < to; ++from)
        if (*from != char(0xff)) return false;
      return true;
    };
    const char* from = memory_.data();
    for (int64_t row = 0; row < (stride == 0 ? 1 : rows); ++row) {
      if (!untouched(from, data_ + row * stride * size)) return false;
      from = data_ + (row * stride + d) * size;
    }
    return untouched(from, memory_.data() + memory_.size());
  }

  DType dtype = DType::f32;
  int64_t rows = 0, d = 0, stride = 0, offset = 0;

 private:
  static constexpr int64_t kGuard = 64;
  std::vector<char> memory_;
  char* data_ = nullptr;

  template <class T>
  static T read(const char* at) {
    T v;
    std::memcpy(&v, at, sizeof v);
    return v;
  }
  static double read_bits(uint32_t bits) {
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
  }
  static double read_float8(uint32_t bits) {
    const int e = bits >> 3 & 15, m = bits & 7;
    const double v = (bits & 0x7f) == 0x7f ? NAN : e ? std::ldexp(8 + m, e - 10) : std::ldexp(m, -9);
    return bits & 0x80 ? -v : v;
  }
  template <class T>
  static void write(char* at, T v) {
    std::memcpy(at, &v, sizeof v);
  }
};

// Rows of several kinds: Gaussian, with outliers, tiny, zero, large.
inline Tensor random_rows(DType t, int64_t rows, int64_t d, uint64_t seed, int64_t stride = -1, int64_t offset = 0) {
  Tensor x(t, rows, d, stride, offset);
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  for (int64_t row = 0; row < rows; ++row) {
    const int kind = row % 5;
    const double size = kind == 2 ? 1e-3 : kind == 4 ? 30 : 1;
    for (int64_t i = 0; i < d; ++i) {
      double v = normal(random) * size;
      if (kind == 1 && random() % 50 == 0) v *= 25;
      x.set(row, i, kind == 3 && row > 4 ? 0 : v);
    }
  }
  return x;
}

inline Tensor copy_of(const Tensor& from, int64_t stride, int64_t offset, int64_t first = 0, int64_t count = -1) {
  if (count < 0) count = from.rows;
  Tensor to(from.dtype, count, from.d, stride, offset);
  for (int64_t row = 0; row < count; ++row)
    for (int64_t i = 0; i < from.d; ++i) to.set(row, i, from.get(first + row, i));
  return to;
}

inline int& failures() {
  static int n = 0;
  return n;
}
inline int64_t& checks() {
  static int64_t n = 0;
  return n;
}

inline void check(bool holds, const std::string& what) {
  ++checks();
  if (holds) return;
  if (++failures() <= 25) std::printf("FAILED %s\n", what.c_str());
  if (failures() == 25) std::printf("(more failures are counted, not shown)\n");
}

inline int report(const char* program) {
  std::printf("%s: %lld checks, %d failures\n", program, static_cast<long long>(checks()), failures());
  return failures() ? 1 : 0;
}

}  // namespace rows
