"""The exported folder: same logits in plain transformers, right files, whole or absent."""

import json
import os
import stat

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from endprompt.errors import UserError
from endprompt.models.hf_config import load_hf_config, rope_of_config
from endprompt.rope import scaling_for
from endprompt.zero3.export import export_untrained, plan_shards, shard_name
from tests.support.tiny import make_tiny_checkpoint
from tests.support.warm import launch_ranks
from tests.support.workspace import Workspace


def exported(tmp_path, *, tied: bool, **overrides):
    """(workspace, recipe, folder, what the engine said)"""
    workspace = Workspace(tmp_path)
    make_tiny_checkpoint(workspace.model, tie_word_embeddings=tied)
    (workspace.model / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "temperature": 0.6, "do_sample": True}))
    (workspace.model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    recipe = workspace.recipe(**{"training.steps": 2, **overrides})
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert launch_ranks("deepspeed", 2, "export_rank.py", file, tmp_path / "out") == 0
    return workspace, recipe, tmp_path / "out", torch.load(tmp_path / "out.pt", weights_only=True)


def logits_in_plain_transformers(folder, said, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    n = said["input_ids"].shape[1]
    mask = torch.full((n, n), float("-inf"), dtype=dtype).triu(1)[None, None]
    with torch.no_grad():
        return model, model(input_ids=said["input_ids"], position_ids=said["position_ids"], attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize("rope", ["linear", "yarn"])
@pytest.mark.parametrize("tied", [False, True])
def test_same_logits_in_plain_transformers(tied, rope, tmp_path):
    workspace, recipe, folder, said = exported(tmp_path, tied=tied, **{"rope.type": rope, "output.export_shard_gb": 1e-4})
    model, logits = logits_in_plain_transformers(folder, said, torch.float32)
    torch.testing.assert_close(logits, said["logits"], rtol=0, atol=1e-4)
    assert model.config.max_position_embeddings == 1024

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2 and all((folder / shard).is_file() for shard in shards)
    assert ("lm_head.weight" in index["weight_map"]) is not tied
    for shard in shards:
        with safe_open(folder / shard, "pt") as file:
            assert set(file.keys()) == {name for name, where in index["weight_map"].items() if where == shard}

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == 1024
    out = model.generate(
        **tokenizer("It was the best", return_tensors="pt", return_token_type_ids=False), max_new_tokens=4, do_sample=False
    )
    assert out.shape[1] > 4
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (folder / name).read_bytes() == (workspace.model / name).read_bytes()


def test_bf16_export_and_its_card(tmp_path):
    _, recipe, folder, said = exported(tmp_path, tied=True, **{"training.precision": "bf16", "output.export_dtype": "bf16"})
    _, logits = logits_in_plain_transformers(folder, said, torch.bfloat16)
    assert (logits - said["logits"]).abs().max() < 0.05 * said["logits"].abs().max()
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16" and config["max_position_embeddings"] == 1024
    assert rope_of_config(load_hf_config(folder)) == scaling_for(recipe, rope_of_config(load_hf_config(recipe.model.path)))
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((folder / "model.safetensors").stat().st_mode) == 0o666 & ~umask
    card = (folder / "README.md").read_text()
    assert "128 to 1024 positions" in card and "`endprompt`" in card and "Trained for 2 steps" in card
    embedded = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    assert embedded == recipe.model_dump(mode="json"), "the card's recipe is the run's"
    assert not list(tmp_path.glob(".out*")), "no partial folder stays"


def test_untrained_has_the_base_weights_under_the_new_rope(tmp_path):
    workspace = Workspace(tmp_path)
    recipe = workspace.recipe(**{"rope.type": "yarn"})
    export_untrained(recipe, tmp_path / "untrained")
    assert (tmp_path / "untrained/model.safetensors").samefile(workspace.model / "model.safetensors")
    assert rope_of_config(load_hf_config(tmp_path / "untrained")).type == "yarn"
    assert "not a trained model" in (tmp_path / "untrained/README.md").read_text()
    with pytest.raises(UserError, match="exists already"):
        export_untrained(recipe, tmp_path / "untrained")


def test_untrained_from_a_folder_of_links_is_whole(tmp_path):
    """Snapshots of the Hugging Face cache are relative links, which a link to the link would leave dangling."""
    workspace = Workspace(tmp_path)
    (tmp_path / "blob").hardlink_to(workspace.model / "model.safetensors")
    (workspace.model / "model.safetensors").unlink()
    (workspace.model / "model.safetensors").symlink_to("../blob")
    export_untrained(workspace.recipe(), tmp_path / "a/b/untrained")
    assert (tmp_path / "a/b/untrained/model.safetensors").samefile(tmp_path / "blob")


def test_shards_keep_order_and_size():
    sizes = [("a", 5), ("b", 6), ("c", 30), ("d", 1), ("e", 1)]
    plan = plan_shards(sizes, limit=11)
    assert plan == [[("a", 5), ("b", 6)], [("c", 30)], [("d", 1), ("e", 1)]]
    assert shard_name(1, 3) == "model-00002-of-00003.safetensors" and shard_name(0, 1) == "model.safetensors"
