// Few rows of half-precision activations times a 4-bit weight, element by element against sums in double precision:
// activations that are hard on kernels which give several of them one unit.
#include <memory>

#include "quant_model.h"

using namespace testing;

namespace {

enum Kind { kNormal, kOutliers, kHiddenOutliers, kLargest, kWide, kSubnormal, kSmall, kSparse, kNotFinite, kKinds };
const char* const kKindNames[] = {"normal",  "outliers",   "outliers of weight zero",
                                  "largest", "wide range", "subnormal",
                                  "small",   "sparse",     "not finite"};

bool is_outlier(int64_t k) { return k % 32 == 5; }

float activation(Random& random, Kind kind, int dtype, int64_t row, int64_t k) {
  const bool half = dtype == 1;
  const float normal = value_of_kind(random, 0);
  switch (kind) {
    case kOutliers:
    case kHiddenOutliers:
      return is_outlier(k) ? 1e4f * (1.0f + std::fabs(normal)) : normal;
    case kLargest:  // All of one sign in the first row.
      return (half ? 65504.0f : 0x1.fep+100f) * (row == 0 || normal > 0 ? 1.0f : -1.0f);
    case kWide:
      return std::ldexp(normal, static_cast<int>(between(random, half ? -14 : -60, half ? 8 : 20)));
    case kSubnormal:
      return k % 4 == 0 ? normal : normal * (half ? 1e-6f : 1e-39f);
    case kSmall:
      return normal * (half ? 1e-5f : 1e-33f);
    case kSparse:
      return k % 50 == row ? normal : 0.0f;
    case kNotFinite:
      return row == 1 && k % 70 == 3 ? (k % 140 == 3 ? INFINITY : NAN) : normal;
    default:
      return normal;
  }
}

struct Shape {
  int64_t count, rows, width, blocksize;
};

void check(const Shape& shape, Kind kind, int dtype, Random& random) {
  const auto [count, rows, width, blocksize] = shape;
  const auto place = between(random, 0, 1) == 0 ? Guarded::kAtEnd : Guarded::kAtStart;
  const int quant_type = static_cast<int>(between(random, 0, 1));
  const bool nested = between(random, 0, 1) == 1, own_table = between(random, 0, 4) == 0;
  const int64_t elements = rows * width, blocks = (elements + blocksize - 1) / blocksize;
  const std::string where = bnb_cpu::isa() + " " + std::to_string(count) + "x" + std::to_string(rows) + "x" +
                            std::to_string(width) + " blocksize " + std::to_string(blocksize) + " " +
                            kDtypeNames[dtype] + (nested ? " nested " : " ") + kKindNames[kind];

  // With the largest activations a block is all ones, so that its sum is the largest as well.
  const int one = quant_type == 0 ? 15 : 3, zero = quant_type == 0 ? 7 : 0;
  std::vector<uint8_t> packed(static_cast<size_t>(elements / 2));
  const auto code_at = [&](int64_t i) {
    const uint8_t byte = packed[static_cast<size_t>(i / 2)];
    return i % 2 == 0 ? byte / 16 : byte % 16;
  };
  for (int64_t i = 0; i < elements; ++i) {
    const bool hidden = kind == kHiddenOutliers && is_outlier(i % width);
    const int code = hidden ? zero : kind == kLargest && i < width ? one : static_cast<int>(between(random, 0, 15));
    uint8_t& byte = packed[static_cast<size_t>(i / 2)];
    byte = static_cast<uint8_t>(i % 2 == 0 ? code << 4 | (byte & 15) : (byte & 0xf0) | code);
  }
  std::vector<float> table(values_4bit(quant_type), values_4bit(quant_type) + 16);
  for (float& value : table) {
    value *= own_table ? 3.5f : 1.0f;
  }
  // Small enough for results of float16.
  const float most = dtype == 1 ? 1e-6f : 0.1f;
  std::vector<float> absmax, code = random_code(random, 256);
  std::vector<uint8_t> inner;
  for (int64_t i = 0; i < (nested ? (blocks + 255) / 256 : blocks); ++i) {
    absmax.push_back(most * (1.0f + std::fabs(value_of_kind(random, 0))));
  }
  for (int64_t i = 0; i < blocks; ++i) {
    inner.push_back(static_cast<uint8_t>(random()));
  }
  const float offset = most / 4;
  const auto weight = [&](int64_t i) {
    const auto block = static_cast<size_t>(i / blocksize);
    const float scale = nested ? code[inner[block]] * absmax[block / 256] + offset : absmax[block];
    return static_cast<double>(table[static_cast<size_t>(code_at(i))]) * scale;
  };
  std::vector<float> a;
  for (int64_t i = 0; i < count * width; ++i) {
    a.push_back(activation(random, kind, dtype, i / width, i % width));
  }
  a = rounded(a, dtype);

  const auto guarded = [place](const auto& values) {
    auto memory = std::make_unique<Guarded>(static_cast<int64_t>(values.size() * sizeof values[0]), place);
    memory->fill(values.data());
    return memory;
  };
  const Guarded in(count * width * 2, place), out(count * rows * 2, place);
  write_elements(a, dtype, in.as<void>());
  const auto packed_memory = guarded(packed), absmax_memory = guarded(absmax), code_memory = guarded(code),
             inner_memory = guarded(inner), table_memory = guarded(table);
  bnb_cpu::kernels().gemm_4bit(in.as<void>(), dtype, count, packed_memory->as<uint8_t>(), rows, width,
                               absmax_memory->as<float>(), nested ? inner_memory->as<uint8_t>() : nullptr,
                               nested ? code_memory->as<float>() : nullptr, nested ? 256 : 0, &offset, blocksize,
                               own_table ? table_memory->as<float>() : nullptr, quant_type, nullptr, 0, out.as<void>(),
                               static_cast<int>(between(random, 1, 3)));
  out.check("out");

  // Rounding each weight to the type, summing in float, and rounding the result.
  const double unit = dtype == 1 ? 0x1p-11 : 0x1p-8, step = dtype == 1 ? 0x1p-24 : 0x1p-133;
  const double of_sum = unit * 1.01 + static_cast<double>(width + 8) * 0x1p-24;
  const std::vector<float> results = read_elements(out.as<void>(), dtype, count * rows);
  for (int64_t m = 0; m < count; ++m) {
    for (int64_t n = 0; n < rows; ++n) {
      double sum = 0, size = 0;
      for (int64_t k = 0; k < width; ++k) {
        const double product = static_cast<double>(a[static_cast<size_t>(m * width + k)]) * weight(n * width + k);
        sum += product;
        size += std::fabs(product);
      }
      const float result = results[static_cast<size_t>(m * rows + n)];
      const bool close = std::fabs(result - sum) <= size * of_sum + std::fabs(sum) * unit * 1.01 + step;
      CHECK(std::isfinite(sum) ? close : !std::isfinite(result), "%s: [%d, %d] is %g instead of %g", where.c_str(),
            static_cast<int>(m), static_cast<int>(n), static_cast<double>(result), sum);
    }
  }
}

}  // namespace

int main() {
  for (const std::string& isa : bnb_cpu::supported_isas()) {
    bnb_cpu::set_isa(isa);
    Random random(5);
    for (int kind = 0; kind < kKinds; ++kind) {
      for (const int dtype : {1, 2}) {
        for (const int64_t count : {1, 2, 3, 4, 5, 8, 9, 16, 24, 25}) {
          const Shape shape{count, between(random, 1, 20), one_of<int64_t>(random, {64, 128, 192, 256, 576}),
                            one_of<int64_t>(random, {32, 64, 128, 512})};
          check(shape, static_cast<Kind>(kind), dtype, random);
        }
        // Rows of other than whole groups, blocks that are too short or begin anywhere, and long rows.
        for (const auto& shape : {Shape{2, 5, 96, 32},
                                  {3, 4, 72, 64},
                                  {1, 6, 128, 16},
                                  {4, 3, 320, 256},
                                  {2, 18, 4160, 64},
                                  {5, 2, 8192, 4096}}) {
          check(shape, static_cast<Kind>(kind), dtype, random);
        }
      }
    }
  }
  return 0;
}
