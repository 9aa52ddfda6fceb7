"""What `head` refuses: one line for every problem, exit code 2, no head.json."""

import json
import shutil
import sys

import numpy as np
import pytest

from endprompt.cluster.preflight.head import Job, check_memory
from endprompt.data.indexed import write_indexed
from endprompt.errors import UserError, run_command
from endprompt.recipe import load_recipe
from tests.support.workspace import ROOT, Workspace
from tools import preflight


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def head(pristine, tmp_path, monkeypatch, capsys):
    """Run `head` on a workspace of its own, two nodes of two: head("--set", ..., spoil=change the folder) -> code, stdout, error lines."""
    folder = tmp_path / "w"
    shutil.copytree(pristine.path, folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(pristine.path), str(folder)))
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def run(*arguments, spoil=None, engine="deepspeed", nodes=2):
        if spoil:
            spoil(folder)
        monkeypatch.setattr(
            sys, "argv",
            ["preflight.py", "head", "--recipe", str(recipe), "--engine", engine, "--nodes", str(nodes), "--processes-per-node", "2",
             "--records", str(folder / "records"), *arguments],
        )  # fmt: skip
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_command(preflight.main)
        out, err = capsys.readouterr()
        assert all(line.startswith("error: ") and "; " in line for line in err.splitlines())
        assert (folder / "records" / "head.json").exists() is (stopped.value.code == 0)
        return stopped.value.code, out, err.splitlines()

    run.folder = folder
    return run


@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_a_good_recipe_passes_with_the_planners_word_on_memory(head, engine):
    code, out, lines = head(engine=engine)
    assert code == 0 and not lines and all(line.startswith("ok  ") for line in out.splitlines())
    assert "of 80 GB a GPU, predicted for h100-80gb" in out
    assert ("DP 4" if engine == "megatron" else "ZeRO-3, 4 samples = 1 x 1 micro-steps x 4") in out
    record = json.loads((head.folder / "records" / "head.json").read_text())
    assert record["engine"] == engine and record["nodes"] == 2 and record["run_folder"] == str(head.folder / "run")


@pytest.mark.parametrize(
    ("spoil", "arguments", "problem"),
    [
        (lambda w: shutil.rmtree(w / "model"), [], "model"),
        (lambda w: (w / "model" / "tokenizer.json").unlink(), [], "holds no tokenizer"),
        (lambda w: (w / "corpus_train.idx").unlink(), [], "corpus_train.idx: no such file"),
        (lambda w: (w / "run").mkdir() or (w / "run" / "STOP").touch(), [], "STOP: this run was told to stop"),
        (lambda w: (w / "run").touch(), [], "run"),
        (None, ["--set", "training.global_batch_size=6"], "6 does not divide by micro_batch_size 1 x 4 ranks"),
        (None, ["--set", "model.original_lenght=3"], "did you mean original_length?"),
        (lambda w: (w / "records").mkdir() or (w / "records" / "thesis.tex").touch(), [], "holds thesis.tex, which is no record"),
    ],
)
def test_each_problem_is_one_line(head, spoil, arguments, problem):
    code, _, lines = head(*arguments, spoil=spoil)
    assert code == 2 and any(problem in line for line in lines), lines
    assert len(lines) == len(set(lines))


def test_megatrons_layout_is_checked_for_the_ranks_of_the_job(head):
    code, _, lines = head("--set", "megatron.pipeline_parallel=3", engine="megatron")
    assert code == 2 and len(lines) == 1 and "3 ranks do not divide 4; start a multiple of 3 ranks" in lines[0]


def test_problems_do_not_hide_each_other(head):
    def spoil(folder):
        (folder / "model" / "model.safetensors").unlink()
        (folder / "model" / "tokenizer.json").write_text("{}")
        (folder / "corpus_train.bin").unlink()
        write_indexed(folder / "corpus_validation", [np.zeros(3, dtype=np.uint16)], dtype=np.uint16)
        (folder / "run").mkdir()
        (folder / "run" / "STOP").touch()

    code, out, lines = head("--set", "training.global_batch_size=6", "--device", "cpu", spoil=spoil)
    assert code == 2 and "not checked: the run is on CPUs" in out
    for place in ("global_batch_size", "safetensors", "tokenizer", "corpus_train.bin", "STOP"):
        assert sum(place in line for line in lines) == 1, (place, lines)
    assert len(lines) == 5


def test_old_records_are_gone_even_where_a_check_fails(head):
    assert head()[0] == 0
    code, _, _ = head("--set", "training.global_batch_size=6")
    assert code == 2 and list((head.folder / "records").iterdir()) == []


@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_what_does_not_fit_says_what_to_change(monkeypatch, engine):
    monkeypatch.chdir(ROOT)
    name = "recipes/llama3_70b_64k.yaml"
    sets = [] if engine == "deepspeed" else ["megatron.pipeline_parallel=1", "megatron.virtual_pipeline=1", "megatron.tensor_parallel=1"]
    job = Job(name, sets, engine, nodes=2 if engine == "deepspeed" else 8, processes_per_node=8)
    with pytest.raises(UserError) as refused:
        check_memory(job, load_recipe(name, sets))
    assert refused.value.problem.endswith("(predicted for h100-80gb)") and "of the 80 GB a GPU has" in refused.value.problem
    assert refused.value.fix.startswith("use --set ") and "which makes it" in refused.value.fix


def test_more_memory_a_gpu_lets_more_fit(monkeypatch):
    monkeypatch.chdir(ROOT)
    name = "recipes/llama3_70b_128k.yaml"
    assert "of 141 GB a GPU" in check_memory(Job(name, [], "megatron", 8, 8, gpu="h200-141gb"), load_recipe(name))
