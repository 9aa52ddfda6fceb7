"""Read a Hugging Face checkpoint's safetensors: headers first, then any flat range of any tensor, and nothing more."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from endprompt.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class WeightFiles:
    """The tensors of a checkpoint folder by name. Opens shards as they are needed and keeps one open.

    Raises UserError for a missing, truncated or pickled checkpoint, at construction as far as file names tell.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._files = self._read_index()
        self._open: tuple[Path | None, object] = (None, None)

    def _read_index(self) -> dict[str, Path]:
        index, single = self.directory / INDEX, self.directory / SINGLE
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
                files = {name: self.directory / file for name, file in weight_map.items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(index, "is not a safetensors index", "download it again") from None
            for file in sorted(set(files.values())):
                if not file.is_file():
                    raise UserError(file, f"is listed in {INDEX} and missing", "download this shard")
            return files
        if single.is_file():
            return dict.fromkeys(self._handle(single).keys(), single)
        if list(self.directory.glob("pytorch_model*.bin")):
            raise UserError(self.directory, "has pickled weights only", "convert them to safetensors; this project opens no pickles")
        raise UserError(self.directory, f"has neither {INDEX} nor {SINGLE}", "set model.path to a Hugging Face checkpoint in safetensors")

    def _handle(self, file: Path):
        if getattr(self, "_open", (None, None))[0] != file:
            try:
                self._open = (file, safe_open(file, "pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(file, f"is damaged or cut short ({error})", "download this shard again") from None
        return self._open[1]

    def check(self, shapes: dict[str, tuple[int, ...]], optional: set[str]) -> None:
        """Every tensor of `shapes` is there with its shape and a float dtype, and no other except those in `optional`.

        Reads headers only. Raises UserError naming the first tensor that differs.
        """
        for name in sorted(shapes.keys() - self._files.keys()):
            raise UserError(self.directory, f"has no tensor {name}", "use a complete checkpoint of the architecture in its config.json")
        for name in sorted(self._files.keys() - shapes.keys() - optional):
            raise UserError(
                self.directory, f"has a tensor {name} that the architecture does not", "use an unquantised checkpoint without adapters"
            )
        for name in sorted(shapes, key=lambda name: (str(self._files[name]), name)):  # one opening a shard
            handle = self._handle(self._files[name])
            try:
                header = handle.get_slice(name)
            except SafetensorError:
                raise UserError(self._files[name], f"lacks {name}, which {INDEX} promises", "download this shard again") from None
            if tuple(header.get_shape()) != shapes[name]:
                raise UserError(
                    self._files[name],
                    f"{name} has shape {header.get_shape()}, config.json implies {list(shapes[name])}",
                    "use matching files",
                )
            if header.get_dtype() not in FLOATS:
                raise UserError(
                    self._files[name], f"{name} is stored as {header.get_dtype()}", "use an unquantised checkpoint (fp32, bf16 or fp16)"
                )

    def read_flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the tensor in row-major order, 1-D, in the stored dtype.

        Copies only the rows that cover the range: at most one row more at either end. Raises UserError for NaN or infinity.
        """
        part = self._handle(self._files[name]).get_slice(name)
        shape = part.get_shape()
        row = 1
        for size in shape[1:]:
            row *= size
        first, last = start // row, -(-stop // row)
        flat = part[first:last].reshape(-1)[start - first * row : stop - first * row]
        if (
            not torch.isfinite(flat.sum(dtype=torch.float32)) and not torch.isfinite(flat).all()
        ):  # the sum is cheap and nearly always decides
            raise UserError(self._files[name], f"{name} holds NaN or infinity", "use an undamaged checkpoint")
        return flat

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the tensor (numbers, for a vector), in the stored dtype; finite, or UserError."""
        width = 1
        shape = self._handle(self._files[name]).get_slice(name).get_shape()
        for size in shape[1:]:
            width *= size
        return self.read_flat(name, start * width, stop * width).reshape(stop - start, *shape[1:])
