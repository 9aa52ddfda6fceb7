"""One rank of tests/zero3/test_export.py: train two steps, note the engine's logits, export.

export_rank.py RECIPE OUT        rank 0 writes OUT.pt (logits) and the export beside it
"""

import sys
from pathlib import Path

import torch


def main() -> None:
    from endprompt.recipe import load_recipe
    from endprompt.zero3.backend import init_distributed

    torch.set_num_threads(1)
    recipe = load_recipe(sys.argv[1])
    world = init_distributed()
    with world.left_at_the_end():
        work(recipe, world)


def work(recipe, world) -> None:
    from endprompt.zero3.engine import build_engine
    from endprompt.zero3.export import export
    from endprompt.zero3.load import load_model
    from endprompt.zero3.loop import Loop
    from endprompt.zero3.prepare import prepare

    prepared = prepare(recipe, world.size)
    engine = build_engine(recipe, load_model(recipe, prepared.config, prepared.rope, world), world.size, load_universal=False)
    loop = Loop(
        recipe, world, engine, prepared.train_data, None, save=lambda step: None, stop_reason=lambda: None, monitor=None
    )  # fmt: skip
    loop.run(0)
    engine.eval()
    sample = prepared.train_data[3]
    batch = {"input_ids": torch.from_numpy(sample.tokens)[None], "position_ids": torch.from_numpy(sample.position_ids)[None]}
    with torch.no_grad():
        logits = engine(**batch)
    export(engine, recipe, prepared.config, prepared.rope, Path(sys.argv[2]), world, recipe.steps)
    if world.rank == 0:
        torch.save({**batch, "logits": logits}, f"{sys.argv[2]}.pt")


if __name__ == "__main__":
    main()
