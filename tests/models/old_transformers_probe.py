"""Run by test_old_transformers.py in a process where an older transformers comes first on the path.

argv[1]: folder of checkpoint folders with config.json. Prints JSON: name -> [inv_freq, attention factor, maximum positions],
read after a forward pass at long and then at short positions.
"""

import importlib
import json
import sys
from pathlib import Path

import torch
from transformers import AutoConfig

found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    config = AutoConfig.from_pretrained(folder)
    module = importlib.import_module(f"transformers.models.{config.model_type}.modeling_{config.model_type}")
    rotary = getattr(module, f"{config.model_type.title()}RotaryEmbedding")(config=config)
    for last in (config.max_position_embeddings - 1, 3):
        rotary(torch.zeros(1, 1, 2, 1), torch.tensor([[0, last]]))
    found[folder.name] = [rotary.inv_freq.tolist(), rotary.attention_scaling, config.max_position_embeddings]
print(json.dumps(found))
