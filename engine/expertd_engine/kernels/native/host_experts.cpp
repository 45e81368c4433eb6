// The thread that computes for a GPU: it watches a number in shared memory, and answers what it announces.
#include "expertd_host.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "errors.h"
#include "formats.h"
#include "moe.h"
#include "pool.h"

namespace expertd {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kLooks = 4096;  // at the number before others are let onto the core
constexpr auto kPatience = std::chrono::milliseconds(200);  // without any request: then looks are far between
constexpr auto kNap = std::chrono::microseconds(200);

int32_t read_number(const int32_t* at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }

void check_mailbox(const expertd_mailbox& box) {
  require(box.posted && box.done && box.head && box.experts && box.begin && box.end && box.cuts && box.pairs &&
              box.x && box.weights && box.sums,
          "a part of the mailbox is null");
  check_dimension("max_rows", box.max_rows);
  check_dimension("max_experts", box.max_experts);
  check_dimension("top_k", box.top_k);
}

}  // namespace

class Host {
 public:
  Host(int threads, const expertd_host_layer* layers, int32_t count, const expertd_mailbox& box)
      : box_(box), layers_(layers, layers + count), answered_(read_number(box.posted)) {
    int32_t widest = 0;
    for (const expertd_host_layer& layer : layers_) widest = std::max(widest, layer.layout.hidden);
    sums_.resize(static_cast<size_t>(box.max_rows) * widest);
    expertd_pool* pool = nullptr;
    require(expertd_pool_create(threads, &pool) == EXPERTD_OK, expertd_error());
    pool_.reset(pool);
    const size_t pairs = static_cast<size_t>(box.max_rows) * box.top_k;
    records_.reserve(box.max_experts);
    pair_begin_.reserve(box.max_experts + 1);
    cuts_.reserve(box.max_experts);
    pair_row_.reserve(pairs);
    pair_weight_.reserve(pairs);
    watcher_ = std::thread([this] { watch(); });
  }

  ~Host() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
      watching_ = false;
    }
    changed_.notify_all();
    watcher_.join();
  }

  void begin() {
    pool_->pool.stay_awake(true);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      watching_ = true;
    }
    changed_.notify_all();
  }

  void end(expertd_host_counts* counts) {
    watching_ = false;
    pool_->pool.stay_awake(false);
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return parked_; });
    }
    look_at(counts);
  }

  void look_at(expertd_host_counts* counts) {
    std::string failure;
    {
      const std::lock_guard<std::mutex> lock(told_);
      *counts = counts_;
      failure = std::exchange(failure_, "");
    }
    require(failure.empty(), failure);
  }

 private:
  void watch() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, nullptr);  // signals belong to the program's own threads
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "expertd-host");
#endif
    std::unique_lock<std::mutex> lock(mutex_);
    while (!stopping_) {
      parked_ = true;
      changed_.notify_all();
      changed_.wait(lock, [this] { return watching_ || stopping_; });
      parked_ = false;
      lock.unlock();
      heard_ = Clock::now();
      rouse();
      while (watching_) look();
      lock.lock();
    }
  }

  // Wakes all helpers, who then stay awake: not the first request of a step is to wait for that.
  void rouse() {
    Call taken(pool_.get());
    taken.pool().parallel_for(taken.pool().threads(), [](int64_t) {});
  }

  void look() {
    for (int i = 0; i < kLooks && watching_; ++i) {  // who ends a step waits for this to end
      if (const int32_t number = read_number(box_.posted); number != answered_) {
        answer(number);
        return;
      }
      pause();
    }
    if (Clock::now() - heard_ > kPatience) std::this_thread::sleep_for(kNap);
    sched_yield();
  }

  void answer(int32_t number) {
    const auto began = Clock::now();
    expertd_host_counts done{};
    std::string failure;
    try {
      compute(&done);
    } catch (const std::exception& error) {
      failure = error.what();
    }
    if (!failure.empty()) {  // known before anybody has the sums, which mean nothing
      const std::lock_guard<std::mutex> lock(told_);
      if (failure_.empty()) failure_ = failure;
    }
    send(number);
    answered_ = number;
    heard_ = Clock::now();
    {
      const std::lock_guard<std::mutex> lock(told_);
      ++counts_.requests;
      counts_.experts += done.experts;
      counts_.bytes += done.bytes;
      counts_.nanoseconds += std::chrono::duration_cast<std::chrono::nanoseconds>(heard_ - began).count();
    }
    __atomic_store_n(box_.done, number, __ATOMIC_RELEASE);
  }

  void compute(expertd_host_counts* done) {
    const int32_t number = box_.head[0], rows = box_.head[1], asked = box_.head[2];
    answer_ = sums_.size();  // whoever asks for what there is not is answered too
    require(number >= 0 && number < static_cast<int32_t>(layers_.size()),
            "layer " + std::to_string(number) + " is asked for; there are " + std::to_string(layers_.size()));
    require(rows >= 0 && rows <= box_.max_rows && asked >= 0 && asked <= box_.max_experts,
            std::to_string(asked) + " experts for " + std::to_string(rows) + " rows are asked for; the mailbox has room "
                "for " + std::to_string(box_.max_experts) + " and " + std::to_string(box_.max_rows));
    const expertd_host_layer& layer = layers_[number];
    answer_ = static_cast<size_t>(rows) * layer.layout.hidden;
    std::fill_n(sums_.data(), answer_, 0.0f);
    gather(layer, number, rows, asked);
    const expertd_moe_call call{&layer.layout,      box_.x,           rows,
                                asked,              records_.data(),  pair_begin_.data(),
                                pair_row_.data(),   pair_weight_.data(), sums_.data(), nullptr};
    const bool whole = std::all_of(cuts_.begin(), cuts_.end(), [](int32_t cut) { return cut == 0; });
    const int32_t* const cuts = whole ? nullptr : cuts_.data();
    check_moe(call, cuts);
    Call taken(pool_.get());
    run_moe(taken.pool(), call, cuts);
    done->experts = asked;
    const int64_t inner = layer.layout.inner;
    for (const int32_t cut : cuts_) done->bytes += layer.record_bytes * (inner - cut) / inner;
  }

  // Each sum in one store with the number, so that none can be read without it.
  void send(int32_t number) {
    const uint64_t high = static_cast<uint64_t>(static_cast<uint32_t>(number)) << 32;
    std::atomic_thread_fence(std::memory_order_release);  // the next request may come as soon as they are read
    for (size_t i = 0; i < answer_; ++i) {
      uint32_t bits;
      std::memcpy(&bits, &sums_[i], sizeof bits);
      __atomic_store_n(box_.sums + i, high | bits, __ATOMIC_RELAXED);
    }
  }

  // The request, as the kernels take it.
  void gather(const expertd_host_layer& layer, int32_t number, int32_t rows, int32_t asked) {
    records_.clear();
    pair_row_.clear();
    pair_weight_.clear();
    pair_begin_.assign(1, 0);
    cuts_.assign(box_.cuts, box_.cuts + asked);  // what is checked is what is computed with
    const int32_t most = rows * box_.top_k;
    for (int32_t i = 0; i < asked; ++i) {
      const int32_t expert = box_.experts[i];
      require(expert >= 0 && expert < layer.experts && layer.records[expert] != nullptr,
              "expert " + std::to_string(expert) + " of layer " + std::to_string(number) + " has no record");
      require(box_.begin[i] >= 0 && box_.begin[i] <= box_.end[i] && box_.end[i] <= most,
              "expert " + std::to_string(expert) + " has pairs " + std::to_string(box_.begin[i]) + " to " +
                  std::to_string(box_.end[i]) + " of " + std::to_string(most));
      records_.push_back(layer.records[expert]);
      for (int32_t p = box_.begin[i]; p < box_.end[i]; ++p) {
        const int32_t pair = box_.pairs[p];
        require(pair >= 0 && pair < most, "pair " + std::to_string(pair) + " is none of " + std::to_string(most));
        pair_row_.push_back(pair / box_.top_k);
        pair_weight_.push_back(box_.weights[pair]);
      }
      pair_begin_.push_back(static_cast<int32_t>(pair_row_.size()));
    }
  }

  struct Destroy {
    void operator()(expertd_pool* pool) const { expertd_pool_destroy(pool); }
  };

  const expertd_mailbox box_;
  const std::vector<expertd_host_layer> layers_;
  std::unique_ptr<expertd_pool, Destroy> pool_;
  std::vector<const void*> records_;
  std::vector<int32_t> pair_begin_, pair_row_, cuts_;
  std::vector<float> pair_weight_;
  std::vector<float> sums_;
  size_t answer_ = 0;  // of them are the last request's
  int32_t answered_;  // and what follows: the watching thread's, or, while that is parked, the caller's
  Clock::time_point heard_;  // of the last request, or since when it watches
  expertd_host_counts counts_{};  // this and the next are whoever's has the third
  std::string failure_;
  std::mutex told_;
  std::atomic<bool> watching_{false};
  bool stopping_ = false, parked_ = false;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::thread watcher_;
};

}  // namespace expertd

struct expertd_host {
  expertd::Host host;
};

using namespace expertd;

extern "C" int64_t expertd_host_layer_bytes(void) { return sizeof(expertd_host_layer); }
extern "C" int64_t expertd_mailbox_bytes(void) { return sizeof(expertd_mailbox); }

extern "C" int expertd_host_create(int32_t threads, const expertd_host_layer* layers, int32_t count,
                                   const expertd_mailbox* mailbox, expertd_host** host) {
  return guarded([&] {
    require(layers != nullptr && mailbox != nullptr && host != nullptr, "layers, mailbox or host is null");
    require(count >= 1, "there are " + std::to_string(count) + " layers; give at least 1");
    check_mailbox(*mailbox);
    *host = new expertd_host{{threads, layers, count, *mailbox}};
  });
}

extern "C" int expertd_host_destroy(expertd_host* host) {
  delete host;
  return EXPERTD_OK;
}

extern "C" int expertd_host_begin(expertd_host* host) {
  return guarded([&] {
    require(host != nullptr, "host is null");
    host->host.begin();
  });
}

extern "C" int expertd_host_end(expertd_host* host, expertd_host_counts* counts) {
  return guarded([&] {
    require(host != nullptr && counts != nullptr, "host or counts is null");
    host->host.end(counts);
  });
}

extern "C" int expertd_host_look(expertd_host* host, expertd_host_counts* counts) {
  return guarded([&] {
    require(host != nullptr && counts != nullptr, "host or counts is null");
    host->host.look_at(counts);
  });
}
