"""``fit``'s own parser, of which only the module and the data are made: no trainer, no model, no run folder."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from qlora_lightning.commands.plan.tokenizer import find_tokenizer
from qlora_lightning.commands.training import QLoRACLI


class PlanCLI(QLoRACLI):
    """Parse a config as ``fit`` does, and hand it to a function.

    Args:
        args: Of LightningCLI.
        use: Takes the module, the data module, why the data cannot be read here (or ``None``), and the whole config.
        kwargs: Of LightningCLI.
    """

    def __init__(self, *args: Any, use: Callable[[Any, Any, str | None, dict[str, Any]], None], **kwargs: Any) -> None:
        self._use = use
        super().__init__(*args, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        settings = self.config["fit"]
        settings["ckpt_path"] = None
        for name in ("logger", "callbacks", "plugins", "profiler"):  # they may write, or ask for devices
            settings["trainer"][name] = None

    def instantiate_classes(self) -> None:
        """Make module and data, hand them on, and run nothing."""
        arguments, why_not = self.config["fit"]["data"].get("init_args") or {}, None
        if "tokenizer" in arguments:
            arguments["tokenizer"], why_not = find_tokenizer(arguments["tokenizer"])
        self.config_init = self.parser.instantiate_classes(self.config)
        self.datamodule, self.model = self._get(self.config_init, "data"), self._get(self.config_init, "model")
        self._use(self.model, self.datamodule, why_not, self.config["fit"].as_dict())
        self.subcommand = None
