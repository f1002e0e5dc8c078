"""The base's weights both ways: as the adapter saw them, and as they were before quantization."""

from qlora_lightning.model.opened_adapter import AdapterSource
from qlora_lightning.model.weights.base import OriginalWeights, TrainedWeights, Weights
from qlora_lightning.support.errors import UserError


class Ways:
    """The base's weights both ways, where they are there.

    Args:
        source: The adapter.
        onto: The way that was chosen.

    Raises:
        UserError: That way there are none.
    """

    def __init__(self, source: AdapterSource, onto: str) -> None:
        self.dequantized: Weights | None = None
        self.original: Weights | None = None if source.is_stored_quantized else OriginalWeights(source.base)
        if source.quantization is not None:
            self.dequantized = TrainedWeights(
                source.base, source.quantization, source.double_quant, source.compute_dtype
            )
        if onto == "original" and self.original is None:
            raise UserError(
                f"--onto original: {source.base.name} is stored quantized; the weights before are not here."
            )
        if onto == "dequantized" and self.dequantized is None:
            raise UserError(
                f"{source.folder} does not say how its base was quantized (no qlora_lightning.json), so there is no "
                "telling which dequantized base it was trained on. Add --onto original."
            )
        chosen, trained = (self.original if onto == "original" else self.dequantized), self.dequantized or self.original
        assert chosen is not None
        assert trained is not None
        self.chosen: Weights = chosen
        self.trained: Weights = trained  # what the adapter saw, as far as is known
