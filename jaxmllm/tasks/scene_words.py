"""Word lists of the rule-based caption parser (`captioning.parse`); plain data."""

# Nouns that name no visible thing (CAPTURE drops such a list too).
ABSTRACT = frozenset(
    """image picture photo photograph scene view background foreground backdrop setting area space side left right top
    bottom middle center centre corner front back edge distance horizon surface object item element detail color colour
    shape size texture pattern position location place surroundings environment atmosphere mood sense feeling
    composition design style focus attention presence appearance group row line pair set number variety array
    arrangement layout day time moment light lighting shadow reflection contrast perspective angle frame figure
    caption description text kind type sort part portion section rest way addition it them one""".split()
)

COPULA = frozenset("is are was were be been being 's appears seems looks".split())

AND_WORDS = frozenset({",", "and", "or", "&"})

RELATIVE = frozenset("which that who".split())  # a following `is` speaks of the object just named

# Words that end a phrase. Number words do too: they count, they do not describe.
FUNCTION_WORDS = frozenset(
    """a an the this these those some any each every all both several many few more most another other others its
    his her their our my your whom whose where when while as than then there here it they he she we you i
    him them us me and or but so if because also not no nor just only even such to into for from by at about
    what how do does did can could may might will would should must have had been
    one two three four five six seven eight nine ten eleven twelve dozen first second third""".split()
)

# Words between a determiner and its noun that neither name nor describe.
SKIPPED = frozenset("very quite rather so too slightly fairly really somewhat almost also still".split())

# Nouns in -ly; other such words are adverbs and skipped.
LY_NOUNS = frozenset("family butterfly dragonfly belly lily jelly assembly".split())

ADJECTIVES = frozenset(
    """red green blue yellow orange purple violet pink brown black white grey gray cyan magenta teal golden silver beige
    small large big tiny huge little tall short long wide narrow thin thick round square-shaped flat old young new
    bright dark light pale striped dotted spotted checked plain solid wooden metal plastic glass empty full open
    closed wet dry clean dirty soft hard""".split()
)

# Nouns in -ing, which are not actions.
ING_NOUNS = frozenset(
    """building buildings ceiling painting paintings clothing ring string wing king thing things evening morning railing
    awning spring swing earring ceilings bedding crossing wedding awnings parking flooring icing lightning pudding
    dressing landing siding stocking topping""".split()
)

# Finite verbs that often link two objects; after a noun they end its phrase.
VERBS = frozenset(
    """has holds hold wears wear carries carry rides ride sits sit stands stand lies lie hangs hang faces face touches
    touch covers cover surrounds surround contains contain shows depicts features displays includes supports support
    overlaps overlap""".split()
)

PLURALS = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "feet": "foot", "teeth": "tooth",
    "mice": "mouse", "geese": "goose", "leaves": "leaf", "knives": "knife", "shelves": "shelf", "wolves": "wolf",
    "loaves": "loaf", "halves": "half", "scarves": "scarf", "tomatoes": "tomato", "potatoes": "potato",
    "glasses": "glasses", "scissors": "scissors", "pants": "pants", "jeans": "jeans", "shorts": "shorts",
    "gas": "gas", "bus": "bus", "lens": "lens", "buses": "bus", "houses": "house", "horses": "horse",
    "vases": "vase", "roses": "rose", "noses": "nose", "cases": "case", "bases": "base", "purses": "purse",
}  # fmt: skip

# Relation phrases -> canonical words; the longest match wins.
RELATIONS: dict[tuple[str, ...], str] = {
    tuple(phrase.split()): canonical
    for canonical, phrases in {
        "left of": "left of|to the left of|on the left of|on the left side of",
        "right of": "right of|to the right of|on the right of|on the right side of",
        "above": "above|over",
        "below": "below|beneath|under|underneath",
        "on": "on|on top of|onto|upon|atop",
        "in": "in|inside|inside of|within",
        "next to": "next to|beside|near|close to|adjacent to|by the side of",
        "in front of": "in front of|before",
        "behind": "behind|in back of",
        "between": "between|in between",
        "around": "around|surrounding",
        "against": "against",
        "along": "along|alongside",
        "across": "across|across from",
        "through": "through",
        "with": "with",
        "of": "of",
        "larger than": "larger than|bigger than",
        "smaller than": "smaller than",
        "same colour as": "same colour as|same color as|the same colour as|the same color as",
        "same shape as": "same shape as|the same shape as",
    }.items()
    for phrase in phrases.split("|")
}
