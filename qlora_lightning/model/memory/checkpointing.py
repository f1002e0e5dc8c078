"""What gradient checkpointing may do: keep only each layer's input, on the device or on the host."""

from typing import Literal, NamedTuple


class Checkpointing(NamedTuple):
    """Whether layers are checkpointed, and whether their inputs wait in host memory."""

    checkpointed: bool = False
    offload: bool = False

    def __str__(self) -> str:
        if not self.checkpointed:
            return "without gradient checkpointing"
        return "with gradient checkpointing" + (", its inputs in host memory" if self.offload else "")


def checkpointing_choices(
    enabled: bool | Literal["auto"] = "auto", offload: bool = False, *, on_cuda: bool
) -> list[Checkpointing]:
    """Return what may be done about memory, in the order in which it is."""
    checkpointed = [Checkpointing(True, offload and on_cuda), Checkpointing(True, on_cuda)]
    choices = {True: checkpointed[:1], False: [Checkpointing()], "auto": [Checkpointing(), *checkpointed]}
    return list(dict.fromkeys(choices[enabled]))
