// Dtypes known at run time become template arguments; a kernel and a grid become a checked launch.
#pragma once

#include "formats.cuh"
#include "launch.h"

namespace bhyt::cuda {

struct Grid {
  int64_t blocks_x = 1;
  int64_t blocks_y = 1;
  int threads_x = 1;
  int threads_y = 1;
  int64_t shared_bytes = 0;
  int cluster = 1;             // blocks along y that form a cluster
  bool overlaps_last = false;  // starts before the kernel before it ends, and so must call wait_for_previous_grid()
  cudaStream_t on = {};
};

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Grid& grid, Arguments... arguments) {
#ifdef __CUDACC__
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks_x), static_cast<unsigned>(grid.blocks_y));
  config.blockDim = dim3(grid.threads_x, grid.threads_y);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = grid.on;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (grid.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {1, static_cast<unsigned>(grid.cluster), 1};
    if (grid.cluster > kPortableCluster) {
      const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                     cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
      if (error != cudaSuccess) return error;
    }
  }
  if (grid.shared_bytes > 48 << 10) {  // which a kernel must ask for
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(grid.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  if (grid.overlaps_last) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (grid.blocks_x > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  if (error != cudaSuccess) cudaGetLastError();  // the error is reported here: the next call must not find it again
  return error;
#else
  return simt::run(grid, [&] { kernel(Parameters(arguments)...); });
#endif
}

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<Branch>, Type<Stream>) for the pairs that checks.h lets through.
template <class F>
cudaError_t with_types(DType branch, DType stream, F&& f) {
  switch (stream) {
    case DType::f16: return branch == stream ? f(Type<f16>(), Type<f16>()) : cudaErrorInvalidValue;
    case DType::bf16: return branch == stream ? f(Type<bf16>(), Type<bf16>()) : cudaErrorInvalidValue;
    case DType::f32:
      switch (branch) {
        case DType::f16: return f(Type<f16>(), Type<float>());
        case DType::bf16: return f(Type<bf16>(), Type<float>());
        case DType::f32: return f(Type<float>(), Type<float>());
        default: return cudaErrorInvalidValue;
      }
    default:
      switch (branch) {
        case DType::f16: return f(Type<f16>(), Type<double>());
        case DType::bf16: return f(Type<bf16>(), Type<double>());
        case DType::f32: return f(Type<float>(), Type<double>());
        default: return f(Type<double>(), Type<double>());
      }
  }
}

}  // namespace bhyt::cuda
