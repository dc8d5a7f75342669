"""Scenes: coloured, sized and textured shapes on a ground, with exact ground truth.

Boxes are integers [x1, y1, x2, y2] in pixels, continuous convention: a shape of box [10, 10, 30, 30] covers the pixels
10..29 and touches all four sides of its box.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int8, UInt8

from jaxmllm.errors import InputError
from jaxmllm.world.drawing import COLOURS, GROUNDS, SHAPES, TEXTURES, finish, ground, paint, shape_pixels
from jaxmllm.world.streams import PIXELS, SPLITS, Stream, mix, split_index

SPATIAL = ("left of", "right of", "above", "below")
RELATIONS = (*SPATIAL, "next to", "larger than", "smaller than", "same colour as", "same shape as")
ATTRIBUTES = ("size", "texture", "colour", "shape")  # in the order in which English names them
_CANDIDATES = 48  # places tried at a time
_TRIES = 24  # redraws of one object before the scene is started anew


@dataclasses.dataclass(frozen=True)
class SceneSpec:
    """What scenes look like and how hard the questions are. Every field is a difficulty knob."""

    size: tuple[int, int] = (112, 112)  # width, height of the picture, pixels
    objects: tuple[int, int] = (3, 6)  # fewest and most objects, 1..30; drawn evenly
    shapes: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross")  # of drawing.SHAPES
    colours: tuple[str, ...] = ("red", "green", "blue", "yellow", "purple", "cyan")  # of drawing.COLOURS
    # size words with the range of the side as a share of the picture's shorter side; leave gaps between the ranges
    sizes: tuple[tuple[str, float, float], ...] = (("small", 0.14, 0.19), ("large", 0.28, 0.36))
    textures: tuple[str, ...] = ("solid",)  # of drawing.TEXTURES; "solid" is never named in a question
    ground: tuple[str, ...] = ("gradient",)  # of drawing.GROUNDS; each scene draws one
    max_overlap: float = 0.0  # largest share of a box that other boxes may cover, 0..1; same colours never overlap
    gap: int = 1  # pixels kept free between boxes when max_overlap is 0
    noise: float = 4.0  # standard deviation of the pixel noise, levels of 255
    colour_jitter: int = 10  # largest change of a colour channel, levels
    repeat: float = 0.0  # chance that an object copies the look (not the place) of an earlier one: more to count
    # fewest and most relations of an expression: in a chain for grounding (0: attributes only), in a tree for the
    # relations task (which needs one at least)
    depth: tuple[int, int] = (0, 0)
    rivals: int = (
        0  # fewest other objects that the words of a relations expression's root fit: what relations must decide
    )
    verbosity: tuple[int, int] = (0, 2)  # least and most wordy form of expressions in the relations task, 0..2
    relations: tuple[str, ...] = SPATIAL  # of RELATIONS; used in expressions, captions and relation records
    margin: float = 0.03  # dead zone of relations, share of the shorter side; pairs inside it are never asked about
    zero_counts: float = 0.0  # share of counting questions that ask for something absent
    category: tuple[str, ...] = ("shape",)  # attributes that make a detection category, of ATTRIBUTES

    def __post_init__(self):
        for field, known in (
            ("shapes", SHAPES), ("colours", tuple(COLOURS)), ("textures", TEXTURES), ("ground", GROUNDS),
            ("relations", RELATIONS), ("category", ATTRIBUTES),
        ):  # fmt: skip
            values = getattr(self, field)
            if isinstance(values, str) or not values or not set(values) <= set(known):
                raise InputError(f"SceneSpec.{field}: {values!r} must be a non-empty tuple of {', '.join(known)}")
        for field, low, high in (("objects", 1, 30), ("depth", 0, 6), ("verbosity", 0, 2)):
            pair = getattr(self, field)
            if len(pair) != 2 or not low <= pair[0] <= pair[1] <= high:
                raise InputError(f"SceneSpec.{field}: {pair!r} must be (fewest, most) within {low}..{high}")
        if self.rivals < 0:
            raise InputError(f"SceneSpec.rivals: {self.rivals!r} must be at least 0")
        if len(self.size) != 2 or min(self.size) < 16:
            raise InputError(f"SceneSpec.size: {self.size!r} must be (width, height), both at least 16 pixels")
        for field, high in (("max_overlap", 1), ("repeat", 1), ("zero_counts", 1), ("margin", 0.5), ("noise", 128)):
            if not 0 <= getattr(self, field) <= high:
                raise InputError(f"SceneSpec.{field}: {getattr(self, field)!r} must be within 0..{high}")
        if not self.sizes or any(not 0 < low <= high <= 1 for _, low, high in self.sizes):
            raise InputError(f"SceneSpec.sizes: {self.sizes!r} must be (word, low, high) with 0 < low <= high <= 1")

    def sides(self, word: str) -> tuple[int, int]:
        """Smallest and largest side in pixels of a size word."""
        _, low, high = next(size for size in self.sizes if size[0] == word)
        return max(4, round(low * min(self.size))), max(4, round(high * min(self.size)))


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One shape. Its size word belongs to the spec that drew it."""

    shape: str
    colour: str
    size: str
    texture: str
    box: tuple[int, int, int, int]  # x1, y1, x2, y2, pixels
    rgb: tuple[int, int, int]  # the colour after jitter

    @property
    def centre(self) -> tuple[float, float]:
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2

    @property
    def side(self) -> int:
        return self.box[2] - self.box[0]

    def words(self, attributes: Sequence[str]) -> tuple[str, ...]:
        """Values of the named attributes in English order; a solid texture has no word."""
        return tuple(
            getattr(self, name) for name in ATTRIBUTES if name in attributes and getattr(self, name) != "solid"
        )

    def name(self, attributes: Sequence[str] = ATTRIBUTES) -> str:
        """`large red circle`; without the shape the noun is `object`."""
        return phrase(self.words(attributes), "shape" in attributes)


def phrase(words: Sequence[str], has_noun: bool) -> str:
    """Attribute words as a noun phrase."""
    return " ".join(words if has_noun else (*words, "object"))


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects from back to front, and what is behind them. `draw` renders it."""

    spec: SceneSpec
    objects: tuple[SceneObject, ...]
    ground: str  # of drawing.GROUNDS
    address: tuple[int, str, int]  # seed, split, index: where its pixel noise comes from

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, pixels."""
        return self.spec.size

    def draw(self) -> UInt8[np.ndarray, "H W 3"]:
        """The picture."""
        return self.render()[0]

    def render(self) -> tuple[UInt8[np.ndarray, "H W 3"], Int8[np.ndarray, "H W"]]:
        """The picture and the number of the object seen at each pixel, -1 for the ground."""
        return draw_objects(self.objects, self.spec, self.ground, self.address)


def draw_objects(
    objects: Sequence[SceneObject | None],
    spec: SceneSpec,
    kind: str,
    address: tuple[int, str, int],
    frame: int = 0,
) -> tuple[UInt8[np.ndarray, "H W 3"], Int8[np.ndarray, "H W"]]:
    """Draws objects from back to front (None: not in this picture); see `Scene.render`.

    The ground belongs to the address, the noise to the address and the `frame` of a clip.
    """
    width, height = spec.size
    image = ground(kind, width, height, Stream(*address, PIXELS))
    owner = np.full((height, width), -1, np.int8)
    for number, thing in enumerate(objects):
        if thing is not None:
            pixels = shape_pixels(thing.shape, thing.rgb, thing.texture, thing.side)
            paint(image, owner, number, pixels, thing.box[0], thing.box[1])
    return finish(image, spec.noise, Stream(*address, PIXELS, frame + 1)), owner


_ALL_COLOURS = tuple(COLOURS)


def _signature(look: tuple[str, str, str], side, x, y) -> np.ndarray:
    """Hash of one object; a scene's signature is the sum over its objects, so their order does not matter."""
    shape, colour, texture = look
    code = (SHAPES.index(shape) * 16 + _ALL_COLOURS.index(colour)) * 16 + TEXTURES.index(texture)
    place = (np.asarray(x, np.uint64) << np.uint64(16)) + np.asarray(y, np.uint64)
    return mix((np.uint64(code * 4096 + side) << np.uint64(32)) + place)


def signature(objects: Sequence[SceneObject]) -> int:
    """What decides the split of a scene: a hash of the shapes, colours, textures and places of its objects."""
    return sum(
        int(_signature((o.shape, o.colour, o.texture), o.side, o.box[0], o.box[1])) for o in objects
    ) % 2**64  # fmt: skip


class _Layout:
    """Objects placed so far, with the sums that make the next placement cheap."""

    def __init__(self, spec: SceneSpec):
        self.spec = spec
        self.objects: list[SceneObject] = []
        self.boxes = np.zeros((0, 4), np.int64)
        self.covered = np.zeros(0)  # share of each box that later boxes cover
        self.signature = np.uint64(0)

    def place(self, look: tuple[str, str, str, str], side: int, split: int | None, stream: Stream) -> bool:
        """Adds one object at a random free place; with `split`, only where the signature lands in that split."""
        spec, (shape, colour, size, texture) = self.spec, look
        width, height = spec.size
        # a tenth of the places suit val or test: with ten times as many, all splits place objects equally well
        candidates = _CANDIDATES if split is None else 10 * _CANDIDATES
        corner = np.stack([stream.integers(0, limit - side, candidates) for limit in (width, height)], 1)
        total = self.signature + _signature((shape, colour, texture), side, corner[:, 0], corner[:, 1])
        if split is not None:
            suits = np.flatnonzero(split_index(total) == split)[:_CANDIDATES]
            corner, total = corner[suits], total[suits]
        free = np.ones(len(corner), bool)
        shares = np.zeros((len(corner), len(self.boxes)))
        if len(self.boxes):
            low = np.maximum(corner[:, None], self.boxes[None, :, :2] - self._gap)
            high = np.minimum(corner[:, None] + side, self.boxes[None, :, 2:] + self._gap)
            shared = np.clip(high - low, 0, None).prod(-1)
            if spec.max_overlap:
                same = np.array([o.colour == colour for o in self.objects])
                areas = (self.boxes[:, 2] - self.boxes[:, 0]) ** 2
                shares = shared / areas
                free &= (shares + self.covered <= spec.max_overlap).all(1)
                free &= shared.sum(1) <= spec.max_overlap * side**2
                free &= ~((shared > 0) & same).any(1)
            else:
                free &= (shared == 0).all(1)
        if not free.any():
            return False
        k = int(free.argmax())
        x, y = corner[k].tolist()
        box = (x, y, x + side, y + side)
        jitter = spec.colour_jitter
        red, green, blue = (min(max(v + stream.integer(-jitter, jitter), 0), 255) for v in COLOURS[colour])
        self.objects.append(SceneObject(shape, colour, size, texture, box, (red, green, blue)))
        self.boxes = np.concatenate([self.boxes, [box]])
        self.covered = np.append(self.covered + shares[k], 0.0)
        self.signature = total[k]
        return True

    @property
    def _gap(self) -> int:
        return 0 if self.spec.max_overlap else self.spec.gap


def _look(spec: SceneSpec, earlier: Sequence[SceneObject], stream: Stream) -> tuple[str, str, str, str]:
    if earlier and stream.chance(spec.repeat):
        model = stream.choice(earlier)
        return model.shape, model.colour, model.size, model.texture
    return (
        stream.choice(spec.shapes),
        stream.choice(spec.colours),
        stream.choice(spec.sizes)[0],
        stream.choice(spec.textures),
    )


def draw_layout(spec: SceneSpec, split: str, stream: Stream, fewer: int = 0) -> tuple[SceneObject, ...] | None:
    """Objects of one scene, from back to front; None when they found no room and the caller must try again.

    `fewer` lowers the wanted number, for a spec that asks for more than fits.
    """
    wanted = max(spec.objects[0], stream.integer(*spec.objects) - fewer)
    layout = _Layout(spec)
    for k in range(wanted):
        last = SPLITS.index(split) if k == wanted - 1 else None
        for _ in range(_TRIES):
            look = _look(spec, layout.objects, stream)
            if layout.place(look, stream.integer(*spec.sides(look[2])), last, stream):
                break
        else:
            return None
    return tuple(layout.objects)


def make_scene(spec: SceneSpec, seed: int, split: str, index: int, attempt: int = 0) -> Scene:
    """The scene at an address; `attempt` k is the k-th alternative for callers that need a property.

    Raises:
        InputError: `spec` asks for more or larger objects than the picture holds.
    """
    for retry in range(64):
        stream = Stream(seed, split, index, attempt=attempt * 64 + retry)
        objects = draw_layout(spec, split, stream, fewer=retry // 4)
        if objects is not None:
            return Scene(spec, objects, stream.choice(spec.ground), (seed, split, index))
    raise InputError(
        f"SceneSpec.objects: {spec.objects[0]} objects do not fit into {spec.size[0]} x {spec.size[1]} pixels; "
        "lower SceneSpec.objects, shrink SceneSpec.sizes or raise SceneSpec.max_overlap"
    )
