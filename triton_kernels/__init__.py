"""Triton kernels, one file a family: jit kernels and thin launchers over tensors that the caller allocated."""
