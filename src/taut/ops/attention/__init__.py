"""Who may see whom, as data, and the fused kernels that obey it."""
