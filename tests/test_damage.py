"""What is damaged on the disk, at the same size, is never computed with: quantized bases and samples."""

import pytest

from qlora_lightning.cli import main
from tests.equality import read_adapter, same

_TRAINED = ("model.rank=2", "model.compute_dtype=fp32", "data.batch_size=8", "trainer.accelerator=cpu")


def flip(file, place):
    """Flip one bit of a file, which keeps its size."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.fixture
def fit(tiny_base, rows_file, tmp_path):
    """Fits by the command, each into a folder of its own; gives exit code and run folder."""

    def run(name, *options):
        options = [f"model.base={tiny_base}", f"data.train={rows_file}", *_TRAINED, *options]
        folder = tmp_path / name
        return main(["fit", *(f"--{each}" for each in options), f"--trainer.default_root_dir={folder}"]), folder

    return run


def entry_file(cache, kind, pattern):
    (found,) = (cache / kind).glob(f"*/{pattern}")
    return found


def test_damaged_bases_and_samples_in_the_cache_are_made_again(cache, fit, caplog):
    _, sound = fit("sound")
    base, samples = entry_file(cache, "quantized", "*.safetensors"), entry_file(cache, "samples", "ids.npy")
    before = base.read_bytes(), samples.read_bytes()
    flip(base, -1000)
    flip(samples, -2)
    code, folder = fit("damaged")
    assert code == 0
    assert (base.read_bytes(), samples.read_bytes()) == before
    assert caplog.text.count("is damaged") == 2
    assert same(read_adapter(folder), read_adapter(sound))
