"""Breaks the kernels one line at a time and asks the tests to notice.

    python tests/mutations.py [cpu | cuda]      every mutant, or those of one device; exit status 1 if one survives

Each mutant is a copy of the sources with one replacement. CUDA: the programs of tests/cpp are built against it and run.
CPU: the translation units of one instruction set are compiled anew, linked with the objects of an ordinary build (kept
in build/mutations) and put under the op-level tests, then with cpp/fuzz_rows.cpp, which alone reaches instruction sets
that this CPU surpasses; the kernels as they are go first and must pass. Those of an instruction set that this CPU lacks
are not run, and said so. A mutant is caught when a test fails, or the build; a CUDA one also when it does not end. CUDA:
some minutes on two cores; CPU: an hour.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    file: str  # in csrc/cuda or csrc/cpu
    old: str
    new: str
    targets: tuple[str, ...]  # CUDA: programs that may notice; CPU: translation units it goes into


FORWARD, BACKWARD, BOTH = ("forward",), ("backward",), ("forward", "backward")
MATH, QUANTIZED = ("math",), ("quantized",)
CUDA = (
    Mutant("reduce.cuh", "if (mask < lanes) v =", "if (2 * mask < lanes) v =", BOTH),
    Mutant("reduce.cuh", "for (int mask = 16; mask > 0; mask /= 2) v =", "for (int mask = 8; mask > 0; mask /= 2) v =", BOTH),
    Mutant("reduce.cuh", "lane % 16 < warps ?", "lane % 16 + 1 < warps ?", BOTH),
    Mutant("reduce.cuh", "lane % 16 < warps ? sums[lane % 16]", "lane < warps ? sums[lane]", FORWARD),
    Mutant("reduce.cuh", ": A(0), kMaxThreads / 32);", ": A(0), kMaxThreads / 64);", FORWARD),
    Mutant("reduce.cuh", "for (int i = 0; i < ladder.parts; ++i)", "for (int i = 1; i < ladder.parts; ++i)", BOTH),
    Mutant("reduce.cuh", "odd = hw::fma(x[j + 1], y[j + 1], odd)", "odd = hw::fma(x[j + 1], y[j], odd)", FORWARD),
    Mutant("reduce.cuh", "  else\n    hw::block_barrier();", "", FORWARD),
    Mutant("forward_kernels.cuh", "return pack_of(k) < end;", "return pack_of(k) < end - 1;", FORWARD),
    Mutant("forward_kernels.cuh", "inside ? static_cast<int>(ladder.row_packs) : 0",
           "static_cast<int>(ladder.row_packs)", FORWARD),
    Mutant("forward_kernels.cuh", "if constexpr (exact) raw[k] = Row::zero();", "", FORWARD),
    Mutant("forward_kernels.cuh", "if (residual_added && exists(k)) x[k]", "if (residual_added) x[k]", FORWARD),
    Mutant("forward_kernels.cuh", "if (exists(k)) output(y)", "output(y)", FORWARD),
    Mutant("forward_kernels.cuh", "if (exact && ladder.parts > 1) open_cluster(at, slots);", "", FORWARD),
    Mutant("forward_kernels.cuh", "ladder.packs <= 2 ?", "ladder.packs <= 4 ?", FORWARD),
    Mutant("forward_kernels.cuh", "if constexpr (residual_added) pack.template store<wide>(stream.sum, first, p.d);", "",
           FORWARD),
    Mutant("vec.cuh", "hw::half_to_upper(words[j / 2], j % 2)", "hw::half_to_upper(words[j / 2], true)", FORWARD),
    Mutant("math.cuh", "offset(p.offset, !exact && p.offset.data)", "offset(p.offset, false)", FORWARD),
    Mutant("math.cuh", "return hw::mul(z, hw::fma(s, p, 1.f));", "return hw::fma(hw::mul(z, s), p, z);", MATH),
    Mutant("ladder.h", "p.quantization ? p.quantization->dtype : p.branch", "p.branch", ("ladder",)),
    Mutant("math.cuh", "0x7ffff + (size >> 20 & 1)", "0x80000", MATH),
    Mutant("math.cuh", "size < 0x3c800000 ? steps : normal", "normal", MATH),
    Mutant("math.cuh", "magnitude < 0x43e00000 ? magnitude : 0x43e00000", "magnitude", MATH),
    Mutant("math.cuh", "return v != v ? 0x7f :", "return", MATH),
    Mutant("math.cuh", "round_to_float8(low) | round_to_float8(high) << 8", "round_to_float8(low)", MATH),
    Mutant("math.cuh", "sizeof(Stream) == 2 && sizeof(Y) == 2", "sizeof(Stream) == 2", QUANTIZED),
    Mutant("vec.cuh", "words[j / 4] >> j % 4 * 8", "words[0] >> j % 4 * 8", QUANTIZED),
    Mutant("output.cuh", "q.zero_point - (is_unsigned ? 128 : 0)", "q.zero_point", QUANTIZED),
    Mutant("output.cuh", "is_unsigned ? 0x80808080u : 0", "0", QUANTIZED),
    Mutant("output.cuh", "q[j] += zero;", "q[j] += zero & ~1;", QUANTIZED),
    Mutant("output.cuh", "hw::to_int8_pair(q[j + 2], q[j + 3], 0)", "hw::to_int8_pair(q[j + 3], q[j + 2], 0)", QUANTIZED),
    Mutant("output.cuh", "to_float8_pair(q[j + 2], q[j + 3]) << 16", "to_float8_pair(q[j], q[j + 3]) << 16", QUANTIZED),
    Mutant("output.cuh", "float8 = q.dtype == DType::f8;", "", QUANTIZED),
    Mutant("forward_kernels.cuh", "p.weight.data == nullptr ||", "true ||", QUANTIZED),
    Mutant("reduce.cuh", "inbox.wait(turn >> 1 & 1);", "", BOTH),
    Mutant("reduce.cuh", "inbox.wait(turn >> 1 & 1);", "inbox.wait(turn & 1);", BACKWARD),
    Mutant("reduce.cuh", "hw::Inbox& inbox = slots.inbox[turn & 1];", "hw::Inbox& inbox = slots.inbox[0];", BACKWARD),
    Mutant("reduce.cuh", "for (hw::Inbox& inbox : slots.inbox) inbox.open();", "slots.inbox[0].open();", BACKWARD),
    Mutant("reduce.cuh", "float* const sums = slots.part[turn & 1];", "float* const sums = slots.part[0];", BACKWARD),
    Mutant("forward_kernels.cuh", "hw::cluster_wait();", "", FORWARD),
    Mutant("backward_kernels.cuh", "if (Wanted::sum && ladder.parts > 1) hw::cluster_wait();", "", BACKWARD),
    Mutant("forward_kernels.cuh", "v = mean_of(total, constants);", "v = mean_of(total, constants) * A(1.00001);", FORWARD),
    Mutant("forward_kernels.cuh", "int64_t(at.part) * ladder.threads + at.lane; pack", "at.lane; pack", FORWARD),
    Mutant("math.cuh", "step == step ? hw::add(r, step) : r", "r", ("math",)),
    Mutant("math.cuh", "step == step ? hw::add(r, step) : r", "hw::add(r, step)", ("math",)),
    Mutant("math.cuh", "rest == rest ? hw::fma(rest, constants.per_d, q) : q", "q", ("math",)),
    Mutant("math.cuh", "case DType::bf16: return static_cast<A>(hw::bits_to_float(low << 16));",
           "case DType::bf16: return static_cast<A>(hw::bits_to_float(low));", BOTH),
    Mutant("math.cuh", "scale.inverse = hw::mul(root, root);", "scale.inverse = root;", BACKWARD),
    Mutant("math.cuh", "constexpr float kSmall = 0.9f;", "constexpr float kSmall = 1.9f;", BOTH),
    Mutant("math.cuh", "u[j] = hw::mul(hw::mul(4.f, r), hw::add(1.f, -r));", "u[j] = hw::mul(4.f, r);", BACKWARD),
    Mutant("math.cuh", "p = hw::fma(p, s, 0.13330359756946564f);", "p = hw::fma(p, s, 0.1334f);", FORWARD),
    Mutant("backward_kernels.cuh", "columns[j] = hw::fma(dy, t[j], columns[j]);",
           "columns[j] = hw::mul(dy, t[j]);", BACKWARD),
    Mutant("backward_kernels.cuh", "hw::fma(A(2), dv, -hw::mul", "hw::fma(A(2), dv, hw::mul", BACKWARD),
    Mutant("backward_kernels.cuh", "hw::mul(A(-0.5), scale.a)", "hw::mul(A(-1), scale.a)", BACKWARD),
    Mutant("backward_kernels.cuh", "lam = hw::fma(scale.per_lam, sum, lam);",
           "lam = hw::fma(scale.a, sum, lam);", BACKWARD),
    Mutant("backward_kernels.cuh", "summed ? grad_sum.template get<A>(j) : A(-0.)", "A(-0.)", BACKWARD),
    Mutant("backward_kernels.cuh", "const int next_packs = turn + 1 < rows ? packs : 0;",
           "const int next_packs = packs;", BACKWARD),
    Mutant("backward_kernels.cuh", "      clear_row();\n      v = 1", "      v = 1", BACKWARD),
    Mutant("backward_kernels.cuh", "next_dv = 0, stored = 0;", "next_dv = 0;", BACKWARD),
    Mutant("backward_kernels.cuh", "if constexpr (Wanted::grad_weight) columns[j] =", "columns[j] =", BACKWARD),
    Mutant("backward_kernels.cuh", "if constexpr (Wanted::g) g[j] =", "g[j] =", BACKWARD),
    Mutant("backward_kernels.cuh", "if constexpr (Wanted::sum) return dot(g, x);", "return dot(g, x);", BACKWARD),
    Mutant("backward_kernels.cuh", "if (Wanted::g && at.group == 0) {", "if (at.group == 0) {", BACKWARD),
    Mutant("backward_kernels.cuh", "if (!Wanted::grad_weight && !out.lam) return;", "if (!Wanted::grad_weight) return;",
           BACKWARD),
    Mutant("backward_kernels.cuh", "if constexpr (Wanted::g) gains =", "gains =", BACKWARD),
    Mutant("../wanted.h", "Wanted<GradX::at_once, false, grad_weight>", "Wanted<GradX::at_once, true, grad_weight>",
           BACKWARD),
    Mutant("../params.h", "exact ? grad_x : grad_variance_out", "grad_x", BACKWARD),
    Mutant("backward_kernels.cuh", "grad_sum_row += course.grad_sum;", "grad_sum_row += course.grad_x;", BACKWARD),
    Mutant("backward_kernels.cuh", "if (k < packs) load_pack(k);", "load_pack(k);", BACKWARD),
    Mutant("backward_kernels.cuh", "if (p.weight.data == nullptr || p.weight.dtype == p.branch)",
           "if (p.weight.data == nullptr || p.weight.dtype != p.branch)", BACKWARD),
    Mutant("backward_kernels.cuh", "if (k < packs) pack = Gains", "pack = Gains", BACKWARD),
    Mutant("backward_kernels.cuh", "  hw::block_barrier();\n  const Scales<A> scales(scalars);",
           "  const Scales<A> scales(scalars);", BACKWARD),
    Mutant("backward_kernels.cuh", "  hw::block_barrier();  // the gains are read no more\n", "", BACKWARD),
    Mutant("backward_kernels.cuh", "at.part == 0 ? rows : 0;", "at.part == 0 ? turns : 0;", BACKWARD),
    Mutant("backward_kernels.cuh", "i + j * kSlices < in.count ?", "i + j * kSlices < in.count - 1 ?", BACKWARD),
    Mutant("backward_kernels.cuh", "i < in.count; i += kSlices * kAhead)", "i < in.count; i += in.count)", BACKWARD),
    Mutant("backward.cu", "course.more = p.rows % step;", "course.more = 0;", BACKWARD),
    Mutant("backward.cu", "course.x = step * p.x.stride", "course.x = step * p.d", BACKWARD),
    Mutant("backward.cu", "course.grad_y = step * p.grad_y.stride", "course.grad_y = step * p.d", BACKWARD),
    Mutant("backward.cu", "if (!p.exact) course.to_grad_variance -= course.statistics;", "", BACKWARD),
    Mutant("backward.cu", "course.needs_sums = p.needs_sums();", "", BACKWARD),
    Mutant("backward.cu", "if (Wanted::sum) grid.cluster = ladder.parts;", "", BACKWARD),
    Mutant("backward.cu", "plan.persistent || !p.needs_sums() ? 0 : p.rows", "plan.persistent ? 0 : p.rows", BACKWARD),
    Mutant("backward.cu", "if (!p.needs_g() && !p.grad_weight) return cudaSuccess;", "", BACKWARD),
    Mutant("math.cuh", "squares |= hw::float_to_bits(s);", "squares = hw::float_to_bits(s);", BACKWARD),
    Mutant("math.cuh", "if (to_16_bits ? hw::mul(large, large) < 2.f :", "if (to_16_bits ? false :", ("math",)),
    Mutant("math.cuh", "p = hw::fma(p, s, 0.013751043006777763f);", "p = hw::fma(p, s, 0.01376f);", ("math",)),
    Mutant("ladder.h", "constexpr int kMaxClusterParts = 16;", "constexpr int kMaxClusterParts = 8;", ("ladder",)),
    Mutant("backward_kernels.cuh", "for (int i = 0; i < kSlices; ++i)", "for (int i = 0; i < kSlices - 1; ++i)",
           BACKWARD),
    Mutant("backward_kernels.cuh", "if (mask >= ladder.threads) {", "if (mask > ladder.threads) {", BACKWARD),
    Mutant("backward_kernels.cuh", "column = turn == 0 ? columns[k][j] : hw::add(column, columns[k][j]);",
           "column = columns[k][j];", BACKWARD),
)

AVX2, AVX512, BINDING, CHOICE = ("kernels_avx2",), ("kernels_avx512",), ("bhyt_cpu",), ("kernels",)
CPU_FORWARD = (
    Mutant("rows-inl.h", "if (i < end) body(i, Part{static_cast<int>(end - i)});",
           "if (i + 1 < end) body(i, Part{static_cast<int>(end - i)});", AVX2),
    Mutant("rows-inl.h", "V::add(lanes[2 * k], lanes[2 * k + 1])", "V::add(lanes[2 * k], lanes[2 * k])", AVX2),
    Mutant("rows-inl.h", "total += V::sum", "total = V::sum", AVX2),
    Mutant("rows-inl.h", "span.template store<V>(sum + j, k, added);",
           "span.template store<V>(sum + j, k, added);\n      return added;", AVX2),
    Mutant("rows-inl.h", "if constexpr (adds)\n      return span.template load<V>(sum + j, k);",
           "if constexpr (adds && !prefetches)\n      return span.template load<V>(sum + j, k);", AVX2),
    Mutant("rows-inl.h", "squares.total / static_cast<double>(d)", "squares.total / static_cast<double>(d + 1)", AVX2),
    Mutant("rows-inl.h", "output(t[k], span.template load<V>(weight + j, k))",
           "output(t[k], span.template load<V>(weight, k))", AVX2),
    Mutant("rows-inl.h", "std::sqrt(v + offset + p.eps)", "(std::sqrt(v + offset) + p.eps)", AVX2),
    Mutant("rows-inl.h", "const double v = p.exact ? static_cast<A*>(p.variance_out)[i]",
           "const double v = p.exact ? Row(p, i).mean_square(p.d)", AVX2),
    Mutant("rows-inl.h", "if (p.exact)\n        row.apply(p.d, a[i - first],",
           "if (p.exact)\n        row.apply(p.d, a[0],", AVX2),
    Mutant("rows-inl.h", "__builtin_prefetch(row + j + k * V::N, 1);",
           "V::store(row + j + k * V::N, V::set1(0));", AVX2),
    Mutant("tanh-inl.h", "0.13326408879088514", "0.1332647", AVX2),
    Mutant("tanh-inl.h", "return last > 0x1p-110 && last < 0x1p110;", "return true;", AVX2),
    Mutant("tanh-inl.h", "limit_ = V::set1(1 / (a * a));", "limit_ = V::set1(4 / (a * a));", AVX2),
    Mutant("tanh-inl.h", "F z[K], any_t[K];  // copies: only these have addresses\n      for (int k = 0; k < K; ++k) z[k] = V::mul(a_, x[k]);",
           "F z[K], any_t[K];\n      for (int k = 0; k < K; ++k) z[k] = x[k];", AVX2),
    Mutant("tanh-inl.h", "static constexpr double largest = 9.2;", "static constexpr double largest = 8.2;", AVX2),
    Mutant("vec_avx2-inl.h", "largest = _mm256_max_epu32(largest, _mm256_castps_si256(squares[k]))",
           "largest = _mm256_max_epi32(largest, _mm256_castps_si256(squares[k]))", AVX2),
    Mutant("vec_avx2-inl.h", "_mm256_min_ps(limit, x)", "_mm256_min_ps(x, limit)", AVX2),
    Mutant("vec_avx2-inl.h", "_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);\n    rounded",
           "_mm256_add_epi32(bits, _mm256_set1_epi32(0x8000));\n    rounded", AVX2),
    Mutant("vec_avx2-inl.h", "return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);",
           "return _mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff));", AVX2),
    Mutant("vec_avx2-inl.h", "_mm256_castps_si256(x.odd), half));", "_mm256_castps_si256(x.odd), _mm256_setzero_si256()));", AVX2),
    Mutant("vec_avx2-inl.h", "_mm256_srli_epi32(even, 16), odd, 0xaa", "_mm256_srli_epi32(even, 16), odd, 0x2a", AVX2),
    Mutant("vec_avx2-inl.h", "_mm256_permute2f128_ps(low, high, 0x31)};\n  }\n  static F from_order",
           "_mm256_permute2f128_ps(low, high, 0x13)};\n  }\n  static F from_order", AVX2),
    Mutant("vec_pair-inl.h", "return {H::load(&p->value), H::load(&p[H::N].value)};",
           "return Self::load(&p->value);", AVX2),
    Mutant("vec_pair-inl.h", "all[2 * k] = squares[k].even, all[2 * k + 1] = squares[k].odd;",
           "all[2 * k] = all[2 * k + 1] = squares[k].even;", AVX2),
    Mutant("vec_pair-inl.h", "x == x ? x : std::numeric_limits<double>::quiet_NaN()", "x", AVX2),
    Mutant("table-inl.h", "gain[j] == gain[j] ? gain[j] : std::numeric_limits<float>::quiet_NaN()", "gain[j]", AVX2),
    Mutant("table-inl.h", "if (p.stream == DType::bf16) return sum_columns<Bfloat, float, W>",
           "if (p.rows < 0) return sum_columns<Bfloat, float, W>", AVX2),
    Mutant("vec_avx2-inl.h", "rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);", "", AVX2),
    Mutant("vec_avx512-inl.h", "_mm512_set1_epi32(0x7fff)), odd)", "_mm512_set1_epi32(0x8000)), odd)", AVX512),
    Mutant("vec_avx512-inl.h", "_mm512_mask_add_epi32(bits, ordered, bits, half)", "_mm512_add_epi32(bits, half)", AVX512),
    Mutant("vec_avx512-inl.h", "_mm512_max_epu32(largest", "_mm512_max_epi32(largest", AVX512),
    Mutant("vec_avx512-inl.h", "_mm512_castps_si512(x.odd), half));", "_mm512_castps_si512(x.odd), _mm512_setzero_si512()));", AVX512),
    Mutant("vec_avx512-inl.h", "_mm512_srli_epi32(even, 16), 0xca", "_mm512_srli_epi32(even, 16), 0xac", AVX512),
    Mutant("vec_avx512-inl.h", "low, _mm512_set1_epi32(8))", "low, _mm512_set1_epi32(9))", AVX512),
    Mutant("vec_avx512-inl.h", "(1u << n) - 1", "(1u << n) - (n > 8 ? 257 : 1)", AVX512),
    Mutant("bhyt_cpu.cpp", "p.weight.dtype == wanted && in_order", "size_of(p.weight.dtype) <= size_of(wanted) && in_order",
           BINDING),
    Mutant("bhyt_cpu.cpp", "const bool in_order = p.stream != DType::bf16 ||",
           "const bool in_order = p.stream == DType::bf16 ||", BINDING),
    Mutant("bhyt_cpu.cpp", "at::parallel_for(0, p.rows, rows_per_task(p.d),",
           "at::parallel_for(0, p.rows - (p.rows > 256), rows_per_task(p.d),", BINDING),
)
CPU_QUANTIZED = (
    Mutant("rows-inl.h", "q.inverse_scale <= q.highest() - q.zero_point &&", "", AVX2),
    Mutant("rows-inl.h", "V::max_of(lowest, V::min_of(highest, rounded))", "V::min_of(highest, rounded)", AVX2),
    Mutant("rows-inl.h", "any_large && k < span.count; ++k) t[k] = V::zero_if_nan(t[k]);",
           "any_large && k < span.count - 1; ++k) t[k] = V::zero_if_nan(t[k]);", AVX2),
    Mutant("rows-inl.h", "sizeof(Y) == 1 && sizeof(R) < sizeof(double), Y, R>", "sizeof(Y) == 1, R, R>", AVX2),
    Mutant("tanh-inl.h", "struct TanhOf<integer8> : TanhOf<float> {}", "struct TanhOf<integer8> : TanhOf<bf16> {}", AVX2),
    Mutant("table-inl.h", "gain = L::mul(gain, L::set1(factor));", "", AVX2),
    Mutant("vec_avx2-inl.h", "_mm256_set1_epi32(0x7ffff - (120 << 23))), odd)",
           "_mm256_set1_epi32(0x80000 - (120 << 23))), _mm256_setzero_si256())", AVX2),
    Mutant("vec_avx2-inl.h", "_mm256_min_epi32(_mm256_castps_si256(size), _mm256_set1_epi32(0x43f00000))",
           "_mm256_castps_si256(size)", AVX2),
    Mutant("vec_avx2-inl.h", "byte = _mm256_blendv_epi8(byte, steps, subnormal);", "", AVX2),
    Mutant("vec_avx512-inl.h", "_mm512_set1_epi32(0x80), 0xf8)", "_mm512_set1_epi32(0x80), 0xf0)", AVX512),
)
CPU_BACKWARD = (
    Mutant("rows-inl.h", "g = V::mul(V::mul(upstream, slope[k]),", "g = V::mul(upstream,", AVX2),
    Mutant("rows-inl.h", "S.add(k, g, xs[k]);", "S.add(0, g, xs[0]);", AVX2),
    Mutant("rows-inl.h", "V::fma(upstream, t[k], so_far)", "V::mul(upstream, t[k])", AVX2),
    Mutant("rows-inl.h", "if constexpr (adds) dx = ", "if constexpr (adds && !prefetches) dx = ", AVX2),
    Mutant("rows-inl.h", "store(j, span, k, V::mul(scale, g));",
           "store(j, span, k, prefetches ? g : V::mul(scale, g));", AVX2),
    Mutant("rows-inl.h", "V::fma(slope, span.template load<V>(x + j, k), along_g)", "along_g", AVX2),
    Mutant("rows-inl.h", "from_v - a * S / (d * shifted)", "from_v + a * S / (d * shifted)", AVX2),
    Mutant("rows-inl.h", "2 * static_cast<const A*>(p.grad_variance)[i] / d",
           "2 * static_cast<const A*>(p.grad_variance)[first] / d", AVX2),
    Mutant("rows-inl.h", "static_cast<A>(-a * S / (2 * shifted))", "static_cast<A>(-a * S / shifted)", AVX2),
    Mutant("rows-inl.h", "grad_lam += a_over_lam * S;", "grad_lam += a * S / lam;", AVX2),
    Mutant("rows-inl.h", "static_cast<const A*>(p.variance)[i] + offset + p.eps",
           "static_cast<const A*>(p.variance)[i] + p.eps", AVX2),
    Mutant("rows-inl.h", "std::memset(grad_weight, 0, p.d * sizeof(Sums));",
           "if (chunk == begin) std::memset(grad_weight, 0, p.d * sizeof(Sums));", AVX2),
    Mutant("rows-inl.h", "const int64_t first = chunk * chunks.rows_per_chunk;",
           "const int64_t first = chunk * (chunks.rows_per_chunk - (chunk > 0));", AVX2),
    Mutant("rows-inl.h", "c < count; ++c) total = V::add",
           "c < (count < 384 ? count : 383); ++c) total = V::add", AVX2),
    Mutant("rows-inl.h", "if constexpr (Wanted::grad_weight) {", "{", AVX2),
    Mutant("rows-inl.h", "if (scratch.lam) scratch.lam", "scratch.lam", AVX2),
    Mutant("../wanted.h", "if (!p.needs_sums()) return f(Wanted<GradX::unwanted, false, true>());", "", AVX2),
    Mutant("../params.h", "exact ? grad_x : grad_variance_out", "grad_x", AVX2),
    Mutant("bhyt_cpu.cpp", "p.grad_weight ? chunks.count * row_bytes : 0", "chunks.count * row_bytes", BINDING),
    Mutant("bhyt_cpu.cpp", "p.exact && p.grad_x ? row_bytes : 0", "row_bytes", BINDING),
    Mutant("bhyt_cpu.cpp", "if (p.needs_g()) weight.emplace(p);", "weight.emplace(p);", BINDING),
    Mutant("kernels.cpp", "most < runnable.size() ? most : runnable.size() - 1", "most < runnable.size() ? most : 0",
           CHOICE),
    Mutant("table-inl.h", "for (int64_t c = 0; c < chunks_of(p.rows).count; ++c) total += chunks[c];",
           "for (int64_t c = 0; c < chunks_of(p.rows - 1).count; ++c) total += chunks[c];", AVX2),
    Mutant("tanh-inl.h", "V::min_of(V::set1(52), a)", "V::min_of(V::set1(20), a)", AVX2),
    Mutant("tanh-inl.h", "V::mul(s, V::sub(two, s))", "V::fnma(t[k], t[k], one)", AVX2),
    Mutant("rows-inl.h", "with_tanh_of<V, Summed<R>>(a", "with_tanh_of<V, R>(a", AVX2),
    Mutant("tanh-inl.h", "any_slope[K];\n      for (int k = 0; k < K; ++k) z[k] = V::mul(a_, x[k]);",
           "any_slope[K];\n      for (int k = 0; k < K; ++k) z[k] = x[k];", AVX2),
    Mutant("bhyt_cpu.cpp", "at::parallel_for(0, (p.d + width - 1) / width,", "at::parallel_for(0, p.d / width,",
           BINDING),
    Mutant("bhyt_cpu.cpp", "(rows_per_task(p.d) + chunks.rows_per_chunk - 1) / chunks.rows_per_chunk;\n"
           "  at::parallel_for(0, chunks.count,",
           "(rows_per_task(p.d) + chunks.rows_per_chunk - 1) / chunks.rows_per_chunk;\n"
           "  at::parallel_for(0, p.rows / chunks.rows_per_chunk,", BINDING),
)

CPU = CPU_FORWARD + CPU_QUANTIZED + CPU_BACKWARD
NAMES = ("accuracy", "autograd", "determinism", "layouts", "dtypes", "nonfinite", "quantized", "memory", "tiers")
TESTS = [f"tests/test_{name}.py" for name in NAMES]
FUZZ_SECONDS = 20
# Those of setup.py, but for a quick build.
FLAGS = ("-std=c++20 -O1 -fPIC -fopenmp -ffp-contract=off -fno-math-errno -fno-trapping-math -fvisibility=hidden -w "
         "-DPy_LIMITED_API=0x030a0000").split()


def mutate(csrc: Path, mutant: Mutant, device: str) -> None:
    file = csrc / device / mutant.file
    text = file.read_text()
    if mutant.old not in text:
        raise SystemExit(f"{mutant.file} no longer has: {mutant.old}")
    file.write_text(text.replace(mutant.old, mutant.new, 1))


def passes(command: list[str], **options) -> bool:
    try:
        return subprocess.run(command, capture_output=True, **options).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def cuda_passes(mutant: Mutant, folder: Path) -> bool:
    """Whether every program of the mutant builds against folder/csrc and ends well."""
    include = [f"-I{ROOT / 'tests' / 'cpp'}", f"-I{folder / 'csrc' / 'cuda'}"]
    options = ["-std=c++20", "-O1", "-ffp-contract=off", "-w", "-DBHYT_SIMT", *include]
    for program in mutant.targets:
        source, built = ROOT / "tests" / "cpp" / f"test_cuda_{program}.cpp", folder / program
        if not passes(["g++", *options, str(source), "-o", str(built)]) or not passes([str(built)], timeout=300):
            return False
    return True


def cpu_objects() -> Path:
    """An ordinary build of the op library in build/mutations, and the fuzz target; ninja keeps what has not changed."""
    build = ROOT / "build" / "mutations"
    environment = {**os.environ, "BHYT_CUDA": "0", "BHYT_CXXFLAGS": "-O1"}
    command = ["setup.py", "-q", "build_ext", "--build-temp", str(build), "--build-lib", str(build)]
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    fuzz = ["g++", *FLAGS, "-Icsrc", f"-DBHYT_FUZZ_SECONDS={FUZZ_SECONDS}", "-c", "tests/cpp/fuzz_rows.cpp"]
    subprocess.run([*fuzz, "-o", str(build / "fuzz_rows.o")], cwd=ROOT, check=True)
    return build


def cpu_passes(build: Path, units: tuple[str, ...], folder: Path) -> str:
    """What notices folder/csrc with these translation units of it: "" if nothing does, else the build or a test."""
    from torch.utils import cpp_extension

    objects = {p.relative_to(build): p for p in (build / "csrc").rglob("*.o")}
    for unit in units:
        source = folder / "csrc" / "cpu" / f"{unit}.cpp"
        include = cpp_extension.include_paths() if unit == "bhyt_cpu" else []
        command = ["g++", *FLAGS, *(f"-I{p}" for p in (folder / "csrc", *include)), "-c", str(source), "-o"]
        built = source.with_suffix(".o")
        if not passes([*command, str(built)]):
            return "the compiler"
        objects[Path("csrc/cpu") / built.name] = built
    libraries = [f"-L{p}" for p in cpp_extension.library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch"]
    library = folder / "bhyt" / "_ops.abi3.so"
    if not passes(["g++", "-shared", *map(str, objects.values()), *libraries, "-o", str(library)]):
        return "the linker"
    tier = "avx512" if units == AVX512 else "avx2"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": tier, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
    pytest = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-m", "not slow", *TESTS]
    run = subprocess.run(pytest, cwd=folder, env=environment, capture_output=True, text=True)
    failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if run.returncode != 0:
        return failed[0].split(" - ")[0] if failed else f"exit status {run.returncode}"
    kernels = [str(built) for name, built in objects.items() if name.name.startswith("kernels")]
    fuzz = [str(folder / "fuzz")]
    if not passes(["g++", str(build / "fuzz_rows.o"), *kernels, "-o", *fuzz, "-pthread"]):
        return "the fuzz target's linker"
    return "" if passes(fuzz) else "the fuzz target"


def copied(folder: Path, build: Path) -> None:
    """The sources, and a package `bhyt` with tests that import it, but for the library."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "bhyt", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(build / "bhyt" / "_built_for.py", folder / "bhyt")


def of_this_cpu(mutants: tuple[Mutant, ...]) -> tuple[Mutant, ...]:
    from torch.backends.cpu import get_cpu_capability

    if get_cpu_capability() == "AVX512":
        return mutants
    within = tuple(mutant for mutant in mutants if mutant.targets != AVX512)
    print(f"not run: {len(mutants) - len(within)} of AVX-512, which this CPU has not", flush=True)
    return within


def cpu_survivors(mutants: tuple[Mutant, ...]) -> int:
    build, survivors = cpu_objects(), 0
    listed = {mutant.targets for mutant in mutants}
    as_they_are = tuple(Mutant("rows-inl.h", "", "", units) for units in (AVX2, AVX512) if units in listed)
    for mutant in as_they_are + mutants:
        with tempfile.TemporaryDirectory() as name:
            folder, started = Path(name), time.monotonic()
            copied(folder, build)
            mutate(folder / "csrc", mutant, "cpu")
            noticed = cpu_passes(build, mutant.targets, folder)
        if mutant in as_they_are:
            if noticed:
                raise SystemExit(f"the kernels as they are fail: {noticed}")
            print("passed   the kernels as they are", *mutant.targets, flush=True)
            continue
        survivors += not noticed
        report(mutant, noticed, time.monotonic() - started)
    return survivors


def cuda_survivors(mutants: tuple[Mutant, ...]) -> int:
    survivors = 0
    for mutant in mutants:
        with tempfile.TemporaryDirectory() as name:
            folder, started = Path(name), time.monotonic()
            shutil.copytree(ROOT / "csrc", folder / "csrc")
            mutate(folder / "csrc", mutant, "cuda")
            noticed = "" if cuda_passes(mutant, folder) else "its program"
        survivors += not noticed
        report(mutant, noticed, time.monotonic() - started)
    return survivors


def report(mutant: Mutant, noticed: str, seconds: float) -> None:
    outcome = f"caught   by {noticed}" if noticed else "SURVIVED"
    print(f"{outcome} ({seconds:.0f} s)\n         {mutant.file}: {mutant.old!r} -> {mutant.new!r}", flush=True)


def main(devices: list[str]) -> int:
    survivors = mutants = 0
    for device, listed, survive in (("cuda", CUDA, cuda_survivors), ("cpu", CPU, cpu_survivors)):
        if device in devices or not devices:
            listed = of_this_cpu(listed) if device == "cpu" else listed
            survivors, mutants = survivors + survive(listed), mutants + len(listed)
    print(f"{mutants - survivors} of {mutants} caught")
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
