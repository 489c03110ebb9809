// Which of the code in this module a device runs. It may be older than the device: then kernels that need what only the
// device has are empty, and must not be chosen.
#pragma once

namespace bnb_gpu {

// The architecture of the code for a device of this compute capability (90 for 9.0), or 0 if there is none. `built`
// lists the architectures as CMAKE_CUDA_ARCHITECTURES does, separated by commas. Machine code runs on devices of its
// generation that are not older, that of 9.0a on 9.0 alone; failing it the driver translates the newest PTX that is not
// too new.
constexpr int architecture_for(const char* built, int capability) {
  int machine_code = 0, ptx = 0;
  while (*built != '\0') {
    int number = 0;
    while (*built >= '0' && *built <= '9') {
      number = 10 * number + (*built++ - '0');
    }
    const bool exact = *built == 'a';
    while (*built != '\0' && *built != ',' && *built != '-') {
      ++built;
    }
    // "-real" or "-virtual"; both without.
    const bool is_real = *built != '-' || built[1] == 'r', is_virtual = *built != '-' || built[1] == 'v';
    while (*built != '\0' && *built++ != ',') {
    }
    if (number <= capability && (!exact || number == capability)) {
      if (is_real && number / 10 == capability / 10 && number > machine_code) {
        machine_code = number;
      }
      if (is_virtual && number > ptx) {
        ptx = number;
      }
    }
  }
  return machine_code > 0 ? machine_code : ptx;
}

static_assert(architecture_for("75-real,80-real,90a-real,120", 90) == 90, "the same architecture");
static_assert(architecture_for("75-real,80-real,90a-real,120", 89) == 80, "an older one of its generation");
static_assert(architecture_for("75-real,80-real,90a-real,100-real,120", 103) == 100, "generations of three digits");
static_assert(architecture_for("75-real,80-real,90a-real,120", 121) == 120, "machine code before PTX");
static_assert(architecture_for("80-real,120", 130) == 120, "PTX for what comes after");
static_assert(architecture_for("80-real,120-virtual", 130) == 120, "PTX alone");
static_assert(architecture_for("80", 90) == 80, "older PTX");
static_assert(architecture_for("80-real,90a", 100) == 0, "neither machine code nor PTX of 9.0a");
static_assert(architecture_for("80-real", 75) == 0, "nothing is that old");

}  // namespace bnb_gpu
