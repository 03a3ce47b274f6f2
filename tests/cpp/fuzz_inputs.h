// From the bytes of a fuzzer to the inputs of a call: buffers of exactly its size, with values that may be NaN,
// infinite or zero; strides and offsets; a site's parameters.
#pragma once
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cpu/scalar.h"

namespace bhyt::fuzz {

struct Bytes {
  const uint8_t* data;
  size_t size;

  // A number below limit; 0 when the bytes have run out.
  int64_t below(int64_t limit) {
    uint32_t value = 0;
    for (int i = 0; i < 2 && size > 0; ++i, ++data, --size) value = value << 8 | *data;
    return value % limit;
  }
  template <typename T, size_t n>
  T one_of(const T (&choices)[n]) {
    return choices[below(n)];
  }
};

// n elements `offset` elements into a heap block that ends with the last of them; at first every byte is 0xff, a NaN.
class Buffer {
 public:
  Buffer() = default;
  Buffer(DType t, int64_t n, int64_t offset = 0)
      : dtype_(t), bytes_((offset + n) * size_of(t)), offset_(offset * size_of(t)), block_(new char[bytes_]) {
    std::memset(block_.get(), 0xff, bytes_);
  }
  char* data() const { return block_ ? block_.get() + offset_ : nullptr; }
  Values values() const { return {data(), dtype_}; }
  double get(int64_t i) const { return cpu::read(values(), i); }
  void set(int64_t i, double x) { cpu::write(x, dtype_, data(), i); }
  void set_bits(int64_t i) { std::memset(data() + i * size_of(dtype_), 0xff, size_of(dtype_)); }
  std::vector<char> bytes() const { return {block_.get(), block_.get() + bytes_}; }

 private:
  DType dtype_ = DType::f32;
  int64_t bytes_ = 0, offset_ = 0;
  std::unique_ptr<char[]> block_;
};

// A row tensor of an input: any stride and offset.
struct Input {
  Buffer buffer;
  int64_t stride = 0;
  std::vector<char> before;
  double get(int64_t row, int64_t j) const { return buffer.get(row * stride + j); }
  Rows rows() const { return {buffer.data(), stride}; }
  bool unchanged() const { return buffer.bytes() == before; }
};

class Source {
 public:
  explicit Source(Bytes& in) : in_(in), random_(in.below(1 << 16)) {}

  double uniform() { return std::ldexp(static_cast<double>(random_() >> 11), -53); }
  double scale(DType t) { return std::ldexp(1.0, in_.below(t == DType::f16 ? 16 : 25) - 12); }
  double value(double scale) { return scale * 2 * (uniform() + uniform() + uniform() - 1.5); }

  Buffer vector(DType t, int64_t n, double scale, bool positive = false) {
    Buffer b(t, n, in_.below(8));
    for (int64_t i = 0; i < n; ++i) b.set(i, positive ? scale * (uniform() + 0.01) : value(scale));
    return b;
  }

  // May hold a row of zeros and a few NaN and infinities.
  Input input(DType t, int64_t rows, int64_t d) {
    Input x;
    const int64_t kind = in_.below(4);
    x.stride = kind == 0 ? 0 : kind == 1 ? d + in_.below(9) : d;
    x.buffer = Buffer(t, rows == 0 ? 0 : (rows - 1) * x.stride + d, in_.below(8));
    const double s = scale(t);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t j = 0; j < d; ++j) x.buffer.set(row * x.stride + j, value(s));
    if (rows > 0 && d > 0) {
      const double specials[] = {NAN, INFINITY, -INFINITY, -0.0, 0.0};
      for (int64_t n = in_.below(8); n > 5; --n) {
        const int64_t i = in_.below(rows) * x.stride + in_.below(d);
        x.buffer.set(i, in_.one_of(specials));
        if (in_.below(2)) x.buffer.set_bits(i);  // the NaN that a rounding by addition takes past its end
      }
      if (in_.below(4) == 0)
        for (int64_t row = in_.below(rows), j = 0; j < d; ++j) x.buffer.set(row * x.stride + j, 0);
    }
    x.before = x.buffer.bytes();
    return x;
  }

 private:
  Bytes& in_;
  std::mt19937_64 random_;
};

struct Pair {
  DType branch, stream;
};
constexpr DType kTypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};
constexpr Pair kMixed[] = {{DType::bf16, DType::f32}, {DType::f16, DType::f32}, {DType::f32, DType::f64},
                           {DType::bf16, DType::f64}, {DType::f16, DType::f64}};

// The parameters of a site, and the memory they point to.
struct Site {
  Buffer weight, lam, offset;
  DType accumulate;

  template <typename P>
  void describe(P& p, Bytes& in, Source& source, bool mixed) {
    p.branch = p.stream = in.one_of(kTypes);
    if (mixed) {
      const Pair pair = in.one_of(kMixed);
      p.branch = pair.branch, p.stream = pair.stream;
    }
    accumulate = accumulate_dtype(p.stream);
    p.exact = in.below(2) == 0;
    const int64_t size = in.below(512);
    if (size == 511) {  // beyond the size at which the loops begin to prefetch
      p.d = 900 + in.below(400);
      p.rows = (3 << 19) / (2 * p.d * size_of(p.stream)) + 1 + in.below(3);
    } else {
      p.rows = in.below(size % 8 ? 24 : 3);
      p.d = in.below(size % 8 ? 100 : 2300);
    }
    constexpr double kLams[] = {2, 1, 0, -2, 30, 1e-3, 1e4}, kKappas[] = {10, 1, 0.1}, kEps[] = {1e-6, 1e-12, 1};
    lam = Buffer(in.one_of(kTypes), 1);
    lam.set(0, in.one_of(kLams));
    p.lam = lam.values();
    p.kappa = in.one_of(kKappas), p.eps = in.one_of(kEps);
    if (!p.exact && in.below(2)) p.offset = (offset = source.vector(in.one_of(kTypes), 1, 1, true)).values();
    if (in.below(4)) p.weight = (weight = source.vector(in.one_of(kTypes), p.d, 2)).values();
  }
};

}  // namespace bhyt::fuzz
