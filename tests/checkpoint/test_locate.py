"""Which checkpoint a folder means: a run of this project, Megatron-LM's save folder, or the checkpoint itself."""

from __future__ import annotations

import json

import pytest

from endprompt.checkpoint.locate import find_checkpoint, is_megatron
from endprompt.errors import UserError


def make(folder, *names):
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "metadata.json").write_text("{}")
    return folder


def test_megatron_lm_follows_its_tracker(tmp_path):
    make(tmp_path, "iter_0000005", "iter_0000010", "iter_0000015", "release")
    assert find_checkpoint(tmp_path, None) == (tmp_path / "iter_0000015", 15)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    assert find_checkpoint(tmp_path, None) == (tmp_path / "iter_0000010", 10)
    assert find_checkpoint(tmp_path, 5) == (tmp_path / "iter_0000005", 5)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    assert find_checkpoint(tmp_path, None) == (tmp_path / "release", None)
    assert is_megatron(tmp_path)


def test_a_run_leaves_out_what_is_not_complete(tmp_path):
    make(tmp_path, "checkpoints/step_00000010", "checkpoints/step_00000020", "checkpoints/step_00000030.incomplete")
    assert find_checkpoint(tmp_path, None)[1] == 20
    assert find_checkpoint(tmp_path / "checkpoints", None)[1] == 20
    (tmp_path / "checkpoints/latest").write_text("step_00000010\n")
    assert find_checkpoint(tmp_path, None)[1] == 10
    with pytest.raises(UserError, match="there are: 10, 20"):
        find_checkpoint(tmp_path, 30)


def test_the_checkpoint_itself_says_its_step(tmp_path):
    make(tmp_path, "step_00000010", "moved")
    assert find_checkpoint(tmp_path / "step_00000010", None)[1] == 10
    assert find_checkpoint(tmp_path / "moved", None)[1] is None
    (tmp_path / "moved/state.json").write_text(json.dumps({"step": 7}))
    assert find_checkpoint(tmp_path / "moved", 7)[1] == 7
    with pytest.raises(UserError, match="is one checkpoint already"):
        find_checkpoint(tmp_path / "moved", 8)
    (tmp_path / "moved/state.json").write_text("[]")
    with pytest.raises(UserError, match="does not say a step"):
        find_checkpoint(tmp_path / "moved", None)


def test_a_hugging_face_folder_is_none(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert not is_megatron(tmp_path)
    with pytest.raises(UserError, match="holds no torch_dist checkpoint"):
        find_checkpoint(tmp_path, None)
