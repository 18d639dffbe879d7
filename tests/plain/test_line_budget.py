"""The library does not grow unnoticed: lines of fused_vse/ and csrc/ without blank lines, comments and
docstrings. `python tests/test_line_budget.py` prints them by folder."""

import ast
import collections
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = next(p for p in Path(__file__).parents if (p / "pyproject.toml").exists() or p == p.parent)
# Only ever lowered, or raised with the reason in the commit's message.
BUDGET = 9735


def python_lines(text: str) -> int:
    skipped = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            string = node.body[0]
            skipped.update(range(string.lineno, string.end_lineno + 1))
    meaningless = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT}
    meaningless |= {tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in meaningless:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - skipped)


def cpp_lines(text: str) -> int:
    # Strings first, so that what looks like a comment inside of one stays.
    pattern = r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/'
    code = re.sub(pattern, lambda match: match[1] or "", text, flags=re.DOTALL)
    return sum(1 for line in code.splitlines() if line.strip())


def count() -> dict[str, int]:
    lines = collections.Counter()
    for top, suffixes, of_text in (
        ("fused_vse", {".py"}, python_lines),
        ("csrc", {".h", ".inl", ".cpp", ".cuh", ".cu"}, cpp_lines),
    ):
        for path in (ROOT / top).rglob("*"):
            if path.suffix in suffixes:
                lines[str(path.parent.relative_to(ROOT))] += of_text(path.read_text())
    return dict(lines)


def test_within_budget():
    if not (ROOT / "csrc").exists():
        pytest.skip("not in a checkout")
    assert sum(count().values()) <= BUDGET


@pytest.mark.parametrize(
    ("of_text", "text", "lines"),
    [
        (python_lines, '"""Doc.\n\nMore."""\n\n# why\nx = 1  # why\n', 1),
        (python_lines, 'def f():\n    """Doc."""\n    return """\n\n"""\n', 4),
        (cpp_lines, "// why\n\nint x;  // why\n/* a\n b */ int y;\n", 2),
        (cpp_lines, 'auto s = "// no comment";\n', 1),
    ],
)
def test_what_counts(of_text, text, lines):
    assert of_text(text) == lines


if __name__ == "__main__":
    folders = count()
    for folder, lines in sorted(folders.items()):
        print(f"{lines:6} {folder}")
    print(f"{sum(folders.values()):6} of {BUDGET}")
