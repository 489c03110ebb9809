// The interface between the kernels and the rest: one table of plain functions per instruction set.
//
// Conventions: pointers are raw and contiguous, never null where a count is positive, and overlap only
// where a comment says so; sizes are elements in int64_t; enumerations cross as int; the caller has
// checked every argument. `threads` is an upper bound.
#pragma once

#include <cstdint>

namespace bnb_cpu {

struct Kernels {
  // --- blocks: quant4-inl.h, quant8-inl.h ---------------------------------------------------------

  // x: `count` values of `dtype`. packed: (count + 1) / 2 bytes. absmax: one per block. `blocksize` even.
  void (*quantize_4bit)(const void* x, int dtype, int64_t count, int64_t blocksize, int quant_type, uint8_t* packed,
                        float* absmax, int threads);

  // The opposite; `out` holds `count` values of `dtype`.
  void (*dequantize_4bit)(const uint8_t* packed, const float* absmax, int64_t count, int64_t blocksize, int quant_type,
                          void* out, int dtype, int threads);

  // absmax of block b is code[absmax_8bit[b]] * absmax[b / nested_blocksize] + *offset; `code` has
  // `code_size` entries, and an index beyond them reads the last one.
  void (*dequantize_4bit_nested)(const uint8_t* packed, const float* absmax, const uint8_t* absmax_8bit,
                                 const float* code, int64_t code_size, const float* offset, int64_t count,
                                 int64_t blocksize, int64_t nested_blocksize, int quant_type, void* out, int dtype,
                                 int threads);

  // code: `code_size` (1 to 256) ascending values. codes: `count` bytes.
  void (*quantize_blockwise)(const void* x, int dtype, int64_t count, int64_t blocksize, const float* code,
                             int64_t code_size, uint8_t* codes, float* absmax, int threads);

  void (*dequantize_blockwise)(const uint8_t* codes, const float* absmax, const float* code, int64_t code_size,
                               int64_t count, int64_t blocksize, void* out, int dtype, int threads);
};

// One per instruction set, in isa_<name>.cpp. Constant data: filling a table at run time would already
// execute instructions that the processor may lack.
namespace scalar {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512vnni {
extern const Kernels table;
}
namespace neon {
extern const Kernels table;
}

}  // namespace bnb_cpu
