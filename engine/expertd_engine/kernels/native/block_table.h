// Fills the table of kernels; the last line of every instruction set's translation unit.
#pragma once

#include "attention_kernel.h"
#include "block_rows.h"

#define EXPERTD_BLOCK_KERNELS(name)                                                                               \
  const ::expertd::BlockKernels expertd::name = {                                                                 \
      normalise, rotate, apply_gate, select_experts, attend<float>, attend<uint16_t>, write_strided<float>,           \
      write_strided<uint16_t>,                                                                                        \
  }
