// What the optimizer kernels share: the arguments of a call, one element's step, and the split of all
// tensors among threads. 32-bit states: optim32-inl.h, 8-bit states: optim8-inl.h.
#pragma once

#include <bnb/rules.h>

#include "scratch-inl.h"
#include "simd-inl.h"
#include "table.h"

namespace bnb_cpu {
namespace BNB_ISA {

// Elements that are worked on together; in 8 bit, those that share an absmax.
constexpr int kUnit = 256;

// Arguments that both kernels have; see table.h.
struct OptimizerCall {
  int rule;
  int64_t tensors;
  const int64_t* table;
  const int64_t* steps;
  const double* schedule;
  const int64_t* seeds;
  double lr, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale, max_unorm;
  const double* param_norms;
  float* update_norms;
  bool skip_zeros;
  int threads;
};

// One tensor of a call.
struct Tensor {
  int64_t count;
  const void* g;
  void* p;
  // Values of the first state, then of the second, each `count` long.
  void* states[bnb::kMostValues];
  float* absmax[bnb::kMostValues];
  bnb::RuleConstants<float> constants;
  bool skip_zeros, stochastic;
  uint32_t seed, step;
};

// A call with its columns of addresses.
struct Step {
  const OptimizerCall& call;
  bool eight;

  int64_t cell(int column, int64_t tensor) const { return call.table[column * call.tensors + tensor]; }

  template <class T>
  T* pointer(int column, int64_t tensor) const {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(cell(column, tensor)));
  }

  bnb::Rule rule() const { return static_cast<bnb::Rule>(call.rule); }

  int64_t count(int64_t tensor) const { return cell(0, tensor); }

  int64_t units(int64_t tensor) const { return ceil_divide(count(tensor), kUnit); }

  // The tensor with its hyperparameters; `clip` is the factor on its update.
  Tensor tensor(int64_t index, double clip) const {
    const int first = bnb::first_values(rule()), second = bnb::second_values(rule());
    const int64_t values = count(index), value_bytes = eight ? 1 : sizeof(float);
    Tensor t{};
    t.count = values;
    t.g = pointer<void>(1, index);
    t.p = pointer<void>(2, index);
    const int second_column = eight ? 5 : 4;
    for (int i = 0; i < first + second; ++i) {
      const int column = i < first ? 3 : second_column;
      const int64_t part = i < first ? i : i - first;
      t.states[i] = pointer<char>(column, index) + part * values * value_bytes;
      t.absmax[i] = eight ? pointer<float>(column + 1, index) + part * units(index) : nullptr;
    }
    bnb::RuleSettings settings{call.lr,  call.beta1,        call.beta2,       call.beta3, call.alpha,
                               call.eps, call.weight_decay, call.gnorm_scale, 0.0};
    if (call.schedule) {
      const double* row = call.schedule + 4 * index;
      settings.lr = row[0];
      settings.step = row[1];
      settings.beta3 = row[2];
      settings.alpha = row[3];
    } else {
      settings.step = static_cast<double>(call.steps[index]);
    }
    t.constants = bnb::rule_constants(rule(), settings, clip);
    t.skip_zeros = call.skip_zeros;
    t.stochastic = call.seeds != nullptr;
    t.seed = t.stochastic ? static_cast<uint32_t>(call.seeds[index]) : 0;
    t.step = static_cast<uint32_t>(static_cast<int64_t>(settings.step));
    return t;
  }
};

// --- one element, or one vector of them --------------------------------------------------------------

BNB_FN F32 sign(F32 a) {
  const F32 zero = splat(0.0f);
  return select(zero < a, splat(1.0f), select(a < zero, splat(-1.0f), zero));
}

BNB_FN void spread(float from, float& to) { to = from; }
BNB_FN void spread(float from, F32& to) { to = splat(from); }

template <class V>
BNB_FN bnb::RuleConstants<V> constants_of(const bnb::RuleConstants<float>& from) {
  bnb::RuleConstants<V> to;
  spread(from.beta1, to.beta1);
  spread(from.beta2, to.beta2);
  spread(from.beta3, to.beta3);
  spread(from.rest1, to.rest1);
  spread(from.rest2, to.rest2);
  spread(from.rest3, to.rest3);
  spread(from.correction1, to.correction1);
  spread(from.correction2, to.correction2);
  spread(from.alpha, to.alpha);
  spread(from.eps, to.eps);
  spread(from.gnorm_scale, to.gnorm_scale);
  spread(from.weight_decay, to.weight_decay);
  spread(from.keep, to.keep);
  spread(from.rate, to.rate);
  to.first = from.first;
  to.coupled = from.coupled;
  return to;
}

template <class T>
BNB_FN void fetch(const T* from, float& to) {
  to = bnb::to_float(*from);
}
template <class T>
BNB_FN void fetch(const T* from, F32& to) {
  to = load(from);
}
template <class T>
BNB_FN void deposit(T* to, float value) {
  bnb::from_float(value, *to);
}
template <class T>
BNB_FN void deposit(T* to, F32 value) {
  store(to, value);
}

// `active` where the gradient is not exactly zero, `otherwise` where it is.
BNB_FN float where_nonzero(float g, float active, float otherwise) { return g == 0.0f ? otherwise : active; }
BNB_FN F32 where_nonzero(F32 g, F32 active, F32 otherwise) {
  // On the bits, so that NaN counts as active.
  return select((bits_of(g) & splat(0x7fffffff)) > splat(0), active, otherwise);
}

// Add random bits below the last bit of bfloat16 and cut off; infinity and NaN stay.
BNB_FN float randomized(float value, const int32_t* noise) {
  const uint32_t bits = bnb::bits_of(value);
  const bool finite = (bits & 0x7fffffffu) < 0x7f800000u;
  return finite ? bnb::float_of((bits + static_cast<uint32_t>(*noise)) & 0xffff0000u) : value;
}
BNB_FN F32 randomized(F32 value, const int32_t* noise) {
  const I32 bits = bits_of(value), cut = splat(static_cast<int32_t>(0xffff0000u));
  const I32 rounded = (bits + load(noise)) & cut;
  return float_of(select(splat(0x7f800000) > (bits & splat(0x7fffffff)), rounded, bits));
}

// Moves one parameter and its states. `noise` is null where the parameter is rounded to nearest.
template <bnb::Rule kRule, class V, class T>
BNB_FN void step_element(const T* g, T* p, V* states, const bnb::RuleConstants<V>& constants, bool skip_zeros,
                         const int32_t* noise) {
  constexpr int kValues = bnb::first_values(kRule) + bnb::second_values(kRule);
  V gradient, before, old[kValues];
  fetch(g, gradient);
  fetch(p, before);
  for (int i = 0; i < kValues; ++i) {
    old[i] = states[i];
  }
  const V u = bnb::direction<kRule>(gradient, before, states, constants);
  V after = bnb::moved(before, u, constants);
  if (skip_zeros) {
    after = where_nonzero(gradient, after, before);
    for (int i = 0; i < kValues; ++i) {
      states[i] = where_nonzero(gradient, states[i], old[i]);
    }
  }
  if (noise) {
    after = randomized(after, noise);
  }
  deposit(p, after);
}

// Random bits of a unit that begins at element `begin`.
BNB_FN void fill_noise(const Tensor& t, int64_t begin, int32_t* noise) {
  const uint32_t key = bnb::rounding_key(t.seed, t.step, static_cast<uint32_t>(static_cast<uint64_t>(begin) >> 32));
  const uint32_t low = static_cast<uint32_t>(begin);
  for (int i = 0; i < kUnit; ++i) {
    noise[i] = static_cast<int32_t>(bnb::rounding_noise(key, low + static_cast<uint32_t>(i)));
  }
}

// --- norms -------------------------------------------------------------------------------------------

// Sum of squares of up to kUnit values, the same bits whatever the width of vectors.
BNB_FN double sum_of_squares(const float* values, int count) {
  constexpr int kSums = 16;
  double sums[kSums] = {};
  int i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (int j = 0; j < kSums; ++j) {
      sums[j] += static_cast<double>(values[i + j]) * static_cast<double>(values[i + j]);
    }
  }
  for (int j = 0; i + j < count; ++j) {
    sums[j] += static_cast<double>(values[i + j]) * static_cast<double>(values[i + j]);
  }
  for (int width = kSums / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) {
      sums[j] += sums[j + width];
    }
  }
  return sums[0];
}

// Direction and old value of one parameter, for their norms. Nothing else is written.
template <bnb::Rule kRule, class V, class T>
BNB_FN void measure_element(const T* g, const T* p, V* states, const bnb::RuleConstants<V>& constants,
                            bool skip_zeros, float* direction, float* parameter) {
  V gradient, before, zero;
  fetch(g, gradient);
  fetch(p, before);
  spread(0.0f, zero);
  const V u = bnb::direction<kRule>(gradient, before, states, constants);
  deposit(direction, skip_zeros ? where_nonzero(gradient, u, zero) : u);
  deposit(parameter, before);
}

// --- all tensors -------------------------------------------------------------------------------------

// Calls body(RuleTag) for the formula of a rule.
template <bnb::Rule kRule>
struct RuleTag {
  static constexpr bnb::Rule rule = kRule;
};

template <class Body>
void with_formula(bnb::Rule rule, const Body& body) {
  switch (bnb::formula_of(rule)) {
    case bnb::Rule::kAdam:
      return body(RuleTag<bnb::Rule::kAdam>{});
    case bnb::Rule::kAdemamix:
      return body(RuleTag<bnb::Rule::kAdemamix>{});
    case bnb::Rule::kLion:
      return body(RuleTag<bnb::Rule::kLion>{});
    case bnb::Rule::kMomentum:
      return body(RuleTag<bnb::Rule::kMomentum>{});
    case bnb::Rule::kSgd:
      return body(RuleTag<bnb::Rule::kSgd>{});
    case bnb::Rule::kRmsprop:
      return body(RuleTag<bnb::Rule::kRmsprop>{});
    default:
      return body(RuleTag<bnb::Rule::kAdagrad>{});
  }
}

// Calls body(index, begin, end, first) for the units of every tensor, split evenly among threads: units
// begin to end of tensor `index`, whose first unit is number `first` among all. `bounds` has that number
// for each tensor, and their total.
template <class Body>
void over_tensors(const int64_t* bounds, int64_t tensors, int threads, const Body& body) {
  parallel(threads, bounds[tensors], grain_of(kUnit), [&](int64_t begin, int64_t end) {
    // The last tensor that begins at or before `begin`.
    int64_t index = 0, above = tensors;
    while (above - index > 1) {
      const int64_t middle = index + (above - index) / 2;
      (bounds[middle] <= begin ? index : above) = middle;
    }
    for (; begin < end; ++index) {
      const int64_t stop = bounds[index + 1] < end ? bounds[index + 1] : end;
      if (begin < stop) {
        body(index, begin - bounds[index], stop - bounds[index], bounds[index]);
        begin = stop;
      }
    }
  });
}

// One step of all tensors of a call. `kernel` has, for a tensor and a range of its units,
//   move(tensor, begin, end)               the step
//   measure(tensor, begin, end, sums)      squared norms of direction and parameter, a pair per unit
template <class Kernel>
void run_step(const Step& step, const Kernel& kernel) {
  const OptimizerCall& call = step.call;
  const bool clipped = call.max_unorm > 0.0;
  int64_t total = 0;
  for (int64_t i = 0; i < call.tensors; ++i) {
    total += step.units(i);
  }
  const int64_t sums_count = clipped ? 2 * total : 0;
  Scratch scratch(Scratch::bytes_for<int64_t>(call.tensors + 1) + Scratch::bytes_for<double>(call.tensors) +
                  Scratch::bytes_for<double>(sums_count));
  int64_t* const bounds = scratch.take<int64_t>(call.tensors + 1);
  double* const clips = scratch.take<double>(call.tensors);
  double* const sums = scratch.take<double>(sums_count);
  bounds[0] = 0;
  for (int64_t i = 0; i < call.tensors; ++i) {
    bounds[i + 1] = bounds[i] + step.units(i);
    clips[i] = 1.0;
  }
  if (clipped) {
    over_tensors(bounds, call.tensors, call.threads, [&](int64_t index, int64_t begin, int64_t end, int64_t first) {
      kernel.measure(step.tensor(index, 1.0), begin, end, sums + 2 * (first + begin));
    });
    for (int64_t i = 0; i < call.tensors; ++i) {
      double direction = 0.0, parameter = 0.0;
      for (int64_t unit = bounds[i]; unit < bounds[i + 1]; ++unit) {
        direction += sums[2 * unit];
        parameter += sums[2 * unit + 1];
      }
      const double norm = ::sqrt(direction);
      clips[i] = bnb::clip_scale(norm, call.max_unorm * (call.param_norms ? call.param_norms[i] : ::sqrt(parameter)));
      if (call.update_norms) {
        call.update_norms[i] = static_cast<float>(norm);
      }
    }
  }
  over_tensors(bounds, call.tensors, call.threads, [&](int64_t index, int64_t begin, int64_t end, int64_t) {
    kernel.move(step.tensor(index, clips[index]), begin, end);
  });
}

}  // namespace BNB_ISA
}  // namespace bnb_cpu
