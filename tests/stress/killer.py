"""A callback that kills its own process, at a moment that nothing in the program knows of."""

import os
import signal
import threading
import time

import lightning


class Killer(lightning.Callback):
    """Kill the process so many seconds after training has begun; ``KILL_AFTER`` says how many, without it none.

    Where ``BEGAN_AT`` names a file, the moment at which training began is written there: for who measures a life.
    """

    def on_train_start(self, trainer, pl_module):
        if file := os.environ.get("BEGAN_AT"):
            with open(file, "w") as handle:
                handle.write(str(time.time()))
        if seconds := os.environ.get("KILL_AFTER"):
            timer = threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()
