"""Triton kernels for GPUs. Each stands beside a path of torch operators with the same results.

A module here imports triton, which comes with torch's CUDA builds: import it where a CUDA tensor
has come, and nowhere else.
"""
