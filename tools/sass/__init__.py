"""`make sass`: executes the sm_90 machine code of the CUDA kernels, and counts."""
