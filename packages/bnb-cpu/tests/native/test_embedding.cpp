// Rows of a 4-bit table against the rows of the dequantized table, on arrays between guard pages.
#include "quant_model.h"

using namespace testing;

namespace {

template <class Index>
void check_gather(Random& random) {
  const int64_t table_rows = between(random, 1, 40), width = between(random, 0, 90), count = between(random, 0, 30);
  const int64_t blocksize = one_of<int64_t>(random, {2, 16, 64, 100, 4096, int64_t{1} << 62});
  const int64_t elements = table_rows * width, blocks = elements / blocksize + (elements % blocksize != 0);
  const int64_t nested_blocksize = between(random, 1, 4);
  const int64_t outer_blocks = blocks / nested_blocksize + (blocks % nested_blocksize != 0);
  const int dtype = static_cast<int>(between(random, 0, 2)), quant_type = static_cast<int>(between(random, 0, 1));
  const bool nested = between(random, 0, 1) == 1;
  const auto place = between(random, 0, 1) == 0 ? Guarded::kAtEnd : Guarded::kAtStart;
  const std::string where = bnb_cpu::isa() + " embedding_4bit " + std::to_string(table_rows) + "x" +
                            std::to_string(width) + " blocksize " + std::to_string(blocksize) + " " +
                            kDtypeNames[dtype] + (nested ? " nested" : "");

  const Guarded packed((elements + 1) / 2, place), scales((nested ? outer_blocks : blocks) * 4, place);
  const Guarded inner(blocks, place), table(256 * 4, place),
      indices(count * static_cast<int64_t>(sizeof(Index)), place);
  const Guarded out(count * width * size_of(dtype), place), all(elements * size_of(dtype), place);
  const float offset = value_of_kind(random, 0);
  table.fill(random_code(random, 256).data());
  for (int64_t i = 0; i < packed.bytes(); ++i) {
    packed.as<uint8_t>()[i] = static_cast<uint8_t>(random());
  }
  for (int64_t i = 0; i < blocks; ++i) {
    inner.as<uint8_t>()[i] = static_cast<uint8_t>(random());
  }
  for (int64_t i = 0; i < scales.bytes() / 4; ++i) {
    scales.as<float>()[i] = value_of_kind(random, 0);
  }
  for (int64_t i = 0; i < count; ++i) {
    indices.as<Index>()[i] = static_cast<Index>(between(random, 0, table_rows - 1));
  }

  // The dequantization kernels have their own test.
  const bnb_cpu::Kernels& kernels = bnb_cpu::kernels();
  if (nested) {
    kernels.dequantize_4bit_nested(packed.as<uint8_t>(), scales.as<float>(), inner.as<uint8_t>(), table.as<float>(),
                                   256, &offset, elements, blocksize, nested_blocksize, quant_type, all.as<void>(),
                                   dtype, 1);
  } else {
    kernels.dequantize_4bit(packed.as<uint8_t>(), scales.as<float>(), elements, blocksize, quant_type, all.as<void>(),
                            dtype, 1);
  }
  const auto gather = [&] {
    return kernels.embedding_4bit(indices.as<void>(), sizeof(Index), count, packed.as<uint8_t>(), table_rows, width,
                                  scales.as<float>(), nested ? inner.as<uint8_t>() : nullptr,
                                  nested ? table.as<float>() : nullptr, nested ? 256 : 0, nested ? &offset : nullptr,
                                  blocksize, nested_blocksize, quant_type, out.as<void>(), dtype,
                                  static_cast<int>(between(random, 1, 4)));
  };
  CHECK(gather() == -1, "%s: good indices refused", where.c_str());
  const std::vector<float> rows = read_elements(all.as<void>(), dtype, elements);
  std::vector<float> expected;
  for (int64_t i = 0; i < count; ++i) {
    const auto row = rows.begin() + static_cast<int64_t>(indices.as<Index>()[i]) * width;
    expected.insert(expected.end(), row, row + width);
  }
  check_same_floats(read_elements(out.as<void>(), dtype, count * width), expected, where);
  out.check("out");

  if (count > 0) {
    const int64_t at = between(random, 0, count - 1);
    const std::vector<Index> bad{static_cast<Index>(-1), static_cast<Index>(table_rows),
                                 std::numeric_limits<Index>::min(), std::numeric_limits<Index>::max()};
    indices.as<Index>()[at] = one_of(random, bad);
    std::memset(out.as<void>(), 0x5a, static_cast<size_t>(out.bytes()));
    CHECK(gather() == at, "%s: a bad index was not found", where.c_str());
    for (int64_t i = 0; i < out.bytes(); ++i) {
      CHECK(out.as<uint8_t>()[i] == 0x5a, "%s: wrote in spite of a bad index", where.c_str());
    }
  }
}

}  // namespace

int main() {
  for (const std::string& isa : bnb_cpu::supported_isas()) {
    bnb_cpu::set_isa(isa);
    Random random(7);
    for (int i = 0; i < 1500; ++i) {
      check_gather<int64_t>(random);
      check_gather<int32_t>(random);
    }
  }
  return 0;
}
