// Host entry points: what the module and the benchmarks see. Pointers are raw device pointers to
// contiguous memory, sizes are elements, enumerations cross as int; the caller has checked every
// argument. Nothing here allocates, synchronises or keeps state, so each call can be captured in a graph.
#pragma once

#include <cstdint>

#include "launch.h"

namespace bnb_gpu {

// Statistics of a 4-bit tensor. Plain: `absmax` has one value per block and the rest is null. Nested:
// absmax of block b is code[absmax_8bit[b]] * absmax[b / nested_blocksize] + *offset.
struct Statistics {
  const float* absmax;
  const uint8_t* absmax_8bit;
  const float* code;
  const float* offset;
  int code_size;
  int64_t nested_blocksize;
};

// --- quantize4.cu, dequantize4.cu ------------------------------------------------------------------
void quantize_4bit(const Launch&, const void* x, int dtype, int64_t count, int64_t blocksize, int quant_type,
                   uint8_t* packed, float* absmax);
void dequantize_4bit(const Launch&, const uint8_t* packed, const Statistics&, int64_t count, int64_t blocksize,
                     int quant_type, void* out, int dtype);
void embedding_4bit(const Launch&, const void* indices, bool indices_64bit, int64_t lookups, const uint8_t* packed,
                    const Statistics&, int64_t rows, int64_t width, int64_t blocksize, int quant_type, void* out,
                    int dtype);

// --- blockwise8.cu ---------------------------------------------------------------------------------
void quantize_blockwise(const Launch&, const void* x, int dtype, int64_t count, int64_t blocksize, const float* code,
                        int code_size, uint8_t* codes, float* absmax);
void dequantize_blockwise(const Launch&, const uint8_t* codes, const float* absmax, const float* code, int code_size,
                          int64_t count, int64_t blocksize, void* out, int dtype);

}  // namespace bnb_gpu
