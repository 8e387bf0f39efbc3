"""Which packages are there, whether they go together, and whether they can be imported.

Binary packages of another torch end a process rather than raise, so that they are imported in one of their own.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from shardembed.doctor.findings import Finding, absent, found, note, problem

AREA = "packages"
SECONDS = 120  # for all imports of a process
TORCH_BEHIND = 5  # FBGEMM and TorchRec 1.X are built for torch 2.(X+5)
FBGEMM = ("fbgemm-gpu", "fbgemm-gpu-cpu")
_NUMBERS = re.compile(r"([0-9]+)\.([0-9]+)")


@dataclass(frozen=True)
class Package:
    """A distribution that shardembed can use.

    Attributes:
        name: of the distribution.
        module: what it is imported as.
        purpose: what it is for.
        oldest: the first version that serves, major and minor.
        extra: of shardembed, that installs it.
        vital: nothing goes without it.
    """

    name: str
    module: str
    purpose: str
    oldest: tuple[int, int] = (0, 0)
    extra: str = ""
    vital: bool = False


PACKAGES = (
    Package("torch", "torch", "everything", (2, 11), vital=True),
    Package("numpy", "numpy", "arrays", vital=True),
    Package("safetensors", "safetensors", "checkpoints", vital=True),
    Package("pydantic", "pydantic", "configuration files", (2, 0), vital=True),
    Package("PyYAML", "yaml", "configuration files", vital=True),
    Package("rich", "rich", "output in a terminal", vital=True),
    Package("scipy", "scipy", "the planner's solver", (1, 9), vital=True),
    Package("numba", "numba", "fast kernels on CPUs (without it torch's own serve)", (0, 65)),
    Package("triton", "triton", "kernels on GPUs (comes with torch's builds for CUDA)"),
    Package("pyarrow", "pyarrow", "data files, Parquet", extra="train"),
    Package("matplotlib", "matplotlib", "pictures", extra="train"),
    Package("torchmetrics", "torchmetrics", "metrics", (1, 0), extra="train"),
    Package("tensorboard", "tensorboard", "curves in TensorBoard", extra="tensorboard"),
    Package("mlflow-skinny", "mlflow", "runs in MLflow", (3, 0), extra="mlflow"),
    Package("torchx", "torchx", "launching on clusters", (0, 7), extra="torchx"),
    Package("fbgemm-gpu-cpu", "fbgemm_gpu", "TorchRec and kernel='fbgemm' on CPUs", extra="cpu"),
    Package("fbgemm-gpu", "fbgemm_gpu", "TorchRec and kernel='fbgemm' on GPUs", extra="cuda"),
    Package("torchrec", "torchrec", "models of TorchRec", extra="torchrec"),
)


def installed() -> dict[str, str]:
    """The versions of all `PACKAGES` that are there."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package.name] = importlib.metadata.version(package.name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def check(versions: Mapping[str, str], imports: Callable[[Iterable[str]], Mapping[str, str]] | None = None) -> list[Finding]:
    """Findings about `versions`; `imports` tries modules and gives what went wrong by module (see `failures`)."""
    modules = dict.fromkeys(package.module for package in PACKAGES if package.name in versions)
    failed = (imports or failures)(modules)
    each = [_one(package, versions.get(package.name), failed.get(package.module, "")) for package in PACKAGES]
    return [_python(), *each, *pairs(versions)]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        return problem(AREA, "python", f"{version} is not supported", "use Python 3.10 to 3.13")
    return found(AREA, "python", f"{version} at {sys.executable}")


def _one(package: Package, version: str | None, failure: str) -> Finding:
    install = f"pip install 'shardembed[{package.extra}]'" if package.extra else f"pip install '{_wanted(package)}'"
    if version is None:
        text = f"not installed: {package.purpose}"
        if package.vital:
            return problem(AREA, package.name, text, install)
        if package.extra or package.name == "triton":
            return absent(AREA, package.name, text, install)
        return note(AREA, package.name, text, install)
    if failure:
        return problem(AREA, package.name, f"{version} cannot be imported: {failure}", _again(package))
    if _older(version, package.oldest):
        return problem(AREA, package.name, f"{version} is too old: {package.purpose}", f"pip install -U '{_wanted(package)}'")
    return found(AREA, package.name, version)


def _again(package: Package) -> str:
    if package.module in ("fbgemm_gpu", "torchrec"):
        return "install the version that goes with this torch (1.X with torch 2.(X+5)), one distribution of fbgemm only"
    return f"pip install --force-reinstall '{_wanted(package)}', and `pip check` for versions that do not go together"


def _wanted(package: Package) -> str:
    return f"{package.name}>={'.'.join(map(str, package.oldest))}" if any(package.oldest) else package.name


def _older(version: str, oldest: tuple[int, int]) -> bool:
    numbers = numbers_of(version)
    return numbers is not None and numbers < oldest


def numbers_of(version: str) -> tuple[int, int] | None:
    match = _NUMBERS.match(version)
    return (int(match[1]), int(match[2])) if match else None


def pairs(versions: Mapping[str, str]) -> list[Finding]:
    """What must go together: torch with FBGEMM and TorchRec, TorchRec with FBGEMM, and one FBGEMM only."""
    findings = []
    torch = numbers_of(versions.get("torch", ""))
    both = [name for name in FBGEMM if name in versions]
    if len(both) > 1:
        findings.append(
            problem(
                AREA,
                "one fbgemm",
                "fbgemm-gpu and fbgemm-gpu-cpu are both installed; they share the folder fbgemm_gpu, which is a mix of the two now",
                "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu, then install one: pip install 'shardembed[cpu]' or 'shardembed[cuda]'",
            )
        )
    for name in (*FBGEMM, "torchrec"):
        version = numbers_of(versions.get(name, ""))
        if version is not None and torch is not None and not _goes_with(version, torch):
            findings.append(_mismatch(name, versions[name], version, versions["torch"], torch))
    if "torchrec" in versions and not both:
        fix = "pip install 'shardembed[cpu]' or 'shardembed[cuda]'"
        findings.append(problem(AREA, "torchrec", f"{versions['torchrec']} is installed without fbgemm, which it needs", fix))
    if any(name in versions for name in (*FBGEMM, "torchrec")) and not findings:
        findings.append(found(AREA, "pairing", "fbgemm, torchrec and torch go together (1.X with torch 2.(X+5))"))
    return findings


def _goes_with(version: tuple[int, int], torch: tuple[int, int]) -> bool:
    return version[0] == 1 and torch == (2, version[1] + TORCH_BEHIND)


def _mismatch(name: str, text: str, version: tuple[int, int], torch_text: str, torch: tuple[int, int]) -> Finding:
    needs = f"torch 2.{version[1] + TORCH_BEHIND}" if version[0] == 1 else "another torch"
    fixes = []
    if torch[0] == 2 and torch[1] >= TORCH_BEHIND:
        deps = "--no-deps " if name == "torchrec" else ""  # else it brings fbgemm-gpu beside fbgemm-gpu-cpu
        fixes.append(f"pip install {deps}'{name}==1.{torch[1] - TORCH_BEHIND}.*'")
    if version[0] == 1:
        fixes.append(f"pip install 'torch==2.{version[1] + TORCH_BEHIND}.*'")
    return problem(AREA, "pairing", f"{name} {text} is built for {needs}, and torch is {torch_text}", " or ".join(fixes))


_TRY = """
import importlib, sys, warnings
warnings.simplefilter("ignore")
for name in sys.argv[1:]:
    print("trying", name, flush=True)
    try:
        importlib.import_module(name)
    except BaseException as error:
        print("failed", name, f"{type(error).__name__}: {error}".replace(chr(10), " ")[:300], flush=True)
"""


def failures(modules: Iterable[str], seconds: float = SECONDS) -> dict[str, str]:
    """What goes wrong when `modules` are imported in a process of their own: the error, or how the process ended."""
    left, failed = list(modules), {}
    while left:
        try:
            done = subprocess.run([sys.executable, "-c", _TRY, *left], capture_output=True, text=True, timeout=seconds)
            output, end = done.stdout, f"its import ended the process with code {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired as error:
            output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
            end = f"its import did not end within {seconds:g} s"
        lines = [line.split(" ", 2) for line in output.splitlines()]
        failed |= {words[1]: words[2] for words in lines if words[0] == "failed" and len(words) == 3}
        last = next((words[1] for words in reversed(lines) if words[0] == "trying" and len(words) > 1), None)
        if not end:
            return failed
        if last is None:  # the interpreter itself
            return failed | dict.fromkeys(left, end)
        failed[last] = end
        left = left[left.index(last) + 1 :]
    return failed
