// AVX2 with FMA and F16C: Intel since Haswell, AMD since Excavator.
#if defined(__x86_64__)

#include "target.h"
EXPERTD_TARGET_BEGIN("avx2,fma,f16c")

#include "lanes_avx2.h"

#include "lane_kernels.h"

EXPERTD_TARGET_END

namespace expertd {
namespace {
bool runs_here() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
}  // namespace

extern const Isa kAvx2 = isa_of("avx2", runs_here);

}  // namespace expertd

#endif
