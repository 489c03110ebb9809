// Products of every instruction set against sums in double precision, on arrays between guard pages.
#include "quant_model.h"

using namespace testing;

namespace {

// Largest relative errors of a whole result, as in bitsandbytes.testing.tolerances: products with a 4-bit
// weight, which may be rounded to the type, and scaled integer products.
constexpr double kMatmulTolerance[3] = {1e-5, 0x1p-10, 0x1p-7};
constexpr double kScaledTolerance[3] = {1e-6, 0x1p-10, 0x1p-7};

// A matrix of doubles, and what a kernel made of it.
using Truth = std::vector<double>;

void check_close(const void* actual, int dtype, const Truth& truth, const double (&tolerance)[3],
                 const std::string& where) {
  const std::vector<float> values = read_elements(actual, dtype, static_cast<int64_t>(truth.size()));
  double error = 0, norm = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    error += (values[i] - truth[i]) * (values[i] - truth[i]);
    norm += truth[i] * truth[i];
  }
  CHECK(std::sqrt(error) <= tolerance[dtype] * std::sqrt(norm), "%s: relative error %g", where.c_str(),
        std::sqrt(error / norm));
}

// A guarded array of elements of a type, with the values as they are after rounding.
struct Elements {
  Elements(Random& random, int64_t count, int type, float scale, Guarded::Place place)
      : dtype(type), memory(count * size_of(type), place) {
    for (int64_t i = 0; i < count; ++i) {
      values.push_back(value_of_kind(random, 0) * scale);
    }
    values = rounded(values, dtype);
    write_elements(values, dtype, memory.as<void>());
  }
  double at(int64_t i) const { return values[static_cast<size_t>(i)]; }

  int dtype;
  Guarded memory;
  std::vector<float> values;
};

struct Call {
  explicit Call(Random& random)
      : count(one_of<int64_t>(random, {0, 1, 1, 2, 3, 5, 8, 17, 33, 70})),
        rows(between(random, 0, 4) == 0 ? between(random, 1, 150) : between(random, 1, 40)),
        width(between(random, 0, 3) == 0 ? between(random, 0, 600) : between(random, 0, 100)),
        dtype(static_cast<int>(between(random, 0, 2))),
        threads(static_cast<int>(between(random, 1, 4))),
        place(between(random, 0, 1) == 0 ? Guarded::kAtEnd : Guarded::kAtStart) {}
  Call(Random& random, int64_t count, int64_t rows, int64_t width) : Call(random) {
    this->count = count;
    this->rows = rows;
    this->width = width;
  }

  std::string describe(const char* kernel) const {
    return bnb_cpu::isa() + " " + kernel + " " + std::to_string(count) + "x" + std::to_string(rows) + "x" +
           std::to_string(width) + " " + kDtypeNames[dtype] + " threads " + std::to_string(threads);
  }

  int64_t count, rows, width;
  int dtype, threads;
  Guarded::Place place;
};

void check_gemm_4bit(const Call& call, Random& random) {
  const int64_t elements = call.rows * call.width;
  const int64_t blocksize = one_of<int64_t>(random, {2, 6, 32, 64, 128, 256, 4096});
  const int64_t blocks = elements / blocksize + (elements % blocksize != 0);
  const int quant_type = static_cast<int>(between(random, 0, 1));
  const bool nested = between(random, 0, 1) == 1, own_table = between(random, 0, 3) == 0;
  const int bias_dtype = static_cast<int>(between(random, 0, 2));
  const bool with_bias = between(random, 0, 1) == 1;

  const Guarded packed((elements + 1) / 2, call.place), inner(blocks, call.place);
  const Elements scales(random, nested ? (blocks + 255) / 256 : blocks, 0, 0.1f, call.place);
  const Elements bias(random, call.rows, bias_dtype, 1.0f, call.place), table(random, 16, 0, 1.0f, call.place);
  const std::vector<float> code = random_code(random, 256);
  const Guarded code_memory(256 * 4, call.place);
  code_memory.fill(code.data());
  const float offset = 0.25f;
  for (int64_t i = 0; i < packed.bytes(); ++i) {
    packed.as<uint8_t>()[i] = static_cast<uint8_t>(random());
  }
  for (int64_t i = 0; i < blocks; ++i) {
    inner.as<uint8_t>()[i] = static_cast<uint8_t>(random());
  }
  const auto weight = [&](int64_t i) {
    const uint8_t byte = packed.as<uint8_t>()[i / 2];
    const int64_t index = i % 2 == 0 ? byte / 16 : byte % 16, block = i / blocksize;
    const float scale = nested ? code[inner.as<uint8_t>()[block]] * static_cast<float>(scales.at(block / 256)) + offset
                               : static_cast<float>(scales.at(block));
    const float value = own_table ? static_cast<float>(table.at(index)) : values_4bit(quant_type)[index];
    return static_cast<double>(value * scale);
  };
  const uint8_t* codes = nested ? inner.as<uint8_t>() : nullptr;
  const float* codebook = nested ? code_memory.as<float>() : nullptr;

  const Elements a(random, call.count * call.width, call.dtype, 1.0f, call.place);
  const Guarded out(call.count * call.rows * size_of(call.dtype), call.place);
  Truth product;
  for (int64_t m = 0; m < call.count; ++m) {
    for (int64_t n = 0; n < call.rows; ++n) {
      double sum = with_bias ? bias.at(n) : 0.0;
      for (int64_t k = 0; k < call.width; ++k) {
        sum += a.at(m * call.width + k) * weight(n * call.width + k);
      }
      product.push_back(sum);
    }
  }
  bnb_cpu::kernels().gemm_4bit(a.memory.as<void>(), call.dtype, call.count, packed.as<uint8_t>(), call.rows, call.width,
                               scales.memory.as<float>(), codes, codebook, nested ? 256 : 0, nested ? &offset : nullptr,
                               blocksize, own_table ? table.memory.as<float>() : nullptr, quant_type,
                               with_bias ? bias.memory.as<void>() : nullptr, bias_dtype, out.as<void>(), call.threads);
  check_close(out.as<void>(), call.dtype, product, kMatmulTolerance, call.describe("gemm_4bit"));
  out.check("out");

  if (own_table) {
    return;
  }
  const Elements gradient(random, call.count * call.rows, call.dtype, 1.0f, call.place);
  const Guarded back(call.count * call.width * size_of(call.dtype), call.place);
  Truth transposed;
  for (int64_t m = 0; m < call.count; ++m) {
    for (int64_t k = 0; k < call.width; ++k) {
      double sum = 0;
      for (int64_t n = 0; n < call.rows; ++n) {
        sum += gradient.at(m * call.rows + n) * weight(n * call.width + k);
      }
      transposed.push_back(sum);
    }
  }
  bnb_cpu::kernels().gemm_4bit_transposed(gradient.memory.as<void>(), call.dtype, call.count, packed.as<uint8_t>(),
                                          call.rows, call.width, scales.memory.as<float>(), codes, codebook,
                                          nested ? 256 : 0, nested ? &offset : nullptr, blocksize, quant_type,
                                          back.as<void>(), call.threads);
  check_close(back.as<void>(), call.dtype, transposed, kMatmulTolerance, call.describe("gemm_4bit_transposed"));
  back.check("out");
}

// Codes of `size` values `stride` apart; outliers of at least `threshold` count as zero.
void model_quantize_int8(const std::vector<float>& x, int64_t first, int64_t size, int64_t stride, float threshold,
                         std::vector<int8_t>& codes, std::vector<float>& absmax) {
  const auto value_at = [&](int64_t i) {
    const float value = x[static_cast<size_t>(first + i * stride)];
    return threshold > 0 && std::fabs(value) >= threshold ? 0.0f : value;
  };
  float most = 0;
  for (int64_t i = 0; i < size; ++i) {
    const float magnitude = std::fabs(value_at(i));
    most = std::isnan(magnitude) || std::isnan(most) ? NAN : std::max(most, magnitude);
  }
  absmax.push_back(most);
  for (int64_t i = 0; i < size; ++i) {
    const float scale = 1.0f / most * 127.0f;  // The reciprocal is part of the format.
    const float scaled = std::isinf(scale) ? value_at(i) / most * 127.0f : value_at(i) * scale;
    codes[static_cast<size_t>(first + i * stride)] =
        static_cast<int8_t>(std::isnan(scaled) ? 0.0f : std::nearbyintf(scaled));
  }
}

std::vector<uint8_t> bytes_of(const std::vector<int8_t>& codes) { return {codes.begin(), codes.end()}; }

void check_int8_quant(const Call& call, Random& random) {
  const int64_t size = call.rows * call.width;
  const float threshold = one_of<float>(random, {0.0f, 0.0f, 2.0f, 100.0f});
  std::vector<float> x;
  const int kind = static_cast<int>(between(random, 0, 4));
  for (int64_t i = 0; i < size; ++i) {
    x.push_back(value_of_kind(random, kind));
  }
  x = rounded(x, call.dtype);
  const Guarded in(size * size_of(call.dtype), call.place), codes(size, call.place), absmax(call.rows * 4, call.place);
  const Guarded columns(call.width * 8, call.place), column_absmax(call.width * 4, call.place);
  write_elements(x, call.dtype, in.as<void>());

  std::vector<int8_t> expected(x.size());
  std::vector<float> statistics;
  std::vector<int64_t> outliers;
  for (int64_t row = 0; row < call.rows; ++row) {
    model_quantize_int8(x, row * call.width, call.width, 1, threshold, expected, statistics);
  }
  for (int64_t k = 0; threshold > 0 && k < call.width; ++k) {
    bool outlier = false;
    for (int64_t row = 0; row < call.rows; ++row) {
      outlier = outlier || std::fabs(x[static_cast<size_t>(row * call.width + k)]) >= threshold;
    }
    for (int64_t row = 0; outlier && row < call.rows; ++row) {
      expected[static_cast<size_t>(row * call.width + k)] = 0;
    }
    if (outlier) {
      outliers.push_back(k);
    }
  }
  const std::string where = call.describe("int8_vectorwise_quant") + " kind " + std::to_string(kind);
  const int64_t found = bnb_cpu::kernels().int8_vectorwise_quant(in.as<void>(), call.dtype, call.rows, call.width,
                                                                 threshold, codes.as<int8_t>(), absmax.as<float>(),
                                                                 columns.as<int64_t>(), call.threads);
  CHECK(found == static_cast<int64_t>(outliers.size()), "%s: %lld outlier columns", where.c_str(),
        static_cast<long long>(found));
  for (size_t i = 0; i < outliers.size(); ++i) {
    CHECK(columns.as<int64_t>()[i] == outliers[i], "%s: other outlier columns", where.c_str());
  }
  check_same_bytes(codes.as<uint8_t>(), bytes_of(expected), where);
  check_same_floats(read_elements(absmax.as<void>(), 0, call.rows), statistics, where);
  codes.check("codes");
  absmax.check("absmax");
  columns.check("outlier_columns");

  statistics.clear();
  for (int64_t k = 0; k < call.width; ++k) {
    model_quantize_int8(x, k, call.rows, call.width, threshold, expected, statistics);
  }
  bnb_cpu::kernels().int8_columnwise_quant(in.as<void>(), call.dtype, call.rows, call.width, threshold,
                                           codes.as<int8_t>(), column_absmax.as<float>(), call.threads);
  check_same_bytes(codes.as<uint8_t>(), bytes_of(expected), call.describe("int8_columnwise_quant"));
  check_same_floats(read_elements(column_absmax.as<void>(), 0, call.width), statistics,
                    call.describe("int8_columnwise_quant"));
  codes.check("codes");
  column_absmax.check("absmax");
}

void check_int8_products(const Call& call, Random& random) {
  const Guarded a(call.count * call.width, call.place), b(call.rows * call.width, call.place);
  const Guarded sums(call.count * call.rows * 4, call.place);
  for (const Guarded* side : {&a, &b}) {
    for (int64_t i = 0; i < side->bytes(); ++i) {
      // -128 is never produced by quantization, and allowed all the same.
      side->as<int8_t>()[i] = static_cast<int8_t>(between(random, 0, 9) == 0 ? -128 : between(random, -127, 127));
    }
  }
  bnb_cpu::kernels().int8_matmul(a.as<int8_t>(), b.as<int8_t>(), call.count, call.rows, call.width, sums.as<int32_t>(),
                                 call.threads);
  const Elements row_stats(random, call.count, 0, 1.0f, call.place), col_stats(random, call.rows, 0, 1.0f, call.place);
  const Elements bias(random, call.rows, static_cast<int>(between(random, 0, 2)), 1.0f, call.place);
  const bool with_bias = between(random, 0, 1) == 1;
  Truth scaled;
  for (int64_t m = 0; m < call.count; ++m) {
    for (int64_t n = 0; n < call.rows; ++n) {
      int64_t sum = 0;
      for (int64_t k = 0; k < call.width; ++k) {
        sum += int64_t{a.as<int8_t>()[m * call.width + k]} * b.as<int8_t>()[n * call.width + k];
      }
      CHECK(sums.as<int32_t>()[m * call.rows + n] == sum, "%s: %d, expected %lld", call.describe("int8_matmul").c_str(),
            sums.as<int32_t>()[m * call.rows + n], static_cast<long long>(sum));
      scaled.push_back(static_cast<double>(sum) * row_stats.at(m) * col_stats.at(n) / (127.0 * 127.0) +
                       (with_bias ? bias.at(n) : 0.0));
    }
  }
  sums.check("sums");

  const void* bias_data = with_bias ? bias.memory.as<void>() : nullptr;
  const Guarded out(call.count * call.rows * size_of(call.dtype), call.place);
  bnb_cpu::kernels().int8_mm_dequant(sums.as<int32_t>(), row_stats.memory.as<float>(), col_stats.memory.as<float>(),
                                     call.count, call.rows, bias_data, bias.dtype, out.as<void>(), call.dtype,
                                     call.threads);
  check_close(out.as<void>(), call.dtype, scaled, kScaledTolerance, call.describe("int8_mm_dequant"));
  out.check("out");

  const Elements x(random, call.count * call.width, call.dtype, 1.0f, call.place);
  std::vector<int64_t> columns;
  for (int64_t k = between(random, 0, 20); k < call.width; k += between(random, 1, 40)) {
    columns.push_back(k);
  }
  const Guarded column_memory(static_cast<int64_t>(columns.size()) * 8, call.place);
  column_memory.fill(columns.data());
  for (int64_t m = 0; m < call.count; ++m) {
    for (int64_t n = 0; n < call.rows; ++n) {
      for (const int64_t k : columns) {
        scaled[static_cast<size_t>(m * call.rows + n)] +=
            x.at(m * call.width + k) * b.as<int8_t>()[n * call.width + k] * col_stats.at(n) / 127.0;
      }
    }
  }
  bnb_cpu::kernels().int8_scaled_mm(
      a.as<int8_t>(), b.as<int8_t>(), row_stats.memory.as<float>(), col_stats.memory.as<float>(), call.count, call.rows,
      call.width, x.memory.as<void>(), column_memory.as<int64_t>(), static_cast<int64_t>(columns.size()), bias_data,
      bias.dtype, out.as<void>(), call.dtype, call.threads);
  check_close(out.as<void>(), call.dtype, scaled, kScaledTolerance, call.describe("int8_scaled_mm"));
  out.check("out");
}

// The layer in one call against its steps, which have been checked.
void check_int8_linear(const Call& call, Random& random) {
  const Elements x(random, call.count * call.width, call.dtype, 1.0f, call.place);
  const Elements col_stats(random, call.rows, 0, 1.0f, call.place);
  const Guarded b(call.rows * call.width, call.place), out(call.count * call.rows * size_of(call.dtype), call.place);
  for (int64_t i = 0; i < b.bytes(); ++i) {
    b.as<int8_t>()[i] = static_cast<int8_t>(between(random, -127, 127));
  }
  const float threshold = one_of<float>(random, {0.0f, 2.0f, 50.0f});
  std::vector<int8_t> codes(static_cast<size_t>(call.count * call.width) + 1);
  std::vector<float> absmax(static_cast<size_t>(call.count) + 1);
  std::vector<int64_t> columns(static_cast<size_t>(call.width) + 1);
  const bnb_cpu::Kernels& kernels = bnb_cpu::kernels();
  const int64_t outliers = kernels.int8_vectorwise_quant(x.memory.as<void>(), call.dtype, call.count, call.width,
                                                         threshold, codes.data(), absmax.data(), columns.data(), 1);
  const Guarded steps(out.bytes(), call.place);
  kernels.int8_scaled_mm(codes.data(), b.as<int8_t>(), absmax.data(), col_stats.memory.as<float>(), call.count,
                         call.rows, call.width, x.memory.as<void>(), columns.data(), outliers, nullptr, 0,
                         steps.as<void>(), call.dtype, 1);
  kernels.int8_linear(x.memory.as<void>(), call.dtype, call.count, b.as<int8_t>(), col_stats.memory.as<float>(),
                      call.rows, call.width, threshold, nullptr, 0, out.as<void>(), call.threads);
  const std::vector<float> expected = read_elements(steps.as<void>(), call.dtype, call.count * call.rows);
  check_close(out.as<void>(), call.dtype, Truth(expected.begin(), expected.end()), kScaledTolerance,
              call.describe("int8_linear"));
  out.check("out");
}

void check(const Call& call, Random& random) {
  check_gemm_4bit(call, random);
  check_int8_quant(call, random);
  check_int8_products(call, random);
  check_int8_linear(call, random);
}

}  // namespace

int main() {
  struct Shape {
    int64_t count, rows, width;
  };
  for (const std::string& isa : bnb_cpu::supported_isas()) {
    bnb_cpu::set_isa(isa);
    Random random(11);
    for (int i = 0; i < 150; ++i) {
      check(Call(random), random);
    }
    // Every width around those of vectors, and widths around those of panels: bytes are widened in whole vectors, and
    // the last row may end where the memory does. The counts are of one group of rows, of several, and of tiles.
    std::vector<int64_t> widths = {1023, 1024, 1025, 1039, 1040, 1041, 2047, 2048, 2049};
    for (int64_t width = 1; width <= 131; ++width) {
      widths.push_back(width);
    }
    for (const int64_t width : widths) {
      for (const int64_t count : {4, 7, 12, 13, 17}) {
        for (const Guarded::Place place : {Guarded::kAtEnd, Guarded::kAtStart}) {
          Call call(random, count, 7, width);
          call.place = place;
          check_int8_products(call, random);
        }
      }
    }
    // More than one block along each side, and more than one panel of steps.
    for (const auto& [count, rows, width] : {Shape{610, 20, 150}, {19, 300, 1100}, {40, 530, 264}, {7, 40, 4200}}) {
      for (int dtype = 0; dtype < 3; ++dtype) {
        Call call(random, count, rows, width);
        call.dtype = dtype;
        check(call, random);
      }
    }
  }
  return 0;
}
