import pytest

from qlora_lightning.commands.inspect.ends import Ends, count_ends, word_ends


def test_stop_tokens_count_where_they_are_labelled(sample_set):
    samples = sample_set("{q}<a}>", "{q}<a>", "{q}<a}b}>", "q}<ab>")
    assert count_ends(samples, [ord("}")], None) == Ends(samples=4, stopping=2, with_bos=None, doubled=0)


def test_a_bos_is_looked_for_at_the_start_alone(sample_set):
    samples = sample_set("^q^<a}>", "^^q<a}>", "q^<a}>", "^")
    assert count_ends(samples, [ord("}")], ord("^")) == Ends(samples=4, stopping=3, with_bos=3, doubled=1)


@pytest.mark.parametrize(
    ("ends", "well", "words"),
    [
        (Ends(9, 9, 9, 0), [True, True], ["every sample trains one", "every sample begins with exactly one."]),
        (Ends(9, 7, 0, 0), [False, True], ["2 of 9 samples do not train one", "no sample begins with it"]),
        (Ends(9, 0, 9, 4), [False, False], ["no sample trains one", "4 of 9 samples begin with two."]),
        (Ends(9, 9, 5, 0), [True, False], ["every sample trains one", "5 of 9 samples begin with one."]),
        (Ends(9, 9, None, 0), [True, True], ["every sample trains one", "this tokenizer has none."]),
    ],
)
def test_each_is_a_sentence(ends, well, words, characters):
    characters.bos_token, characters.bos_token_id = "^", 94
    sentences = word_ends(ends, characters, [ord("}")])
    assert [holds for holds, _ in sentences] == well
    assert all(word in sentence for word, (_, sentence) in zip(words, sentences, strict=True))
    assert sentences[0][1].startswith("Stop token } (125): ")
