// A pre-gating router that runs beside its caller, who has other things to do until the routes are asked for. Whoever
// asks while the thread has not woken up yet makes the call itself: a thread that wakes late delays nobody.
#include <signal.h>

#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "errors.h"
#include "expertd_pregate.h"
#include "pool.h"

namespace expertd {
namespace {

class Aside {
 public:
  Aside() : pool_{Pool(1)}, thread_([this] { serve(); }) {}

  ~Aside() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  expertd_pool* pool() { return &pool_; }

  void begin(std::function<int()> call) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (call_ || running_) throw Busy("the router is inside another call");
      code_ = EXPERTD_OK;
      call_ = std::move(call);
    }
    changed_.notify_all();
  }

  int end() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (call_) return std::exchange(call_, nullptr)();
    changed_.wait(lock, [&] { return !running_; });
    const int code = std::exchange(code_, EXPERTD_OK);
    return code ? report(code, error_.c_str()) : code;
  }

 private:
  void serve() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, nullptr);  // signals belong to the program's own threads
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return call_ || stopping_; });
      if (stopping_) return;
      const std::function<int()> call = std::exchange(call_, nullptr);
      running_ = true;
      lock.unlock();
      const int code = call();
      lock.lock();
      code_ = code;
      if (code) error_ = expertd_error();
      running_ = false;
      changed_.notify_all();
    }
  }

  expertd_pool pool_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::function<int()> call_;  // that nobody has begun to make
  bool running_ = false;       // the thread makes one
  int code_ = EXPERTD_OK;
  std::string error_;
  bool stopping_ = false;
  std::thread thread_;  // last: it uses all the others
};

}  // namespace
}  // namespace expertd

struct expertd_pregate_thread {
  expertd::Aside aside;
};

using namespace expertd;

extern "C" int expertd_pregate_thread_create(expertd_pregate_thread** thread) {
  return guarded([&] {
    require(thread != nullptr, "thread is null");
    *thread = new expertd_pregate_thread;
  });
}

extern "C" int expertd_pregate_thread_destroy(expertd_pregate_thread* thread) {
  return guarded([&] { delete thread; });
}

extern "C" int expertd_pregate_begin(expertd_pregate_thread* thread, const expertd_pregate* pregate,
                                     const int64_t* tokens, const expertd_step* step, int64_t* experts,
                                     float* weights) {
  return guarded([&] {
    require(thread != nullptr, "thread is null");
    thread->aside.begin([=] {
      return expertd_pregate_forward(thread->aside.pool(), pregate, tokens, step, experts, weights);
    });
  });
}

extern "C" int expertd_pregate_end(expertd_pregate_thread* thread) {
  int code = EXPERTD_INVALID;
  const int found = guarded([&] {
    require(thread != nullptr, "thread is null");
    code = thread->aside.end();
  });
  return found ? found : code;
}
