"""Bad checkpoints and bad arguments: one line that names the place and the fix, exit code 2, nothing half-written, nothing run."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from endprompt.checkpoint import conversion
from endprompt.checkpoint.layout_record import LAYOUT
from endprompt.checkpoint.megatron_metadata import FACTS
from tests.support.checkpoints import make_family
from tests.support.conversions import convert
from tests.support.spoiling import (
    HF,
    MC,
    SHARD,
    add_bias,
    add_to_index,
    edit_metadata,
    hostile_blob,
    hostile_metadata,
    lose_a_layer,
    outside,
    overlapping,
    repeat_key,
    retensor,
    rewrite_header,
    two_shards_hold_it,
)
from tests.test_bad_input import cut, edit_json, invoke, remove, snapshot, write

TO_MEGATRON, TO_HF, VERIFY = "tools/hf_to_megatron.py", "tools/megatron_to_hf.py", "tools/verify_checkpoint.py"
OUT = "out"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("pristine")
    make_family("llama3 (GQA)", place / HF)
    convert("to megatron", place / HF, place / MC)
    make_family("llama3.2 (tied)", place / "tied", max_shard_size="5GB")
    return place


@pytest.fixture
def place(pristine, tmp_path, monkeypatch) -> Path:
    shutil.copytree(pristine, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


def there(*more: str) -> tuple[str, list[str]]:
    return TO_MEGATRON, ["--input", HF, "--output", OUT, *more]


def back(*more: str) -> tuple[str, list[str]]:
    return TO_HF, ["--input", MC, "--output", OUT, *more]


def make_run(folder: Path) -> None:
    (folder / "run/checkpoints").mkdir(parents=True)
    shutil.copytree(folder / MC, folder / "run/checkpoints/step_00000010")


def old_format(folder: Path) -> None:
    (folder / "old/iter_0000005/mp_rank_00").mkdir(parents=True)
    torch.save({}, folder / "old/iter_0000005/mp_rank_00/model_optim_rng.pt")


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


NOTHING = lambda folder: None  # noqa: E731
NORM = "model.norm.weight"
LAST = f"{HF}/model-00003-of-00004.safetensors"  # the shard that holds it
CASES = {
    # Hugging Face to Megatron: the folder
    "input missing": (NOTHING, (TO_MEGATRON, ["--input", "none", "--output", OUT]), ["none/config.json", "not found"]),
    "config missing": (remove(f"{HF}/config.json"), there(), ["config.json", "not found"]),
    "config not JSON": (cut(f"{HF}/config.json", 0.5), there(), ["config.json", "not valid JSON"]),
    "unknown architecture": (edit_json(f"{HF}/config.json", model_type="mamba"), there(), ["model_type", "'mamba'"]),
    "mixture of experts": (edit_json(f"{HF}/config.json", architectures=["MixtralForCausalLM"]), there(), ["architectures"]),
    "quantised config": (edit_json(f"{HF}/config.json", quantization_config={"quant_method": "awq"}), there(), ["quantised (awq)"]),
    "biases": (edit_json(f"{HF}/config.json", attention_bias=True), there(), ["attention_bias"]),
    "another config": (edit_json(f"{HF}/config.json", intermediate_size=128), there(), ["has shape [160, 64]", "implies [128, 64]"]),
    "config ties what files do not": (edit_json(f"{HF}/config.json", tie_word_embeddings=True), there(), ["lm_head.weight differs from"]),
    # the shards
    "shard missing": (remove(SHARD), there(), [SHARD, "missing"]),
    "shard truncated": (cut(SHARD, 0.9), there(), [SHARD, "cut short"]),
    "shard empty": (write(SHARD, b""), there(), [SHARD, "cut short"]),
    "shard without header": (cut(SHARD, 0.001), there(), [SHARD, "no whole header"]),
    "shard with trailing bytes": (lambda f: (f / SHARD).open("ab").write(b"x"), there(), [SHARD, "damaged or cut short"]),
    "header not JSON": (rewrite_header(lambda text: text.replace("{", "[", 1)), there(), [SHARD, "damaged header"]),
    "tensor twice in a header": (
        rewrite_header(lambda text: text.replace("self_attn.q_proj", "self_attn.k_proj")), there(), [SHARD, "listed twice"],
    ),
    "shape that its bytes contradict": (
        rewrite_header(lambda text: text.replace("[160,64]", "[161,64]", 1)), there(), [SHARD, "contradict"],
    ),
    "unknown dtype": (rewrite_header(lambda text: text.replace("BF16", "Q4_0", 1)), there(), [SHARD, "Q4_0"]),
    "quantised tensor": (retensor(LAST, lambda t: t.update({NORM: t[NORM].to(torch.int8)})), there(), [NORM, "stored as I8"]),
    "double precision": (retensor(LAST, lambda t: t.update({NORM: t[NORM].double()})), there(), [NORM, "stored as F64"]),
    "tensor missing in its shard": (retensor(LAST, lambda t: t.pop(NORM)), there(), [LAST, f"lacks {NORM}"]),
    "unlisted tensor": (retensor(LAST, lambda t: t.update(extra=torch.ones(2))), there(), [LAST, "extra", "does not list it"]),
    "bias among the tensors": (
        both(retensor(LAST, lambda t: t.update({"b.bias": torch.ones(2)})), add_to_index("b.bias", LAST[3:])), there(), ["tensor b.bias"],
    ),
    "index puts a tensor elsewhere": (add_to_index(NORM, SHARD[3:]), there(), [NORM, "puts it in"]),
    "index lists a tensor twice": (repeat_key, there(), ["index.json", NORM, "listed twice"]),
    "two shards hold a tensor": (two_shards_hold_it, there(), ["model-0000", "puts it in"]),
    "index not an index": (write(f"{HF}/model.safetensors.index.json", "[]"), there(), ["not a safetensors index"]),
    "index points outside": (add_to_index(NORM, "../x.safetensors"), there(), ["not a safetensors index", "this folder"]),
    "pickled weights only": (
        both(*[remove(f"{HF}/model-0000{n}-of-00004.safetensors") for n in (1, 2, 3, 4)], remove(f"{HF}/model.safetensors.index.json"),
             write(f"{HF}/pytorch_model.bin", b"x")), there(), ["pickled"],
    ),
    "no weights": (
        both(*[remove(f"{HF}/model-0000{n}-of-00004.safetensors") for n in (1, 2, 3, 4)], remove(f"{HF}/model.safetensors.index.json")),
        there(), ["has neither"],
    ),
    "dtypes mixed in one projection": (
        retensor(SHARD, lambda t: t.update({n: x.float() for n, x in t.items() if "k_proj" in n})), there(), ["different dtypes"],
    ),
    # the output
    "output exists": (lambda f: (f / OUT).mkdir() or (f / OUT / "x").touch(), there(), [OUT, "exists already"]),
    "output is a file": (write(OUT, "x"), there(), [OUT, "exists already"]),
    "output in a file": (write("f", "x"), (TO_MEGATRON, ["--input", HF, "--output", "f/out"]), ["f", "not a folder"]),
    "output in the input": (NOTHING, (TO_MEGATRON, ["--input", HF, "--output", f"{HF}/out"]), ["lies in --input"]),
    "no permission": (NOTHING, (TO_MEGATRON, ["--input", HF, "--output", "/proc/x/out"]), ["/proc"]),
    "no workers": (NOTHING, there("--workers", "0"), ["--workers 0"]),
    "vocabulary multiple 0": (NOTHING, there("--vocab-multiple", "0"), ["--vocab-multiple 0"]),
    # Megatron to Hugging Face: the folder
    "checkpoint missing": (NOTHING, (TO_HF, ["--input", "none", "--output", OUT]), ["none", "no such folder"]),
    "not a checkpoint": (NOTHING, (TO_HF, ["--input", HF, "--output", OUT]), ["holds no torch_dist checkpoint"]),
    "old pickled format": (old_format, (TO_HF, ["--input", "old", "--output", OUT]), ["old format", "--ckpt-format torch_dist"]),
    "another backend": (edit_json(f"{MC}/metadata.json", sharded_backend="zarr"), back(), ["zarr", "torch_dist"]),
    "save did not finish": (remove(f"{MC}/.metadata"), back(), [".metadata", "did not finish"]),
    "step not there": (make_run, (TO_HF, ["--input", "run", "--output", OUT, "--step", "7"]), ["step 7", "there are: 10"]),
    "pointer to nothing": (
        both(make_run, write("run/checkpoints/latest", "step_00000099")), (TO_HF, ["--input", "run", "--output", OUT]), ["step_00000099"],
    ),
    # its contents
    "metadata truncated": (cut(f"{MC}/.metadata", 0.5), back(), [".metadata", "not a pickle that this project reads"]),
    "metadata asks for os.system": (hostile_metadata, back(), [".metadata", "posix.system"]),
    "tensor asks for os.system": (hostile_blob, back(), [".distcp: output_layer.weight", "posix.system"]),
    "metadata points outside": (edit_metadata(outside), back(), ["outside the checkpoint"]),
    "bias in the checkpoint": (edit_metadata(add_bias), back(), ["linear_qkv.bias"]),
    "layer missing": (edit_metadata(lose_a_layer), back(), ["has no tensor decoder.layers.3.mlp.linear_fc2.weight"]),
    "parts overlap": (edit_metadata(overlapping), back(), ["overlap"]),
    "part file missing": (remove(f"{MC}/__0_0.distcp"), back(), ["__0_0.distcp", "is missing"]),
    "part file truncated": (cut(f"{MC}/__0_0.distcp", 0.7), back(), ["__0_0.distcp", "cut short"]),
    "facts damaged": (cut(f"{MC}/{FACTS}", 0.5), back(), [FACTS, "cannot be read"]),
    "facts of another model": (edit_json(f"{MC}/{FACTS}", hf_config={"model_type": "gpt2"}), back(), [FACTS, "gpt2"]),
    "layout damaged": (write(f"{MC}/{LAYOUT}", "{"), back(), [LAYOUT, "cannot be read"]),
    "no facts, no config": (remove(f"{MC}/{FACTS}"), back(), ["does not say which model", "--hf-config"]),
    "config of another model": (remove(f"{MC}/{FACTS}"), back("--hf-config", "tied"), ["output_layer.weight", "--hf-config"]),
    "config against the facts": (NOTHING, back("--hf-config", "tied"), ["tied/config.json", "--hf-config"]),
    "tokenizer settings damaged": (write(f"{MC}/huggingface/tokenizer_config.json", "["), back(), ["tokenizer_config.json", "no JSON"]),
    "shard size 0": (NOTHING, back("--shard-gb", "0"), ["--shard-gb 0"]),
    "recipe missing": (NOTHING, back("--recipe", "none.yaml"), ["none.yaml", "no such recipe"]),
    "override without recipe": (NOTHING, back("--set", "a=1"), ["--set", "--recipe"]),
    # verification
    "nothing to compare with": (NOTHING, (VERIFY, [HF, "none"]), ["none", "no such folder"]),
    "positions not numbers": (NOTHING, (VERIFY, [HF, MC, "--positions", "0,far"]), ["--positions", "whole numbers"]),
    "verify a hostile checkpoint": (hostile_metadata, (VERIFY, [HF, MC]), ["posix.system"]),
    "record damaged": (write(f"{MC}/endprompt_conversion.json", "{"), (VERIFY, [HF, MC]), ["endprompt_conversion.json", "cannot be read"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_line_exit_2_and_nothing_half_written(name, place, monkeypatch, capsys):
    spoil, (script, arguments), expected = CASES[name]
    spoil(place)
    before = snapshot(place)
    code, error = invoke(script, arguments, monkeypatch, capsys)
    assert code == 2, error
    assert error.count("\n") == 1 and error.startswith("error: ") and "; " in error and "Traceback" not in error, error
    for fragment in expected:
        assert fragment in error, error
    assert snapshot(place) == before, "nothing was written, moved or run"
    assert not (place / "exploited").exists()


def test_there_are_at_least_twenty_five_kinds():
    assert len(CASES) >= 25


def test_the_same_commands_pass_on_good_input(place, monkeypatch, capsys):
    for script, arguments in (there(), (TO_HF, ["--input", MC, "--output", "back"]), (VERIFY, [HF, "back"]), there("--dry-run")[:1] + (
        ["--input", "tied", "--output", "out2", "--dry-run"],)):  # fmt: skip
        assert invoke(script, arguments, monkeypatch, capsys)[0] == 0
    assert not (place / "out2").exists()


def test_the_exploits_would_have_run(place):
    """The planted pickles do what they are planted for when they meet an ordinary unpickler."""
    hostile_metadata(place)
    pickle.loads((place / MC / ".metadata").read_bytes())
    assert (place / "exploited").exists()


@pytest.mark.parametrize("command", [there(), back()])
def test_small_disk_is_found_before_anything_is_written(command, place, monkeypatch, capsys):
    usage = shutil.disk_usage(place)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    before = snapshot(place)
    code, error = invoke(*command, monkeypatch, capsys)
    assert code == 2 and "needs" in error and "free disk space" in error and error.count("\n") == 1
    assert snapshot(place) == before


@pytest.mark.parametrize("command", [there(), back()])
def test_disk_that_fills_up_is_one_line_and_can_be_gone_on_with(command, place, monkeypatch, capsys):
    pwrite, written = os.pwrite, 0

    def filling(descriptor, data, offset):
        nonlocal written
        written += len(data)
        if written > 200_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", filling)
        patch.setattr(conversion, "SYNC_BYTES", 20_000)
        code, error = invoke(*command, monkeypatch, capsys)
    assert code == 2 and error.count("\n") == 1 and "No space left" in error and "free disk space" in error
    assert not (place / OUT).exists()
    assert invoke(command[0], [*command[1], "--resume"], monkeypatch, capsys)[0] == 0
    assert sorted(path.name for path in place.iterdir()) == [HF, MC, OUT, "tied"]
