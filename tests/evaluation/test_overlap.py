import pytest

from qlora_lightning.evaluation.overlap import chrf, rouge_l


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    # common: the, sat = 2 of 3 words answered and of 4 words wanted
    assert rouge_l("The dog sat", "the cat sat down") == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))


@pytest.mark.parametrize("score", [rouge_l, chrf])
def test_the_reference_itself_scores_one_and_nothing_scores_zero(score):
    assert score("one two three", "one two three") == pytest.approx(1.0)
    assert score("", "one two three") == 0.0
    assert score("xyz", "one two three") < 0.1


def test_chrf_counts_n_grams_of_characters_and_words():
    # 1-grams of characters: 2 of 2 answered and 2 of 3 wanted; 2-grams: 1 of 1 and 1 of 2; longer ones, and words of
    # 1 and 2: none. The mean over 6 + 2 orders of F2 = 5 P R / (4 P + R).
    f_one, f_two = 5 * (2 / 3) / (4 + 2 / 3), 5 * (1 / 2) / (4 + 1 / 2)
    assert chrf("ab", "abc") == pytest.approx((f_one + f_two) / 8)


def test_nothing_is_downloaded_and_no_natural_language_toolkit_is_needed():
    import sys

    rouge_l("a b", "a c")
    assert "nltk" not in sys.modules
