// Block-wise formats spelled out element by element, as an independent second opinion on the kernels: it
// shares the tables of values with them, and neither the search nor the conversion of elements.
#pragma once

#include <bnb/codebooks.h>
#include <bnb/dtypes.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "testing.h"

namespace testing {

constexpr float kNf4Values[16] = {BNB_NF4_VALUES};
constexpr float kFp4Values[16] = {BNB_FP4_VALUES};

inline const float* values_4bit(int quant_type) { return quant_type == 0 ? kNf4Values : kFp4Values; }

// Codes in ascending order of value, the smaller code first where values are equal.
inline std::vector<int> order_4bit(int quant_type) {
  const float* values = values_4bit(quant_type);
  std::vector<int> order(16);
  for (int i = 0; i < 16; ++i) {
    order[static_cast<size_t>(i)] = i;
  }
  std::stable_sort(order.begin(), order.end(), [=](int a, int b) { return values[a] < values[b]; });
  return order;
}

inline unsigned model_code_4bit(float scaled, const float* values, const std::vector<int>& order) {
  for (size_t rank = 0; rank < 15; ++rank) {
    if (scaled <= (values[order[rank]] + values[order[rank + 1]]) / 2.0f) {
      return static_cast<unsigned>(order[rank]);
    }
  }
  return static_cast<unsigned>(order[15]);
}

inline void model_quantize_4bit(const std::vector<float>& x, int64_t blocksize, int quant_type,
                                std::vector<uint8_t>& packed, std::vector<float>& absmax) {
  const float* values = values_4bit(quant_type);
  const std::vector<int> order = order_4bit(quant_type);
  const auto count = static_cast<int64_t>(x.size());
  std::vector<unsigned> codes;
  for (int64_t first = 0; first < count; first += blocksize) {
    const int64_t stop = std::min(count, first + blocksize);
    float most = 0.0f;
    for (int64_t i = first; i < stop; ++i) {
      const float size = std::fabs(x[static_cast<size_t>(i)]);
      most = std::isnan(size) || std::isnan(most) ? NAN : std::max(most, size);
    }
    const float clamped = most < 1e-38f ? 1e-38f : most;
    const bool partial = stop - first < blocksize;
    absmax.push_back(partial ? clamped : most);
    for (int64_t i = first; i < stop; ++i) {
      const float value = x[static_cast<size_t>(i)];
      codes.push_back(model_code_4bit(partial ? value / clamped : value * (1.0f / clamped), values, order));
    }
  }
  if (count % 2 != 0) {
    codes.push_back(model_code_4bit(0.0f, values, order));
  }
  for (size_t i = 0; i < codes.size(); i += 2) {
    packed.push_back(static_cast<uint8_t>(codes[i] * 16 + codes[i + 1]));
  }
}

inline void model_quantize_blockwise(const std::vector<float>& x, int64_t blocksize, const std::vector<float>& code,
                                     std::vector<uint8_t>& codes, std::vector<float>& absmax) {
  const auto count = static_cast<int64_t>(x.size());
  for (int64_t first = 0; first < count; first += blocksize) {
    const int64_t stop = std::min(count, first + blocksize);
    float most = 0.0f;
    for (int64_t i = first; i < stop; ++i) {
      const float size = std::fabs(x[static_cast<size_t>(i)]);
      most = std::isnan(size) ? most : std::max(most, size);
    }
    absmax.push_back(most);
    for (int64_t i = first; i < stop; ++i) {
      const float scaled = x[static_cast<size_t>(i)] * (1.0f / most);
      if (most == 0.0f || std::isnan(scaled)) {
        codes.push_back(0);
        continue;
      }
      const float position = std::floor((std::min(1.0f, std::max(-1.0f, scaled)) + 1.0f) * 32767.5f + 0.5f);
      const float point = position / 32767.5f - 1.0f;
      size_t nearest = 0;
      while (nearest + 1 < code.size() && point > (code[nearest] + code[nearest + 1]) * 0.5f) {
        ++nearest;
      }
      codes.push_back(static_cast<uint8_t>(nearest));
    }
  }
}

// --- elements of the three types ---------------------------------------------------------------------

inline void write_elements(const std::vector<float>& x, int dtype, void* out) {
  for (size_t i = 0; i < x.size(); ++i) {
    if (dtype == 0) {
      static_cast<float*>(out)[i] = x[i];
    } else if (dtype == 1) {
      static_cast<bnb::Half*>(out)[i] = bnb::to_half(x[i]);
    } else {
      static_cast<bnb::BFloat16*>(out)[i] = bnb::to_bfloat16(x[i]);
    }
  }
}

inline std::vector<float> read_elements(const void* from, int dtype, int64_t count) {
  std::vector<float> x;
  for (int64_t i = 0; i < count; ++i) {
    x.push_back(dtype == 0   ? static_cast<const float*>(from)[i]
                : dtype == 1 ? bnb::to_float(static_cast<const bnb::Half*>(from)[i])
                             : bnb::to_float(static_cast<const bnb::BFloat16*>(from)[i]));
  }
  return x;
}

// `values` after rounding to the type.
inline std::vector<float> rounded(const std::vector<float>& values, int dtype) {
  std::vector<uint8_t> bytes(values.size() * static_cast<size_t>(size_of(dtype)));
  write_elements(values, dtype, bytes.data());
  return read_elements(bytes.data(), dtype, static_cast<int64_t>(values.size()));
}

inline void check_same_floats(const std::vector<float>& actual, const std::vector<float>& expected,
                              const std::string& where) {
  CHECK(actual.size() == expected.size(), "%s: %zu values", where.c_str(), actual.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    const bool same = std::isnan(expected[i]) ? std::isnan(actual[i]) : bits_of(actual[i]) == bits_of(expected[i]);
    CHECK(same, "%s: value %zu of %zu is %a, expected %a", where.c_str(), i, actual.size(),
          static_cast<double>(actual[i]), static_cast<double>(expected[i]));
  }
}

inline void check_same_bytes(const uint8_t* actual, const std::vector<uint8_t>& expected, const std::string& where) {
  for (size_t i = 0; i < expected.size(); ++i) {
    CHECK(actual[i] == expected[i], "%s: byte %zu of %zu is %#x, expected %#x", where.c_str(), i, expected.size(),
          actual[i], expected[i]);
  }
}

// An ascending codebook of `size` values in [-1, 1], with repeated ones.
inline std::vector<float> random_code(Random& random, int64_t size) {
  std::vector<float> code;
  for (int64_t i = 0; i < size; ++i) {
    const auto exponent = static_cast<int>(between(random, 0, 8));
    code.push_back(std::ldexp(std::uniform_real_distribution<float>(-1.0f, 1.0f)(random), -exponent));
  }
  std::sort(code.begin(), code.end());
  if (size > 4) {
    code[static_cast<size_t>(size / 2)] = code[static_cast<size_t>(size / 2 - 1)];
  }
  return code;
}

// The codebook of "8-bit Optimizers via Block-wise Quantization" (Dettmers et al. 2022, arXiv:2110.02861), but for the
// rounding of some values: each decade of [1e-7, 1] has evenly spaced values, twice as many as the one below it.
inline std::vector<float> dynamic_code(bool with_sign) {
  std::vector<float> code{0.0f, 1.0f};
  for (int decade = 0; decade < 7; ++decade) {
    const int count = (with_sign ? 1 : 2) << decade;
    for (int i = 0; i < count; ++i) {
      const double value = (0.1 + 0.9 * (i + 0.5) / count) * std::pow(10.0, decade - 6);
      code.push_back(static_cast<float>(value));
      if (with_sign) {
        code.push_back(static_cast<float>(-value));
      }
    }
  }
  std::sort(code.begin(), code.end());
  return code;
}

// A codebook of 256 values: one that optimizers use, or a random one.
inline std::vector<float> code_of_256(Random& random) {
  const int64_t kind = between(random, 0, 3);
  return kind == 0 ? random_code(random, 256) : dynamic_code(kind == 1);
}

}  // namespace testing
