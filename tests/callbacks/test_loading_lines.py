import pytest
import torch

from qlora_lightning import AdapterCheckpoint, LoadingLines


# PEFT 0.21 asks transformers 5.24 for an attribute by its old name: whoever runs the three lines sees it.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_three_printed_lines_load_the_adapter_with_plain_peft(fit, capsys):
    _, module = fit(LoadingLines(), AdapterCheckpoint(), limit_train_batches=2)
    text = capsys.readouterr().out
    lines = text[text.index("from peft") :].strip().splitlines()
    assert len(lines) == 3
    loaded = {}
    exec("\n".join(lines), loaded)
    ids = torch.tensor([loaded["tokenizer"]("Count to 3.")["input_ids"]])
    with torch.no_grad():
        module.eval()
        ours = module.model(input_ids=ids).logits.float()
        theirs = loaded["model"](input_ids=ids).logits.float()
        with module.model.disable_adapter():
            base = module.model(input_ids=ids).logits.float()
    assert (ours - theirs).norm() < 0.05 * (ours - base).norm()


def test_a_trial_run_prints_none(fit, capsys):
    fit(LoadingLines(), fast_dev_run=True)
    assert "from peft" not in capsys.readouterr().out
