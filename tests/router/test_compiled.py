"""What the router's sources must keep to so that the compiled router (`make compiled`) is the same program."""

import ast
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path


def exceptions() -> Iterator[tuple[Path, ast.ClassDef]]:
    for path in sorted(Path(str(files("pdrouter"))).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Error"):
                yield path, node


def test_exceptions_have_no_attributes_of_their_class_that_a_compiled_one_would_lack() -> None:
    """mypyc gives class attributes to each instance when it is made, but exceptions are made by the interpreter."""
    found = list(exceptions())
    assert any(node.name == "UpstreamError" for _, node in found)
    lacking = [
        f"{path.name}: {node.name}.{ast.unparse(part)}"
        for path, node in found
        for part in node.body
        if isinstance(part, ast.Assign)
        or (
            isinstance(part, ast.AnnAssign)
            and part.value is not None
            and "ClassVar" not in ast.unparse(part.annotation)
        )
    ]
    assert lacking == [], "annotate these as ClassVar"
