from qlora_lightning.data.prompts import Prompt, PromptLoader

PROMPTS = [Prompt([number], str(number), number, {"n": number}) for number in range(3)]


def test_batches_hold_what_generation_and_its_report_need():
    assert list(PromptLoader(PROMPTS, 2, [2])) == [
        {
            "prompt_ids": [[0], [1]],
            "stop_ids": [2],
            "references": ["0", "1"],
            "row_ids": [0, 1],
            "rows": [{"n": 0}, {"n": 1}],
        },
        {"prompt_ids": [[2]], "stop_ids": [2], "references": ["2"], "row_ids": [2], "rows": [{"n": 2}]},
    ]


def test_a_rank_without_rows_has_an_empty_batch():
    batches = list(PromptLoader(PROMPTS, 1, [2], rank=1, world_size=2))
    assert [batch["row_ids"] for batch in batches] == [[1], []]
    assert len(PromptLoader(PROMPTS, 1, [2], rank=1, world_size=2)) == 2
