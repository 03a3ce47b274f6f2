#include "device.h"

#include <algorithm>

#include "launch.h"

#define BHYT_TEXT(...) #__VA_ARGS__
#define BHYT_EXPANDED_TEXT(...) BHYT_TEXT(__VA_ARGS__)

namespace bhyt::cuda {
namespace {

// Answers describe()'s questions about the current device of the CUDA runtime.
struct Runtime {
  ClusterKernel kernel = cluster_kernel();

  cudaError_t multiprocessors(int index, int* count) const {
    return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, index);
  }

  cudaError_t shared_bytes(int index, int64_t* bytes) const {
    int found = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&found, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    *bytes = found;
    return error;
  }

  cudaError_t code(Code* found) const {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel.function);
    if (error == cudaSuccess) *found = {attributes.ptxVersion, attributes.binaryVersion};
    return error;
  }

  cudaError_t resident_clusters(int size, int multiprocessors, int* count) const {
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {1, static_cast<unsigned>(size), 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(multiprocessors, size);
    config.blockDim = dim3(kernel.threads);
    config.dynamicSmemBytes = kernel.shared_bytes;
    config.attrs = &cluster;
    config.numAttrs = 1;
    const bool portable = size <= kPortableCluster;
    cudaError_t error = cudaSuccess;
    if (!portable)
      error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(count, kernel.function, &config);
    if (error != cudaErrorInvalidClusterSize && (portable || error == cudaSuccess)) return error;
    *count = 0;  // devices without clusters so large answer with various errors
    return cudaSuccess;
  }
};

}  // namespace

cudaError_t describe(int index, Device* device) {
  const cudaError_t error = describe(Runtime(), index, device);
  cudaGetLastError();  // the error is reported here: the next call must not find it again
  return error;
}

Versions versions() {
  Versions v;
  cudaRuntimeGetVersion(&v.runtime);
  cudaDriverGetVersion(&v.driver);
  return v;
}

std::string archs() {
  std::string names;
#ifdef __CUDA_ARCH_LIST__  // "800,900,1000": what nvcc was asked for
  const std::string list = BHYT_EXPANDED_TEXT(__CUDA_ARCH_LIST__);
  for (size_t from = 0; from < list.size();) {
    const size_t to = std::min(list.find(',', from), list.size());
    if (!names.empty()) names += ' ';
    names += "sm_" + list.substr(from, to - from - 1);
    from = to + 1;
  }
#endif
  return names;
}

}  // namespace bhyt::cuda
