"""The CPU backend: Megatron trains whole, in every layout to the same numbers, and nothing happens where there is a GPU."""

import importlib.util
import json
import logging
import threading

import pytest
import torch
from torch.overrides import _get_current_function_mode, _get_current_function_mode_stack

from endprompt.errors import UserError
from megatron_patches import cpu_backend, torch_adam
from tests.support.warm import launch_ranks

if importlib.util.find_spec("megatron") is None or not cpu_backend.install():
    pytest.skip("needs Megatron-Core on a machine without CUDA", allow_module_level=True)
import megatron.core.models.gpt  # noqa: E402, F401  (while the backend is there: the later releases import triton)

cpu_backend.remove()

WEIGHTS = dict(load="start", load_optimizer=False)  # another state of the optimizer, or another number of its parts

ONE_RANK = {
    "whole": dict(save={0: "start", 2: "half"}),
    "resumed": dict(load="half", first=2),
    "full recomputation": dict(load="start", recompute="full"),
    "selective recomputation": dict(load="start", recompute="selective"),
    "plain optimizer": dict(WEIGHTS, distributed=False),
    "bf16": dict(WEIGHTS, bf16=True),
    "dropout": dict(WEIGHTS, dropout=0.2),
    "dropout, full recomputation": dict(WEIGHTS, dropout=0.2, recompute="full"),
}
TWO_RANKS = {
    "TP2 SP": dict(tp=2, load="start", save={2: "half of TP2"}),
    "TP2 SP, full recomputation": dict(WEIGHTS, tp=2, recompute="full"),
    "TP2 SP, selective recomputation": dict(WEIGHTS, tp=2, recompute="selective"),
    "TP2 SP, bf16": dict(WEIGHTS, tp=2, bf16=True),
    "PP2": dict(pp=2, load="start"),
    "PP2 VPP2": dict(WEIGHTS, pp=2, vpp=2),
    "PP2 VPP2, overlap": dict(WEIGHTS, pp=2, vpp=2, overlap=True),
    "CP2": dict(WEIGHTS, cp=2),
    "DP2": dict(load="start", sharding="fully_reshardable", save={2: "half of DP2"}),
    "DP2, overlap": dict(load="start", overlap=True),
    "DP2, plain optimizer, overlap": dict(WEIGHTS, distributed=False, overlap=True),
    "DP2, bf16, overlap": dict(WEIGHTS, bf16=True, overlap=True),
    "DP2, buckets": dict(WEIGHTS, sharding="dp_reshardable", save={2: "half in buckets"}),
    "DP2 of TP2": dict(load="half of TP2", first=2),
    "PP2 of DP2": dict(load="half of DP2", first=2, pp=2),
    "DP2 of buckets, overlap": dict(load="half in buckets", first=2, sharding="dp_reshardable", overlap=True),
}
EXACT = ["resumed", "full recomputation", "selective recomputation"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Losses, norms and Adam's step counters of every case; two worlds, since starting a process costs more than a case."""
    folder = tmp_path_factory.mktemp("cpu")
    found = {}
    for ranks, program in ((1, ONE_RANK), (2, TWO_RANKS)):
        file, out = folder / f"program{ranks}.json", folder / f"results{ranks}.json"
        file.write_text(json.dumps(program))
        assert launch_ranks("megatron", ranks, "cpu_backend_rank.py", file, folder, out) == 0
        found |= json.loads(out.read_text())
    return found


def expected(results, name, key):
    whole = results["bf16" if "bf16" in name else "whole"][key]
    return whole[len(whole) - len(results[name][key]) :]


@pytest.mark.parametrize("name", [name for name in [*ONE_RANK, *TWO_RANKS] if "dropout" not in name])
def test_every_layout_trains_to_the_numbers_of_one_process(results, name):
    """Tensor parallelism in bf16 rounds partial sums, so it agrees to bf16's precision only."""
    losses, norms = (2e-2, 1e-1) if name == "TP2 SP, bf16" else (1e-5, 1e-5)
    assert results[name]["losses"] == pytest.approx(expected(results, name, "losses"), rel=losses)
    assert results[name]["norms"] == pytest.approx(expected(results, name, "norms"), rel=norms)


@pytest.mark.parametrize("name", EXACT)
def test_recomputing_and_resuming_change_no_bit(results, name):
    assert results[name]["losses"] == expected(results, name, "losses")
    assert results[name]["norms"] == expected(results, name, "norms")


def test_a_load_from_buckets_changes_no_bit(results):
    for key in ("losses", "norms"):
        assert results["DP2 of buckets, overlap"][key] == results["DP2"][key][2:]


@pytest.mark.parametrize("name", ["DP2", "PP2 VPP2"])
def test_overlap_changes_nothing(results, name):
    assert results[f"{name}, overlap"]["losses"] == pytest.approx(results[name]["losses"], rel=1e-6)
    assert results[f"{name}, overlap"]["norms"] == pytest.approx(results[name]["norms"], rel=1e-6)


def test_dropout_is_drawn_again_alike_when_recomputed(results):
    dropout, recomputed = results["dropout"], results["dropout, full recomputation"]
    assert dropout["losses"] == recomputed["losses"] and dropout["norms"] == recomputed["norms"]
    assert abs(dropout["losses"][0] - results["whole"]["losses"][0]) > 1e-2


@pytest.mark.parametrize("name", ["resumed", "DP2 of TP2", "PP2 of DP2", "DP2 of buckets, overlap", "DP2"])
def test_every_parameter_has_its_own_step_after_a_load(results, name):
    case = results[name]
    for when, steps in (("loaded", 3 - len(case["losses"])), ("stepped", 3)):
        states, distinct, values = case[when]
        assert states == distinct > 4 and values == [steps]


@pytest.fixture
def backend():
    assert cpu_backend.install()
    yield cpu_backend
    cpu_backend.remove()


def names():
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.tensor_parallel import random

    places = [(module, name) for module, name, *_ in cpu_backend.REPLACED]
    places += [(random, "_set_cuda_rng_state"), (torch.autograd, "_engine_run_backward")]
    return [getattr(*place) for place in places + [(DistributedOptimizer, name) for name in torch_adam.SIGNATURES]]


def test_nothing_is_touched_where_there_is_a_gpu(monkeypatch):
    before = names()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cpu_backend.install() is False
    assert all(a is b for a, b in zip(names(), before, strict=True))
    assert _get_current_function_mode_stack() == []


def test_installing_twice_is_installing_once_and_removing_restores_all():
    before = names()
    assert cpu_backend.install() and cpu_backend.install()
    during = names()
    assert not any(a is b for a, b in zip(before, during, strict=True))
    assert len(set(map(id, during))) == len(during), "torch._dynamo refuses one object under two names"
    assert len(_get_current_function_mode_stack()) == 1
    cpu_backend.remove()
    assert all(a is b for a, b in zip(names(), before, strict=True)) and _get_current_function_mode() is None
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_cuda_means_the_cpu(backend):
    for device in ("cuda", "cuda:0", torch.device("cuda", 1), torch.cuda.current_device()):
        assert torch.zeros(2, device=device).device.type == "cpu"
        assert torch.zeros(2).to(device).to(device=device).device.type == "cpu"
    assert torch.zeros(2, pin_memory=True).pin_memory().cuda(non_blocking=True).sum() == 0
    assert torch.nn.Linear(2, 2).cuda().to("cuda", torch.bfloat16).weight.dtype == torch.bfloat16
    with torch.cuda.stream(torch.cuda.Stream(device=torch.cuda.current_device())):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        torch.cuda.Event(enable_timing=True).record()


def test_cuda_random_states_are_those_of_the_cpu(backend):
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.random.set_rng_state(state, "cuda")
    assert torch.equal(torch.rand(3), first)


def test_only_megatron_hears_that_tensors_are_cuda_tensors(backend):
    kinds = {}
    for name in ("megatron.core.optimizer.clip_grads", "elsewhere"):
        exec("kind = torch.zeros(1).type()", scope := {"__name__": name, "torch": torch})
        kinds[name] = scope["kind"]
    assert list(kinds.values()) == ["torch.cuda.FloatTensor", "torch.FloatTensor"]


@pytest.mark.parametrize("backward", [torch.autograd.backward, torch.Tensor.backward, lambda loss: torch.autograd.grad(loss, inputs=[X])])
def test_hooks_and_recomputed_layers_run_under_the_mode(backend, backward):
    """torch leaves the mode while its handler runs, and every one of these calls goes through the handler."""
    seen = []

    class Recomputed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            with torch.enable_grad():
                again = torch.ones(1, device="cuda", requires_grad=True)
                again.register_hook(lambda g: seen.append(torch.zeros(1, device="cuda")))
                torch.autograd.backward(again * 2)
            return gradient * 2

    product = Recomputed.apply(X)
    product.register_hook(lambda g: seen.append((torch.zeros(1, device="cuda"), threading.current_thread())[0]))
    backward(product.sum())
    assert len(seen) == 2 and _get_current_function_mode_stack() == [cpu_backend._mode]


X = torch.ones(2, requires_grad=True)


def test_another_thread_has_to_install_for_itself(backend):
    def zeros(install):
        found = []

        def run():
            if install:
                cpu_backend.install()
            try:
                found.append(torch.zeros(1, device="cuda").device.type)
            except (AssertionError, RuntimeError) as error:
                found.append(type(error))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return found[0]

    assert zeros(install=False) is not zeros(install=True) == "cpu"


def test_a_mode_of_somebody_else_is_not_taken_for_ours(backend):
    class Other(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Other():
        assert cpu_backend.install() and len(_get_current_function_mode_stack()) == 2
        with pytest.raises(RuntimeError, match="another TorchFunctionMode"):
            cpu_backend.remove()


def test_the_warning_about_one_generator_is_silent_and_others_are_not(backend, caplog):
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    with caplog.at_level(logging.WARNING, logger.name):
        logger.warning("CPU RNG state changed within GPU RNG context")
        logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


@pytest.mark.parametrize("method", torch_adam.SIGNATURES)
def test_another_signature_is_refused_and_nothing_stays_replaced(monkeypatch, method):
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    monkeypatch.setattr(DistributedOptimizer, method, lambda self, something, new: None)
    before = names()
    for install in (torch_adam.install, cpu_backend.install):
        with pytest.raises(UserError, match=rf"DistributedOptimizer.{method}: takes \(self, something, new\)"):
            install()
        assert all(a is b for a, b in zip(names(), before, strict=True)) and _get_current_function_mode() is None


def test_another_setter_of_random_states_is_refused(monkeypatch):
    from megatron.core.tensor_parallel import random

    monkeypatch.setattr(random, "_set_cuda_rng_state", lambda state: None)
    with pytest.raises(UserError, match="_set_cuda_rng_state"):
        cpu_backend.install()
    monkeypatch.delattr(random, "_set_cuda_rng_state")
    with pytest.raises(UserError, match="is gone"):
        cpu_backend.install()


@pytest.mark.parametrize("version", ["0.15.3", "0.20.0", "1.0.0"])
def test_another_release_is_refused(monkeypatch, version):
    monkeypatch.setattr("megatron_patches.guards._installed", lambda: version)
    for install in (torch_adam.install, cpu_backend.install):
        with pytest.raises(UserError, match=f"{version} is (older|newer)"):
            install()


def test_a_fused_adam_needs_no_repair(monkeypatch):
    from megatron.core.optimizer import distrib_optimizer

    before = names()
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    assert torch_adam.install() is False
    assert all(a is b for a, b in zip(names(), before, strict=True))
