"""Which torch is installed, decided from what pip reports and from the machine; nothing is installed here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from endprompt import install
from endprompt.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "requirements" / "constraints.txt"
CUDA = ["torch", "nvidia-cublas", "triton", "cuda-toolkit", "sympy"]
CPU = ["torch", "sympy", "fsspec"]


@pytest.fixture
def commands(monkeypatch):
    """Record commands instead of running them; pip's dry run reports the packages set in `commands.report`."""

    class Commands(list):
        report = CPU
        fails = ""

    ran = Commands()

    def run(command, where, fix):
        line = " ".join(str(part) for part in command)
        ran.append(line)
        if ran.fails and ran.fails in line:
            raise UserError(where, "failed", fix)
        return json.dumps({"install": [{"metadata": {"name": name}} for name in ran.report]}) if "--report" in line else ""

    monkeypatch.setattr(install, "_run", run)
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: False)
    return ran


def install_torch(index: str = "") -> None:
    install.install_torch(Path("py"), "torch==2.13.0", CONSTRAINTS, index)


def test_without_gpu_pip_installs_a_cpu_build_that_it_finds(commands):
    install_torch()
    dry_run, real = commands
    assert "--dry-run" in dry_run and "install torch==2.13.0" in real and "--dry-run" not in real


def test_without_gpu_cuda_packages_are_never_installed_by_pip(commands):
    commands.report = CUDA
    install_torch()
    assert ["--dry-run" in line for line in commands] == [True, False, False]
    assert commands[1].endswith(f"install {install.UV}")
    assert commands[2].startswith("py -m uv pip install --python py --torch-backend cpu torch==2.13.0")


def test_when_no_cpu_build_can_be_had_both_ways_out_are_named(commands):
    commands.report, commands.fails = CUDA, "--torch-backend"
    with pytest.raises(UserError, match=r"TORCH_INDEX to a folder or an index .* TORCH_INDEX=default to accept the CUDA build"):
        install_torch()


def test_with_a_gpu_pip_chooses(commands, monkeypatch):
    commands.report = CUDA
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: True)
    install_torch()
    assert len(commands) == 1 and "install torch==2.13.0" in commands[0]


def test_torch_index_decides(commands, tmp_path):
    commands.report = CUDA
    install_torch(str(tmp_path))
    install_torch("file:///index")
    install_torch("default")
    assert [f"--find-links {tmp_path}" in commands[0], "--extra-index-url file:///index" in commands[1]] == [True, True]
    assert len(commands) == 3 and "uv" not in commands[2] and "--dry-run" not in commands[2]


def test_gpu_packages_are_told_from_others():
    report = {"install": [{"metadata": {"name": name}} for name in [*CUDA, "nvidia_nccl_cu13", "networkx", "cudagraphs"]]}
    assert install.cuda_packages(report) == ["nvidia-cublas", "triton", "cuda-toolkit", "nvidia_nccl_cu13"]


@pytest.mark.parametrize(
    ("script", "found"), [("echo 'GPU 0: H100'", True), ("echo 'no devices'; exit 6", False), ("echo 'No devices'", False)]
)
def test_gpu_is_seen_through_the_drivers_tool(tmp_path, monkeypatch, script, found):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not install.has_nvidia_gpu()
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert install.has_nvidia_gpu() is found


def test_other_pythons_are_refused():
    for version in ((3, 10), (3, 13)):
        with pytest.raises(UserError, match="tested for Python 3.11 and 3.12; .*make setup PYTHON="):
            install.check_python_version(version)
    for version in install.PYTHON_VERSIONS:
        install.check_python_version(version)


def test_an_unfinished_environment_is_made_again(tmp_path):
    python = tmp_path / "bin" / "python"
    assert not install._has_pip(python)
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    assert not install._has_pip(python)
    assert install._has_pip(Path(sys.executable))


def test_a_failing_command_gives_its_last_words():
    with pytest.raises(UserError, match=r"step: failed with exit code 3: b \| c \| d; do this"):
        install._run(["sh", "-c", r"printf 'a\nb\nc\nd\n' >&2; exit 3"], "step", "do this")


def requirements(file: str) -> list[Requirement]:
    lines = (ROOT / file).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_every_open_requirement_has_one_pin_that_satisfies_it(python):
    """pip refuses the whole set-up when a constraint lies outside a requirement's range."""
    environment = {"python_version": python}

    def valid(items: list[Requirement]) -> list[Requirement]:
        return [item for item in items if not item.marker or item.marker.evaluate(environment)]

    def exact(item: Requirement) -> str | None:
        (specifier,) = item.specifier if len(item.specifier) == 1 else (None,)
        return specifier.version if specifier and specifier.operator == "==" else None

    pins = {item.name.lower(): exact(item) for item in valid(requirements("requirements/constraints.txt"))}
    assert all(pins.values())
    wanted = valid(requirements("requirements/base.txt") + requirements("requirements/dev.txt"))
    assert len({item.name for item in wanted}) == len(wanted)
    for item in wanted:
        assert exact(item) or item.specifier.contains(pins[item.name.lower()]), item


def test_torch_has_one_place():
    assert install.torch_requirement(ROOT / "requirements.txt").startswith("torch==")
    for file in ("base", "dev", "cluster", "constraints"):
        assert "torch" not in [item.name for item in requirements(f"requirements/{file}.txt")]
    assert "apex" not in [item.name for item in requirements("requirements/cluster.txt")]


def test_make_alone_lists_the_targets():
    shown = subprocess.run(["make", "-C", ROOT], capture_output=True, text=True, check=True).stdout
    for target in ("setup", "demo", "test", "bench", "lint"):
        assert f"make {target} " in shown
