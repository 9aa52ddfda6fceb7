#!/usr/bin/env python3
"""Guard what NVIDIA's PyTorch image brings (torch, Transformer Engine, flash-attn, apex) while pip installs the rest.

    python docker/check_image.py freeze FILE                    # before: pip constraints that hold NVIDIA's builds
    python docker/check_image.py verify FILE [--without NAME]   # after: they are the same ones, and everything imports
    python docker/check_image.py verify FILE --gpu              # on a GPU node: with the driver there, no excuse counts

Standard library only: it runs before anything is installed. Exit code 2 with a line for each thing that is wrong.
`pip freeze` would not do: it names NVIDIA's builds by the wheel files that they came from, which are gone.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

EXIT_WRONG = 2

# Built by NVIDIA against each other, so that none may be exchanged for PyPI's build; numpy is what they were compiled
# against. Whatever else carries a local version (2.13.0a0+9186a08b2c.nv26.7) is a build of NVIDIA's too.
HELD = re.compile(r"^(torch.*|pytorch-triton|triton|transformer-engine.*|flash-attn.*|apex|numpy|nvidia-.*|cuda-.*)$")

NEEDED = {  # what must import -> the distribution that a message names
    "torch": "torch",
    "transformer_engine.pytorch": "transformer-engine",
    "flash_attn": "flash-attn",
    "apex.optimizers": "apex",
    "deepspeed": "deepspeed",
    "megatron.core": "megatron-core",
    "transformers": "transformers",
    "pyarrow": "pyarrow",
    "gguf": "gguf",
    "wandb": "wandb",
}
FROM_IMAGE = ("torch", "transformer-engine", "flash-attn", "apex")


def main() -> int:
    arguments = parse_arguments()
    if arguments.command == "freeze":
        return freeze(arguments.file)
    problems = verify(arguments.file, set(arguments.without), arguments.gpu)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not problems:
        print(f"image: torch {installed()['torch']} and all that NVIDIA built with it are untouched; everything imports")
    return EXIT_WRONG if problems else 0


def freeze(file: Path) -> int:
    """Write `file`: a pip constraint NAME==VERSION for each build of the image. An existing file is kept.

    Writing it again would take for NVIDIA's what a failed install has put in its place.
    """
    if file.exists():
        print(f"{file}: kept")
        return 0
    held = {name: version for name, version in installed().items() if HELD.match(name) or "+" in version}
    if "torch" not in held:
        print("error: torch: is not installed; start from NVIDIA's PyTorch image", file=sys.stderr)
        return EXIT_WRONG
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{name}=={version}\n" for name, version in sorted(held.items())))
    print(f"{file}: {len(held)} builds of the image are held")
    return 0


def verify(file: Path, without: set[str], gpu: bool) -> list[str]:
    """Everything that is wrong, a line each. without: distributions of the image that may be missing."""
    try:
        before = dict(line.split("==", 1) for line in file.read_text().splitlines())
    except (OSError, ValueError):
        return [f"{file}: is no list of frozen versions; run freeze before pip installs anything"]
    now, problems = installed(), []
    for name, version in before.items():
        if now.get(name) != version:
            became = f"became {now[name]}" if name in now else "is gone"
            problems.append(f"{name}: was {version} in the image and {became}; find the requirement that asks for it (pip show {name})")
    if problem := web_toolkit():
        problems.append(problem)
    for module, name in NEEDED.items():
        if name == "apex" and problem:
            continue  # said already
        if name in without and name in FROM_IMAGE and name not in now:
            print(f"note: {name} is not there, as allowed", file=sys.stderr)
        elif failure := import_failure(module):
            if "libcuda.so" in failure and not gpu:  # no driver while an image is built; it comes from the node
                print(f"note: {module} wants the GPU driver; check it on a node with --gpu", file=sys.stderr)
                continue
            fix = f"take an image that has it, or allow it with WITHOUT={name}" if name in FROM_IMAGE else "see pip's output above"
            problems.append(f"{name}: import {module} fails ({failure}); {fix}")
    if failure := import_failure("torch", CHECK_TORCH + (CHECK_GPU if gpu else "")):
        problems.append(f"torch: {failure}; take NVIDIA's PyTorch image" + (" and a node whose driver answers" if gpu else ""))
    return problems


CHECK_TORCH = "\nif not torch.version.cuda: raise SystemExit('is a CPU build')"
CHECK_GPU = """
if not torch.cuda.is_available(): raise SystemExit('finds no GPU')
torch.ones(8, device='cuda', dtype=torch.bfloat16).sum().item()"""


def installed() -> dict[str, str]:
    """Version of every distribution, by normalised name; the first on the path wins, as in an import."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    return found


def web_toolkit() -> str | None:
    """What is wrong with the apex that Python would import: PyPI's package of that name is a toolkit for web forms."""
    spec = importlib.util.find_spec("apex")
    if spec is None or not spec.submodule_search_locations:
        return None  # missing: the import says so
    folder = Path(next(iter(spec.submodule_search_locations)))
    if (folder / "optimizers").is_dir() and (folder / "normalization").is_dir():
        return None
    return f"apex: {folder} is not NVIDIA's apex (PyPI's apex is an unrelated web toolkit); pip uninstall apex, and require it nowhere"


def import_failure(module: str, then: str = "") -> str | None:
    """What `import module` says when it fails, in one line. In a process of its own: a broken extension may kill it."""
    code = f"import {module}{then}"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    if result.returncode == 0:
        return None
    lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
    return next((line for line in lines if "libcuda.so" in line), lines[-1])  # libraries wrap that one in messages of their own


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("freeze", "verify"):
        command = commands.add_parser(name)
        command.add_argument("file", type=Path, metavar="FILE", help="the frozen versions, a pip constraints file")
    command.add_argument("--without", nargs="*", default=[], metavar="NAME", help="what the image may lack: flash-attn, apex")
    command.add_argument("--gpu", action="store_true", help="a GPU must answer")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
