// AVX-512 with VNNI: Intel since Ice Lake and Cascade Lake, AMD since Zen 4.
#if defined(__x86_64__)

#include "target.h"
EXPERTD_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

#include "lanes_avx512.h"

#include "lane_kernels.h"

EXPERTD_TARGET_END

namespace expertd {
namespace {
bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
}  // namespace

extern const Isa kAvx512 = isa_of("avx512", runs_here);

}  // namespace expertd

#endif
