// The text of each thread's last error.
#include "errors.h"

#include <cstdio>

namespace expertd {
namespace {
thread_local char last_error[512] = "";
}

int report(int code, const char* text) noexcept {
  std::snprintf(last_error, sizeof last_error, "%s", text);
  return code;
}

}  // namespace expertd

extern "C" const char* expertd_error(void) { return expertd::last_error; }
extern "C" int32_t expertd_abi_version(void) { return EXPERTD_ABI_VERSION; }
