// The path that runs on any processor.
#include "lanes_portable.h"

#include "lane_kernels.h"

namespace expertd {

extern const Isa kPortable = isa_of("portable", [] { return true; });

}  // namespace expertd
