"""The kernels: one call into the compiled module for tensors and arrays alike."""
