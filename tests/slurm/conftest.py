"""One cluster for the whole session: it starts in half a second and costs nothing while no job runs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.slurm.cluster import Cluster, missing
from tests.slurm.site import Run, Site
from tests.slurm.victim import RUN_8B
from tests.support.workspace import ROOT


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    reason = missing()
    if reason:
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def site(cluster, tmp_path_factory) -> Site:
    return Site(tmp_path_factory.mktemp("site"), cluster)


@pytest.fixture(scope="module")
def prepared(site) -> Site:
    """A site with the tiny model under the name of the 8B one, and its data."""
    site.make_model()
    site.make_data()
    return site


@pytest.fixture(scope="module")
def unbroken(prepared) -> list[tuple[int, float]]:
    """The loss history of the 8B recipe on two ranks of this machine, without SLURM and without a break."""
    overrides = [*prepared.environment(RUN_8B)["OVERRIDES"].split(), f"output.directory={prepared.path}/runs/unbroken"]
    sets = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "ds_train.py", "--recipe", "recipes/llama3_8b_64k.yaml", "--nproc-per-node", "2", *sets]
    environment = {**prepared.environment(), **{name: str(prepared.settings[name]) for name in ("CHECKPOINTS", "DATA", "RUNS")}}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return Run(prepared.path / "runs" / "unbroken").history
