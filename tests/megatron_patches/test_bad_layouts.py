"""What a recipe's Megatron section can get wrong: one line that names the field and the fix, exit code 2."""

import json

import pytest

from endprompt.errors import UserError
from endprompt.models.architectures import get_architecture
from endprompt.models.layout import check_layout
from tests.support.recipes import make_recipe
from tests.support.workspace import MEGATRON, Workspace

TINY = get_architecture("tiny")  # 2 layers, 4 heads, 2 key/value heads, width 128, vocabulary 512


def recipe(**fields):
    return make_recipe(
        **{("training." if key in ("global_batch_size", "micro_batch_size") else "megatron.") + key: value for key, value in fields.items()}
    )


@pytest.mark.parametrize(
    "fields, ranks, words",
    [
        ({"tensor_parallel": 4}, 4, ["tensor_parallel", "key/value heads 2"]),
        ({"tensor_parallel": 3}, 3, ["tensor_parallel", "choose a divisor"]),
        ({"pipeline_parallel": 3}, 3, ["pipeline_parallel", "layers 2"]),
        ({"virtual_pipeline": 2}, 1, ["virtual_pipeline", "without pipeline stages"]),
        ({"pipeline_parallel": 2, "virtual_pipeline": 2}, 2, ["virtual_pipeline", "layers of a stage"]),
        ({"context_parallel": 3}, 3, ["context_parallel", "6 chunks", "physical_length 64"]),
        ({"tensor_parallel": 2, "context_parallel": 2}, 2, ["do not divide 2", "multiple of 4"]),
        ({"global_batch_size": 6, "micro_batch_size": 2}, 2, ["global_batch_size", "2 data-parallel ranks"]),
    ],
    ids=lambda value: None if isinstance(value, (int, list)) else "-".join(f"{key}{number}" for key, number in value.items()),
)
def test_layouts_that_do_not_divide(fields, ranks, words):
    with pytest.raises(UserError) as raised:
        check_layout(recipe(**fields), TINY, ranks)
    assert all(word in str(raised.value) for word in words) and "; " in str(raised.value) and "\n" not in str(raised.value)


def test_a_vocabulary_that_does_not_divide_is_not_padded_in_silence():
    import dataclasses

    odd = dataclasses.replace(TINY, vocab_size=511)
    with pytest.raises(UserError, match="vocabulary size 511"):
        check_layout(recipe(tensor_parallel=2), odd, 2)


def test_interleaving_wants_micro_batches_in_groups():
    import dataclasses

    four = dataclasses.replace(TINY, layers=4)
    with pytest.raises(UserError, match="groups of 2; a step has 1"):
        check_layout(recipe(pipeline_parallel=2, virtual_pipeline=2, global_batch_size=1), four, 2)


def test_a_good_layout_is_described():
    layout = check_layout(recipe(tensor_parallel=2, pipeline_parallel=2), TINY, 8)
    assert (layout.data, layout.micro_steps, str(layout)) == (2, 2, "TP 2 + SP x PP 2 x CP 1 x DP 2")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    made = Workspace(tmp_path_factory.mktemp("bad"), num_hidden_layers=4)
    made.entry = MEGATRON
    return made


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"megatron.tensor_parallel": 4}, ["tensor_parallel", "key/value heads"]),
        ({"megatron.rope_fusion": True}, ["rope_fusion", "set it to false"]),
        ({"megatron.transformer": "transformer_engine"}, ["megatron.transformer", "not installed"]),
        ({"megatron.transformer": "apex"}, ["megatron.transformer", "found 'apex'"]),
        ({"megatron.tensor_paralel": 2}, ["did you mean tensor_parallel"]),
        ({"megatron.async_save": True, "output.save_interval": 1}, ["save_interval", "async_save"]),
    ],
    ids=lambda value: None if isinstance(value, list) else next(iter(value)).split(".")[1] + str(next(iter(value.values()))),
)
def test_the_command_gives_one_line(workspace, fields, words):
    refused = workspace.train("--dry-run", "--world-size", "4", expect=2, **fields)
    assert refused.stderr.count("error: ") == 1 and "Traceback" not in refused.stderr
    line = next(line for line in refused.stderr.splitlines() if line.startswith("error: "))
    assert all(word in line for word in words), line


def test_all_ranks_stop_with_one_line(workspace):
    refused = workspace.train(
        ranks=2, expect=2, **{"megatron.pipeline_parallel": 2, "training.global_batch_size": 4, "megatron.virtual_pipeline": 3}
    )
    assert refused.stderr.count("error: ") == 1 and "virtual_pipeline" in refused.stderr and "Traceback" not in refused.stderr


def test_a_changed_recipe_is_refused_on_resume(workspace):
    run = workspace.path / "mixed"
    workspace.train(ranks=1, **{"output.directory": run, "training.steps": 2})
    refused = workspace.train(ranks=1, expect=2, **{"output.directory": run, "training.steps": 2, "positions.scheme": "pose"})
    assert "positions.scheme 'endprompt' -> 'pose'" in refused.stderr
    assert json.loads((run / "status.json").read_text())["state"] in ("finished", "failed")


def test_fused_rope_is_refused_where_samples_differ(monkeypatch):
    from megatron_patches import model

    monkeypatch.setattr(model, "uses_transformer_engine", lambda recipe: True)
    fused = make_recipe(**{"megatron.rope_fusion": True, "training.micro_batch_size": 2})
    with pytest.raises(UserError, match="one table for all samples.*micro_batch_size to 1"):
        model.check_kernels(fused, one_layout=False)
    model.check_kernels(fused, one_layout=True)
    with pytest.raises(UserError, match="attention factor"):
        model.check_kernels(make_recipe(**{"megatron.rope_fusion": True, "rope.type": "yarn"}), one_layout=True)
