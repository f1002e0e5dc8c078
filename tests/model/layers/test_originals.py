import functools
import types

from torch import nn
from transformers.models.llama import modeling_llama as llama

from qlora_lightning.model.layers.fusing import Originals


def own(self, x):
    return x


def test_functions_of_libraries_are_there_until_one_is_replaced(monkeypatch):
    originals = Originals((nn.Linear, "forward"), (llama.LlamaDecoderLayer, "forward"), (llama, "rotate_half"))
    assert originals.are_there()
    monkeypatch.setattr(llama, "rotate_half", lambda x: x)
    assert not originals.are_there()
    monkeypatch.undo()
    assert originals.are_there()


def test_what_was_replaced_before_never_counts_as_a_librarys(monkeypatch):
    wrapped = functools.wraps(nn.Linear.forward)(own)
    for replaced in (own, wrapped, functools.partial(own), types.MethodType(own, nn.Linear(2, 2))):
        with monkeypatch.context() as patch:
            patch.setattr(nn.Linear, "forward", replaced)
            assert not Originals((nn.Linear, "forward")).are_there()
    assert Originals((nn.Linear, "forward")).are_there()


def test_a_function_that_is_gone_is_not_there(monkeypatch):
    originals = Originals((llama.LlamaMLP, "forward"))
    monkeypatch.delattr(llama.LlamaMLP, "forward")
    assert not originals.are_there()
