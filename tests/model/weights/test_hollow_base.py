import torch

from qlora_lightning.base import open_base
from qlora_lightning.model.weights.base import OriginalWeights, filled, make_skeleton, name_in_base


def test_nothing_of_a_skeleton_has_values_but_the_rotary_table(tiny_base):
    model = make_skeleton(tiny_base)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_a_part_is_filled_for_a_while(tiny_base):
    model, weights = make_skeleton(tiny_base), OriginalWeights(open_base(str(tiny_base)))
    layer = model.model.layers[1]
    with filled(layer, "model.layers.1", weights, torch.float32):
        for name, parameter in layer.named_parameters():
            assert torch.equal(parameter, weights(f"model.layers.1.{name}"))
        assert all(parameter.is_meta for parameter in model.model.layers[0].parameters())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # still tied


def test_names_lose_what_peft_puts_between():
    assert name_in_base("model.layers.0.mlp.up_proj.base_layer.weight") == "model.layers.0.mlp.up_proj.weight"
    assert name_in_base("model.embed_tokens.token_adapter.base_layer.weight") == "model.embed_tokens.weight"
    assert name_in_base("model.norm.original_module.weight") == "model.norm.weight"
