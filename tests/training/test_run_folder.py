"""The small files of a run, and the promise that only one process owns the folder."""

import json
import subprocess
import sys
import time

import pytest

from endprompt.errors import UserError
from endprompt.training.run_folder import RunFolder
from tests.support.recipes import make_recipe


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    folder = RunFolder(make_recipe(**{"output.directory": tmp_path / "run"}))
    folder.check_writable()
    return folder


def test_log_forgets_steps_that_no_checkpoint_holds(folder):
    for step in (1, 2, 3, 4):
        folder.append_log({"step": step, "loss": 1.0 / step})
    with open(folder.log, "a") as file:
        file.write('{"step": 5, "lo')  # torn by a kill
    folder.forget_steps_after(2)
    kept = [json.loads(line) for line in folder.log.read_text().splitlines()]
    assert [entry["step"] for entry in kept] == [1, 2] and kept[0]["time"] <= kept[1]["time"] <= time.time() + 0.01


def test_status_merges(folder):
    assert folder.read_status() == {}
    folder.write_status(state="running", step=3)
    folder.write_status(step=4)
    status = folder.read_status()
    assert (status["state"], status["step"]) == ("running", 4) and "updated" in status


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("a", "is wrong", "mend it"), 2), (OSError(28, "No space left on device"), 2), (RuntimeError("a crash"), 1)],
)
def test_status_keeps_how_a_run_failed(folder, error, code):
    folder.write_status(state="running", step=3)
    with pytest.raises(type(error)), folder.failures_recorded():
        raise error
    status = folder.read_status()
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", 3, code) and type(error).__name__ in status["error"]


def test_a_second_run_is_kept_out_and_a_dead_one_is_not_in_the_way(folder):
    script = (
        "import sys; from endprompt.training.run_folder import RunFolder; from tests.support.recipes import make_recipe\n"
        "f = RunFolder(make_recipe(**{'output.directory': sys.argv[1]})); f.claim(); print('claimed', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", script, str(folder.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "claimed\n"
    with pytest.raises(UserError, match="another run is using this folder"):
        folder.claim()
    other.kill()
    other.wait()
    folder.claim()


def test_wandb_id_is_made_once(folder):
    assert folder.wandb_id() == folder.wandb_id() != ""


def test_recipe_is_written_so_that_it_loads_again(folder):
    from endprompt.recipe import load_recipe

    recipe = make_recipe(**{"positions.prompts": "[EP_1, {span_length: 4}]"})
    folder.write_recipe(recipe)
    assert load_recipe(folder.path / "recipe.yaml") == recipe
