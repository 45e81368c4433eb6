// NEON with dot products (ARMv8.2 asimddp): Neoverse N1, Graviton 2 and Apple M1 on.
#if defined(__aarch64__)

#include "target.h"
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#if defined(__clang__)
EXPERTD_TARGET_BEGIN("dotprod")
#else
EXPERTD_TARGET_BEGIN("arch=armv8.2-a+dotprod")
#endif

#include "lanes_neon.h"

#include "lane_kernels.h"

EXPERTD_TARGET_END

namespace expertd {
namespace {
bool runs_here() {
#if defined(__linux__)
  constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kDotProducts) != 0;
#else
  return true;  // every other 64-bit ARM system we build for is Apple's, and has them
#endif
}
}  // namespace

extern const Isa kNeon = isa_of("neon", runs_here);

}  // namespace expertd

#endif
