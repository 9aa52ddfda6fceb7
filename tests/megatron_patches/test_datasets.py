"""GPTDataset under megatron_patches.apply(recipe), built and blended by upstream's own builder, as a user's script does."""

import numpy as np
import pytest
import torch

import megatron_patches
from endprompt.errors import UserError
from endprompt.positions import SampleBuilder
from megatron_patches import datasets
from tests.support.one_rank import one_rank_world
from tests.support.workspace import Workspace

PAD = -1


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("megatron_data"))


@pytest.fixture(scope="module", autouse=True)
def world():
    with one_rank_world():
        yield


class Tokenizer:
    """What GPTDatasetConfig asks a tokenizer."""

    vocab_size, eod, pad, unique_identifiers = 512, 1, PAD, {"class": "test"}


def build(workspace, tmp_path, samples=40, **options):
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    settings = {
        "random_seed": 5, "sequence_length": 64, "split": None, "reset_position_ids": False, "reset_attention_mask": False,
        "eod_mask_loss": False, "create_attention_mask": False, "tokenizer": Tokenizer(), "path_to_cache": str(tmp_path / "cache"),
        "blend_per_split": [
            ([str(workspace.path / "corpus_train"), str(workspace.path / "corpus_validation")], [0.7, 0.3]),
            ([str(workspace.path / "corpus_validation")], None),
            None,
        ],
    }  # fmt: skip
    config = GPTDatasetConfig(**{**settings, **options})
    return BlendedMegatronDatasetBuilder(GPTDataset, [samples, 4, 0], megatron_patches.is_dataset_built_on_rank, config).build()


def test_samples_have_the_recipes_positions_and_weights(workspace, tmp_path):
    recipe = workspace.recipe(**{"positions.scheme": "endprompt_random", "positions.prompt_loss_weight": 0.25})
    plain = build(workspace, tmp_path)[0]
    texts = [plain[i]["tokens"].clone() for i in range(40)]
    ordinary = [plain[i]["position_ids"].clone() for i in range(40)]
    assert all(torch.equal(row, torch.arange(64)) for row in ordinary)
    megatron_patches.apply(recipe)
    patched = build(workspace, tmp_path)[0]
    builder = datasets.state.builder
    jumps = set()
    for i in range(40):
        item = patched[i]
        tokens, positions, weights, labels = (item[key] for key in ("tokens", "position_ids", "loss_mask", "labels"))
        prompt = builder.draw_prompt(dataset_index(patched, i))
        body = 64 - prompt.length
        assert torch.equal(tokens[:body], texts[i][:body]), "the text of the sample is upstream's"
        assert tokens[body:].tolist() == prompt.words.tolist()
        assert torch.equal(labels[:-1], tokens[1:])
        assert torch.equal(positions[:52], torch.arange(52)) and (positions[53:] - positions[52:-1] == 1).all()
        jumps.add(int(positions[52]))
        assert torch.equal(weights[: body - 1], torch.ones(body - 1)) and (weights[body - 1 : -1] == 0.25).all() and weights[-1] == 0
        assert "attention_mask" not in item
    assert len(jumps) > 20 and max(jumps) < 1024 - 12 + 1, "displacements differ (sample i of two blended datasets share one draw)"


def dataset_index(blended, i: int) -> int:
    return int(blended.dataset_sample_index[i])


def test_no_sample_shares_a_tensor_with_another(workspace, tmp_path):
    megatron_patches.apply(workspace.recipe(**{"positions.scheme": "endprompt_random"}))
    dataset = build(workspace, tmp_path, create_attention_mask=True)[0]
    first = dataset[0]
    kept = {key: value.clone() for key, value in first.items() if torch.is_tensor(value)}
    for key in kept:
        first[key].fill_(7) if first[key].dtype != torch.bool else first[key].fill_(True)
    again = dataset[0]
    for key, value in kept.items():
        assert torch.equal(again[key], value), key
    assert torch.equal(again["attention_mask"][0], torch.ones(64, 64, dtype=torch.bool).triu(1)), "physical order"


def test_a_sample_is_a_pure_function_of_its_number(workspace, tmp_path):
    megatron_patches.apply(workspace.recipe(**{"positions.scheme": "pose", "positions.pose": "{content: contiguous}"}))
    dataset = build(workspace, tmp_path)[0]
    forwards = [dataset[i]["position_ids"].clone() for i in range(10)]
    other = build(workspace, tmp_path)[0]  # a resumed run begins in the middle, in a new process
    for i in reversed(range(10)):
        assert torch.equal(other[i]["position_ids"], forwards[i])


def test_a_padding_sample_weighs_nothing(workspace, tmp_path):
    megatron_patches.apply(workspace.recipe())
    inner = build(workspace, tmp_path)[0].datasets[0]
    assert inner[None]["loss_mask"].sum() == 0 and inner[0]["loss_mask"].sum() > 0


def test_end_of_document_tokens_can_be_masked_as_upstream_does(workspace, tmp_path):
    megatron_patches.apply(workspace.recipe())
    inner = build(workspace, tmp_path, eod_mask_loss=True)[0].datasets[0]
    Tokenizer.eod = int(inner[0]["tokens"][5])
    try:
        item = inner[0]
        at = item["tokens"] == Tokenizer.eod
        assert at[5] and item["loss_mask"][at].sum() == 0
    finally:
        Tokenizer.eod = 1


def test_without_a_recipe_the_data_is_upstreams(workspace, tmp_path):
    before = build(workspace, tmp_path)[0][3]
    megatron_patches.apply()
    after = build(workspace, tmp_path)[0][3]
    for key in ("tokens", "labels", "loss_mask", "position_ids"):
        assert torch.equal(before[key], after[key])


@pytest.mark.parametrize(
    "recipe, options, words",
    [
        ({}, {"sequence_length": 32}, "set --seq-length 64"),
        ({"positions.scheme": "pose"}, {}, "content: contiguous"),
        ({}, {"reset_attention_mask": True}, "reset_attention_mask"),
        ({}, {"reset_position_ids": True}, "reset_position_ids"),
    ],
    ids=["length", "text that skips", "document masks", "document positions"],
)
def test_settings_that_contradict_the_recipe(workspace, tmp_path, recipe, options, words):
    megatron_patches.apply(workspace.recipe(**recipe))
    dataset = build(workspace, tmp_path, **options)[0]
    with pytest.raises(UserError, match=words):
        dataset[0]


def test_the_builder_is_the_one_of_ds_train(workspace):
    recipe = workspace.recipe()
    megatron_patches.apply(recipe)
    assert isinstance(datasets.state.builder, SampleBuilder)
    text = np.arange(5, 69)
    from endprompt.training.prepare import sample_builder

    ours, theirs = datasets.state.builder(text, 9), sample_builder(recipe, 512)(text, 9)
    assert np.array_equal(ours.position_ids, theirs.position_ids) and np.array_equal(ours.tokens, theirs.tokens)
