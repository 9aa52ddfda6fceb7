"""All ranks meet in a store before any collective, so that who is missing or broken is known by name and nobody hangs.

torch's own rendezvous says only how many ranks came. Here every rank leaves its node and what is wrong with it in rank 0's
TCPStore; rank 0 waits for all of them, `seconds` at most, and tells everyone the same: go on, or who keeps them from it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from endprompt.cluster.preflight.place import Place, RankFailure

LINGER_SECONDS = 3.0
"""How long rank 0 keeps the store open for the others: they read one key, or write one, and are gone."""


@dataclass(frozen=True)
class Meeting:
    """store: rank 0's, for the process group. nodes: of every rank, by rank."""

    store: dist.TCPStore
    nodes: list[str]

    def ranks_of(self, node: str) -> list[int]:
        return [rank for rank, name in enumerate(self.nodes) if name == node]

    def leave(self, place: Place) -> None:
        """Rank 0 leaves last: the others' libraries still look into its store while they shut down."""
        self.store.add("left", 1)
        if place.rank == 0:
            _wait_for_count(self.store, "left", place.size, LINGER_SECONDS)


def meet(place: Place, backend: str, problem: RankFailure | None, seconds: float, keep: Callable[[RankFailure], None]) -> Meeting:
    """Arrive and hear who else did. problem: what is wrong here, to be told to all. keep: writes records of failures.

    Raises RankFailure: this rank's own problem, or that of others. Rank 0's says which ranks are missing or in trouble, and is kept
    before anybody hears of it: whoever hears it exits, and srun (--kill-on-bad-exit) then ends rank 0 too.
    """
    store = _open_store(place, seconds)
    arrival = {"node": place.node, "backend": backend, "problem": problem.as_record() if problem else None}
    store.set(f"rank/{place.rank}", json.dumps(arrival))
    store.add("arrived", 1)
    if place.rank == 0:
        news = _gather(store, place, seconds)
        failure = problem or _failure(place, news, seconds)
        if failure:
            failure.missing, failure.told = news["missing"], news["problems"]
            keep(failure)
        store.set("news", json.dumps(news))
    else:
        news = _hear(store, place, seconds)
        failure = problem or _failure(place, news, seconds)
    if not failure:
        return Meeting(store, news["nodes"])
    store.add("heard", 1)
    if place.rank == 0:
        _wait_for_count(store, "heard", place.size - len(news["missing"]), LINGER_SECONDS)
    raise failure


def _open_store(place: Place, seconds: float) -> dist.TCPStore:
    limit = timedelta(seconds=seconds)
    try:
        return dist.TCPStore(place.address, place.port, place.size, is_master=place.rank == 0, timeout=limit, wait_for_workers=False)
    except RuntimeError as error:
        at = f"{place.address}:{place.port}"
        reason = str(error).splitlines()[0].rstrip(".")
        if place.rank == 0:
            raise RankFailure(place, f"cannot open {at} ({reason})", "set MASTER_PORT to another port", "unknown") from None
        fix = "see whether rank 0's node started its tasks and is reached from here (MASTER_ADDR, firewall)"
        raise RankFailure(place, f"found no rank 0 at {at} within {seconds:g} s ({reason})", fix, "unknown") from None


def _gather(store: dist.TCPStore, place: Place, seconds: float) -> dict:
    _wait_for_count(store, "arrived", place.size, seconds)
    missing = [rank for rank in range(place.size) if not store.check([f"rank/{rank}"])]
    here = [json.loads(store.get(f"rank/{rank}")) for rank in range(place.size) if rank not in missing]
    return {
        "missing": missing,
        "nodes": [arrival["node"] for arrival in here],
        "backends": [arrival["backend"] for arrival in here],
        "problems": [arrival["problem"] for arrival in here if arrival["problem"]],
    }


def _hear(store: dist.TCPStore, place: Place, seconds: float) -> dict:
    # Rank 0 may have come `seconds` after this rank and then waits `seconds` for the others.
    try:
        store.wait(["news"], timedelta(seconds=2 * seconds + LINGER_SECONDS))
        return json.loads(store.get("news"))
    except RuntimeError as error:
        problem = f"heard nothing from rank 0 ({str(error).splitlines()[0]})"
        raise RankFailure(place, problem, "read what rank 0 and its node say in the job's output", "elsewhere") from None


def _failure(place: Place, news: dict, seconds: float) -> RankFailure | None:
    """What of the others keeps this rank from going on, None where nothing does."""
    if news["missing"]:
        problem = f"{_ranks(news['missing'])} did not arrive within {seconds:g} s"
        return RankFailure(place, problem, "read the job's output for them, or exclude their node", "elsewhere")
    if news["problems"]:
        first = news["problems"][0]
        return RankFailure(place, f"stopped because of others, first {first['error']}", "mend that", "elsewhere")
    if len(set(news["backends"])) == 1:
        return None
    on_cpu = sorted({node for node, backend in zip(news["nodes"], news["backends"], strict=True) if backend == "gloo"})
    fix = f"have the GPUs of {', '.join(on_cpu)} looked at, or give --gpus, which says what every node must have"
    return RankFailure(place, f"some ranks see GPUs and those of {', '.join(on_cpu)} see none", fix, "unknown")


def _ranks(numbers: list[int]) -> str:
    """ "rank 3", "ranks 3, 4, 5" or, of more than eight, the first and how many."""
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    if len(numbers) <= 8:
        return f"ranks {', '.join(map(str, numbers))}"
    return f"{len(numbers)} ranks, {numbers[0]} first,"


def _wait_for_count(store: dist.TCPStore, key: str, count: int, seconds: float) -> None:
    """Until the counter has reached `count`, `seconds` at most."""
    deadline = time.monotonic() + seconds
    while store.add(key, 0) < count and time.monotonic() < deadline:
        time.sleep(0.02)
