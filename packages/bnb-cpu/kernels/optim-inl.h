// What the optimizer kernels share: the arguments of a call, one element's step, and the choice of a function
// by rule and dtype. Norms and the split among threads: optim_run-inl.h.
#pragma once

#include <bnb/rules.h>

#include "codebook-inl.h"
#include "simd-inl.h"

namespace bnb_cpu {
namespace BNB_ISA {

// Elements that are worked on together; in 8 bit, those that share an absmax.
constexpr int kUnit = 256;
static_assert(kUnit == Codebook::kBlock);

// The arguments of a call that both kernels have; see table.h. The codebooks are null for float32 states.
struct OptimizerCall {
  int rule;
  int64_t tensors;
  const int64_t* table;
  int dtype;
  const Codebook* first;
  const Codebook* second;
  const int64_t* steps;
  const double* schedule;
  const int64_t* seeds;
  double lr, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale, max_unorm;
  const double* param_norms;
  float* update_norms;
  bool skip_zeros;
  int threads;

  int64_t count(int64_t tensor) const { return table[tensor]; }
  int64_t units(int64_t tensor) const { return ceil_divide(count(tensor), kUnit); }

  template <class T>
  T* pointer(int column, int64_t tensor) const {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(table[column * tensors + tensor]));
  }
};

// One tensor of a call.
struct Tensor {
  int dtype;
  int64_t count;
  const void* g;
  void* p;
  // Values of the first state, then of the second, each `count` long: floats, or codes with their codebook and
  // statistics.
  void* states[bnb::kMostValues];
  const Codebook* codebooks[bnb::kMostValues];
  float* absmax[bnb::kMostValues];
  bnb::RuleConstants<float> constants;
  bool skip_zeros, stochastic;
  uint32_t seed, step;

  // Tensor `index` of a call; `clip` is the factor on its update.
  Tensor(const OptimizerCall& call, int64_t index, double clip)
      : dtype(call.dtype),
        count(call.count(index)),
        g(call.pointer<void>(1, index)),
        p(call.pointer<void>(2, index)),
        skip_zeros(call.skip_zeros),
        stochastic(call.seeds != nullptr),
        seed(stochastic ? static_cast<uint32_t>(call.seeds[index]) : 0) {
    const bnb::Rule rule = static_cast<bnb::Rule>(call.rule);
    const bool eight = call.first != nullptr;
    const int first = bnb::first_values(rule), values = first + bnb::second_values(rule);
    for (int i = 0; i < values; ++i) {
      const int column = i < first ? 3 : eight ? 5 : 4;
      const int64_t part = i < first ? i : i - first;
      states[i] = call.pointer<char>(column, index) + part * count * static_cast<int64_t>(eight ? 1 : sizeof(float));
      codebooks[i] = i < first ? call.first : call.second;
      absmax[i] = eight ? call.pointer<float>(column + 1, index) + part * call.units(index) : nullptr;
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
    constants = bnb::rule_constants(rule, settings, clip);
    step = static_cast<uint32_t>(static_cast<int64_t>(settings.step));
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
  return bnb::spread_constants<V>(from, [](float value) {
    V wide;
    spread(value, wide);
    return wide;
  });
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

// Moves the parameter at `at` and its states. `noise` is null where it is rounded to nearest.
template <bnb::Rule kRule, class V, class T>
BNB_FN void step_element(const T* g, T* p, V* states, const bnb::RuleConstants<V>& constants, bool skip_zeros,
                         const int32_t* noise, int at) {
  constexpr int kValues = bnb::first_values(kRule) + bnb::second_values(kRule);
  V gradient, before, old[kValues];
  fetch(g + at, gradient);
  fetch(p + at, before);
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
    after = randomized(after, noise + at);
  }
  deposit(p + at, after);
}

// The elements of a unit.
template <class T>
struct Span {
  int64_t start;
  int size;
  const T* g;
  T* p;

  Span(const Tensor& t, int64_t unit)
      : start(unit * kUnit),
        size(static_cast<int>(t.count - start < kUnit ? t.count - start : kUnit)),
        g(static_cast<const T*>(t.g) + start),
        p(static_cast<T*>(t.p) + start) {}
};

// Random bits for a unit; none for types that are always rounded to nearest.
template <class T>
struct Noise {
  explicit Noise(const Tensor&) {}
  const int32_t* of(int64_t) { return nullptr; }
};
template <>
struct Noise<bnb::BFloat16> {
  explicit Noise(const Tensor& t) : tensor(t) {}

  const int32_t* of(int64_t start) {
    if (!tensor.stochastic) {
      return nullptr;
    }
    const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(start) >> 32), low = static_cast<uint32_t>(start);
    const uint32_t key = bnb::rounding_key(tensor.seed, tensor.step, high);
    for (int i = 0; i < kUnit; ++i) {
      bits[i] = static_cast<int32_t>(bnb::rounding_noise(key, low + static_cast<uint32_t>(i)));
    }
    return bits;
  }

  const Tensor& tensor;
  alignas(64) int32_t bits[kUnit];
};

// --- rules and dtypes --------------------------------------------------------------------------------

// A step of units `begin` to `end` of a tensor.
using Move = void (*)(const Tensor& t, int64_t begin, int64_t end);

template <bnb::Rule kRule>
struct RuleTag {
  static constexpr bnb::Rule rule = kRule;
};

// Calls body(RuleTag) for the formula of a rule.
template <class Body>
auto with_formula(int rule, const Body& body) {
  switch (bnb::formula_of(static_cast<bnb::Rule>(rule))) {
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
    case bnb::Rule::kScheduleFree:
      return body(RuleTag<bnb::Rule::kScheduleFree>{});
    default:
      return body(RuleTag<bnb::Rule::kAdagrad>{});
  }
}

}  // namespace BNB_ISA
}  // namespace bnb_cpu
