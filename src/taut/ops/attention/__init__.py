"""Attention patterns as data (which query sees which key), and the fused kernels that apply them."""
