// Conversions of 16-bit floats against their definition in double precision: every 16-bit pattern, every
// value halfway between two neighbours, and random ones.
#include <bnb/dtypes.h>

#include <cmath>

#include "testing.h"

namespace {

// Value of a format with `exponent_bits` and `fraction_bits`, by definition.
double decode(uint32_t bits, int exponent_bits, int fraction_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const double fraction = static_cast<double>(bits & ((1u << fraction_bits) - 1)) / (1 << fraction_bits);
  const double sign = bits >> (exponent_bits + fraction_bits) & 1 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) {
    return fraction == 0 ? sign * INFINITY : NAN;
  }
  return sign * (exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1 + fraction, exponent - bias));
}

bool same(double a, double b) { return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b); }

template <class Narrow>
struct Format;
template <>
struct Format<bnb::Half> {
  static constexpr int kExponentBits = 5, kFractionBits = 10;
  static bnb::Half narrow(float value) { return bnb::to_half(value); }
};
template <>
struct Format<bnb::BFloat16> {
  static constexpr int kExponentBits = 8, kFractionBits = 7;
  static bnb::BFloat16 narrow(float value) { return bnb::to_bfloat16(value); }
};

template <class Narrow>
double decoded(Narrow value) {
  return decode(value.bits, Format<Narrow>::kExponentBits, Format<Narrow>::kFractionBits);
}

// Whether `result` is `value` rounded to nearest, ties to even.
template <class Narrow>
void check_rounding(float value) {
  const Narrow result = Format<Narrow>::narrow(value);
  if (std::isnan(value)) {
    CHECK(std::isnan(decoded(result)), "NaN became %#x", result.bits);
    return;
  }
  CHECK((result.bits >> 15 != 0) == std::signbit(value), "%a lost its sign", static_cast<double>(value));
  // Neighbours by bit pattern; infinity stands for the next power of two, as rounding sees it.
  const uint16_t magnitude = result.bits & 0x7fffu;
  const auto size = [](uint16_t bits) {
    const Narrow narrow{bits};
    const double exact = decoded(narrow);
    return std::isinf(exact) ? std::ldexp(1.0, 1 << (Format<Narrow>::kExponentBits - 1)) : exact;
  };
  const double x = std::fabs(static_cast<double>(value)), here = size(magnitude);
  const bool even = (magnitude & 1) == 0;
  if (magnitude > 0) {
    const double low = (size(static_cast<uint16_t>(magnitude - 1)) + here) / 2;
    CHECK(x > low || (x == low && even), "%a became %#x, too large", static_cast<double>(value), result.bits);
  }
  if (!std::isinf(decoded(Narrow{magnitude}))) {
    const double high = (size(static_cast<uint16_t>(magnitude + 1)) + here) / 2;
    CHECK(x < high || (x == high && even), "%a became %#x, too small", static_cast<double>(value), result.bits);
  }
}

template <class Narrow>
void check_format() {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const Narrow narrow{static_cast<uint16_t>(bits)};
    const float wide = bnb::to_float(narrow);
    CHECK(same(static_cast<double>(wide), decoded(narrow)), "%#x became %a", bits, static_cast<double>(wide));
    check_rounding<Narrow>(wide);
    if (std::isfinite(wide)) {
      CHECK(Format<Narrow>::narrow(wide).bits == bits, "%#x does not survive", bits);
      const float next = bnb::to_float(Narrow{static_cast<uint16_t>(bits + 1)});
      const float halfway = std::isfinite(next) ? wide / 2 + next / 2 : wide;
      for (const float value : {halfway, std::nextafterf(halfway, INFINITY), std::nextafterf(halfway, -INFINITY)}) {
        check_rounding<Narrow>(value);
      }
    }
  }
  testing::Random random(1);
  for (int i = 0; i < 2000000; ++i) {
    check_rounding<Narrow>(testing::float_of(static_cast<uint32_t>(random())));
  }
  for (const float value : {65504.0f, 65519.99f, 65520.0f, 65536.0f, 3.4e38f, 0x1.fep127f, 0x1.ffp127f, 0x1p-24f,
                            0x1p-25f, 0x1.8p-25f, 0x1p-149f, INFINITY}) {
    check_rounding<Narrow>(value);
    check_rounding<Narrow>(-value);
  }
}

}  // namespace

int main() {
  check_format<bnb::Half>();
  check_format<bnb::BFloat16>();
  return 0;
}
