"""Random scenes of shapes for the tests of relations: plain dicts, drawn here without the library."""

SIDES = {"small": (28, 41), "medium": (56, 73), "large": (92, 113)}
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "orange", "pink")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")


def scene(rng, count=None, canvas=448):
    """Objects {"box", "size", "texture", "colour", "shape"} whose boxes do not touch."""
    count = int(rng.integers(5, 15)) if count is None else count
    objects = []
    for _ in range(400):
        if len(objects) == count:
            break
        size = tuple(SIDES)[rng.integers(3)]
        side = int(rng.integers(*SIDES[size]))
        x, y = map(int, rng.integers(0, canvas - side, 2))
        box = [x, y, x + side, y + side]
        if all(
            box[2] < o["box"][0] or box[0] > o["box"][2] or box[3] < o["box"][1] or box[1] > o["box"][3]
            for o in objects
        ):
            objects.append(
                {
                    "box": box,
                    "size": size,
                    "texture": ("solid", "striped")[rng.integers(2)],
                    "colour": COLOURS[rng.integers(8)],
                    "shape": SHAPES[rng.integers(6)],
                }
            )
    return objects
