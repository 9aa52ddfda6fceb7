"""What becomes of a job: judged from the run folder, as slurm/lib leaves it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from endprompt.cluster.attempts import attempts_file, failures_folder, read_attempts, record_end, record_start
from endprompt.cluster.verdict import Limits, Outcome, check_start, decide
from endprompt.errors import UserError
from endprompt.training.stacks import Standing

CRASH = Outcome(exit_code=137)


def hang(**frames: tuple[str, ...]) -> Outcome:
    """One rank a node, with the frames that it answered."""
    return Outcome(137, hung="nothing written", stacks=tuple(Standing(rank, *item) for rank, item in enumerate(frames.items())))


class Job:
    """A run folder and one job on it, whose attempts are played one after another."""

    def __init__(self, run: Path, number: str = "7"):
        self.run, self.number, self.restart = run, number, -1

    def start(self, nodes=("node01", "node02")) -> None:
        self.restart += 1
        record_start(self.run, self.number, self.restart, list(nodes))
        failures_folder(self.run, self.number, self.restart).mkdir(parents=True)

    def save(self, step: int) -> None:
        folder = self.run / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"step": step}))
        (self.run / "checkpoints" / "latest").write_text(folder.name + "\n")

    def fail(self, rank: int, node: str, code: int, time: float) -> None:
        facts = {"time": time, "node": node, "rank": rank, "exit_code": code}
        (failures_folder(self.run, self.number, self.restart) / f"rank-{rank}.json").write_text(json.dumps(facts))

    def end(self, outcome: Outcome, limits: Limits | None = None, **status):
        verdict = decide(self.run, self.number, self.restart, read_attempts(self.run), outcome, status, 20, limits or Limits())
        facts = {"verdict": verdict.action, "reason": verdict.reason, "suspects": verdict.suspects, "excluded": verdict.excluded}
        facts |= {"trained": outcome.trained, "asked": outcome.asked}
        record_end(self.run, self.number, self.restart, facts)
        return verdict


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(tmp_path)


def test_a_finished_run_is_finished(job):
    job.start()
    assert job.end(Outcome(0), state="finished", step=20).action == "finished"


def test_the_time_limit_requeues_as_long_as_checkpoints_come(job):
    for attempt in range(1, 11):
        job.start()
        job.save(attempt)
        verdict = job.end(Outcome(0, asked=True), state="interrupted")
        assert verdict.action == "requeue" and "time limit" in verdict.reason and not verdict.suspects


def test_time_limits_that_bring_no_checkpoint_end(job):
    actions = []
    for _ in range(3):
        job.start()
        verdict = job.end(Outcome(0, asked=True), state="interrupted")
        actions.append(verdict.action)
    assert actions == ["requeue", "requeue", "give up"] and "raise --time" in verdict.reason


@pytest.mark.parametrize("order", [1, -1])  # files are listed in any order
def test_the_first_rank_to_fail_names_the_node(job, order):
    job.start()
    for rank, node, code, time in [(1, "node02", 137, 100.0), (0, "node01", 1, 100.4), (2, "node03", 1, 100.2)][::order]:
        job.fail(rank, node, code, time)
    verdict = job.end(CRASH, state="running")
    assert (verdict.action, verdict.suspects, verdict.excluded) == ("requeue", ("node02",), ())
    assert "rank 1 on node02" in verdict.reason and "137" in verdict.reason


def test_a_node_that_fails_first_twice_is_excluded_and_stays_so(job):
    for step, (node, excluded) in enumerate([("node02", ()), ("node03", ()), ("node02", ("node02",)), ("node05", ("node02",))], 1):
        job.start()
        job.save(step)
        job.fail(1, node, 1, time=100.0)
        assert job.end(CRASH, state="running").excluded == excluded


def test_crashes_without_progress_are_given_up_and_progress_starts_the_count_anew(job):
    actions = []
    for attempt in range(5):
        job.start()
        if attempt == 1:
            job.save(10)
        job.fail(0, f"node{attempt:02d}", 1, time=1.0)
        actions.append(job.end(CRASH, state="running").action)
    assert actions == ["requeue", "requeue", "requeue", "requeue", "give up"]


def test_another_job_on_the_run_starts_the_count_anew(job):
    for _ in range(3):
        job.start()
        last = job.end(CRASH, state="running")
    assert last.action == "give up"
    again = Job(job.run, "8")
    again.start()
    assert again.end(CRASH, state="running").action == "requeue"


def test_attempts_of_other_jobs_do_not_count(job):
    """Four jobs, one after another, each mended by somebody in between: none has failed three times in a row."""
    for number in "1234":
        one = Job(job.run, number)
        one.start()
        assert one.end(CRASH, state="running").action == "requeue"


def test_restarts_are_bounded(job):
    for step in range(1, 4):
        job.start()
        job.save(step)
        verdict = job.end(CRASH, Limits(max_restarts=2), state="running")
    assert verdict.action == "give up" and "MAX_RESTARTS" in verdict.reason


@pytest.mark.parametrize("from_status", [True, False])
def test_bad_input_is_not_tried_again(job, from_status):
    job.start()
    job.fail(0, "node01", 2, time=1.0)
    status = {"state": "failed", "error": "UserError: rope.factor: is 0; raise it"} if from_status else {}
    verdict = job.end(CRASH, **status)  # srun killed the other ranks: its own code says nothing
    assert verdict.action == "give up" and ("rope.factor" in verdict.reason) == from_status


def test_a_stop_file_and_a_cancelled_job_stay_stopped(job):
    job.start()
    assert job.end(Outcome(143, cancelled=True), state="running").action == "stopped"
    job.start()
    (job.run / "STOP").touch()
    assert job.end(Outcome(0), state="stopped").action == "stopped"


def test_unfit_nodes_are_left_out(job):
    job.start()
    verdict = job.end(Outcome(2, trained=False, bad_nodes=("node02",)))
    assert (verdict.action, verdict.excluded) == ("requeue", ("node02",)) and "preflight found node02 unfit" in verdict.reason
    job.start()
    job.save(5)
    assert job.end(Outcome(0, asked=True), state="interrupted").excluded == ("node02",), "and stay out"


def test_finished_with_fewer_steps_is_not_finished(job):
    job.start()
    assert job.end(Outcome(0, trained=False, asked=True), state="finished", step=10).action == "requeue"


def test_a_job_is_judged_by_its_own_attempts(job):
    """A second, accidental job on the same run is refused by the folder's lock; that is no verdict on the first."""
    job.start()
    job.save(5)
    second = Job(job.run, "8")
    second.start()
    second.fail(0, "node09", 2, time=1.0)
    assert second.end(Outcome(2), state="running").action == "give up"
    assert job.end(Outcome(0, asked=True), state="interrupted").action == "requeue"


def test_attempts_wanted_back_before_training_do_not_count(job):
    for _ in range(6):
        job.start()
        assert job.end(Outcome(0, trained=False, asked=True), state="interrupted").action == "requeue"


def test_a_hang_suspects_nobody(job):
    job.start()
    job.fail(0, "node01", 137, time=1.0)  # by the watchdog's own kill
    verdict = job.end(Outcome(137, hung="nothing written for 1800 s"), state="running")
    assert verdict.action == "requeue" and verdict.reason.startswith("hung:") and not verdict.suspects


@pytest.mark.parametrize("cancelled", [True, False])
def test_attempts_that_slurm_ends_are_bounded_at_the_start(job, cancelled):
    """By TERM, with an end written, or with the batch node, without one: nine in a row without a checkpoint, and restarts at all."""
    for _ in range(9):
        assert check_start(read_attempts(job.run), Limits()) is None
        job.start()
        if cancelled:
            job.end(Outcome(143, cancelled=True), state="running")
    found = check_start(read_attempts(job.run), Limits())
    assert found.action == "give up" and "9 attempts in a row" in found.reason
    assert "MAX_RESTARTS" in check_start(read_attempts(job.run), Limits(max_restarts=8)).reason
    if not cancelled:
        job.save(5)  # the last of them had got somewhere
        assert check_start(read_attempts(job.run), Limits()) is None


def test_a_torn_line_is_no_obstacle_and_a_wrong_one_is_named(job):
    job.start()
    with open(attempts_file(job.run), "a") as file:
        file.write('{"event": "end", "ti')  # the batch host lost power
    job.start()
    assert [attempt.restart for attempt in read_attempts(job.run)] == [0, 1]
    with open(attempts_file(job.run), "a") as file:
        file.write('{"event": "start", "job": "7"}\n')
    with pytest.raises(UserError, match="attempts.jsonl, line 3: has restart None"):
        read_attempts(job.run)


def test_a_node_whose_rank_does_not_answer_in_two_hangs_is_excluded(job):
    for attempt in range(2):
        job.start()
        job.save(attempt + 1)
        verdict = job.end(hang(node01=("step (loop.py:1)",), node02=()))
        assert verdict.suspects == ("node02",) and verdict.reason == "hung: nothing written; rank 1 on node02 did not answer"
    assert verdict.action == "requeue" and verdict.excluded == ("node02",)


def test_ranks_of_several_nodes_that_do_not_answer_blame_none(job):
    job.start(("node01", "node02", "node03"))
    verdict = job.end(hang(node01=("step (loop.py:1)",), node02=(), node03=()))
    assert verdict.suspects == () and "rank 1 on node02 did not answer; rank 2 on node03 did not answer" in verdict.reason


def test_a_hang_in_which_every_rank_answers_blames_no_node(job):
    job.start()
    job.fail(0, "node01", 137, 1.0)  # killed by the watchdog
    verdict = job.end(hang(node01=("step (loop.py:1)",), node02=("step (loop.py:1)",)))
    assert verdict.suspects == () and verdict.reason == "hung: nothing written"
