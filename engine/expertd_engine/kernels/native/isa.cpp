// Chooses the instruction set, once per process unless forced.
#include "isa.h"

#include <atomic>
#include <string>

#include "errors.h"

namespace expertd {
namespace {

const Isa* const kBuilt[] = {
#if defined(__x86_64__)
    &kAvx512, &kAvx2,
#elif defined(__aarch64__)
    &kNeon,
#endif
    &kPortable,  // last: it runs everywhere
};

std::atomic<const Isa*> in_use{nullptr};

const Isa* best() {
  for (const Isa* candidate : kBuilt) {
    if (candidate->runs_here()) return candidate;
  }
  return &kPortable;
}

std::string list_available() {
  std::string names;
  for (const Isa* candidate : kBuilt) {
    if (candidate->runs_here()) names += (names.empty() ? "" : " ") + std::string(candidate->name);
  }
  return names;
}

const std::string& available() {
  static const std::string names = list_available();
  return names;
}

const Isa* named(const std::string& name) {
  for (const Isa* candidate : kBuilt) {
    if (name == candidate->name && candidate->runs_here()) return candidate;
  }
  throw Refused("instruction set '" + name + "' cannot be used on this processor; available: " + available());
}

}  // namespace

const Isa& isa() {
  const Isa* chosen = in_use.load(std::memory_order_acquire);
  if (chosen == nullptr) {
    chosen = best();
    in_use.store(chosen, std::memory_order_release);
  }
  return *chosen;
}

}  // namespace expertd

using namespace expertd;

extern "C" const char* expertd_isa(void) { return isa().name; }

extern "C" const char* expertd_isa_available(void) { return available().c_str(); }

extern "C" int expertd_isa_use(const char* name) {
  return guarded([&] {
    require(name != nullptr, "name is null");
    in_use.store(*name == '\0' ? best() : named(name), std::memory_order_release);
  });
}
