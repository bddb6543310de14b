"""The shape of the package: imports flow down, light modules stay light, sizes stay small.

The tables below are the only thing to edit: a new module gets a place in `LAYERS`, a waiver its
reason. Everything is read from the syntax trees; only the light modules are imported.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

PACKAGE = "agentr1"
ROOT = Path(__file__).resolve().parents[1] / "src" / PACKAGE

# A module imports only from rows above its own. The number is the layer of the design; a layer that
# has several rows is read in this order. Names are relative to the package, `*` matches anything,
# and a module belongs to the first row that names it.
LAYERS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (0, ("types",)),
    (1, ("parsing", "codec", "segments", "advantages", "statistics")),
    (1, ("estimators", "gae")),
    (1, ("microbatches", "loops", "locks", "signals", "alignment", "collapse")),
    (1, ("valuation",)),
    (1, ("tools.signature", "tools.threads", "tools.policy", "tools.rendering", "tools.sharing")),
    (1, ("tools.base", "retrieval.base")),
    (1, ("tools.runner", "retrieval.remote", "retrieval.gathering", "retrieval.limits")),
    (1, ("rewards", "queries", "retrieval.passages", "retrieval.manifest", "retrieval.encoders")),
    (1, ("retrieval.bm25", "retrieval.dense", "retrieval.hybrid")),
    (1, ("retrieval.http", "retrieval.opensearch", "retrieval.qdrant")),
    (1, ("retrieval.postings", "retrieval.opening", "retrieval.quality")),
    (1, ("retrieval.memory",)),
    (1, ("retrieval.*",)),
    (1, ("sources.base", "sources.records", "sources.lines")),
    (1, ("sources.hotpotqa", "sources.twowiki", "sources.musique", "sources.bamboogle")),
    (1, ("sources.nq", "sources.gsm8k", "sources.own", "sources.passages")),
    (1, ("sources.table", "sources.sample", "sources.tally")),
    (1, ("sources.finding", "sources.folder", "sources.hub", "sources.card")),
    (1, ("sources.plan",)),
    (1, ("agent_r1_rewards", "tools.*")),
    (2, ("envs.base", "engines.base")),
    (2, ("envs.tool_env", "envs.context")),
    (2, ("engines.slots", "engines.vllm_server", "engines.vllm_sync")),
    (2, ("envs.*", "engines.*")),
    (3, ("rollout", "lockstep", "demonstrations")),
    (4, ("algorithms",)),
    (5, ("credit_config", "guard_config", "recipe_arguments")),
    (5, ("config", "ranks", "credit", "refill")),
    (6, ("scoring", "data", "models")),
    (6, ("runs", "hub")),
    (6, ("displacement", "checkpoints", "eval_folder", "breakdown", "ceiling")),
    (6, ("recipe", "progress", "interrupts", "guard")),
    (6, ("task", "critic")),
    (6, ("context",)),
    (6, ("update", "inference", "row_weights", "step_ratio")),
    (6, ("rollout_trainer",)),
    (6, ("trainer",)),
    (6, ("actor_critic",)),
    (7, ("commandline",)),
    (7, ("compare", "launch")),
    (7, ("train", "sft", "serve_retriever", "prepare", "demonstrate")),
    (7, ("index",)),
    (7, ("cells",)),
    (7, ("eval_report", "systems")),
    (7, ("evaluate", "play")),
    (7, ("grid_board",)),
    (7, ("grid",)),
    (7, ("ablate", "algorithm_table")),
    (8, ("cli",)),
    (9, ("", "__main__")),
)

# Imported by tool and environment authors, whose tests run in milliseconds.
LIGHT = (
    "types",
    "parsing",
    "segments",
    "rewards",
    "agent_r1_rewards",
    "tools.base",
    "tools.runner",
    "tools.tape",
    "tools.calculator",
    "envs.base",
    "envs.tool_env",
    "envs.context",
    "envs.budget",
    "envs.check",
    "envs.multi_hop",
    "envs.one_shot",
    "envs.few_shot",
    "",
)
HEAVY = ("torch", "transformers", "trl")

# The only modules that may use private names of TRL, and those that may know that it exists.
PRIVATE_TRL = (
    *("trainer", "rollout_trainer", "update", "row_weights", "step_ratio", "critic"),
    *("actor_critic", "guard", "engines.*"),
)
KNOWS_TRL = (*PRIVATE_TRL, "codec", "config", "recipe", "models", "train", "sft")

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400
MAX_POSITIONAL = 5
MAX_EXPORTS = 16

# "module" or "module:function" -> why it may exceed a size budget.
WAIVERS: dict[str, str] = {}


@dataclasses.dataclass(frozen=True)
class Module:
    """One source file: its name relative to the package, its text and its syntax tree."""

    name: str
    path: Path
    source: str
    tree: ast.Module


@functools.cache
def modules() -> dict[str, Module]:
    """Every module of the package by its relative name; the package itself is ``""``."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        source = path.read_text(encoding="utf-8")
        found[name] = Module(name, path, source, ast.parse(source, filename=str(path)))
    return found


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def row_of(name: str) -> int | None:
    return next((row for row, (_, names) in enumerate(LAYERS) if matches(name, names)), None)


def is_package_marker(module: Module) -> bool:
    """True for the `__init__.py` of an inner package that the table does not name."""
    return module.path.name == "__init__.py" and row_of(module.name) is None


def imported_names(module: Module) -> Iterator[tuple[str, int]]:
    """Every imported dotted name with its line: `from a.b import c` gives `a.b.c`."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.path}:{node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def package_imports(module: Module) -> Iterator[tuple[str, str, int]]:
    """What `module` imports from the package: relative module name, whole name, line."""
    for dotted, line in imported_names(module):
        head, _, relative = dotted.partition(".")
        if head != PACKAGE:
            continue
        # `agentr1.tools.base.Tool` is a name inside `tools.base`; cut until a module is left.
        while relative and relative not in modules():
            relative = relative.rpartition(".")[0]
        yield relative, dotted, line


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def code_line_numbers(source: str) -> set[int]:
    """Numbers of the lines that hold code: no blanks, no comments."""
    ignored = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in ignored:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[int]:
    first = node.body[0]
    if ast.get_docstring(node, clean=False) is None:
        return set()
    return set(range(first.lineno, (first.end_lineno or first.lineno) + 1))


def over_budget(key: str, size: int, budget: int) -> bool:
    return size > budget and key not in WAIVERS


def test_every_module_has_a_layer() -> None:
    names = [m.name for m in modules().values() if not is_package_marker(m)]
    assert len(names) > 5
    missing = [name for name in names if row_of(name) is None]
    assert not missing, f"no row in LAYERS for {missing}"


def test_every_row_of_the_table_is_in_order() -> None:
    numbers = [layer for layer, _ in LAYERS]
    assert numbers == sorted(numbers)


def test_imports_flow_down() -> None:
    wrong = []
    for module in modules().values():
        if is_package_marker(module):
            wrong += [f"{module.path}:{line}: {name}" for _, name, line in package_imports(module)]
            continue
        row = row_of(module.name)
        for target, name, line in package_imports(module):
            target_row = row_of(target)
            if row is None or target_row is None or target_row >= row:
                wrong.append(f"{module.path}:{line}: {module.name} imports {name}")
    assert not wrong, "imports that do not flow down:\n" + "\n".join(wrong)


def test_trl_is_known_only_where_it_must_be() -> None:
    wrong = [
        f"{module.path}:{line}: {dotted}"
        for module in modules().values()
        for dotted, line in imported_names(module)
        if dotted.partition(".")[0] == "trl" and not matches(module.name, KNOWS_TRL)
    ]
    assert not wrong, "TRL imported outside KNOWS_TRL:\n" + "\n".join(wrong)


def test_private_names_of_trl_stay_in_their_files() -> None:
    wrong = [
        f"{module.path}:{line}: {dotted}"
        for module in modules().values()
        for dotted, line in imported_names(module)
        if dotted.partition(".")[0] == "trl"
        and any(part.startswith("_") for part in dotted.split("."))
        and not matches(module.name, PRIVATE_TRL)
    ]
    assert not wrong, "private names of TRL outside PRIVATE_TRL:\n" + "\n".join(wrong)


def test_light_modules_import_no_torch() -> None:
    absent = [name for name in LIGHT if name not in modules()]
    assert not absent, f"LIGHT names modules that do not exist: {absent}"
    names = [f"{PACKAGE}.{name}" if name else PACKAGE for name in LIGHT]
    script = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "    if heavy: sys.exit(f'{name} imports {heavy}')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_functions_stay_within_their_budget() -> None:
    wrong = []
    for module in modules().values():
        code = code_line_numbers(module.source)
        for node in functions(module):
            body = set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
            size = len((body & code) - docstring_lines(node))
            if over_budget(f"{module.name}:{node.name}", size, MAX_FUNCTION_LINES):
                wrong.append(f"{module.path}:{node.lineno}: {node.name} has {size} code lines")
    assert not wrong, f"more than {MAX_FUNCTION_LINES} code lines:\n" + "\n".join(wrong)


def test_files_stay_within_their_budget() -> None:
    wrong = []
    for module in modules().values():
        size = len(module.source.splitlines())
        if over_budget(module.name, size, MAX_FILE_LINES):
            wrong.append(f"{module.path}: {size} lines")
    assert not wrong, f"more than {MAX_FILE_LINES} lines:\n" + "\n".join(wrong)


def test_functions_take_few_positional_parameters() -> None:
    wrong = []
    for module in modules().values():
        for node in functions(module):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
            size = len([name for name in names if name not in ("self", "cls")])
            if over_budget(f"{module.name}:{node.name}", size, MAX_POSITIONAL):
                wrong.append(f"{module.path}:{node.lineno}: {node.name} takes {size}")
    assert not wrong, f"more than {MAX_POSITIONAL} positional parameters:\n" + "\n".join(wrong)


def test_the_package_exports_few_names() -> None:
    import agentr1

    assert len(agentr1.__all__) <= MAX_EXPORTS
    assert [name for name in agentr1.__all__ if not hasattr(agentr1, name)] == []


def test_waivers_name_something_that_exists_and_say_why() -> None:
    known = set(modules())
    known |= {f"{m.name}:{node.name}" for m in modules().values() for node in functions(m)}
    assert [key for key in WAIVERS if key not in known] == []
    assert all(reason.strip() for reason in WAIVERS.values())


def test_no_todo_is_left() -> None:
    wrong = [
        f"{module.path}: {word}"
        for module in modules().values()
        for word in ("TO" + "DO", "FIX" + "ME", "XX" + "X")
        if word in module.source
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("rollout", "segments", True),
        ("segments", "rollout", False),
        ("tools.calculator", "tools.base", True),
        ("tools.base", "tools.calculator", False),
        ("tools.search", "retrieval.bm25", True),
        ("envs.base", "engines.base", False),
        ("cli", "train", True),
    ],
)
def test_the_table_says_what_the_design_says(importer: str, imported: str, allowed: bool) -> None:
    upper, lower = row_of(imported), row_of(importer)
    assert upper is not None
    assert lower is not None
    assert (upper < lower) is allowed
