#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(_MSC_VER) && defined(_M_X64)
#include <intrin.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_M_ARM64)
#define NOMINMAX
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#endif
#ifdef BNB_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bnb_cpu {
namespace {

#if defined(__x86_64__) || defined(_M_X64)
#define BNB_X86 1
#elif defined(__aarch64__) || defined(_M_ARM64)
#define BNB_ARM 1
#endif

bool always() { return true; }

#ifdef BNB_X86
#ifdef _MSC_VER
// What GCC's __builtin_cpu_supports asks for: the features, and that the operating system saves the
// registers (XCR0).
struct X86Features {
  bool avx2 = false, avx512 = false, avx512vnni = false, avx512bf16 = false;

  X86Features() {
    int leaf1[4], leaf7[4];
    __cpuid(leaf1, 1);
    const bool osxsave = leaf1[2] >> 27 & 1;
    if (!osxsave) {
      return;
    }
    const unsigned long long saved = _xgetbv(0);
    __cpuidex(leaf7, 7, 0);
    const auto b7 = [&](int bit) { return leaf7[1] >> bit & 1; };
    const auto c7 = [&](int bit) { return leaf7[2] >> bit & 1; };
    const bool fma = leaf1[2] >> 12 & 1, f16c = leaf1[2] >> 29 & 1;
    avx2 = (saved & 0x6) == 0x6 && b7(5) && b7(3) && b7(8) && fma && f16c;
    avx512 = avx2 && (saved & 0xe6) == 0xe6 && b7(16) && b7(17) && b7(30) && b7(31);
    avx512vnni = avx512 && c7(11) && c7(1);
    if (avx512vnni && leaf7[0] >= 1) {
      int leaf7_1[4];
      __cpuidex(leaf7_1, 7, 1);
      avx512bf16 = leaf7_1[0] >> 5 & 1;
    }
  }
};

const X86Features& features() {
  static const X86Features found;
  return found;
}

bool has_avx2() { return features().avx2; }
bool has_avx512() { return features().avx512; }
bool has_avx512vnni() { return features().avx512vnni; }
bool has_avx512bf16() { return features().avx512bf16; }
#else
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512vnni() {
  return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}

bool has_avx512bf16() { return has_avx512vnni() && __builtin_cpu_supports("avx512bf16"); }
#endif

#ifdef BNB_HAS_AMX
// Whether the processor has the tile registers and both products, and the operating system saves the registers.
bool has_tiles() {
  unsigned a, b, c, d;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) {
    return false;
  }
  constexpr unsigned kFeatures = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  // The instruction exists wherever AVX-512 may be used.
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kStates = 1u << 17 | 1u << 18;  // XTILECFG, XTILEDATA
  return (d & kFeatures) == kFeatures && (low & kStates) == kStates;
}

// Linux lets a process touch the data of the tiles once it has asked, since they make the frames of its signal
// handlers larger; the answer holds for all of its threads and for processes forked from it. The headers of the C
// library may be older than the request.
bool may_use_tiles() {
  constexpr long kGetPermission = 0x1022, kRequestPermission = 0x1023;  // ARCH_{GET,REQ}_XCOMP_PERM
  constexpr unsigned long kTileData = 18;                               // XFEATURE_XTILEDATA
  unsigned long granted = 0;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 &&
         syscall(SYS_arch_prctl, kGetPermission, &granted) == 0 && (granted >> kTileData & 1) != 0;
}

bool has_amx() {
  static const bool granted = has_avx512bf16() && has_tiles() && may_use_tiles();
  return granted;
}
#endif
#endif

#ifdef BNB_HAS_NEONDOT
// Whether the processor has the int8 dot products, an option of Armv8.2. Other systems do not say.
bool has_neondot() {
#if defined(__linux__)
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kDotProduct) != 0;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has != 0;
#elif defined(_WIN32)
  constexpr DWORD kDotProduct = 43;  // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE
  return IsProcessorFeaturePresent(kDotProduct) != 0;
#else
  return false;
#endif
}
#endif

struct Isa {
  const char* name;
  bool (*supported)();
  const Kernels* kernels;
};

// Best first.
constexpr Isa kIsas[] = {
#ifdef BNB_HAS_AMX
    {"amx", has_amx, &amx::table},
#endif
#ifdef BNB_X86
    {"avx512bf16", has_avx512bf16, &avx512bf16::table},
    {"avx512vnni", has_avx512vnni, &avx512vnni::table},
    {"avx512", has_avx512, &avx512::table},
    {"avx2", has_avx2, &avx2::table},
#ifdef BNB_HAS_AMXPORTABLE
    {"amxportable", has_avx512bf16, &amxportable::table},
#endif
#elif defined(BNB_ARM)
#ifdef BNB_HAS_NEONDOT
    {"neondot", has_neondot, &neondot::table},
#endif
    {"neon", always, &neon::table},
#endif
    {"scalar", always, &scalar::table},
};

constexpr const char* kVariable = "BNB_CPU_ISA";

[[noreturn]] void reject(const std::string& name, const char* why, const char* source) {
  std::string text = std::string(source) + ": instruction set '" + name + "' " + why + "; supported here:";
  for (const std::string& supported : supported_isas()) {
    text += " " + supported;
  }
  throw std::invalid_argument(text);
}

const Isa& find(const std::string& name, const char* source) {
  for (const Isa& isa : kIsas) {
    if (name == isa.name) {
      if (!isa.supported()) {
        reject(name, "is not supported by this machine", source);
      }
      return isa;
    }
  }
  reject(name, "is unknown to this build", source);
}

const Isa& first_choice() {
  const char* wanted = std::getenv(kVariable);
  if (wanted != nullptr && *wanted != '\0') {
    return find(wanted, kVariable);
  }
  const Isa* best = kIsas;
  while (!best->supported()) {
    ++best;
  }
  return *best;
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> isa{&first_choice()};
  return isa;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed)->kernels; }

std::string isa() { return current().load(std::memory_order_relaxed)->name; }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) {
    names.push_back(isa.name);
  }
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) {
    if (isa.supported()) {
      names.push_back(isa.name);
    }
  }
  return names;
}

void set_isa(const std::string& name) { current().store(&find(name, "set_isa"), std::memory_order_relaxed); }

}  // namespace bnb_cpu
