"""Against transformers itself: the same layers, the same bytes, and folders that it loads."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitsandbytes.checkpoint import CheckpointError, QuantizeOptions, inspect_checkpoint, quantize_checkpoint
from bitsandbytes.checkpoint.source import open_source
from bitsandbytes.checkpoint.structure import RULE_BY_NAME, find_structure

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
BERT = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}

ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", SMALL),
    "llama tied": ("LlamaForCausalLM", SMALL | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "n_positions": 32}),
    "opt": (
        "OPTForCausalLM",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 60,
            "max_position_embeddings": 32,
            "word_embed_proj_dim": 16,
        },
    ),
    "bert": ("BertForSequenceClassification", BERT),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 60},
    ),
    "mixtral": ("MixtralForCausalLM", SMALL | {"num_local_experts": 2}),
    "qwen2 moe": (
        "Qwen2MoeForCausalLM",
        SMALL
        | {
            "num_experts": 2,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
        },
    ),
    "phi3": ("Phi3ForCausalLM", SMALL),
    "gpt neox": ("GPTNeoXForCausalLM", BERT),
    # The checkpoint has fused matrices that loading splits into layers.
    "hrm text": ("HrmTextForCausalLM", {key: SMALL[key] for key in SMALL if "key_value" not in key} | {"head_dim": 8}),
}


@pytest.fixture
def make_model(tmp_path: Path):
    """A function that saves a small random model of an architecture."""

    def make(name: str, dtype: torch.dtype = torch.bfloat16) -> Path:
        architecture, sizes = ARCHITECTURES[name]
        cls = getattr(transformers, architecture, None)
        if cls is None:
            pytest.skip(f"transformers {transformers.__version__} has no {architecture}")
        torch.manual_seed(11)
        config = cls.config_class(**sizes)
        model = cls(config).to(dtype)
        folder = tmp_path / name.replace(" ", "-")
        model.save_pretrained(folder)
        return folder

    return make


def bnb_config(options: QuantizeOptions):
    if options.format == "int8":
        return transformers.BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=options.threshold, llm_int8_skip_modules=[*options.skip] or None
        )
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.format,
        bnb_4bit_use_double_quant=options.double_quant,
        bnb_4bit_compute_dtype=options.compute_dtype or "bfloat16",
        bnb_4bit_quant_storage=options.storage,
    )


def load(folder: Path, name: str, **kwargs):
    cls = getattr(transformers, ARCHITECTURES[name][0])
    kwargs = {"dtype": "auto", "device_map": "cpu"} | kwargs
    model, info = cls.from_pretrained(folder, output_loading_info=True, **kwargs)
    problems = {key: value for key, value in info.items() if value}
    return model.eval(), problems


def raw(tensor: torch.Tensor) -> bytes:
    """Bytes, as packed codes in a float dtype may be NaN."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def logits(model) -> torch.Tensor:
    tokens = torch.arange(1, 13).reshape(1, -1)
    extra = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=tokens, **extra).logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_are_those_that_transformers_replaces(make_model, name: str):
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    folder = make_model(name)
    structure = find_structure(open_source(folder), QuantizeOptions())
    assert structure.rule.startswith("transformers")
    cls = getattr(transformers, ARCHITECTURES[name][0])
    with torch.device("meta"):
        model = cls(cls.config_class.from_pretrained(folder))
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=bnb_config(QuantizeOptions()))
    replaced = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    quantized = {target.name.removesuffix(".weight") for target in structure.targets.values() if target.quantize}
    for reshaping in structure.reshapings:
        quantized |= {target.name.removesuffix(".weight") for target in reshaping.targets if target.quantize}
    assert len(replaced) == len(quantized) > 0
    assert bool(structure.reshapings) == (name == "hrm text")
    # A checkpoint may leave out the prefix of the base model, or use the names of the original code.
    if name in ("llama", "gpt2", "opt", "bert", "t5"):
        assert replaced == quantized or replaced == {f"{model.base_model_prefix}.{part}" for part in quantized}


FORMATS = {
    "nf4": QuantizeOptions(),
    "fp4 nested": QuantizeOptions(format="fp4", double_quant=True),
    "nf4 in bfloat16": QuantizeOptions(storage="bfloat16"),
    "int8": QuantizeOptions(format="int8", threshold=5.0),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("format_name", FORMATS)
def test_loading_gives_what_quantizing_on_loading_gives(make_model, tmp_path: Path, name: str, format_name: str):
    options = FORMATS[format_name]
    folder = make_model(name)
    quantize_checkpoint(folder, tmp_path / "out", options)
    assert not inspect_checkpoint(tmp_path / "out").problems
    ours, our_problems = load(tmp_path / "out", name)
    theirs, their_problems = load(folder, name, quantization_config=bnb_config(options))
    assert our_problems == their_problems
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    for key, tensor in other.items():
        assert mine[key].dtype == tensor.dtype, key
        assert raw(mine[key]) == raw(tensor), key
    assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2", "opt", "bert"])
@pytest.mark.parametrize("format_name", FORMATS)
def test_files_are_those_that_transformers_saves(make_model, tmp_path: Path, name: str, format_name: str):
    options = FORMATS[format_name]
    folder = make_model(name)
    quantize_checkpoint(folder, tmp_path / "out", options)
    theirs, _problems = load(folder, name, quantization_config=bnb_config(options))
    theirs.save_pretrained(tmp_path / "theirs")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes(), file


def test_skip_adds_to_what_is_kept_anyway(make_model, tmp_path: Path):
    folder = make_model("llama")
    quantize_checkpoint(folder, tmp_path / "out", QuantizeOptions(skip=("self_attn.q_proj",)))
    model, problems = load(tmp_path / "out", "llama")
    assert not problems
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["lm_head"] == "Linear"
    assert kinds["model.layers.1.self_attn.q_proj"] == "Linear"
    assert kinds["model.layers.1.self_attn.k_proj"] == "Linear4bit"


def test_skip_pattern_without_a_match_is_told(make_model, tmp_path: Path):
    report = quantize_checkpoint(make_model("llama"), tmp_path / "out", QuantizeOptions(skip=("q_prj", "o_proj")))
    assert [warning for warning in report.warnings if "q_prj" in warning]
    assert not [warning for warning in report.warnings if "o_proj" in warning]
    assert report.skip_modules == ["lm_head", *[f"model.layers.{layer}.self_attn.o_proj" for layer in range(2)]]


def test_other_block_sizes_load(make_model, tmp_path: Path):
    quantize_checkpoint(make_model("llama"), tmp_path / "out", QuantizeOptions(blocksize=128))
    model, problems = load(tmp_path / "out", "llama")
    assert not problems
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.blocksize == 128
    assert logits(model).isfinite().all()


def test_cast_keeps_what_the_architecture_wants_in_float32(make_model, tmp_path: Path):
    folder = make_model("t5", dtype=torch.float32)
    quantize_checkpoint(folder, tmp_path / "out", QuantizeOptions(dtype="float16"))
    theirs, _problems = load(folder, "t5", quantization_config=bnb_config(QuantizeOptions()), dtype=torch.float16)
    ours, problems = load(tmp_path / "out", "t5")
    assert not problems
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], tensor), key
    saved = load_file(tmp_path / "out" / "model.safetensors")
    wo = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    assert saved[wo].dtype == torch.float32
    assert torch.equal(saved[wo], load_file(folder / "model.safetensors")[wo])


def test_weights_that_the_architecture_wants_in_float32(make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["up_proj", "norm"])
    folder = make_model("llama")
    quantize_checkpoint(folder, tmp_path / "out")
    theirs, _problems = load(folder, "llama", quantization_config=bnb_config(QuantizeOptions()))
    ours, problems = load(tmp_path / "out", "llama")
    assert not problems
    assert ours.model.layers[0].mlp.up_proj.weight.quant_state.dtype == torch.float32
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], tensor), key


def test_rule_on_names_gives_a_folder_that_loads_the_same(make_model, tmp_path: Path, no_transformers):
    for name in ("llama", "gpt2", "opt", "bert", "t5", "gpt neox"):
        folder = make_model(name)
        report = quantize_checkpoint(folder, tmp_path / f"out-{name}")
        assert report.rule == RULE_BY_NAME
        assert any("transformers is not installed" in warning for warning in report.warnings)
        model, problems = load(tmp_path / f"out-{name}", name)
        assert not problems, name
        original, _problems = load(folder, name)
        assert (
            torch.nn.functional.cosine_similarity(
                logits(model).float().flatten(), logits(original).float().flatten(), dim=0
            )
            > 0.9
        )


def test_code_in_the_checkpoint_is_never_run(make_model, tmp_path: Path):
    folder = make_model("llama")
    mark = tmp_path / "executed"
    (folder / "modeling_own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    report = quantize_checkpoint(folder, tmp_path / "out")
    assert report.rule == RULE_BY_NAME
    assert not mark.exists()
    assert (tmp_path / "out" / "modeling_own.py").exists()


def test_shapes_that_contradict_the_architecture(make_model, tmp_path: Path):
    folder = make_model("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 4)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight' has shape \(3, 4\)"):
        quantize_checkpoint(folder, tmp_path / "out")


def test_missing_layers_are_told(make_model, tmp_path: Path):
    folder = make_model("llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    report = quantize_checkpoint(folder, tmp_path / "out")
    assert any("model.layers.0.mlp.up_proj.weight" in warning for warning in report.warnings)


def test_absurd_sizes_are_refused_at_once(make_model, tmp_path: Path):
    folder = make_model("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(CheckpointError, match="num_hidden_layers is 1000000000"):
        quantize_checkpoint(folder, tmp_path / "out")


def test_replaced_experts_are_refused(make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers.quantizers import base

    table = copy.deepcopy(base.MODULES_TO_PATCH_FOR_QUANTIZATION)
    table["LlamaMLP"] = table["Llama4TextExperts"]
    monkeypatch.setattr(base, "MODULES_TO_PATCH_FOR_QUANTIZATION", table)
    with pytest.raises(CheckpointError, match="BitsAndBytesConfig"):
        quantize_checkpoint(make_model("llama"), tmp_path / "out")
