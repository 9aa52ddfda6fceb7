"""Find the torch_dist folder that a user means: the folder itself, a run of this project, or Megatron-LM's save folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

from endprompt.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron-LM's pointer to the newest checkpoint: an iteration, or `release`."""

_NUMBERED = re.compile(r"(?:iter|step)_(\d+)")


def is_megatron(path: Path) -> bool:
    """Whether the folder looks like a Megatron checkpoint, or a run that holds some, rather than a Hugging Face folder."""
    return (path / "metadata.json").is_file() or bool(_steps(path)) or (path / "release").is_dir()


def find_checkpoint(path: Path, step: int | None) -> tuple[Path, int | None]:
    """(torch_dist folder, step or None where its place does not tell). The newest complete one unless `step` chooses.

    Raises UserError where there is none, the step is not there, or the checkpoint has Megatron's older formats.
    """
    if not path.is_dir():
        raise UserError(path, "no such folder", "give a Megatron checkpoint, a run folder or Megatron-LM's save folder")
    if (path / "metadata.json").is_file():
        found = _step_of(path)
        if step is not None and step != found:
            raise UserError(f"--step {step}", f"{path} is one checkpoint already", "give the folder above it or leave --step out")
        return path, found
    steps = _steps(path)
    chosen = steps.get(step) if step is not None else _newest(path, steps)
    if chosen is None:
        if step is None and not steps:
            _explain_none(path)
        known = ", ".join(map(str, sorted(steps))) or "none"
        raise UserError(path, f"has no checkpoint of step {step} (there are: {known})", "choose one of those with --step")
    if not (chosen / "metadata.json").is_file():
        _explain_none(chosen)
    return chosen, _step_of(chosen)


def _steps(path: Path) -> dict[int, Path]:
    """Checkpoints by step, of a run folder's checkpoints/ or of the folder itself. Unfinished ones have another suffix."""
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = {}
    for entry in folder.iterdir() if folder.is_dir() else ():
        match = _NUMBERED.fullmatch(entry.name)
        if match and entry.is_dir():
            found[int(match[1])] = entry
    return found


def _newest(path: Path, steps: dict[int, Path]) -> Path | None:
    """What the tracker of Megatron-LM or of a run names, else the highest number."""
    for tracker in (path / TRACKER, path / "latest", path / "checkpoints/latest"):
        if not tracker.is_file():
            continue
        name = tracker.read_text(errors="replace").strip()
        if name == "release":
            named = path / "release"
        elif name.isdecimal():
            named = steps.get(int(name))
        else:
            match = _NUMBERED.fullmatch(name)
            named = steps.get(int(match[1])) if match else None
        if named is None or not named.is_dir():
            raise UserError(tracker, f"names {name[:40]!r}, which is not there", "choose a checkpoint with --step")
        return named
    return steps[max(steps)] if steps else None


def _step_of(folder: Path) -> int | None:
    state = folder / "state.json"
    if state.is_file():
        try:
            step = json.loads(state.read_text())["step"]
            if isinstance(step, int):
                return step
        except (ValueError, KeyError, TypeError):
            pass
        raise UserError(state, "does not say a step", "use an undamaged checkpoint")
    match = _NUMBERED.fullmatch(folder.name)
    return int(match[1]) if match else None


def _explain_none(path: Path) -> None:
    if list(path.glob("**/mp_rank_*/*.pt"))[:1]:
        fix = "save it with --ckpt-format torch_dist (Megatron-LM: --ckpt-convert-format torch_dist)"
        raise UserError(path, "is a pickled checkpoint of Megatron's old format", fix)
    raise UserError(path, "holds no torch_dist checkpoint (no metadata.json)", "give a checkpoint of Megatron-Core in torch_dist format")
