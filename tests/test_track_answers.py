"""UTR tracks: how answers are written and read, corner by corner."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmllm.tasks import track_rewards as tr
from tests.test_tracks import cells, relaxed, words

whole = st.tuples(cells, cells).map(lambda v: [v[0], v[1], v[0] + 3, v[1] + 2])
real = st.dictionaries(st.integers(1, 6), whole, min_size=1, max_size=6)


@relaxed
@given(st.dictionaries(st.integers(1, 99), st.tuples(words, real), max_size=4))
def test_writing_and_parsing_tracks_is_exact(tracks_):
    text = "\n".join(tr.write_track(i, name, track) for i, (name, track) in tracks_.items())
    want = [{"id": i, "name": name, "boxes": dict(track)} for i, (name, track) in tracks_.items()]
    assert tr.parse_tracks(text) == want
    assert tr.format_reward(f"<answer>{text}</answer>", 6) == float(bool(tracks_))


@relaxed
@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), words, max_size=4))
def test_writing_and_parsing_attributes_is_exact(attrs):
    assert tr.parse_attrs(tr.write_attrs(attrs)) == attrs


def test_write_refuses_what_a_line_cannot_carry():
    with pytest.raises(ValueError, match="'<'"):
        tr.write_track(1, "a<b", {1: [0, 0, 1, 1]})
    assert tr.parse_attrs(tr.write_attrs({"k": "a;b<c>"})) == {"k": "a b c"}


ENTRY = "Frame1:[1,2,3,4]"


@pytest.mark.parametrize(
    "text,want",
    [
        (f"Track1: nick<Id1>{ENTRY}</Id1>", [(1, "nick", {1: [1, 2, 3, 4]})]),
        ("track 1 : nick < ID 1 > FRAME 1 : [ 1 , 2.5 , -3 , 4 ] < / iD 1 >", [(1, "nick", {1: [1, 2.5, -3, 4]})]),
        (f"<Id1>{ENTRY};Frame1:[5,6,7,8]</Id1>", [(1, "", {1: [1, 2, 3, 4]})]),  # repeated frame: the first
        (f"<Id1>{ENTRY}</Id1><Id1>Frame2:[5,6,7,8]</Id1>", [(1, "", {1: [1, 2, 3, 4]})]),  # repeated id: the first
        (f"<Id1>{ENTRY}</Id2>", []),  # tags of different ids are no block
        (f"<Id2><Id1>{ENTRY}</Id1>", [(1, "", {1: [1, 2, 3, 4]})]),
        (f"<Id1>{ENTRY}", []),
        ("<Id1></Id1>", [(1, "", {})]),
        ("<Id1>Frame1:[1,2,3];Frame2:[1,2,3,4,5];Frame3:[1,2,3,x];Frame1.5:[1,2,3,4]</Id1>", [(1, "", {})]),
        (f"<Id1>Frame1:[{'9' * 400},2,3,4];Frame2:[1,2,3,4]</Id1>", [(1, "", {2: [1, 2, 3, 4]})]),
        ("<Id1>Frame1:[1e3,2,3,4]</Id1>", [(1, "", {})]),
        (f"Track1: a Track2: b<Id1>{ENTRY}</Id1>", [(1, "b", {1: [1, 2, 3, 4]})]),  # the last on the line
        (f"Track1: a\n b<Id1>{ENTRY}</Id1>", [(1, "", {1: [1, 2, 3, 4]})]),  # the line only
        (f"Track1: <nick><Id1>{ENTRY}</Id1>", [(1, "nick", {1: [1, 2, 3, 4]})]),
        (
            f"Track1: a<Id1>{ENTRY}</Id1>,Track2: b<Id2>{ENTRY}</Id2>",
            [(1, "a", {1: [1, 2, 3, 4]}), (2, "b", {1: [1, 2, 3, 4]})],
        ),
        (f"<Id٣>{ENTRY}</Id٣>", []),  # digits of other scripts are no digits here
    ],
)
def test_parse_corners(text, want):
    assert [(t["id"], t["name"], t["boxes"]) for t in tr.parse_tracks(text)] == want


def test_attributes_keep_the_first_value_in_lower_case():
    text = "<attr>Action = Run ; action=sit;=x;y;k=a=b</attr><attr>z=1</attr>"
    assert tr.parse_attrs(text) == {"action": "Run", "k": "a=b"}
    assert tr.parse_attrs("<attr>a=b") == tr.parse_attrs("") == {}


LINE = f"Track1: nick<Id1>{ENTRY};Frame3:[2,3,4,5]</Id1>"


@pytest.mark.parametrize(
    "text",
    [
        f"<answer>{LINE}</answer>",
        f" <think>it <b>runs</b></think>\n <answer>\n{LINE}\n</answer>\n",
        f"<answer>{LINE}\n<attr>a=b; c=d</attr></answer><|im_end|>",
        f"<answer>{LINE}\n{LINE.replace('1>', '2>')}</answer>",
        f"<ANSWER>{LINE}</Answer>",
    ],
)
def test_well_formed(text):
    assert tr.format_reward(text, 3) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        LINE,
        "<answer></answer>",
        "<answer>nothing moves</answer>",
        f"<answer>{LINE}</answer> done",
        f"so <answer>{LINE}</answer>",
        f"<answer>{LINE}</answer><answer>{LINE}</answer>",
        f"<answer><answer>{LINE}</answer>",
        f"<think><answer>{LINE}</answer>",
        f"<think>a</think><think>b</think><answer>{LINE}</answer>",
        f"<answer>{LINE}</answer><think>a</think>",
        f"<answer>{LINE}<attr>a=b</answer>",
        f"<answer>{LINE}<attr>a=b</attr><attr>a=b</attr></answer>",
        f"<answer>{LINE}\n{LINE}</answer>",  # id twice
        f"<answer>{LINE}</Id1></answer>",
        f"<answer><Id2>{LINE}</Id2></answer>",  # nested
        f"<answer>{LINE}<Id2></answer>",
        f"<answer>{LINE}<Id2></Id2></answer>",  # empty track
        f"<answer><Id1>{ENTRY};{ENTRY}</Id1></answer>",  # frame twice
        "<answer><Id1>Frame0:[1,2,3,4]</Id1></answer>",
        "<answer><Id1>Frame4:[1,2,3,4]</Id1></answer>",
        "<answer><Id1>Frame1.5:[1,2,3,4]</Id1></answer>",
        "<answer><Id1>Frame1:[3,2,1,4]</Id1></answer>",  # inverted
        "<answer><Id1>Frame1:[1,2,1,4]</Id1></answer>",  # no area
        f"<answer><Id1>Frame1:[1,2,3,{'9' * 400}]</Id1></answer>",
        f"<answer><Id1>{ENTRY};Frame2:[1,2,3]</Id1></answer>",  # looks like an entry, is none
        f"<answer><Id1>{ENTRY};Frame2</Id1></answer>",
        f"<answer><Id1>{ENTRY};[5,6,7,8]</Id1></answer>",
    ],
)
def test_malformed(text):
    assert tr.format_reward(text, 3) == 0


def test_only_one_answer_block_counts():
    assert tr.answer_block("a<answer> b </answer>c") == " b "
    assert tr.answer_block("<answer>a</answer><answer>b</answer>") is None
    assert tr.answer_block("<answer>a") is tr.answer_block("") is None
