import pytest

from qlora_lightning.evaluation.scores import Judgement


@pytest.fixture
def judged():
    """Make a judgement: loss per token over some tokens, and scores of an answer."""

    def make(loss=1.0, tokens=1, correct=0, answer=None, stopped=True, answer_tokens=0, **scores):
        return Judgement(loss * tokens, tokens, correct, answer, answer_tokens, stopped, scores)

    return make
