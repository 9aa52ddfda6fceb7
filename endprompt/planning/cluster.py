"""The machine that is planned for: nodes of H100-80GB by default, and how fast its links carry a collective.

Rates are bytes/s, memory is in 10^9 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from endprompt.training.hardware import PEAK_BF16_FLOPS

LINK_EFFICIENCY = 0.8
"""Share of a link's line rate that large messages reach; assumed. Calibration corrects it for ZeRO-3, which depends on it most."""


@dataclass(frozen=True)
class Cluster:
    """`nodes` of `gpus_per_node`. Defaults: DGX H100 (NVIDIA data sheets), one 400 Gb/s network card a GPU.

    memory_gb: of one GPU; an H100-80GB reports 85.5, what is above 80 is left to fragmentation. host_memory_gb: of a node.
    runtime_gb: CUDA context and the libraries' buffers, which torch does not count; assumed, not measured.
    nvlink, network, pcie: bytes/s of one GPU in one direction. hbm: bytes/s of its memory.
    host_update: bytes/s at which the host's AdamW goes through states, for each GPU's share. pcie and host_update are assumed: no
    published row offloads.
    collective_copies: copies of a message that the collective library keeps while it works: none in NCCL, one in gloo.
    fused_layers: norms, activations and Adam are single kernels that keep or need no steps in between, as on a GPU; torch's own
    operations on a CPU.
    touched_only: only pages that were written count, as on a CPU; a GPU's allocator counts the whole of a buffer.
    """

    nodes: int
    gpus_per_node: int = 8
    memory_gb: float = 80.0
    host_memory_gb: float = 2000.0
    peak_flops: float = PEAK_BF16_FLOPS["H100"]
    nvlink: float = 450e9
    network: float = 50e9
    pcie: float = 25e9
    hbm: float = 3.35e12
    host_update: float = 20e9
    runtime_gb: float = 3.0
    collective_copies: int = 0
    touched_only: bool = False
    fused_layers: bool = True

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    def bus_rate(self, ranks: int, ranks_per_node: int) -> float:
        """Bytes/s that a ring over `ranks`, of which `ranks_per_node` share a node, carries on every GPU.

        Across nodes NCCL runs one ring through each network card, so a group with k ranks on a node enters it by k cards:
        k x 50 GB/s, at most NVLink's rate. With 8 ranks on a node that is 400 GB/s, not 50.
        """
        if ranks <= ranks_per_node:
            return LINK_EFFICIENCY * self.nvlink
        return LINK_EFFICIENCY * min(self.nvlink, ranks_per_node * self.network)

    def collective_seconds(self, size: float, ranks: int, ranks_per_node: int) -> float:
        """Seconds of an all-gather to, or reduce-scatter of, `size` bytes over a group."""
        if ranks == 1:
            return 0.0
        return size * (ranks - 1) / ranks / self.bus_rate(ranks, ranks_per_node)


def cpu_cluster(ranks: int, memory_gb: float = 16.0, engine: str = "deepspeed") -> Cluster:
    """Ranks on this machine over gloo: for holding memory predictions against real peaks. Its times mean nothing.

    runtime_gb: what a rank holds after a step beyond its tensors. 0.06 under DeepSpeed, in bf16 and fp32 alike: its hooks and
    modules. 0.006 under Megatron: about what the 13 layouts of tests/planning/test_megatron_memory_real.py hold, 3 to 14 MB.
    """
    runtime = {"deepspeed": 0.06, "megatron": 0.006}[engine]
    return Cluster(1, ranks, memory_gb, runtime_gb=runtime, collective_copies=1, touched_only=True, fused_layers=False)
