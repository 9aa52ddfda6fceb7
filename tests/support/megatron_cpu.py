"""Just enough of a CUDA device for Megatron-Core to load, run and save a GPTModel over gloo where there is none."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


class _NoStream:
    def __init__(self, *arguments, **named):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **named: None


class _CudaIsCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if function in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if function is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return function(*args, **kwargs)


def _is_cuda(device) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


def install() -> None:
    if torch.cuda.is_available():
        return
    cuda = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.synchronize = lambda *arguments: None
    cuda.set_device = lambda *arguments: None
    cuda.empty_cache = lambda: None
    cuda.current_stream = lambda *arguments: _NoStream()
    cuda.default_stream = lambda *arguments: _NoStream()
    cuda.Stream, cuda.Event = type("Stream", (_NoStream,), {}), type("Event", (_NoStream,), {})
    cuda.nvtx.range_push, cuda.nvtx.range_pop = lambda *arguments: None, lambda *arguments: None
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *arguments, **named: torch.random.get_rng_state()
        module.set_rng_state = lambda state, *arguments, **named: torch.random.set_rng_state(state)
        module.manual_seed = lambda seed: torch.random.default_generator.manual_seed(seed)
    _CudaIsCpu().__enter__()
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._set_cuda_rng_state = lambda state, *arguments, **named: torch.random.set_rng_state(state)
