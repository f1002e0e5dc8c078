import json
from pathlib import Path

import bitsandbytes as bnb
import pytest
from transformers import LlamaConfig

from qlora_lightning.model.base_model import load_base
from qlora_lightning.model.build import build_skeleton
from qlora_lightning.model.memory.shapes import STORAGES, name_storage, read_base, read_model
from qlora_lightning.model.summary import bytes_by_dtype

ROOT = Path(__file__).parents[3]


def skeleton(config, quantization="nf4", **options):
    import torch

    options = {"rank": 8, **options}
    settings = {"compute_dtype": torch.bfloat16, "adapter": None, "fast": True}
    return build_skeleton(config, quantization=quantization, adapter_options=options, **settings)


def small(**settings):
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"vocab_size": 100, "num_hidden_layers": 2, "tie_word_embeddings": False}
    return LlamaConfig(**{**shape, **settings})


# by hand: queries and output 64 × 64, keys and values 32 × 64, gate, up and down 128 × 64
IN_LINEARS = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
ROWS = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
NORMS, EMBEDDING = 5 * 64, 100 * 64


def test_a_small_base_is_counted_by_hand():
    model = read_model(skeleton(small()))
    others = NORMS + 2 * EMBEDDING
    assert model.base.parameters == IN_LINEARS + others
    # scales: one for 64 numbers; of a weight of 4,096 numbers 64, which share one outer scale
    outer = 2 * 7
    expected = {
        "fp32": 4 * (IN_LINEARS + others),
        "bf16": 2 * (IN_LINEARS + others),
        "int8": IN_LINEARS + 4 * ROWS + 2 * others,
        "nf4": IN_LINEARS // 2 + 4 * IN_LINEARS // 64 + 2 * others,
        "nf4, double quantized": IN_LINEARS // 2 + IN_LINEARS // 64 + 4 * outer + 2 * others,
    }
    assert {storage: model.base.count_bytes(storage) for storage in STORAGES} == expected
    # A 8 × in, B out × 8
    pairs = 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128)
    assert model.count_trained() == 2 * 8 * pairs


def test_a_tied_head_counts_once():
    assert read_base(skeleton(small(tie_word_embeddings=True))).parameters == IN_LINEARS + NORMS + EMBEDDING


@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_the_way_the_skeleton_is_stored_changes_no_count(quantization):
    assert read_base(skeleton(small(), quantization)) == read_base(skeleton(small()))


def test_llama_3_1_8b_has_its_known_sizes():
    config = LlamaConfig(**json.loads((ROOT / "configs/shapes/llama-3.1-8b/config.json").read_text()))
    model = read_model(skeleton(config, rank=16))
    assert model.base.parameters == 8_030_261_248  # as its model card says: 8.03 billion
    sizes = {storage: model.base.count_bytes(storage) / 1e9 for storage in STORAGES}
    rounded = {storage: round(size, 2) for storage, size in sizes.items()}
    assert rounded == {"fp32": 32.12, "bf16": 16.06, "int8": 9.09, "nf4": 6.03, "nf4, double quantized": 5.70}
    assert model.count_trained() == 41_943_040  # rank 16 on all linears, as PEFT prints it


def test_llama_3_2_1b_has_its_known_size():
    config = LlamaConfig(**json.loads((ROOT / "configs/shapes/llama-3.2-1b/config.json").read_text()))
    assert read_base(skeleton(config)).parameters == 1_235_814_400


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_a_loaded_base_takes_as_much_as_planned(tiny_base, quantization, double_quant):
    import torch

    loaded = load_base(str(tiny_base), quantization=quantization, double_quant=double_quant, cache=False).model
    found = sum(bytes_by_dtype(loaded).values())
    if quantization == "int8":  # whose scales are no parameters
        found += sum(m.weight.SCB.nbytes for m in loaded.modules() if isinstance(m, bnb.nn.Linear8bitLt))
    base = read_base(skeleton(LlamaConfig.from_pretrained(tiny_base)))
    planned = base.count_bytes(name_storage(quantization, double_quant, number_bytes=2))
    assert loaded.dtype == torch.bfloat16
    assert planned == found


def test_a_loaded_model_is_counted_as_its_skeleton(tiny_base):
    from qlora_lightning import QLoRAModule

    module = QLoRAModule(str(tiny_base), rank=8, compute_dtype="bf16")
    module.configure_model()
    assert read_model(module.model) == read_model(skeleton(LlamaConfig.from_pretrained(tiny_base)))


def test_a_base_that_is_not_quantized_has_the_dtype_of_the_products():
    assert [name_storage("none", True, number_bytes) for number_bytes in (2, 4)] == ["bf16", "fp32"]
    assert [name_storage("fp4", double, 2) for double in (False, True)] == ["nf4", "nf4, double quantized"]
