from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from qlora_lightning.model.layers.fusing import is_watched


def test_a_module_is_watched_where_it_or_one_inside_it_has_a_hook():
    inner, other = nn.Linear(2, 2), nn.Linear(2, 2)
    outer = nn.Sequential(nn.Sequential(inner), other)
    assert not is_watched(outer)
    handle = inner.register_full_backward_hook(lambda *_: None)
    assert (is_watched(outer), is_watched(inner), is_watched(other)) == (True, True, False)
    handle.remove()
    assert not is_watched(outer)


def test_hooks_on_all_modules_watch_each():
    handle = register_module_forward_hook(lambda *_: None)
    assert is_watched(nn.Linear(2, 2))
    handle.remove()
    assert not is_watched(nn.Linear(2, 2))


def test_a_module_is_watched_where_it_or_one_inside_it_has_a_forward_of_its_own():
    inner, other = nn.Linear(2, 2), nn.Linear(2, 2)
    outer = nn.Sequential(nn.Sequential(inner), other)
    inner.forward = lambda x: x
    assert (is_watched(outer), is_watched(inner), is_watched(other)) == (True, True, False)
    del inner.forward
    assert not is_watched(outer)
