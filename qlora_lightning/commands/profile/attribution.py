"""Shares out the time of a step that torch's profiler has recorded: each moment to one part."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch.profiler import DeviceType

from qlora_lightning.commands.profile.parts import (
    DATA,
    RECOMPUTATION,
    REST,
    Widths,
    count_logit_rows,
    count_tokens,
    find_part,
    is_scope,
)

STEP = "a whole step"  # name of the range around it
_ENGINE = "autograd::engine::evaluate_function: "  # what torch's profiler writes before a node of the graph
_FORWARD = 0  # scope of an operator; 1 is a node of backward


@dataclass
class Share:
    """Of a part.

    Attributes:
        seconds: In all steps.
        calls: How often it was entered, in all steps.
    """

    seconds: float = 0.0
    calls: int = 0


class _Place(NamedTuple):
    """Where an event stands.

    Attributes:
        part: That it belongs to.
        whole: Whether all inside does.
        backward: Whether it is in backward.
        again: Whether it is forward that backward runs again.
    """

    part: str
    whole: bool = False
    backward: bool = False
    again: bool = False

    @property
    def counted(self) -> str:
        """The part that its time counts for."""
        return RECOMPUTATION if self.again else self.part


@dataclass
class Attribution:
    """Adds up the parts of several steps.

    Every event counts with its own time, without that of the events inside. On a CPU these add up to the step. On CUDA
    an event's own time is that of the kernels that it launched; data count with the time for which the CPU waits for
    them, and what is left of the step, when the device idles, belongs to the rest.

    Attributes:
        widths: Of the model.
        on_cuda: Whether device time counts.
        shares: Of each part that was met.
        seconds: Of each step.
        logit_rows: Most tokens whose logits were there at a time.
    """

    widths: Widths
    on_cuda: bool = False
    shares: dict[str, Share] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    logit_rows: int = 0

    def add(self, events: Iterable[Any]) -> None:
        """Add a step.

        Args:
            events: torch's ``FunctionEvent``s, with a range :data:`STEP` around the step.
        """
        events = [event for event in events if event.device_type == DeviceType.CPU]
        tokens = (count_tokens(event.name, event.input_shapes) for event in events)
        self.widths = self.widths._replace(tokens=frozenset(count for count in tokens if count is not None))
        (step,) = (event for event in events if event.name == STEP)
        roots = [event for event in events if event.cpu_parent is None] if self.on_cuda else [step]
        self._forward_parts: dict[int, str] = {}
        for root in sorted(roots, key=lambda event: float(event.time_range.start)):
            self._visit(root, _Place(REST))
        if self.on_cuda:
            self._share(REST).seconds += max(0.0, step.cpu_time_total / 1e6 - self._counted())
        self.seconds.append(self._counted())

    def _counted(self) -> float:
        """Give the seconds that the parts have beyond those of the steps before."""
        return sum(share.seconds for share in self.shares.values()) - sum(self.seconds)

    def _visit(self, event: Any, caller: _Place) -> None:
        place = self._place(event, caller)
        if event.sequence_nr >= 0 and (place.again or not place.backward):
            # The last operator of a number is the one that made its node of the graph.
            self._forward_parts[event.sequence_nr] = place.part
        self.logit_rows = max(self.logit_rows, count_logit_rows(event.input_shapes, self.widths))
        share = self._share(place.counted)
        share.seconds += self._own_seconds(event, place.counted)
        share.calls += place.counted != caller.counted
        for child in event.cpu_children:
            self._visit(child, place)

    def _place(self, event: Any, caller: _Place) -> _Place:
        in_engine = event.name.startswith(_ENGINE)
        again = caller.again or (caller.backward and not in_engine and _is_forward(event))
        part, whole = caller.part, caller.whole
        if not whole:
            name = re.sub(r"Backward\d*$", "", event.name.removeprefix(_ENGINE))
            found = find_part(name, event.input_shapes, part, self.widths)
            if found is not None:
                part, whole = found
            elif in_engine:
                part = self._forward_parts.get(event.sequence_nr, part)
        return _Place(part, whole, caller.backward or in_engine, again)

    def _own_seconds(self, event: Any, part: str) -> float:
        waits = part == DATA  # for a file or a copy, which takes no kernel's time
        time = event.self_device_time_total if self.on_cuda and not waits else event.self_cpu_time_total
        return float(time) / 1e6

    def _share(self, part: str) -> Share:
        return self.shares.setdefault(part, Share())


def _is_forward(event: Any) -> bool:
    """Whether the event builds a graph, which in backward only layers do that run again."""
    return is_scope(event.name) or (event.sequence_nr >= 0 and event.scope == _FORWARD)
