#!/usr/bin/env python3
"""Turn text into a Megatron indexed dataset that both engines read.

Run it again after an interruption: finished parts are kept. The dataset's bytes do not depend on --workers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt.data.corpus import SUFFIXES, TextOptions
from endprompt.data.merge import Split, read_sidecar
from endprompt.data.prepare import Job, prepare
from endprompt.errors import UserError, run_command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    types = ", ".join(SUFFIXES)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help=f"files ({types}), folders or glob patterns")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="Hugging Face folder with tokenizer.json")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="PREFIX.bin, .idx, .json (with a split PREFIX_train.*, ...)")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field of JSON lines, column of parquet (default: text)")
    parser.add_argument("--separator", metavar="LINE", help="the line between documents of a .txt file (default: one document a file)")
    parser.add_argument("--append-eos", action=argparse.BooleanOptionalAction, default=True, help="end documents with the tokenizer's eos")
    parser.add_argument("--add-bos", action="store_true", help="begin documents with the tokenizer's bos")
    parser.add_argument("--validation-fraction", type=float, metavar="F", help="put this share of documents aside, for instance 0.01")
    parser.add_argument("--validation-documents", type=int, metavar="N", help="put exactly N documents aside")
    parser.add_argument("--seed", type=int, default=42, help="decides which documents are put aside (default: 42)")
    parser.add_argument("--max-documents", type=int, metavar="N", help="keep only the first N documents")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset, or parts made with other settings")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    for name in ("workers", "max_documents"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}", f"{value} is below 1", "give a positive number or leave it out")
    if arguments.output.endswith("/") or not Path(arguments.output).name:
        raise UserError(f"--output {arguments.output}", "names no file", "give folder/name; name.bin and name.idx are written")
    if "\n" in (arguments.separator or ""):
        raise UserError("--separator", "holds a line break, so no line can equal it", "give the text of one line")
    job = Job(
        inputs=tuple(arguments.input),
        tokenizer=arguments.tokenizer,
        output=arguments.output,
        text=TextOptions(arguments.text_field, arguments.separator),
        append_eos=arguments.append_eos,
        add_bos=arguments.add_bos,
        split=Split(arguments.seed, arguments.validation_fraction, arguments.validation_documents),
        max_documents=arguments.max_documents,
    )
    result = prepare(job, workers=arguments.workers, overwrite=arguments.overwrite)
    if result.finished_before:
        print("already prepared with these settings, nothing to do:")
    if result.ignored:
        print(f"left out {result.ignored} files of other types")
    for prefix in result.prefixes:
        facts = read_sidecar(prefix)
        print(
            f"{prefix}: {facts['documents']:,} documents, {facts['tokens']:,} tokens, {facts['bytes_per_token']:.2f} bytes per token, "
            f"longest document {facts['longest_document']:,} tokens, {facts['empty_documents_skipped']} empty documents skipped"
        )


if __name__ == "__main__":
    run_command(main)
