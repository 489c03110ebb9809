// Runs the step of all tensors of a call: norms where updates are limited, and the split among threads.
#pragma once

#include "optim-inl.h"
#include "scratch-inl.h"

namespace bnb_cpu {
namespace BNB_ISA {

// --- norms -------------------------------------------------------------------------------------------

// Sum of squares of up to kUnit values, the same bits whatever the width of vectors.
inline double sum_of_squares(const float* values, int count) {
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

// `count` values of `dtype` from element `start` on, as floats.
inline void widen(const void* values, int dtype, int64_t start, int count, float* out) {
  with_dtype(dtype, [&](auto type) {
    const auto* from = static_cast<const typename decltype(type)::type*>(values) + start;
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      store(out + i, load(from + i));
    }
    for (; i < count; ++i) {
      out[i] = bnb::to_float(from[i]);
    }
  });
}

// Directions of elements. Nothing else is written.
template <bnb::Rule kRule, class V>
BNB_FN void measure_one(const float* g, const float* p, const float* const* values, int at,
                        const bnb::RuleConstants<V>& constants, bool skip_zeros, float* directions) {
  constexpr int kValues = bnb::first_values(kRule) + bnb::second_values(kRule);
  V gradient, before, zero, states[kValues];
  fetch(g + at, gradient);
  fetch(p + at, before);
  spread(0.0f, zero);
  for (int s = 0; s < kValues; ++s) {
    fetch(values[s] + at, states[s]);
  }
  const V u = bnb::direction<kRule>(gradient, before, states, constants);
  deposit(directions + at, skip_zeros ? where_nonzero(gradient, u, zero) : u);
}

// Squared norms of direction and parameter, a pair per unit.
using Measure = void (*)(const Tensor& t, int64_t begin, int64_t end, double* sums);

template <bnb::Rule kRule>
void measure(const Tensor& t, int64_t begin, int64_t end, double* sums) {
  constexpr int kValues = bnb::first_values(kRule) + bnb::second_values(kRule);
  const auto vectors = constants_of<F32>(t.constants);
  alignas(64) float g[kUnit], p[kUnit], decoded[kValues][kUnit], directions[kUnit];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t start = unit * kUnit, left = t.count - start;
    const int size = static_cast<int>(left < kUnit ? left : kUnit);
    widen(t.g, t.dtype, start, size, g);
    widen(t.p, t.dtype, start, size, p);
    const float* values[kValues];
    for (int s = 0; s < kValues; ++s) {
      if (t.codebooks[s]) {
        t.codebooks[s]->decode(static_cast<const uint8_t*>(t.states[s]) + start, t.absmax[s][unit], size, decoded[s]);
        values[s] = decoded[s];
      } else {
        values[s] = static_cast<const float*>(t.states[s]) + start;
      }
    }
    int i = 0;
    for (; i + kLanes <= size; i += kLanes) {
      measure_one<kRule>(g, p, values, i, vectors, t.skip_zeros, directions);
    }
    for (; i < size; ++i) {
      measure_one<kRule>(g, p, values, i, t.constants, t.skip_zeros, directions);
    }
    *sums++ = sum_of_squares(directions, size);
    *sums++ = sum_of_squares(p, size);
  }
}

// --- all tensors -------------------------------------------------------------------------------------

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

// Factors that limit the norms of the updates.
inline void find_clips(const OptimizerCall& call, const int64_t* bounds, double* sums, double* clips) {
  const Measure of_rule = with_formula(call.rule, [](auto tag) -> Measure { return measure<decltype(tag)::rule>; });
  over_tensors(bounds, call.tensors, call.threads, [&](int64_t index, int64_t begin, int64_t end, int64_t first) {
    of_rule(Tensor(call, index, 1.0), begin, end, sums + 2 * (first + begin));
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

// One step of all tensors of a call.
inline void run_step(const OptimizerCall& call, Move move) {
  const bool clipped = call.max_unorm > 0.0;
  int64_t total = 0;
  for (int64_t i = 0; i < call.tensors; ++i) {
    total += call.units(i);
  }
  const int64_t sums_count = clipped ? 2 * total : 0;
  Scratch scratch(Scratch::bytes_for<int64_t>(call.tensors + 1) + Scratch::bytes_for<double>(call.tensors) +
                  Scratch::bytes_for<double>(sums_count));
  int64_t* const bounds = scratch.take<int64_t>(call.tensors + 1);
  double* const clips = scratch.take<double>(call.tensors);
  double* const sums = scratch.take<double>(sums_count);
  bounds[0] = 0;
  for (int64_t i = 0; i < call.tensors; ++i) {
    bounds[i + 1] = bounds[i] + call.units(i);
    clips[i] = 1.0;
  }
  if (clipped) {
    find_clips(call, bounds, sums, clips);
  }
  over_tensors(bounds, call.tensors, call.threads, [&](int64_t index, int64_t begin, int64_t end, int64_t) {
    move(Tensor(call, index, clips[index]), begin, end);
  });
}

}  // namespace BNB_ISA
}  // namespace bnb_cpu
