"""Reading recipes: every mistake gives one line with file, field and fix; overrides and variables land where they should."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from endprompt.errors import UserError
from endprompt.recipe import load_recipe
from tests.support.recipes import TINY, make_recipe


def test_a_recipe_as_written():
    recipe = make_recipe()
    assert (recipe.name, recipe.target_length, recipe.positions.physical_length) == ("tiny", 1024, 64)
    assert [prompt.name for prompt in recipe.positions.prompts] == ["EP_1", "EP_3"]
    assert recipe.positions.prompts[0].text == "This is the end of text, please pay attention here"
    assert recipe.tokens_per_step == 4 * 64 and recipe.steps == 20
    with pytest.raises(ValidationError):
        recipe.target_length = 2048


def test_tokens_make_whole_steps():
    assert make_recipe(**{"training.steps": "null", "training.tokens": 256 * 30 + 255}).steps == 30


@pytest.mark.parametrize(
    "rope, factor",
    [("linear", 8.0), ("ntk", 8.0), ("none", 1.0)],
)
def test_the_factor_is_target_over_original(rope, factor):
    assert make_recipe(**{"rope.type": rope}).rope_factor == factor


def test_the_factor_of_the_recipe_wins():
    assert make_recipe(**{"rope.factor": 10}).rope_factor == 10


# Overrides.


@pytest.mark.parametrize(
    "override, read, expected",
    [
        ("training.learning_rate=3e-5", lambda r: r.training.learning_rate, 3e-5),
        ("training.learning_rate=2.5E-6", lambda r: r.training.learning_rate, 2.5e-6),
        ("data.train.0.weight=2.5", lambda r: r.data.train[0].weight, 2.5),
        ("wandb.mode=offline", lambda r: r.wandb.mode, "offline"),  # a section that the file lacks
        ("positions.displaced_length=null", lambda r: r.positions.displaced_length, None),
        ("positions.prompts=[EP_2]", lambda r: [p.text for p in r.positions.prompts], ["<|eot_id|>"]),
        ("positions.prompts=[{name: mine, text: 'a=b'}]", lambda r: r.positions.prompts[0].text, "a=b"),
        ("positions.prompts=[{span_length: 8}]", lambda r: r.positions.prompts[0].span_length, 8),
    ],
)
def test_overrides(override, read, expected):
    assert read(load_recipe(TINY, [override])) == expected


def test_the_last_override_wins():
    assert load_recipe(TINY, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    "override, words",
    [
        ("seed", "--set seed: is not FIELD=VALUE"),
        ("=3", "is not FIELD=VALUE"),
        ("seed=[1", "the value is not valid YAML"),
        ("name.first=x", "name is a value, not a section"),
        ("data.train.7.weight=1", "'7' is not an item of a list of 1; count items from 0"),
        ("data.train.first.weight=1", "'first' is not an item"),
        ("training.learnig_rate=1", "training.learnig_rate: unknown field; did you mean learning_rate?"),
        ("trainig.steps=3", "trainig: unknown field; did you mean training?"),
        ("data.train.0.wait=1", "data.train.0.wait: unknown field"),
        ("positions.pose.chunk=3", "positions.pose.chunk: unknown field; did you mean chunks?"),
    ],
)
def test_bad_overrides(override, words):
    with pytest.raises(UserError) as caught:
        load_recipe(TINY, [override])
    assert words in str(caught.value)


# Variables.


def write(tmp_path, text: str):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_variables(tmp_path, monkeypatch):
    path = write(tmp_path, TINY.read_text().replace("tiny-model", '"${EP_MODELS}/x${EP_SUFFIX:-.hf}"'))
    monkeypatch.setenv("EP_MODELS", "/models")
    assert load_recipe(path).model.path == "/models/x.hf"
    monkeypatch.setenv("EP_SUFFIX", "")  # empty counts as not set, as ${NAME:-default} does in a shell
    assert load_recipe(path).model.path == "/models/x.hf"
    monkeypatch.setenv("EP_SUFFIX", "-2")
    assert load_recipe(path).model.path == "/models/x-2"
    monkeypatch.delenv("EP_MODELS")
    with pytest.raises(UserError, match=r"recipe.yaml: model.path: environment variable EP_MODELS is not set; export EP_MODELS"):
        load_recipe(path)


def test_variables_in_overrides_and_lists(monkeypatch):
    monkeypatch.setenv("EP_DATA", "/corpora")
    assert load_recipe(TINY, ["data.train.0.path=${EP_DATA}/a"]).data.train[0].path == "/corpora/a"


# Files.


@pytest.mark.parametrize(
    "text, words",
    [
        ("name: [1\n", ["line 2", "not valid YAML"]),
        ("- 1\n- 2\n", ["holds no mapping", "start from one of recipes/*.yaml"]),
        ("", ["holds no mapping"]),
        ("name: a\nseed: 1\nname: b\n", ["line 3", "'name' appears twice"]),
    ],
)
def test_broken_files(text, words, tmp_path):
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, text))
    assert all(word in str(caught.value) for word in [*words, "recipe.yaml"])


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(UserError, match="recipe.yaml: not valid YAML"):
        load_recipe(path)


def test_a_misspelt_path_is_corrected():
    with pytest.raises(UserError, match=r"tinny.yaml: no such recipe; .*did you mean .*tiny.yaml"):
        load_recipe(TINY.with_name("tinny.yaml"))


def test_missing_fields_are_named(tmp_path):
    text = "\n".join(line for line in TINY.read_text().splitlines() if "learning_rate" not in line)
    with pytest.raises(UserError, match="recipe.yaml: training.learning_rate: is missing; add it"):
        load_recipe(write(tmp_path, text))


# Values.


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("seed", -1, "seed: input should be greater than or equal to 0, found -1"),
        ("name", "a/b", "name: "),
        ("training.learning_rate", "fast", "training.learning_rate: input should be a valid number"),
        ("training.learning_rate", ".nan", "training.learning_rate: "),
        ("training.global_batch_size", 0, "training.global_batch_size: input should be greater than 0, found 0"),
        ("training.precision", "fp16", "training.precision: "),
        ("training.tokens", 1000000, "give exactly one of tokens and steps"),
        ("training.steps", "null", "give exactly one of tokens and steps"),
        ("positions.scheme", "endpromt", "positions.scheme: "),
        ("positions.prompts", "[EP_9]", "unknown prompt 'EP_9'; use EP_1, EP_2, EP_3"),
        ("positions.prompts", "[]", "positions.prompts: "),
        ("positions.prompts", "[{name: x, text: ''}]", "positions.prompts"),
        ("positions.prompts", "[{name: x, text: a, wheight: 2}]", "wheight: unknown field"),
        ("rope.type", "dynamic", "rope.type: "),
        ("rope.interpolation", 2, "interpolation goes with type llama3"),
        ("rope.beta_fast", 0.5, "beta_fast must be above beta_slow"),
        ("data.train", "[]", "data.train: "),
        # checks that span sections
        ("target_length", 100, "target_length: 100 is below model.original_length 128; raise it"),
        ("positions.physical_length", 2048, "positions.physical_length: 2048 is above target_length 1024; lower it"),
        ("positions.scheme", "full", "scheme full trains at target_length 1024, found 64; set it to 1024"),
        ("positions.displaced_length", 64, "positions.displaced_length: 64 leaves no body in physical_length 64; lower it"),
        ("rope.factor", 4, "rope.factor: 4 covers 512 positions, target_length is 1024"),
        ("training.warmup_steps", 21, "training.warmup_steps: 21 is above the 20 steps of the run; lower it"),
        ("training.min_learning_rate", 1, "training.min_learning_rate: is above training.learning_rate; lower it"),
        ("training.micro_batch_size", 3, "training.micro_batch_size: 3 does not divide global_batch_size 4; choose a divisor"),
    ],
)
def test_bad_values(field, value, words):
    with pytest.raises(UserError) as caught:
        make_recipe(**{field: value})
    message = str(caught.value)
    assert words in message and "tiny.yaml" in message
    assert "\n" not in message and "; " in message  # one line, with a fix


def test_a_budget_below_one_step():
    with pytest.raises(UserError, match="training.tokens: 100 is less than one step of 256 tokens; raise it"):
        make_recipe(**{"training.steps": "null", "training.tokens": 100, "training.warmup_steps": 0})


# The fingerprint decides which checkpoints a run may resume.


@pytest.mark.parametrize(
    "field, value",
    [
        ("name", "other"),
        ("model.path", "elsewhere"),
        ("data.train.0.path", "elsewhere"),
        ("data.validation", "[]"),
        ("output.directory", "elsewhere"),
        ("output.save_interval", 7),
        ("wandb.mode", "offline"),
        ("deepspeed.config", "deepspeed_configs/zero3_offload.json"),
        ("training.micro_batch_size", 2),
        ("training.activation_checkpointing", False),
    ],
)
def test_a_run_may_resume_after_changes_that_leave_its_numbers(field, value):
    assert make_recipe(**{field: value}).fingerprint() == make_recipe().fingerprint()


@pytest.mark.parametrize(
    "field, value",
    [
        ("seed", 1),
        ("model.architecture", "tiny"),
        ("target_length", 512),
        ("rope.type", "ntk"),
        ("rope.factor", 9),
        ("positions.scheme", "pose"),
        ("positions.displaced_length", 13),
        ("positions.prompts", "[EP_1]"),
        ("positions.prompt_loss_weight", 0.5),
        ("data.train.0.weight", 2),
        ("training.steps", 21),
        ("training.global_batch_size", 8),
        ("training.learning_rate", 0.002),
        ("training.precision", "bf16"),
    ],
)
def test_a_run_may_not_resume_another(field, value):
    assert make_recipe(**{field: value}).fingerprint() != make_recipe().fingerprint()


def test_a_fingerprint_outlives_the_process():
    """Checkpoints are resumed by later processes, whose hash seeds differ."""
    code = f"from endprompt.recipe import load_recipe; print(load_recipe({str(TINY)!r}).fingerprint())"
    root = TINY.parents[2]
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        printed = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=True)
        assert printed.stdout.strip() == make_recipe().fingerprint()


@pytest.mark.parametrize("recompute", ["full", "selective", "none"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_megatron_recomputes_nothing_where_nothing_is_checkpointed(recompute, checkpointing):
    settings = [f"megatron.recompute={recompute}", f"training.activation_checkpointing={str(checkpointing).lower()}"]
    recipe = load_recipe(Path(__file__).resolve().parents[2] / "recipes/llama3_8b_64k.yaml", settings)
    assert recipe.megatron_recompute == (recompute if checkpointing else "none")
