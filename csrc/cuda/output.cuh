// Makes what is stored for y: y rounded to its dtype, or quantised to eight bits.
#pragma once

#include "vec.cuh"

namespace bhyt::cuda {

// Turns the numbers of a pack into what is stored. The host makes it.
template <class Y, class A>
struct Output {
  explicit Output(const ForwardParams&) {}

  template <int W>
  BHYT_DEVICE Pack<Y, W> operator()(const A (&y)[W]) const {
    return Pack<Y, W>::of(y);
  }
};

// q = saturate(round_half_even(y / scale) + zero_point). uint8 is made as int8, 128 lower, and its highest bit flipped.
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

  template <int W>
  BHYT_DEVICE Pack<Byte, W> operator()(const A (&y)[W]) const {
    A scaled[W];
#pragma unroll
    for (int j = 0; j < W; ++j) scaled[j] = hw::mul(y[j], inverse_scale);
    return float8 ? as_float8(scaled) : as_integers(scaled);
  }

 private:
  template <int W>
  BHYT_DEVICE Pack<Byte, W> as_integers(const A (&scaled)[W]) const {
    int q[W];  // saturated to 16 bits: an addition does not overflow
#pragma unroll
    for (int j = 0; j < W; ++j) q[j] = hw::to_int16(scaled[j]);
    if (zero != 0) {  // it is 0 for int8 with zero point 0 and uint8 with 128
#pragma unroll
      for (int j = 0; j < W; ++j) q[j] += zero;
    }
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
  BHYT_DEVICE static Pack<Byte, W> as_float8(const A (&scaled)[W]) {
    float q[W];
#pragma unroll
    for (int j = 0; j < W; ++j) q[j] = static_cast<float>(scaled[j]);
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
