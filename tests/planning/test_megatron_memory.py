"""Memory of the Megatron engine's ranks: shares of a layout, activations in flight against a simulated schedule, the loss."""

from __future__ import annotations

import pytest

from endprompt.models.architectures import get_architecture
from endprompt.models.layout import Layout
from endprompt.planning import Cluster
from endprompt.planning.megatron_memory import (
    activation_bytes,
    built_bytes,
    layers_in_flight,
    loss_bytes,
    megatron_memory,
    megatron_states,
    stage_parameters,
)

LLAMA_8B, LLAMA_70B = get_architecture("llama3_8b"), get_architecture("llama3_70b")


def layout(tensor=1, pipeline=1, virtual=1, context=1, data=1, micro_steps=8, sequence_parallel=None) -> Layout:
    sequence = tensor > 1 if sequence_parallel is None else sequence_parallel
    return Layout(tensor * pipeline * context * data, tensor, pipeline, virtual, context, data, sequence, micro_steps)


def most_in_flight(stage: int, stages: int, chunks: int, micro_steps: int) -> int:
    """Forward passes, of one chunk each, that a rank has done beyond its backward passes, at most: the schedule run through.

    Megatron-Core's order (pipeline_parallel/schedules.py): warm-up forwards, then one forward and one backward in turn.
    """
    total = micro_steps * chunks
    warm_up = stages - stage - 1 if chunks == 1 else (stages - stage - 1) * 2 + (chunks - 1) * stages
    held = most = min(warm_up, total)
    for _ in range(total - held):
        held += 1
        most = max(most, held)
        held -= 1
    return most


@pytest.mark.parametrize("stages, chunks, micro_steps", [(4, 1, 8), (4, 1, 2), (4, 5, 8), (8, 10, 8), (2, 40, 2), (2, 4, 64), (5, 1, 32)])
def test_activations_in_flight_are_the_schedules(stages, chunks, micro_steps):
    for stage in (0, stages - 1):
        held = layers_in_flight(LLAMA_70B, layout(pipeline=stages, virtual=chunks, micro_steps=micro_steps), first=stage == 0)
        assert held == most_in_flight(stage, stages, chunks, micro_steps) * 80 / stages / chunks


def test_without_a_pipeline_every_layer_is_held_once():
    assert layers_in_flight(LLAMA_70B, layout(), first=True) == 80


@pytest.mark.parametrize("tensor, pipeline", [(1, 1), (4, 4), (8, 2), (2, 8)])
def test_ranks_hold_every_parameter_once_and_norms_on_each(tensor, pipeline):
    inner = LLAMA_70B.layers // pipeline
    ends = [(stage == 0, stage == pipeline - 1) for stage in range(pipeline)]
    shares = [stage_parameters(LLAMA_70B, layout(tensor, pipeline), embeds=first, has_head=last) for first, last in ends]
    norms_again = (tensor - 1) * (2 * LLAMA_70B.hidden_size * inner * pipeline + LLAMA_70B.hidden_size)
    assert sum(shares) * tensor - norms_again == pytest.approx(LLAMA_70B.parameters)


def test_a_tied_head_is_a_copy_on_the_last_of_several_stages():
    tied = get_architecture("llama3.2_1b")
    assert stage_parameters(tied, layout(), embeds=True, has_head=True) == tied.parameters
    both = [stage_parameters(tied, layout(pipeline=2), embeds=first, has_head=not first) for first in (True, False)]
    assert sum(both) == tied.parameters + tied.embedding_parameters


def test_states_are_18_bytes_and_the_optimizers_12_are_cut():
    whole = megatron_states(1e9, layout(data=4, context=2), False, "bf16")
    cut = megatron_states(1e9, layout(data=4, context=2), True, "bf16")
    assert sum(whole.values()) == 18e9 and sum(cut.values()) == 6e9 + 12e9 / 8
    assert sum(megatron_states(1e9, layout(), True, "fp32").values()) == 16e9


def test_the_loss_is_logits_of_the_ranks_share_in_bf16_and_fp32():
    """[s/CP, b, V/TP], 4 B of fp32 beside 2 of bf16; and the final norm's input and output, under SP a share of the tokens."""
    assert loss_bytes(LLAMA_70B, 8192, 1, layout()) == 8192 * (128256 * 6 + 4 * 8192)
    gathered = 2 * 8192
    assert loss_bytes(LLAMA_70B, 8192, 2, layout(tensor=4, context=2)) == 2 * 4096 * (32064 * 6 + 8192 + gathered)


def test_of_few_tokens_the_heads_gradient_is_more_than_its_logits():
    """In bf16: 6 B x T against 2 B x (T + h), so below h / 2 tokens."""
    assert loss_bytes(LLAMA_70B, 64, 1, layout()) == 128256 * 2 * (64 + 8192) + 64 * 4 * 8192


def test_the_distributed_optimizer_is_built_beside_two_copies_of_the_weights():
    assert sum(built_bytes(1e9, True, 2).values()) == 8e9 and sum(built_bytes(1e9, False, 2).values()) == 6e9


def test_a_layer_under_recomputation_keeps_its_input():
    kept, layer, _ = activation_bytes(LLAMA_8B, 8192, 1, layout(), "full")
    assert kept == 8192 * 4096 * 2 and layer == activation_bytes(LLAMA_8B, 8192, 1, layout(), "none")[0]
    sharded, _, _ = activation_bytes(LLAMA_8B, 8192, 1, layout(tensor=4, context=2), "full")
    assert sharded == kept / 8
    assert activation_bytes(LLAMA_8B, 8192, 1, layout(tensor=4, sequence_parallel=False), "full")[0] == kept
    assert activation_bytes(LLAMA_8B, 8192, 1, layout(), "full", 4)[0] == 2 * kept  # fp32


def test_every_cut_lowers_the_peak():
    def peak(recompute="full", **cuts):
        return megatron_memory(LLAMA_70B, 65536, 1, Cluster(8), layout(**cuts), recompute=recompute).total_gb

    start = peak()
    for cuts in ({"tensor": 2}, {"tensor": 8}, {"context": 2}, {"context": 8}, {"data": 2}, {"pipeline": 4}):
        assert peak(**cuts) < start
    assert peak("full") < peak("selective") == peak("none")
    assert peak(pipeline=4, virtual=5) > peak(pipeline=4)  # interleaving holds more in flight
