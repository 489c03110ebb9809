// One optimizer step of many parameters in a few launches.
//
// Work is cut into units of kUnitBlocks blocks of 256 elements; a group of 32 lanes takes a unit, finds
// its parameter by binary search in the table, and goes through the blocks, 8 elements per lane. No step
// waits for another one, so nothing synchronises inside of a thread block.
#pragma once

#include <bnb/rules.h>

#include "block.h"
#include "codes8.h"
#include "kernels.h"

namespace bnb_gpu {

constexpr int kStateBlock = 256;
constexpr int kUnitBlocks = 8;
constexpr int kOptimizerThreads = 256;
constexpr int kOwn = kStateBlock / kLanes;

// What a parameter needs besides its table row.
struct StepConstants {
  bnb::RuleConstants<float> rule;
  uint32_t step;
};

struct StepArguments {
  const int64_t* table;
  int64_t tensors, units;
  StepConstants constants;         // of all parameters,
  const StepConstants* by_tensor;  // unless this is given
  bool skip_zeros;
  const float *code1, *code2;
  double* partial;  // norms by unit, for the pass that computes them
};

enum Column { kParameter, kGradient, kState1, kState2, kAbsmax1, kAbsmax2, kElements, kFirstUnit, kSeed };

// One parameter, as its row of the table says.
template <class T>
struct Row {
  T* p;
  const T* g;
  void* state[2];
  float* absmax[2];
  int64_t count, first_unit;
  int64_t seed;
  bool aligned;

  __device__ Row(const StepArguments& a, int64_t index, int state_bytes, bool two_slots) {
    const auto column = [&](Column c) { return __ldg(a.table + c * a.tensors + index); };
    p = reinterpret_cast<T*>(column(kParameter));
    g = reinterpret_cast<const T*>(column(kGradient));
    state[0] = reinterpret_cast<void*>(column(kState1));
    state[1] = reinterpret_cast<void*>(column(kState2));
    absmax[0] = reinterpret_cast<float*>(column(kAbsmax1));
    absmax[1] = reinterpret_cast<float*>(column(kAbsmax2));
    count = column(kElements);
    first_unit = column(kFirstUnit);
    seed = column(kSeed);
    const uintptr_t addresses = reinterpret_cast<uintptr_t>(p) | reinterpret_cast<uintptr_t>(g) |
                                reinterpret_cast<uintptr_t>(state[0]) | reinterpret_cast<uintptr_t>(state[1]) |
                                (two_slots ? static_cast<uintptr_t>(count * state_bytes) : 0);
    aligned = addresses % 16 == 0;
  }
};

// The last parameter whose first unit is not beyond `unit`; empty parameters have none.
__device__ __forceinline__ int64_t find_tensor(const StepArguments& a, int64_t unit) {
  const int64_t* first = a.table + kFirstUnit * a.tensors;
  int64_t low = 0, high = a.tensors;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (__ldg(first + middle) <= unit) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <class T>
__device__ __forceinline__ Vector<T, kOwn> load_own(const T* from, int64_t begin, int64_t count, bool aligned) {
  if (aligned && begin + kOwn <= count) {
    return load_streaming<T, kOwn>(from + begin);
  }
  Vector<T, kOwn> values = {};
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (begin + i < count) {
      values.values[i] = from[begin + i];
    }
  }
  return values;
}

template <class T>
__device__ __forceinline__ void store_own(T* to, int64_t begin, int64_t count, bool aligned,
                                          const Vector<T, kOwn>& values) {
  if (aligned && begin + kOwn <= count) {
    store_streaming<T, kOwn>(to + begin, values);
    return;
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (begin + i < count) {
      to[begin + i] = values.values[i];
    }
  }
}

// Rounds up or down at random, in proportion to the distance.
__device__ __forceinline__ bfloat16_t rounded_at_random(float value, int64_t seed, uint32_t step, int64_t index) {
  if (!isfinite(value)) {
    return from_float<bfloat16_t>(value);
  }
  const uint32_t key = bnb::rounding_key(static_cast<uint32_t>(seed), step, static_cast<uint32_t>(index >> 32));
  const uint32_t bits = bnb::bits_of(value) + bnb::rounding_noise(key, static_cast<uint32_t>(index));
  return from_float<bfloat16_t>(bnb::float_of(bits & 0xffff0000u));
}

// States of 8 elements in registers, from and to memory. `Storage` says how they are stored.
template <bnb::Rule kRule>
struct Shape {
  static constexpr int kFirst = bnb::first_values(kRule);
  static constexpr int kSecond = bnb::second_values(kRule);
  static constexpr int kValues = kFirst + kSecond;
};

struct Float32Storage {
  using Element = float;
  static constexpr bool kBlocks = false;
};
struct CodeStorage {
  using Element = uint8_t;
  static constexpr bool kBlocks = true;
};

// `kMeasure`: only the squares of the norms of update and parameter, one pair per unit. `kByTensor`: each
// parameter has constants of its own; otherwise they stay in the arguments, which costs no registers.
template <class T, bnb::Rule kRule, class Storage, bool kMeasure, bool kByTensor>
__global__ void __launch_bounds__(kOptimizerThreads, Storage::kBlocks&& Shape<kRule>::kValues < 3 ? 3 : 2)
    optimizer_pass(const __grid_constant__ StepArguments a) {
  using Element = typename Storage::Element;
  using Layout = Shape<kRule>;
  constexpr bool kCodes = Storage::kBlocks;
  __shared__ Encoder8::Storage encoders[kCodes ? 2 : 1];
  __shared__ float tables[kCodes ? 2 : 1][256];
  if constexpr (kCodes) {
    load_table(tables[0], a.code1, 256);
    if (Layout::kSecond > 0) {
      load_table(tables[1], a.code2, 256);
    }
  }
  const Encoder8 first_encoder = kCodes ? Encoder8(encoders[0], a.code1, 256) : Encoder8();
  const Encoder8 second_encoder =
      kCodes && Layout::kSecond > 0 ? Encoder8(encoders[kCodes ? 1 : 0], a.code2, 256) : Encoder8();
  __syncthreads();

  const int lane = threadIdx.x % kLanes;
  const int64_t groups = static_cast<int64_t>(gridDim.x) * (kOptimizerThreads / kLanes);
  for (int64_t unit = static_cast<int64_t>(blockIdx.x) * (kOptimizerThreads / kLanes) + threadIdx.x / kLanes;
       unit < a.units; unit += groups) {
    const int64_t tensor = find_tensor(a, unit);
    const Row<T> row(a, tensor, sizeof(Element), Layout::kFirst > 1);
    const auto constants_of = [&]() -> decltype(auto) {
      if constexpr (kByTensor) {
        return StepConstants(a.by_tensor[tensor]);
      } else {
        return (a.constants);
      }
    };
    decltype(auto) constants = constants_of();
    const int64_t blocks = (row.count + kStateBlock - 1) / kStateBlock;
    const int64_t first_block = (unit - row.first_unit) * kUnitBlocks;
    const int64_t last_block = min(first_block + kUnitBlocks, blocks);
    double update_square = 0.0, parameter_square = 0.0;
    // What a lane has of a block.
    struct Own {
      Vector<T, kOwn> gradient, parameter;
      Vector<Element, kOwn> stored[Layout::kValues];
      float scales[Layout::kValues];
    };
    const auto load = [&](int64_t block) {
      const int64_t begin = block * kStateBlock + lane * kOwn;
      Own own;
      own.gradient = load_own(row.g, begin, row.count, row.aligned);
      own.parameter = load_own<T>(row.p, begin, row.count, row.aligned);
#pragma unroll
      for (int s = 0; s < Layout::kValues; ++s) {
        const int which = s >= Layout::kFirst, slot = which ? s - Layout::kFirst : s;
        const Element* from = static_cast<const Element*>(row.state[which]) + slot * row.count;
        own.stored[s] = load_own(from, begin, row.count, row.aligned);
        own.scales[s] = kCodes ? row.absmax[which][slot * blocks + block] : 1.0f;
      }
      return own;
    };
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t begin = block * kStateBlock + lane * kOwn;
      const Own own = load(block);
      const auto& [gradient, parameter, stored, scales] = own;
      float values[Layout::kValues][kOwn];
      float moved[kOwn];
      unsigned largest[Layout::kValues] = {};
      bool any_active = false;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const float g = to_float(gradient.values[i]), p = to_float(parameter.values[i]);
        float states[bnb::kMostValues];
#pragma unroll
        for (int s = 0; s < Layout::kValues; ++s) {
          states[s] =
              kCodes ? tables[s >= Layout::kFirst && kCodes][static_cast<int>(stored[s].values[i]) & 255] * scales[s]
                     : static_cast<float>(stored[s].values[i]);
          values[s][i] = states[s];
        }
        const bool inside = begin + i < row.count;
        const bool active = inside && !(a.skip_zeros && g == 0.0f);
        const float u = bnb::direction<kRule, float>(g, p, states, constants.rule);
        any_active |= active;
        if constexpr (kMeasure) {
          update_square += active ? static_cast<double>(u) * u : 0.0;
          parameter_square += inside ? static_cast<double>(p) * p : 0.0;
        } else {
          moved[i] = active ? bnb::moved(p, u, constants.rule) : p;
#pragma unroll
          for (int s = 0; s < Layout::kValues; ++s) {
            if (active) {
              values[s][i] = kCodes && !isfinite(states[s]) ? 0.0f : states[s];
            }
            if (inside) {
              largest[s] = max(largest[s], bnb::magnitude_bits(values[s][i]));
            }
          }
        }
      }
      if constexpr (!kMeasure) {
        Vector<T, kOwn> result;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const bool skipped = a.skip_zeros && to_float(gradient.values[i]) == 0.0f;
          result.values[i] = skipped ? parameter.values[i] : from_float<T>(moved[i]);
        }
        if constexpr (std::is_same_v<T, bfloat16_t>) {
          if (row.seed >= 0) {
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
              if (!(a.skip_zeros && to_float(gradient.values[i]) == 0.0f)) {
                result.values[i] = rounded_at_random(moved[i], row.seed, constants.step, begin + i);
              }
            }
          }
        }
        store_own(row.p, begin, row.count, row.aligned, result);
        // A block of states that no gradient concerns stays as it is.
        if (kCodes && a.skip_zeros && !group_any(any_active)) {
          continue;
        }
#pragma unroll
        for (int s = 0; s < Layout::kValues; ++s) {
          const int which = s >= Layout::kFirst, slot = which ? s - Layout::kFirst : s;
          Element* to = static_cast<Element*>(row.state[which]) + slot * row.count;
          Vector<Element, kOwn> out;
          if constexpr (kCodes) {
            const float absmax = bnb::float_of(group_max<kLanes>(largest[s]));
            const float inverse = 1.0f / absmax;
            const Encoder8& encoder = which ? second_encoder : first_encoder;
            float scaled[kOwn];
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
              scaled[i] = values[s][i] * inverse;
            }
            out = encoder(scaled);
            if (lane == 0) {
              row.absmax[which][slot * blocks + block] = absmax;
            }
          } else {
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
              out.values[i] = values[s][i];
            }
          }
          store_own(to, begin, row.count, row.aligned, out);
        }
      }
    }
    if constexpr (kMeasure) {
      update_square = group_sum<kLanes>(update_square);
      parameter_square = group_sum<kLanes>(parameter_square);
      if (lane == 0) {
        a.partial[2 * unit] = update_square;
        a.partial[2 * unit + 1] = parameter_square;
      }
    }
  }
}

void run_pass_32bit(const Launch&, bnb::Rule, int dtype, const StepArguments&, bool measure);
void run_pass_8bit(const Launch&, bnb::Rule, int dtype, const StepArguments&, bool measure);

template <class Storage>
void run_pass(const Launch& launch, bnb::Rule rule, int dtype, const StepArguments& a, bool measure) {
  const auto with_rule = [&](auto type, auto formula) {
    using T = typename decltype(type)::type;
    constexpr bnb::Rule kRule = decltype(formula)::value;
    const unsigned grid = launch.grid(ceil_div(a.units, kOptimizerThreads / kLanes), 8);
    const auto go = [&](auto measures, auto by_tensor) {
      optimizer_pass<T, kRule, Storage, decltype(measures)::value, decltype(by_tensor)::value>
          <<<grid, kOptimizerThreads, 0, launch.stream()>>>(a);
    };
    const bool own_constants = a.by_tensor != nullptr;
    if (measure) {
      own_constants ? go(std::true_type{}, std::true_type{}) : go(std::true_type{}, std::false_type{});
    } else {
      own_constants ? go(std::false_type{}, std::true_type{}) : go(std::false_type{}, std::false_type{});
    }
  };
  with_dtype(dtype, [&](auto type) {
    switch (bnb::formula_of(rule)) {
      case bnb::Rule::kAdam:
        return with_rule(type, std::integral_constant<bnb::Rule, bnb::Rule::kAdam>{});
      case bnb::Rule::kAdemamix:
        return with_rule(type, std::integral_constant<bnb::Rule, bnb::Rule::kAdemamix>{});
      case bnb::Rule::kLion:
        return with_rule(type, std::integral_constant<bnb::Rule, bnb::Rule::kLion>{});
      case bnb::Rule::kMomentum:
        return with_rule(type, std::integral_constant<bnb::Rule, bnb::Rule::kMomentum>{});
      case bnb::Rule::kSgd:
        return with_rule(type, std::integral_constant<bnb::Rule, bnb::Rule::kSgd>{});
      case bnb::Rule::kRmsprop:
        return with_rule(type, std::integral_constant<bnb::Rule, bnb::Rule::kRmsprop>{});
      case bnb::Rule::kScheduleFree:
        return with_rule(type, std::integral_constant<bnb::Rule, bnb::Rule::kScheduleFree>{});
      default:
        return with_rule(type, std::integral_constant<bnb::Rule, bnb::Rule::kAdagrad>{});
    }
  });
  check_launch("optimizer step");
}

}  // namespace bnb_gpu
