// Choice of the instruction set at run time.
#pragma once

#include <string>
#include <vector>

#include "table.h"

namespace bnb_cpu {

// The kernels in use. At first those of the best instruction set that the processor and the operating
// system support, or of the one that the environment variable BNB_CPU_ISA names.
const Kernels& kernels();

// Name of the instruction set in use.
std::string isa();

// Names that this build has, best first; "scalar" is always the last.
std::vector<std::string> isas();

// Those of them that this machine supports, in the same order.
std::vector<std::string> supported_isas();

// Use another one. Throws std::invalid_argument when the name is unknown or not supported here.
void set_isa(const std::string& name);

}  // namespace bnb_cpu
