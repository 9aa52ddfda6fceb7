"""There and back is the same: every key torch.equal, every shard byte for byte, and config, tokenizer and window as they should be."""

from __future__ import annotations

import io
import json
import zipfile

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from endprompt.checkpoint import torch_dist_writer
from endprompt.checkpoint.mapping import TABLE, disk_name, huggingface_names, join, packed_runs, source_runs, split
from endprompt.checkpoint.megatron_metadata import FACTS, read_model_facts, write_model_facts
from endprompt.checkpoint.provenance import CONVERSION
from endprompt.checkpoint.safetensors_files import SafetensorsFolder, TensorInfo, make_header, read_header
from endprompt.checkpoint.torch_dist import TorchDistCheckpoint
from endprompt.checkpoint.views import CastView, MegatronView, read_tensor
from endprompt.models.architectures import architecture_of_config, resolve_architecture
from endprompt.models.hf_config import load_hf_config, rope_of_config
from endprompt.rope import scaling_for
from tests.support.checkpoints import FAMILIES, make_family
from tests.support.conversions import convert
from tests.support.recipes import make_recipe


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def there_and_back(tmp_path, source, **options):
    convert("to megatron", source, tmp_path / "megatron", **options)
    convert("to huggingface", tmp_path / "megatron", tmp_path / "back")
    return tmp_path / "back"


def assert_equal(source, back) -> None:
    mine, theirs = tensors_of(source), tensors_of(back)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_same_keys_and_byte_identical_shards(family, tmp_path):
    source = make_family(family, tmp_path / "hf")
    back = there_and_back(tmp_path, source)
    assert_equal(source, back)
    shards = sorted(source.glob("*.safetensors"))
    assert len(shards) > 2
    beside = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    for path in [*shards, *(source / name for name in beside)]:
        assert path.read_bytes() == (back / path.name).read_bytes(), path.name


def test_every_parameter_is_what_the_plain_formula_says(tmp_path):
    """Megatron's packing written out with loops, read back by torch's own checkpoint reader."""
    source = make_family("llama3 (GQA)", tmp_path / "hf")
    convert("to megatron", source, tmp_path / "megatron")
    hf = tensors_of(source)
    state = {}
    metadata = FileSystemReader(tmp_path / "megatron").read_metadata()
    for key, entry in metadata.state_dict_metadata.items():
        if hasattr(entry, "size"):
            state[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
    load(state, storage_reader=FileSystemReader(tmp_path / "megatron"), no_dist=True)
    assert set(state) == {disk_name(row) for row in TABLE}
    for layer in range(4):
        own = f"model.layers.{layer}."
        q, k, v = (hf[f"{own}self_attn.{name}_proj.weight"] for name in "qkv")
        packed = []
        for group in range(2):
            for head in (2 * group, 2 * group + 1):
                packed += [q[16 * head + i] for i in range(16)]
            packed += [k[16 * group + i] for i in range(16)] + [v[16 * group + i] for i in range(16)]
        assert torch.equal(state["decoder.layers.self_attention.linear_qkv.weight"][layer], torch.stack(packed))
        gated = torch.cat([hf[own + "mlp.gate_proj.weight"], hf[own + "mlp.up_proj.weight"]])
        assert torch.equal(state["decoder.layers.mlp.linear_fc1.weight"][layer], gated)
        assert torch.equal(state["decoder.layers.mlp.linear_fc2.weight"][layer], hf[own + "mlp.down_proj.weight"])
        assert torch.equal(state["decoder.layers.self_attention.linear_proj.weight"][layer], hf[own + "self_attn.o_proj.weight"])
        assert torch.equal(state["decoder.layers.self_attention.linear_qkv.layer_norm_weight"][layer], hf[own + "input_layernorm.weight"])
        assert torch.equal(state["decoder.layers.mlp.linear_fc1.layer_norm_weight"][layer], hf[own + "post_attention_layernorm.weight"])


@pytest.mark.parametrize("layout", ["copy", "qkv", "gated"])
def test_runs_say_what_join_and_split_say(layout, tmp_path):
    architecture = architecture_of_config(load_hf_config(make_family("smollm2 (3 of 9 heads)", tmp_path / "hf")))
    sizes = {"copy": [50], "qkv": [9 * 8, 3 * 8, 3 * 8], "gated": [160, 160]}[layout]
    parts = [torch.randn(size, 5) for size in sizes]
    packed = join(parts, layout, architecture)
    for start, stop in ((0, sum(sizes)), (3, 29), (31, 32), (7, 49)):
        pieces = [parts[index][first : first + count] for index, first, count in source_runs(layout, architecture, start, stop)]
        assert torch.equal(torch.cat(pieces), packed[start:stop])
    for index, part in enumerate(split(packed, layout, architecture)):
        assert torch.equal(part, parts[index])
        for start, stop in ((0, len(part)), (3, 17)):
            pieces = [packed[first : first + count] for first, count in packed_runs(index, layout, architecture, start, stop)]
            assert torch.equal(torch.cat(pieces), part[start:stop])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(7,), (1, 5, 3), (1, 300, 70)])
def test_a_blob_is_what_torch_save_writes(dtype, shape):
    tensor = torch.randn(shape).to(dtype)
    info = TensorInfo(shape, {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype])
    archive = torch_dist_writer.Archive(info, shape)
    data = tensor.view(torch.uint8).numpy().tobytes()
    blob = archive.head() + data + archive.tail()
    assert len(blob) == archive.length and archive.data_start % 64 == 0
    loaded = torch.load(io.BytesIO(blob), weights_only=True)
    assert torch.equal(loaded, tensor) and loaded.dtype == dtype
    reference = io.BytesIO()
    torch.save(tensor, reference)
    with zipfile.ZipFile(io.BytesIO(blob)) as mine, zipfile.ZipFile(reference) as theirs:
        for name in ("data.pkl", "byteorder", "version"):
            assert mine.read(f"archive/{name}") == theirs.read(f"archive/{name}")
        assert mine.getinfo("archive/data/0").CRC == 0
    assert blob[archive.data_start : archive.data_start + len(data)] == data


def test_headers_are_those_of_the_safetensors_library(tmp_path):
    tensors = {"b": torch.zeros(3, 2), "a": torch.zeros(5, dtype=torch.bfloat16), "é": torch.zeros(2, 2)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    ordered = {name: header.tensors[name] for name in sorted(header.tensors, key=header.starts.get)}
    written, starts = make_header(ordered, header.metadata)
    assert (tmp_path / "x.safetensors").read_bytes().startswith(written) and starts == header.starts


def test_headers_of_other_writers_keep_their_blanks_and_order(tmp_path):
    source = make_family("llama3 (GQA)", tmp_path / "hf", max_shard_size="5GB")
    content = (source / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = dict(reversed(json.loads(content[8 : 8 + length]).items()))
    text = json.dumps(header, indent=1).encode() + b"\n   "
    (source / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    back = there_and_back(tmp_path, source)
    assert (source / "model.safetensors").read_bytes() == (back / "model.safetensors").read_bytes()


def test_padded_vocabulary_is_zeros_and_comes_off(tmp_path):
    source = make_family("llama (fp16, odd sizes)", tmp_path / "hf")
    back = there_and_back(tmp_path, source, vocabulary_multiple=128)
    assert_equal(source, back)
    checkpoint = TorchDistCheckpoint(tmp_path / "megatron")
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        weight = read_tensor(checkpoint, name)
        assert weight.shape == (512, 64) and not weight[509:].any() and weight[508].any()
    assert read_model_facts(tmp_path / "megatron").padded_vocab_size == 512


def test_tied_model_whose_files_repeat_the_head(tmp_path):
    source = make_family("llama3.2 (tied)", tmp_path / "hf", max_shard_size="5GB")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    back = there_and_back(tmp_path, source)
    assert (source / "model.safetensors").read_bytes() == (back / "model.safetensors").read_bytes()
    assert "output_layer.weight" not in TorchDistCheckpoint(tmp_path / "megatron").tensors


def test_old_rotary_buffers_are_left_out(tmp_path):
    source = make_family("llama2 (MHA)", tmp_path / "hf", max_shard_size="5GB")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, source / "model.safetensors")
    back = tensors_of(there_and_back(tmp_path, source))
    del tensors["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_many_small_chunks_and_files(tmp_path, monkeypatch):
    """What a 70B checkpoint is cut into: several chunks a tensor, several files."""
    monkeypatch.setattr(torch_dist_writer, "CHUNK_BYTES", 3000)
    monkeypatch.setattr(torch_dist_writer, "FILE_BYTES", 50_000)
    source = make_family("llama3 (GQA)", tmp_path / "hf")
    assert_equal(source, there_and_back(tmp_path, source))
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) > 5


def test_shards_of_another_size_and_dtype(tmp_path):
    source = make_family("llama3 (GQA)", tmp_path / "hf")
    convert("to megatron", source, tmp_path / "megatron")
    convert("to huggingface", tmp_path / "megatron", tmp_path / "fp32", dtype="fp32", shard_gb=2e-4)
    mine, theirs = tensors_of(source), tensors_of(tmp_path / "fp32")
    assert all(torch.equal(mine[name].float(), theirs[name]) for name in mine)
    index = json.loads((tmp_path / "fp32/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(theirs) and len(set(index["weight_map"].values())) > 3
    config = json.loads((tmp_path / "fp32/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp32")
    assert model.dtype == torch.float32


def test_rounding_is_that_of_torch(tmp_path):
    source = make_family("llama2 (MHA)", tmp_path / "hf")
    reader = SafetensorsFolder(source)
    cast = CastView(reader, "BF16")
    for name in reader.tensors:
        assert torch.equal(read_tensor(cast, name), read_tensor(reader, name).bfloat16())


def test_megatron_lm_layout_is_found_again(tmp_path):
    source = make_family("llama3 (GQA)", tmp_path / "hf")
    assert_equal(source, there_and_back(tmp_path, source, megatron_lm=True))
    assert (tmp_path / "megatron/latest_checkpointed_iteration.txt").read_text() == "release\n"
    common = torch.load(tmp_path / "megatron/release/common.pt", weights_only=True)
    assert common["checkpoint_version"] == 3.0


@pytest.mark.parametrize("rope", ["linear", "yarn"])
def test_a_trained_checkpoint_exports_the_recipes_rope_and_window(rope, tmp_path):
    source = make_family("llama3 (GQA)", tmp_path / "hf")
    config = load_hf_config(source)
    overrides = {"model.path": str(source), "rope.type": rope, "output.export_dtype": "bf16"}
    recipe = make_recipe(**overrides)
    scaling = scaling_for(recipe, rope_of_config(config))
    run = tmp_path / "run/checkpoints"
    convert("to megatron", source, run / "step_00000010")
    write_model_facts(run / "step_00000010", recipe, resolve_architecture(recipe, config), config, scaling)
    (run / "step_00000010/state.json").write_text(json.dumps({"step": 10, "fingerprint": recipe.fingerprint()}))
    (run / "step_00000020.incomplete").mkdir()
    (run / "latest").write_text("step_00000010\n")
    convert("to huggingface", tmp_path / "run", tmp_path / "export")
    exported = load_hf_config(tmp_path / "export")
    assert exported["max_position_embeddings"] == 1024 and rope_of_config(exported) == scaling
    assert AutoConfig.from_pretrained(tmp_path / "export").rope_parameters["rope_type"] == rope
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokenizer.model_max_length == 1024
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").dtype == torch.bfloat16
    card = (tmp_path / "export/README.md").read_text()
    digest = json.loads((tmp_path / "export" / CONVERSION).read_text())["weights_digest"]
    assert digest.startswith("xxh3_128:") and digest in card and "Trained for 10 steps" in card
    assert yaml.safe_load(card.split("```yaml")[1].split("```")[0]) == recipe.model_dump(mode="json")

    # The same weights as Megatron-LM would have left them: no facts, so the user names config and recipe.
    (run / "step_00000010" / FACTS).unlink()
    convert("to huggingface", run, tmp_path / "told", hf_config=source, recipe=recipe)
    assert load_hf_config(tmp_path / "told") == exported
    assert_equal(tmp_path / "export", tmp_path / "told")


def test_digest_does_not_depend_on_format_or_shards(tmp_path):
    source = make_family("llama3.1", tmp_path / "hf")
    there_and_back(tmp_path, source)
    convert("to huggingface", tmp_path / "megatron", tmp_path / "other", shard_gb=1e-4)
    digests = {json.loads((tmp_path / name / CONVERSION).read_text())["weights_digest"] for name in ("megatron", "back", "other")}
    assert len(digests) == 1


def test_views_need_one_dtype_in_what_megatron_packs(tmp_path):
    source = make_family("llama2 (MHA)", tmp_path / "hf", max_shard_size="5GB")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()  # norms may have their own
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert_equal(source, there_and_back(tmp_path, source))
    reader = SafetensorsFolder(source)
    view = MegatronView(reader, architecture_of_config(load_hf_config(source)))
    assert view.tensors["decoder.final_layernorm.weight"].dtype == "BF16"
    assert huggingface_names(*next((row, 2) for row in TABLE if row.layout == "qkv"))[0] == "model.layers.2.self_attn.q_proj.weight"
