"""The cluster's image, as far as it can be tested without docker: what it copies and names, and its guards run for real.

A virtual environment with small packages under the image's names stands for NVIDIA's image.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
NVIDIA_TORCH = "2.13.0a0+9186a08b2c.nv26.7"
PIP = Path(next(path for path in sys.path if (Path(path) / "pip" / "__main__.py").exists())) / "pip"


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, continued lines joined."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(None, 1)) for line in "\n".join(lines).replace("\\\n", " ").splitlines()]


def shellcheck(script: Path) -> None:
    tool = Path(sys.executable).with_name("shellcheck")
    found = str(tool) if tool.exists() else shutil.which("shellcheck")
    if not found:
        pytest.skip("no shellcheck here")
    result = subprocess.run([found, str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_it_stands_on_nvidias_image_with_a_default_and_names_no_other_registry():
    words = dict(instructions()[:2])
    assert re.fullmatch(r"NGC_TAG=\d\d\.\d\d-py3", words["ARG"]) and words["FROM"] == "nvcr.io/nvidia/pytorch:${NGC_TAG}"
    for file in DOCKER.iterdir():
        hosts = set(re.findall(r"[a-z0-9-]+(?:\.[a-z0-9-]+)*\.(?:io|com|org|net|ai)\b", file.read_text()))
        assert hosts <= {"nvcr.io"}, f"{file.name} names {hosts}"


def test_the_readme_has_the_dockerfiles_tag():
    tag = re.search(r"NGC_TAG=(\S+)", (DOCKER / "Dockerfile").read_text())[1]
    assert set(re.findall(r"\d\d\.\d\d-py3", (DOCKER / "README.md").read_text())) == {tag}


def test_everything_that_is_copied_or_named_exists():
    copied = [source for name, rest in instructions() if name == "COPY" for source in rest.split()[:-1]]
    assert copied and all((ROOT / source).exists() for source in copied)
    text = (DOCKER / "install.sh").read_text() + (DOCKER / "Dockerfile").read_text()
    named = re.findall(r"\b(?:requirements|docker)/[\w.-]+\w", text)
    assert {"requirements/base.txt", "requirements/dev.txt", "docker/check_image.py"} <= set(named)
    made = "docker/image-constraints.txt"  # by the build
    assert all((ROOT / name).exists() for name in named if name != made)


def test_commands_pass_shellcheck(tmp_path):
    shellcheck(DOCKER / "install.sh")
    for number, (name, rest) in enumerate(instructions()):
        if name == "RUN":
            script = tmp_path / f"{number}.sh"
            script.write_text(f"#!/bin/sh\n{rest}\n")
            shellcheck(script)


def test_commands_of_the_readme_pass_shellcheck(tmp_path):
    for number, block in enumerate(re.findall(r"```bash\n(.*?)```", (DOCKER / "README.md").read_text(), re.DOTALL)):
        script = tmp_path / f"{number}.sh"
        script.write_text(f"#!/bin/bash\n{block}")
        shellcheck(script)


def test_the_image_leaves_out_what_git_ignores_and_nothing_else():
    ignored = {line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")}
    for line in (ROOT / ".gitignore").read_text().split():
        name = line.strip("/")
        assert name in ignored or f"**/{name}" in ignored, f"{line} of .gitignore would be copied into the image"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git here")
    assert not {path.split("/")[0] for path in listed.stdout.splitlines()} & ignored


class Image:
    """A virtual environment with a module and a distribution for each package that the image should have."""

    def __init__(self, path: Path):
        self.path = path
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", path], check=True)
        self.python = path / "bin" / "python"
        self.packages = next(path.glob("lib/python*/site-packages"))
        (self.packages / "pip").symlink_to(PIP)
        self.add("torch", NVIDIA_TORCH, "class version: cuda = '13.3'\nclass cuda:\n    is_available = lambda: False\n")
        self.add("transformer_engine", "2.15.0+abc", submodule="pytorch")
        self.add("flash_attn", "2.7.4.post1")
        self.add("apex", "0.1", submodule="optimizers")
        (self.packages / "apex" / "normalization").mkdir()
        self.add("numpy", "2.1.0")
        self.add("requests", "2.30.0")
        self.add("megatron", "0.19.2", submodule="core", distribution="megatron-core")
        for name in ("deepspeed", "transformers", "pyarrow", "gguf", "wandb"):
            self.add(name, "1.0")
        self.frozen = path / "frozen.txt"

    def add(self, name: str, version: str, code: str = "", submodule: str | None = None, distribution: str | None = None) -> None:
        folder = self.packages / name
        folder.mkdir()
        (folder / "__init__.py").write_text(code)
        if submodule:
            (folder / submodule).mkdir()
            (folder / submodule / "__init__.py").touch()
        facts = self.packages / f"{(distribution or name).replace('-', '_')}-{version}.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution or name}\nVersion: {version}\n")
        files = "".join(f"{path.relative_to(self.packages)},,\n" for path in [*folder.rglob("*.py"), facts / "METADATA", facts / "RECORD"])
        (facts / "RECORD").write_text(files)

    def remove(self, name: str) -> None:
        for path in [self.packages / name, *self.packages.glob(f"{name}-*.dist-info")]:
            shutil.rmtree(path)

    def replace(self, name: str, version: str, code: str = "") -> None:
        self.remove(name)
        self.add(name, version, code)

    def version(self, name: str) -> str:
        (facts,) = self.packages.glob(f"{name}-*.dist-info")
        return facts.name.removeprefix(f"{name}-").removesuffix(".dist-info")

    def check(self, command: str, *arguments: str) -> subprocess.CompletedProcess:
        line = [self.python, DOCKER / "check_image.py", command, self.frozen, *arguments]
        return subprocess.run([str(word) for word in line], capture_output=True, text=True, timeout=60)

    def freeze(self) -> None:
        assert self.check("freeze").returncode == 0

    def refuses(self, *words: str, arguments: tuple[str, ...] = ()) -> str:
        """verify fails with one line that has all `words`."""
        result = self.check("verify", *arguments)
        assert result.returncode == 2, result
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and all(word in errors[0] for word in words), result.stderr
        return errors[0]


@pytest.fixture
def image(tmp_path) -> Image:
    return Image(tmp_path / "image")


def test_nvidias_builds_are_frozen_and_an_untouched_image_passes(image):
    image.freeze()
    frozen = image.frozen.read_text().splitlines()
    assert f"torch=={NVIDIA_TORCH}" in frozen and "numpy==2.1.0" in frozen and "apex==0.1" in frozen
    assert not [line for line in frozen if line.startswith(("requests", "deepspeed"))]
    passed = image.check("verify")
    assert passed.returncode == 0 and NVIDIA_TORCH in passed.stdout and passed.stderr == ""


def test_a_replaced_or_removed_build_fails(image):
    image.freeze()
    image.replace("torch", "2.13.0", "class version: cuda = '13.0'")
    image.refuses("torch", f"was {NVIDIA_TORCH}", "became 2.13.0")
    image.check("freeze")
    image.refuses("torch")  # what a failed install has put there is not taken for NVIDIA's
    image.replace("torch", NVIDIA_TORCH, "class version: cuda = '13.3'")
    image.remove("numpy")
    image.refuses("numpy", "is gone")


def test_pypis_apex_fails(image):
    image.freeze()
    image.remove("apex")
    image.add("apex", "0.1", "import pyramid")
    (image.packages / "apex" / "forms.py").touch()  # as in apex 0.9.10dev on PyPI
    assert "web toolkit" in image.refuses("apex", "is not NVIDIA's")


def test_a_missing_package_fails_unless_it_is_allowed(image):
    image.remove("flash_attn")
    image.freeze()
    image.refuses("flash-attn", "WITHOUT=flash-attn")
    allowed = image.check("verify", "--without", "flash-attn")
    assert allowed.returncode == 0 and "note: flash-attn" in allowed.stderr
    image.remove("deepspeed")
    image.refuses("deepspeed", "No module named", arguments=("--without", "flash-attn", "deepspeed"))


def test_a_package_that_wants_the_driver_is_excused_while_building_only(image):
    image.replace("flash_attn", "2.7.4.post1", "raise ImportError('libcuda.so.1: cannot open shared object file')")
    image.freeze()
    passed = image.check("verify")
    assert passed.returncode == 0 and "--gpu" in passed.stderr
    image.replace("torch", NVIDIA_TORCH, "class version: cuda = '13.3'\nclass cuda:\n    is_available = lambda: True\nbfloat16 = 0\n"
                  "class ones:\n    __init__ = lambda *a, **k: None\n    sum = item = lambda self: self")  # fmt: skip
    image.refuses("flash-attn", "libcuda.so.1", arguments=("--gpu",))


def test_no_gpu_a_cpu_build_and_a_crash_fail(image):
    image.freeze()
    image.refuses("torch", "finds no GPU", arguments=("--gpu",))
    image.replace("torch", NVIDIA_TORCH, "class version: cuda = None")
    image.refuses("torch", "is a CPU build")
    image.replace("torch", NVIDIA_TORCH, "class version: cuda = '13.3'")
    image.replace("gguf", "1.0", "import os; os.abort()")
    image.refuses("gguf", "exit code")


def test_an_image_without_torch_and_a_forgotten_freeze_are_refused(image):
    image.refuses("frozen.txt", "run freeze")
    image.remove("torch")
    refused = image.check("freeze")
    assert refused.returncode == 2 and "NVIDIA's PyTorch image" in refused.stderr and not image.frozen.exists()


def wheel(folder: Path, name: str, version: str, requires: str = "") -> None:
    facts = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}/__init__.py", "class version: cuda = '13.0'\n")
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        file.writestr(f"{facts}/METADATA", metadata + (f"Requires-Dist: {requires}\n" if requires else ""))
        file.writestr(f"{facts}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{facts}/RECORD", "")


@pytest.fixture
def install(tmp_path, image):
    """install.sh as it stands, with one requirement of ours and a folder of wheels, which has newer torch, for an index."""
    clone, wheels = tmp_path / "clone", tmp_path / "wheels"
    shutil.copytree(DOCKER, clone / "docker")
    (clone / "requirements").mkdir()
    (clone / "requirements" / "dev.txt").touch()
    wheels.mkdir()
    for version in ("2.12.0", "2.13.0", "2.14.0"):
        wheel(wheels, "torch", version)
    wheel(wheels, "apex", "0.9.10")

    def run(requirement: str, *arguments: str, needs: str = "", **environment) -> subprocess.CompletedProcess:
        (clone / "requirements" / "base.txt").write_text(requirement + "\n")
        wheel(wheels, "ours", "1.0", needs)
        names = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull, "PIP_CONSTRAINT": str(image.frozen)}
        names |= {"PYTHON": str(image.python), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        command = ["bash", str(clone / "docker" / "install.sh"), *arguments]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        return subprocess.run(command, env=kept | names | environment, capture_output=True, text=True, timeout=120)

    return run


def test_pip_keeps_nvidias_torch_though_it_is_a_pre_release(install, image):
    done = install("ours", needs="torch>=2.4")
    assert done.returncode == 0, done.stderr
    assert image.version("torch") == NVIDIA_TORCH and image.version("ours") == "1.0"


def test_pip_refuses_what_asks_for_another_torch(install, image):
    refused = install("ours", needs="torch>=2.14")
    assert refused.returncode != 0 and f"constraint) torch=={NVIDIA_TORCH}" in refused.stdout and image.version("torch") == NVIDIA_TORCH
    assert not list(image.packages.glob("ours-*"))


def test_the_build_fails_when_the_constraints_did_not_hold(install, image):
    """As if pip had not read them: `pip install` by hand between the two halves of the guard."""
    image.freeze()
    image.replace("torch", "2.14.0", "class version: cuda = '13.4'")
    refused = install("ours", PIP_CONSTRAINT=str(image.frozen), needs="")
    assert refused.returncode == 2 and "became 2.14.0" in refused.stderr


def test_the_build_fails_when_pypis_apex_came_in(install, image):
    image.remove("apex")
    refused = install("ours", needs="apex", WITHOUT="apex")
    assert refused.returncode == 2 and "web toolkit" in refused.stderr
    image.remove("apex")
    image.remove("ours")
    assert install("ours", WITHOUT="apex").returncode == 0


def test_into_an_environment_where_nobody_may_build_images(install, image, tmp_path):
    done = install("ours", str(tmp_path / "venv"), PYTHONPATH=str(image.packages), PIP_CONSTRAINT="/absent/list/of/the/image")
    assert done.returncode == 0, done.stderr
    assert f"torch=={NVIDIA_TORCH}" in (tmp_path / "venv" / "image-constraints.txt").read_text()
    assert list(tmp_path.glob("venv/lib/python*/site-packages/ours-1.0.dist-info")) and not list(image.packages.glob("ours-*"))
