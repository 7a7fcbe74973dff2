"""What the Triton kernels become, without a GPU: recorded, then compiled, then counted, then modelled."""
