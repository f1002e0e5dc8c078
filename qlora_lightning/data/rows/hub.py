"""A data set of the Hugging Face hub, through ``datasets``."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qlora_lightning.data.rows.sources import Source
from qlora_lightning.support.errors import UserError

BATCH_ROWS = 256


def read_hub(source: Source, skip: int) -> Iterator[Any]:
    """Yield a data set's rows behind the first ``skip`` as Arrow tables.

    It is downloaded into the cache of ``datasets`` and mapped into memory; a streamed one is read from the network.

    Raises:
        UserError: there is no such data set, split, name or revision, or it cannot be reached.
    """
    with _in_one_sentence(source):
        from datasets import load_dataset

        rows: Any = load_dataset(
            source.path,
            source.name,
            data_files=source.data_files,
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
        )
        if not source.streaming and skip >= len(rows):
            return  # `skip` refuses to skip all
        if source.shard_seed is not None:
            rows = rows.shuffle(seed=source.shard_seed, buffer_size=1)  # of the shards; we shuffle rows ourselves
        rows = rows.skip(skip)
        yield from rows.with_format("arrow").iter(BATCH_ROWS)


def describe_hub(source: Source) -> str:
    """Return what ``datasets`` knows a data set's content by: a hash over its files, the configuration, the split.

    Raises:
        UserError: there is no such data set, name or revision, or it cannot be reached.
    """
    with _in_one_sentence(source):
        from datasets import load_dataset_builder

        builder = load_dataset_builder(source.path, source.name, data_files=source.data_files, revision=source.revision)
        return f"{builder.hash} {builder.config_id} {source.split}"


@contextmanager
def _in_one_sentence(source: Source) -> Iterator[None]:
    try:
        yield
    # It raises classes of its own, of the hub, of its HTTP and file libraries, ValueError and RuntimeError.
    except Exception as error:
        said = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"Data set {source.path}, which is no file or folder here, cannot be read from the Hugging Face hub: "
            f"{said}. Check path, split, name and revision; to private and gated ones log in with `hf auth login`."
        ) from error
