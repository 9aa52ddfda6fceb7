"""A training script of a user of Megatron-Core, with the two lines that megatron_patches wants; run by test_train.py.

own_script.py RECIPE FOLDER        prints the loss of three micro-batches, and what transformers says to the same tensors
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


class Tokenizer:
    vocab_size, eod, pad, unique_identifiers = 128, 1, -1, {"class": "test"}


def main() -> None:
    import torch

    import megatron_patches
    from tests.support.one_rank import huggingface_twin, one_rank_world, stock_model

    torch.set_num_threads(1)
    with one_rank_world():
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.pipeline_parallel import get_forward_backward_func

        megatron_patches.apply(sys.argv[1])
        get_batch = megatron_patches.get_batch

        config = GPTDatasetConfig(
            random_seed=5, sequence_length=64, split="1,0,0", reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
            create_attention_mask=True, tokenizer=Tokenizer(), path_to_cache=sys.argv[2] + "/own_cache",
            blend=([sys.argv[2] + "/corpus_train"], None),
        )  # fmt: skip
        everywhere = partial(megatron_patches.is_dataset_built_on_rank, vp_stage=None)
        train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [40, 0, 0], everywhere, config).build()
        loader = torch.utils.data.DataLoader(train, batch_size=2)
        model = stock_model(attributes={"deallocate_pipeline_outputs": False})
        twin = huggingface_twin(model, rope_scaling={"rope_type": "linear", "factor": 8.0})
        seen = []

        def forward_step(iterator, model):
            tokens, labels, loss_mask, attention_mask, position_ids = get_batch(iterator, None)  # as upstream calls it
            tokens, labels = tokens % 128, labels % 128  # the test model's vocabulary
            seen.append((tokens, labels, loss_mask, position_ids))
            losses = model(tokens, position_ids, attention_mask, labels=labels)

            def loss_func(losses):
                loss = (losses * loss_mask).sum() / loss_mask.sum()
                return loss, {"loss": loss.detach().clone()}  # the schedule divides the loss in place

            return losses, loss_func

        reported = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=iter(loader), model=model, num_microbatches=3, seq_length=64, micro_batch_size=2,
            forward_only=False,
        )  # fmt: skip
    hidden = torch.full((64, 64), float("-inf")).triu(1)[None, None].expand(2, 1, 64, 64)
    expected = []
    for tokens, labels, weights, positions in seen:
        logits = twin(input_ids=tokens, position_ids=positions, attention_mask=hidden, use_cache=False).logits
        per_token = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        expected.append(((per_token * weights).sum() / weights.sum()).item())
    losses, positions = [entry["loss"].item() for entry in reported], seen[0][3][0].tolist()
    print(json.dumps({"losses": losses, "expected": expected, "positions": positions}))


if __name__ == "__main__":
    main()
