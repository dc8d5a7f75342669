"""Page OCR: printed numbers, the edit-distance recurrence, NLTK's BLEU and METEOR figures."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmllm.tasks import ocr
from tests.support.answer_texts import END, PAD, near

pytestmark = pytest.mark.filterwarnings("error")

FOX = "The quick brown fox jumps over"


def test_ocr_reward():
    assert ocr.edit_similarity("The quick brwn fox jumps", FOX) == near(0.8)
    assert ocr.edit_similarity("The  quick\n brown   fox ", "The quick brown fox") == 1
    assert ocr.edit_similarity("", "", rules="released") == 0
    assert ocr.edit_similarity(" ", "\n") == 1
    assert ocr.edit_similarity("", "a") == ocr.edit_similarity("", "a", rules="released") == 0
    assert ocr.reward(f"{FOX}{END}{PAD}", {"text": FOX}) == 1


@given(st.text("ab ", max_size=8), st.text("ab ", max_size=8))
def test_edit_similarity_against_the_recurrence(a, b):
    left, right = " ".join(a.split()), " ".join(b.split())
    row = list(range(len(right) + 1))
    for i, x in enumerate(left, 1):
        previous, row = row, [i]
        for j, y in enumerate(right, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (x != y)))
    longest = max(len(left), len(right))
    assert ocr.edit_similarity(a, b) == pytest.approx(1 - row[-1] / longest if longest else 1)


def test_ocr_metrics():
    figures = ocr.page_metrics("The quick brwn fox jumps", FOX)
    assert figures["edit_distance"] == near(0.2) and figures["precision"] == near(0.8)
    assert figures["recall"] == near(2 / 3) and figures["f1"] == near(0.7272727)
    assert figures["bleu"] == 0  # no common 3-gram, no smoothing
    assert ocr.page_metrics("a  b", "a b")["edit_distance"] == 0.25  # blanks are not collapsed
    assert ocr.page_metrics("a a a", "a b")["precision"] == 1  # sets of words
    empty = ocr.page_metrics("", "a b")
    assert (empty["edit_distance"], empty["precision"], empty["f1"], empty["bleu"]) == (1, 0, 0, 0)
    assert ocr.page_metrics("", "")["edit_distance"] == 0
    empty = ocr.page_metrics("", "a b", rules="released")
    assert empty["precision"] is empty["f1"] is None and (empty["recall"], empty["edit_distance"]) == (0, 1)
    blank = ocr.page_metrics("a b", " ", rules="released")
    assert blank["recall"] is blank["f1"] is None and blank["precision"] == 0
    assert ocr.page_metrics("a", "b", rules="released")["f1"] == 0
    chinese = ocr.page_metrics("我爱你", "我爱他")
    assert 0 < chinese["f1"] < 1 and chinese["edit_distance"] == near(1 / 3)
    both = ocr.OCR().metric(["a b", "x"], [{"text": "a b"}, {"text": "y"}])
    assert both["edit_distance"] == 0.5 and both["f1"] == 0.5


GUIDE = "It is a guide to action which ensures that the military always obeys the commands of the party".split()
PARTY = "It is a guide to action that ensures that the military will forever heed Party commands".split()


def test_bleu_and_meteor_print_nltk_s_numbers():
    assert ocr.meteor(GUIDE, PARTY) == pytest.approx(0.6944444444444445)  # the example of NLTK's documentation
    assert ocr.bleu(GUIDE, PARTY) == pytest.approx(0.41180376356915777)
    assert ocr.bleu(FOX.split(), FOX.split()) == pytest.approx(1)
    line = ["天", "\n", "安", " ", "门"]  # as a Chinese cutter gives them: other blanks are other words
    assert ocr.bleu(line, line) == pytest.approx(1)
    assert 0 < ocr.bleu(line, [*line[:3], "\n", "门", "\n", *line]) < 1
    assert ocr.bleu(line, ["\u3000" if word == " " else word for word in line]) == 0  # no common 4-gram
    assert ocr.meteor(["a"], ["b"]) == ocr.meteor([], ["b"]) == ocr.bleu([], ["b"]) == 0


def test_meteor_stages():
    stem = lambda word: word.rstrip("s")  # noqa: E731
    assert ocr.meteor(["dogs", "bark"], ["dog", "bark"]) == pytest.approx((1 - 0.5) * 0.5)
    assert ocr.meteor(["dogs", "bark"], ["dog", "bark"], stem) == pytest.approx(1 - 0.5 / 8)
    synonyms = {"hounds": {"dogs"}}.get
    paired = ocr.meteor(["hounds", "bark"], ["dogs", "bark"], None, lambda word: synonyms(word, set()))
    assert paired == pytest.approx(1 - 0.5 / 8)
