"""Make `.venv`: the right build of torch for this machine, then everything else at tested versions.

Runs before anything is installed, so it uses the standard library only. Which torch:

1. TORCH_INDEX set to a folder of wheels or to the address of a package index: torch comes from there.
2. An NVIDIA GPU answers, or TORCH_INDEX=default: whatever pip finds, which for Linux on PyPI is the CUDA build.
3. No GPU: pip is asked, without installing, what it would take. If that brings no NVIDIA packages (another platform, a
   mirror or a folder of wheels in pip's own settings) pip installs it. Otherwise uv takes the CPU build from PyTorch's
   own index, whose address uv knows (`--torch-backend cpu`). The CUDA wheel without its NVIDIA packages is no way out:
   it fails at import (`libcudnn.so.9: cannot open shared object file`) and is half a gigabyte by itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from endprompt.errors import UserError

PYTHON_VERSIONS = ((3, 11), (3, 12))
UV = "uv==0.13.9"
CUDA_PACKAGE = re.compile(r"^(nvidia|cuda|triton)([-_.]|$)", re.IGNORECASE)


def check_python_version(version: tuple[int, int] = sys.version_info[:2]) -> None:
    """Raise UserError unless the running interpreter is one that the requirements are tested for."""
    if version not in PYTHON_VERSIONS:
        raise UserError(
            f"{sys.executable} (Python {version[0]}.{version[1]})",
            "the requirements are tested for Python 3.11 and 3.12",
            "name another interpreter, for instance `make setup PYTHON=python3.11`",
        )


def has_nvidia_gpu() -> bool:
    """True when the driver's own tool lists at least one GPU."""
    if not (tool := shutil.which("nvidia-smi")):
        return False
    listing = subprocess.run([tool, "-L"], capture_output=True, text=True)
    return listing.returncode == 0 and "GPU " in listing.stdout


def torch_requirement(requirements: Path) -> str:
    """The line of requirements.txt that pins torch, for instance `torch==2.13.0`."""
    for line in requirements.read_text().splitlines():
        if re.match(r"torch\s*==", line):
            return line.split("#")[0].strip()
    raise UserError(requirements, "has no line `torch==VERSION`", "restore the file from the repository")


def cuda_packages(report: dict) -> list[str]:
    """Names of the GPU packages in a `pip install --report`: empty for a CPU build of torch."""
    names = [item["metadata"]["name"] for item in report["install"]]
    return [name for name in names if CUDA_PACKAGE.match(name)]


def _run(command: list[str | Path], where: str, fix: str) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode:
        # The last lines of these tools name the cause; the first ones name what they were doing.
        reason = " | ".join((result.stderr or result.stdout).strip().splitlines()[-3:])
        raise UserError(where, f"failed with exit code {result.returncode}: {reason}", fix)
    return result.stdout


def _pip(python: Path, *arguments: str | Path, fix: str = "check the network and pip's settings, then run it again") -> str:
    # -qq keeps errors and drops pip's remarks.
    command = [python, "-m", "pip", "--disable-pip-version-check", "-qq", *arguments]
    return _run(command, f"pip {' '.join(str(argument) for argument in arguments)}", fix)


def install_torch(python: Path, requirement: str, constraints: Path, index: str) -> None:
    """Install the build of torch that suits this machine (see the module's text) into `python`'s environment.

    index: the value of TORCH_INDEX: empty, `default`, a folder of wheels or the address of a package index.
    """
    wanted = [requirement, "-c", constraints]
    if index and index != "default":
        source = "--find-links" if Path(index).is_dir() else "--extra-index-url"
        print(f"installing {requirement} from TORCH_INDEX={index}", flush=True)
        _pip(python, "install", *wanted, source, index, fix="check TORCH_INDEX: a folder of wheels or an index address")
        return
    if index == "default" or has_nvidia_gpu():
        print(f"installing {requirement} with pip's own choice of build (a CUDA build takes about 3 GB)", flush=True)
        _pip(python, "install", *wanted)
        return
    report = json.loads(_pip(python, "install", "--dry-run", "--report", "-", *wanted))
    if not cuda_packages(report):
        print(f"installing {requirement}, a CPU build (no NVIDIA GPU here)", flush=True)
        _pip(python, "install", *wanted)
        return
    print(f"installing {requirement}, the CPU build from PyTorch's index (no NVIDIA GPU here)", flush=True)
    _pip(python, "install", UV)
    _run(
        [python, "-m", "uv", "pip", "install", "--python", python, "--torch-backend", "cpu", *wanted],
        f"CPU build of {requirement}",
        "set TORCH_INDEX to a folder or an index that holds it, or TORCH_INDEX=default to accept the CUDA build (about 3 GB)",
    )


def _has_pip(python: Path) -> bool:
    """False for a missing environment and for one whose making was interrupted or whose base Python has gone."""
    return python.exists() and subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0


def check_torch(python: Path) -> None:
    """Import the installed torch; say so when a GPU is there that this build cannot use."""
    code = "import torch; print(torch.__version__, torch.cuda.is_available())"
    fix = "remove .venv and run make setup again"
    version, sees_gpu = _run([python, "-W", "ignore", "-c", code], "import torch", fix).split()
    if has_nvidia_gpu() and sees_gpu == "False":
        print(
            f"warning: torch {version} cannot use this machine's GPU, so everything would run on the CPU; a build for the "
            "driver's CUDA version is chosen by setting TORCH_INDEX to its index and running make setup after rm -r .venv",
            file=sys.stderr,
        )


def set_up(root: Path, venv: Path) -> None:
    """Create or update `venv` from the requirement files under `root`. Safe to repeat and to interrupt."""
    check_python_version()
    began = time.monotonic()
    python = venv / "bin" / "python"
    if not _has_pip(python):
        print(f"making {venv} with Python {sys.version.split()[0]} (a few minutes, about 2 GB)", flush=True)
        _run(
            [sys.executable, "-m", "venv", "--clear", venv],
            f"{sys.executable} -m venv {venv}",
            "on Debian and Ubuntu install the package python3-venv; elsewhere use a Python that has venv and pip",
        )
    constraints = root / "requirements" / "constraints.txt"
    install_torch(python, torch_requirement(root / "requirements.txt"), constraints, os.environ.get("TORCH_INDEX", ""))
    check_torch(python)
    print("installing the other packages (about 2 minutes)", flush=True)
    files = [root / "requirements.txt", root / "requirements" / "dev.txt"]
    _pip(python, "install", *(argument for file in files for argument in ("-r", file)), "-c", constraints)
    print(f"{venv} is ready after {time.monotonic() - began:.0f} s", flush=True)
