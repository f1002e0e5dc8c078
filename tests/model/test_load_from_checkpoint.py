"""A checkpoint makes its module again, with its own base, shape and no code; anything else is refused."""

import lightning
import pytest
import torch

from qlora_lightning import QLoRAModule
from qlora_lightning.model.checkpoint.format import KEY, read_checkpoint
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.versions import FORMAT_VERSION


@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory):
    """A module whose B is not zero, and a checkpoint of it as a Trainer writes it."""
    module = QLoRAModule(str(tiny_base), compute_dtype="fp32", rank=2, target_modules="attention", learning_rate=0.5)
    module.configure_model()
    for name, tensor in module.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.ones_(tensor)
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.callbacks += module.configure_callbacks()
    file = tmp_path_factory.mktemp("trained") / "last.ckpt"
    trainer.save_checkpoint(file, weights_only=False)
    return module, file


@pytest.fixture
def change(trained, tmp_path):
    """Write the checkpoint again with other settings, identity or format."""

    def write(version=FORMAT_VERSION, **parts):
        checkpoint = torch.load(trained[1], weights_only=True)
        content = checkpoint[KEY]
        for name, part in parts.items():
            content[name] = {key: value for key, value in {**content[name], **part}.items() if value is not None}
        content["format_version"] = version
        torch.save(checkpoint, tmp_path / "other.ckpt")
        return tmp_path / "other.ckpt"

    return write


def assert_same_adapter(module, other):
    assert module.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in module.state_dict().items())


def test_a_module_is_made_again_from_its_checkpoint(trained):
    again = QLoRAModule.load_from_checkpoint(trained[1])
    assert_same_adapter(trained[0], again)
    assert (again.learning_rate, again.adapter_options["rank"]) == (0.5, 2)
    assert QLoRAModule.load_from_checkpoint(trained[1], learning_rate=0.25).learning_rate == 0.25


def test_unknown_settings_are_ignored_with_a_line_and_missing_ones_take_the_default(trained, change, capsys):
    again = QLoRAModule.load_from_checkpoint(change(settings={"gone": 1, "learning_rate": None}))
    assert "ignored: gone." in capsys.readouterr().out
    assert again.learning_rate == 2e-4
    assert_same_adapter(trained[0], again)


def test_a_start_adapter_that_has_moved_may_be_named_again_or_left_out(trained, change, tmp_path):
    file = change(settings={"adapter": str(tmp_path / "gone"), "rank": None, "target_modules": None})
    words = "adapter folder .*gone, which is not there: pass its new place as adapter=…, or adapter=None, "
    with pytest.raises(UserError, match=words + r"rank=2, alpha=4, dropout=0.0, target_modules=\['k_proj', 'o_proj', "):
        QLoRAModule.load_from_checkpoint(file)
    assert_same_adapter(
        trained[0], QLoRAModule.load_from_checkpoint(file, adapter=None, rank=2, target_modules="attention")
    )


def test_a_checkpoint_decides_neither_that_code_may_run_nor_what_is_imported(change, tmp_path, capsys):
    file = change(settings={"trust_remote_code": True, "optimizer": "no_such_module.Optimizer"})
    module = QLoRAModule.load_from_checkpoint(file)
    assert (module.trust_remote_code, module.optimizer_choice) == (False, None)
    assert "optimizer no_such_module.Optimizer is not taken over" in capsys.readouterr().out
    assert QLoRAModule.load_from_checkpoint(file, trust_remote_code=True).trust_remote_code is True

    class Code:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({KEY: Code()}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match=r"evil.ckpt is no checkpoint"):
        QLoRAModule.load_from_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("identity", "overrides", "sentence"),
    [
        (
            {"fingerprint": "f" * 64, "base": "elsewhere"},
            {},
            r"trained on another base: elsewhere \(weights ffffffffffff\) there",
        ),
        ({}, {"rank": 3}, "trained with model.rank 2, but here it is 3"),
        ({}, {"quantization": "fp4"}, r"model\.quantization nf4, but here it is fp4"),
    ],
)
def test_another_base_shape_or_quantization_is_refused_by_its_cause(change, identity, overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        QLoRAModule.load_from_checkpoint(change(identity=identity), **overrides)


@pytest.mark.parametrize("size", [0, 5000])
def test_what_is_newer_cut_off_or_not_there_is_refused(trained, change, tmp_path, size):
    (tmp_path / "cut.ckpt").write_bytes(trained[1].read_bytes()[:size])
    with pytest.raises(UserError, match=r"cut.ckpt is no checkpoint, or it is cut off"):
        read_checkpoint(tmp_path / "cut.ckpt")
    with pytest.raises(UserError, match=r"none.ckpt: there is no such file"):
        read_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(UserError, match=r"other.ckpt has format version"):
        QLoRAModule.load_from_checkpoint(change(FORMAT_VERSION + 1))


def test_the_state_holds_the_adapter_only_and_honours_its_arguments(trained):
    module, state = trained[0], trained[0].state_dict()
    assert len(state) == 2 * 4 * 2  # layers × linears × (A, B)
    assert all("lora_" in name for name in state)
    outer = torch.nn.ModuleDict({"inner": module})
    assert outer.state_dict().keys() == {f"inner.{name}" for name in state}
    assert next(iter(module.state_dict(keep_vars=True).values())).requires_grad
