"""The kernels of CUDA devices, in Triton. Whoever imports a module of this package needs the extra `[cuda]`."""
