"""The expert kernels: native code behind a C ABI, and the formats of matrices that it reads."""
