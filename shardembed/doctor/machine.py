"""What the machine has: GPUs and their driver, communication, shared memory, open files, room on the disk, its own name."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from pathlib import Path

import torch
import torch.distributed as dist
from torch.cuda import nccl

from shardembed.comm.channels import sockets_a_peer
from shardembed.doctor.findings import Finding, found, note, problem
from shardembed.planner import words

AREA = "machine"
SHARED = Path("/dev/shm")
SHARED_BYTES = 512 << 20  # data loaders' workers and NCCL share memory there; containers have 64 MiB by default
DISK_BYTES = 2 << 30
FILES = 512  # that a rank opens beside those for the other ranks: the interpreter, data, up to 200 of a checkpoint


def check(ranks: int, folder: Path) -> list[Finding]:
    """Findings about this machine, for a job of `ranks` that works in `folder`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return [
        cuda(torch.version.cuda, torch.cuda.device_count() if torch.cuda.is_available() else 0, Path("/dev/nvidiactl").exists()),
        *communication(ranks),
        shared_memory(shutil.disk_usage(SHARED).free if SHARED.is_dir() else None),
        open_files(soft, hard, ranks, torch.cuda.is_available()),
        *[disk(name, path) for name, path in (("disk", folder), ("disk for temporary files", _temporary()))],
        own_name(),
    ]


def cuda(built_for: str | None, devices: int, driver: bool) -> Finding:
    """`driver`: whether an NVIDIA driver is loaded."""
    if devices:
        names = sorted({torch.cuda.get_device_name(index) for index in range(devices)})
        return found(AREA, "cuda", f"{words.plural(devices, 'GPU')} ({', '.join(names)}), torch for CUDA {built_for}")
    if built_for is None and not driver:
        return found(AREA, "cuda", "no GPU, and a torch for CPUs")
    if built_for is None:
        fix = "pip install 'shardembed[cuda]' from the index for your CUDA (see pytorch.org), unless the GPU is not to be used"
        return note(AREA, "cuda", "there is an NVIDIA driver, and this torch is for CPUs: GPUs are not used", fix)
    if driver:
        fix = "run nvidia-smi; update the driver, or install a torch for an older CUDA; look at CUDA_VISIBLE_DEVICES"
        return problem(AREA, "cuda", f"torch is for CUDA {built_for}, the NVIDIA driver is loaded, and torch sees no GPU", fix)
    fix = "on a machine with GPUs, load the driver (containers: --gpus all); for CPUs, a torch of the CPU index is smaller"
    return note(AREA, "cuda", f"torch is for CUDA {built_for}, and there is no GPU here", fix)


def communication(ranks: int) -> list[Finding]:
    if not dist.is_available():
        return [problem(AREA, "torch.distributed", "this torch is built without it", "install torch from PyPI or pytorch.org")]
    findings = []
    if dist.is_gloo_available():
        findings.append(found(AREA, "gloo", "available, for tensors on CPUs"))
    else:
        findings.append(problem(AREA, "gloo", "this torch is built without Gloo", "install torch from PyPI or pytorch.org"))
    if torch.cuda.is_available():
        if dist.is_nccl_available():
            findings.append(found(AREA, "nccl", ".".join(map(str, nccl.version()))))
        else:
            findings.append(problem(AREA, "nccl", "this torch is built without NCCL", "install a torch for CUDA from PyPI"))
        if ranks > torch.cuda.device_count():
            have = words.plural(torch.cuda.device_count(), "GPU")
            fix = f"--ranks {torch.cuda.device_count()}, or CUDA_VISIBLE_DEVICES= to try CPUs"
            findings.append(problem(AREA, "ranks", f"{ranks} ranks, and {have}: each rank needs one", fix))
    return findings


def shared_memory(free: int | None) -> Finding:
    if free is None:
        return found(AREA, "shared memory", f"there is no {SHARED} on this system")
    if free < SHARED_BYTES:
        text = f"{words.size(free)} free in {SHARED}: workers of data loaders and NCCL die with 'Bus error' when it is full"
        fix = "in a container: --shm-size=8g or --ipc=host; else: mount -o remount,size=8g /dev/shm"
        return problem(AREA, "shared memory", text, fix)
    return found(AREA, "shared memory", f"{words.size(free)} free in {SHARED}")


def open_files(soft: int, hard: int, ranks: int, on_gpus: bool) -> Finding:
    """Each of a rank's process groups over Gloo has a socket to each other rank. NCCL's own, which it shares out over few, are in
    `FILES`.
    """
    each = sockets_a_peer(over_nccl=on_gpus)
    need = FILES + each * (ranks - 1)
    unlimited = soft == resource.RLIM_INFINITY
    if not unlimited and soft < need:
        raised = f"ulimit -n {need if hard == resource.RLIM_INFINITY else min(need, hard)} in the shell that starts the job"
        more = f", after raising the hard limit of {hard} in /etc/security/limits.conf" if 0 < hard < need else ""
        text = f"a process may open {soft:,} files, and a rank of {ranks} may need {need:,}, {each} of them for each other rank"
        return problem(AREA, "open files", text, raised + more)
    return found(AREA, "open files", "unlimited" if unlimited else f"{soft:,} a process, about {need:,} needed")


def disk(name: str, folder: Path) -> Finding:
    folder = folder.absolute()
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return problem(AREA, name, f"{folder} cannot be looked at: {error.strerror}", "name another folder with --dir")
    if not os.access(folder, os.W_OK):
        return problem(AREA, name, f"{folder} cannot be written to", f"chmod u+w {folder}, or name another folder with --dir")
    if free < DISK_BYTES:
        fix = "remove old checkpoints (checkpoint.keep), or name another folder with --dir; TMPDIR for temporary files"
        return problem(AREA, name, f"{words.size(free)} free in {folder}", fix)
    return found(AREA, name, f"{words.size(free)} free in {folder}")


def own_name() -> Finding:
    """Gloo and torchrun look the machine's own name up."""
    name = socket.gethostname()
    try:
        address = socket.getaddrinfo(name, None)[0][4][0]
    except OSError as error:
        fix = f"add '127.0.0.1 {name}' to /etc/hosts, or set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the interface to use"
        text = f"{name!r} cannot be looked up ({error.strerror or error}): jobs under torchrun may not start"
        return note(AREA, "host name", text, fix)
    return found(AREA, "host name", f"{name} is {address}")


def _temporary() -> Path:
    return Path(os.environ.get("TMPDIR", "/tmp"))
