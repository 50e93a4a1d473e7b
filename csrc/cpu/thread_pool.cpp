#include "thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>

namespace pydist::cpu {
namespace {

// One parallel_for: threads take the next task until none is left.
struct Job {
  const std::function<void(int64_t)>* task;
  int64_t tasks;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
  std::mutex mutex;
  std::condition_variable all_done;

  // `task` is alive as long as a task is left: the caller waits for `done`.
  void work() {
    for (int64_t i; (i = next.fetch_add(1)) < tasks;) {
      (*task)(i);
      if (done.fetch_add(1) + 1 == tasks) {
        std::lock_guard<std::mutex> lock(mutex);
        all_done.notify_all();
      }
    }
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    all_done.wait(lock, [this] { return done.load() == tasks; });
  }
};

class Pool {
 public:
  void run(const std::shared_ptr<Job>& job, int helpers) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (; threads_ < helpers; ++threads_) std::thread(&Pool::loop, this).detach();
      for (int i = 0; i < helpers; ++i) jobs_.push_back(job);
    }
    wake_.notify_all();
    job->work();
    job->wait();
  }

 private:
  void loop() {
    for (;;) {
      std::shared_ptr<Job> job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] { return !jobs_.empty(); });
        job = std::move(jobs_.front());
        jobs_.pop_front();
      }
      job->work();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<Job>> jobs_;
  int threads_ = 0;
};

// Never destroyed: its threads may outlive static destruction. A forked child has none of the
// parent's threads and may have a locked mutex, so it starts with a pool of its own.
std::atomic<Pool*> pool{nullptr};

Pool* the_pool() {
  Pool* current = pool.load();
  if (current) return current;
  static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
  (void)registered;
  Pool* fresh = new Pool;
  if (pool.compare_exchange_strong(current, fresh)) return fresh;
  delete fresh;
  return current;
}

}  // namespace

void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& task) {
  constexpr int kMaxThreads = 256;  // of a mistaken argument, not a tuning
  const int64_t wanted = std::min<int64_t>(std::min(threads, kMaxThreads), tasks);
  const int helpers = static_cast<int>(wanted) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < tasks; ++i) task(i);
    return;
  }
  auto job = std::make_shared<Job>();
  job->task = &task;
  job->tasks = tasks;
  the_pool()->run(job, helpers);
}

}  // namespace pydist::cpu
