// Products of matrices in blocks that fit the caches and tiles that fit the registers. The 4-bit and the
// int8 products share it: they differ in how operands are brought into the form below, and in what is done
// with the sums.
//
// A product has a vector side, whose rows lie along the lanes, and a scalar side, whose words are spread
// over all lanes. Both are read in words of 32 bits along the inner dimension ("steps"); a word holds one
// float, two bfloat16, two int16 or four int8.
#pragma once

#include "scratch-inl.h"
#include "transpose-inl.h"

namespace bnb_cpu {
namespace BNB_ISA {

// --- work for threads ----------------------------------------------------------------------------------

// Multiply-adds that make a thread's share.
constexpr int64_t kProductsPerThread = int64_t{1} << 17;

BNB_FN int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
BNB_FN int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
BNB_FN int64_t round_up(int64_t a, int64_t multiple) { return ceil_divide(a, multiple) * multiple; }

// Number of parts that `units` of work with `products` multiply-adds together are worth.
BNB_FN int64_t parts_of(int threads, int64_t units, int64_t products) {
  return max_of(1, min_of(min_of(threads, units), products / kProductsPerThread));
}

// Calls body(part, begin, end) for `parts` even parts of [0, count), in parallel.
template <class Body>
void parallel_parts(int64_t parts, int64_t count, const Body& body) {
  parallel(static_cast<int>(parts), parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      body(part, part * count / parts, (part + 1) * count / parts);
    }
  });
}

// How far ahead inner products ask for a weight of which they read `bytes` at a time, one row beside the other. Short
// rows are read through faster than memory answers.
BNB_FN int64_t prefetch_distance(int64_t bytes) { return max_of(bytes, 4096); }

// --- counts known to the compiler -------------------------------------------------------------------------

// Calls body(Count<n>{}) for the `n` that equals count, 1 to kMost.
template <int n>
struct Count {
  static constexpr int value = n;
};

template <int kMost, class Body>
void with_count(int64_t count, const Body& body) {
  if constexpr (kMost > 1) {
    if (count < kMost) {
      with_count<kMost - 1>(count, body);
      return;
    }
  }
  body(Count<kMost>{});
}

// --- one step of a product -----------------------------------------------------------------------------

template <class Product>
class VectorTile;

// Each kind of product names its word and what its sums are held in; for vectors also their type, and one step on
// all lanes.
struct FloatProduct {
  using Word = float;
  using Tile = VectorTile<FloatProduct>;
  using Sum = F32;
  static F32 zero() { return splat(0.0f); }
  static F32 load(const float* p) { return BNB_ISA::load(p); }
  static void store(float* p, F32 a) { BNB_ISA::store(p, a); }
  static F32 step(F32 sum, const float* lanes, float word) { return fma(BNB_ISA::load(lanes), splat(word), sum); }
};

// --- register tile ---------------------------------------------------------------------------------------

// Sums held in registers: kTileRows rows of the scalar side by up to kTileVectors vectors.
constexpr int kTileRows = kLanes == 1 ? 4 : kLanes == 16 ? 8 : 6;
constexpr int kTileVectors = kLanes == 16 ? 3 : kLanes == 8 ? 2 : 4;
constexpr int kTileLanes = kTileVectors * kLanes;

// c[r][lane] (+)= sum over steps of scalars[r][step] * lanes[step][lane].
template <class Product, int kVectors, int kRows = kTileRows>
void multiply_tile(const typename Product::Word* scalars, int64_t scalar_stride, const typename Product::Word* lanes,
                   int64_t lane_stride, int64_t steps, typename Product::Word* c, int64_t c_stride, bool add) {
  using Sum = typename Product::Sum;
  Sum sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = add ? Product::load(c + r * c_stride + v * kLanes) : Product::zero();
    }
  }
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = Product::step(sums[r][v], lanes + v * kLanes, scalars[r * scalar_stride + step]);
      }
    }
    lanes += lane_stride;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Product::store(c + r * c_stride + v * kLanes, sums[r][v]);
    }
  }
}

// The same for `lane_count` lanes, a multiple of kLanes up to kTileLanes.
template <class Product, int kRows = kTileRows>
void multiply_tile_of(int64_t lane_count, const typename Product::Word* scalars, int64_t scalar_stride,
                      const typename Product::Word* lanes, int64_t lane_stride, int64_t steps,
                      typename Product::Word* c, int64_t c_stride, bool add) {
  const int64_t vectors = lane_count / kLanes;
  if (vectors == kTileVectors) {
    multiply_tile<Product, kTileVectors, kRows>(scalars, scalar_stride, lanes, lane_stride, steps, c, c_stride, add);
  } else if (kTileVectors > 3 && vectors == 3) {
    multiply_tile<Product, 3, kRows>(scalars, scalar_stride, lanes, lane_stride, steps, c, c_stride, add);
  } else if (kTileVectors > 2 && vectors == 2) {
    multiply_tile<Product, 2, kRows>(scalars, scalar_stride, lanes, lane_stride, steps, c, c_stride, add);
  } else {
    multiply_tile<Product, 1, kRows>(scalars, scalar_stride, lanes, lane_stride, steps, c, c_stride, add);
  }
}

// What a product holds its sums in: here vectors, in gemm_amx-inl.h the registers of another unit.
template <class Product>
class VectorTile {
  using Word = typename Product::Word;

 public:
  // What a thread holds while it multiplies.
  struct Setup {};
  // Sizes of a tile, and what the steps of a product are a multiple of; the words beyond its end are zero.
  static constexpr int kRows = kTileRows;
  static constexpr int kWidth = kTileLanes;
  static constexpr int64_t kUnitSteps = 1;
  // A panel of the scalar side (128 KiB), one tile of the vector side over the same steps (up to 96 KiB) and
  // their sums (up to 144 KiB) stay in the second-level cache.
  static constexpr int64_t kPanelSteps = 512;
  static constexpr int64_t kPanelRows = 64 / kRows * kRows;
  // Whether rows that would leave most lanes of a last vector empty are better multiplied by themselves.
  static constexpr bool kRestApart = true;

  // multiply_tile for `lane_count` lanes, a multiple of kLanes up to kWidth, and at least `row_count` rows, of
  // which there are kRows in memory.
  static void multiply(int64_t lane_count, int64_t row_count, const Word* scalars, int64_t scalar_stride,
                       const Word* lanes, int64_t lane_stride, int64_t steps, Word* c, int64_t c_stride, bool add) {
    const auto call = [&](auto multiply_tile_of) {
      multiply_tile_of(lane_count, scalars, scalar_stride, lanes, lane_stride, steps, c, c_stride, add);
    };
    if (row_count == 1) {
      call(multiply_tile_of<Product, 1>);
    } else if (row_count <= kRows / 2) {
      call(multiply_tile_of<Product, kRows / 2>);
    } else {
      call(multiply_tile_of<Product, kRows>);
    }
  }
};

// Of `count` rows along the lanes, those that go to a kernel for up to `most` rows.
template <class Tile>
int64_t rows_apart(int64_t count, int64_t most) {
  if (count <= most) {
    return count;
  }
  const int64_t rest = count % kLanes;
  return Tile::kRestApart && rest <= min_of(most, kLanes / 2) ? rest : 0;
}

// --- blocks ------------------------------------------------------------------------------------------------

constexpr int64_t kBlockLanes = 576;
// Bound on the packed vector side; beyond it the product is done slab by slab.
constexpr int64_t kSlabBytes = int64_t{32} << 20;

// [0, total) in the fewest even pieces of at most `most`, each but the last a multiple of `unit`.
BNB_FN int64_t even_piece(int64_t total, int64_t most, int64_t unit) {
  return round_up(ceil_divide(total, max_of(1, ceil_divide(total, most))), unit);
}

// Rows of a block, more than half of `most`, with which whole blocks reach the least beyond `share`. All are multiples
// of `unit`.
BNB_FN int64_t even_block(int64_t share, int64_t most, int64_t unit) {
  int64_t best = min_of(most, share);
  for (int64_t block = best - unit; 2 * block > most; block -= unit) {
    best = round_up(share, block) < round_up(share, best) ? block : best;
  }
  return best;
}

// The vector side in memory: tile after tile, each [step][lane of the tile].
struct PackedTiles {
  int64_t lanes;  // a multiple of kLanes
  int64_t tile;   // lanes of a tile; the last one may be narrower

  int64_t width_at(int64_t lane) const { return min_of(tile, lanes - lane); }
};

// out[lane][row] for all `lane_rows` rows of the vector side and `rows` rows of the scalar side. The vector
// side is packed once; panels of the scalar side are made as they are needed, by each thread for itself.
//   pack(lane_begin, lane_count, step_begin, step_count, words, width): words[step * width + lane], zero beyond
//     lane_count up to `width`
//   fill(row_begin, row_count, step_begin, step_count, words, stride): words[row * stride + step]
//   finish(lane_begin, lane_count, row_begin, row_count, sums, stride): sums[row * stride + lane]; may
//     overwrite them, and the lanes up to the next multiple of kLanes exist
template <class Product, class Pack, class Fill, class Finish>
void multiply_blocked(int threads, int64_t lane_rows, int64_t rows, int64_t steps, const Pack& pack, const Fill& fill,
                      const Finish& finish) {
  using Word = typename Product::Word;
  using Tile = typename Product::Tile;
  constexpr int64_t kPanelSteps = Tile::kPanelSteps;
  // Off a power of two, so that the rows of a panel do not compete for the same lines of the cache.
  constexpr int64_t kPanelStride = kPanelSteps + 16;
  const int64_t slab_rows =
      max_of(1, kSlabBytes / (max_of(1, steps) * static_cast<int64_t>(sizeof(Word))) / kBlockLanes) * kBlockLanes;
  const int64_t slab_lanes = round_up(min_of(lane_rows, slab_rows), kLanes);
  // Small products get smaller blocks, so that each thread has as many of them. With a single tile of lanes a
  // panel is read once, and should not leave the first-level cache before that.
  const int64_t most_blocks = ceil_divide(slab_lanes, kBlockLanes);
  const int64_t share = round_up(ceil_divide(rows, max_of(1, threads / most_blocks)), Tile::kRows);
  const int64_t block_rows =
      even_block(share, slab_lanes <= Tile::kWidth ? Tile::kRows : Tile::kPanelRows, Tile::kRows);
  const int64_t row_blocks = ceil_divide(rows, block_rows);
  const int64_t parts = parts_of(threads, most_blocks * row_blocks, lane_rows * rows * steps);
  const int64_t c_stride = min_of(kBlockLanes, round_up(slab_lanes, Tile::kWidth));

  Scratch scratch(
      Scratch::bytes_for<Word>(slab_lanes * steps) +
      parts * (Scratch::bytes_for<Word>(block_rows * kPanelStride) + Scratch::bytes_for<Word>(block_rows * c_stride)));
  Word* const packed = scratch.take<Word>(slab_lanes * steps);
  Word* const panels = scratch.take<Word>(parts * block_rows * kPanelStride);
  Word* const sums = scratch.take<Word>(parts * block_rows * c_stride);

  for (int64_t slab = 0; slab < lane_rows; slab += slab_rows) {
    const int64_t count = min_of(slab_rows, lane_rows - slab), lanes = round_up(count, kLanes);
    const PackedTiles layout{lanes, even_piece(lanes, Tile::kWidth, kLanes)};
    const int64_t block = even_piece(lanes, kBlockLanes, layout.tile);
    // Tiles are packed in pieces, to have enough work for all.
    const int64_t tiles = ceil_divide(lanes, layout.tile), pieces = ceil_divide(steps, kPanelSteps);
    parallel_parts(min_of(parts, tiles * pieces), tiles * pieces, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t lane = piece / pieces * layout.tile, step = piece % pieces * kPanelSteps;
        const int64_t width = layout.width_at(lane);
        pack(slab + lane, min_of(width, count - lane), step, min_of(kPanelSteps, steps - step),
             packed + lane * steps + step * width, width);
      }
    });

    const int64_t blocks = ceil_divide(lanes, block);
    parallel_parts(min_of(parts, blocks * row_blocks), blocks * row_blocks,
                   [&](int64_t part, int64_t begin, int64_t end) {
                     [[maybe_unused]] const typename Tile::Setup setup{};
                     Word* const panel = panels + part * block_rows * kPanelStride;
                     Word* const c = sums + part * block_rows * c_stride;
                     for (int64_t unit = begin; unit < end; ++unit) {
                       const int64_t row = unit / blocks * block_rows, row_count = min_of(block_rows, rows - row);
                       const int64_t first = unit % blocks * block, last = min_of(lanes, first + block);
                       if (steps == 0) {
                         memset(c, 0, static_cast<size_t>(block_rows * c_stride) * sizeof(Word));
                       }
                       for (int64_t step = 0; step < steps; step += kPanelSteps) {
                         const int64_t step_count = min_of(kPanelSteps, steps - step);
                         fill(row, row_count, step, step_count, panel, kPanelStride);
                         for (int64_t r = row_count; r < round_up(row_count, Tile::kRows); ++r) {
                           memset(panel + r * kPanelStride, 0, static_cast<size_t>(step_count) * sizeof(Word));
                         }
                         for (int64_t lane = first; lane < last; lane += layout.tile) {
                           const int64_t width = layout.width_at(lane);
                           for (int64_t r = 0; r < row_count; r += Tile::kRows) {
                             Tile::multiply(width, row_count - r, panel + r * kPanelStride, kPanelStride,
                                            packed + lane * steps + step * width, width, step_count,
                                            c + r * c_stride + (lane - first), c_stride, step > 0);
                           }
                         }
                       }
                       finish(slab + first, min_of(last, count) - first, row, row_count, c, c_stride);
                     }
                   });
  }
}

// --- storing -----------------------------------------------------------------------------------------------

// out[lane * stride + row] = values[row * value_stride + lane]. The lanes up to the next multiple of kLanes exist.
template <class Word, class T>
void store_transposed(const Word* values, int64_t value_stride, int64_t lane_count, int64_t row_count, T* out,
                      int64_t stride) {
  using Vector = decltype(load(values));
  for (int64_t row = 0; row < row_count; row += kLanes) {
    const int64_t rows = min_of(kLanes, row_count - row);
    for (int64_t lane = 0; lane < lane_count; lane += kLanes) {
      const int64_t lanes = min_of(kLanes, lane_count - lane);
      Vector block[kLanes];
      for (int64_t r = 0; r < kLanes; ++r) {
        block[r] = load(values + (row + (r < rows ? r : 0)) * value_stride + lane);
      }
      transpose(block);
      for (int64_t l = 0; l < lanes; ++l) {
        T* const to = out + (lane + l) * stride + row;
        if (rows == kLanes) {
          store(to, block[l]);
        } else {
          T whole[kLanes];
          store(whole, block[l]);
          memcpy(to, whole, static_cast<size_t>(rows) * sizeof(T));
        }
      }
    }
  }
}

// A bias, which may have another dtype than the product, or null.
struct Bias {
  const void* data;
  int dtype;

  bool given() const { return data != nullptr; }

  float operator[](int64_t index) const {
    switch (static_cast<bnb::Dtype>(dtype)) {
      case bnb::Dtype::kFloat32:
        return static_cast<const float*>(data)[index];
      case bnb::Dtype::kFloat16:
        return bnb::to_float(static_cast<const bnb::Half*>(data)[index]);
      case bnb::Dtype::kBFloat16:
        return bnb::to_float(static_cast<const bnb::BFloat16*>(data)[index]);
    }
    return 0.0f;
  }

  // kLanes values from `index` on.
  F32 lanes(int64_t index) const {
    switch (static_cast<bnb::Dtype>(dtype)) {
      case bnb::Dtype::kFloat32:
        return load(static_cast<const float*>(data) + index);
      case bnb::Dtype::kFloat16:
        return load(static_cast<const bnb::Half*>(data) + index);
      case bnb::Dtype::kBFloat16:
        return load(static_cast<const bnb::BFloat16*>(data) + index);
    }
    return splat(0.0f);
  }
};

}  // namespace BNB_ISA
}  // namespace bnb_cpu
