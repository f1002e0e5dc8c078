"""What ``--help`` of fit, validate, test and predict says beside all of their options."""

import jsonargparse

from qlora_lightning.commands.option_parser import ParagraphFormatter

_KEYS = """Every key of the YAML is an option: model.rank is --model.rank. What is typed counts more than what --config
says. --model.help and --data.help explain the keys of these two."""
_JUDGED = """The adapter judged is the run folder's, unless --ckpt_path or --model.adapter name another; config.yaml in
a run folder is the config of that run."""
_DESCRIPTIONS = {
    "fit": """Train adapters on the quantized base of a config. All that comes of it lies in the run folder,
trainer.default_root_dir: adapter, checkpoints, metrics, report. One that holds a run is never started over; with
--ckpt_path last it goes on where it was.""",
    "validate": f"""Loss, perplexity and token accuracy on the rows of data.val. {_JUDGED}""",
    "test": f"""Loss, perplexity and token accuracy on the rows of data.test. {_JUDGED}""",
    "predict": f"""Answer the rows of data.predict greedily, into predictions.jsonl in the run folder. {_JUDGED}""",
}
_RUN = "runs/quickstart/config.yaml"
EXAMPLES = {
    "fit": """  qlora-lightning fit --config configs/quickstart.yaml
  qlora-lightning fit --config configs/quickstart.yaml --model.rank 16 --trainer.default_root_dir runs/rank-16
  qlora-lightning fit --config configs/quickstart.yaml --ckpt_path last --trainer.max_epochs 2""",
    "validate": f"  qlora-lightning validate --config {_RUN}",
    "test": f"  qlora-lightning test --config {_RUN} --data.test configs/quickstart/val.jsonl",
    "predict": f"  qlora-lightning predict --config {_RUN} --data.predict configs/quickstart/val.jsonl",
}


class HelpFormatter(ParagraphFormatter, jsonargparse.DefaultHelpFormatter):
    """jsonargparse's, with our paragraphs."""


def help_of(verb: str) -> dict[str, str]:
    """Give the arguments of a command's parser that make its help."""
    return {
        "usage": f"qlora-lightning {verb} --config FILE [--KEY.NAME VALUE …]",
        "description": f"{_DESCRIPTIONS[verb]}\n\n{_KEYS}\n\nexamples:\n{EXAMPLES[verb]}",
    }
