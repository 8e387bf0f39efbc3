"""What a thread of ours has to be told before it asks anything of a GPU. The main thread was told by whoever started the job."""

from __future__ import annotations

import ctypes
import logging

import torch

DRIVER = "libcuda.so.1"
RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
RISK = "CUDA graphs that are captured beside threads of shardembed may fail"

logger = logging.getLogger("shardembed")


def at_home(device: torch.device | None) -> None:
    """Have the calling thread, which is not the main one, work on this device, and keep out of graphs that others capture.

    A thread that is told nothing works on GPU 0: merely asking whether an event has come to pass then takes some hundred megabytes
    of it for each rank of the node. And while any thread captures a CUDA graph in the usual mode, such a question from another
    thread breaks the capture, though the two have nothing to do with each other. NCCL's own watchdog steps aside in the same way.
    """
    if device is None or device.type != "cuda":
        return
    torch.cuda.set_device(device)
    try:
        change = ctypes.CDLL(DRIVER).cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError) as error:  # a driver of another kind or time
        logger.warning("%s: %s", RISK, error)
        return
    if status := change(ctypes.byref(ctypes.c_int(RELAXED))):
        logger.warning("%s: CUDA error %d", RISK, status)
