// Optimizer steps on arrays between guard pages: every instruction set writes the bits of the scalar build, and
// nothing else. The scalar build is compared with PyTorch in test_optim.py.
#include <bnb/rules.h>

#include <algorithm>
#include <memory>

#include "quant_model.h"

using namespace testing;

namespace {

constexpr int64_t kUnit = 256;

// The tensors of a call, one guarded array per address of its table.
struct Problem {
  int rule, dtype;
  bool eight;
  std::vector<int64_t> counts;
  std::vector<std::vector<std::unique_ptr<Guarded>>> columns;

  Problem(Random& random, int rule, bool eight)
      : rule(rule), dtype(static_cast<int>(between(random, 0, 2))), eight(eight) {
    const auto place = between(random, 0, 1) == 0 ? Guarded::kAtEnd : Guarded::kAtStart;
    const int first = bnb::first_values(static_cast<bnb::Rule>(rule));
    const int second = bnb::second_values(static_cast<bnb::Rule>(rule));
    const int kind = static_cast<int>(between(random, 0, 5));
    for (int64_t tensors = between(random, 1, 5); tensors > 0; --tensors) {
      counts.push_back(one_of<int64_t>(random, {0, 1, kUnit, between(random, 2, 40), between(random, 200, 1100)}));
    }
    add_values(random, kind, place);
    add_values(random, kind == 3 || kind == 5 ? 0 : kind, place);
    for (const int values : {first, second}) {
      if (values > 0) {
        add_states(random, values, place);
      }
    }
  }

  void add_values(Random& random, int kind, Guarded::Place place) {
    auto& column = columns.emplace_back();
    for (const int64_t count : counts) {
      column.push_back(std::make_unique<Guarded>(count * size_of(dtype), place));
      std::vector<float> values(static_cast<size_t>(count));
      std::generate(values.begin(), values.end(), [&] { return value_of_kind(random, kind); });
      write_elements(values, dtype, column.back()->as<void>());
    }
  }

  void add_states(Random& random, int values, Guarded::Place place) {
    // Not a reference: the second column may move the first.
    const size_t at = columns.size();
    columns.resize(at + (eight ? 2 : 1));
    for (const int64_t count : counts) {
      auto& states = columns[at].emplace_back(std::make_unique<Guarded>(values * count * (eight ? 1 : 4), place));
      const int64_t blocks = values * ((count + kUnit - 1) / kUnit);
      for (int64_t i = 0; i < values * count; ++i) {
        if (eight) {
          states->as<uint8_t>()[i] = static_cast<uint8_t>(random());
        } else {
          states->as<float>()[i] = value_of_kind(random, 0);
        }
      }
      if (eight) {
        auto& absmax = columns[at + 1].emplace_back(std::make_unique<Guarded>(blocks * 4, place));
        for (int64_t i = 0; i < blocks; ++i) {
          absmax->as<float>()[i] = one_of<float>(random, {0.0f, 1e-41f, 1.0f, 3e-5f, 1e30f});
        }
      }
    }
  }

  std::vector<int64_t> table() const {
    std::vector<int64_t> cells = counts;
    for (const auto& column : columns) {
      for (const auto& array : column) {
        cells.push_back(static_cast<int64_t>(reinterpret_cast<uintptr_t>(array->as<void>())));
      }
    }
    return cells;
  }

  // All bytes of all arrays.
  std::vector<std::vector<uint8_t>> snapshot() const {
    std::vector<std::vector<uint8_t>> bytes;
    for (const auto& column : columns) {
      for (const auto& array : column) {
        bytes.emplace_back(array->as<uint8_t>(), array->as<uint8_t>() + array->bytes());
      }
    }
    return bytes;
  }

  void restore(const std::vector<std::vector<uint8_t>>& bytes) const {
    size_t next = 0;
    for (const auto& column : columns) {
      for (const auto& array : column) {
        array->fill(bytes[next++].data());
      }
    }
  }

  void check() const {
    for (const auto& column : columns) {
      for (const auto& array : column) {
        array->check("an array of an optimizer step");
      }
    }
  }

  // Which elements of a snapshot have another value; NaN equals NaN.
  void compare(const std::vector<std::vector<uint8_t>>& mine, const std::vector<std::vector<uint8_t>>& wanted,
               const std::string& where) const {
    for (size_t i = 0; i < mine.size(); ++i) {
      const size_t column = i / counts.size();
      const bool codes = eight && column >= 2 && column % 2 == 0;
      if (codes) {
        CHECK(mine[i] == wanted[i], "%s: codes of column %zu differ", where.c_str(), column);
        continue;
      }
      const int type = column < 2 ? dtype : 0;
      const int64_t count = static_cast<int64_t>(mine[i].size()) / size_of(type);
      check_same_floats(read_elements(mine[i].data(), type, count), read_elements(wanted[i].data(), type, count),
                        where + " column " + std::to_string(column));
    }
  }
};

void check_step(Random& random, const std::vector<std::string>& isas) {
  const int rule = static_cast<int>(between(random, 0, 10));
  const bool eight = between(random, 0, 1) == 1;
  const Problem problem(random, rule, eight);
  const auto tensors = static_cast<int64_t>(problem.counts.size());
  const std::vector<int64_t> table = problem.table();
  std::vector<int64_t> steps, seeds;
  std::vector<double> schedule, norms;
  std::vector<float> update_norms(static_cast<size_t>(tensors));
  for (int64_t i = 0; i < tensors; ++i) {
    steps.push_back(between(random, 1, 3));
    seeds.push_back(static_cast<int64_t>(random() & 0xffffffffu));
    norms.push_back(1.0);
    schedule.insert(schedule.end(), {0.01, static_cast<double>(steps.back()), 0.99, 2.0});
  }
  const std::vector<float> first = code_of_256(random), second = code_of_256(random);
  const bool scheduled = between(random, 0, 1) == 1, seeded = problem.dtype == 2 && between(random, 0, 1) == 1;
  const bool skip = between(random, 0, 1) == 1;
  const double clip = one_of<double>(random, {0.0, 0.02}), decay = one_of<double>(random, {0.0, 0.1});
  const auto start = problem.snapshot();
  const auto run = [&](const std::string& isa, int threads) {
    bnb_cpu::set_isa(isa);
    problem.restore(start);
    const bnb_cpu::Kernels& kernels = bnb_cpu::kernels();
    const double* plan = scheduled ? schedule.data() : nullptr;
    const int64_t* noise = seeded ? seeds.data() : nullptr;
    if (eight) {
      kernels.optimizer_step_8bit(rule, tensors, table.data(), problem.dtype, first.data(), second.data(), steps.data(),
                                  plan, noise, 0.01, 0.9, 0.99, 0.99, 2.0, 1e-8, decay, 0.5, clip, skip, threads);
    } else {
      kernels.optimizer_step_32bit(rule, tensors, table.data(), problem.dtype, steps.data(), plan, noise, 0.01, 0.9,
                                   0.99, 0.99, 2.0, 1e-8, decay, 0.5, clip, norms.data(), update_norms.data(), skip,
                                   threads);
    }
    problem.check();
    return problem.snapshot();
  };
  const auto wanted = run("scalar", 1);
  for (int64_t i = 0; i < tensors; ++i) {
    CHECK(wanted[static_cast<size_t>(i)] == start[static_cast<size_t>(i)], "rule %d wrote a gradient", rule);
  }
  for (const std::string& isa : isas) {
    const int threads = static_cast<int>(between(random, 1, 4));
    problem.compare(run(isa, threads), wanted,
                    isa + " rule " + std::to_string(rule) + (eight ? " 8 bit " : " 32 bit ") +
                        kDtypeNames[problem.dtype] + (clip > 0.0 ? " clipped" : ""));
  }
}

}  // namespace

int main() {
  Random random(20250731);
  const std::vector<std::string> isas = vector_isas();
  for (int i = 0; i < 3000; ++i) {
    check_step(random, isas);
  }
  return 0;
}
