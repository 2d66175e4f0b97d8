"""Triton kernels, which import nothing from the layers above. The modules in here need Triton, the package does not."""
