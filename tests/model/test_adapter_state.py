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
            content[name] = {**content[name], **part}
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
    assert again.learning_rate == 0.5
    assert QLoRAModule.load_from_checkpoint(trained[1], learning_rate=0.25).learning_rate == 0.25


def test_unknown_settings_are_ignored_with_a_line_and_missing_ones_take_the_default(trained, change, capsys):
    file = change(settings={"gone": 1})
    checkpoint = torch.load(file, weights_only=True)
    del checkpoint[KEY]["settings"]["learning_rate"]
    torch.save(checkpoint, file)
    again = QLoRAModule.load_from_checkpoint(file)
    assert "ignored: gone." in capsys.readouterr().out
    assert again.learning_rate == 2e-4
    assert_same_adapter(trained[0], again)


def test_a_checkpoint_does_not_decide_that_code_of_a_base_may_run(change):
    file = change(settings={"trust_remote_code": True})
    assert QLoRAModule.load_from_checkpoint(file).trust_remote_code is False
    assert QLoRAModule.load_from_checkpoint(file, trust_remote_code=True).trust_remote_code is True


def test_a_checkpoint_does_not_choose_which_module_is_imported(change, capsys):
    file = change(settings={"optimizer": "no_such_module.Optimizer"})
    assert QLoRAModule.load_from_checkpoint(file).optimizer_choice is None
    assert "optimizer no_such_module.Optimizer is not taken over" in capsys.readouterr().out


OTHER_BASE = {"fingerprint": "f" * 64, "base": "elsewhere"}


def test_another_base_is_refused_unless_that_is_asked_for(trained, change, capsys):
    file = change(identity=OTHER_BASE)
    with pytest.raises(UserError, match=r"trained on another base: elsewhere \(weights ffffffffffff\) there"):
        QLoRAModule.load_from_checkpoint(file)
    assert_same_adapter(trained[0], QLoRAModule.load_from_checkpoint(file, strict_identity=False))
    assert "Loaded all the same, as strict_identity is False" in capsys.readouterr().out


def test_tensors_must_fit_even_so(trained):
    with pytest.raises(UserError, match="has shape"):
        QLoRAModule.load_from_checkpoint(trained[1], rank=3, strict_identity=False)
    with pytest.raises(UserError, match=r"trained with model.rank 2, but here it is 3"):
        QLoRAModule.load_from_checkpoint(trained[1], rank=3)


def test_a_resume_tells_a_misfit_by_its_cause(tiny_base, trained):
    module = QLoRAModule(str(tiny_base), rank=3, target_modules="attention", compute_dtype="fp32")
    module.configure_model()
    with pytest.raises(UserError, match=r"The checkpoint was trained with model.rank 2"):
        module.on_load_checkpoint(torch.load(trained[1], weights_only=True))


def test_a_newer_format_is_refused(change):
    with pytest.raises(UserError, match=r"other.ckpt has format version"):
        QLoRAModule.load_from_checkpoint(change(FORMAT_VERSION + 1))


def test_no_code_in_a_checkpoint_is_run(tmp_path):
    class Code:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({KEY: Code()}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match=r"evil.ckpt is no checkpoint"):
        QLoRAModule.load_from_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_what_is_cut_off_or_not_there_is_refused(trained, tmp_path, size):
    (tmp_path / "cut.ckpt").write_bytes(trained[1].read_bytes()[:size])
    with pytest.raises(UserError, match=r"cut.ckpt is no checkpoint, or it is cut off"):
        read_checkpoint(tmp_path / "cut.ckpt")
    with pytest.raises(UserError, match=r"none.ckpt: there is no such file"):
        read_checkpoint(tmp_path / "none.ckpt")
