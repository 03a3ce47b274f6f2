// Counters by which the blocks of one backward find each other, and which call gets which.
//
// They must be zero when a call starts, and clearing them would be a launch. So they lie in device memory of the
// library's own, zero when it is loaded, and whoever leaves a call last sets them to zero again. A call may have no
// counters that another one uses at the same time:
//   * Outside of a capture each stream has counters of its own, for good: its calls run one behind the other, and one
//     that is launched early waits for the one before.
//   * A captured call has counters of its own as long as its graph and what is instantiated from it: a graph may run on
//     any stream, beside calls of the stream that it was captured on. A graph does not run beside itself. One that is
//     updated from another (cudaGraphExecUpdate, which torch does not call) must not outlive that one.
// A call for which there are none left takes two launches, with the same bits. A launch that is refused touches no
// counters. A kernel that is aborted leaves them as they are, but no kernel of the process runs after it.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

#include "launch.h"

namespace bhyt::cuda {

constexpr int kTickets = 4096;
constexpr int kStreamTickets = 1024;  // of them for streams
constexpr int kNoTicket = -1;

// A call's counters. 32 bytes apart: calls at the same time do not share a sector.
struct alignas(32) Tickets {
  uint32_t arrived = 0;  // blocks whose partial sums are written
  uint32_t taken = 0;    // shares of the sums, and who has left: backward_one_launch.cuh
};

// The numbers of a device's counters.
class TicketBook {
 public:
  int of_stream(uint64_t id) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = streams_.find(id);
    if (found != streams_.end()) return found->second;
    const int next = static_cast<int>(streams_.size());
    return next == kStreamTickets ? kNoTicket : streams_[id] = next;
  }

  int take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return next_ < kTickets ? next_++ : kNoTicket;
    const int ticket = free_.back();
    free_.pop_back();
    return ticket;
  }

  void give_back(int ticket) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(ticket);
  }

 private:
  std::mutex mutex_;
  std::map<uint64_t, int> streams_;  // by an id that no other stream ever has
  int next_ = kStreamTickets;
  std::vector<int> free_;
};

// What a graph keeps until it is destroyed and has ended, and what is called then.
struct KeptTicket {
  TicketBook* book;
  int ticket;

  static void destroy(void* kept) {
    auto* const self = static_cast<KeptTicket*>(kept);
    self->book->give_back(self->ticket);
    delete self;
  }
};

// *ticket is kNoTicket where none is left. What driver.keep() cannot keep it destroys.
template <class Driver>
cudaError_t find_ticket(const Driver& driver, TicketBook& book, int* ticket) {
  *ticket = kNoTicket;
  bool captured = false;
  cudaError_t error = driver.captured(&captured);
  if (error != cudaSuccess) return error;
  if (!captured) {
    uint64_t id = 0;
    error = driver.stream_id(&id);
    if (error == cudaSuccess) *ticket = book.of_stream(id);
    return error;
  }
  const int taken = book.take();
  if (taken == kNoTicket) return cudaSuccess;
  error = driver.keep(new KeptTicket{&book, taken}, KeptTicket::destroy);
  if (error == cudaSuccess) *ticket = taken;
  return error;
}

// For a call on stream `on` of the current device, number `device`.
cudaError_t find_ticket(int device, cudaStream_t on, int* ticket);

}  // namespace bhyt::cuda
