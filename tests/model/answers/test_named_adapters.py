import pytest
import torch

from qlora_lightning import QLoRAModule
from qlora_lightning.support.errors import UserError

PROMPTS, NEVER = [[11, 12, 13], [21, 22]], 49_151


def make(tiny_base, seed=0, **options):
    module = QLoRAModule(base=str(tiny_base), compute_dtype="fp32", **options)
    module.configure_model()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(seed))
    return module


@pytest.fixture
def folders(tiny_base, tmp_path):
    """Two adapters of other ranks and targets, and the answers of each alone."""
    answers = {}
    for name, options in {"a": {"rank": 4}, "b": {"rank": 2, "target_modules": "attention", "seed": 1}}.items():
        module = make(tiny_base, **options)
        module.save_adapter(tmp_path / name)
        answers[name] = module.answer(PROMPTS, [NEVER], 8)
    return tmp_path, answers


def test_each_adapter_answers_as_it_does_alone(tiny_base, folders):
    folder, alone = folders
    module = QLoRAModule(base=str(tiny_base), compute_dtype="fp32", adapter=str(folder / "a"))
    module.configure_model()
    module.add_adapter("b", folder / "b")
    assert module.autocast_dtype is None
    for _ in range(2):
        module.model.set_adapter("b")
        assert module.answer(PROMPTS, [NEVER], 8) == alone["b"]
        module.model.set_adapter("default")
        assert module.answer(PROMPTS, [NEVER], 8) == alone["a"]
    assert alone["a"] != alone["b"]


def test_an_adapter_of_another_base_is_refused(tiny_base, folders):
    folder, _ = folders
    identity = folder / "b" / "qlora_lightning.json"
    identity.write_text(identity.read_text().replace('"quantization": "nf4"', '"quantization": "fp4"'))
    with pytest.raises(UserError, match=r"trained on its base with model\.quantization fp4"):
        make(tiny_base).add_adapter("b", folder / "b")


def test_an_adapter_that_lacks_tensors_is_refused(tiny_base, folders):
    from safetensors.torch import load_file, save_file

    file = folders[0] / "b" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.popitem()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match="1 tensors are missing in it and 0 are foreign"):
        make(tiny_base).add_adapter("b", folders[0] / "b")


def test_a_folder_without_an_adapter_is_refused(tiny_base, tmp_path):
    with pytest.raises(UserError, match="is not an adapter folder"):
        make(tiny_base).add_adapter("b", tmp_path)
