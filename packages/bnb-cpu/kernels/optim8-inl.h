// Optimizer steps with 8-bit states: a block is decoded, moved and encoded again while it is in the
// first-level cache.
#pragma once

#include "optim-inl.h"
#include "optim_codes-inl.h"

namespace bnb_cpu {
namespace BNB_ISA {

// Absmax of up to kUnit values. A value that is not finite becomes zero: it would spoil the statistics of the
// whole block for all later steps.
BNB_FN float tame_absmax(float* values, int count) {
  uint32_t most = absmax_bits<false>(values, count);
  if (most >= 0x7f800000u) {
    for (int i = 0; i < count; ++i) {
      values[i] = bnb::magnitude_bits(values[i]) < 0x7f800000u ? values[i] : 0.0f;
    }
    most = absmax_bits<false>(values, count);
  }
  return bnb::float_of(most);
}

template <bnb::Rule kRule, class T>
struct Kernel8 {
  static constexpr int kValues = bnb::first_values(kRule) + bnb::second_values(kRule);

  const Codebook* first;
  const Codebook* second;

  const Codebook& codebook(int value) const { return value < bnb::first_values(kRule) ? *first : *second; }

  void decode(const Tensor& t, int64_t unit, int size, float (*values)[kUnit]) const {
    for (int s = 0; s < kValues; ++s) {
      codebook(s).decode(static_cast<const uint8_t*>(t.states[s]) + unit * kUnit, t.absmax[s][unit], size, values[s]);
    }
  }

  template <class V>
  BNB_FN void move_element(const Tensor& t, int64_t start, int at, const bnb::RuleConstants<V>& constants,
                           const int32_t* noise, float (*values)[kUnit]) {
    V states[kValues];
    for (int s = 0; s < kValues; ++s) {
      fetch(values[s] + at, states[s]);
    }
    step_element<kRule>(static_cast<const T*>(t.g) + start + at, static_cast<T*>(t.p) + start + at, states, constants,
                        t.skip_zeros, noise);
    for (int s = 0; s < kValues; ++s) {
      deposit(values[s] + at, states[s]);
    }
  }

  // Writes the statistics and the codes of moved values.
  void store_states(const Tensor& t, int64_t unit, int size, float (*values)[kUnit]) const {
    for (int s = 0; s < kValues; ++s) {
      const float most = tame_absmax(values[s], size);
      t.absmax[s][unit] = most;
      codebook(s).encode(values[s], most, size, static_cast<uint8_t*>(t.states[s]) + unit * kUnit);
    }
  }

  void move(const Tensor& t, int64_t begin, int64_t end) const {
    const auto vectors = constants_of<F32>(t.constants);
    alignas(64) float values[kValues][kUnit];
    alignas(64) int32_t bits[kUnit];
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t start = unit * kUnit, left = t.count - start;
      const int size = static_cast<int>(left < kUnit ? left : kUnit);
      const int32_t* noise = t.stochastic ? bits : nullptr;
      if (noise) {
        fill_noise(t, start, bits);
      }
      decode(t, unit, size, values);
      int i = 0;
      for (; i + kLanes <= size; i += kLanes) {
        move_element(t, start, i, vectors, noise ? noise + i : nullptr, values);
      }
      for (; i < size; ++i) {
        move_element(t, start, i, t.constants, noise ? noise + i : nullptr, values);
      }
      store_states(t, unit, size, values);
    }
  }

  template <class V>
  BNB_FN void measure_one(const Tensor& t, int64_t start, int at, const bnb::RuleConstants<V>& constants,
                          const float (*values)[kUnit], float* directions, float* parameters) {
    V states[kValues];
    for (int s = 0; s < kValues; ++s) {
      fetch(values[s] + at, states[s]);
    }
    measure_element<kRule>(static_cast<const T*>(t.g) + start + at, static_cast<const T*>(t.p) + start + at, states,
                           constants, t.skip_zeros, directions + at, parameters + at);
  }

  void measure(const Tensor& t, int64_t begin, int64_t end, double* sums) const {
    const auto vectors = constants_of<F32>(t.constants);
    alignas(64) float values[kValues][kUnit], directions[kUnit], parameters[kUnit];
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t start = unit * kUnit, left = t.count - start;
      const int size = static_cast<int>(left < kUnit ? left : kUnit);
      decode(t, unit, size, values);
      int i = 0;
      for (; i + kLanes <= size; i += kLanes) {
        measure_one(t, start, i, vectors, values, directions, parameters);
      }
      for (; i < size; ++i) {
        measure_one(t, start, i, t.constants, values, directions, parameters);
      }
      *sums++ = sum_of_squares(directions, size);
      *sums++ = sum_of_squares(parameters, size);
    }
  }
};

void optimizer_step_8bit(int rule, int64_t tensors, const int64_t* table, int dtype, const float* qmap1,
                         const float* qmap2, const int64_t* steps, const double* schedule, const int64_t* seeds,
                         double lr, double beta1, double beta2, double beta3, double alpha, double eps,
                         double weight_decay, double gnorm_scale, double max_unorm, bool skip_zeros, int threads) {
  const OptimizerCall call{rule, tensors, table, steps,        schedule,    seeds,     lr,      beta1,
                           beta2, beta3,  alpha, eps,          weight_decay, gnorm_scale, max_unorm, nullptr,
                           nullptr, skip_zeros, threads};
  const bool two = bnb::second_values(static_cast<bnb::Rule>(rule)) > 0;
  Scratch scratch(Scratch::bytes_for<Codebook>(1) + Scratch::bytes_for<Codebook>(two));
  Codebook* const first = scratch.take<Codebook>(1);
  Codebook* const second = scratch.take<Codebook>(two);
  first->prepare(qmap1);
  if (two) {
    second->prepare(qmap2);
  }
  with_formula(static_cast<bnb::Rule>(rule), [&](auto tag) {
    with_dtype(dtype, [&](auto type) {
      run_step(Step{call, true}, Kernel8<decltype(tag)::rule, typename decltype(type)::type>{first, second});
    });
  });
}

constexpr void fill_optim8(Kernels& kernels) { kernels.optimizer_step_8bit = optimizer_step_8bit; }

}  // namespace BNB_ISA
}  // namespace bnb_cpu
