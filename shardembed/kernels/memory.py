"""How the memory of tables and messages is kept, on Linux with glibc; elsewhere these calls do nothing."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

import torch

HUGE_PAGE = 2 << 20  # bytes
MADV_HUGEPAGE = 14  # of Linux's mman.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
LARGEST_KEPT = 32 << 20  # bytes; the most that glibc lets M_MMAP_THRESHOLD be


@cache
def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def on_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, its memory put on huge pages where the system grants them when asked (the usual setting of Linux).

    Rows lie anywhere in a table, so with pages of 4 KiB nearly each costs a walk through the page tables besides the row itself.
    To be called before the memory is first written.
    """
    size, libc = tensor.numel() * tensor.element_size(), _libc()
    if libc is not None and tensor.device.type == "cpu" and size >= 2 * HUGE_PAGE:
        first = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        whole = (tensor.data_ptr() + size - first) // HUGE_PAGE * HUGE_PAGE
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(whole), MADV_HUGEPAGE)
    return tensor


def keep_freed_memory() -> None:
    """Let this process keep buffers of up to 32 MiB that it frees, for the next step. By default glibc hands them back to the
    kernel, and every step pays page by page for getting them again. Larger ones, such as tables, still go back when freed.
    """
    libc = _libc()
    if libc is not None and hasattr(libc, "mallopt"):
        for parameter, value in ((M_MMAP_THRESHOLD, LARGEST_KEPT), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2 * LARGEST_KEPT)):
            libc.mallopt(parameter, value)
