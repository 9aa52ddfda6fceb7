"""A patch touches only what it was written for, and nothing at all when any part of it has changed upstream."""

import pytest

import megatron_patches
from endprompt.errors import UserError
from megatron_patches import datasets, rotary
from megatron_patches.guards import Patch, check_patch, check_version, resolve


@pytest.mark.parametrize("good", ["0.16.1", "0.17.0", "0.18.2rc1", "0.19.2"])
def test_supported_versions(good):
    assert check_version(good) == tuple(int(part) for part in good.split("rc")[0].split("."))


@pytest.mark.parametrize("bad, words", [("0.15.3", "older"), ("0.16.0", "older"), ("0.20.0", "newer"), ("1.0", "newer")])
def test_other_versions_say_what_to_do(bad, words):
    with pytest.raises(UserError, match=rf"megatron-core: {bad} is {words}.*install 0\.1") as raised:
        check_version(bad)
    assert "\n" not in str(raised.value)


def test_the_installed_version_passes():
    assert (0, 16, 1) <= check_version() < (0, 20)


@pytest.mark.parametrize("patch", rotary.PATCHES + datasets.PATCHES, ids=lambda patch: patch.name)
def test_every_patch_fits_the_installed_megatron(patch):
    owner, original = check_patch(patch)
    assert getattr(owner, patch.name) is original and patch.why


def changed(**fields) -> Patch:
    return rotary.PATCHES[0]._replace(**fields)


@pytest.mark.parametrize(
    "patch, words",
    [
        (changed(name="_prepare"), "is gone"),
        (changed(parameters=("self", "input_ids", "positions")), "expected"),
        (changed(calls=("megatron.core.transformer.attention:Attention", "forward", "_preprocess")), "no longer called by"),
    ],
    ids=["gone", "signature", "not called"],
)
def test_a_changed_upstream_is_refused(patch, words):
    with pytest.raises(UserError, match=words):
        check_patch(patch)


def test_one_unfit_patch_leaves_everything_unpatched(monkeypatch):
    monkeypatch.setattr(datasets, "PATCHES", (datasets.PATCHES[0]._replace(name="__fetchitem__"),))
    before = [(resolve(patch.owner), patch.name, getattr(resolve(patch.owner), patch.name)) for patch in rotary.PATCHES]
    with pytest.raises(UserError, match="is gone"):
        megatron_patches.apply()
    assert all(getattr(owner, name) is original for owner, name, original in before)


def test_a_too_new_megatron_is_refused_by_apply(monkeypatch):
    monkeypatch.setattr("megatron_patches.guards._installed", lambda: "0.20.1")
    with pytest.raises(UserError, match="newer than the patches know"):
        megatron_patches.apply()
