"""Builds the tiny tokenizer of `jaxmllm/assets/tiny`.

    python -m jaxmllm.world.tokenizer [FOLDER]

Qwen2.5-VL's special tokens and chat template around a vocabulary of 1,478 entries: the 256 bytes, the integers
0..224, the words of the world and of the tasks' questions, and the punctuation of their answers. A text is cut into the
fewest pieces that spell it, so a coordinate is one token, and any text survives encoding and decoding unchanged because
its bytes are pieces too.
"""

import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import ByteLevel

from jaxmllm.world.clips import MOTIONS, STILL
from jaxmllm.world.drawing import COLOURS, SHAPES, TEXTURES
from jaxmllm.world.scenes import RELATIONS
from jaxmllm.world.words import PAGE_WORDS, RECEIPT_ITEMS, RECEIPT_WORDS

FOLDER = Path(__file__).parents[1] / "assets" / "tiny"
LARGEST_INTEGER = 224
SIZE = 1478  # entries, fixed: spare pieces fill it up, so that a new piece takes a spare one's id and moves no other
SPECIAL_TOKENS = (  # Qwen2.5-VL's, in its order
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
CHAT_TEMPLATE = """\
{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}\
{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for content in message['content'] %}\
{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}\
{% set image_count.value = image_count.value + 1 %}\
{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif content['type'] == 'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}\
{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>\
{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# Runs of characters that the tasks' answers are made of.
ANSWER_PIECES = (
    '```json\n[\n\t{"bbox_2d": [', '```json\n[\n\t{"point_2d": [', '"},\n\t{"bbox_2d": [', '], "label": "',
    '"}\n]\n```', "```json\n[]\n```", "```json\n", "\n```", '[{"bbox_2d": [', '"}, {"bbox_2d": [', '{"bbox_2d": [',
    '"}]', "]}]", ", ", '": "', '": ', '"}', '{"', "),(", "<think>", "</think>", "<think></think>", "<answer>",
    "</answer>", "</think><answer>", "<answer>\n", "\n</answer>", "<attr>", "</attr>",
    "</attr>\n</answer>", "<Id", "</Id", ">Frame",
    "];Frame", "]</Id", ":[", "],[", "Track", "Frame", "Picture ", "Video ", ": ", "; ", ". ", ".\n", "'s", "...",
    '{"match": true, "bbox_2d": [', '{"match": false, "relation": "R', "]}", '"bbox_2d": [', '"match": ', '"relation": "',
    "<Id1>Frame1:[", "</Id1>", "Its path is", "There is no", " in the given frames.", "this ", "];", ",<Id",
    "action=", "; location=", "appearance=", "; action=", "; frames=", "frames=",
    "system\nYou are a helpful assistant.", "You are a helpful assistant.", "system\n", "user\n", "assistant\n",
)  # fmt: skip
# Questions that never vary, or their parts around what varies: a question costs little more than its subject.
QUESTION_PIECES = (
    "Output the bounding box of the", " in the image.", "Output all the bounding boxes of the",
    " in the image. Report the bbox coordinates in JSON format.", ". Report the bbox coordinates in JSON format.",
    " Report the bbox coordinates in JSON format.", "Please output bbox coordinates and names of", "OCR this image.",
    " Output the thinking process in <think> </think> and final answer (number) in <answer> </answer> tags.",
    "Describe this image in detail.", "Give a detailed description of the image.",
    "What can be seen in this image? Describe it thoroughly.", "Write a detailed caption for this picture.",
    "Describe everything you see in the picture, with the details.", "The image shows", " and then",
    "Answer as <answer>, one line Track k: name<Id k>Frame t:[xmin,ymin,xmax,ymax];...</Id k> per subject",
    "Write each trajectory as Track k: name<Id k>Frame t:[xmin,ymin,xmax,ymax];...</Id k>.", ", then <attr>",
    "Reason between <think> and </think> first. ", "</attr>, </answer>.", ", </answer>.", "action=...", "; location=...",
    "[xmin,ymin,xmax,ymax]", "<Idi>Frame t:[xmin,ymin,xmax,ymax]</Idi>", " in the format ", " as a short answer",
    "[x0,y0,x1,y1] for the objects you mention", "<image>", "<image>\n", " category:[xmin,ymin,xmax,ymax]",
    "appearance=...", "; action=...", "; frames=...", " frames, Frame1 to Frame", "The clip has ",
)  # fmt: skip

# Words that also start a text or follow a quotation mark: one piece with a leading blank and one without.
_WORLD_WORDS = (
    *SHAPES, *COLOURS, *TEXTURES, *MOTIONS, STILL, *RELATIONS,
    "small medium large object objects shape colour left right upper lower top bottom centre middle",
    "circles squares triangles stars crosses rings diamonds hexagons",
    "no one two three four five six seven eight nine ten",
    *PAGE_WORDS, *RECEIPT_ITEMS, *RECEIPT_WORDS,
    "RBC WBC Platelets red white blood cell cells",  # for fine-tuning on blood-cell photographs
)  # fmt: skip
# Words inside sentences: with a leading blank only.
_INNER_WORDS = """
    A Answer B C Can D Describe Find Frame Give JSON Keep Name Now Options Output Please Put Reply Report
    Respond Return Say State Stick The This Track Treat What Who You Your a about above absent action after all
    along also an and answer any appear appearance appears are as at bbox be before below between bounding box
    boxes but by can caption captioning category clip closely comprehension coordinates correct count decide
    decides describe description detail detailed details detect detection do does doing down each either else
    end every everything exactly expert expression false far final find first fit fits follow for format frame
    frames from future generation give given go going happens has have heading holds how identify identity image
    in instead into is it its judge letter like likely line list locate location look looks many match me
    mention mismatch motion move moves moving must name names need next not nothing numbered object of on one
    option or other otherwise out output overall path per phrase picture point position predict prediction
    present probably process question quickly reason reasoning referring relation relations reply report request
    respond result same say second see seen sentence set short should show shows slowly so something start stay
    subject subjects summarise tags task tell than that the their them then there these they thing things think
    thinking this thoroughly through to trace track tracking tracks trajectories trajectory true up video visual
    wanted what whatever when where whether which who whole will with within write written wrong yes you your
""".split()
# Words that start a sentence: without a blank.
_FIRST_WORDS = """
    A After Also An And Answer As Carry Close Could Count Describe Do Expression Find Finish Follow For From
    Future Give Given Here How Identify If Image In Is It Its JSON Judging Keep List Locate Look Name No OCR
    Object Output Over Please Predict R1 R2 R3 Referring Relations Report Say Solve Someone Starting Task Tell
    The Then There This Trace Track Trajectory Video We What When Where Which Who Write Yes Your absent bbox
    captioning describe detect false frame future give image in json label match move null point predict
    referring relation say stay subject track trajectory true video visual yes
""".split()
# Added later: at the end, where each takes a spare id and moves no other.
_LATER_PIECES = (
    "Does this expression fit an object in the image? Expression:", "\nRelations:\nR", " \u2014 ", "\nR", " number", " none",
    '\nIf it fits one, answer {"match": true, "bbox_2d": [x1, y1, x2, y2]} with the box of that object. If it fits none, '
    'exactly one of the relations is wrong: answer {"match": false, "relation": "R1"} with its number. Write one JSON '
    "object.",
)  # fmt: skip


def pieces() -> list[str]:
    """All pieces of two bytes or more, in the order of their ids."""
    world = dict.fromkeys(word for entry in _WORLD_WORDS for word in entry.split())
    found = [str(n) for n in range(10, LARGEST_INTEGER + 1)]
    found += [f"{n:03d}" for n in range(100)]  # trajectories are written with three digits
    found += [form for word in world for form in (" " + word, word)]
    found += [" " + word for word in _INNER_WORDS] + list(_FIRST_WORDS) + list(ANSWER_PIECES) + list(QUESTION_PIECES)
    found += _LATER_PIECES
    found = [piece for piece in dict.fromkeys(found) if len(piece.encode()) > 1]
    return found + [f"<spare {k}>" for k in range(SIZE - 256 - len(SPECIAL_TOKENS) - len(found))]


def build() -> Tokenizer:
    """The tokenizer: byte-level, ids 0..255 the bytes, then `pieces()`, then the special tokens."""
    letters = ByteLevel(add_prefix_space=False, use_regex=False)  # spells bytes as printable characters

    def spell(text: str) -> str:
        return letters.pre_tokenize_str(text)[0][0]

    # Sorting by character code keeps the ids the same whatever order the library lists its alphabet in.
    vocabulary = sorted(ByteLevel.alphabet()) + [spell(piece) for piece in pieces()]
    # With equal scores the best segmentation of a unigram model is the shortest one.
    tokenizer = Tokenizer(Unigram([(piece, -1.0) for piece in vocabulary]))
    tokenizer.pre_tokenizer = letters
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def write(folder: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, as transformers' AutoTokenizer reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    build().save(str(folder / "tokenizer.json"))
    config = {
        "additional_special_tokens": [t for t in SPECIAL_TOKENS if t not in ("<|endoftext|>", "<|im_end|>")],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
