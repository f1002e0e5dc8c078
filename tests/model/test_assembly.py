"""Training continues with an adapter folder, by its own rank and targets; what contradicts it is refused."""

import pytest
import torch

from qlora_lightning import QLoRAModule
from qlora_lightning.support.errors import UserError


@pytest.fixture(scope="module")
def adapter(tiny_base, tmp_path_factory):
    """An adapter folder of rank 4 whose B is not zero."""
    module = QLoRAModule(str(tiny_base), compute_dtype="fp32", rank=4, target_modules="attention")
    module.configure_model()
    for name, tensor in module.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.ones_(tensor)
    folder = tmp_path_factory.mktemp("assembly") / "adapter"
    module.save_adapter(folder)
    return module, folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "layers": "last:2"},
        {"lora_options": {"use_dora": False, "init_lora_weights": "gaussian"}},
    ],
)
def test_training_continues_with_the_folder_and_with_options_that_say_what_it_is(tiny_base, adapter, options):
    module, folder = adapter
    again = QLoRAModule(str(tiny_base), compute_dtype="fp32", adapter=str(folder), **options)
    again.configure_model()
    assert again.state_dict().keys() == module.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in module.state_dict().items())
    assert all(parameter.requires_grad == (".lora_" in name) for name, parameter in again.named_parameters())
    assert again.model.peft_config["default"].base_model_name_or_path == str(tiny_base)
    assert again.identity["adapter"] == module.identity["adapter"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 16}, "model.rank is 16, but the adapter in .* has 4"),
        ({"alpha": 3.0}, "model.alpha is 3.0, but the adapter in .* has 8"),
        ({"target_modules": "mlp"}, r"model.target_modules is mlp, but the adapter in .* has \['k_proj', 'o_proj'"),
        ({"layers": "last:1"}, r"model.layers is last:1, but the adapter in .* has \[0, 1\]"),
        ({"lora_options": {"use_dora": True}}, "model.lora_options.use_dora is True, but the adapter in .* has None"),
        ({"quantization": "int8"}, "with model.quantization nf4, but here it is int8"),
    ],
)
def test_options_that_contradict_the_adapter_are_refused(tiny_base, adapter, options, words):
    module = QLoRAModule(str(tiny_base), compute_dtype="fp32", adapter=str(adapter[1]), **options)
    with pytest.raises(UserError, match=words):
        module.configure_model()
