"""Exports as real older releases of transformers read them, installed beside ours without their dependencies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from endprompt.models.hf_config import extended_config, oldest_transformers
from endprompt.rope import RopeScaling, attention_factor, inverse_frequencies

TARGET = 65536
BASE = {
    "hidden_act": "silu",
    "hidden_size": 512,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
SCALINGS = {
    "none": RopeScaling("none", 5e5, 128),
    "linear": RopeScaling("linear", 5e5, 128, factor=8.0),
    "ntk": RopeScaling("ntk", 5e5, 128, factor=8.0),
    "yarn": RopeScaling("yarn", 5e5, 128, factor=8.0, original_length=8192),
    "yarn12": RopeScaling("yarn", 5e5, 128, factor=12.0, original_length=8192, attention_factor=1.05),
    "llama3": RopeScaling("llama3", 5e5, 128, factor=8.0, original_length=8192),
    "interpolated": RopeScaling("llama3", 5e5, 128, factor=4.0, original_length=8192, interpolation=2.0),
}


def number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


@pytest.mark.registry
@pytest.mark.parametrize("version, tokenizers", [("4.43.4", "0.19.1"), ("4.51.3", "0.21.4"), ("4.57.6", "0.22.1")])
def test_older_releases_read_exports(version, tokenizers, tmp_path):
    packages = [f"transformers=={version}", f"tokenizers=={tokenizers}", "huggingface_hub==0.36.0"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(tmp_path / "site"), *packages]
    installed = subprocess.run(pip, capture_output=True, text=True, timeout=200)
    if installed.returncode:
        pytest.skip(f"transformers {version} cannot be installed: {installed.stderr.strip().splitlines()[-1]}")

    expected = {}
    for kind, name in (("llama", "LlamaForCausalLM"), ("mistral", "MistralForCausalLM")):
        config = {**BASE, "model_type": kind, "architectures": [name]}
        for label, rope in SCALINGS.items():
            # A rotary embedding built from config.json came to LLaMA in 4.43 and to Mistral in 4.48.
            if number(version) < max(number(oldest_transformers(config, rope, TARGET)), (4, 48) if kind == "mistral" else (4, 43)):
                continue
            folder = tmp_path / "exports" / f"{kind}-{label}"
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps(extended_config(config, rope, TARGET)))
            expected[folder.name] = rope
    assert len(expected) == {"4.43.4": 5, "4.51.3": 12, "4.57.6": 14}[version]

    probe = [sys.executable, str(Path(__file__).with_name("old_transformers_probe.py")), str(tmp_path / "exports")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(probe, env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found.keys() == expected.keys()
    for name, rope in expected.items():
        table, factor, window = found[name]
        assert table == pytest.approx(inverse_frequencies(rope).tolist(), rel=1e-6), name
        assert (factor, window) == (pytest.approx(attention_factor(rope)), TARGET), name
