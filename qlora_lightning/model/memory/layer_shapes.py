"""The shapes of decoder layers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearShape:
    """A linear of a decoder layer.

    Attributes:
        inputs: Columns of the weight.
        outputs: Rows of the weight.
        rank: Of its adapter; 0 without one.
        dropout: Whether the adapter drops inputs.
        int8: Whether the weight is stored so, by bitsandbytes.
    """

    inputs: int
    outputs: int
    rank: int = 0
    dropout: bool = False
    int8: bool = False


@dataclass(frozen=True)
class LayerShape:
    """A decoder layer.

    Attributes:
        linears: By their own names, ``q_proj`` to ``down_proj``.
        heads: Of queries.
        fused: Whether it runs in the functions of :mod:`qlora_lightning.model.layers.decoder_layer`.
        input_trains: Whether something below it trains, so that gradients flow through all of it.
        checkpointed: Whether only its input is kept.
    """

    linears: dict[str, LinearShape]
    heads: int
    fused: bool = True
    input_trains: bool = True
    checkpointed: bool = False

    def rank_of(self, *names: str) -> int:
        """Add up the ranks of some linears."""
        return sum(self.linears[name].rank for name in names)

    @property
    def width(self) -> int:
        """Of the stream of hidden states."""
        return self.linears["q_proj"].inputs

    @property
    def inner_width(self) -> int:
        """Of gate and up."""
        return self.linears["gate_proj"].outputs

    @property
    def trains(self) -> bool:
        """Whether it or something below it trains."""
        return self.input_trains or self.rank_of(*self.linears) > 0
