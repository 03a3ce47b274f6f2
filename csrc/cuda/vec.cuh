// Packs: the W neighbouring elements of a row that one thread handles at a time, kept as they lie in memory. W is 16
// bytes of the stream whatever the alignment, and so are a thread's elements and the order of every sum. `wide` packs
// are moved by vector accesses; others element by element, and they may end short at the row's end.
#pragma once

#include "formats.cuh"

namespace bhyt::cuda {

template <class Stream>
constexpr int kPackWidth = 16 / sizeof(Stream);

template <class T, int W>
struct Pack {
  static constexpr int kWords = (W * sizeof(T) + 3) / 4;
  static constexpr int kAccess = kWords < 4 ? kWords : 4;  // words per access: at most 16 bytes
  uint32_t words[kWords];

  template <class A>
  BHYT_DEVICE A get(int j) const {
    if constexpr (std::is_same_v<T, bf16>) {
      return hw::bits_to_float(j % 2 ? words[j / 2] & 0xffff0000u : words[j / 2] << 16);
    } else if constexpr (std::is_same_v<T, f16>) {
      return hw::half_bits_to_float(j % 2 ? words[j / 2] >> 16 : words[j / 2] & 0xffffu);
    } else if constexpr (std::is_same_v<T, float>) {
      return static_cast<A>(hw::bits_to_float(words[j]));
    } else {
      return hw::bits_to_double(words[2 * j], words[2 * j + 1]);
    }
  }

  // The same value by a different instruction where there is one, so that the compiler computes it again instead of
  // keeping it in a register.
  template <class A>
  BHYT_DEVICE A get_apart(int j) const {
    if constexpr (std::is_same_v<T, bf16>)
      return hw::bits_to_float(hw::half_to_upper(words[j / 2], j % 2));
    else
      return get<A>(j);
  }

  template <class A>
  BHYT_DEVICE void get_all(A (&v)[W]) const {
#pragma unroll
    for (int j = 0; j < W; ++j) v[j] = get<A>(j);
  }

  // Rounds each element once.
  template <class A>
  BHYT_DEVICE static Pack of(const A (&v)[W]) {
    Pack pack;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      if constexpr (sizeof(T) == 2 && std::is_same_v<A, float>) {
        if (j % 2) continue;
        const A low = v[j], high = v[j + 1];
        pack.words[j / 2] = std::is_same_v<T, bf16> ? hw::to_bfloat_pair(low, high) : hw::to_half_pair(low, high);
      } else {
        pack.put(j, narrow<T>(v[j]));
      }
    }
    return pack;
  }

  BHYT_DEVICE static Pack zero() {
    Pack pack;
#pragma unroll
    for (int i = 0; i < kWords; ++i) pack.words[i] = 0;
    return pack;
  }

  // Elements first .. first + W - 1 of a row of d; beyond d they are 0.
  template <bool wide>
  BHYT_DEVICE static Pack load(const T* row, int64_t first, int64_t d) {
    Pack pack;
    if constexpr (wide) {
#pragma unroll
      for (int i = 0; i < kWords; i += kAccess)
        hw::load_words<kAccess>(pack.words + i, reinterpret_cast<const uint32_t*>(row + first) + i);
    } else {
      pack = zero();
#pragma unroll
      for (int j = 0; j < W; ++j)
        if (first + j < d) pack.put(j, row[first + j]);
    }
    return pack;
  }

  template <bool wide>
  BHYT_DEVICE void store(T* row, int64_t first, int64_t d) const {
    if constexpr (wide) {
      static_assert(W * sizeof(T) % 4 == 0);
#pragma unroll
      for (int i = 0; i < kWords; i += kAccess)
        hw::store_words<kAccess>(reinterpret_cast<uint32_t*>(row + first) + i, words + i);
    } else {
#pragma unroll
      for (int j = 0; j < W; ++j)
        if (first + j < d) row[first + j] = element(j);
    }
  }

 private:
  // Element j must still be 0 or unwritten; the bits of its neighbours stay.
  BHYT_DEVICE void put(int j, T v) {
    if constexpr (sizeof(T) == 2) {
      words[j / 2] = j % 2 ? (words[j / 2] & 0xffffu) | uint32_t(v.bits) << 16 : v.bits;
    } else if constexpr (sizeof(T) == 4) {
      words[j] = hw::float_to_bits(v);
    } else {
      words[2 * j] = hw::low_bits(v);
      words[2 * j + 1] = hw::high_bits(v);
    }
  }

  BHYT_DEVICE T element(int j) const {
    if constexpr (sizeof(T) == 1) {
      return {static_cast<uint8_t>(words[j / 4] >> j % 4 * 8)};
    } else if constexpr (sizeof(T) == 2) {
      return {static_cast<uint16_t>(j % 2 ? words[j / 2] >> 16 : words[j / 2])};
    } else if constexpr (sizeof(T) == 4) {
      return hw::bits_to_float(words[j]);
    } else {
      return hw::bits_to_double(words[2 * j], words[2 * j + 1]);
    }
  }
};

// A gain of any dtype, known only at run time: read element by element and kept in the arithmetic type.
struct AnyFloat {};

// The gains of one pack of columns; 1 where the site has none.
template <class Weight, class A, int W>
struct Gains {
  Pack<Weight, W> pack;

  BHYT_DEVICE static Gains ones() {
    float one[W];
#pragma unroll
    for (int j = 0; j < W; ++j) one[j] = 1;
    return {Pack<Weight, W>::of(one)};
  }

  template <bool wide>
  BHYT_DEVICE static Gains load(const Values& weight, int64_t first, int64_t d) {
    return weight.data ? load_given<wide>(weight, first, d) : ones();
  }

  template <bool wide>
  BHYT_DEVICE static Gains load_given(const Values& weight, int64_t first, int64_t d) {
    return {Pack<Weight, W>::template load<wide>(static_cast<const Weight*>(weight.data), first, d)};
  }

  BHYT_DEVICE A get(int j) const { return pack.template get<A>(j); }
  BHYT_DEVICE A times(int j, A v) const { return hw::mul(get(j), v); }
};

// The site has no gain.
struct NoGain {};

template <class A, int W>
struct Gains<NoGain, A, W> {
  template <bool wide>
  BHYT_DEVICE static Gains load_given(const Values&, int64_t, int64_t) {
    return {};
  }

  BHYT_DEVICE A times(int, A v) const { return v; }
};

template <class A, int W>
struct Gains<AnyFloat, A, W> {
  A values[W];

  template <bool wide>
  BHYT_DEVICE static Gains load(const Values& weight, int64_t first, int64_t d) {
    Gains gains;
#pragma unroll
    for (int j = 0; j < W; ++j) gains.values[j] = weight.data && first + j < d ? read<A>(weight, first + j) : A(1);
    return gains;
  }

  BHYT_DEVICE A get(int j) const { return values[j]; }
  BHYT_DEVICE A times(int j, A v) const { return hw::mul(get(j), v); }
};

}  // namespace bhyt::cuda
