"""Run Megatron-Core on a CPU: the same Megatron code, over gloo, where no CUDA device is present.

`install()` does nothing where there is a GPU. Elsewhere it makes Megatron-Core 0.16 to 0.19 train whole: tensor, sequence,
pipeline (virtual too), context and data parallel, the distributed optimizer with and without overlap, recomputation, bf16,
and torch_dist checkpoints. Megatron names "cuda" in four ways, and each has one answer here:

- names of torch.cuda (`current_device`, streams, random states): the table `REPLACED`, which says why for each;
- devices in calls to torch (`device="cuda"`, `.cuda()`, `pin_memory`) and the type strings 'torch.cuda.FloatTensor' that its
  optimizer compares: a TorchFunctionMode, `_CudaIsCpu`;
- its setter of CUDA random states, which queues the call until CUDA starts: replaced in the module itself;
- triton kernels, which 0.17 and later import even for models that use none: an empty stand-in where triton is absent.

What a mode reaches, measured with torch 2.13. A mode belongs to one thread, and torch leaves it while the mode's own handler
runs. `torch.autograd.backward` and `Tensor.backward` pass through the handler, so without more every hook and every recomputed
layer would run without the mode (Megatron's `custom_backward` calls the engine itself and would keep it). Hence torch's call
of the autograd engine is wrapped too. The engine runs the CPU's part of a graph in the thread that called it, so no other
thread needs the mode; one that calls Megatron by itself has to call `install()` too. Forked writers of checkpoints inherit it.

Megatron's fusions, `persist_layer_norm` and gradient-accumulation fusion are CUDA kernels: the configuration has to turn them
off. Import Megatron inside functions of a main script, or install first: its checkpoint writer spawns a process that imports the
script again. Not covered: CUDA graphs, Megatron-FSDP, optimizer offloading, asynchronous checkpoints, `megatron.training`.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _get_current_function_mode_stack

from megatron_patches import torch_adam
from megatron_patches.guards import check_version, expect_signature

_CPU = torch.device("cpu")


class _NoStream:
    """A CUDA stream or event on a machine whose work is done when the call returns: any method does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return False

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):  # copy and pickle ask for optional protocols by name and must hear that there are none
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def _answers(value: object) -> Callable[[], Callable]:
    # A maker, not a function: torch._dynamo lists torch's functions by identity and raises "Duplicate torch object" if
    # two names hold one object.
    return lambda: lambda *args, **kwargs: value


def _calls(function: Callable) -> Callable[[], Callable]:
    return lambda: lambda argument, *args, **kwargs: function(argument)


def _stream_class() -> type:
    return type("NoStream", (_NoStream,), {})


_generator = torch.random.default_generator

# (module, name, maker of the replacement, why Megatron calls it). On a CPU torch's own either raises or waits for CUDA.
REPLACED: tuple[tuple[types.ModuleType, str, Callable[[], Any], str], ...] = (
    (torch.cuda, "current_device", _answers(_CPU), "the device of every buffer, passed on as device=..."),
    (torch.cuda, "set_device", _answers(None), "once per process, and in checkpoint workers"),
    (torch.cuda, "synchronize", _answers(None), "timers, pipeline sends and receives: a CPU call is done when it returns"),
    (torch.cuda, "empty_cache", _answers(None), "after buffers are freed"),
    (torch.cuda, "current_stream", _answers(_NoStream()), "gradient reduction waits for it"),
    (torch.cuda, "default_stream", _answers(_NoStream()), "gradient reduction waits for it (0.16)"),
    (torch.cuda, "set_stream", _answers(None), "the counterpart of current_stream"),
    (torch.cuda, "stream", _answers(_NoStream()), "a context around reductions with overlap and several optimizer instances"),
    (torch.cuda, "Stream", _stream_class, "communication streams of DDP"),
    (torch.cuda, "Event", _stream_class, "timing and ordering of streams"),
    (torch.cuda.nvtx, "range_push", _answers(None), "profiler ranges around layers"),
    (torch.cuda.nvtx, "range_pop", _answers(None), "profiler ranges around layers"),
    # The CPU has one generator. Megatron's tracker saves and restores states by these names, so dropout and initialisation
    # under tensor parallelism draw from its own streams as they do on a GPU.
    (torch.cuda, "get_rng_state", lambda: lambda *args, **kwargs: _generator.get_state(), "tracker: add"),
    (torch.cuda.random, "get_rng_state", lambda: lambda *args, **kwargs: _generator.get_state(), "tracker: fork, recomputation"),
    (torch.cuda, "set_rng_state", _calls(_generator.set_state), "the rerun state machine, checkpoints"),
    (torch.cuda.random, "set_rng_state", _calls(_generator.set_state), "the same by its other name"),
    (torch.cuda, "manual_seed", _calls(_generator.manual_seed), "model_parallel_cuda_manual_seed, tracker: add"),
    (torch.cuda.random, "manual_seed", _calls(_generator.manual_seed), "the same by its other name"),
)

_STASH = "megatron.core.transformer.moe.ops.paged_stash"  # the one triton module that is imported in any case
_RNG_SETTER = ("new_state", "device", "graph_safe")
_ENGINE_CALL = ("t_outputs", "args", "kwargs")

_undo: list[Callable[[], None]] = []


class _CudaIsCpu(TorchFunctionMode):
    """Every call to torch passes here: "cuda" becomes the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str) and _called_by_megatron():
            # Its optimizer sorts parameters by 'torch.cuda.FloatTensor' and the like. Everybody else hears the truth.
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _is_cuda(device: object) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


def _called_by_megatron() -> bool:
    caller = sys._getframe(2).f_globals.get("__name__", "")  # above the handler; torch's C++ leaves no frame between
    return caller.startswith("megatron.")


_mode = _CudaIsCpu()


def install() -> bool:
    """Make Megatron-Core run on this machine's CPU; True if it does now, False (and nothing is touched) where there is CUDA.

    Call it before any import of a Megatron model: the later releases import triton. May be called again, and has to be in
    every further thread that calls Megatron. Includes torch_adam.install(): without a GPU there is no fused Adam. Raises
    UserError for a Megatron-Core of another release or with other functions in the places replaced here.
    """
    if torch.cuda.is_available():
        return False
    if not _undo:
        try:
            _replace_names()
        except BaseException:
            remove()
            raise
    if _mode not in _get_current_function_mode_stack():
        _mode.__enter__()
    return True


def remove() -> None:
    """Take everything back, in the thread that installed it; for tests. Refuses inside a mode entered after this one."""
    if _mode in _get_current_function_mode_stack():
        if _get_current_function_mode() is not _mode:
            raise RuntimeError("another TorchFunctionMode was entered after the CPU backend: leave it first")
        _mode.__exit__(None, None, None)
    torch_adam.remove()
    while _undo:
        _undo.pop()()


def _replace_names() -> None:
    stand_in_for_triton()
    check_version()
    for module, name, make, _ in REPLACED:
        _replace(module, name, make())
    expect_signature(torch.autograd, "_engine_run_backward", _ENGINE_CALL, exact=True)
    _replace(torch.autograd, "_engine_run_backward", _under_the_mode(torch.autograd._engine_run_backward))

    import megatron.core.tensor_parallel.random as megatron_random

    expect_signature(megatron_random, "_set_cuda_rng_state", _RNG_SETTER, exact=True)
    _replace(megatron_random, "_set_cuda_rng_state", _calls(_generator.set_state)())
    _silence_rng_warning(megatron_random.__name__)
    torch_adam.install()


def _replace(module: types.ModuleType, name: str, value: object) -> None:
    original = getattr(module, name)
    _undo.append(lambda: setattr(module, name, original))
    setattr(module, name, value)


def _under_the_mode(run_backward: Callable) -> Callable:
    """The autograd engine with the mode on again: torch's handler, out of which it is called, has left it."""

    def run(t_outputs, *args, **kwargs):
        if _get_current_function_mode() is _mode:
            return run_backward(t_outputs, *args, **kwargs)
        with _mode:
            return run_backward(t_outputs, *args, **kwargs)

    return run


def stand_in_for_triton() -> None:
    """Make `import megatron.core` possible where the release imports triton and there is none. By itself it changes nothing else."""
    # `import megatron.core` already ends in this module, so its place on the disk has to tell whether this release has it.
    core = importlib.util.find_spec("megatron.core")
    stash = Path(*_STASH.split(".")[2:]).with_suffix(".py")
    places = core.submodule_search_locations if core is not None else ()
    has_stash = any(Path(folder, stash).exists() for folder in places)
    if not has_stash or _STASH in sys.modules or importlib.util.find_spec("triton") is not None:
        return
    stub = types.ModuleType(_STASH, "Stand-in: the kernels of MoE paged stash need triton.")
    stub.GLOBAL_BLOCK_SIZE, stub.paged_stash_copy_kernel, stub.paged_stash_pop_kernel = 1024, None, None
    sys.modules[_STASH] = stub


def _silence_rng_warning(logger_name: str) -> None:
    # The tracker warns if the CPU's generator moves while it lends out the GPU's. Here they are one, so it always does.
    logger, message = logging.getLogger(logger_name), "CPU RNG state changed within GPU RNG context"
    quiet = _Without(message)
    logger.addFilter(quiet)
    _undo.append(lambda: logger.removeFilter(quiet))


class _Without(logging.Filter):
    def __init__(self, message: str):
        super().__init__()
        self.message = message

    def filter(self, record: logging.LogRecord) -> bool:
        return self.message not in record.getMessage()
