"""megatron.recompute reaches Megatron's configuration (equal losses, as in test_layouts, cannot show it)."""

import pytest

from endprompt.models.architectures import get_architecture
from endprompt.models.layout import check_layout
from tests.support.recipes import make_recipe


@pytest.mark.parametrize("recompute", ["full", "selective", "none"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_what_is_recomputed(recompute, checkpointing):
    from megatron_patches.model import transformer_config

    tiny = get_architecture("tiny")
    recipe = make_recipe(**{"megatron.recompute": recompute, "training.activation_checkpointing": checkpointing})
    config = transformer_config(recipe, tiny, check_layout(recipe, tiny, 1), {})
    wanted = recompute if checkpointing and recompute != "none" else None
    assert config.recompute_granularity == wanted
    assert config.recompute_num_layers == (1 if wanted == "full" else None)
