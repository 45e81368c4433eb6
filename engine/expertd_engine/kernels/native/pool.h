// The compute threads and their scratch memory. The caller of a kernel drives: it calls parallel_for, phase after
// phase, and takes part; the other threads only help. So a helper that wakes late delays nobody, code between two
// phases is plain serial code, and the end of a parallel_for is the barrier.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#include "expertd_kernels.h"

namespace expertd {

// Between two looks at what another thread will change.
inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Memory for the length of one call: grows to the largest call and is kept. Never handed back piece by piece.
class Scratch {
 public:
  // `count` values of T, at a multiple of 64 bytes, not initialised, valid until the call ends.
  template <class T>
  T* get(int64_t count) {
    static_assert(std::is_trivial<T>::value, "scratch is never constructed");
    return static_cast<T*>(bytes(static_cast<size_t>(count) * sizeof(T)));
  }
  void reset();  // everything handed out is free again; one block remains, as large as all that was needed
  int64_t reserved() const { return reserved_.load(std::memory_order_relaxed); }

 private:
  struct Free {
    void operator()(void* block) const;
  };
  using Block = std::unique_ptr<std::byte, Free>;

  void* bytes(size_t size);
  void grow(size_t size);

  std::vector<Block> blocks_;
  size_t capacity_ = 0, used_ = 0;    // of the last block
  std::atomic<int64_t> reserved_{0};  // of all blocks; read by whoever asks
};

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(helpers_.size()) + 1; }

  // From now on helpers that have worked stay awake between calls too, and the caller inside them, for calls that follow
  // each other closely; until it is turned off.
  void stay_awake(bool on) { awake_ = on; }

  Scratch& scratch() { return scratch_; }
  const Scratch& scratch() const { return scratch_; }

  // fn(task) or fn(task, thread) for every task in 0 .. tasks, in any order on any thread; returns when all are done.
  // A task is claimed when a thread is free for it, so a slow core does less; nothing may depend on who does what.
  // fn must not throw. thread is 0 .. threads(). Only inside a Call, and never from within a task.
  template <class Fn>
  void parallel_for(int64_t tasks, Fn&& fn) {
    using Plain = std::remove_reference_t<Fn>;
    run(tasks, &invoke<Plain>, const_cast<void*>(static_cast<const void*>(&fn)));
  }

 private:
  friend class Call;
  using Body = void (*)(void* context, int64_t task, int thread);

  template <class Fn>
  static void invoke(void* context, int64_t task, int thread) {
    if constexpr (std::is_invocable_v<Fn&, int64_t, int>) {
      (*static_cast<Fn*>(context))(task, thread);
    } else {
      (*static_cast<Fn*>(context))(task);
    }
  }

  void run(int64_t tasks, Body body, void* context);
  void help(int thread);
  bool work(int thread);
  void wait_for_the_rest(int64_t tasks);
  void wait_for_a_job(uint32_t last_job);
  uint32_t job() const { return static_cast<uint32_t>(ticket_.load() >> 32); }

  // The job under way. ticket_ = number of the job << 32 | tasks not yet claimed. A claim takes one off; it succeeds
  // only while its job is unfinished, and until then nobody writes the fields below: what was read before is its own.
  std::atomic<uint64_t> ticket_{0};
  std::atomic<Body> body_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<int64_t> tasks_{0};
  alignas(64) std::atomic<int64_t> done_{0};

  std::atomic<bool> in_call_{false};  // helpers may spin for a moment only inside a call
  std::atomic<bool> awake_{false};
  std::atomic<bool> stopping_{false};
  std::atomic<int> sleeping_{0};  // helpers that are parked, or about to be
  std::atomic<bool> caller_waits_{false};
  std::mutex mutex_;
  std::condition_variable job_posted_, job_done_;
  std::vector<std::thread> helpers_;
  Scratch scratch_;
};

// One call of a kernel: takes the pool for itself, and frees its scratch at the end.
class Call {
 public:
  explicit Call(expertd_pool* pool);  // Refused if null, Busy if the pool is inside another call
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  Pool& pool() { return pool_; }

 private:
  Pool& pool_;
};

}  // namespace expertd

struct expertd_pool {
  expertd::Pool pool;
};
