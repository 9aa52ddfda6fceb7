"""From text to samples: corpus -> indexed dataset (Megatron's .bin/.idx) -> blended, shuffled samples -> micro-batches.

Nothing here imports torch, transformers or megatron at import time: tokenizer worker processes start in 0.3 s.
`endprompt.data.batches` (torch) and `endprompt.data.prepare` are imported by name where they are needed.
"""

from endprompt.data.indexed import IndexedText, open_indexed, write_indexed
from endprompt.data.samples import SampleDataset

__all__ = ["IndexedText", "SampleDataset", "open_indexed", "write_indexed"]
