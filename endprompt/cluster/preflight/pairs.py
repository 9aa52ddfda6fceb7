"""Which node is it? All-reduces of neighbouring nodes two by two: a node that is slow with both its neighbours is the slow one.

The ring over all nodes is as slow as its slowest card or cable and does not say where that is; the all-reduce within a node
does not leave it.
"""

from __future__ import annotations

from datetime import timedelta

import torch

from endprompt.cluster.preflight import bandwidth
from endprompt.cluster.preflight.meeting import Meeting
from endprompt.cluster.preflight.place import Place


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Neighbours on a circle of nodes, in rounds of pairs that share no node: every node is in two pairs.

    Two rounds do for an even number of nodes; an odd circle needs a third for the pair that closes it. Below three nodes there
    is nothing that the all-reduce over all does not say.
    """
    if count < 3:
        return []
    edges = [(i, (i + 1) % count) for i in range(count)]
    if count % 2 == 0:
        return [edges[0::2], edges[1::2]]
    return [edges[0:-1:2], edges[1:-1:2], edges[-1:]]


def measure_pairs(
    place: Place, meeting: Meeting, device: torch.device, megabytes: float, limit: timedelta
) -> dict[str, bandwidth.Measurement]:
    """{neighbour: measurement} of this rank's node. Collective over all ranks, which come to their pairs in the same order."""
    nodes = list(dict.fromkeys(meeting.nodes))
    found = {}
    for pairs in rounds(len(nodes)):
        for pair in pairs:
            names = [nodes[i] for i in pair]
            if place.node not in names:
                continue
            ranks = sorted(rank for name in names for rank in meeting.ranks_of(name))
            other = names[1] if names[0] == place.node else names[0]
            found[other] = bandwidth.measure_among(ranks, limit, device, megabytes)
    return found
