// Which instructions the compiler may use between EXPERTD_TARGET_BEGIN and END. Standard headers that define functions
// must be included before: the linker keeps one copy of an inline function for all, and it must run everywhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "formats.h"
#include "half.h"
#include "isa.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define EXPERTD_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define EXPERTD_TARGET_BEGIN(names) \
  EXPERTD_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define EXPERTD_TARGET_END EXPERTD_PRAGMA(clang attribute pop)
#else
#define EXPERTD_TARGET_BEGIN(names) EXPERTD_PRAGMA(GCC push_options) EXPERTD_PRAGMA(GCC target(names))
#define EXPERTD_TARGET_END EXPERTD_PRAGMA(GCC pop_options)
#endif
