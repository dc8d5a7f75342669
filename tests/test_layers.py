"""The layers of imports: an arrow points down, also inside functions, and no modules import each other in a circle."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = [  # from the bottom; those of one line may not import each other
    {"errors"},
    {"types", "geometry", "intervals", "runfiles", "flags"},
    {"machine", "tasks"},
    {"model", "world"},
    {"data"},
    {"rollout", "experts"},
    {"api"},
    {"methods"},
    {"eval"},
    {"report"},
    {"training"},
    {"plan"},
    {"commands"},
    {"cli"},
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, Path]:
    files = (path for path in (ROOT / "jaxmllm").rglob("*.py") if "meshes" not in path.parts)
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules that a file imports anywhere, but for annotations alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in typing_only and node.module:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in known else node.module for name in names}
        elif isinstance(node, ast.Import) and id(node) not in typing_only:
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in known}


def test_imports_point_down_and_never_in_a_circle():
    known = modules()
    graph = {name: imports(path, known) - {name} for name, path in known.items()}
    up = [
        f"{name} -> {other}"
        for name, others in graph.items()
        for other in others
        if (a := name.split(".")[1:2]) and (b := other.split(".")[1:2]) and a != b and HEIGHT[b[0]] >= HEIGHT[a[0]]
    ]
    assert not up
    assert len(graph) > 150 and {name.split(".")[1] for name in graph if "." in name} == HEIGHT.keys()
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(error.args[1]) from None


def test_the_contract_finds_what_it_forbids(tmp_path):
    (tmp_path / "low.py").write_text("def f():\n    from jaxmllm.training import loop\n    import jaxmllm.cli\n")
    assert imports(tmp_path / "low.py", modules()) == {"jaxmllm.training.loop", "jaxmllm.cli"}


def test_only_the_model_imports_flax_and_tasks_import_no_jax():
    known = modules()
    for name, path in known.items():
        top = {
            alias.name.split(".")[0] if isinstance(node, ast.Import) else (node.module or "").split(".")[0]
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        if "flax" in top:
            assert name.split(".")[1] in ("model", "types", "methods", "rollout"), name
        if "jax" in top:
            assert name.split(".")[1] not in ("tasks", "world", "report", "experts"), name


def test_a_reward_process_loads_no_jax():
    import subprocess

    code = "import sys, jaxmllm.methods.grpo.reward_calls as r; r.resolve('task'); print('jax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == "False"


def test_functions_are_short_or_say_why_not():
    """At most 60 lines of code, docstring, comments and blank lines aside; `# long: reason` stands beside a longer one."""
    for name, path in modules().items():
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if not isinstance(node, ast.FunctionDef):
                continue
            first = node.body[1:] if ast.get_docstring(node) is not None else node.body
            if not first:
                continue
            code = [line.strip() for line in lines[first[0].lineno - 1 : node.end_lineno]]
            length = sum(bool(line) and not line.startswith("#") for line in code)
            told = any("# long: " in line for line in lines[node.lineno - 1 : node.body[0].end_lineno])
            assert length <= 60 or told, f"{name}.{node.name} has {length} lines"


def test_files_are_short():
    listed = [path for folder in ("jaxmllm", "tests", "configs") for path in (ROOT / folder).rglob("*.py")]
    long = {path.name: count for path in listed if (count := path.read_text(encoding="utf-8").count("\n")) > 500}
    assert not long


def test_every_name_is_defined():
    """What ruff's F821 would find; it cannot be on, since shapes in annotations are texts. Annotations are left out here."""
    import builtins
    import dis
    import importlib
    import types

    def loaded(code: types.CodeType) -> set[str]:
        inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
        here = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
        return here.union(*map(loaded, inner))

    for name, path in modules().items():
        module = importlib.import_module(name)
        names = loaded(compile(path.read_text(encoding="utf-8"), str(path), "exec"))
        missing = {n for n in names if not hasattr(module, n) and not hasattr(builtins, n)}
        assert not missing, f"{name}: {missing}"
