"""Kernels for the CPU, compiled by Numba at their first use and cached on disk; nothing here sees a tensor."""
