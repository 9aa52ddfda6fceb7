"""What one machine has: versions, GPUs, free space, the commit of its clone."""

from __future__ import annotations

import platform
import shutil
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from endprompt.errors import UserError

PACKAGES = ("deepspeed", "megatron-core", "transformers", "transformer-engine")
ABSENT = "absent"
SMI_SECONDS = 30.0
"""nvidia-smi answers in 1 to 5 s on a healthy node; with a GPU that fell off the bus it can hang for ever."""


def versions() -> dict[str, str]:
    """Of python, torch, NCCL and the engines' packages; `absent` for what is not installed. Packages are not imported."""
    import torch

    nccl = ".".join(map(str, torch.cuda.nccl.version())) if hasattr(torch._C, "_nccl_version") else ABSENT
    return {"python": platform.python_version(), "torch": torch.__version__, "nccl": nccl, **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ABSENT


def commit(root: Path) -> str | None:
    """The git commit of the clone at `root`, None where there is no git or no clone (a container with a copy of the code)."""
    if not (git := shutil.which("git")):
        return None
    answer = subprocess.run([git, "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    return answer.stdout.strip() or None


def free_gb(run_folder: Path | None) -> dict[str, float | None]:
    """Free space in 10^9 bytes: on the run folder's disk (None where this machine does not see it), /dev/shm, temporary folder."""
    places = {"run_folder": run_folder, "/dev/shm": Path("/dev/shm"), "temporary": Path(tempfile.gettempdir())}
    seen = {name: place is not None and place.is_dir() for name, place in places.items()}
    return {name: round(shutil.disk_usage(place).free / 1e9, 3) if seen[name] else None for name, place in places.items()}


def gpus() -> dict[str, Any]:
    """count and names as torch sees them; driver and uncorrected_ecc (volatile, one a GPU, None where the GPU counts none) of nvidia-smi.

    Without nvidia-smi, as in some containers, driver is None and uncorrected_ecc empty. Raises UserError where it fails or hangs.
    """
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {"count": len(names), "names": names, **_smi()}


def _smi() -> dict[str, Any]:
    if not (tool := shutil.which("nvidia-smi")):
        return {"driver": None, "uncorrected_ecc": []}
    query = [tool, "--query-gpu=driver_version,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits"]
    fix = "exclude the node and have its GPUs looked at (dmesg, Xid errors)"
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=SMI_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError("nvidia-smi", f"gave no answer within {SMI_SECONDS:.0f} s", fix) from None
    if answer.returncode:
        words = (answer.stdout + answer.stderr).strip().splitlines() or ["no message"]
        raise UserError("nvidia-smi", f"failed with exit code {answer.returncode} ({words[-1]})", fix)
    return parse_smi(answer.stdout)


def parse_smi(text: str) -> dict[str, Any]:
    """`535.104.05, 0` a line and GPU; `[N/A]` or `[Not Supported]` where ECC is off."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.strip().splitlines()]
    return {"driver": rows[0][0] if rows else None, "uncorrected_ecc": [int(ecc) if ecc.isdigit() else None for _, ecc in rows]}
