"""Which checkpoints stay, which one a start goes on from, and what is refused: the parts that need no training."""

import json

import pytest

from endprompt.errors import UserError
from endprompt.training.checkpoints import _complete, latest
from endprompt.training.run_folder import RunFolder
from tests.support.recipes import make_recipe

FACTS = {"world_size": 2, "fingerprint": "f", "recipe": {}, "data": "d"}


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(make_recipe(**{"output.directory": tmp_path / "run"}))


def complete(folder: RunFolder, step: int, keep_last: int) -> None:
    incomplete = folder.checkpoints / f"step_{step:08d}.incomplete"
    incomplete.mkdir(parents=True)
    _complete(folder, incomplete, {"step": step, **FACTS}, keep_last)


def test_the_newest_are_kept(folder):
    for step in (10, 20, 30):
        complete(folder, step, keep_last=2)
    assert sorted(path.name for path in folder.checkpoints.glob("step_*")) == ["step_00000020", "step_00000030"]
    assert latest(folder).step == 30


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_later_checkpoint_that_the_pointer_does_not_name_costs_no_other_its_life(folder, keep_last):
    """Left by a kill between rename and pointer, or by a user who set the pointer back."""
    complete(folder, 10, keep_last)
    (folder.checkpoints / "step_00000030").mkdir()
    complete(folder, 15, keep_last)
    assert latest(folder).step == 15


@pytest.mark.parametrize(
    "state", ["", "[]", '{"step": 7}', json.dumps({**FACTS, "step": "x"}), json.dumps({**FACTS, "step": 7, "recipe": []})]
)
def test_a_damaged_state_names_the_other_checkpoints(folder, state):
    complete(folder, 5, keep_last=2)
    complete(folder, 7, keep_last=2)
    (folder.checkpoints / "step_00000007" / "state.json").write_text(state)
    with pytest.raises(UserError, match="missing or damaged; write one of step_00000005 into it"):
        latest(folder)
