"""Promise: imports run one way, no code depends on a command, and files, functions and lists of arguments are short."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("gcrf_triton", "reference", "bench", "tests")
LONGEST = 400  # lines
LONGEST_FUNCTION = 60  # lines, without its docstring
MOST_ARGUMENTS = 8
CONTRACT = {"gated_crf_loss", "GatedCRFLoss.__init__", "ModelLossSemsegGatedCRF.forward"}  # arguments that users name


def modules(folder):
    """Name -> file of every module of a package; a package goes by its own name."""
    for file in sorted((ROOT / folder).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def is_command(tree):
    """Whether a module does something when it is run: its top level compares `__name__` with "__main__"."""
    tests = [ast.unparse(node.test) for node in tree.body if isinstance(node, ast.If)]
    return "__name__ == '__main__'" in tests


def imported(tree, name, is_package):
    """Names of all modules that a module imports anywhere in it, and of what it imports from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".") if is_package else name.split(".")[:-1]
            above = above[: len(above) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


BENCH = {name: (file, ast.parse(file.read_text())) for name, file in modules("bench")}
COMMANDS = {name for name, (_, tree) in BENCH.items() if is_command(tree)}


def test_relative_imports_are_resolved():
    tree = ast.parse("def f():\n from ..run import main\n from . import b\n import a.b\nfrom .c import d as e")
    assert set(imported(tree, "x.y.z", False)) == {"x.run", "x.run.main", "x.y", "x.y.b", "a.b", "x.y.c", "x.y.c.d"}
    assert set(imported(ast.parse("from .c import d"), "x.y", True)) == {"x.y.c", "x.y.c.d"}


def test_the_folder_of_the_benchmarks_lists_its_commands():
    assert {name for name in BENCH if name.count(".") == 1 and BENCH[name][0].name != "__init__.py"} <= COMMANDS
    assert {"bench.run", "bench.demo.__main__", "bench.weak_supervision.experiment"} <= COMMANDS


@pytest.mark.parametrize("name", BENCH)
def test_commands_do_not_serve_as_libraries(name):
    file, tree = BENCH[name]
    assert not COMMANDS & set(imported(tree, name, file.name == "__init__.py"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_are_short(folder):
    lengths = {name: len(file.read_text().splitlines()) for name, file in modules(folder)}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


PACKAGE = {name: (file, ast.parse(file.read_text())) for name, file in modules("gcrf_triton")}


def layers():
    """Module -> row of the table of files in the package's page."""
    page = (ROOT / "gcrf_triton" / "README.md").read_text()
    rows = re.findall(r"^\| (`\w+(?:\.py|/)`[^|]*)\|", page, re.M)
    return {name: row for row, cell in enumerate(rows) for name in re.findall(r"`(\w+)(?:\.py|/)`", cell)}


@pytest.mark.parametrize("name", PACKAGE)
def test_imports_of_the_package_run_one_way(name):
    file, tree = PACKAGE[name]
    own, *_ = name.split(".")[1:] or ["__init__"]
    found = {each for each in imported(tree, name, file.name == "__init__.py") if each in PACKAGE}
    others = {each.split(".")[1] for each in found if "." in each} - {own}
    assert own in layers() and {other for other in others if layers()[other] >= layers()[own]} == set()


def functions(tree, prefix=""):
    """Name and definition of all functions, those of classes with the name of the class."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield f"{prefix}{node.name}", node


@pytest.mark.parametrize("name", PACKAGE)
def test_functions_of_the_package_are_short(name):
    for function, node in functions(PACKAGE[name][1]):
        if any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        body = node.body[1:] if ast.get_docstring(node) else node.body
        lines = node.end_lineno - body[0].lineno + 1 if body else 0
        arguments = len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
        assert lines <= LONGEST_FUNCTION, (name, function, lines)
        assert arguments <= MOST_ARGUMENTS + ("." in function) or function in CONTRACT, (name, function, arguments)


def test_the_schema_of_the_operator_names_its_arguments():
    from gcrf_triton.op import pairwise_energy
    from gcrf_triton.problem import Arguments

    assert tuple(argument.name for argument in pairwise_energy._schema.arguments) == Arguments._fields
