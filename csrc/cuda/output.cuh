// What is stored for y: y rounded to its dtype, or in eight bits.
#pragma once

#include "vec.cuh"

namespace bhyt::cuda {

// What a kernel is told of y, made on the host. A thread asks once how its packs are rounded: choose(f) calls f with
// a function from the numbers of a pack to what is stored.
template <class Y, class A>
struct Output {
  explicit Output(const ForwardParams&) {}

  template <class F>
  BHYT_DEVICE void choose(F&& f) const {
    f([](const auto& y) { return pack_of(y); });
  }

 private:
  template <int W>
  BHYT_DEVICE static Pack<Y, W> pack_of(const A (&y)[W]) {
    return Pack<Y, W>::of(y);
  }
};

// q = saturate(round_half_even(y / scale) + zero_point). uint8 is int8 less 128, with the highest bit flipped.
template <class A>
struct Output<Byte, A> {
  A inverse_scale;
  int zero = 0;
  uint32_t flip = 0;
  bool float8 = false;

  explicit Output(const ForwardParams& p) {
    const Quantization& q = *p.quantization;
    const bool is_unsigned = q.dtype == DType::u8;
    inverse_scale = static_cast<A>(q.inverse_scale);
    zero = q.zero_point - (is_unsigned ? 128 : 0);
    flip = is_unsigned ? 0x80808080u : 0;
    float8 = q.dtype == DType::f8;
  }

  template <class F>
  BHYT_DEVICE void choose(F&& f) const {
    if (float8)
      f([this](const auto& y) { return as_float8(y); });
    else
      f([this](const auto& y) { return as_integers(y); });
  }

 private:
  template <int W>
  BHYT_DEVICE Pack<Byte, W> as_integers(const A (&y)[W]) const {
    int q[W];
#pragma unroll
    for (int j = 0; j < W; ++j) q[j] = hw::to_int16(hw::mul(y[j], inverse_scale)) + zero;
    Pack<Byte, W> pack;
#pragma unroll
    for (int j = 0; j < W; j += 4) {
      uint32_t& word = pack.words[j / 4];
      word = 0;
      if constexpr (W > 2) word = hw::to_int8_pair(q[j + 2], q[j + 3], 0);
      word = hw::to_int8_pair(q[j], q[j + 1], word) ^ flip;
    }
    return pack;
  }

  template <int W>
  BHYT_DEVICE Pack<Byte, W> as_float8(const A (&y)[W]) const {
    float q[W];
#pragma unroll
    for (int j = 0; j < W; ++j) q[j] = static_cast<float>(hw::mul(y[j], inverse_scale));
    Pack<Byte, W> pack;
#pragma unroll
    for (int j = 0; j < W; j += 4) {
      uint32_t& word = pack.words[j / 4];
      word = to_float8_pair(q[j], q[j + 1]);
      if constexpr (W > 2) word |= to_float8_pair(q[j + 2], q[j + 3]) << 16;
    }
    return pack;
  }
};

}  // namespace bhyt::cuda
