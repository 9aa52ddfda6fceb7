"""tools/inspect_positions.py as a user runs it: JSON, table, plot, where prompt lengths come from, and refusals."""

import errno
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from endprompt.errors import run_command
from endprompt.positions.inspection import inspect
from endprompt.positions.plot import gap_words
from endprompt.recipe import load_recipe

TOOL = Path(__file__).resolve().parents[2] / "tools" / "inspect_positions.py"

RECIPE = {
    "name": "look",
    "model": {"path": "absent-checkpoint", "architecture": "llama3_8b", "original_length": 8192},
    "target_length": 65536,
    "positions": {"scheme": "endprompt", "physical_length": 8192, "displaced_length": 20, "prompt_loss_weight": 0.5},
    "data": {"train": [{"path": "absent-corpus"}]},
    "training": {"steps": 30, "global_batch_size": 4, "learning_rate": 2e-5},
    "output": {"directory": "run"},
}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "look.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def run(recipe, *arguments):
    """The tool as a user runs it: a process of its own, outside the repository."""
    command = [sys.executable, str(TOOL), "--recipe", str(recipe), *arguments]
    return subprocess.run(command, cwd=recipe.parent, capture_output=True, text=True, timeout=120)


def succeed(recipe, *arguments):
    done = run(recipe, *arguments)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def run_here(recipe, monkeypatch, capsys):
    """The tool in this process, which saves importing everything again: exit code, stdout, stderr."""
    specification = importlib.util.spec_from_file_location("inspect_positions_tool", TOOL)
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)

    def call(*arguments):
        monkeypatch.chdir(recipe.parent)
        monkeypatch.setattr(sys, "argv", [str(TOOL), "--recipe", str(recipe), *arguments])
        with pytest.raises(SystemExit) as left:
            run_command(tool.main)
        return left.value.code, *capsys.readouterr()

    return call


def test_json_is_all_of_stdout_and_holds_the_samples(recipe):
    done = succeed(recipe, "--json", "--samples", "3")
    found = json.loads(done.stdout)
    assert done.stderr == ""
    assert (found["scheme"], found["physical_length"], found["target_length"]) == ("endprompt", 8192, 65536)
    assert len(found["samples"]) == 3
    for sample in found["samples"]:
        assert sample["position_ids"] == list(range(8172)) + list(range(65516, 65536))
        assert sample["loss_weights"] == [0.0] + [1.0] * 8180 + [0.5] * 11  # EP_1 is 11 Llama-3 tokens
    coverage = found["coverage"]
    assert coverage["gaps"] == [{"first": 8172, "last": 57344, "distances": 49173}]
    assert coverage["far_pairs"] == 3 * 163_440 and coverage["far_predictions_per_sample"] == 19
    assert "table" in found["prompt_lengths_from"] and "llama3" in found["prompt_lengths_from"]


def test_table_shows_segments_coverage_and_where_lengths_come_from(recipe):
    text = succeed(recipe, "--samples", "12").stdout
    assert "tokens 0..8,171                 8,172  at positions  0..8,171             body\n" in text
    assert "tokens 8,172..8,191                20  at positions  65,516..65,535       body, 11 of the prompt\n" in text
    assert "never shown        8,172..57,344 = 49,173 (75.03%)" in text
    assert "163,440 of 33,558,528 a sample (0.487%)" in text
    assert "from the built-in table for llama3 tokenizers, as there is no tokenizer in absent-checkpoint" in text
    assert "sample 7" in text and "sample 8" not in text and "and 4 more samples" in text


@pytest.mark.parametrize("scheme", ["endprompt_random", "pose", "endprompt_pose", "cream", "randpos", "short", "full"])
def test_every_scheme_is_shown(run_here, scheme):
    physical = 512 if scheme == "full" else 128
    sizes = [f"positions.physical_length={physical}", "target_length=512", "model.original_length=128"]
    overrides = [part for field in [f"positions.scheme={scheme}", *sizes] for part in ("--set", field)]
    code, out, _ = run_here("--json", *overrides)
    found = json.loads(out)
    assert code == 0 and found["scheme"] == scheme
    assert all(len(sample["position_ids"]) == len(sample["loss_weights"]) == physical for sample in found["samples"])
    assert f"scheme            {scheme}\n" in run_here(*overrides)[1]


def test_schemes_without_prompt_need_no_prompt_length(run_here):
    code, out, _ = run_here("--json", "--set", "positions.scheme=pose", "--set", "model.architecture=custom")
    assert code == 0 and json.loads(out)["prompts"] == [] and json.loads(out)["samples"][0]["prompt"] is None


def test_given_prompt_length_needs_no_table(run_here):
    arguments = ("--set", "model.architecture=custom", "--set", "positions.displaced_length=null", "--samples", "1")
    found = json.loads(run_here(*arguments, "--prompt-length", "5", "--json")[1])
    assert found["samples"][0]["position_ids"][-6:] == [8186, *range(65531, 65536)]
    assert found["prompt_lengths_from"] == "--prompt-length"


def test_a_tokenizer_at_hand_is_asked(recipe):
    words = ["<unk>", "This", "is", "the", "end", "of", "text", ",", "please", "pay", "attention", "here"]
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    tokenizer.save_pretrained(recipe.parent / "checkpoint")
    arguments = ("--set", "model.path=checkpoint", "--set", "positions.prompts=[EP_3, EP_1]", "--json")
    found = json.loads(succeed(recipe, *arguments).stdout)
    assert {prompt["name"]: prompt["length"] for prompt in found["prompts"]} == {"EP_3": 2, "EP_1": 11}
    assert found["prompt_lengths_from"] == "the tokenizer in checkpoint"


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_plot_is_written_beside_json(recipe, run_here, ending):
    path = recipe.parent / f"coverage.{ending}"
    code, out, _ = run_here("--json", "--plot", str(path))
    assert code == 0 and json.loads(out)["scheme"] == "endprompt"
    begins = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[ending]
    assert path.read_bytes().startswith(begins) and path.stat().st_size > 5000


def test_plot_says_the_arithmetic_of_the_gap(recipe):
    words = gap_words(inspect(load_recipe(recipe), 2), 8172, 57344)
    assert "8,172..57,344 = 49,173 distances" in words
    assert "max(8,172, 20)..65,536-8,172-20 = 8,172..57,344" in words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "model.architecture=custom"], ["look.yaml: positions.prompts: EP_1", "--prompt-length"]),
        (["--set", 'positions.prompts=[{name: mine, text: "Stop."}]'], ["positions.prompts: mine", "--prompt-length"]),
        (["--samples", "0"], ["--samples: is 0"]),
        (["--prompt-length", "-1"], ["--prompt-length: is -1"]),
        (["--prompt-length", "8192"], ["look.yaml: positions.prompts: EP_1", "8192 tokens leave no body"]),
        (["--plot", "picture.bmp"], ["picture.bmp", ".png, .pdf or .svg"]),
        (["--set", "positions.scheme=endpromt"], ["look.yaml: positions.scheme"]),
        (["--set", "model.architecture=llama9"], ["look.yaml: model.architecture", "llama9"]),
        (["--set", "positions.scheme=cream", "--set", "positions.physical_length=512"], ["look.yaml: positions.physical_length", "725"]),
        (["--plot", "look.yaml/picture.png"], ["look.yaml"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(recipe, run_here, arguments, words):
    before = sorted(recipe.parent.iterdir())
    code, out, err = run_here(*arguments)
    assert code == 2 and out == ""
    assert len(err.splitlines()) == 1 and err.startswith("error: ")
    assert all(word in err for word in words), err
    assert sorted(recipe.parent.iterdir()) == before


def test_a_shell_sees_exit_code_2(recipe):
    done = run(recipe, "--samples", "0")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: --samples: is 0; give at least 1\n")


def test_a_failing_plot_leaves_the_earlier_one(recipe, run_here, monkeypatch):
    path = recipe.parent / "coverage.png"
    path.write_bytes(b"earlier")

    def disk_full(figure, file, **options):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", disk_full)
    code, out, err = run_here("--plot", str(path))
    assert code == 2 and out == "" and "free disk space" in err
    assert path.read_bytes() == b"earlier" and sorted(recipe.parent.iterdir()) == [path, recipe]
