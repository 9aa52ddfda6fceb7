"""The status of a run from its folder: every state, the arithmetic of speed and restarts, and damage.

The folders are made by hand; a real run is looked at in tests/zero3/test_training.py, which has one.
"""

from __future__ import annotations

import os

import pytest

from endprompt.cluster.status import SILENCE_SECONDS, STARTUP_SECONDS
from endprompt.cluster.status_text import block
from endprompt.errors import UserError
from tests.support.run_folders import BEGAN, TOKENS, Folder


@pytest.fixture
def run(tmp_path) -> Folder:
    return Folder(tmp_path / "run")


def test_a_running_run(run):
    run.steps(20)
    run.log(step=20, validation_loss=2.9, time=run.now)
    run.save(20)
    found = run.read(later=5)
    assert (found.recipe, found.state, found.step, found.percent, found.tokens) == ("tiny", "running", 20, 20.0, 20 * TOKENS)
    assert (found.loss, found.loss_trend, found.loss_change_steps) == (2.8, "falling", 19) and found.loss_change == pytest.approx(-0.1)
    assert (found.validation_loss, found.validation_step) == (2.9, 20)
    assert (found.step_seconds, found.tokens_per_second, found.mfu) == (10.0, 100.0, 0.4)
    assert found.left_seconds == 800.0 and found.silent_seconds == 5
    assert (found.checkpoint_step, found.checkpoint_age_seconds, found.checkpoint_bytes) == (20, 5, 5002)
    assert (found.starts, found.restarts, found.lost_hours, found.error) == (1, 0, 0.0, None) and found.disk_free_bytes > 0


def test_a_flat_loss_is_called_flat(run):
    for step in range(1, 31):
        run.log(step=step, loss=2.0 + 0.1 * (step % 2), tokens=step)
    found = run.read()
    assert found.loss_trend == "flat" and found.step_seconds is None and found.lost_hours is None


def test_what_saves_took_is_in_what_is_left(run):
    run.steps(10)
    run.steps(10, wait=30)  # a save
    run.steps(10, wait=30)
    found = run.read()
    assert found.overhead_seconds_per_step == pytest.approx(60 / 29) and found.restart_seconds_per_step == 0
    assert found.left_seconds == pytest.approx(70 * (10 + 60 / 29))


def test_steps_between_two_logged_ones_are_no_overhead(run):
    for step in range(10, 60, 10):
        run.log(step=step, loss=1.0, tokens=step, step_seconds=10.0, tokens_per_second=1.0, mfu=None, time=BEGAN + 10 * step)
    found = run.read()
    assert (found.overhead_seconds_per_step, found.mfu) == (0.0, None)


def test_restarts_with_reasons_nodes_and_hours_lost(run):
    run.event("start", nodes=["node01", "node02"], step=0)
    run.steps(40, wait=100)  # the first start loads: nothing is lost by that
    reason = "node02 died: exit code 137 of rank 8"
    run.now += 700  # seven steps that no checkpoint holds, and the time until the launcher saw it
    run.event("end", exit_code=137, step=40, verdict="requeue", reason=reason, excluded=["node02"])
    run.now += 20
    run.event("start", restart=1, nodes=["node01", "node03"], step=40)
    run.status(starts=2)
    run.steps(10, wait=180)
    found = run.read()
    assert (found.starts, found.restarts, found.excluded_nodes, found.nodes) == (2, 1, ["node02"], ["node01", "node03"])
    assert found.lost_hours == pytest.approx(900 / 3600)
    assert found.restart_seconds_per_step == pytest.approx(900 / 49) and found.overhead_seconds_per_step == 0
    (restart,) = found.recent_restarts
    assert (restart["reason"], restart["step"], restart["exit_code"], restart["verdict"]) == (reason, 40, 137, "requeue")
    text = block(found)
    assert f"from step 40: {reason}; excluded node02" in text and "1 of them restarts, 15 min lost" in text


def test_only_the_last_three_restarts_are_listed_and_a_missing_end_is_named(run):
    for number in range(5):
        run.now += 30
        run.event("start", restart=number, step=0)
        run.steps(1, wait=30)
    found = run.read()
    assert found.restarts == 4 and len(found.recent_restarts) == 3
    assert all("no end was written" in entry["reason"] for entry in found.recent_restarts)
    assert found.lost_hours == pytest.approx(4 * 60 / 3600)


def test_starts_before_any_step_was_kept_are_lost_time(run):
    run.event("start", step=0)
    run.now += 3600
    run.event("end", exit_code=1, verdict="requeue", reason="crash")
    run.event("start", restart=1, step=0)
    run.steps(5, wait=60)
    assert run.read().lost_hours == pytest.approx(1.0)


def test_a_pause_that_was_wanted_is_neither_lost_nor_expected_again(run):
    run.event("start", step=0)
    run.steps(10)
    run.event("end", exit_code=75, step=10, verdict="stopped", reason="STOP")
    run.now += 50_000
    run.event("start", step=10)
    run.steps(10)
    found = run.read()
    assert (found.lost_hours, found.restart_seconds_per_step, found.left_seconds) == (0.0, 0.0, 800.0)


def test_without_slurm_the_longest_gaps_are_the_restarts(run):
    run.steps(10)
    run.steps(10, wait=5)
    run.status(starts=2)
    run.steps(10, wait=1000)
    found = run.read()
    assert (found.restarts, found.recent_restarts) == (1, []) and found.lost_hours == pytest.approx(1000 / 3600)
    assert found.overhead_seconds_per_step == pytest.approx(5 / 29) and found.restart_seconds_per_step == 0


@pytest.mark.parametrize(("state", "code"), [("finished", 0), ("interrupted", 75), ("stopped", 75), ("failed", 2)])
def test_the_state_that_the_run_wrote(run, state, code):
    run.steps(5)
    run.status(state=state, exit_code=code, error="UserError: disk full" if state == "failed" else None)
    found = run.read(later=10 * SILENCE_SECONDS)
    assert (found.state, found.exit_code) == (state, code)
    assert ("last error  UserError: disk full" in block(found)) == (state == "failed")


def test_a_running_run_that_fell_silent_is_probably_dead(run):
    run.steps(20)
    assert run.read(later=SILENCE_SECONDS - 1).state == "running"
    found = run.read(later=SILENCE_SECONDS + 3000)
    assert found.state == "probably dead" and "nothing written for 1 h 0 min" in found.state_reason


def test_silence_is_measured_by_what_steps_and_saves_take(run):
    run.steps(10, seconds=200)
    run.steps(10, seconds=200, wait=1500)
    assert run.read(later=5000).state == "running" and run.read(later=5200).state == "probably dead"


def test_a_save_that_goes_on_is_a_sign_of_life(run):
    run.steps(20)
    run.now += 2 * SILENCE_SECONDS
    path = run.path / "checkpoints" / "step_00000020.incomplete" / "rank_3"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    os.utime(path, (run.now - 5, run.now - 5))
    os.utime(path.parent, (BEGAN, BEGAN))
    found = run.read()
    assert (found.state, found.silent_seconds, found.checkpoint_step) == ("running", 5, None)


def test_loading_may_take_longer_than_a_step(run):
    run.steps(10)
    run.now += 60
    run.status(state="running", starts=2)
    assert run.read(later=STARTUP_SECONDS - 1).state == "running" and run.read(later=STARTUP_SECONDS + 1).state == "probably dead"


def test_a_job_that_began_and_has_made_no_step(run):
    run.event("start", nodes=["node01"], step=0)
    found = run.read(later=120)
    assert found.state == "starting" and "job 123 began 2 min ago" in found.state_reason and found.step == 0
    assert run.read(later=STARTUP_SECONDS + 1).state == "probably dead"


@pytest.mark.parametrize(
    ("verdict", "state"), [("requeue", "requeued"), ("give up", "failed"), ("stopped", "stopped"), ("finished", "finished")]
)
def test_the_launcher_has_the_last_word_on_a_job_that_ended(run, verdict, state):
    run.event("start", step=0)
    run.steps(10)
    run.now += 30
    run.event("end", exit_code=137, step=10, verdict=verdict, reason="node02 died")
    found = run.read(later=9 * SILENCE_SECONDS)
    assert found.state == state and (found.error == "node02 died") == (verdict == "give up")
    run.now += 60
    run.status(state="running")  # started again by hand, without SLURM
    assert run.read().state == "running"


def test_not_started(run):
    found = run.read()
    assert (found.state, found.step, found.left_seconds, found.restarts) == ("not started", 0, None, 0)
    (run.path / "recipe.yaml").unlink()
    (run.path / ".lock").touch()  # all that is there while the first start loads
    assert (run.read().state, run.read().recipe) == ("not started", "run")
    (run.path / "STOP").touch()
    assert "STOP is there" in block(run.read()) and "none yet" in block(run.read())


def test_the_step_saved_last_counts_where_the_log_skipped_it(run):
    run.steps(10)
    run.save(17)
    run.status(state="interrupted", exit_code=75)
    assert run.read().step == 17


def test_a_checkpoint_that_the_pointer_names_but_is_gone_is_none(run):
    (run.path / "checkpoints").mkdir()
    (run.path / "checkpoints" / "latest").write_text("step_00000010\n")
    assert run.read().checkpoint_step is None


def test_logs_without_times_still_tell_the_speed(run):
    for step in range(1, 11):
        run.log(step=step, loss=1.0, tokens=step, step_seconds=10.0, tokens_per_second=1.0, mfu=None)
    run.status(state="running", step=10)
    found = run.read()
    assert (found.step_seconds, found.left_seconds, found.overhead_seconds_per_step, found.lost_hours) == (10.0, 900.0, None, None)


@pytest.mark.parametrize("torn", [b'{"step": 21, "lo', b"\0\0\0", b"\0\0\0\n", '{"step": 21, "x": "é'.encode()[:-1]])
def test_a_torn_last_line_is_being_written(run, torn):
    run.steps(20)
    with open(run.path / "log.jsonl", "ab") as file:
        file.write(torn)
    assert run.read().step == 20


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("log.jsonl", '{"step": 1}\n{"ste\n{"step": 3}\n', "log.jsonl, line 2"),
        ("log.jsonl", '{"step": 1}\n{"ste\n', "log.jsonl, line 2"),
        ("log.jsonl", '{"step": "one"}\n', "log.jsonl, line 1"),
        ("attempts.jsonl", '{"event": "start", "time": NaN}\n', "attempts.jsonl, line 1"),
        ("attempts.jsonl", '{"event": "start"}\n', "attempts.jsonl, line 1"),
        ("attempts.jsonl", "[]\n", "attempts.jsonl, line 1"),
        ("status.json", "[", "status.json"),
        ("recipe.yaml", "a: [", "recipe.yaml"),
    ],
)
def test_damage_is_named_with_file_and_line(run, name, text, place):
    (run.path / name).write_text(text)
    with pytest.raises(UserError) as error:
        run.read()
    assert place in str(error.value) and "\n" not in str(error.value)


def test_unknown_events_and_fields_are_left_alone(run):
    run.event("note", text="written by a later version")
    run.event("start", nodes="node[01-02]", color="red")
    found = run.read()
    assert (found.starts, found.nodes) == (1, ["node[01-02]"])
