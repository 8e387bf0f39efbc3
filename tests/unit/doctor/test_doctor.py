"""`shardembed doctor`: what is wrong with packages and machines is found and has a fix, and what is right is left in peace."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import pytest

from shardembed.cli import doctor as command
from shardembed.cli import launch, main
from shardembed.cli.failures import Told
from shardembed.config import optional
from shardembed.doctor import machine, packages
from shardembed.doctor.findings import Finding
from shardembed.errors import UnsupportedError

ROOT = Path(__file__).parents[3]
GOOD = {
    **{"torch": "2.13.0+cpu", "numpy": "2.4.6", "safetensors": "0.8.0", "pydantic": "2.14.3", "PyYAML": "6.0.3"},
    **{"rich": "15.0.0", "scipy": "1.17.1", "numba": "0.68.1", "fbgemm-gpu-cpu": "1.8.0", "torchrec": "1.8.0"},
}


def problems(findings: list[Finding]) -> dict[str, Finding]:
    found = {each.name: each for each in findings if each.status == "problem"}
    assert all(each.fix for each in found.values())
    return found


def checked(changes: dict[str, str | None], failed: dict[str, str] | None = None) -> dict[str, Finding]:
    versions = {name: version for name, version in {**GOOD, **changes}.items() if version is not None}
    return problems(packages.check(versions, lambda modules: failed or {}))


def test_a_good_installation_has_no_problem() -> None:
    assert checked({}) == {}
    assert checked({"fbgemm-gpu-cpu": None, "torchrec": None}) == {}  # nobody needs them
    assert checked({"fbgemm-gpu-cpu": "1.6.0", "torchrec": "1.6.0", "torch": "2.11.1"}) == {}


@pytest.mark.parametrize(
    ("changes", "name", "text", "fix"),
    [
        ({"torch": None}, "torch", "not installed: everything", "pip install 'torch>=2.11'"),
        (
            {"torch": "2.10.0", "fbgemm-gpu-cpu": "1.5.0", "torchrec": "1.5.0"},
            "torch",
            "2.10.0 is too old",
            "pip install -U 'torch>=2.11'",
        ),
        ({"scipy": "1.8.1"}, "scipy", "1.8.1 is too old", "'scipy>=1.9'"),
        (
            {"fbgemm-gpu": "1.8.0"},
            "one fbgemm",
            "are both installed",
            "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu, then install one",
        ),
        (
            {"torch": "2.12.0"},
            "pairing",
            "torchrec 1.8.0 is built for torch 2.13, and torch is 2.12.0",
            "pip install --no-deps 'torchrec==1.7.*' or pip install 'torch==2.13.*'",
        ),
        (
            {"torchrec": None, "torch": "2.12.0"},
            "pairing",
            "fbgemm-gpu-cpu 1.8.0 is built for torch 2.13",
            "'fbgemm-gpu-cpu==1.7.*'",
        ),
        ({"fbgemm-gpu-cpu": "0.8.0"}, "pairing", "fbgemm-gpu-cpu 0.8.0 is built for another torch", "'fbgemm-gpu-cpu==1.8.*'"),
        ({"fbgemm-gpu-cpu": None}, "torchrec", "1.8.0 is installed without fbgemm", "pip install 'shardembed[cpu]'"),
    ],
)
def test_versions_that_do_not_serve_are_told(changes: dict[str, str | None], name: str, text: str, fix: str) -> None:
    found = checked(changes)[name]
    assert text in found.text
    assert fix in found.fix


def test_what_is_missing_is_a_note_or_nothing_where_one_can_do_without() -> None:
    versions = {name: version for name, version in GOOD.items() if name != "numba"}
    found = {each.name: each for each in packages.check(versions, lambda modules: {})}
    assert (found["numba"].status, found["numba"].fix) == ("note", "pip install 'numba>=0.65'")
    assert (found["pyarrow"].status, found["pyarrow"].fix) == ("absent", "pip install 'shardembed[train]'")


def test_packages_that_cannot_be_imported_are_told_also_those_that_end_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {
        "fine_one": "x = 1",
        "raises_one": "raise OSError('libx.so: undefined symbol\\nmore')",
        "dies_one": "import os; print('noise', flush=True); os._exit(7)",
        "fine_two": "",
        "lacks_one": "import no_such_module",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = packages.failures(["fine_one", "raises_one", "dies_one", "fine_two", "lacks_one"])
    assert found == {
        "raises_one": "OSError: libx.so: undefined symbol more",
        "dies_one": "its import ended the process with code 7",
        "lacks_one": "ModuleNotFoundError: No module named 'no_such_module'",
    }
    told = checked({}, {"fbgemm_gpu": "OSError: undefined symbol", "scipy": "died"})
    assert "1.8.0 cannot be imported: OSError: undefined symbol" in told["fbgemm-gpu-cpu"].text
    assert "one distribution of fbgemm only" in told["fbgemm-gpu-cpu"].fix
    assert "pip install --force-reinstall 'scipy>=1.9'" in told["scipy"].fix


def test_the_doctor_knows_the_requirements_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    wanted = dict(re.findall(r'^    "([A-Za-z-]+)(?:>=([0-9.]+))?",', text[: text.index("[project.optional")], flags=re.MULTILINE))
    known = {package.name: package for package in packages.PACKAGES}
    vital = {package.name for package in packages.PACKAGES if package.vital} | {"numba"}
    assert set(wanted) == vital
    for name, version in wanted.items():
        oldest = packages.numbers_of(version if "." in version else f"{version}.0") if version else (0, 0)
        assert known[name].oldest == oldest, name
    extras = re.findall(r"^([a-z]+) = \[", text, flags=re.MULTILINE)
    assert {package.extra for package in packages.PACKAGES if package.extra} <= set(extras)


def test_what_a_machine_lacks_is_told() -> None:
    none = resource.RLIM_INFINITY
    for finding, status, text, fix in (
        (machine.shared_memory(64 << 20), "problem", "64.0 MiB free in /dev/shm", "--shm-size=8g"),
        (machine.shared_memory(8 << 30), "ok", "8.0 GiB free", ""),
        (machine.shared_memory(None), "ok", "there is no", ""),
        (
            machine.open_files(256, 4096, 2, False),
            "problem",
            "may open 256 files, and a rank of 2 may need 526, 14 of them for each other rank",
            "ulimit -n 526 in the shell",
        ),
        (
            machine.open_files(256, 400, 2, False),
            "problem",
            "may open 256",
            "ulimit -n 400 in the shell that starts the job, after",
        ),
        (machine.open_files(1024, none, 513, False), "problem", "may need 7,680, 14 of", "ulimit -n 7680"),
        (machine.open_files(1024, none, 513, True), "problem", "may need 3,584, 6 of", "ulimit -n 3584"),
        (machine.open_files(1024, none, 8, True), "ok", "1,024 a process", ""),
        (machine.open_files(none, none, 8, True), "ok", "unlimited", ""),
        (machine.cuda(None, 0, False), "ok", "no GPU", ""),
        (machine.cuda(None, 0, True), "note", "this torch is for CPUs", "shardembed[cuda]"),
        (machine.cuda("13.0", 0, True), "problem", "torch sees no GPU", "update the driver"),
        (machine.cuda("13.0", 0, False), "note", "there is no GPU here", "--gpus all"),
        (machine.disk("disk", Path("/nowhere")), "problem", "/nowhere cannot be looked at: No such file", "--dir"),
    ):
        assert finding.status == status, finding
        assert text in finding.text
        assert fix in finding.fix
        assert bool(finding.fix) == (status != "ok")


def test_a_disk_that_is_full_and_a_name_nobody_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.disk("disk", tmp_path).status in ("ok", "problem")
    monkeypatch.setattr(machine, "DISK_BYTES", 1 << 60)
    assert "remove old checkpoints" in machine.disk("disk", tmp_path).fix

    def unknown(*_: object) -> None:
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr(machine.socket, "getaddrinfo", unknown)
    found = machine.own_name()
    assert (found.status, "GLOO_SOCKET_IFNAME" in found.fix) == ("note", True)


def test_problems_are_listed_with_fixes_and_end_with_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "installed", lambda: {**GOOD, "fbgemm-gpu": "1.8.0"})
    monkeypatch.setattr(packages, "failures", lambda modules: {})
    monkeypatch.setattr(launch, "told_of", lambda ranks, words: Told("rank 1 was killed by SIGBUS", 1, "give it /dev/shm"))
    assert main(["doctor", "--ranks", "3"]) == 1
    shown = capsys.readouterr().out
    lines = [line.rstrip() for line in shown.splitlines()]
    assert "PROBLEM  one fbgemm                fbgemm-gpu and fbgemm-gpu-cpu are both installed; they share" in shown
    place = next(place for place, line in enumerate(lines) if line.endswith("PROBLEM: one fbgemm"))
    assert lines[place + 2].startswith("   fix: pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu")
    assert any("rank 1 was killed by SIGBUS" in line for line in lines)
    assert "   fix: give it /dev/shm" in lines
    assert re.fullmatch(r"[2-9] problems found", lines[-1])
    assert "\x1b" not in shown
    assert main(["doctor", "--ranks", "0", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert {each["area"] for each in found["findings"]} == {"packages", "machine"}


def test_a_cut_that_differs_is_a_problem_and_the_others_are_counted() -> None:
    answers = [{"cut": f"cut {number}", "bound": "exact", "difference": "", "device": "cuda"} for number in range(3)]
    answers[1]["difference"] = "rank 1: bags by sum after a step: 1 of 768 numbers differ"
    wrong, right = command._parity(answers, 8)
    assert (wrong.status, wrong.name) == ("problem", "cut 1")
    assert "rank 1: bags by sum after a step" in wrong.text
    assert (right.status, right.text) == ("ok", "2 of 3 cuts on 8 ranks (cuda), lookup and update")


def test_wrong_arguments_are_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for words, says in ((["--ranks", "-1"], "--ranks -1"), (["--timeout", "0"], "--timeout 0")):
        assert main(["doctor", *words]) == 2
        assert says in capsys.readouterr().err


def test_parts_that_are_missing_point_to_the_extra_and_the_doctor() -> None:
    with pytest.raises(UnsupportedError) as caught, optional.needed("no_such_package", "train", "drawing"):
        import no_such_package  # type: ignore[import-not-found] # noqa: F401
    assert str(caught.value) == (
        "drawing needs no_such_package: pip install 'shardembed[train]'; `shardembed doctor` shows what is installed"
    )
    says = r"needs pyarrow, which cannot be imported here \(libarrow.so: bad\): pip"
    with pytest.raises(UnsupportedError, match=says), optional.needed("pyarrow", "train", "reading"):
        raise ImportError("libarrow.so: bad")
