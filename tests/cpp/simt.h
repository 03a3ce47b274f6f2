// A GPU for tests: runs a kernel's real source, compiled by g++, on simt_machine.h. Here are its instructions, the
// twins of csrc/cuda/hardware.cuh: vector accesses must be aligned; approximate instructions err by as much as they
// may.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt_clusters.h"

namespace simt {

// A value `ulps` away at most, by a hash of its own bits: an approximate instruction at its worst.
inline float perturbed(float v, int ulps) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if (!std::isfinite(v) || v == 0) return v;
  const int shift = (bits * 2654435761u >> 16) % 3;  // all the way down, none, all the way up
  bits += (shift - 1) * ulps;
  float moved;
  std::memcpy(&moved, &bits, 4);
  return std::isfinite(moved) ? moved : v;
}

// An IEEE format of `exponent` and `mantissa` bits, rounded to nearest even from a double.
inline uint32_t to_small_float(double v, int exponent, int mantissa) {
  const uint32_t sign = std::signbit(v) ? 1u << (exponent + mantissa) : 0;
  const uint32_t infinity = ((1u << exponent) - 1) << mantissa;
  if (std::isnan(v)) return sign | infinity | 1u << (mantissa - 1);
  const int bias = (1 << (exponent - 1)) - 1;
  int e;
  std::frexp(v, &e);
  const int lowest = std::max(e - 1, 1 - bias);  // exponent of the binade, or of the subnormals
  if (v == 0) return sign;
  if (std::isinf(v) || lowest > bias) return sign | infinity;
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(std::fabs(v), mantissa - lowest)));
  const uint32_t bits = steps + (uint32_t(lowest + bias - 1) << mantissa);  // a carry into the exponent is right
  return sign | std::min(bits, infinity);
}

}  // namespace simt

namespace bhyt::cuda::hw {

template <class A>
A shuffle_xor(A v, int mask) {
  ++simt::machine().shuffles;
  simt::Thread& me = *simt::machine().current;
  simt::Block& block = *me.block;
  const int warp = me.id / 32, width = std::min(32, int(block.lanes.size()) - warp * 32);
  if (((me.id % 32) ^ mask) >= width) simt::fail("a shuffle reads a lane that is not there");
  std::memcpy(&block.lanes[me.id], &v, sizeof v);
  simt::wait(block.warps[warp], width);
  std::memcpy(&v, &block.lanes[me.id ^ mask], sizeof v);
  simt::wait(block.warps[warp], width);
  return v;
}

inline void block_barrier() {
  simt::wait(simt::machine().current->block->barriers[0], simt::machine().block_threads());
}

inline void barrier(int id, int threads) {
  if (id < 1 || id > 15 || threads % 32) simt::fail("a named barrier takes id 1..15 and whole warps");
  simt::wait(simt::machine().current->block->barriers[id], threads);
}

inline void load_scalar(const void* from, int bytes, uint32_t& low, uint32_t& high) {
  simt::touch();
  std::memcpy(&low, from, bytes == 2 ? 2 : 4);
  if (bytes == 8) std::memcpy(&high, static_cast<const char*>(from) + 4, 4);
}

template <class A>
A add(A a, A b) { return a + b; }
template <class A>
A mul(A a, A b) { return ++simt::machine().products, a * b; }
template <class A>
A div(A a, A b) { return a / b; }
template <class A>
A fma(A a, A b, A c) { return ++simt::machine().products, std::fma(a, b, c); }
template <class A>
A sqrt(A a) { return std::sqrt(a); }
template <class A>
A abs(A a) { return std::fabs(a); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline float copysign(float a, float b) { return std::copysign(a, b); }
inline double exp(double a) { return std::exp(a); }
inline double tanh(double a) { return std::tanh(a); }

template <class A>
void pin(A&) {}

inline bool has_float8() { return simt::machine().has_float8; }

inline float exp2_approx(float a) { return simt::perturbed(static_cast<float>(std::exp2(static_cast<double>(a))), 2); }
inline float reciprocal_sqrt_approx(float a) {
  return simt::perturbed(static_cast<float>(1 / std::sqrt(static_cast<double>(a))), 2);
}
inline float reciprocal_approx(float a) { return simt::perturbed(1.f / a, 1); }
// 92 ulp of a float just above a power of two are a relative 1.1e-5, half that just below the next: so twice as many.
inline float tanh_approx(float a) {
  const float t = simt::perturbed(std::tanh(a), 184);
  return std::fabs(t) > 1 ? std::copysign(1.f, a) : t;
}

inline float bits_to_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline uint32_t float_to_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline double bits_to_double(uint32_t low, uint32_t high) {
  const uint64_t bits = uint64_t(high) << 32 | low;
  double v;
  std::memcpy(&v, &bits, 8);
  return v;
}
inline uint32_t low_bits(double v) {
  uint64_t bits;
  std::memcpy(&bits, &v, 8);
  return static_cast<uint32_t>(bits);
}
inline uint32_t high_bits(double v) {
  uint64_t bits;
  std::memcpy(&bits, &v, 8);
  return static_cast<uint32_t>(bits >> 32);
}

inline float half_bits_to_float(uint32_t bits) {
  const uint32_t magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
  if (magnitude >= 0x7c00u << 13) return bits_to_float(sign | 0x7f800000u | magnitude);
  return std::copysign(bits_to_float(magnitude) * 0x1p112f, sign ? -1.f : 1.f);
}
template <class A>
uint32_t to_half_bits(A v) { return simt::to_small_float(v, 5, 10); }
template <class A>
uint32_t to_bfloat_bits(A v) { return simt::to_small_float(v, 8, 7); }
inline uint32_t to_half_pair(float low, float high) { return to_half_bits(low) | to_half_bits(high) << 16; }
inline uint32_t to_bfloat_pair(float low, float high) { return to_bfloat_bits(low) | to_bfloat_bits(high) << 16; }

// float8_e4m3fn has the steps of a format with 5 bits of exponent, 2^8 below, and no infinity: 448 is the last number.
inline uint32_t to_float8(float v) {
  if (std::isnan(v)) return 0x7f;
  const uint32_t size = simt::to_small_float(std::ldexp(std::fabs(static_cast<double>(v)), -8), 5, 3);
  return std::min(size, 0x7eu) | (std::signbit(v) ? 0x80 : 0);
}
inline uint32_t to_float8_pair(float low, float high) {
  if (!has_float8()) simt::fail("an instruction that older devices lack");
  return to_float8(low) | to_float8(high) << 8;
}

template <class A>
int to_int16(A v) {
  return std::isnan(v) ? 0 : static_cast<int>(std::nearbyint(std::fmin(std::fmax(v, A(-32768)), A(32767))));
}
inline uint32_t to_int8_pair(int low, int high, uint32_t above) {
  const auto byte = [](int v) { return static_cast<uint32_t>(std::min(std::max(v, -128), 127)) & 0xff; };
  return above << 16 | byte(high) << 8 | byte(low);
}
inline uint32_t half_to_upper(uint32_t word, bool upper) { return upper ? word & 0xffff0000u : word << 16; }

inline void check_aligned(const void* address, int bytes) {
  simt::touch();
  if (reinterpret_cast<uintptr_t>(address) % bytes) simt::fail("a vector access is not aligned");
}

template <int words>
void load_words(uint32_t* to, const void* from) {
  check_aligned(from, words * 4);
  std::memcpy(to, from, words * 4);
}

inline void prefetch(const void*) { simt::touch(); }

inline bool has_bulk_prefetch() { return simt::machine().has_bulk_prefetch; }
inline void prefetch_bulk(const void* from, uint32_t bytes) {
  check_aligned(from, 16);
  if (bytes == 0 || bytes % 16) simt::fail("a bulk prefetch takes a multiple of 16 bytes");
  simt::machine().prefetched += bytes;
}

template <int words>
void store_words(void* to, const uint32_t* from) {
  check_aligned(to, words * 4);
  std::memcpy(to, from, words * 4);
}

}  // namespace bhyt::cuda::hw
