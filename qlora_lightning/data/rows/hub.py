"""A data set of the Hugging Face hub, through ``datasets``, with its errors in one sentence each."""

import re
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
            source.path, source.name, split=source.split, revision=source.revision, streaming=source.streaming
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

        builder = load_dataset_builder(source.path, source.name, revision=source.revision)
        return f"{builder.hash} {builder.config_id} {source.split}"


@contextmanager
def _in_one_sentence(source: Source) -> Iterator[None]:
    try:
        yield
    # It raises classes of its own, of the hub, of its HTTP and file libraries, ValueError and RuntimeError.
    except Exception as error:
        raise UserError(_explain(error, source)) from error


def _explain(error: Exception, source: Source) -> str:
    from datasets import config, exceptions

    message = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, exceptions.DatasetNotFoundError) and "gated" in message:
        page = f"https://huggingface.co/datasets/{source.path}"
        return f"Data set {source.path} is gated: ask for access at {page}, then log in with `hf auth login`."
    if isinstance(error, exceptions.DatasetNotFoundError) and "Revision" not in message:
        return (
            f"Data set {source.path} is no file or folder here, and not found on the Hugging Face hub (or private: "
            "log in with `hf auth login`). Check the spelling."
        )
    if isinstance(error, ConnectionError):
        offline = "HF_HUB_OFFLINE forbids the download" if config.HF_HUB_OFFLINE else "the hub cannot be reached"
        return (
            f"Data set {source.path} is no file or folder here, and not in the local cache of `datasets`, and "
            f"{offline}. Check the spelling and the network, or give a file."
        )
    names = ", ".join(re.findall(r"'([^']+)'", message[message.rfind("[") :]))
    if message.startswith(("Unknown split", "Bad split")):
        return f"Data set {source.path} has no split {source.split!r}: name one of {names} with `split:`."
    if message.startswith(("Config name is missing", "BuilderConfig")):
        found = "has several parts" if source.name is None else f"has no part {source.name!r}"
        names = ", ".join(re.findall(r"'([^']+)'", message.partition("[")[2].partition("]")[0]))
        return f"Data set {source.path} {found}: name one of {names} with `name:`."
    return f"Data set {source.path} cannot be read: {type(error).__name__}: {message}. Check name, split and revision."
