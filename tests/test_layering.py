"""The architecture as a test: imports point one way, and each heavy library has one home (DESIGN: Layout)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "videodit"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A part may import parts of its own height and below it.
HEIGHT = {
    "errors": 0,
    "device": 0,
    "early_stop": 0,
    "progress": 0,
    "settings": 1,
    "models": 1,
    "flow": 1,
    "data": 1,
    "kernels": 1,
    "config": 2,
    "parallel": 2,
    "training": 3,
    "generation": 3,
    "evaluation": 3,
    "planning": 3,
    "serving": 4,
    "demo": 5,
    "demo_stages": 5,
    "doctor": 5,
    "cli": 6,
    "__main__": 7,
}
ONLY_HOME = {
    "deepspeed": "training/engine.py",
    "wandb": "training/tracker.py",
    "jsonargparse": "config.py",
}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def part_of(module: str) -> str:
    """`videodit.data.shards` → `data`."""
    return module.split(".")[1] if "." in module else "__init__"


def dotted(path: Path) -> str:
    parts = ("videodit", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def absolute(node: ast.ImportFrom, path: Path) -> str:
    if not node.level:
        return node.module or ""
    package = dotted(path).split(".") if path.name == "__init__.py" else dotted(path).split(".")[:-1]
    return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """Every module that the file imports, inside functions too; `from a import b` gives a.b too if that is a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = absolute(node, path)
            yield module
            for alias in node.names:
                if (PACKAGE.parent / Path(*module.split("."), f"{alias.name}.py")).exists():
                    yield f"{module}.{alias.name}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_point_one_way(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return  # names the public API of every height
    own = part_of(dotted(path))
    assert own in HEIGHT, f"{own} has no height: say in HEIGHT what it may import"
    for module in imports(path):
        if module.startswith("videodit."):
            other = part_of(module)
            assert HEIGHT[other] <= HEIGHT[own], f"{relative(path)} imports {module}, which lies above it"


def test_no_module_imports_itself_through_others() -> None:
    graph = {
        dotted(p): {m for m in imports(p, top_level_only=True) if m.startswith("videodit.") and m != dotted(p)}
        for p in MODULES
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"import cycle: {' → '.join([*trail[trail.index(module) :], module])}"
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_heavy_libraries_have_one_home(path: Path) -> None:
    for module in imports(path):
        home = ONLY_HOME.get(module.split(".")[0])
        assert home in (None, relative(path)), f"{relative(path)} imports {module}: only {home} may"


@pytest.mark.parametrize("path", [p for p in MODULES if p.name == "__init__.py"], ids=relative)
def test_init_files_are_empty(path: Path) -> None:
    if path != PACKAGE / "__init__.py":
        assert not path.read_text(encoding="utf-8").strip()


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_nothing_that_is_read_can_run_code(path: Path) -> None:
    assert not UNSAFE_MODULES & {module.split(".")[0] for module in imports(path)}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        where = f"{relative(path)}:{node.lineno}"
        assert called not in ("eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load"), f"{where} calls {called}"
        assert called != "torch.load" or options.get("weights_only") == "True", f"{where}: torch.load can unpickle"
        assert called not in ("np.load", "numpy.load") or options.get("allow_pickle", "False") == "False", where
        assert options.get("shell", "False") == "False", f"{where} uses a shell"
