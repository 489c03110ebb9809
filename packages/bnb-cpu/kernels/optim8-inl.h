// Optimizer steps with 8-bit states: a block is decoded, moved and encoded again while it is in the
// first-level cache.
#pragma once

#include "optim_run-inl.h"
#include "table.h"

namespace bnb_cpu {
namespace BNB_ISA {

// Absmax of up to kUnit values. A value that is not finite becomes zero: it would spoil the statistics of the
// whole block for all later steps.
inline float tame_absmax(float* values, int count) {
  uint32_t most = absmax_bits<false>(values, count);
  if (most >= 0x7f800000u) {
    for (int i = 0; i < count; ++i) {
      values[i] = bnb::magnitude_bits(values[i]) < 0x7f800000u ? values[i] : 0.0f;
    }
    most = absmax_bits<false>(values, count);
  }
  return bnb::float_of(most);
}

template <class T>
bool has_gradient(const Span<T>& span) {
  for (int i = 0; i < span.size; ++i) {
    if (bnb::to_float(span.g[i]) != 0.0f) {
      return true;
    }
  }
  return false;
}

template <bnb::Rule kRule, class V, class T>
BNB_FN void move_one_8bit(const Span<T>& span, float (*values)[kUnit], int at, const bnb::RuleConstants<V>& constants,
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
void move_8bit(const Tensor& t, int64_t begin, int64_t end) {
  constexpr int kValues = bnb::first_values(kRule) + bnb::second_values(kRule);
  const auto vectors = constants_of<F32>(t.constants);
  alignas(64) float values[kValues][kUnit];
  Noise<T> noise(t);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Span<T> span(t, unit);
    if (t.skip_zeros && !has_gradient(span)) {
      continue;  // Encoding again what has not changed would wear it down.
    }
    uint8_t* codes[kValues];
    for (int s = 0; s < kValues; ++s) {
      codes[s] = static_cast<uint8_t*>(t.states[s]) + span.start;
      t.codebooks[s]->decode(codes[s], t.absmax[s][unit], span.size, values[s]);
    }
    const int32_t* bits = noise.of(span.start);
    int i = 0;
    for (; i + kLanes <= span.size; i += kLanes) {
      move_one_8bit<kRule>(span, values, i, vectors, t.skip_zeros, bits);
    }
    for (; i < span.size; ++i) {
      move_one_8bit<kRule>(span, values, i, t.constants, t.skip_zeros, bits);
    }
    for (int s = 0; s < kValues; ++s) {
      const float most = tame_absmax(values[s], span.size);
      t.absmax[s][unit] = most;
      t.codebooks[s]->encode(values[s], most, span.size, codes[s]);
    }
  }
}

void optimizer_step_8bit(int rule, int64_t tensors, const int64_t* table, int dtype, const float* qmap1,
                         const float* qmap2, const int64_t* steps, const double* schedule, const int64_t* seeds,
                         double lr, double beta1, double beta2, double beta3, double alpha, double eps,
                         double weight_decay, double gnorm_scale, double max_unorm, bool skip_zeros, int threads) {
  const bool two = bnb::second_values(static_cast<bnb::Rule>(rule)) > 0;
  Scratch scratch(2 * Scratch::bytes_for<Codebook>(1));
  Codebook *const first = scratch.take<Codebook>(1), *const second = scratch.take<Codebook>(1);
  first->prepare(qmap1);
  if (two) {
    second->prepare(qmap2);
  }
  Move move = nullptr;
  with_formula(rule, [&](auto tag) {
    with_dtype(dtype, [&](auto type) { move = move_8bit<decltype(tag)::rule, typename decltype(type)::type>; });
  });
  const OptimizerCall call{rule,        tensors,   table,   dtype,   first,      second, steps, schedule,
                           seeds,       lr,        beta1,   beta2,   beta3,      alpha,  eps,   weight_decay,
                           gnorm_scale, max_unorm, nullptr, nullptr, skip_zeros, threads};
  run_step(call, move);
}

constexpr void fill_optim8(Kernels& kernels) { kernels.optimizer_step_8bit = optimizer_step_8bit; }

}  // namespace BNB_ISA
}  // namespace bnb_cpu
