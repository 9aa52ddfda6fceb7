"""The patch tests on Megatron-Core 0.19.2, installed beside ours without its dependencies: its wheel works on Python 3.11."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.workspace import ROOT, quiet_environment

VERSION = "0.19.2"
FILES = ("test_guards.py", "test_rotary.py", "test_modules.py", "test_datasets.py", "test_cpu_backend.py", "test_torch_adam.py")


@pytest.mark.registry
@pytest.mark.timeout(900)
def test_the_patch_tests_pass_on_a_later_release(tmp_path):
    from importlib.metadata import version

    if version("megatron-core") == VERSION:
        pytest.skip(f"megatron-core {VERSION} is the installed one: this very run tests it")
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--ignore-requires-python"]
    installed = subprocess.run([*pip, "--target", str(site), f"megatron-core=={VERSION}"], capture_output=True, text=True, timeout=300)
    if installed.returncode:
        pytest.skip(f"megatron-core {VERSION} cannot be installed: {installed.stderr.strip().splitlines()[-1]}")
    environment = {**quiet_environment(), "PYTHONPATH": f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment["PYTHONDONTWRITEBYTECODE"] = ""  # else each of its processes compiles the whole of it again
    proof = "import importlib.metadata as m; print(m.version('megatron-core'))"
    assert subprocess.run([sys.executable, "-c", proof], env=environment, capture_output=True, text=True).stdout.strip() == VERSION
    files = [f"tests/megatron_patches/{name}" for name in FILES]
    run = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore", "--basetemp", str(tmp_path / "inner"), *files]
    finished = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
    assert finished.returncode == 0, finished.stdout[-4000:]
