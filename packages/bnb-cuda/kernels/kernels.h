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

// --- gemm4_*.cu ------------------------------------------------------------------------------------
// out = a @ weight.T + bias for a packed weight of shape (n, k) and m rows of a; float16 or bfloat16. The
// nested block size of the statistics is a power of two.
struct Gemm4 {
  const void* a;  // (m, k)
  int dtype;
  int64_t m, n, k;
  const uint8_t* packed;
  Statistics statistics;
  int64_t blocksize;
  int quant_type;
  const void* bias;  // n values of `bias_dtype`, or null
  int bias_dtype;
  void* out;  // (m, n)
};

// Whether the fused kernels take these sizes: k a multiple of 64, blocks of 32 or a multiple of 64.
bool gemm_4bit_fits(int64_t n, int64_t k, int64_t blocksize, int dtype, int capability);
// Up to 16 rows: the warps of a thread block share rows of the weight and split k.
void gemm_4bit_few(const Launch&, const Gemm4&);
// The same on compute capabilities 9.0 to 10.x, which have the shared memory for it: k a multiple of 256, nested blocks
// of 4 at least.
void gemm_4bit_stream(const Launch&, const Gemm4&);
// Thread blocks of the largest cluster that may be launched anywhere.
constexpr int kMostSplit = 8;
// Any number of rows; `split` thread blocks of a cluster share k (1 where there are no clusters).
void gemm_4bit_tiles(const Launch&, const Gemm4&, int split);
// The same on compute capability 9.0, blocks of a multiple of 64.
void gemm_4bit_groups(const Launch&, const Gemm4&, int split);
// The same, for very many rows of activations.
void gemm_4bit_wide(const Launch&, const Gemm4&);
// A few rows in any dtype, of any size, block size and table of 16 values: plain float32 arithmetic.
void gemv_4bit(const Launch&, const Gemm4&, const float* code);

// --- int8_quant*.cu ---------------------------------------------------------------------------------
// Outlier columns of a matrix, found on the device. `flags` has one bit per column, and more words for their
// quantization (outlier_flag_words); `columns` lists the set bits in ascending order. `count` has kCountWords: their
// number and words that are 0, by which a product hands out work to its thread blocks. Products take columns that
// anybody has listed in that order, without flags, too, and each needs words of its own.
//
// Of few rows whose codes are not cleared in outlier columns, quantization leaves the flags to the product, row by row
// (product_merges_flags): of the columns there is no list then, and of `count` only the words that are 0.
struct Outliers {
  static constexpr int kCountWords = 3;
  // Lists of columns with flags are filled up to so many with column 0, as far as there are columns, so that they can
  // be read before their length is known.
  static constexpr int kFilled = 32;
  unsigned* flags;
  int* columns;
  int* count;
};

// Words of flags that quantization of such a matrix needs.
int64_t outlier_flag_words(int64_t rows, int64_t columns);
// Whether it leaves the flags of rows to the product, given whether the codes are cleared.
bool product_merges_flags(int64_t rows, int64_t columns, bool cleared);

// Codes and absmax per row. With a threshold: outliers do not count, they get code 0, and so do their columns if
// `cleared`; the columns are listed in `outliers` (null pointers without a threshold), or left to the product.
void int8_quantize_rows(const Launch&, const void* x, int dtype, int64_t rows, int64_t columns, float threshold,
                        int8_t* codes, float* absmax, const Outliers& outliers, bool cleared);
// Codes per row and per column with their absmax, from one pass for the statistics and one for the codes.
void int8_double_quantize(const Launch&, const void* x, int dtype, int64_t rows, int64_t columns, float threshold,
                          int8_t* row_codes, int8_t* column_codes, float* row_absmax, float* column_absmax,
                          const Outliers& outliers);
void int8_dequantize_rows(const Launch&, const int8_t* codes, const float* absmax, int64_t rows, int64_t columns,
                          void* out, int dtype);

// --- int8_gemm_*.cu --------------------------------------------------------------------------------
// out = (a @ b.T) * a_absmax * b_absmax / 127^2 + bias, plus the product of the outlier columns of
// `values`, the floating point matrix that `a` was quantized from.
struct Gemm8 {
  const int8_t* a;  // (m, k)
  const int8_t* b;  // (n, k)
  int64_t m, n, k;
  const float* a_absmax;
  const float* b_absmax;
  const void* values;  // (m, k) of `dtype`, with outliers
  Outliers outliers;   // null pointers without
  bool cleared;        // whether `a` has code 0 in the outlier columns; only int8_gemm_groups takes others
  // Only for int8_gemm_groups with outliers: memory of `dtype` for `room` outlier columns of b and of `values`, side by
  // side, a matrix (n + m, room). More columns than that it finds by the flags; lists without flags have room for all.
  void* gathered;
  int64_t room;
  const void* bias;  // n values of `bias_dtype`, or null
  int bias_dtype;
  void* out;  // (m, n)
  int dtype;
};

// Whether the kernels below take these sizes: k a multiple of 16.
bool int8_gemm_fits(int64_t n, int64_t k, int capability);
void int8_gemm_few(const Launch&, const Gemm8&);    // up to 16 rows
void int8_gemm_tiles(const Launch&, const Gemm8&);  // any number of rows
// The same on compute capability 9.0, float16 or bfloat16.
void int8_gemm_groups(const Launch&, const Gemm8&);
// The same from `values` alone, which every thread block quantizes for itself: of the others, `a`, `a_absmax` and all
// that is about outliers are not used. Few rows, if the sizes fit.
bool int8_gemv_fits(int64_t m, int64_t n, int64_t k, int dtype, int capability);
void int8_gemv(const Launch&, const Gemm8&, float threshold);
// `room` is a multiple of this. For lists with flags it shall be what `gathered_room` says.
constexpr int kGatheredMultiple = 64;
int64_t gathered_room(int64_t k);
// The same from the integer product (m, n), computed elsewhere.
void int8_finish(const Launch&, const int32_t* product, const Gemm8&);

// --- optim*.cu -------------------------------------------------------------------------------------
// A step of many parameters. The table lies on the device: kColumns columns of `tensors` 64-bit numbers
// each, namely addresses of p, g, state1, state2, absmax1 and absmax2 (0 where there is none), number of
// elements, first unit of work (see optimizer_units), and seed of stochastic rounding (-1 without).
struct OptimizerStep {
  static constexpr int kColumns = 9;
  const int64_t* table;
  int64_t tensors;
  int64_t units;
  int rule;  // a number of bnb::Rule
  int dtype;
  double lr, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale, step, max_unorm;
  bool skip_zeros;
  const float* code1;  // codebooks of 256 values, null for float32 states
  const float* code2;
  const void* schedule;  // (tensors, 4): lr, step, beta3, alpha; or null
  bool schedule_double;  // float64, else float32
  void* workspace;       // see optimizer_workspace, or null where that is 0
};

// Fills the column of first units from that of elements, both in host memory; returns their number.
int64_t optimizer_units(const int64_t* elements, int64_t* first, int64_t tensors);
// Bytes of workspace that a step needs.
int64_t optimizer_workspace(int64_t tensors, int64_t units, double max_unorm, bool scheduled);
void optimizer_step(const Launch&, const OptimizerStep&);

// --- paging.cpp ------------------------------------------------------------------------------------
// Memory that both the host and the device can use, and that the driver moves to where it is used.
bool has_managed_memory(int device);
uintptr_t allocate_managed(int device, int64_t bytes);
void free_managed(uintptr_t address);
// Whether what is queued on the stream goes into a graph.
bool is_capturing(const Launch&);
void prefetch_managed(const Launch&, uintptr_t address, int64_t bytes, bool to_host);

}  // namespace bnb_gpu
