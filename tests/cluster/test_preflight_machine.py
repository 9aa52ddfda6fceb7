"""nvidia-smi's words, as they are documented; the GPUs themselves are torch's to count."""

import pytest

from endprompt.cluster.preflight import machine
from endprompt.errors import UserError


def fake_smi(tmp_path, monkeypatch, script: str) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


def test_driver_and_errors_of_every_gpu(tmp_path, monkeypatch):
    fake_smi(tmp_path, monkeypatch, "echo '550.54.15, 0'; echo '550.54.15, 3'; echo '550.54.15, [N/A]'")
    found = machine.gpus()
    assert (found["driver"], found["uncorrected_ecc"]) == ("550.54.15", [0, 3, None]) and found["count"] == len(found["names"])


def test_a_tool_that_fails_or_hangs_is_a_problem(tmp_path, monkeypatch):
    fake_smi(tmp_path, monkeypatch, "echo 'Unable to determine the device handle for GPU0'; exit 15")
    with pytest.raises(UserError, match="exit code 15 .Unable to determine.*; exclude the node"):
        machine.gpus()
    monkeypatch.setattr(machine, "SMI_SECONDS", 0.2)
    fake_smi(tmp_path, monkeypatch, "exec sleep 60")
    with pytest.raises(UserError, match="gave no answer within"):
        machine.gpus()


def test_without_the_tool_nothing_is_known_of_driver_and_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = machine.gpus()
    assert (found["driver"], found["uncorrected_ecc"]) == (None, [])


def test_a_folder_that_is_not_there_has_no_free_space(tmp_path):
    free = machine.free_gb(tmp_path / "gone")
    assert free["run_folder"] is None and free["temporary"] > 0
