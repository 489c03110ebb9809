// Optimizer steps with float32 states.
#pragma once

#include "optim_run-inl.h"
#include "table.h"

namespace bnb_cpu {
namespace BNB_ISA {

template <bnb::Rule kRule, class V, class T>
BNB_FN void move_one_32bit(const Span<T>& span, float* const* values, int at, const bnb::RuleConstants<V>& constants,
                           bool skip_zeros, const int32_t* noise) {
  constexpr int kValues = bnb::first_values(kRule) + bnb::second_values(kRule);
  V states[kValues];
  for (int s = 0; s < kValues; ++s) {
    fetch(values[s] + at, states[s]);
  }
  step_element<kRule>(span.g, span.p, states, constants, skip_zeros, noise, at);
  for (int s = 0; s < kValues; ++s) {
    deposit(values[s] + at, states[s]);
  }
}

template <bnb::Rule kRule, class T>
void move_32bit(const Tensor& t, int64_t begin, int64_t end) {
  constexpr int kValues = bnb::first_values(kRule) + bnb::second_values(kRule);
  const auto vectors = constants_of<F32>(t.constants);
  Noise<T> noise(t);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Span<T> span(t, unit);
    float* values[kValues];
    for (int s = 0; s < kValues; ++s) {
      values[s] = static_cast<float*>(t.states[s]) + span.start;
    }
    const int32_t* bits = noise.of(span.start);
    int i = 0;
    for (; i + kLanes <= span.size; i += kLanes) {
      move_one_32bit<kRule>(span, values, i, vectors, t.skip_zeros, bits);
    }
    for (; i < span.size; ++i) {
      move_one_32bit<kRule>(span, values, i, t.constants, t.skip_zeros, bits);
    }
  }
}

void optimizer_step_32bit(int rule, int64_t tensors, const int64_t* table, int dtype, const int64_t* steps,
                          const double* schedule, const int64_t* seeds, double lr, double beta1, double beta2,
                          double beta3, double alpha, double eps, double weight_decay, double gnorm_scale,
                          double max_unorm, const double* param_norms, float* update_norms, bool skip_zeros,
                          int threads) {
  Move move = nullptr;
  with_formula(rule, [&](auto tag) {
    with_dtype(dtype, [&](auto type) { move = move_32bit<decltype(tag)::rule, typename decltype(type)::type>; });
  });
  const OptimizerCall call{rule,        tensors,   table,       dtype,        nullptr,    nullptr, steps, schedule,
                           seeds,       lr,        beta1,       beta2,        beta3,      alpha,   eps,   weight_decay,
                           gnorm_scale, max_unorm, param_norms, update_norms, skip_zeros, threads};
  run_step(call, move);
}

constexpr void fill_optim32(Kernels& kernels) { kernels.optimizer_step_32bit = optimizer_step_32bit; }

}  // namespace BNB_ISA
}  // namespace bnb_cpu
