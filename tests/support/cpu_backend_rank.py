"""One rank of tests/megatron_patches/test_cpu_backend.py.

cpu_backend_rank.py PROGRAM FOLDER OUT        see tests/megatron_patches/cpu_parts.py
"""

import warnings


def main() -> None:
    warnings.filterwarnings("ignore")
    from megatron_patches import cpu_backend

    cpu_backend.install()  # before Megatron is imported
    from tests.megatron_patches import cpu_parts

    cpu_parts.main()


if __name__ == "__main__":
    main()
