#include "tickets.h"

#include <array>

namespace bhyt::cuda {
namespace {

// Answers find_ticket()'s questions about a stream.
struct Stream {
  cudaStream_t on;

  cudaError_t captured(bool* yes) const {
    cudaStreamCaptureStatus status;
    const cudaError_t error = cudaStreamIsCapturing(on, &status);
    *yes = error == cudaSuccess && status == cudaStreamCaptureStatusActive;
    return error;
  }

  cudaError_t stream_id(uint64_t* id) const {
    unsigned long long found = 0;
    const cudaError_t error = cudaStreamGetId(on, &found);
    *id = found;
    return error;
  }

  // Hands `kept` to the graph that the stream captures into; on failure it is destroyed.
  cudaError_t keep(void* kept, void (*destroy)(void*)) const {
    cudaStreamCaptureStatus status;
    cudaGraph_t graph = nullptr;
    cudaUserObject_t object = nullptr;
    cudaError_t error = cudaStreamGetCaptureInfo(on, &status, nullptr, &graph);
    if (error == cudaSuccess) error = cudaUserObjectCreate(&object, kept, destroy, 1, cudaUserObjectNoDestructorSync);
    if (error != cudaSuccess) {
      destroy(kept);
      return error;
    }
    error = cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove);
    if (error != cudaSuccess) cudaUserObjectRelease(object, 1);  // which destroys it
    return error;
  }
};

}  // namespace

cudaError_t find_ticket(int device, cudaStream_t on, int* ticket) {
  constexpr int kMost = 64;
  static auto* const books = new std::array<TicketBook, kMost>;  // graphs may give tickets back when the process ends
  if (device < 0 || device >= kMost) return cudaErrorInvalidDevice;
  const cudaError_t error = find_ticket(Stream{on}, (*books)[device], ticket);
  if (error != cudaSuccess) cudaGetLastError();  // the error is reported here: the next call must not find it again
  return error;
}

}  // namespace bhyt::cuda
