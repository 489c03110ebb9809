// Products with a 4-bit weight. Few rows of activations go through gemm4_dot-inl.h or gemm4_fixed-inl.h; for more,
// panels of the weight are decoded into the cache and multiplied there, so that a code is looked up once per few
// hundred rows. The decoded weight as a whole never exists.
#pragma once

#include "gemm4_operands-inl.h"
#include "table.h"

namespace bnb_cpu {
namespace BNB_ISA {

// --- activations times the transposed weight -------------------------------------------------------------

// Elements [first, last) of a group for `lane_count` lanes, one by one.
template <class Operands, class T>
void pack_scalars(const T* a, int64_t width, bool grouped_order, int64_t lane_count, int64_t first, int64_t last,
                  typename Operands::Word* words, int64_t lanes) {
  for (int64_t lane = 0; lane < lane_count; ++lane) {
    for (int64_t k = first; k < last; ++k) {
      const int64_t place = grouped_order ? Operands::place(k) : k;
      Operands::set(words + place / Operands::kPerWord * lanes + lane, place % Operands::kPerWord, a[lane * width + k]);
    }
  }
}

// Activations along the lanes, elements of a row along the steps in the order of the weight.
template <class Operands, class T>
void pack_activations(const T* a, int64_t width, bool grouped_order, int64_t lane_count, int64_t step, int64_t steps,
                      typename Operands::Word* words, int64_t lanes) {
  using Word = typename Operands::Word;
  constexpr int kPerWord = Operands::kPerWord;
  const int64_t first = step * kPerWord, last = min_of((step + steps) * kPerWord, width);
  if (lane_count < lanes || last < (step + steps) * kPerWord) {
    memset(words, 0, static_cast<size_t>(steps * lanes) * sizeof(*words));
  }
  // Group by group, so that what is written stays in the first-level cache.
  constexpr int64_t kBlock = kLanes * kPerWord;
  for (int64_t group = first; group < last; group += kGroup) {
    const int64_t count = min_of(kGroup, last - group), whole = count / kBlock * kBlock;
    Word* const to = words + (group - first) / kPerWord * lanes;
    for (int64_t lane = 0; lane < lane_count; lane += kLanes) {
      const int64_t here = min_of(kLanes, lane_count - lane);
      for (int64_t k = 0; k < whole; k += kBlock) {
        F32 block[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const F32 row = i < here ? Operands::words_at(a + (lane + i) * width + group + k) : splat(0.0f);
          block[i] = grouped_order ? Operands::arranged(row) : row;
        }
        transpose(block);
        for (int i = 0; i < kLanes; ++i) {
          Operands::Product::store(to + Operands::step_of(k, i, grouped_order) * lanes + lane, block[i]);
        }
      }
      pack_scalars<Operands>(a + lane * width + group, width, grouped_order, here, whole, count, to + lane, lanes);
    }
  }
}

template <class T, class Finish>
void multiply_many(const Weight4& weight, const T* a, int64_t count, int threads, const Finish& finish) {
  using Operands = typename OperandsOf<T>::type;
  using Word = typename Operands::Word;
  constexpr int kPerWord = Operands::kPerWord;
  const int64_t width = weight.width;
  multiply_blocked<typename Operands::Product>(
      threads, count, weight.rows, weight.padded_width() / kPerWord,
      [&](int64_t lane, int64_t lane_count, int64_t step, int64_t steps, Word* words, int64_t lanes) {
        pack_activations<Operands>(a + lane * width, width, weight.grouped_order, lane_count, step, steps, words,
                                   lanes);
      },
      [&](int64_t row, int64_t row_count, int64_t step, int64_t steps, Word* words, int64_t stride) {
        const Table16 table(weight.values);
        const int64_t k = step * kPerWord, elements = min_of(steps * kPerWord, width - k);
        for (int64_t r = 0; r < row_count; ++r) {
          Operands::decode(weight, table, row + r, k, elements, words + r * stride);
        }
      },
      [&](int64_t lane, int64_t lane_count, int64_t row, int64_t row_count, Word* sums, int64_t stride) {
        finish(lane, lane_count, row, row_count, reinterpret_cast<float*>(sums), stride);
      });
}

template <class T>
void multiply_4bit(const Weight4& weight, const T* a, int64_t count, Bias bias, T* out, int threads) {
  if (count == 0 || weight.rows == 0) {
    return;
  }
  using Operands = typename OperandsOf<T>::type;
  const int64_t few = rows_apart<typename Operands::Product::Tile>(count, few_rows<T>(weight));
  const int64_t many = count - few, features = weight.rows;
  if (many > 0) {
    multiply_many(weight, a, many, threads,
                  [&](int64_t lane, int64_t lane_count, int64_t row, int64_t row_count, float* sums, int64_t stride) {
                    for (int64_t r = 0; bias.given() && r < row_count; ++r) {
                      const F32 term = splat(bias[row + r]);
                      for (int64_t l = 0; l < lane_count; l += kLanes) {
                        store(sums + r * stride + l, load(sums + r * stride + l) + term);
                      }
                    }
                    store_transposed(sums, stride, lane_count, row_count, out + lane * features + row, features);
                  });
  }
  if (few > 0) {
    T* const to = out + many * features;
    multiply_few(weight, a + many * weight.width, few, threads,
                 [=](int64_t row, int64_t row_count, int64_t m, const float* sums) {
                   int64_t r = 0;
                   for (; r + kLanes <= row_count; r += kLanes) {
                     const F32 sum = load(sums + r);
                     store(to + m * features + row + r, bias.given() ? sum + bias.lanes(row + r) : sum);
                   }
                   for (; r < row_count; ++r) {
                     bnb::from_float(bias.given() ? sums[r] + bias[row + r] : sums[r], to[m * features + row + r]);
                   }
                 });
  }
}

// --- activations times the weight ---------------------------------------------------------------------------

// Here the lanes lie along the rows of the weight, in which direction it is decoded, and the steps across them.
constexpr int64_t kStreamSteps = 128;
constexpr int64_t kStreamLanes = 128;
constexpr int64_t kStreamRows = 512;

// c (+)= the product over a panel of `steps` steps and `lanes` lanes.
template <class Tile, class Word>
void multiply_panel(const Word* scalars, int64_t scalar_stride, int64_t rows, const Word* panel, int64_t lanes,
                    int64_t steps, Word* c, bool add) {
  const PackedTiles layout{lanes, even_piece(lanes, Tile::kWidth, kLanes)};
  for (int64_t lane = 0; lane < lanes; lane += layout.tile) {
    const int64_t width = layout.width_at(lane);
    for (int64_t r = 0; r < rows; r += Tile::kRows) {
      Tile::multiply(width, rows - r, scalars + r * scalar_stride, scalar_stride, panel + lane, lanes, steps,
                     c + r * kStreamLanes + lane, kStreamLanes, add);
    }
  }
}

// Stores sums of `count` elements from `k` on, in plain order. `k` is a multiple of kGroup.
template <class T>
void store_ordered(const float* sums, bool grouped_order, int64_t count, T* out) {
  float plain[kGroup];
  for (int64_t at = 0; at < count; at += kGroup) {
    const float* from = sums + at;
    if (grouped_order) {
      for (int64_t k = 0; k < kGroup; ++k) {
        plain[k] = sums[at + grouped(k)];
      }
      from = plain;
    }
    const int64_t here = min_of(kGroup, count - at);
    int64_t k = 0;
    for (; k + kLanes <= here; k += kLanes) {
      store(out + at + k, load(from + k));
    }
    for (; k < here; ++k) {
      bnb::from_float(from[k], out[at + k]);
    }
  }
}

template <class T>
void multiply_4bit_transposed(const Weight4& weight, const T* a, int64_t count, T* out, int threads) {
  using Operands = typename OperandsOf<T>::type;
  using Tile = typename Operands::Product::Tile;
  using Word = typename Operands::Word;
  if (count == 0 || weight.width == 0) {
    return;
  }
  constexpr int64_t kBlockRows = kStreamRows / Tile::kRows * Tile::kRows;
  const int64_t width = weight.width, weight_steps = ceil_divide(weight.rows, Operands::kPerWord);
  const int64_t steps = round_up(weight_steps, Tile::kUnitSteps), stride = steps + 16;
  const int64_t slab_rows =
      min_of(round_up(count, Tile::kRows),
             max_of(1, kSlabBytes / (stride * static_cast<int64_t>(sizeof(Word))) / kBlockRows) * kBlockRows);
  const int64_t block_rows = min_of(slab_rows, kBlockRows), lane_blocks = ceil_divide(width, kStreamLanes);
  const int64_t units = ceil_divide(slab_rows, block_rows) * lane_blocks;
  const int64_t parts = parts_of(threads, units, count * weight.rows * width);
  Scratch scratch(Scratch::bytes_for<Word>(slab_rows * stride) +
                  parts * (Scratch::bytes_for<Word>(kStreamSteps * kStreamLanes) +
                           Scratch::bytes_for<Word>(block_rows * kStreamLanes)));
  Word* const scalars = scratch.take<Word>(slab_rows * stride);
  Word* const panels = scratch.take<Word>(parts * kStreamSteps * kStreamLanes);
  Word* const sums = scratch.take<Word>(parts * block_rows * kStreamLanes);

  for (int64_t slab = 0; slab < count; slab += slab_rows) {
    const int64_t rows = min_of(slab_rows, count - slab), padded_rows = round_up(rows, Tile::kRows);
    parallel_parts(min_of(parts, padded_rows), padded_rows, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        Word* to = scalars + r * stride;
        memset(to, 0, static_cast<size_t>(stride) * sizeof(Word));
        if (r < rows) {
          Operands::copy_row(a + (slab + r) * weight.rows, weight.rows, to);
        }
      }
    });
    const int64_t row_blocks = ceil_divide(rows, block_rows);
    parallel_parts(min_of(parts, row_blocks * lane_blocks), row_blocks * lane_blocks,
                   [&](int64_t part, int64_t begin, int64_t end) {
                     [[maybe_unused]] const typename Tile::Setup setup{};
                     const Table16 table(weight.values);
                     Word* const panel = panels + part * kStreamSteps * kStreamLanes;
                     Word* const c = sums + part * block_rows * kStreamLanes;
                     for (int64_t unit = begin; unit < end; ++unit) {
                       const int64_t row = unit % row_blocks * block_rows, row_count = min_of(block_rows, rows - row);
                       const int64_t k = unit / row_blocks * kStreamLanes, elements = min_of(kStreamLanes, width - k);
                       const int64_t lanes = round_up(elements, kGroup);
                       if (steps == 0) {
                         memset(c, 0, static_cast<size_t>(block_rows * kStreamLanes) * sizeof(Word));
                       }
                       for (int64_t step = 0; step < steps; step += kStreamSteps) {
                         const int64_t step_count = min_of(kStreamSteps, steps - step);
                         const int64_t decoded = min_of(step_count, weight_steps - step);
                         for (int64_t s = 0; s < decoded; ++s) {
                           Operands::decode_lanes(weight, table, step + s, k, elements, panel + s * lanes);
                         }
                         memset(panel + decoded * lanes, 0,
                                static_cast<size_t>((step_count - decoded) * lanes) * sizeof(Word));
                         multiply_panel<Tile>(scalars + row * stride + step, stride, row_count, panel, lanes,
                                              step_count, c, step > 0);
                       }
                       for (int64_t r = 0; r < row_count; ++r) {
                         store_ordered(reinterpret_cast<const float*>(c + r * kStreamLanes), weight.grouped_order,
                                       elements, out + (slab + row + r) * width + k);
                       }
                     }
                   });
  }
}

// --- table -------------------------------------------------------------------------------------------------

// Calls body(weight) with the codebook of nested statistics extended to all 256 codes.
template <class Body>
void with_weight4(const uint8_t* packed, int64_t rows, int64_t width, const float* absmax, const uint8_t* absmax_8bit,
                  const float* code, int64_t code_size, const float* offset, int64_t blocksize, const float* values,
                  const Body& body) {
  float full_code[256];
  for (int64_t i = 0; absmax_8bit != nullptr && i < 256; ++i) {
    full_code[i] = code[min_of(i, code_size - 1)];
  }
  const uint8_t* planes = nullptr;
#if defined(__AVX512VBMI__)
  uint8_t bytes[kPlaneBytes];
  if (absmax_8bit != nullptr) {
    split_into_planes(full_code, bytes);
    planes = bytes;
  }
#endif
  const Absmax4 statistics{absmax, absmax_8bit, full_code, planes, absmax_8bit == nullptr ? 0.0f : *offset, 0};
  body(make_weight4(packed, rows, width, blocksize, values, statistics));
}

void gemm_4bit(const void* a, int dtype, int64_t count, const uint8_t* packed, int64_t rows, int64_t width,
               const float* absmax, const uint8_t* absmax_8bit, const float* code, int64_t code_size,
               const float* offset, int64_t blocksize, const float* table, int quant_type, const void* bias,
               int bias_dtype, void* out, int threads) {
  const float* values = table == nullptr ? tables_4bit(quant_type).values : table;
  with_weight4(
      packed, rows, width, absmax, absmax_8bit, code, code_size, offset, blocksize, values, [&](const Weight4& weight) {
        with_dtype(dtype, [&](auto type) {
          using T = typename decltype(type)::type;
          multiply_4bit(weight, static_cast<const T*>(a), count, Bias{bias, bias_dtype}, static_cast<T*>(out), threads);
        });
      });
}

void gemm_4bit_transposed(const void* a, int dtype, int64_t count, const uint8_t* packed, int64_t rows, int64_t width,
                          const float* absmax, const uint8_t* absmax_8bit, const float* code, int64_t code_size,
                          const float* offset, int64_t blocksize, int quant_type, void* out, int threads) {
  with_weight4(packed, rows, width, absmax, absmax_8bit, code, code_size, offset, blocksize,
               tables_4bit(quant_type).values, [&](const Weight4& weight) {
                 with_dtype(dtype, [&](auto type) {
                   using T = typename decltype(type)::type;
                   multiply_4bit_transposed(weight, static_cast<const T*>(a), count, static_cast<T*>(out), threads);
                 });
               });
}

constexpr void fill_gemm4(Kernels& kernels) {
  kernels.gemm_4bit = gemm_4bit;
  kernels.gemm_4bit_transposed = gemm_4bit_transposed;
}

}  // namespace BNB_ISA
}  // namespace bnb_cpu
