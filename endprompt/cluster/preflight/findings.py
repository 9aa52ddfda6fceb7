"""What the judge finds, and whether the node that it names is to be left out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from endprompt.errors import UserError

EXCLUDE = "exclude the node"


@dataclass(frozen=True)
class Finding:
    """line: what the user reads. node: the one it names, if it names one. blamed: the node's own fault, so exclude it."""

    node: str | None
    line: UserError
    blamed: bool = False


def unless_systemic(nodes: list[str], findings: Iterable[Finding]) -> list[Finding]:
    """Blame the nodes of one check's findings, unless more than half of the job's nodes have the same: then it is the job's fault.

    A job that asks for 9 GPUs a node must not have every node of the cluster excluded. A job of one node has no others to go by.
    """
    found = list(findings)
    hit = {finding.node for finding in found}
    blamed = len(nodes) == 1 or 2 * len(hit) <= len(nodes)
    return [replace(finding, blamed=blamed) for finding in found]
