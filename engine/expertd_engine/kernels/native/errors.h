// Errors inside the library are exceptions; at the C interface they become a code and a text.
#pragma once

#include <new>
#include <stdexcept>
#include <string>

#include "expertd_kernels.h"

namespace expertd {

// An argument that is refused; the message names it and says what is allowed.
struct Refused : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// The pool is inside another call.
struct Busy : std::logic_error {
  using std::logic_error::logic_error;
};

// Keeps `text` for expertd_error() and returns `code`.
int report(int code, const char* text) noexcept;

inline void require(bool condition, const std::string& text) {
  if (!condition) throw Refused(text);
}

// Runs the body of an extern "C" function: its exceptions become codes.
template <class Body>
int guarded(Body&& body) noexcept {
  try {
    body();
    return EXPERTD_OK;
  } catch (const Refused& error) {
    return report(EXPERTD_INVALID, error.what());
  } catch (const Busy& error) {
    return report(EXPERTD_BUSY, error.what());
  } catch (const std::exception& error) {  // std::bad_alloc, std::system_error: memory or threads ran out
    return report(EXPERTD_NO_MEMORY, error.what());
  }
}

}  // namespace expertd
