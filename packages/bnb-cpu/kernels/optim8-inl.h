// Optimizer steps with 8-bit states: a block is decoded, moved and encoded again while it is in the
// first-level cache.
#pragma once

#include "optim_run-inl.h"
#include "table.h"

namespace bnb_cpu {
namespace BNB_ISA {

// Absmax of up to kUnit values; `most`: as absmax_bits. A value that is not finite becomes zero: it would spoil the
// statistics of the whole block for all later steps.
inline float tame(float* values, int count, uint32_t most) {
  if (most >= 0x7f800000u) {
    for (int i = 0; i < count; ++i) {
      values[i] = bnb::magnitude_bits(values[i]) < 0x7f800000u ? values[i] : 0.0f;
    }
    most = absmax_bits<false>(values, count);
  }
  return bnb::float_of(most);
}

// Largest magnitudes, as bits.
BNB_FN void raise(uint32_t& most, float value) {
  const uint32_t bits = bnb::magnitude_bits(value);
  most = bits > most ? bits : most;
}
BNB_FN void raise(I32& most, F32 value) { most = max(most, bits_of(value) & splat(0x7fffffff)); }

template <class T>
bool has_gradient(const Span<T>& span) {
  for (int i = 0; i < span.size; ++i) {
    if (bnb::to_float(span.g[i]) != 0.0f) {
      return true;
    }
  }
  return false;
}

// A codebook that decodes vectors does so on the way into the rule, so that the loads of one vector's look-ups run
// beside the root and the quotient of another; then the largest magnitude is found on the way out as well.
template <bnb::Rule kRule, class V, class Bits, class T, int kValues>
BNB_FN void move_one_8bit(const Span<T>& span, const Codebook* const (&codebooks)[kValues],
                          uint8_t* const (&codes)[kValues], const V (&absmax)[kValues], float (&values)[kValues][kUnit],
                          int at, const bnb::RuleConstants<V>& constants, bool skip_zeros, const int32_t* noise,
                          Bits (&most)[kValues]) {
  V states[kValues];
  for (int s = 0; s < kValues; ++s) {
    if constexpr (Codebook::kDecodesVectors) {
      states[s] = codebooks[s]->decode_some(codes[s] + at, absmax[s]);
    } else {
      fetch(values[s] + at, states[s]);
    }
  }
  step_element<kRule>(span.g, span.p, states, constants, skip_zeros, noise, at);
  for (int s = 0; s < kValues; ++s) {
    deposit(values[s] + at, states[s]);
    if constexpr (Codebook::kDecodesVectors) {
      raise(most[s], states[s]);
    }
  }
}

// Asks for the unit after the next one. While a unit is encoded nothing of the others is read, and memory would wait.
template <int kValues, class T>
BNB_FN void prefetch_unit(const Span<T>& span, uint8_t* const (&codes)[kValues]) {
  constexpr int kLine = 64, kAhead = 2 * kUnit;
  for (int i = 0; i < kUnit; i += kLine / static_cast<int>(sizeof(T))) {
    prefetch(span.g, (kAhead + i) * static_cast<int>(sizeof(T)));
    prefetch(span.p, (kAhead + i) * static_cast<int>(sizeof(T)));
  }
  for (int s = 0; s < kValues; ++s) {
    for (int i = 0; i < kUnit; i += kLine) {
      prefetch(codes[s], kAhead + i);
    }
  }
}

template <bnb::Rule kRule, class T>
void move_8bit(const Tensor& t, int64_t begin, int64_t end) {
  constexpr int kValues = bnb::first_values(kRule) + bnb::second_values(kRule);
  const auto vectors = constants_of<F32>(t.constants);
  const Codebook* codebooks[kValues];
  for (int s = 0; s < kValues; ++s) {
    codebooks[s] = t.codebooks[s];
  }
  const bool skip_zeros = t.skip_zeros;
  alignas(64) float values[kValues][kUnit];
  Noise<T> noise(t);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Span<T> span(t, unit);
    if (skip_zeros && !has_gradient(span)) {
      continue;  // Encoding again what has not changed would wear it down.
    }
    uint8_t* codes[kValues];
    float absmax[kValues];
    F32 wide_absmax[kValues];
    I32 most[kValues];
    uint32_t most_of_rest[kValues] = {};
    for (int s = 0; s < kValues; ++s) {
      codes[s] = static_cast<uint8_t*>(t.states[s]) + span.start;
      absmax[s] = t.absmax[s][unit];
      wide_absmax[s] = splat(absmax[s]);
      most[s] = splat(0);
      if constexpr (!Codebook::kDecodesVectors) {
        codebooks[s]->decode(codes[s], absmax[s], span.size, values[s]);
      }
    }
    const int32_t* bits = noise.of(span.start);
    int i = 0;
    for (; i + kLanes <= span.size; i += kLanes) {
      move_one_8bit<kRule>(span, codebooks, codes, wide_absmax, values, i, vectors, skip_zeros, bits, most);
    }
    for (; i < span.size; ++i) {
      move_one_8bit<kRule>(span, codebooks, codes, absmax, values, i, t.constants, skip_zeros, bits, most_of_rest);
    }
    if constexpr (Codebook::kDecodesVectors) {
      prefetch_unit(span, codes);
    }
    for (int s = 0; s < kValues; ++s) {
      uint32_t largest;
      if constexpr (Codebook::kDecodesVectors) {
        largest = static_cast<uint32_t>(reduce_max(most[s]));
        largest = most_of_rest[s] > largest ? most_of_rest[s] : largest;
      } else {
        largest = absmax_bits<false>(values[s], span.size);
      }
      const float tamed = tame(values[s], span.size, largest);
      t.absmax[s][unit] = tamed;
      codebooks[s]->encode(values[s], tamed, span.size, codes[s]);
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
