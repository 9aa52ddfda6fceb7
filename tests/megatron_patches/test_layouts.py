"""Every parallel layout trains the same model: ten steps at each equal ten steps of one process, over gloo.

Samples differ in their positions within every micro-batch (scheme pose; endprompt with two prompts of different length).
"""

import json

import pytest

from tests.support.tiny import make_tiny_checkpoint
from tests.support.warm import launch_ranks
from tests.support.workspace import Workspace

# Adam's first steps are the sign of a gradient: where that is rounding noise (1e-9), layouts would part by the learning rate.
# An epsilon above the noise keeps the comparison about the layouts; the loss may still differ by no more than 1e-5.
SETTINGS = {
    "positions.scheme": "pose", "training.micro_batch_size": 4, "training.global_batch_size": 16, "training.steps": 10,
    "training.learning_rate": 0.005, "training.epsilon": 1e-5, "positions.physical_length": 32,
}  # fmt: skip
LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {"tensor_parallel": 2, "sequence_parallel": False}),
    "tp2_sp": (2, {"tensor_parallel": 2}),
    "pp2": (2, {"pipeline_parallel": 2}),
    "pp4": (4, {"pipeline_parallel": 4}),
    "pp2_vpp2": (2, {"pipeline_parallel": 2, "virtual_pipeline": 2}),
    "cp2": (2, {"context_parallel": 2}),
    "cp4": (4, {"context_parallel": 4}),
    "dp2": (2, {}),
    "dp2_plain_optimizer": (2, {"distributed_optimizer": False}),
    "dp2_no_overlap": (2, {"overlap": False}),
    "tp2_pp2_dp2": (8, {"tensor_parallel": 2, "pipeline_parallel": 2}),
    "tp2_cp2_pp2": (8, {"tensor_parallel": 2, "context_parallel": 2, "pipeline_parallel": 2}),
    "selective": (2, {"tensor_parallel": 2, "recompute": "selective"}),
    "nothing_recomputed": (2, {"tensor_parallel": 2, "recompute": "none"}),
}
TIED = {"tied_one": (1, {}), "tied_tp2": (2, {"tensor_parallel": 2}), "tied_pp2": (2, {"pipeline_parallel": 2})}
PROMPTED = {
    "prompted_one": (1, {}),
    "prompted_cp2": (2, {"context_parallel": 2}),
    "prompted_tp2_pp2": (4, {"tensor_parallel": 2, "pipeline_parallel": 2}),
}
FAULTS = {
    "positions in plain chunks": (2, {"context_parallel": 2}),
    "positions of the wrong rank": (2, {"context_parallel": 2}),
    "unmarked parts": (2, {"tensor_parallel": 2}),
    "no positions on the last stage": (2, {"pipeline_parallel": 2}),
}

pytestmark = pytest.mark.timeout(1200)  # the first test waits for all of them


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All jobs in one world of eight processes; {name: result}."""
    folder = tmp_path_factory.mktemp("layouts")
    workspace = Workspace(folder)
    for name, tied in (("four", False), ("tied", True)):
        make_tiny_checkpoint(folder / name, num_hidden_layers=4, tie_word_embeddings=tied, intermediate_size=96)
    jobs = []

    def add(name, ranks, megatron, model="four", fault=None, **settings):
        fields = {**SETTINGS, "model.path": folder / model, **{f"megatron.{key}": value for key, value in megatron.items()}, **settings}
        overrides = [f"{field}={value}" for field, value in fields.items()]
        jobs.append({"name": name, "ranks": ranks, "recipe": str(workspace.recipe_file), "overrides": overrides, "fault": fault})

    for name, (ranks, megatron) in LAYOUTS.items():
        add(name, ranks, megatron)
    for name, (ranks, megatron) in TIED.items():
        add(name, ranks, megatron, model="tied")
    for name, (ranks, megatron) in PROMPTED.items():
        prompts = {"positions.scheme": "endprompt", "positions.displaced_length": "null", "positions.prompts": "[EP_2, EP_3]"}
        add(name, ranks, megatron, **prompts, **{"rope.type": "yarn", "positions.prompt_loss_weight": 0.3})
    for fault, (ranks, megatron) in FAULTS.items():
        add(fault, ranks, megatron, fault=fault, **{"training.steps": 1, "training.warmup_steps": 0})  # each shows in the first step
    (folder / "jobs.json").write_text(json.dumps(jobs))
    code = launch_ranks("megatron", 8, "layout_rank.py", folder / "jobs.json", folder)
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json") if path.stem != "jobs"}
    assert found.keys() == {job["name"] for job in jobs}, f"exit code {code}; what the ranks said is in the captured output"
    return found


def compare(result, reference):
    assert "error" not in result, result
    assert result["losses"] == pytest.approx(reference["losses"], abs=1e-5)
    assert result["norms"] == pytest.approx(reference["norms"], rel=1e-4)
    assert result["validation"] == pytest.approx(reference["validation"], abs=1e-5)


def test_one_process_learns(results):
    losses = results["one"]["losses"]
    assert losses[0] - losses[-1] > 0.15, "the run must learn something, or equality proves little"


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one"])
def test_every_layout_equals_one_process(results, name):
    compare(results[name], results["one"])


@pytest.mark.parametrize("name", ["tied_tp2", "tied_pp2"])
def test_tied_embeddings(results, name):
    compare(results[name], results["tied_one"])


@pytest.mark.parametrize("name", ["prompted_cp2", "prompted_tp2_pp2"])
def test_prompts_of_different_length_yarn_and_fractional_weights(results, name):
    compare(results[name], results["prompted_one"])


@pytest.mark.parametrize("fault", ["positions in plain chunks", "positions of the wrong rank"])
def test_positions_sliced_otherwise_than_tokens_show(results, fault):
    assert abs(results[fault]["losses"][0] - results["one"]["losses"][0]) > 1e-3


def test_parts_that_are_not_marked_show_in_the_gradient_norm(results):
    assert results["unmarked parts"]["norms"][0] < 0.95 * results["one"]["norms"][0]


def test_a_stage_without_positions_is_refused(results):
    assert "every pipeline stage must pass them" in results["no positions on the last stage"]["error"]
