"""What is damaged on the disk, at the same size, is never computed with: quantized bases and samples."""

from qlora_lightning.cli import main
from tests.equality import read_adapter, same

_TRAINED = ("model.rank=2", "model.compute_dtype=fp32", "data.batch_size=8", "trainer.accelerator=cpu")


def flip(file, place):
    """Flip one bit of a file, which keeps its size."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_damaged_bases_and_samples_in_the_cache_are_made_again(tiny_base, rows_file, cache, tmp_path, caplog):
    def fit(name):
        """Train by the command; return the run folder."""
        options = [f"model.base={tiny_base}", f"data.train={rows_file}", *_TRAINED, f"trainer.default_root_dir={name}"]
        assert main(["fit", *(f"--{each}" for each in options)]) == 0
        return name

    sound = fit(tmp_path / "sound")
    (base,), (samples,) = cache.glob("quantized/*/*.safetensors"), cache.glob("samples/*/ids.npy")
    before = base.read_bytes(), samples.read_bytes()
    flip(base, -1000)
    flip(samples, -2)
    damaged = fit(tmp_path / "damaged")
    assert (base.read_bytes(), samples.read_bytes()) == before
    assert caplog.text.count("is damaged") == 2
    assert same(read_adapter(damaged), read_adapter(sound))
