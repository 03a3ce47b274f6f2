// What is made of a driver's answers, with drivers that are not there: code compiled for an older device, a query that
// fails, versions that do not go together; which call gets which counters.
#include "device.h"

#include <memory>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "rows.h"
#include "tickets.h"

using namespace bhyt::cuda;
using rows::check;

namespace {

constexpr cudaError_t kFailure = cudaErrorInvalidValue;

// A device of 132 multiprocessors that runs `loaded`; the question number `fails`, from 1, is not answered.
struct FakeDriver {
  Code loaded;
  int fails = 0;
  mutable int asked = 0;
  mutable int cluster_questions = 0;

  cudaError_t answer() const { return ++asked == fails ? kFailure : cudaSuccess; }

  cudaError_t multiprocessors(int, int* count) const {
    *count = 132;
    return answer();
  }
  cudaError_t shared_bytes(int, int64_t* bytes) const {
    *bytes = 227 << 10;
    return answer();
  }
  cudaError_t code(Code* found) const {
    *found = loaded;
    return answer();
  }
  cudaError_t resident_clusters(int size, int multiprocessors, int* count) const {
    ++cluster_questions;
    *count = size == 8 ? 0 : multiprocessors / size;
    return answer();
  }
};

Device described(const FakeDriver& driver) {
  Device device;
  check(describe(driver, 3, &device) == cudaSuccess, "a device is described");
  return device;
}

void code_decides() {
  const FakeDriver hopper{{90, 90}};
  const Device device = described(hopper);
  check(device.index == 3 && device.multiprocessors == 132, "index and multiprocessors are the device's");
  check(device.shared_bytes == 227 << 10, "and the shared memory of a block");
  check(device.hopper_or_later && device.code.ptx == 90 && device.code.binary == 90, "sm_90 on 9.0 has clusters");
  check(device.resident_clusters[0] == 0 && device.resident_clusters[1] == 66 && device.resident_clusters[2] == 33 &&
            device.resident_clusters[3] == 0 && device.resident_clusters[4] == 8,
        "clusters of 2, 4, 8 and 16 blocks are counted, of which those of 8 do not fit");

  for (int capability : {90, 100, 110, 120}) {
    const FakeDriver old{{80, capability}};  // BHYT_CUDA_ARCHS=80 on a newer device
    const Device same = described(old);
    check(!same.hopper_or_later && old.cluster_questions == 0, "PTX of 8.0 has no clusters, on any device");
    for (int clusters : same.resident_clusters) check(clusters == 0, "and so none is resident");
  }
  check(!described({{80, 80}}).hopper_or_later, "nor has machine code of 8.0");
  check(described({{90, 120}}).hopper_or_later, "PTX of 9.0 has clusters on what came later");
  check(described({{100, 110}}).hopper_or_later, "as has PTX of 10.0");
}

void failures_leave_nothing() {
  for (int fails = 1; fails <= 7; ++fails) {
    Device device;
    check(describe(FakeDriver{{90, 90}, fails}, 3, &device) == kFailure, "a question without an answer is an error");
    check(device.multiprocessors == 1 && !device.hopper_or_later, "and nothing of the device is taken over");
  }
}

void failures_are_forgotten() {
  Description description;
  const Device* device = nullptr;
  int queries = 0;
  const auto query = [&](Device* found) {
    FakeDriver driver{{90, 90}};
    driver.fails = ++queries == 1 ? 4 : 0;
    return describe(driver, 0, found);
  };
  check(description.get(query, &device) == kFailure && device == nullptr, "a failed query gives no device");
  std::vector<std::thread> threads;
  std::vector<const Device*> seen(8);
  for (const Device*& each : seen) threads.emplace_back([&] { description.get(query, &each); });
  for (std::thread& thread : threads) thread.join();
  for (const Device* each : seen)
    check(each != nullptr && each == seen[0] && each->hopper_or_later, "the next one gives all callers the device");
  check(queries == 2, "which is asked for once");
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

void texts() {
  check(text(Code{90, 90}) == "machine code of sm_90", "machine code");
  check(text(Code{80, 90}) ==
            "PTX of compute_80, compiled for sm_90 when loaded: no clusters, long rows are slower",
        "a build for 8.0 on 9.0 says so");
  Device hopper;
  hopper.code = {90, 90}, hopper.hopper_or_later = true;
  for (int i = 1; i < kClusterSizes; ++i) hopper.resident_clusters[i] = 100 >> i;
  check(text(hopper) == "machine code of sm_90; clusters of 2: 50, 4: 25, 8: 12, 16: 6 at once", "and clusters");
  Device ampere;
  ampere.code = {80, 80};
  check(text(ampere) == "machine code of sm_80", "or none");
  check(text(Code{80, 89}) == "PTX of compute_80, compiled for sm_89 when loaded", "8.9 has no clusters to miss");
  check(text(Code{100, 110}) == "PTX of compute_100, compiled for sm_110 when loaded", "nor does 11.0 miss any");

  check(version_text(13020) == "13.2" && version_text(12080) == "12.8" && version_text(0) == "none", "versions");
  for (int driver : {13000, 13020, 14000})
    check(driver_problem({13010, driver}).empty(), "a driver of the same major version, or newer, will do");
  check(driver_problem({13000, 0}).empty(), "no driver, no problem");
  const std::string old = driver_problem({13000, 12080});
  check(has(old, "built with CUDA 13.0") && has(old, "supports CUDA 12.8") && has(old, "a CUDA 12 toolkit"),
        "an older driver: both versions, and what to build with");
  const std::string ptx = ptx_problem({13020, 13000});
  check(has(ptx, "PTX of CUDA 13.2") && has(ptx, "driver for CUDA 13.0"), "PTX too new: both versions");
}

// A stream with an id; while it captures, into a graph that keeps what it is given.
struct FakeStream {
  uint64_t id = 0;
  struct Graph {
    std::vector<std::pair<void*, void (*)(void*)>> kept;
    Graph() = default;
    Graph(const Graph&) = delete;
    ~Graph() {
      for (const auto& [data, destroy] : kept) destroy(data);
    }
  };
  Graph* graph = nullptr;
  int fails = 0;  // the question that gets no answer, from 1 on

  cudaError_t captured(bool* yes) const { return *yes = graph, fails == 1 ? kFailure : cudaSuccess; }
  cudaError_t stream_id(uint64_t* found) const { return *found = id, fails == 2 ? kFailure : cudaSuccess; }
  cudaError_t keep(void* kept, void (*destroy)(void*)) const {
    if (fails == 3) return destroy(kept), kFailure;
    graph->kept.emplace_back(kept, destroy);
    return cudaSuccess;
  }
};

int ticket_of(const FakeStream& stream, TicketBook& book) {
  int ticket = -2;
  check(find_ticket(stream, book, &ticket) == cudaSuccess, "a ticket, or the word that there is none");
  return ticket;
}

void tickets() {
  TicketBook book;
  const int first = ticket_of({7}, book), second = ticket_of({uint64_t(1) << 40}, book);
  check(first >= 0 && first != second, "each stream has a ticket of its own");
  check(ticket_of({7}, book) == first, "and keeps it");
  std::set<int> given{first, second};
  for (int i = 2; i < kStreamTickets; ++i) given.insert(ticket_of({uint64_t(100 + i)}, book));
  check(int(given.size()) == kStreamTickets, "no two streams have the same");
  check(ticket_of({5}, book) == kNoTicket && ticket_of({7}, book) == first, "a stream too many has none");
  auto graph = std::make_unique<FakeStream::Graph>(), other = std::make_unique<FakeStream::Graph>();
  const auto captured = [&](auto& into) { return ticket_of({7, into.get()}, book); };
  for (int i = kStreamTickets; i < kTickets; ++i) given.insert(captured(i % 2 ? graph : other));
  check(!given.count(kNoTicket) && given.size() == kTickets && *given.rbegin() == kTickets - 1,
        "captured calls have others, each its own");
  check(captured(graph) == kNoTicket, "while there are any");
  const size_t returned = other->kept.size();
  other = std::make_unique<FakeStream::Graph>();
  std::set<int> again;
  for (size_t i = 0; i < returned; ++i) again.insert(captured(other));
  check(!again.count(kNoTicket) && again.size() == returned, "a destroyed graph's are given again, each once");
  check(captured(other) == kNoTicket, "those of another graph are not");
  graph.reset(), other.reset();
  FakeStream::Graph last;
  for (int fails : {1, 2, 3}) {
    const FakeStream stream{7, fails == 3 ? &last : nullptr, fails};
    int ticket = -2;
    check(find_ticket(stream, book, &ticket) == kFailure && ticket == kNoTicket, "no ticket without an answer");
  }
  std::set<int> all;
  for (int i = kStreamTickets; i < kTickets; ++i) all.insert(ticket_of({7, &last}, book));
  check(!all.count(kNoTicket) && *all.begin() == kStreamTickets, "and none is lost");
}

void variants() {
  for (int i = 0; const char* name : kBackwardVariants) {
    BackwardVariant found;
    check(find_variant(name, &found) && int(found) == i++, std::string("by its name: ") + name);
  }
  BackwardVariant found = BackwardVariant::one_launch;
  check(find_variant(nullptr, &found) && found == BackwardVariant::two_launches, "no name: the first");
  found = BackwardVariant::one_launch;
  check(find_variant("", &found) && found == BackwardVariant::two_launches, "an empty name: the first");
  for (const char* name : {"one", "one_launch ", "ONE_LAUNCH", "2"})
    check(!find_variant(name, &found), std::string("unknown: ") + name);
}

}  // namespace

int main() {
  code_decides();
  failures_leave_nothing();
  failures_are_forgotten();
  texts();
  tickets();
  variants();
  return rows::report("device");
}
