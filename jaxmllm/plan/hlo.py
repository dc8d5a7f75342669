"""What a compiled program does on one device, read from its text: products, memory traffic, messages to other devices.

XLA's own cost analysis counts the body of a loop once. Here a loop's body counts as often as the loop runs: XLA notes the
number on CPU and GPU, on TPU it stands in the loop's condition, and a loop without a fixed end is told from outside.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from jaxmllm.plan.flops import cudnn_products, kernel_blocks

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
    "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
ARRAY = re.compile(r"([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\](\{[^}]*\})?")
HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# neither moves a byte: names, parts and the ends of what was started before
FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "iota", "domain", "while", "conditional", "call",
)  # fmt: skip
RAW = ("constant", "parameter")  # a value or number in place of operands
PARTS = ("dynamic-slice", "slice", "gather")  # read no more than they return


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes
    root: bool

    def dims(self) -> tuple[int, ...]:
        return _dims(self.shape)

    def called(self) -> list[str]:
        return re.findall(r"(?:calls|to_apply|body|called_computation)=%?([\w.\-]+)", self.rest)


@dataclasses.dataclass(frozen=True)
class Message:
    """One collective: what it moves and among whom."""

    kind: str
    size: float  # bytes on a device: gathered, reduced or exchanged whole
    group: tuple[int, ...]  # positions in the mesh of the devices of one group


@dataclasses.dataclass
class Cost:
    """Of one device. `messages`: how often each is sent."""

    flops: float = 0.0
    bytes: float = 0.0
    messages: dict[Message, float] = dataclasses.field(default_factory=dict)

    def add(self, other: "Cost", times: float = 1.0) -> None:
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        for message, n in other.messages.items():
            self.messages[message] = self.messages.get(message, 0.0) + times * n


def _dims(shape: str) -> tuple[int, ...]:
    found = ARRAY.search(shape)
    return tuple(int(n) for n in found[2].split(",") if n) if found else ()


def _size(shape: str, fast: bool = True) -> float:
    """Bytes of a shape or tuple in main memory; without `fast`, those in the chip's own memory, S(1), count as well."""
    return sum(
        BYTES.get(kind, 1) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims, layout in ARRAY.findall(shape)
        if not (fast and "S(" in layout)
    )


def _close(text: str) -> int:
    """Index of the bracket that closes the one at 0."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return i
    raise ValueError(f"no closing bracket: {text[:80]}")


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Computations by name, each its instructions by name, and the name of the entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    text = re.sub(r'\{\n(?=")|(?<=")\n(?=\})', lambda found: found[0].strip(), text)  # a kernel's notes span lines
    for line in text.splitlines():
        if header := HEADER.match(line):
            current = computations.setdefault(header[1], {})
            entry = header[1] if line.startswith("ENTRY") else entry
        elif current is not None and (found := LINE.match(line)):
            body = found[3]
            end = _close(body) + 1 if body.startswith("(") else body.index(" ")
            shape, body = body[:end], body[end:].lstrip()
            opcode, _, body = body.partition("(")
            end = _close("(" + body)
            operands = tuple(re.findall(r"%([\w.\-]+)", body[: end - 1])) if opcode not in RAW else (body[: end - 1],)
            current[found[2]] = Instruction(found[2], shape, opcode, operands, body[end:], bool(found[1]))
    return computations, entry


class Program:
    """A compiled program. `steps`: times a loop without a fixed end runs. `chosen`: share of a conditional's runs that take
    its last (true) branch."""

    def __init__(self, text: str, steps: int = 1, chosen: float = 1.0):
        self.computations, self.entry = parse(text)
        self.steps, self.chosen = steps, chosen
        self.unknown_loops = 0

    @functools.cached_property
    def cost(self) -> Cost:
        return self._computation(self.entry)

    @functools.cache  # noqa: B019 (as long-lived as the program)
    def _computation(self, name: str) -> Cost:
        cost = Cost()
        for one in self.computations[name].values():
            self._instruction(one, self.computations[name], cost)
        return cost

    def _instruction(self, one: Instruction, scope: dict[str, Instruction], cost: Cost) -> None:
        code = one.opcode
        if code == "while":
            condition, body = (_named(part, one.rest) for part in ("condition", "body"))
            cost.add(self._computation(body), self._trips(one, condition, body))
        elif code == "conditional":
            first, last = self._branches(one)
            cost.add(self._computation(first), 1 - self.chosen)
            cost.add(self._computation(last), self.chosen)
        elif code in ("call", "async-start"):
            for name in one.called():
                cost.add(self._computation(name))
        elif code.removesuffix("-start") in COLLECTIVES:
            message = _message(one)
            cost.add(Cost(0, 2 * message.size, {message: 1.0}))
        elif code == "fusion":
            cost.add(Cost(self._products(one.called()[0]), self._fused_bytes(one, scope)))
        elif not code.endswith("-done") and code not in FREE:
            cost.add(Cost(_product(one, scope), _bytes(one, scope)))
            if code == "custom-call":
                cost.add(_kernel(one))

    def _branches(self, one: Instruction) -> tuple[str, str]:
        if listed := re.search(r"branch_computations=\{([^}]*)\}", one.rest):
            names = re.findall(r"%?([\w.\-]+)", listed[1])
            return names[0], names[-1]
        true, false = (_named(f"{kind}_computation", one.rest) for kind in ("true", "false"))
        return false, true

    def _trips(self, loop: Instruction, condition: str, body: str) -> int:
        if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
            return int(noted[1])
        # a scan counts up from 0: its condition is `counter < constant`
        scope = self.computations[condition]
        root = next(one for one in scope.values() if one.root)
        if root.opcode == "compare" and "direction=LT" in root.rest:
            end = self._constant(root.operands[-1], scope)
            if end is not None:
                return math.ceil(end / self._step(_part(root.operands[0], scope), body))
        self.unknown_loops += 1
        return self.steps

    def _step(self, counter: int, body: str) -> int:
        """What a loop's body adds to a part of its carry: 2 in products that the compiler overlaps with messages."""
        scope = self.computations[body]
        root = next(one for one in scope.values() if one.root)
        new = scope.get(root.operands[counter]) if root.opcode == "tuple" and counter < len(root.operands) else None
        if new is not None and new.opcode == "add":
            for name, other in (new.operands, new.operands[::-1]):
                step = self._constant(other, scope)
                if step and _part(name, scope) == counter:
                    return step
        return 1

    @staticmethod
    def _constant(name: str, scope: dict[str, Instruction]) -> int | None:
        one = scope.get(name)
        if one is not None and one.opcode == "constant" and re.fullmatch(r"-?\d+", one.operands[0]):
            return int(one.operands[0])
        return None

    @functools.cache  # noqa: B019
    def _products(self, name: str) -> float:
        """FLOPs inside a fusion, fusions in it included."""
        total, scope = 0.0, self.computations[name]
        for one in scope.values():
            total += self._products(one.called()[0]) if one.opcode == "fusion" else _product(one, scope)
        return total

    def _fused_bytes(self, fusion: Instruction, scope: dict[str, Instruction]) -> float:
        inside = fusion.called()[0]
        inner = self.computations[inside]
        root = next(one for one in inner.values() if one.root)
        total = 0.0
        for one in [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]:
            written = _through(one, inner)
            in_place = written.opcode == "dynamic-update-slice"
            part = inner[written.operands[1]].shape if in_place else one.shape
            outside = fusion.shape if root.opcode != "tuple" else one.shape
            total += _size(part, False) if _size(outside) else 0
        for parameter, name in zip(_parameters(inner), fusion.operands, strict=False):
            if name not in scope or not _size(scope[name].shape):
                continue
            total += min(self._read(parameter, inside), _size(scope[name].shape))
        return total

    @functools.cache  # noqa: B019
    def _users(self, computation: str) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for one in self.computations[computation].values():
            for name in one.operands:
                users.setdefault(name, []).append(one)
        return users

    def _read(self, one: Instruction, computation: str) -> float:
        """Bytes that a fusion reads of a parameter: the parts that it or a fusion in it cuts out, nothing of what it writes
        into."""
        whole, total = _size(one.shape, False), 0.0
        if one.root:  # handed on as it is
            return whole
        for user in self._users(computation).get(one.name, ()):
            if user.opcode in PARTS and user.operands[0] == one.name:
                total += _size(user.shape, False)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == one.name:
                continue
            elif user.opcode in ("bitcast", "reshape"):
                total += self._read(user, computation)
            elif user.opcode == "fusion":
                inside = user.called()[0]
                own = zip(_parameters(self.computations[inside]), user.operands, strict=False)
                total += sum(self._read(parameter, inside) for parameter, name in own if name == one.name)
            else:
                return whole
        return min(total, whole)


def _part(name: str, scope: dict[str, Instruction]) -> int:
    """Which part of a tuple an instruction takes; 0 for another."""
    one = scope.get(name)
    found = re.search(r"index=(\d+)", one.rest) if one is not None and one.opcode == "get-tuple-element" else None
    return int(found[1]) if found else 0


def _parameters(computation: dict[str, Instruction]) -> list[Instruction]:
    """In order of their numbers: the text after `parameter(`."""
    return sorted(
        (one for one in computation.values() if one.opcode == "parameter"), key=lambda one: int(one.operands[0])
    )


def _named(attribute: str, text: str) -> str:
    """The computation that an instruction's attribute names."""
    found = re.search(rf"{attribute}=%?([\w.\-]+)", text)
    if found is None:
        raise ValueError(f"no {attribute} in {text}")
    return found[1]


def _through(one: Instruction, scope: dict[str, Instruction]) -> Instruction:
    while one.opcode in ("bitcast", "reshape", "copy", "convert") and one.operands and one.operands[0] in scope:
        one = scope[one.operands[0]]
    return one


def _bytes(one: Instruction, scope: dict[str, Instruction]) -> float:
    """Memory traffic of an instruction that is not fused: what it reads and what it returns."""
    if one.opcode in ("copy-start", "slice-start"):  # (from, to, token), or the other way round
        source = _size(scope[one.operands[0]].shape)
        moved = min(_size(part, False) for part in _elements(one.shape)[:2])
        return moved * bool(source) + moved * (_size(one.shape) > source)
    if one.opcode == "dynamic-update-slice":
        return 2 * _size(scope[one.operands[1]].shape)
    read = sum(_size(scope[name].shape) for name in one.operands if name in scope)
    if one.opcode in PARTS:
        read = min(read, _size(one.shape, False))
    return read + _size(one.shape)


def _kernel(one: Instruction) -> Cost:
    """Of a fused attention kernel, besides reading its operands once: every block of scores reads two blocks of tokens."""
    name = re.search(r'op_name="([^"]*)"', one.rest)
    blocks, side, products = kernel_blocks(one.name, name[1] if name else "")
    kind, dims, _ = max(ARRAY.findall(one.shape), key=lambda part: _size(f"{part[0]}[{part[1]}]"))
    width = int(dims.rpartition(",")[2] or 1)
    return Cost(2.0 * products * blocks * side * side * width, 2.0 * blocks * side * width * BYTES.get(kind, 1))


def _elements(shape: str) -> list[str]:
    return [match[0] for match in re.finditer(ARRAY, shape)] or [shape]


# ---------------------------------------------------------------- products


def _listed(rest: str, name: str) -> list[int]:
    found = re.search(rf'"?{name}"?[=:][\{{\[]([\d,"]*)[\}}\]]', rest)
    return [int(n) for n in re.findall(r"\d+", found[1])] if found else []


def _product(one: Instruction, scope: dict[str, Instruction]) -> float:
    """FLOPs of a matrix product; 0 for anything else."""
    if one.opcode == "dot":
        left = scope[one.operands[0]].dims()
        return 2.0 * math.prod(one.dims()) * math.prod(left[i] for i in _listed(one.rest, "lhs_contracting_dims"))
    if one.opcode == "custom-call" and re.search(r"cublas|matmul|gemm", one.rest.partition("backend_config")[0]):
        left = scope[one.operands[0]].dims()
        contracted = _listed(one.rest, "lhs_contracting_dimensions")
        return 2.0 * math.prod(_dims(_elements(one.shape)[0])) * math.prod(left[i] for i in contracted)
    if one.opcode == "custom-call" and (fused := re.search(r'"__cudnn\$fmha\w*?(Backward)?"', one.rest)):
        query, keys = (scope[name].dims() for name in one.operands[:2])
        return cudnn_products(query, keys, '"CAUSAL"' in one.rest, bool(fused[1]))
    if one.opcode == "convolution":
        return _convolution(one, scope)
    return 0.0


def _convolution(one: Instruction, scope: dict[str, Instruction]) -> float:
    """TPU products are convolutions: batch dimensions are windows of which only the diagonal meets anything."""
    names = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    if names is None:
        return 0.0
    left, right, out = scope[one.operands[0]].dims(), scope[one.operands[1]].dims(), one.dims()
    window = re.search(r"window=\{([^}]*)\}", one.rest)
    options = dict(part.split("=") for part in window[1].split()) if window else {}

    def values(key: str, default: str, n: int) -> list[str]:
        return options[key].split("x") if key in options else [default] * n

    spatial = sorted(c for c in names[1] if c.isdigit())
    n = len(spatial)
    taps = 1.0
    columns = zip(
        spatial,
        values("size", "1", n),
        values("stride", "1", n),
        values("pad", "0_0", n),
        values("lhs_dilate", "1", n),
        values("rhs_dilate", "1", n),
        strict=True,
    )
    for label, size, stride, pad, spread, gap in columns:
        length = left[names[1].index(label)]
        at = np.arange(out[names[3].index(label)])[:, None] * int(stride) - int(pad.split("_")[0])
        at = at + np.arange(int(size)) * int(gap)
        taps *= np.sum((at >= 0) & (at < (length - 1) * int(spread) + 1) & (at % int(spread) == 0))
    rest = math.prod(out[names[3].index(label)] for label in "bf")
    return 2.0 * rest * float(taps) * right[names[2].index("i")]


# ---------------------------------------------------------------- messages


def _message(one: Instruction) -> Message:
    kind = one.opcode.removesuffix("-start")
    group = _group(one.rest)
    parts = _elements(one.shape)
    if one.opcode.endswith("-start"):  # (given, received)
        if kind in ("all-gather", "reduce-scatter"):
            parts = parts[len(parts) // 2 :]
        elif kind == "collective-permute":
            parts = parts[1:2]
    size = sum(_size(part, False) for part in parts)
    if kind == "reduce-scatter":
        size *= len(group)
    return Message(kind, size, group)


def _group(rest: str) -> tuple[int, ...]:
    """Devices of the first group; groups of one instruction are alike."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return tuple(int(n) for n in found[1].split(","))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape, source = ([int(n) for n in found[i].split(",")] for i in (1, 2))
        ids = np.arange(math.prod(source)).reshape(source)
        if found[3]:
            ids = ids.transpose([int(n) for n in found[3].split(",")])
        return tuple(ids.reshape(shape)[0].tolist())
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        return _named_group(found[1], found[2])
    if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
        return int(found[1]), int(found[2])
    return (0,)


def _named_group(mesh: str, axes: str) -> tuple[int, ...]:
    """`'a'=4,'b'=2` and `'b'` or a part of an axis, `'a':(2)2`: 2 of its devices, in steps after the first 2."""
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh)}
    strides = dict(zip(sizes, _strides(list(sizes.values())), strict=True))
    steps: list[Iterable[int]] = []
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        size = int(part) if part else sizes[name]
        inner = sizes[name] // (int(before) * size) if part else 1
        steps.append([i * inner * strides[name] for i in range(size)])
    return tuple(sorted(sum(combination) for combination in itertools.product(*steps)))


def _strides(sizes: Sequence[int]) -> list[int]:
    return [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
