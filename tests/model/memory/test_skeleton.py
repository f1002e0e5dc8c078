import pytest
import torch
from transformers import LlamaConfig

from qlora_lightning import QLoRAModule
from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.build import build_skeleton
from qlora_lightning.model.memory.shapes import checkpoint_layers, read_model
from qlora_lightning.support.errors import UserError

OPTIONS = [
    {},
    {"quantization": "int8"},
    {"quantization": "none", "fast": False},
    {"dropout": 0.1, "layers": "last:1"},
    {"target_modules": ["q_proj", "down_proj"], "lora_options": {"use_dora": True}},
    {"lora_options": {"trainable_token_indices": [3], "rank_pattern": {"q_proj": 6}}},
]


def build(base, quantization="nf4", fast=True, adapter=None, **options):
    settings = {"compute_dtype": torch.bfloat16, "quantization": quantization, "fast": fast, "adapter": adapter}
    return build_skeleton(LlamaConfig.from_pretrained(base), adapter_options={"rank": 4, **options}, **settings)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_skeleton_is_the_model_without_its_numbers(tiny_base, options):
    module = QLoRAModule(str(tiny_base), rank=4, compute_dtype="bf16", **options)
    module.configure_model()
    skeleton = build(tiny_base, **options)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    planned, real = (trainable_tensors(model) for model in (skeleton, module.model))
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in real.items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in planned.items()} == shapes
    assert read_model(skeleton) == read_model(module.model)
    assert read_model(skeleton).trained().total() == len(real)


def test_layers_are_read_as_they_are(tiny_base):
    model = read_model(build(tiny_base, target_modules=["q_proj"], layers=[0]))
    lower, upper = checkpoint_layers(model, every_n_layers=2).layers
    assert (lower.linears["q_proj"].rank, upper.linears["q_proj"].rank) == (4, 0)
    assert (lower.input_trains, upper.input_trains) == (False, True)
    assert (lower.checkpointed, upper.checkpointed) == (True, False)
    assert lower.heads == 4
    assert (lower.width, lower.inner_width) == (64, 128)
    assert lower.linears["k_proj"].outputs == 32
    assert lower.fused
    assert lower.trains


def test_an_adapter_folder_brings_its_own_shape(tiny_base, tmp_path):
    made = QLoRAModule(str(tiny_base), rank=3, target_modules="attention", compute_dtype="bf16")
    made.configure_model()
    made.model.save_pretrained(tmp_path)
    skeleton = build(tiny_base, adapter=str(tmp_path), rank=8)
    assert read_model(skeleton) == read_model(made.model)
    with pytest.raises(UserError, match=r"model\.rank is 4, but the adapter in .* has 3"):
        build(tiny_base, adapter=str(tmp_path))


def test_options_that_fit_refuses_are_refused(tiny_base):
    with pytest.raises(UserError, match=r"model\.lora_options"):
        build(tiny_base, lora_options={"init_lora_weights": "pissa"})
    with pytest.raises(UserError, match="integers have no gradient"):
        build(tiny_base, lora_options={"modules_to_save": ["q_proj"]})
