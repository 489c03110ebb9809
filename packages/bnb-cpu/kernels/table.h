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

  // --- rows of a 4-bit table: embedding4-inl.h ------------------------------------------------------

  // indices: `count` integers of `index_bytes` (4 or 8) bytes. The table has `table_rows` rows of `width`
  // elements; its statistics are nested unless `absmax_8bit` is null. out: count x width. Returns -1, or
  // the position of the first index outside of the table, and then `out` is not written.
  int64_t (*embedding_4bit)(const void* indices, int index_bytes, int64_t count, const uint8_t* packed,
                            int64_t table_rows, int64_t width, const float* absmax, const uint8_t* absmax_8bit,
                            const float* code, int64_t code_size, const float* offset, int64_t blocksize,
                            int64_t nested_blocksize, int quant_type, void* out, int dtype, int threads);

  // --- products with a 4-bit weight: gemm4-inl.h ----------------------------------------------------

  // a: `count` x `width`. packed: weight of `rows` x `width`, blocks over the flattened weight; its
  // statistics are nested unless `absmax_8bit` is null. `table` (16 values) replaces that of `quant_type`
  // unless null. bias: `rows` values of `bias_dtype`, or null. out: `count` x `rows`, of the `dtype` of a.
  void (*gemm_4bit)(const void* a, int dtype, int64_t count, const uint8_t* packed, int64_t rows, int64_t width,
                    const float* absmax, const uint8_t* absmax_8bit, const float* code, int64_t code_size,
                    const float* offset, int64_t blocksize, const float* table, int quant_type, const void* bias,
                    int bias_dtype, void* out, int threads);

  // a: `count` x `rows`. out: `count` x `width`, a times the weight as it stands.
  void (*gemm_4bit_transposed)(const void* a, int dtype, int64_t count, const uint8_t* packed, int64_t rows,
                               int64_t width, const float* absmax, const uint8_t* absmax_8bit, const float* code,
                               int64_t code_size, const float* offset, int64_t blocksize, int quant_type, void* out,
                               int threads);

  // --- int8: int8_quant-inl.h, int8_gemm-inl.h -------------------------------------------------------

  // x: `rows` x `width`. codes: the same shape. absmax: one per row. With threshold > 0, outlier_columns
  // (room for `width`) gets the ascending columns that hold a magnitude of at least `threshold`; their codes
  // are zero. Returns their number.
  int64_t (*int8_vectorwise_quant)(const void* x, int dtype, int64_t rows, int64_t width, float threshold,
                                   int8_t* codes, float* absmax, int64_t* outlier_columns, int threads);

  // The same with one absmax per column, and zero only where an outlier stands.
  void (*int8_columnwise_quant)(const void* x, int dtype, int64_t rows, int64_t width, float threshold, int8_t* codes,
                                float* absmax, int threads);

  void (*int8_vectorwise_dequant)(const int8_t* codes, const float* absmax, int64_t rows, int64_t width, float* out,
                                  int threads);

  // a: `count` x `width`, b: `rows` x `width`. out: `count` x `rows` exact sums.
  void (*int8_matmul)(const int8_t* a, const int8_t* b, int64_t count, int64_t rows, int64_t width, int32_t* out,
                      int threads);

  // out: sums scaled by row_stats x col_stats / 127^2, plus a bias of `columns` values of `bias_dtype` or null.
  void (*int8_mm_dequant)(const int32_t* sums, const float* row_stats, const float* col_stats, int64_t rows,
                          int64_t columns, const void* bias, int bias_dtype, void* out, int dtype, int threads);

  // Both in one. With `outlier_count` columns, a times the weight there is added in floating point; x is
  // then what `a` was quantized from, of `dtype`.
  void (*int8_scaled_mm)(const int8_t* a, const int8_t* b, const float* row_stats, const float* col_stats,
                         int64_t count, int64_t rows, int64_t width, const void* x, const int64_t* outlier_columns,
                         int64_t outlier_count, const void* bias, int bias_dtype, void* out, int dtype, int threads);

  // x: `count` x `width`, quantized row by row on the way.
  void (*int8_linear)(const void* x, int dtype, int64_t count, const int8_t* b, const float* col_stats, int64_t rows,
                      int64_t width, float threshold, const void* bias, int bias_dtype, void* out, int threads);

  // --- optimizers: optim32-inl.h, optim8-inl.h -------------------------------------------------------
  //
  // One step of `tensors` tensors. `rule` is a number of bnb::Rule. `table`: columns of `tensors` entries: the
  // counts of elements, then the addresses of gradients, parameters (both of `dtype`), first states and second
  // states. A column of second states is there if the rule has them. steps: number of each tensor's step.
  // schedule: null, or lr, step, beta3, alpha of each tensor, in place of those arguments. seeds: null, or one
  // per tensor to round bfloat16 parameters stochastically. param_norms: null to compute them where max_unorm > 0.
  // update_norms: null, or where to put the norms of the updates, then.
  void (*optimizer_step_32bit)(int rule, int64_t tensors, const int64_t* table, int dtype, const int64_t* steps,
                               const double* schedule, const int64_t* seeds, double lr, double beta1, double beta2,
                               double beta3, double alpha, double eps, double weight_decay, double gnorm_scale,
                               double max_unorm, const double* param_norms, float* update_norms, bool skip_zeros,
                               int threads);

  // The same with states of one byte. The table has a column with the addresses of their absmax after each
  // column of states. qmap1, qmap2: codebooks of 256 ascending values. With skip_zeros a block without any
  // gradient keeps its codes.
  void (*optimizer_step_8bit)(int rule, int64_t tensors, const int64_t* table, int dtype, const float* qmap1,
                              const float* qmap2, const int64_t* steps, const double* schedule, const int64_t* seeds,
                              double lr, double beta1, double beta2, double beta3, double alpha, double eps,
                              double weight_decay, double gnorm_scale, double max_unorm, bool skip_zeros, int threads);
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
namespace avx512bf16 {
extern const Kernels table;
}
namespace amx {
extern const Kernels table;
}
namespace amxportable {
extern const Kernels table;
}
namespace neon {
extern const Kernels table;
}
namespace neondot {
extern const Kernels table;
}

}  // namespace bnb_cpu
