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
#include "lanes.h"

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

// Values of the states of a rule, by element.
template <bnb::Rule kRule>
struct Shape {
  static constexpr int kFirst = bnb::first_values(kRule);
  static constexpr int kSecond = bnb::second_values(kRule);
  static constexpr int kValues = kFirst + kSecond;
};

// How states are stored, and what a thread block needs to read and write them.
struct Float32Storage {
  using Element = float;
  static constexpr bool kBlocks = false;
};
struct CodeStorage {
  using Element = uint8_t;
  static constexpr bool kBlocks = true;
};

// Codebooks of the first and the second state in shared memory.
struct Coders {
  Encoder8 encoder[2];
  const float* table[2];
};

// What a lane has of a block of 256 elements, as it lies in memory: words stay together in registers.
template <class T, bnb::Rule kRule, class Storage>
struct Own {
  Words<T, kOwn> gradient, parameter;
  Words<typename Storage::Element, kOwn> stored[Shape<kRule>::kValues];
  float scales[Shape<kRule>::kValues];
};

using Values = Lanes<kOwn>;

constexpr unsigned kInfinityBits = 0x7f800000u;

// Bits of the largest magnitude in a block; above infinity's if there is a NaN. Values beyond `count` of a
// lane do not count.
__device__ __forceinline__ unsigned largest_bits(const Values& values, int count) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    largest = max_or_nan(largest, i < count ? fabsf(values.values[i]) : 0.0f);
  }
  return group_max<kLanes>(bnb::bits_of(largest));
}

// One lane's part of the step. `kPlain`: the block is whole and aligned, every element takes part and rounds
// to nearest. `kMeasure`: nothing is written, and the squares of update and parameter are added up.
template <class T, bnb::Rule kRule, class Storage, bool kMeasure, bool kPlain>
struct BlockStep {
  using Element = typename Storage::Element;
  using Layout = Shape<kRule>;
  using Loaded = Own<T, kRule, Storage>;
  static constexpr bool kCodes = Storage::kBlocks;

  __device__ static constexpr int state_of(int s) { return s >= Layout::kFirst ? 1 : 0; }
  __device__ static constexpr int slot_of(int s) { return s >= Layout::kFirst ? s - Layout::kFirst : s; }
  __device__ static int64_t blocks_of(const Row<T>& row) { return (row.count + kStateBlock - 1) / kStateBlock; }

  template <class E>
  __device__ __forceinline__ static Words<E, kOwn> load_words(const E* from, int64_t begin, const Row<T>& row) {
    return kPlain ? words_of(load_streaming<E, kOwn>(from + begin))
                  : words_of(load_own(from, begin, row.count, row.aligned));
  }
  // `Own`: elements as a vector, or codes as words.
  template <class E, class Own>
  __device__ __forceinline__ static void store(E* to, int64_t begin, const Row<T>& row, const Own& values) {
    kPlain ? store_streaming(to + begin, values) : store_own(to, begin, row.count, row.aligned, values);
  }

  __device__ __forceinline__ static Loaded load(const Row<T>& row, int64_t block, int lane) {
    const int64_t begin = block * kStateBlock + lane * kOwn;
    Loaded own;
    own.gradient = load_words(row.g, begin, row);
    own.parameter = load_words<T>(row.p, begin, row);
#pragma unroll
    for (int s = 0; s < Layout::kValues; ++s) {
      const int which = state_of(s), slot = slot_of(s);
      own.stored[s] = load_words(static_cast<const Element*>(row.state[which]) + slot * row.count, begin, row);
      own.scales[s] = kCodes ? row.absmax[which][slot * blocks_of(row) + block] : 1.0f;
    }
    return own;
  }

  __device__ __forceinline__ static void take(const StepArguments& a, const StepConstants& constants, const Row<T>& row,
                                              const Loaded& own, int64_t block, int lane, const Coders& coders,
                                              double2& squares) {
    const int64_t begin = block * kStateBlock + lane * kOwn;
    const Values g = own.gradient.floats(), p = own.parameter.floats();
    Values before[Layout::kValues], states[bnb::kMostValues];
#pragma unroll
    for (int s = 0; s < Layout::kValues; ++s) {
      if constexpr (kCodes) {
        before[s] = own.stored[s].looked_up(coders.table[state_of(s)]) * Values::all(own.scales[s]);
      } else {
        before[s] = own.stored[s].floats();
      }
      states[s] = before[s];
    }
    const auto c = bnb::spread_constants<Values>(constants.rule, [](float value) { return Values::all(value); });
    const Values u = bnb::direction<kRule, Values>(g, p, states, c);
    bool active[kOwn], any_active = kPlain;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      active[i] = kPlain || (begin + i < row.count && !(a.skip_zeros && g.values[i] == 0.0f));
      any_active |= active[i];
    }
    if constexpr (kMeasure) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        squares.x += active[i] ? static_cast<double>(u.values[i]) * u.values[i] : 0.0;
        squares.y += static_cast<double>(p.values[i]) * p.values[i];
      }
    } else {
      const Values moved = bnb::moved(p, u, c);
      Vector<T, kOwn> result;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        result.values[i] = from_float<T>(active[i] ? moved.values[i] : p.values[i]);
        if constexpr (std::is_same_v<T, bfloat16_t> && !kPlain) {
          if (active[i] && row.seed >= 0) {
            result.values[i] = rounded_at_random(moved.values[i], row.seed, constants.step, begin + i);
          }
        }
      }
      store(row.p, begin, row, result);
      // A block of states that no gradient concerns stays as it is.
      if (!kPlain && kCodes && a.skip_zeros && !group_any(any_active)) {
        return;
      }
#pragma unroll
      for (int s = 0; s < Layout::kValues; ++s) {
        const int which = state_of(s), slot = slot_of(s);
        Element* to = static_cast<Element*>(row.state[which]) + slot * row.count;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          states[s].values[i] = active[i] ? states[s].values[i] : before[s].values[i];
        }
        if constexpr (kCodes) {
          const bool whole = kPlain || begin + kOwn <= row.count;
          unsigned largest = largest_bits(states[s], whole ? kOwn : static_cast<int>(row.count - begin));
          if (largest >= kInfinityBits) {
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
              states[s].values[i] = isfinite(states[s].values[i]) ? states[s].values[i] : 0.0f;
            }
            largest = largest_bits(states[s], whole ? kOwn : static_cast<int>(row.count - begin));
          }
          const float absmax = bnb::float_of(largest);
          store(to, begin, row, coders.encoder[which](states[s].values, absmax, !kPlain));
          if (lane == 0) {
            row.absmax[which][slot * blocks_of(row) + block] = absmax;
          }
        } else {
          Vector<Element, kOwn> out;
          memcpy(&out, &states[s], sizeof out);
          store(to, begin, row, out);
        }
      }
    }
  }
};

// Blocks of any kind. Not inlined, so that its registers are not those of the plain ones.
template <class T, bnb::Rule kRule, class Storage, bool kMeasure>
__device__ __noinline__ double2 take_any(const StepArguments& a, const StepConstants& constants, Row<T> row,
                                         int64_t first, int64_t last, int lane, Coders coders) {
  using Step = BlockStep<T, kRule, Storage, kMeasure, false>;
  double2 squares = make_double2(0.0, 0.0);
  for (int64_t block = first; block < last; ++block) {
    Step::take(a, constants, row, Step::load(row, block, lane), block, lane, coders, squares);
  }
  return squares;
}

// `kByTensor`: each parameter has constants of its own; otherwise they stay in the arguments, which costs no
// registers.
template <class T, bnb::Rule kRule, class Storage, bool kMeasure, bool kByTensor>
__global__ void __launch_bounds__(kOptimizerThreads, Storage::kBlocks&& Shape<kRule>::kValues < 2 ? 3 : 2)
    optimizer_pass(const __grid_constant__ StepArguments a) {
  using Layout = Shape<kRule>;
  using Step = BlockStep<T, kRule, Storage, kMeasure, true>;
  constexpr bool kCodes = Storage::kBlocks, kTwoCodes = kCodes && Layout::kSecond > 0;
  __shared__ Encoder8::Storage encoders[kTwoCodes ? 2 : 1];
  __shared__ float tables[kTwoCodes ? 2 : 1][256];
  Coders coders = {};
  if constexpr (kCodes) {
    load_table(tables[0], a.code1, 256);
    coders.table[0] = tables[0];
    coders.encoder[0] = Encoder8(encoders[0], a.code1, 256);
  }
  if constexpr (kTwoCodes) {
    load_table(tables[1], a.code2, 256);
    coders.table[1] = tables[1];
    coders.encoder[1] = Encoder8(encoders[1], a.code2, 256);
  }
  __syncthreads();

  const int lane = threadIdx.x % kLanes;
  const int64_t groups = static_cast<int64_t>(gridDim.x) * (kOptimizerThreads / kLanes);
  for (int64_t unit = static_cast<int64_t>(blockIdx.x) * (kOptimizerThreads / kLanes) + threadIdx.x / kLanes;
       unit < a.units; unit += groups) {
    const int64_t tensor = find_tensor(a, unit);
    const Row<T> row(a, tensor, sizeof(typename Storage::Element), Layout::kFirst > 1);
    const auto constants_of = [&]() -> decltype(auto) {
      if constexpr (kByTensor) {
        return StepConstants(a.by_tensor[tensor]);
      } else {
        return (a.constants);
      }
    };
    decltype(auto) constants = constants_of();
    const int64_t first = (unit - row.first_unit) * kUnitBlocks;
    const int64_t last = min(first + kUnitBlocks, Step::blocks_of(row));
    double2 squares = make_double2(0.0, 0.0);
    if (row.aligned && row.seed < 0 && !a.skip_zeros && last * kStateBlock <= row.count) {
      // The next block is on its way while one is computed.
      auto next = Step::load(row, first, lane);
      for (int64_t block = first; block < last; ++block) {
        const auto own = next;
        if (block + 1 < last) {
          next = Step::load(row, block + 1, lane);
        }
        Step::take(a, constants, row, own, block, lane, coders, squares);
      }
    } else {
      squares = take_any<T, kRule, Storage, kMeasure>(a, constants, row, first, last, lane, coders);
    }
    if constexpr (kMeasure) {
      squares.x = group_sum<kLanes>(squares.x);
      squares.y = group_sum<kLanes>(squares.y);
      if (lane == 0) {
        a.partial[2 * unit] = squares.x;
        a.partial[2 * unit + 1] = squares.y;
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
    const auto go = [&](auto measures, auto by_tensor) {
      const auto kernel = optimizer_pass<T, kRule, Storage, decltype(measures)::value, decltype(by_tensor)::value>;
      static ResidentGrid grid;
      const int64_t work = ceil_div(a.units, kOptimizerThreads / kLanes);
      kernel<<<grid(launch, reinterpret_cast<const void*>(kernel), kOptimizerThreads, work), kOptimizerThreads, 0,
               launch.stream()>>>(a);
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
