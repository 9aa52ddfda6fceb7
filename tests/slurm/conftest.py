"""One cluster for the whole session: it starts in half a second and costs nothing while no job runs."""

from __future__ import annotations

import pytest

from tests.slurm.cluster import Cluster, missing
from tests.slurm.site import Site
from tests.slurm.victim import RUN_8B, history_without_slurm


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
    return history_without_slurm(prepared, RUN_8B)
