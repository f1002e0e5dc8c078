"""Ends the other processes of a run when one of them dies; each says which one died, and why."""

import contextlib
import os
import secrets
import socket
import sys
import threading
import time
from typing import IO, Any

import torch.distributed
from lightning import Callback, LightningModule, Trainer

from qlora_lightning.callbacks.stop_signals import StopSignals
from qlora_lightning.model.sharded import ShardedDDPStrategy
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import LostProcess, TrainingStopped
from qlora_lightning.support.trainer import callbacks_of

_GOODBYE = "done"
_ADVICE = "What was saved is whole: resume from it by `--ckpt_path last`."
_GRACE = 10  # seconds in which a process notices for itself, and ends with its last hooks
# a machine that is gone closes no connection: it is given up when its system has not answered for 45 seconds
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 6}


class ProcessWatch(Callback):
    """Let a process that dies end all others within a minute, and let each say which one died and why.

    torch notices in the next exchange, by NCCL only when that times out; launchers kill the others without a reason.
    Here each process is connected to the first one. One that fails sends its error; the system closes the connections
    of one that is killed. Nothing else is sent, and a process that is busy or stopped is not taken for dead.
    """

    def __init__(self) -> None:
        self._watch: _Watch | None = None  # of the run that has begun

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size == 1:
            return
        self._watch = _Watch(getattr(trainer.strategy.launcher, "procs", []))
        with socket.create_server(("", 0)) if trainer.is_global_zero else contextlib.nullcontext() as server:
            mine = (server.getsockname()[1] if server else 0, secrets.token_hex(), _name(trainer))
            port, password, name = trainer.strategy.broadcast(mine)
            try:
                if server:
                    self._watch.accept(server, password, trainer.world_size - 1)
                else:
                    self._watch.connect(os.environ["MASTER_ADDR"], port, f"{password} {_name(trainer)}", name)
            except OSError as error:
                say(f"{_name(trainer)} may be late to notice the end of another one, which it cannot reach: {error}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._watch:
            self._watch.leave(_GOODBYE)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.world_size == 1:
            return
        text = " ".join(f"{type(exception).__name__}: {exception}".split())
        closed = isinstance(exception, RuntimeError) and "gloo" in text
        if closed or isinstance(exception, torch.distributed.DistError):
            if self._watch is None:
                place = ":".join(os.environ.get(key, "") for key in ("MASTER_ADDR", "MASTER_PORT"))
                lost = f"The processes could not meet at {place}. Is the port free, and reached by all? ({text})"
            else:
                reasons = "was killed, hangs, or ended with an error"
                if isinstance(trainer.strategy, ShardedDDPStrategy):
                    reasons += ", or runs other passes, which belong into `collective_passes(module)`"
                unknown = f"{_name(trainer)} can no longer reach another one, which {reasons}. {_ADVICE} ({text[:200]})"
                lost = self._watch.wait() or unknown
            exception.__cause__ = LostProcess(lost)  # which the command line reports instead
        if self._watch:  # all agree on a stop, and the first process may still have to save
            agreed = isinstance(exception, TrainingStopped) and any(
                isinstance(each, StopSignals) and each.stopping for each in callbacks_of(trainer)
            )
            self._watch.leave(_GOODBYE if agreed else f"{_name(trainer)} ended: {text.rstrip(': .')}. {_ADVICE}")


class _Watch:
    """Connections to the first process, in that to all others; a thread for each waits for its only line."""

    def __init__(self, children: list[Any]) -> None:
        self._lost, self._message = threading.Event(), ""
        self._ends, self._children = threading.Event(), children
        self._connections: list[socket.socket] = []

    def accept(self, server: socket.socket, password: str, others: int) -> None:
        """Wait until the others have connected; who does not know the password is none of them."""
        server.settimeout(60)
        while others:
            connection, _ = server.accept()
            connection.settimeout(_GRACE)
            lines, known, name = connection.makefile(encoding="utf-8", errors="replace"), "", ""
            with contextlib.suppress(OSError):  # a stranger may say nothing
                known, _, name = lines.readline().strip().partition(" ")
            if known == password:
                self._listen(connection, lines, name)
                others -= 1
            else:
                connection.close()

    def connect(self, host: str, port: int, greeting: str, name: str) -> None:
        """Connect to the first process."""
        connection = socket.create_connection((host, port), timeout=60)
        connection.sendall(f"{greeting}\n".encode())
        self._listen(connection, connection.makefile(encoding="utf-8", errors="replace"), name)

    def wait(self) -> str:
        """Return who died and why, after waiting a while for that; empty if nobody did."""
        self._lost.wait(_GRACE)
        return self._message

    def leave(self, message: str) -> None:
        """End the connections with a last line."""
        self._ends.set()
        self._send(message)

    def _listen(self, connection: socket.socket, lines: IO[str], name: str) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._connections.append(connection)
        threading.Thread(target=self._wait, args=(connection, lines, name), daemon=True).start()

    def _wait(self, connection: socket.socket, lines: IO[str], name: str) -> None:
        line = ""
        with connection, lines, contextlib.suppress(OSError):
            line = lines.readline().strip()
        if line != _GOODBYE and not self._ends.is_set():
            killed = f"{name} ended without a word: killed (by the system, for want of memory?) or crashed. {_ADVICE}"
            self._lose(line or killed)

    def _lose(self, message: str) -> None:
        """End this process: by the error that its next exchange raises, else after a while."""
        if self._lost.is_set():
            return
        self._message = message
        self._lost.set()
        self._children.clear()  # by which Lightning would kill this process, in the middle of its last hooks
        self._send(message)
        with contextlib.suppress(OSError):  # nobody reads any more
            if self._ends.wait(_GRACE):
                time.sleep(3 * _GRACE)  # it ends by itself, and may have a report to write
            else:
                sys.stdout.flush()
                os.write(2, f"\nqlora-lightning: {message}\n".encode())
        os._exit(1)

    def _send(self, line: str) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):  # it has left
                connection.sendall(f"{line}\n".encode())
                connection.shutdown(socket.SHUT_WR)


def _name(trainer: Trainer) -> str:
    return f"process {trainer.global_rank} of {trainer.world_size} (counted from 0) on {socket.gethostname()}"
