"""The ZeRO settings: each a situation of its own, read by DeepSpeed as meant, and silent on what a recipe says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from endprompt.zero3.config import RECIPE_HOLDS, offload_device, read_situation
from tests.support.recipes import make_recipe

FOLDER = Path(__file__).resolve().parents[2] / "deepspeed_configs"
FILES = sorted(FOLDER.glob("*.json"))


def test_the_three_situations():
    assert [file.stem for file in FILES] == ["zero3", "zero3_offload", "zero3_offload_optimizer"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accepted_by_the_trainer_and_by_deepspeed(file):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    situation = read_situation(make_recipe(**{"deepspeed.config": str(file)}))
    assert not situation.keys() & RECIPE_HOLDS.keys()
    zero = DeepSpeedZeroConfig(**situation["zero_optimization"])
    assert zero.stage == 3 and zero.overlap_comm and zero.contiguous_gradients
    unknown = situation["zero_optimization"].keys() - {
        name for field, info in DeepSpeedZeroConfig.model_fields.items() for name in (field, info.alias)
    }
    assert not unknown  # DeepSpeed ignores a misspelt key
    optimizer_on_host = file.stem in ("zero3_offload_optimizer", "zero3_offload")
    assert bool(zero.offload_optimizer) == (offload_device(situation, "offload_optimizer") != "none") == optimizer_on_host
    assert bool(zero.offload_param) == (file.stem == "zero3_offload")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_files_differ_only_in_what_is_offloaded(file):
    settings = json.loads(file.read_text())
    for key in ("offload_optimizer", "offload_param"):
        settings["zero_optimization"].pop(key, None)
    assert settings == json.loads((FOLDER / "zero3.json").read_text())
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["zero_allow_untested_optimizer"] is True and settings["zero_force_ds_cpu_optimizer"] is False


def test_every_key_is_explained():
    text = (FOLDER / "README.md").read_text()
    settings = json.loads((FOLDER / "zero3.json").read_text())
    keys = (settings.keys() - {"zero_optimization"}) | settings["zero_optimization"].keys() - {"stage"}
    assert [key for key in sorted(keys) if f"`{key}" not in text] == []
