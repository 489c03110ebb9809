// Choice of the instruction set. CTest sets BNB_CPU_ISA.
#include <algorithm>
#include <stdexcept>

#include "testing.h"

namespace {

template <class Function>
std::string error_of(Function function) {
  try {
    function();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

void check_unknown_variable() {
  // The first use fails, and so does each later one: no half-made choice stays behind.
  for (int i = 0; i < 2; ++i) {
    const std::string text = error_of([] { bnb_cpu::isa(); });
    CHECK(contains(text, "BNB_CPU_ISA") && contains(text, "mmx") && contains(text, "scalar"), "got '%s'", text.c_str());
  }
}

void check_choice() {
  CHECK(bnb_cpu::isa() == "scalar", "BNB_CPU_ISA=scalar gave %s", bnb_cpu::isa().c_str());
  const std::vector<std::string> names = bnb_cpu::supported_isas();
  CHECK(!names.empty() && names.back() == "scalar", "scalar is not the last");
  for (const std::string& name : bnb_cpu::isas()) {
    if (std::find(names.begin(), names.end(), name) == names.end()) {
      std::printf("No test runs %s: this machine does not support it.\n", name.c_str());
      CHECK(contains(error_of([&] { bnb_cpu::set_isa(name); }), "is not supported by this machine"), "%s was taken",
            name.c_str());
    }
  }
  for (const std::string& name : names) {
    bnb_cpu::set_isa(name);
    CHECK(bnb_cpu::isa() == name, "%s after set_isa(%s)", bnb_cpu::isa().c_str(), name.c_str());
    CHECK(bnb_cpu::kernels().quantize_4bit != nullptr, "%s has an empty table", name.c_str());
  }
  for (const char* name : {"", "AVX2", "sse9"}) {
    const std::string text = error_of([=] { bnb_cpu::set_isa(name); });
    CHECK(contains(text, "unknown") && contains(text, "scalar"), "got '%s'", text.c_str());
    CHECK(bnb_cpu::isa() == "scalar", "a failed set_isa changed the choice");
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "unknown") {
    check_unknown_variable();
  } else {
    check_choice();
  }
  return 0;
}
