#!/usr/bin/env python3
"""All benchmarks that this machine can run, results in benchmarks/results/ (`make bench`).

python benchmarks/run.py [--only step,data,loss,megatron,conversion]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from endprompt.commands import run_step
from endprompt.errors import UserError, run_command

BENCHMARKS = ("loss", "data", "step", "megatron", "conversion")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default=",".join(BENCHMARKS), help=f"of {', '.join(BENCHMARKS)} (default: all, about 15 minutes on 2 cores)"
    )
    chosen = parser.parse_args().only.split(",")
    for name in chosen:
        if name not in BENCHMARKS:
            raise UserError(f"--only {name}", "no such benchmark", f"choose of {', '.join(BENCHMARKS)}")
    for name in chosen:
        script, result = ROOT / "benchmarks" / f"bench_{name}.py", ROOT / "benchmarks" / "results" / f"{name}.json"
        run_step([sys.executable, str(script), "--output", str(result)], what=f"benchmark {name}")


if __name__ == "__main__":
    run_command(main)
