"""Make .venv in the repository root (what `make setup` runs). TORCH_INDEX chooses another build of torch."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from endprompt.errors import run_command
from endprompt.install import set_up


def main() -> None:
    set_up(ROOT, Path(".venv"))


if __name__ == "__main__":
    run_command(main)
