// What the chip provides: indices, shared memory, shuffles, barriers, clusters, approximate functions, conversions,
// wide loads. tests/cpp/simt.h has a twin of every function for the host, so that g++ can run the kernels. CUDA's
// headers are used where they give the same machine code; the rest is PTX. <cuda/ptx> is not used: that of CUDA 13.0
// has neither mapa nor griddepcontrol, so half of what it is for would stay as it is.
#pragma once

#ifndef __CUDACC__
#include "simt.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#define BHYT_DEVICE __device__ __forceinline__
#define BHYT_DEVICE_MEMORY __device__
// For these architectures ptxas spills although registers are free, unless it is told that one block is enough.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
#define BHYT_KERNEL(max_threads) __global__ void __launch_bounds__(max_threads, 1)
#else
#define BHYT_KERNEL(max_threads) __global__ void __launch_bounds__(max_threads)
#endif
// A thread takes at most `registers`, where that needs no spill: fewer than launch bounds alone would leave it. CUDA
// before 12.4 cannot say so.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200 && defined(__maxnreg__)
#define BHYT_KERNEL_WITHIN(max_threads, registers) __global__ void __maxnreg__(registers)
#else
#define BHYT_KERNEL_WITHIN(max_threads, registers) BHYT_KERNEL(max_threads)
#endif
// `blocks` blocks of `max_threads` threads shall share a multiprocessor.
#define BHYT_KERNEL_SHARING(max_threads, blocks) __global__ void __launch_bounds__(max_threads, blocks)

namespace bhyt::cuda::hw {

// The architecture that this is compiled for, 0 on the host.
#ifdef __CUDA_ARCH__
constexpr int kArch = __CUDA_ARCH__ / 10;
#else
constexpr int kArch = 0;
#endif

BHYT_DEVICE int thread_x() { return threadIdx.x; }
BHYT_DEVICE int thread_y() { return threadIdx.y; }
BHYT_DEVICE int threads_x() { return blockDim.x; }
BHYT_DEVICE int64_t block_x() { return blockIdx.x; }
BHYT_DEVICE int block_y() { return blockIdx.y; }
BHYT_DEVICE int64_t blocks_x() { return gridDim.x; }
BHYT_DEVICE int blocks_y() { return gridDim.y; }

BHYT_DEVICE unsigned char* shared() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

// Every lane of the warp must call this.
template <class A>
BHYT_DEVICE A shuffle_xor(A v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}

BHYT_DEVICE void block_barrier() { __syncthreads(); }

// A barrier of whole warps. `id` 0 is block_barrier's.
BHYT_DEVICE void barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Each is rounded once and never contracted: the same bits in every kernel.
BHYT_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
BHYT_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
BHYT_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
BHYT_DEVICE float div(float a, float b) { return __fdiv_rn(a, b); }
BHYT_DEVICE float sqrt(float a) { return __fsqrt_rn(a); }
BHYT_DEVICE double add(double a, double b) { return __dadd_rn(a, b); }
BHYT_DEVICE double mul(double a, double b) { return __dmul_rn(a, b); }
BHYT_DEVICE double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
BHYT_DEVICE double div(double a, double b) { return __ddiv_rn(a, b); }
BHYT_DEVICE double sqrt(double a) { return __dsqrt_rn(a); }

BHYT_DEVICE float abs(float a) { return fabsf(a); }
BHYT_DEVICE double abs(double a) { return fabs(a); }
BHYT_DEVICE float max(float a, float b) { return fmaxf(a, b); }
BHYT_DEVICE float copysign(float a, float b) { return copysignf(a, b); }
BHYT_DEVICE double exp(double a) { return ::exp(a); }
BHYT_DEVICE double tanh(double a) { return ::tanh(a); }

// Makes the compiler compute v here, once. Where registers are short it would compute v again, divisions and all.
BHYT_DEVICE void pin(float& v) { asm volatile("" : "+f"(v)); }
BHYT_DEVICE void pin(double& v) { asm volatile("" : "+d"(v)); }

// The same for an address in device memory, from which others are made by a step.
template <class T>
BHYT_DEVICE void pin(T*& p) {
  size_t address = __cvta_generic_to_global(p);
  asm volatile("" : "+l"(address));
  p = static_cast<T*>(__cvta_global_to_generic(address));
}

// 2^a within 2 ulp.
BHYT_DEVICE float exp2_approx(float a) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
  return r;
}

// 1/a within 1 ulp; 1/inf = 0.
BHYT_DEVICE float reciprocal_approx(float a) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
  return r;
}

// 1/sqrt(a) within 2^-22.9 (the manual's figure), subnormal arguments included.
BHYT_DEVICE float reciprocal_sqrt_approx(float a) {
  float r;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(r) : "f"(a));
  return r;
}

// tanh within a relative error of 1.1e-5 (measured; the manual promises less).
BHYT_DEVICE float tanh_approx(float a) {
  float r;
  asm("tanh.approx.f32 %0, %1;" : "=f"(r) : "f"(a));
  return r;
}

BHYT_DEVICE float half_bits_to_float(uint32_t bits) { return __half2float(__ushort_as_half(bits)); }
BHYT_DEVICE uint32_t to_half_bits(float v) { return __half_as_ushort(__float2half_rn(v)); }
BHYT_DEVICE uint32_t to_half_bits(double v) { return __half_as_ushort(__double2half(v)); }
BHYT_DEVICE uint32_t to_bfloat_bits(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
BHYT_DEVICE uint32_t to_bfloat_bits(double v) { return __bfloat16_as_ushort(__double2bfloat16(v)); }

template <class Pair>
BHYT_DEVICE uint32_t bits_of(const Pair& pair) {
  static_assert(sizeof pair == 4);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
}

// Two numbers by one instruction, `low` in the lower half of the word.
BHYT_DEVICE uint32_t to_half_pair(float low, float high) {
  return bits_of(__floats2half2_rn(low, high));
}

BHYT_DEVICE uint32_t to_bfloat_pair(float low, float high) {
  return bits_of(__floats2bfloat162_rn(low, high));
}

// Whether there is an instruction for float8_e4m3fn: to nearest, ties to even, saturating at 448; a NaN stays one.
BHYT_DEVICE constexpr bool has_float8() { return kArch >= 89; }

BHYT_DEVICE uint32_t to_float8_pair(float low, float high) {
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}

// The nearest integer, ties to even, within int16_t; 0 of a NaN.
BHYT_DEVICE int to_int16(float v) {
  int16_t q;
  asm("cvt.rni.s16.f32 %0, %1;" : "=h"(q) : "f"(v));
  return q;
}
BHYT_DEVICE int to_int16(double v) {
  int16_t q;
  asm("cvt.rni.s16.f64 %0, %1;" : "=h"(q) : "d"(v));
  return v == v ? q : 0;
}

// Two numbers as int8_t, saturating, in the lower half of a word; its upper half is the lower half of `above`.
BHYT_DEVICE uint32_t to_int8_pair(int low, int high, uint32_t above) {
  uint32_t word;
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(high), "r"(low), "r"(above));
  return word;
}

// The lower or the upper half of a word, with zeros below it.
BHYT_DEVICE uint32_t half_to_upper(uint32_t word, bool upper) { return __byte_perm(word, 0, upper ? 0x3244 : 0x1044); }

BHYT_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
BHYT_DEVICE uint32_t float_to_bits(float v) { return __float_as_uint(v); }
BHYT_DEVICE double bits_to_double(uint32_t low, uint32_t high) { return __hiloint2double(high, low); }
BHYT_DEVICE uint32_t low_bits(double v) { return __double2loint(v); }
BHYT_DEVICE uint32_t high_bits(double v) { return __double2hiint(v); }

// `words` 4-byte words as one access of 4, 8 or 16 bytes; the address is a multiple of that.
template <int words>
BHYT_DEVICE void load_words(uint32_t* to, const void* from) {
  if constexpr (words == 4) {
    const uint4 v = *static_cast<const uint4*>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else if constexpr (words == 2) {
    const uint2 v = *static_cast<const uint2*>(from);
    to[0] = v.x, to[1] = v.y;
  } else {
    static_assert(words == 1);
    to[0] = *static_cast<const uint32_t*>(from);
  }
}

template <int words>
BHYT_DEVICE void store_words(void* to, const uint32_t* from) {
  if constexpr (words == 4) {
    *static_cast<uint4*>(to) = make_uint4(from[0], from[1], from[2], from[3]);
  } else if constexpr (words == 2) {
    *static_cast<uint2*>(to) = make_uint2(from[0], from[1]);
  } else {
    static_assert(words == 1);
    *static_cast<uint32_t*>(to) = from[0];
  }
}

// Brings a line into L2.
BHYT_DEVICE void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// Whether one thread can do so for a whole row: multiples of 16 bytes from an address that is one.
BHYT_DEVICE constexpr bool has_bulk_prefetch() { return kArch >= 90; }

BHYT_DEVICE void prefetch_bulk(const void* from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
#endif
}

// A number of 2, 4 or 8 bytes, as bits.
BHYT_DEVICE void load_scalar(const void* from, int bytes, uint32_t& low, uint32_t& high) {
  if (bytes == 2)
    low = *static_cast<const uint16_t*>(from);
  else
    low = *static_cast<const uint32_t*>(from);
  if (bytes == 8) high = static_cast<const uint32_t*>(from)[1];
}

}  // namespace bhyt::cuda::hw

#include "clusters.cuh"
#include "counters.cuh"
#endif
