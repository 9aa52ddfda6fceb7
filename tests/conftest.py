"""The order of the whole suite: of two workers that take file after file, neither shall be left alone with a long one at the end."""

LONG = (
    "slurm/test_jobs",
    "zero3/test_training",
    "megatron_patches/test_train",
    "megatron_patches/test_layouts",
    "zero3/test_export",
    "zero3/test_load",
    "planning/test_zero3_memory",
    "planning/test_megatron_memory_real",
    "megatron_patches/test_later_megatron",
    "megatron_patches/test_bad_layouts",
    "replication/test_compare_arms",
    "megatron_patches/test_cpu_backend",
    "checkpoint/test_megatron_layouts",
    "checkpoint/test_trained_run",
    "data/test_prepare_killed",
    "models/test_old_transformers",
)


def pytest_collection_modifyitems(items):
    def place(item) -> int:
        return next((number for number, name in enumerate(LONG) if f"{name}.py" in item.nodeid), len(LONG))

    items.sort(key=place)  # stable: the others stay as they were
