// Requests to the thread that computes for a GPU, from a thread in the GPU's place: each is answered once, with the sums
// that the kernels give, whatever failed before. Built with a sanitizer that watches threads.
#include <atomic>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "expertd_host.h"

namespace {

using check::expect, check::succeeds;

constexpr int kHidden = 64, kInner = 32, kExperts = 4, kTopK = 2, kRows = 2, kSteps = 60, kLayers = 5;
constexpr int kUnknown = 9;  // a layer that there is none of

struct Box {
  int32_t posted = 0, done = 0, head[3] = {}, experts[kExperts] = {}, begin[kExperts] = {}, end[kExperts] = {};
  int32_t cuts[kExperts] = {};
  int32_t pairs[kRows * kTopK] = {};
  std::vector<float> x = check::random_floats(kRows * kHidden), weights = check::random_floats(kRows * kTopK);
  std::vector<uint64_t> sums = std::vector<uint64_t>(kRows * kHidden);

  expertd_mailbox view() {
    return {&posted, &done, head, experts, begin, end, cuts, pairs, x.data(), weights.data(), sums.data(), kRows,
            kExperts, kTopK};
  }

  // Row 0 by experts `first` and the next, of a layer; waits for the answer.
  void ask(int layer, int first) {
    head[0] = layer, head[1] = 1, head[2] = kTopK;
    for (int i = 0; i < kTopK; ++i) experts[i] = first + i, begin[i] = i, end[i] = i + 1, pairs[i] = i;
    const int32_t number = posted + 1;
    __atomic_store_n(&posted, number, __ATOMIC_RELEASE);
    while (__atomic_load_n(&done, __ATOMIC_ACQUIRE) != number) std::this_thread::yield();
    for (int i = 0; i < kHidden; ++i) expect(sums[i] >> 32 == static_cast<uint32_t>(number), "a sum is of another answer");
  }

  std::vector<float> answer() const {
    std::vector<float> floats(kHidden);
    for (int i = 0; i < kHidden; ++i) {
      const auto bits = static_cast<uint32_t>(sums[i]);
      std::memcpy(&floats[i], &bits, sizeof bits);
    }
    return floats;
  }
};

std::vector<float> expected(const expertd_host_layer& layer, const Box& box, int first) {
  expertd_pool* pool = nullptr;
  succeeds(expertd_pool_create(1, &pool));
  std::vector<float> out(kHidden);
  const int32_t begin[] = {0, 1, 2}, row[] = {0, 0};
  succeeds(expertd_moe(pool, &layer.layout, box.x.data(), 1, kTopK, layer.records + first, begin, row,
                       box.weights.data(), out.data(), nullptr));
  succeeds(expertd_pool_destroy(pool));
  return out;
}

}  // namespace

int main() {
  std::vector<std::vector<float>> weights;
  const void* records[kExperts];
  for (auto& record : records) {
    weights.push_back(check::random_floats(3 * kHidden * kInner));
    record = weights.back().data();
  }
  const int64_t matrix = kHidden * kInner * 4;
  const expertd_host_layer layer{{kHidden, kInner, EXPERTD_F32, EXPERTD_SILU, 0, 0, 0, matrix, 2 * matrix, -1, -1, -1,
                                  EXPERTD_ROWS}, records, 3 * matrix, kExperts};
  Box box;
  const expertd_mailbox view = box.view();
  expertd_host* host = nullptr;
  succeeds(expertd_host_create(3, &layer, 1, &view, &host));
  expertd_host_counts counts{};
  int64_t answered = 0;
  for (int step = 0; step < kSteps; ++step) {
    const bool fails = step % 7 == 3;
    succeeds(expertd_host_begin(host));
    for (int nth = 0; nth < kLayers; ++nth) {
      const bool unknown = fails && nth == 2;
      const int first = (step + nth) % (kExperts - kTopK + 1);
      box.ask(unknown ? kUnknown : 0, first);
      if (unknown) continue;
      ++answered;
      expect(box.answer() == expected(layer, box, first), "a request has another's answer");
    }
    const bool looks = step % 2 == 1;  // while it goes on: a failure is told once
    if (looks) expect((expertd_host_look(host, &counts) == EXPERTD_OK) != fails, "a look fails that should not");
    expect((expertd_host_end(host, &counts) == EXPERTD_OK) != (fails && !looks), "a step fails that should not");
    succeeds(expertd_host_begin(host));  // a step that misses nothing
    succeeds(expertd_host_end(host, &counts));
  }
  expect(counts.experts == kTopK * answered && counts.requests == kSteps * kLayers, "requests were lost");
  succeeds(expertd_host_destroy(host));
  return check::report();
}
