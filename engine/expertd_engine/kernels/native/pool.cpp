// Claiming tasks, parking threads, growing scratch.
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>

#include "errors.h"

namespace expertd {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kSpin = std::chrono::microseconds(20);  // about what parking and waking a thread costs
constexpr int kMaxThreads = 1024;
constexpr int64_t kMaxTasks = int64_t{1} << 31;
constexpr size_t kAlignment = 64;
constexpr size_t kFirstBlock = size_t{1} << 20;

// Whether `condition` came true within kSpin.
template <class Condition>
bool spin_until(Condition condition) {
  const auto end = Clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (condition()) return true;
      pause();
    }
  } while (Clock::now() < end);
  return condition();
}

// Between what one thread says and what it then looks at, where the other does the reverse: one of the two must see the
// other. Sequentially consistent atomics promise it alone, but QEMU's ARM on x86-64 does not keep that promise for a
// plain store and load (both sides then park for ever); a fence it keeps.
inline void store_before_load() { std::atomic_thread_fence(std::memory_order_seq_cst); }

// New threads inherit the mask: signals belong to the program's own threads.
class NoSignals {
 public:
  NoSignals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~NoSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

}  // namespace

void Scratch::Free::operator()(void* block) const { std::free(block); }

void Scratch::grow(size_t size) {
  void* block = nullptr;
  if (posix_memalign(&block, kAlignment, size) != 0) throw std::bad_alloc();
  Block owner(static_cast<std::byte*>(block));
  blocks_.push_back(std::move(owner));
  capacity_ = size;
  used_ = 0;
  reserved_ += static_cast<int64_t>(size);
}

void* Scratch::bytes(size_t size) {
  size = std::max<size_t>(1, (size + kAlignment - 1) / kAlignment) * kAlignment;
  if (capacity_ - used_ < size) grow(std::max(size, kFirstBlock));
  void* result = blocks_.back().get() + used_;
  used_ += size;
  return result;
}

void Scratch::reset() {
  used_ = 0;
  if (blocks_.size() <= 1) return;
  const auto all = static_cast<size_t>(reserved());
  blocks_.clear();
  capacity_ = 0;
  reserved_ = 0;
  grow(all);
}

Pool::Pool(int threads) {
  require(threads >= 1 && threads <= kMaxThreads,
          "threads is " + std::to_string(threads) + "; allowed are 1 to " + std::to_string(kMaxThreads));
  helpers_.reserve(static_cast<size_t>(threads - 1));
  const NoSignals guard;
  for (int thread = 1; thread < threads; ++thread) helpers_.emplace_back([this, thread] { help(thread); });
}

Pool::~Pool() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  job_posted_.notify_all();
  for (auto& helper : helpers_) helper.join();
}

void Pool::run(int64_t tasks, Body body, void* context) {
  if (tasks <= 1 || helpers_.empty()) {
    for (int64_t task = 0; task < tasks; ++task) body(context, task, 0);
    return;
  }
  require(tasks < kMaxTasks, "too many tasks");
  body_.store(body, std::memory_order_relaxed);
  context_.store(context, std::memory_order_relaxed);
  tasks_.store(tasks, std::memory_order_relaxed);
  done_.store(0, std::memory_order_relaxed);
  ticket_.store(static_cast<uint64_t>(job() + 1) << 32 | static_cast<uint64_t>(tasks));
  store_before_load();
  if (sleeping_.load() > 0) {
    { const std::lock_guard<std::mutex> lock(mutex_); }  // a helper about to sleep has seen the job, or sleeps already
    job_posted_.notify_all();
  }
  work(0);
  wait_for_the_rest(tasks);
}

// Claims and runs tasks of the current job until none is left; whether there was any.
bool Pool::work(int thread) {
  bool any = false;
  uint64_t ticket = ticket_.load();
  for (;;) {
    const Body body = body_.load(std::memory_order_relaxed);
    void* const context = context_.load(std::memory_order_relaxed);
    const int64_t tasks = tasks_.load(std::memory_order_relaxed);
    const auto unclaimed = static_cast<int64_t>(ticket & 0xffffffffu);
    if (unclaimed == 0) return any;
    if (!ticket_.compare_exchange_weak(ticket, ticket - 1)) continue;
    any = true;
    body(context, tasks - unclaimed, thread);
    const bool last = done_.fetch_add(1) + 1 == tasks;
    if (last && caller_waits_.load()) {
      { const std::lock_guard<std::mutex> lock(mutex_); }
      job_done_.notify_one();
    }
    ticket = ticket_.load();
  }
}

void Pool::wait_for_the_rest(int64_t tasks) {
  const auto finished = [&] { return done_.load() == tasks; };
  if (spin_until(finished)) return;
  while (awake_.load()) {  // a task of a GPU's missing expert takes longer than that, and waking up as long again
    sched_yield();
    if (spin_until(finished)) return;
  }
  std::unique_lock<std::mutex> lock(mutex_);
  caller_waits_ = true;
  store_before_load();
  job_done_.wait(lock, finished);
  caller_waits_ = false;
}

void Pool::help(int thread) {
#if defined(__linux__)
  pthread_setname_np(pthread_self(), "expertd-compute");
#endif
  while (!stopping_.load()) {
    const uint32_t last_job = job();
    if (!work(thread)) wait_for_a_job(last_job);
  }
}

// Returns when there may be a job newer than `last_job`, or at the pool's end.
void Pool::wait_for_a_job(uint32_t last_job) {
  const auto posted = [&] { return job() != last_job || stopping_.load(); };
  while (awake_.load()) {
    if (spin_until([&] { return posted() || !awake_.load(); }) && posted()) return;
    sched_yield();  // whoever has work goes first
  }
  if (in_call_.load() && spin_until([&] { return posted() || !in_call_.load(); }) && posted()) return;
  std::unique_lock<std::mutex> lock(mutex_);
  ++sleeping_;
  job_posted_.wait(lock, posted);
  --sleeping_;
}

namespace {
Pool& not_null(expertd_pool* pool) {
  require(pool != nullptr, "pool is null");
  return pool->pool;
}
}  // namespace

Call::Call(expertd_pool* pool) : pool_(not_null(pool)) {
  if (pool_.in_call_.exchange(true)) throw Busy("the pool is inside another call; each calling thread needs its own");
}

Call::~Call() {
  try {
    pool_.scratch_.reset();
  } catch (const std::bad_alloc&) {
    // Nothing is held now; the next call asks again and reports what it cannot get.
  }
  pool_.in_call_ = false;
}

}  // namespace expertd
