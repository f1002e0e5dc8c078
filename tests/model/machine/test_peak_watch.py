import time

import torch

from qlora_lightning.model.device import PeakWatch


def test_memory_that_was_taken_and_given_back_is_seen():
    watch = PeakWatch(torch.device("cpu"))
    watch.look()
    before = watch._most
    watch.start()
    taken = bytearray(b"1" * 200_000_000)
    time.sleep(0.1)  # several looks
    del taken
    assert watch.stop() > before + 150_000_000
    assert watch._thread is None


def test_a_watch_that_never_began_ends():
    assert PeakWatch(torch.device("cpu")).stop() > 0
