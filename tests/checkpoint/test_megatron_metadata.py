"""endprompt_model.json: comes back as it went in, and nothing unreadable passes."""

import json

import pytest

from endprompt.checkpoint.megatron_metadata import FACTS, read_model_facts, write_model_facts
from endprompt.errors import UserError
from endprompt.models.architectures import architecture_of_config, resolve_architecture
from endprompt.models.hf_config import load_hf_config, rope_of_config
from endprompt.rope import scaling_for
from tests.support.recipes import make_recipe
from tests.support.tiny import make_tiny_checkpoint


def written(tmp_path, recipe=None):
    make_tiny_checkpoint(tmp_path / "model")
    config = load_hf_config(tmp_path / "model")
    if recipe is None:
        architecture, rope = architecture_of_config(config), rope_of_config(config)
    else:
        architecture, rope = resolve_architecture(recipe, config), scaling_for(recipe, rope_of_config(config))
    write_model_facts(tmp_path, recipe, architecture, config, rope, source=tmp_path / "model")
    return architecture, config, rope


def test_facts_of_a_run_come_back(tmp_path):
    recipe = make_recipe(**{"rope.type": "yarn", "output.export_dtype": "bf16", "model.path": str(tmp_path / "model")})
    architecture, config, rope = written(tmp_path, recipe)
    facts = read_model_facts(tmp_path)
    assert facts.architecture == architecture and facts.rope == rope and facts.hf_config == config
    assert (facts.original_length, facts.target_length, facts.dtype) == (128, 1024, "bf16")
    assert facts.recipe == recipe.model_dump(mode="json") and len(facts.source_hashes["config.json"]) == 64


def test_facts_of_a_conversion_keep_window_and_dtype(tmp_path):
    written(tmp_path)
    facts = read_model_facts(tmp_path)
    assert facts.target_length == 128 and facts.dtype is None and facts.recipe is None and facts.padded_vocab_size == 512
    assert read_model_facts(tmp_path / "model") is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 2}, "schema 2"),
        ({"padded_vocab_size": 511}, "padded_vocab_size 511"),
        ({"dtype": "int4"}, "int4"),
        ({"rope": {"type": "spiral", "theta": 1.0, "head_dim": 16}}, "spiral"),
        ({"target_length": "long"}, "whole numbers"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_what_cannot_be_understood_is_one_line(tmp_path, change, said):
    written(tmp_path)
    (tmp_path / FACTS).write_text(json.dumps(json.loads((tmp_path / FACTS).read_text()) | change))
    with pytest.raises(UserError, match=said) as raised:
        read_model_facts(tmp_path)
    assert "\n" not in str(raised.value) and FACTS in str(raised.value)
