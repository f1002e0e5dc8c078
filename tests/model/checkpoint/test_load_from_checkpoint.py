"""A checkpoint makes its module again, with its own base, shape and no code; anything else is refused."""

import pytest
import torch

from qlora_lightning import QLoRAModule
from qlora_lightning.model.checkpoint.format import KEY, plain_settings
from qlora_lightning.support.errors import UserError
from tests.equality import same
from tests.steps import make_module, make_trainer


@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory):
    """A module whose B is not zero, and a checkpoint of it as a Trainer writes it."""
    module = make_module(tiny_base, rank=2, target_modules="attention", learning_rate=0.5)
    folder = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(folder)
    trainer.strategy.connect(module)
    trainer.callbacks += module.configure_callbacks()
    trainer.save_checkpoint(folder / "last.ckpt", weights_only=False)
    return module, folder / "last.ckpt"


@pytest.fixture
def change(trained, tmp_path):
    """Write the checkpoint again with other settings or another identity."""

    def write(**parts):
        checkpoint = torch.load(trained[1], weights_only=True)
        content = checkpoint[KEY]
        for name, part in parts.items():
            content[name] = {key: value for key, value in {**content[name], **part}.items() if value is not None}
        torch.save(checkpoint, tmp_path / "other.ckpt")
        return tmp_path / "other.ckpt"

    return write


def have_same_adapter(module, other):
    return same(dict(module.state_dict()), dict(other.state_dict()))


def test_a_module_is_made_again_from_its_checkpoint(trained):
    again = QLoRAModule.load_from_checkpoint(trained[1])
    assert have_same_adapter(trained[0], again)
    assert (again.learning_rate, again.adapter_options["rank"]) == (0.5, 2)
    assert QLoRAModule.load_from_checkpoint(trained[1], learning_rate=0.25).learning_rate == 0.25


def test_unknown_settings_are_ignored_with_a_line_and_missing_ones_take_the_default(trained, change, capsys):
    again = QLoRAModule.load_from_checkpoint(change(settings={"gone": 1, "learning_rate": None}))
    assert "ignored: gone." in capsys.readouterr().out
    assert again.learning_rate == 2e-4
    assert have_same_adapter(trained[0], again)


def test_a_start_adapter_that_has_moved_may_be_named_again_or_left_out(trained, change, tmp_path):
    file = change(settings={"adapter": str(tmp_path / "gone"), "rank": None, "target_modules": None})
    words = "adapter folder .*gone, which is not there: pass its new place as adapter=…, or adapter=None, "
    with pytest.raises(UserError, match=words + r"rank=2, alpha=4, dropout=0.0, target_modules=\['k_proj', 'o_proj', "):
        QLoRAModule.load_from_checkpoint(file)
    again = QLoRAModule.load_from_checkpoint(file, adapter=None, rank=2, target_modules="attention")
    assert have_same_adapter(trained[0], again)


def test_a_checkpoint_decides_neither_that_code_may_run_nor_what_is_imported(change, tmp_path, capsys):
    file = change(settings={"trust_remote_code": True, "optimizer": "no_such_module.Optimizer"})
    module = QLoRAModule.load_from_checkpoint(file)
    assert (module.trust_remote_code, module.optimizer_config) == (False, None)
    assert "optimizer no_such_module.Optimizer is not taken over" in capsys.readouterr().out
    assert QLoRAModule.load_from_checkpoint(file, trust_remote_code=True).trust_remote_code is True

    class Code:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({KEY: Code()}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match=r"evil.ckpt is not read"):
        QLoRAModule.load_from_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


def test_another_shape_is_refused(trained):
    """Another base, and what is newer, cut off or not there: see ``tests/test_wrong_inputs.py``."""
    with pytest.raises(UserError, match=r"trained with model\.rank 2, but here it is 3"):
        QLoRAModule.load_from_checkpoint(trained[1], rank=3)


def test_the_state_holds_the_adapter_only_and_honours_its_arguments(trained):
    module, state = trained[0], trained[0].state_dict()
    assert len(state) == 2 * 4 * 2  # layers × linears × (A, B)
    assert all("lora_" in name for name in state)
    outer = torch.nn.ModuleDict({"inner": module})
    assert outer.state_dict().keys() == {f"inner.{name}" for name in state}
    assert next(iter(module.state_dict(keep_vars=True).values())).requires_grad


@pytest.mark.parametrize("change", [dict.popitem, lambda values: values.update(more=torch.ones(1))])
def test_of_a_state_that_does_not_fit_nothing_is_loaded(trained, change):
    before = {name: tensor.clone() for name, tensor in trained[0].state_dict().items()}
    values = {name: tensor + 1 for name, tensor in before.items()}
    change(values)
    with pytest.raises(UserError, match="The checkpoint does not fit the adapter"):
        trained[0].load_state_dict(values)
    assert same(before, dict(trained[0].state_dict()))


def test_what_weights_only_would_not_read_again_is_not_stored(tmp_path):
    settings = {"path": tmp_path, "layers": (1, 2), "options": {"deep": [None, True, 0.5]}, "odd": [object()]}
    torch.save(plain_settings(settings), tmp_path / "settings")
    stored = torch.load(tmp_path / "settings", weights_only=True)
    assert stored == {"path": str(tmp_path), "layers": [1, 2], "options": {"deep": [None, True, 0.5]}}
