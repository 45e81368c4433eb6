// NEON with dot products: ARMv8.2 with asimddp, which is Neoverse N1, Graviton 2 and Apple M1 on.
