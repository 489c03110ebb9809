// Kernels called with the arguments of their ops, in the order of the schemas, for calls that are like one before.
// Their context is the number of threads. Needs Python.h, in its limited form, to be included before.
#pragma once

#include <bnb/python/arguments.h>

#include <cstdint>

#include "dispatch.h"

namespace bnb_cpu {

inline bool repeat_gemm_4bit(const bnb::Arguments& arguments, void* out, int64_t threads) {
  enum { kA, kB, kShape, kAbsmax, kBlocksize, kQuantType, kBias, kAbsmax8bit, kAbsmaxCode, kAbsmaxOffset };
  const int64_t rows = arguments.integers(kShape)[0], width = arguments.integers(kShape)[1];
  if (width == 0) {
    return false;  // The number of rows of A does not follow from its size.
  }
  kernels().gemm_4bit(arguments.data<void>(kA), arguments.dtype(kA), arguments.size(kA) / width,
                      arguments.data<uint8_t>(kB), rows, width, arguments.data<float>(kAbsmax),
                      arguments.data<uint8_t>(kAbsmax8bit), arguments.data<float>(kAbsmaxCode),
                      arguments.size(kAbsmaxCode), arguments.data<float>(kAbsmaxOffset), arguments.integer(kBlocksize),
                      nullptr, arguments.text(kQuantType) == "nf4" ? 0 : 1, arguments.data<void>(kBias),
                      arguments.is_given(kBias) ? arguments.dtype(kBias) : 0, out, static_cast<int>(threads));
  return true;
}

inline bool repeat_int8_linear(const bnb::Arguments& arguments, void* out, int64_t threads) {
  enum { kA, kWeight, kStatistics, kThreshold, kBias };
  // Codes of a matrix and one statistic for each of its rows.
  const int64_t rows = arguments.size(kStatistics), width = rows == 0 ? 0 : arguments.size(kWeight) / rows;
  if (width == 0) {
    return false;
  }
  kernels().int8_linear(arguments.data<void>(kA), arguments.dtype(kA), arguments.size(kA) / width,
                        arguments.data<int8_t>(kWeight), arguments.data<float>(kStatistics), rows, width,
                        static_cast<float>(arguments.number(kThreshold)), arguments.data<void>(kBias),
                        arguments.is_given(kBias) ? arguments.dtype(kBias) : 0, out, static_cast<int>(threads));
  return true;
}

}  // namespace bnb_cpu
