"""tools/prepare_data.py as a user meets it, and the tokenizers that it may be given."""

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from endprompt.data.prepare import Job, prepare
from endprompt.data.tokenizers import load_tokenizer
from endprompt.errors import UserError, run_command
from tests.support.corpora import make_texts, write_jsonl

TOOL = Path(__file__).resolve().parent.parent.parent / "tools/prepare_data.py"


def test_tokenizer_errors(tmp_path, tokenizer_folder):
    with pytest.raises(UserError, match="gone: no such tokenizer folder"):
        load_tokenizer(tmp_path / "gone")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    shutil.copytree(tokenizer_folder, tmp_path / "damaged")
    (tmp_path / "damaged/tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match="damaged: its tokenizer cannot be loaded"):
        load_tokenizer(tmp_path / "damaged")
    shutil.copytree(tokenizer_folder, tmp_path / "bare")
    settings = json.loads((tmp_path / "bare/tokenizer_config.json").read_text())
    del settings["eos_token"], settings["bos_token"]
    (tmp_path / "bare/tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "bare/special_tokens_map.json").unlink(missing_ok=True)
    (tmp_path / "a.txt").write_text("text")
    job = Job((str(tmp_path / "a.txt"),), str(tmp_path / "bare"), str(tmp_path / "d"))
    with pytest.raises(UserError, match="no end-of-text token; .* --no-append-eos"):
        prepare(job, workers=1)
    with pytest.raises(UserError, match="no beginning-of-text token; leave out --add-bos"):
        prepare(replace(job, add_bos=True, append_eos=False), workers=1)


def test_loading_a_tokenizer_never_asks_the_network(tokenizer_folder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("asked the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    assert load_tokenizer(tokenizer_folder).eos_token == "</s>"


def run_tool(monkeypatch, *arguments):
    """Exit code of tools/prepare_data.py, run in this process."""
    spec = importlib.util.spec_from_file_location("prepare_data", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        run_command(module.main)
    return caught.value.code


def test_the_command(tokenizer_folder, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [*make_texts(58), "", " "])
    (folder / "notes.md").write_text("not text for us")
    arguments = ["--input", folder, "--tokenizer", tokenizer_folder, "--output", tmp_path / "d", "--validation-documents", 3]
    assert run_tool(monkeypatch, *arguments) == 0
    out = capsys.readouterr().out
    assert "left out 1 files" in out and "d_train: 55 documents" in out and "d_validation: 3 documents" in out and "2 empty" in out
    assert run_tool(monkeypatch, *arguments) == 0
    assert "already prepared with these settings" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "gone.txt"], "gone.txt: no such file"),
        (["--workers", 0], "--workers: 0 is below 1"),
        (["--max-documents", -1], "--max-documents: -1 is below 1"),
        (["--validation-fraction", 1], "--validation-fraction: 1.0 is not between 0 and 1"),
        (["--validation-documents", 0], "--validation-documents: 0 is below 1"),
        (["--validation-documents", 1, "--validation-fraction", 0.1], "cannot go with --validation-documents"),
        (["--tokenizer", "gone"], "gone: no such tokenizer folder"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(tokenizer_folder, tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "a.txt").write_text("text")
    good = ["--input", tmp_path / "a.txt", "--tokenizer", tokenizer_folder, "--output", tmp_path / "d"]
    assert run_tool(monkeypatch, *good, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]
