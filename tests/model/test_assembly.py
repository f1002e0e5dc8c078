import pytest
import torch

from qlora_lightning import QLoRAModule
from qlora_lightning.support.errors import UserError


@pytest.fixture
def adapter(tiny_base, tmp_path):
    """An adapter folder of rank 4 whose B is not zero."""
    module = QLoRAModule(str(tiny_base), compute_dtype="fp32", rank=4, target_modules="attention")
    module.configure_model()
    for name, tensor in module.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.ones_(tensor)
    module.save_adapter(tmp_path / "adapter")
    return module, tmp_path / "adapter"


def test_training_goes_on_with_an_adapter_folder_its_rank_and_targets(tiny_base, adapter):
    module, folder = adapter
    again = QLoRAModule(str(tiny_base), compute_dtype="fp32", adapter=str(folder))
    again.configure_model()
    assert again.state_dict().keys() == module.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in module.state_dict().items())
    assert all(parameter.requires_grad == (".lora_" in name) for name, parameter in again.named_parameters())


@pytest.mark.parametrize(("option", "value", "stored"), [("rank", 16, 4), ("alpha", 3.0, 8), ("dropout", 0.1, 0.0)])
def test_options_that_contradict_the_adapter_are_refused(tiny_base, adapter, option, value, stored):
    module = QLoRAModule(str(tiny_base), compute_dtype="fp32", adapter=str(adapter[1]), **{option: value})
    with pytest.raises(UserError, match=rf"model.{option} is {value}, but the adapter in .* has {stored}"):
        module.configure_model()


CONTRADICTIONS = [
    ({"target_modules": "mlp"}, r"model.target_modules is mlp, but the adapter in .* has \['k_proj', 'o_proj'"),
    ({"target_modules": ["q_proj"]}, r"model.target_modules is \['q_proj'\], but"),
    ({"layers": "last:1"}, r"model.layers is last:1, but the adapter in .* has \[0, 1\]"),
    ({"target_modules": "attention", "layers": [0]}, r"model.layers is \[0\], but"),
    ({"lora_options": {"use_dora": True}}, r"model.lora_options.use_dora is True, but the adapter in .* has None"),
]


@pytest.mark.parametrize(("options", "words"), CONTRADICTIONS)
def test_targets_layers_and_options_that_contradict_the_adapter_are_refused(tiny_base, adapter, options, words):
    module = QLoRAModule(str(tiny_base), compute_dtype="fp32", adapter=str(adapter[1]), **options)
    with pytest.raises(UserError, match=words):
        module.configure_model()


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 4, "alpha": 8, "target_modules": "attention"},
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "layers": "last:2"},
        {"layers": [0, 1]},
        {"lora_options": {"use_dora": False, "init_lora_weights": "gaussian"}},
    ],
)
def test_options_that_say_what_the_adapter_is_anyway_pass(tiny_base, adapter, options):
    QLoRAModule(str(tiny_base), compute_dtype="fp32", adapter=str(adapter[1]), **options).configure_model()


def test_an_adapter_of_another_quantization_is_refused(tiny_base, adapter):
    module = QLoRAModule(str(tiny_base), quantization="int8", adapter=str(adapter[1]))
    with pytest.raises(UserError, match=r"with model.quantization nf4, but here it is int8"):
        module.configure_model()


def test_what_training_began_from_is_kept_in_the_identity(tiny_base, adapter):
    module = QLoRAModule(str(tiny_base), compute_dtype="fp32", adapter=str(adapter[1]))
    module.configure_model()
    assert module.identity["trained_from"] == {"adapter": str(adapter[1]), "data": {}}
    assert module.identity["adapter"] == adapter[0].identity["adapter"]
