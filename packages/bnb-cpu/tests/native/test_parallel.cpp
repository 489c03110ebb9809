// parallel_for: parts cover the range once, whatever the numbers; nesting, fork, many callers.
#include <sys/wait.h>

#include <atomic>
#include <mutex>
#include <thread>
#include <utility>

#include "../../kernels/memory.h"
#include "../../kernels/parallel.h"
#include "testing.h"

namespace {

using Parts = std::vector<std::pair<int64_t, int64_t>>;

Parts parts_of(int threads, int64_t count, int64_t grain) {
  struct Log {
    std::mutex mutex;
    Parts parts;
  } log;
  bnb_cpu::parallel_for(
      threads, count, grain,
      [](void* context, int64_t begin, int64_t end) {
        Log& into = *static_cast<Log*>(context);
        const std::lock_guard<std::mutex> lock(into.mutex);
        into.parts.emplace_back(begin, end);
      },
      &log);
  return log.parts;
}

void check_parts(int threads, int64_t count, int64_t grain) {
  Parts parts = parts_of(threads, count, grain);
  if (count <= 0) {
    CHECK(parts.empty(), "an empty range was run");
    return;
  }
  CHECK(!parts.empty() && static_cast<int>(parts.size()) <= (threads > 1 ? threads : 1), "%zu parts", parts.size());
  int64_t covered = 0;
  for (const auto& [begin, end] : parts) {
    CHECK(begin >= 0 && begin < end && end <= count, "part [%lld, %lld)", static_cast<long long>(begin),
          static_cast<long long>(end));
    CHECK(parts.size() == 1 || end - begin >= grain, "a part below the grain");
    covered += end - begin;
  }
  CHECK(covered == count, "%lld of %lld covered", static_cast<long long>(covered), static_cast<long long>(count));
}

void check_nested() {
  std::atomic<int64_t> sum{0};
  bnb_cpu::parallel_for(
      4, 100, 1,
      [](void* context, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          bnb_cpu::parallel_for(
              4, 10, 1, [](void* inner, int64_t b, int64_t e) { *static_cast<std::atomic<int64_t>*>(inner) += e - b; },
              context);
        }
      },
      &sum);
  CHECK(sum == 1000, "nested loops covered %lld", static_cast<long long>(sum.load()));
}

void check_callers() {
  std::vector<std::thread> callers;
  for (int i = 0; i < 8; ++i) {
    callers.emplace_back([] {
      for (int64_t count = 0; count < 200; ++count) {
        check_parts(4, count, 1);
      }
    });
  }
  for (std::thread& caller : callers) {
    caller.join();
  }
}

void check_fork() {
  check_parts(4, 1000, 1);
  const pid_t child = fork();
  CHECK(child >= 0, "fork");
  if (child == 0) {
    // The pool's threads are gone here; waiting for them would hang.
    check_parts(4, 1000, 1);
    check_nested();
    _exit(0);
  }
  int status = 0;
  for (int waited = 0; waitpid(child, &status, WNOHANG) == 0; ++waited) {
    CHECK(waited < 3000, "the forked process hangs");
    usleep(10000);
  }
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the forked process failed with status %d", status);
  check_parts(4, 1000, 1);
}

// Any range is harmless, and what is in memory stays.
void check_huge_pages() {
  std::vector<uint8_t> bytes(9 << 20, 7);
  for (const int64_t size : {int64_t{0}, int64_t{1}, int64_t{4096}, int64_t{5} << 20, int64_t{9} << 20}) {
    bnb_cpu::advise_huge_pages(bytes.data(), size);
  }
  bnb_cpu::advise_huge_pages(nullptr, 0);
  for (const uint8_t byte : bytes) {
    CHECK(byte == 7, "memory changed");
  }
}

}  // namespace

int main() {
  for (const int threads : {0, 1, 2, 3, 4, 64}) {
    for (const int64_t count :
         {int64_t{-1}, int64_t{0}, int64_t{1}, int64_t{2}, int64_t{7}, int64_t{1000}, int64_t{1} << 40}) {
      for (const int64_t grain : {int64_t{0}, int64_t{1}, int64_t{3}, int64_t{1000}, int64_t{1} << 50}) {
        check_parts(threads, count, grain);
      }
    }
  }
  check_nested();
  check_callers();
  check_fork();
  check_huge_pages();
  return 0;
}
