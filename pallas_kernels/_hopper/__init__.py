"""Hopper (sm_90) kernels that the recurrent ops share; Mosaic GPU of JAX 0.11 or later."""
