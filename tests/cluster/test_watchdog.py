"""A run that writes is alive, whatever it writes; one that does not is reported after the timeout and not before."""

from __future__ import annotations

import os

import pytest

from endprompt.cluster.watchdog import signs_of_life, watch


class Clock:
    """Time that passes in `pause`, and what happens meanwhile."""

    def __init__(self, events):
        self.time, self.events = 0.0, events

    def __call__(self) -> float:
        return self.time

    def pause(self, seconds: float) -> None:
        self.time += seconds
        while self.events and self.events[0][0] <= self.time:
            self.events.pop(0)[1]()


@pytest.mark.parametrize("name", ["log.jsonl", "checkpoints/step_00000010.incomplete/rank0.distcp", "export/model.safetensors"])
def test_the_timeout_counts_from_the_last_write(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("")
    moments = [300.0, 850.0, 1300.0]
    clock = Clock([(moment, lambda moment=moment: os.utime(file, (moment, moment))) for moment in moments])
    assert "600 s" in watch(tmp_path, 600, pause=clock.pause, now=clock)
    assert 1900 <= clock.time <= 1930  # looked at every 10 s


def test_an_empty_folder_counts_from_the_beginning(tmp_path):
    clock = Clock([])
    watch(tmp_path / "not there yet", 600, pause=clock.pause, now=clock)
    assert 600 <= clock.time <= 620 and signs_of_life(tmp_path) == {}


def test_a_file_servers_hiccup_does_not_end_the_watch(tmp_path, monkeypatch):
    (tmp_path / "log.jsonl").write_text("")
    real = type(tmp_path).stat

    def stat(self, **options):
        if self.name == "log.jsonl":
            raise OSError(116, "Stale file handle")
        return real(self, **options)

    monkeypatch.setattr(type(tmp_path), "stat", stat)
    clock = Clock([])
    assert "600 s" in watch(tmp_path, 600, pause=clock.pause, now=clock)
