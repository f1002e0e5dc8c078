"""Preference rows as packed batches: two answers to each prompt, the better one first, or one with a verdict."""

from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.support.errors import check_setting


class PreferenceDataModule(InstructionDataModule):
    """Rows with a prompt, a ``chosen`` and a ``rejected`` answer: what :class:`PreferenceModule` trains on.

    Or, for ``objective: kto``, rows with one answer, in any conversation format, and a verdict on it: ``label``,
    true or false. The last answer is trained; a user's function returns the conversation and a bool.

    All arguments are those of :class:`InstructionDataModule`; ``format: auto`` reads TRL's and LLaMA-Factory's shapes,
    and a user's function returns two conversations that begin alike. A row is one sample with both answers, so
    ``batch_size`` counts pairs; in a batch it becomes two samples that begin with the same prompt, which is computed
    once. ``max_length`` applies to each answer with its prompt; if one answer is left out, so is its pair.
    """

    pairs = True

    def _check_settings(self) -> None:
        super()._check_settings()
        expected = "assistant or last: answers alone are compared, not prompts"
        check_setting("data.train_on", self.train_on, self.train_on != "all", expected)
        expected = "truncate or drop: pieces of rows cannot be compared"
        check_setting("data.too_long", self.too_long, self.too_long != "split", expected)
