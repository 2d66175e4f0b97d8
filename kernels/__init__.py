"""Triton kernels of the GPU backend; they import nothing from the layers above."""
