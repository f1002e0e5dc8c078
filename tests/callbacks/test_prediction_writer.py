import json

import pytest

from qlora_lightning import PredictionWriter

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")


@pytest.fixture
def predict(make_module, make_data, make_trainer, monkeypatch, tmp_path):
    # Answers of a random base run on until they are cut: two tokens will do.
    from qlora_lightning.model import generate

    plain = generate._generate
    monkeypatch.setattr(generate, "_generate", lambda *arguments: plain(*arguments[:-1], 2))

    def run(rows, **options):
        file = tmp_path / "questions.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data, module = make_data(predict=str(file), **options), make_module()
        answers = make_trainer(PredictionWriter()).predict(module, datamodule=data)
        lines = (tmp_path / "run" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines], [a for batch in answers for a in batch], data

    return run


def test_each_row_has_its_line_in_order_with_its_own_answer_and_the_models(predict, capsys, tmp_path):
    rows = [{"instruction": "Say " + "so " * (9 - n), "output": f"ja „{n}“"} for n in range(5)]
    lines, answers, data = predict(rows)
    assert [line["row"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["input"] for line in lines] == rows
    assert [line["reference"] for line in lines] == [row["output"] for row in rows]
    assert [line["prediction"] for line in lines] == [data.tokenizer.decode(answer) for answer in answers]
    assert "„" in (tmp_path / "run" / "predictions.jsonl").read_text(encoding="utf-8")
    out = " ".join(capsys.readouterr().out.split())
    assert "5 predictions:" in out
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["predictions.jsonl"]


def test_rows_without_answers_are_answered_too(predict):
    lines, _, _ = predict([{"instruction": "Count to 3."}, {"instruction": "Count to 4.", "output": "1 2 3 4"}])
    assert [line["reference"] for line in lines] == [None, "1 2 3 4"]


def test_batches_of_another_size_give_the_same_lines(predict):
    rows = [{"instruction": f"Count to {n}." * n} for n in range(1, 6)]
    assert predict(rows, batch_size=1)[0] == predict(rows, batch_size=3)[0]
