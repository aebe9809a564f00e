import json

import pytest
from compressed_tensors.quantization import QuantizationConfig

from evalsuite.quant.checkpoint import open_checkpoint
from evalsuite.quant.plan import plan_shards
from evalsuite.quant.recipe import Recipe
from evalsuite.quant.rules import family
from evalsuite.quant.sidecar import small_files
from quant.files import edit_config


def files_for(folder, **choices):
    source, recipe = open_checkpoint(folder), Recipe(**choices)
    rules = family(source.config)
    return small_files(folder, source.config, rules, plan_shards(source.shards, rules, recipe), recipe)


def test_compressed_tensors_accepts_the_configuration(checkpoints):
    for folder in checkpoints.values():
        config = json.loads(files_for(folder)["config.json"])
        parsed = QuantizationConfig.model_validate(config["quantization_config"])
        (group,) = parsed.config_groups.values()
        assert (parsed.quant_method, parsed.format) == ("compressed-tensors", "pack-quantized")
        assert group.targets == ["Linear"]
        assert (group.weights.num_bits, group.weights.group_size, group.weights.symmetric) == (4, 128, True)
        assert group.format == "pack-quantized"
        original = json.loads((folder / "config.json").read_text())
        assert {key: config[key] for key in original} == original


def test_codes_carry_their_codebook(llama):
    quantization = json.loads(files_for(llama, format="hlwq", hlwq_bits=3)["config.json"])[
        "quantization_config"
    ]
    assert quantization["quant_method"] == "hlwq"
    assert len(quantization["levels"]) == 8


def test_decoded_weights_look_plain_but_say_where_they_come_from(llama):
    files = files_for(llama, format="bf16")
    assert json.loads(files["config.json"]) == json.loads((llama / "config.json").read_text())
    assert json.loads(files["quantization_recipe.json"])["recipe"]["format"] == "bf16"


def test_what_is_copied(llama):
    files = files_for(llama)
    assert files["tokenizer_config.json"] == (llama / "tokenizer_config.json").read_bytes()
    assert files["generation_config.json"] == (llama / "generation_config.json").read_bytes()
    assert not [name for name in files if "safetensors" in name or name == "README.md"]
    assert "preprocessor_config.json" not in files


def test_stubs_for_vllms_qwen3_vl_classes(checkpoints):
    files = files_for(checkpoints["qwen3_5_moe"])
    assert json.loads(files["preprocessor_config.json"])["patch_size"] == 16
    assert json.loads(files["tokenizer_config.json"])["tokenizer_class"] == "Qwen2TokenizerFast"
    assert "preprocessor_config.json" not in files_for(checkpoints["qwen3_5_moe_text"])


def test_what_is_there_is_not_replaced_by_a_stub(checkpoints, copy_of):
    folder = copy_of(checkpoints["qwen3_5_moe"])
    (folder / "preprocessor_config.json").write_text('{"mine": 1}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    files = files_for(folder)
    assert json.loads(files["preprocessor_config.json"]) == {"mine": 1}
    assert json.loads(files["tokenizer_config.json"])["tokenizer_class"] == "Qwen2Tokenizer"


@pytest.mark.parametrize("name", ["chat_template.jinja", "merges.txt", "LICENSE"])
def test_text_files_travel(copy_of, llama, name):
    folder = copy_of(llama)
    (folder / name).write_text("x")
    edit_config(folder, extra=1)
    assert files_for(folder)[name] == b"x"
