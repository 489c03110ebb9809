// Optimizer steps with float32 states.
#pragma once

#include "optim-inl.h"

namespace bnb_cpu {
namespace BNB_ISA {

template <bnb::Rule kRule, class T>
struct Kernel32 {
  static constexpr int kValues = bnb::first_values(kRule) + bnb::second_values(kRule);

  template <class V>
  BNB_FN void move_element(const Tensor& t, int64_t i, const bnb::RuleConstants<V>& constants, const int32_t* noise) {
    V states[kValues];
    for (int s = 0; s < kValues; ++s) {
      fetch(static_cast<const float*>(t.states[s]) + i, states[s]);
    }
    step_element<kRule>(static_cast<const T*>(t.g) + i, static_cast<T*>(t.p) + i, states, constants, t.skip_zeros,
                        noise);
    for (int s = 0; s < kValues; ++s) {
      deposit(static_cast<float*>(t.states[s]) + i, states[s]);
    }
  }

  void move(const Tensor& t, int64_t begin, int64_t end) const {
    const auto vectors = constants_of<F32>(t.constants);
    alignas(64) int32_t bits[kUnit];
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit * kUnit, left = t.count - first;
      const int size = static_cast<int>(left < kUnit ? left : kUnit);
      if (t.stochastic) {
        fill_noise(t, first, bits);
      }
      int i = 0;
      for (; i + kLanes <= size; i += kLanes) {
        move_element(t, first + i, vectors, t.stochastic ? bits + i : nullptr);
      }
      for (; i < size; ++i) {
        move_element(t, first + i, t.constants, t.stochastic ? bits + i : nullptr);
      }
    }
  }

  template <class V>
  BNB_FN void measure_one(const Tensor& t, int64_t i, const bnb::RuleConstants<V>& constants, float* direction,
                          float* parameter) {
    V states[kValues];
    for (int s = 0; s < kValues; ++s) {
      fetch(static_cast<const float*>(t.states[s]) + i, states[s]);
    }
    measure_element<kRule>(static_cast<const T*>(t.g) + i, static_cast<const T*>(t.p) + i, states, constants,
                           t.skip_zeros, direction, parameter);
  }

  void measure(const Tensor& t, int64_t begin, int64_t end, double* sums) const {
    const auto vectors = constants_of<F32>(t.constants);
    alignas(64) float directions[kUnit], parameters[kUnit];
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit * kUnit, left = t.count - first;
      const int size = static_cast<int>(left < kUnit ? left : kUnit);
      int i = 0;
      for (; i + kLanes <= size; i += kLanes) {
        measure_one(t, first + i, vectors, directions + i, parameters + i);
      }
      for (; i < size; ++i) {
        measure_one(t, first + i, t.constants, directions + i, parameters + i);
      }
      *sums++ = sum_of_squares(directions, size);
      *sums++ = sum_of_squares(parameters, size);
    }
  }
};

void optimizer_step_32bit(int rule, int64_t tensors, const int64_t* table, int dtype, const int64_t* steps,
                          const double* schedule, const int64_t* seeds, double lr, double beta1, double beta2,
                          double beta3, double alpha, double eps, double weight_decay, double gnorm_scale,
                          double max_unorm, const double* param_norms, float* update_norms, bool skip_zeros,
                          int threads) {
  const OptimizerCall call{rule, tensors, table, steps,        schedule,    seeds,     lr,          beta1,
                           beta2, beta3,  alpha, eps,          weight_decay, gnorm_scale, max_unorm, param_norms,
                           update_norms, skip_zeros, threads};
  with_formula(static_cast<bnb::Rule>(rule), [&](auto tag) {
    with_dtype(dtype, [&](auto type) {
      run_step(Step{call, false}, Kernel32<decltype(tag)::rule, typename decltype(type)::type>{});
    });
  });
}

constexpr void fill_optim32(Kernels& kernels) { kernels.optimizer_step_32bit = optimizer_step_32bit; }

}  // namespace BNB_ISA
}  // namespace bnb_cpu
