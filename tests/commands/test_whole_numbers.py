import typing

import pytest
from lightning import Trainer

from qlora_lightning.commands.training import QLoRACLI, main
from qlora_lightning.commands.whole_numbers import read_whole_numbers_first

LIMITS = ("limit_train_batches", "limit_val_batches", "overfit_batches", "val_check_interval")


@pytest.fixture(params=[(int, float), (float, int)], ids=["int first", "float first"])
def order(request, monkeypatch):
    """The order that typing happens to give the Trainer's annotations."""
    for name in LIMITS:
        monkeypatch.setitem(Trainer.__init__.__annotations__, name, typing.Union[(*request.param, type(None))])


class _Parsed(QLoRACLI):
    """Parses, and says what it found."""

    def instantiate_classes(self):
        settings = self.config["fit"]["trainer"]
        print([settings[name] for name in LIMITS])
        raise KeyboardInterrupt


@pytest.mark.parametrize(("given", "read"), [("1", "1"), ("1.0", "1.0"), ("0.25", "0.25"), ("3", "3")])
def test_one_is_a_batch_and_one_point_nought_all_of_them(order, given, read, capsys):
    options = [option for name in LIMITS for option in (f"--trainer.{name}", given)]
    with pytest.raises(KeyboardInterrupt):
        main(["fit", "--config", "configs/quickstart.yaml", *options], _Parsed)
    assert capsys.readouterr().out.splitlines()[-1] == f"[{', '.join([read] * len(LIMITS))}]"


def test_nothing_but_the_order_changes(order):
    before = {name: set(typing.get_args(kind)) for name, kind in Trainer.__init__.__annotations__.items()}
    read_whole_numbers_first()
    after = Trainer.__init__.__annotations__
    assert before == {name: set(typing.get_args(kind)) for name, kind in after.items()}
    assert all(typing.get_args(after[name])[0] is int for name in LIMITS)
