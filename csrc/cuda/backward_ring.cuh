// The backward of rows that clusters share, with several rows on their way to shared memory.
#pragma once

#include "backward_persistent.cuh"

namespace bhyt::cuda {
namespace {

constexpr int kMostStages = 3, kInboxBytes = 32;  // of the inboxes before the stages

// A ring as the host lays it out. A stage holds a block's part of a row of x, and behind it that of grad_y.
struct RingShape {
  int stages = 0;                          // 2 or 3: rows that are on their way, or worked on
  int64_t at = 0;                          // bytes of shared memory before it
  int64_t ahead_x = 0, ahead_grad_y = 0;   // bytes from the next row to the one that is asked for
};

// One thread asks for a part of a row by two instructions; all wait for it in the stage's inbox. A stage is filled
// again once a barrier has shown that all threads have read it: group_sum's, of the same turn.
template <class T>
class Ring {
 public:
  static constexpr bool used = true;

  BHYT_DEVICE explicit Ring(const RingShape& shape) : shape_(shape) {}

  BHYT_DEVICE void open(const Place& at, const Ladder& ladder, int packs) {
    inboxes_ = reinterpret_cast<hw::Inbox*>(hw::shared() + shape_.at);
    most_ = packs * ladder.threads * 16;
    const int64_t left = (ladder.row_packs - int64_t(at.part) * packs * ladder.threads) * 16;
    bytes_ = left <= 0 ? 0 : left < most_ ? static_cast<int>(left) : most_;
    apart_ = ladder.threads * 16;
    lane_ = at.lane;
    if (at.lane != 0) return;
    for (int i = 0; i < shape_.stages; ++i) inboxes_[i].open();
    hw::let_bulk_loads_see();
  }

  // Asks for the first rows, behind the wait for the grid before.
  BHYT_DEVICE void fill(const char* x, const char* grad_y, int rows, int64_t step_x, int64_t step_grad_y) {
    if (lane_ != 0) return;
    for (int i = 0; i < shape_.stages && i < rows; ++i) ask(i, x + i * step_x, grad_y + i * step_grad_y);
  }

  BHYT_DEVICE void wait() const { inboxes_[stage_].wait(phase_); }

  BHYT_DEVICE void read(int k, Pack<T, 16 / sizeof(T)>& x, Pack<T, 16 / sizeof(T)>& grad_y) const {
    const unsigned char* const from = stage(stage_) + lane_ * 16 + k * apart_;
    hw::load_words<4>(x.words, from);
    hw::load_words<4>(grad_y.words, from + most_);
  }

  // Goes on to the next stage, and asks for the row that follows those on their way. The addresses are the next row's.
  BHYT_DEVICE void next(const char* x, const char* grad_y, int turn, int rows) {
    if (lane_ == 0 && turn + shape_.stages < rows) ask(stage_, x + shape_.ahead_x, grad_y + shape_.ahead_grad_y);
    if (++stage_ < shape_.stages) return;
    stage_ = 0, phase_ ^= 1;
  }

 private:
  BHYT_DEVICE unsigned char* stage(int i) const {
    return hw::shared() + shape_.at + kInboxBytes + i * 2 * most_;
  }

  BHYT_DEVICE void ask(int i, const char* x, const char* grad_y) {
    inboxes_[i].expect(2 * bytes_);
    if (bytes_ == 0) return;  // the row ends before this part of it
    hw::load_bulk(stage(i), x, bytes_, inboxes_[i]);
    hw::load_bulk(stage(i) + most_, grad_y, bytes_, inboxes_[i]);
  }

  const RingShape& shape_;
  hw::Inbox* inboxes_ = nullptr;
  int most_ = 0, bytes_ = 0, apart_ = 0, lane_ = 0;
  int stage_ = 0;
  uint32_t phase_ = 0;
};

template <class T, class Wanted, bool summed>
BHYT_KERNEL_WITHIN(kMaxThreads, kRowRegisters)
backward_rows_ring(const BackwardParams p, const Constants<float> constants, const Ladder ladder, const Course course,
                   const Partials<float> out, const RingShape shape) {
  block_rows<T, T, Wanted, summed>(p, constants, ladder, course, out, Ring<T>(shape));
}

}  // namespace
}  // namespace bhyt::cuda
