"""Everything a user can get wrong: one line that names the place and the fix, exit code 2, earlier output untouched."""

import errno
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from endprompt.data.indexed import write_indexed
from endprompt.errors import run_command
from tests.support.workspace import ROOT, Workspace

TRAIN, PREPARE, INSPECT, EVALUATE = "ds_train.py", "tools/prepare_data.py", "tools/inspect_positions.py", "tools/evaluate.py"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def place(pristine, tmp_path, monkeypatch) -> Path:
    """A copy of a good workspace to spoil; the commands run in it, on relative paths."""
    folder = tmp_path / "w"
    shutil.copytree(pristine.path, folder)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text().replace(str(pristine.path), "."))
    recipe["deepspeed"]["config"] = "zero3.json"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    shutil.copy(ROOT / "deepspeed_configs/zero3.json", folder)
    (folder / "text.jsonl").write_text('{"text": "It was the best of times."}\n' * 3)
    monkeypatch.chdir(folder)
    return folder


def command_main(script: str):
    spec = importlib.util.spec_from_file_location(script.replace("/", "_").removesuffix(".py"), ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def invoke(script: str, arguments: list[str], monkeypatch, capsys) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_command(command_main(script))
    return stopped.value.code, capsys.readouterr().err


def dry(*sets: str) -> tuple[str, list[str]]:
    return TRAIN, ["--recipe", "recipe.yaml", "--dry-run", "--world-size", "2", *(word for s in sets for word in ("--set", s))]


def prepare(*arguments: str) -> tuple[str, list[str]]:
    return PREPARE, ["--tokenizer", "model", "--output", "out", "--workers", "1", *arguments]


def edit_json(path: str, **changes):
    def change(folder: Path):
        content = json.loads((folder / path).read_text())
        content.update(changes)
        (folder / path).write_text(json.dumps(content))

    return change


def write(path: str, content: str | bytes):
    return lambda folder: (folder / path).write_bytes(content.encode() if isinstance(content, str) else content)


def append(path: str, content: str):
    return lambda folder: (folder / path).write_text((folder / path).read_text() + content)


def many_added_tokens(folder: Path) -> None:
    """A tokenizer with 200 tokens more than the model's vocabulary has room for."""
    tokenizer = json.loads((folder / "model/tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    first = len(tokenizer["model"]["vocab"])
    tokenizer["added_tokens"] += [{"id": first + i, "content": f"<x{i}>", "special": True, **flags} for i in range(200)]
    (folder / "model/tokenizer.json").write_text(json.dumps(tokenizer))


def cut(path: str, to: float):
    return lambda folder: (folder / path).write_bytes((content := (folder / path).read_bytes())[: int(len(content) * to)])


def remove(path: str):
    return lambda folder: (folder / path).unlink()


def retensor(change):
    """Rewrite the model's safetensors after `change` has edited the dict of tensors."""

    def apply(folder: Path):
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model/model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model/model.safetensors", metadata={"format": "pt"})

    return apply


def add_index(shard: str):
    """An index that promises all tensors in `shard`."""

    def apply(folder: Path):
        from safetensors import safe_open

        with safe_open(folder / "model/model.safetensors", "pt") as file:
            weight_map = dict.fromkeys(file.keys(), shard)
        (folder / "model/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return apply


def other_tokens(token: int):
    return lambda folder: write_indexed(folder / "corpus_train", [np.full(5000, token)], dtype=np.int32)


def resized(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


def as_integers(tensors):
    import torch

    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)


NOTHING = lambda folder: None  # noqa: E731

CASES = {
    # the recipe
    "recipe missing": (NOTHING, (TRAIN, ["--recipe", "recipes/none.yaml"]), ["recipes/none.yaml", "no such recipe"]),
    "recipe not YAML": (write("recipe.yaml", "a: [1,"), dry(), ["recipe.yaml", "not valid YAML"]),
    "recipe not UTF-8": (write("recipe.yaml", b"name: \xff\xfe"), dry(), ["recipe.yaml", "not valid YAML"]),
    "recipe empty": (write("recipe.yaml", ""), dry(), ["recipe.yaml", "holds no mapping"]),
    "recipe key twice": (write("recipe.yaml", "name: a\nname: b\n"), dry(), ["recipe.yaml: line 2", "appears twice"]),
    "unknown field": (NOTHING, dry("training.learning_rat=1"), ["training.learning_rat", "did you mean learning_rate?"]),
    "unknown scheme": (NOTHING, dry("positions.scheme=endpromt"), ["positions.scheme", "'endpromt'"]),
    "unknown prompt": (NOTHING, dry("positions.prompts=[EP_9]"), ["positions.prompts", "EP_9", "EP_1"]),
    "unknown architecture": (NOTHING, dry("model.architecture=llama9"), ["model.architecture", "llama9"]),
    "wrong architecture": (NOTHING, dry("model.architecture=llama3_8b"), ["config.json", "llama3_8b has"]),
    "override without value": (NOTHING, dry("training.steps"), ["--set training.steps", "FIELD=VALUE"]),
    "override into a value": (NOTHING, dry("name.x=1"), ["--set name.x=1", "not a section"]),
    "number is a word": (NOTHING, dry("training.steps=many"), ["training.steps", "'many'"]),
    "negative learning rate": (NOTHING, dry("training.learning_rate=-1"), ["training.learning_rate", "greater than 0"]),
    "tokens and steps": (NOTHING, dry("training.tokens=10000"), ["training", "exactly one of tokens and steps"]),
    "target below original": (NOTHING, dry("target_length=64"), ["target_length", "below model.original_length 128"]),
    "physical above target": (NOTHING, dry("positions.physical_length=2048"), ["positions.physical_length", "above target_length"]),
    "displaced longer than the sample": (NOTHING, dry("positions.displaced_length=64"), ["positions.displaced_length", "leaves no body"]),
    "prompt longer than the sample": (NOTHING, dry("positions.physical_length=8", "positions.displaced_length=4"), ["EP_1"]),
    "factor too small": (NOTHING, dry("rope.factor=2"), ["rope.factor", "covers 256 positions"]),
    "full at short length": (NOTHING, dry("positions.scheme=full"), ["positions.physical_length", "1024"]),
    "micro batch does not divide": (NOTHING, dry("training.micro_batch_size=3"), ["training.micro_batch_size", "does not divide"]),
    "batch does not divide over ranks": (NOTHING, dry("training.global_batch_size=5"), ["training.global_batch_size", "2 ranks"]),
    "warm-up beyond the end": (NOTHING, dry("training.warmup_steps=21"), ["training.warmup_steps", "20 steps"]),
    "variable not set": (NOTHING, dry("model.path='${NOWHERE}/x'"), ["model.path", "NOWHERE is not set"]),
    "zero ranks": (NOTHING, (TRAIN, ["--recipe", "recipe.yaml", "--nproc-per-node", "0"]), ["--nproc-per-node", "at least 1"]),
    "alias of itself": (append("recipe.yaml", "extra: &x [*x]\n"), dry(), ["recipe.yaml", "alias"]),
    "list as a key": (append("recipe.yaml", "? [a, b]\n: 1\n"), dry(), ["recipe.yaml", "not valid YAML"]),
    "target beyond fp32": (NOTHING, dry("target_length=100000000000000"), ["target_length", "16777216"]),
    "prompt beyond the vocabulary": (many_added_tokens, dry("positions.prompts=[{name: far, text: <x199>}]"), ["far", "has 512"]),
    "world size without dry run": (NOTHING, (TRAIN, ["--recipe", "recipe.yaml", "--world-size", "2"]), ["--world-size", "--dry-run"]),
    # the DeepSpeed file
    "offload is a word": (
        edit_json("zero3.json", zero_optimization={"stage": 3, "offload_optimizer": "cpu"}), dry(), ["offload_optimizer", "not an object"],
    ),
    "no DeepSpeed file": (remove("zero3.json"), dry(), ["zero3.json", "no such DeepSpeed configuration"]),
    "DeepSpeed file not JSON": (write("zero3.json", "{"), dry(), ["zero3.json", "not valid JSON"]),
    "DeepSpeed file holds a recipe's value": (edit_json("zero3.json", train_batch_size=8), dry(), ["train_batch_size", "global"]),
    "not ZeRO-3": (edit_json("zero3.json", zero_optimization={"stage": 2}), dry(), ["zero_optimization.stage", "is not 3"]),
    # the checkpoint
    "model folder missing": (lambda f: shutil.rmtree(f / "model"), dry(), ["model/config.json", "not found"]),
    "config not JSON": (cut("model/config.json", 0.5), dry(), ["config.json", "not valid JSON"]),
    "unsupported model": (edit_json("model/config.json", model_type="gpt2"), dry(), ["model_type", "gpt2"]),
    "quantised": (edit_json("model/config.json", quantization_config={"quant_method": "gptq"}), dry(), ["quantised (gptq)"]),
    "value of wrong type": (edit_json("model/config.json", rms_norm_eps="x"), dry(), ["config.json", "rms_norm_eps"]),
    "no weights": (remove("model/model.safetensors"), dry(), ["model", "model.safetensors"]),
    "pickled weights only": (lambda f: (f / "model/model.safetensors").rename(f / "model/pytorch_model.bin"), dry(), ["pickled"]),
    "truncated shard": (cut("model/model.safetensors", 0.9), dry(), ["model.safetensors", "cut short"]),
    "shard missing": (add_index("model-00001-of-00002.safetensors"), dry(), ["model-00001-of-00002.safetensors", "missing"]),
    "index damaged": (write("model/model.safetensors.index.json", "[]"), dry(), ["index.json", "not a safetensors index"]),
    "tensor missing": (retensor(lambda t: t.pop("model.norm.weight")), dry(), ["no tensor model.norm.weight"]),
    "tensor too many": (retensor(lambda t: t.update(extra=t["model.norm.weight"].clone())), dry(), ["tensor extra"]),
    "tensor of wrong shape": (retensor(resized), dry(), ["model.norm.weight has shape [63]"]),
    "tensor of integers": (retensor(as_integers), dry(), ["model.norm.weight is stored as I8"]),
    "tokenizer missing": (remove("model/tokenizer.json"), dry(), ["model", "tokenizer"]),
    "tokenizer damaged": (write("model/tokenizer.json", "{}"), dry(), ["model", "tokenizer cannot be loaded"]),
    # the data
    "data missing": (remove("corpus_train.bin"), dry(), ["corpus_train.bin", "no such file"]),
    "index not an index": (write("corpus_train.idx", b"x" * 100), dry(), ["corpus_train.idx", "magic"]),
    "index truncated": (cut("corpus_train.idx", 0.5), dry(), ["corpus_train.idx", "truncated"]),
    "data shorter than the index says": (cut("corpus_train.bin", 0.5), dry(), ["corpus_train.bin", "its index says"]),
    "tokens out of range": (other_tokens(600), dry(), ["corpus_train", "token 600", "512"]),
    "sidecar of something else": (write("corpus_train.json", '{"max_token_id": "x"}'), dry(), ["corpus_train.json", "sidecar"]),
    "corpus shorter than a sample": (lambda f: write_indexed(f / "corpus_train", [np.arange(9)], dtype=np.uint16), dry(), ["has 9 tokens"]),
    # the run folder
    "run folder is a file": (write("run", "occupied"), dry(), ["run", "exist"]),
    "stopped run": (lambda f: ((f / "run").mkdir(), (f / "run/STOP").touch()), dry(), ["STOP", "remove the file"]),
    "no write permission": (NOTHING, dry("output.directory=/proc/run"), ["/proc"]),
    "export of another run": (lambda f: (f / "run/export").mkdir(parents=True), dry(), ["run/export", "exists already"]),
    "pointer to nothing": (
        lambda f: ((f / "run/checkpoints").mkdir(parents=True), (f / "run/checkpoints/latest").write_text("step_00000007\n")),
        dry(), ["checkpoints/latest", "step_00000007", "missing or damaged"],
    ),
    # preparing data
    "input missing": (NOTHING, prepare("--input", "none.txt"), ["none.txt", "no such file"]),
    "input of unknown type": (write("a.docx", "x"), prepare("--input", "a.docx"), ["a.docx", "known type"]),
    "line not JSON": (write("text.jsonl", '{"text": "a"}\n{"text": \n'), prepare("--input", "text.jsonl"), ["text.jsonl", "line 2"]),
    "field missing": (NOTHING, prepare("--input", "text.jsonl", "--text-field", "body"), ["text.jsonl", "'body'", "'text'"]),
    "text not UTF-8": (write("a.txt", b"caf\xe9"), prepare("--input", "a.txt"), ["a.txt", "not UTF-8"]),
    "only empty documents": (write("a.txt", ""), prepare("--input", "a.txt"), ["no documents"]),
    "parquet damaged": (write("a.parquet", b"PAR1nothing"), prepare("--input", "a.parquet"), ["a.parquet", "parquet"]),
    "output without a name": (NOTHING, prepare("--input", "text.jsonl", "--output", "data/"), ["--output data/"]),
    "separator of two lines": (NOTHING, prepare("--input", "text.jsonl", "--separator", "a\nb"), ["--separator", "line break"]),
    "output exists": (write("out.bin", "precious"), prepare("--input", "text.jsonl"), ["out", "exists already"]),
    "prepare without tokenizer": (lambda f: shutil.rmtree(f / "model"), prepare("--input", "text.jsonl"), ["no such tokenizer folder"]),
    # looking and evaluating
    "inspect without recipe": (NOTHING, (INSPECT, ["--recipe", "none.yaml"]), ["none.yaml", "no such recipe"]),
    "evaluate without model": (NOTHING, (EVALUATE, ["--model", "a=none", "--tasks", "distance", "--output", "e"]), ["none"]),
    "unknown task": (NOTHING, (EVALUATE, ["--model", "a=model", "--tasks", "chess", "--output", "e"]), ["chess"]),
}  # fmt: skip


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_one_line_exit_2_and_nothing_lost(name, place, monkeypatch, capsys):
    spoil, (script, arguments), expected = CASES[name]
    spoil(place)
    before = snapshot(place)
    code, error = invoke(script, arguments, monkeypatch, capsys)
    assert code == 2, error
    assert error.count("\n") == 1 and error.startswith("error: ") and "Traceback" not in error, error
    assert "; " in error, "problem and fix"
    for fragment in expected:
        assert fragment in error, error
    after = snapshot(place)
    assert {path: after.get(path) for path in before} == before, "earlier files are as they were"
    assert not [path for path in after if path.endswith(".tmp")], "nothing half-written stays"


def test_there_are_at_least_forty_kinds():
    assert len(CASES) >= 40


def test_the_same_commands_pass_on_good_input(place, monkeypatch, capsys):
    """Else the cases above might fail for a reason of their own."""
    for script, arguments in (dry(), prepare("--input", "text.jsonl")):
        assert invoke(script, arguments, monkeypatch, capsys)[0] == 0


def test_full_disk_is_found_before_anything_is_written(place, monkeypatch, capsys):
    usage = shutil.disk_usage(place)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    code, error = invoke(*dry(), monkeypatch, capsys)
    assert code == 2 and "needs" in error and "free disk space" in error


def test_disk_filling_up_while_writing_leaves_the_old_file(tmp_path, monkeypatch, capsys):
    from endprompt.atomic import write_json

    write_json(tmp_path / "result.json", {"old": 1})
    monkeypatch.setattr(
        "os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device", "result.json"))
    )
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: write_json(tmp_path / "result.json", {"new": 2}))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "free disk space" in error
    assert json.loads((tmp_path / "result.json").read_text()) == {"old": 1} and len(list(tmp_path.iterdir())) == 1
