// AVX2 with FMA and F16C: Intel since Haswell, AMD since Excavator.
#if defined(__x86_64__)

#include <cpuid.h>

#include "target.h"
EXPERTD_TARGET_BEGIN("avx2,fma,f16c")

#include "lanes_avx2.h"

#include "lane_kernels.h"

EXPERTD_TARGET_END

namespace expertd {
namespace {
bool runs_here() {
  unsigned eax, ebx, ecx, edx;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;  // Clang's builtin lacks it
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
}  // namespace

extern const Isa kAvx2 = isa_of("avx2", runs_here);

}  // namespace expertd

#endif
