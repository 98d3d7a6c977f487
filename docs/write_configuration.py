"""Write docs/configuration.md, the reference of all fields, from the comments and defaults of configs/base.py.

    python docs/write_configuration.py

Comments are read from the lines above a field and from the end of its own line. A field that is set in a loop over
sections gets the same description in every section.
"""

import ast
import io
from pathlib import Path
import tokenize

from ml_collections import ConfigDict

from ctxjax.configs import base

HEAD = """# All fields

Set any field with `--config.section.field=value`. This page is written by `docs/write_configuration.py` from
`configs/base.py`, which has the same text as comments; other configurations override fields.
"""
PAGE = Path(__file__).with_name("configuration.md")


def read_comments(source: str) -> dict[str, str]:
    """Return the comments, on the lines above and at the end of the line, by field or section; each in one line."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {
        token.start: token.string.removeprefix("#").strip() for token in tokens if token.type == tokenize.COMMENT
    }
    above = {line for line, column in comments if not source.splitlines()[line - 1][:column].strip()}
    by_line = {line: text for (line, _), text in comments.items()}
    (function,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    found = {}

    def visit(nodes: list[ast.stmt], names: dict[str, list[str]]) -> None:
        for node in nodes:
            if isinstance(node, ast.For):
                sections = node.iter.elts if isinstance(node.iter, ast.Tuple) else []
                visit(node.body, {node.target.id: [_get_name(section) for section in sections]})
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
                first = node.lineno
                while first - 1 in above:
                    first -= 1
                lines = [*range(first, node.lineno), node.end_lineno]
                text = " ".join(by_line[line] for line in lines if line in by_line)
                owner, _, field = ast.unparse(node.targets[0]).partition(".")
                for section in names.get(owner, [""]):
                    found[f"{section}.{field}".strip(".")] = text

    visit(function.body, {})
    return found


def _get_name(section: ast.expr) -> str:
    return ast.unparse(section).partition(".")[2]


def write_page(source: str, config: ConfigDict) -> str:
    """Return the page, in the order of the source. Raises ValueError for a field without a comment."""
    comments = read_comments(source)
    top = [name for name, value in config.items() if not isinstance(value, ConfigDict)]
    lines = [HEAD, *TABLE, *(_write_row(name, config[name], comments) for name in comments if name in top)]
    for section in (name for name in comments if name in config and name not in top):
        about = comments[section].removesuffix(".")
        lines += ["", f"## {section}", "", f"{about[:1].upper()}{about[1:]}.", "", *TABLE]
        order = [name.partition(".")[2] for name in comments if name.startswith(f"{section}.")]
        order += [field for field in config[section] if field not in order]
        lines += [_write_row(f"{section}.{field}", config[section][field], comments) for field in order]
    return "\n".join(lines) + "\n"


TABLE = ["| field | default | meaning |", "|---|---|---|"]


def _write_row(name: str, value, comments: dict[str, str]) -> str:
    section, _, field = name.partition(".")
    text = comments.get(name, "")
    if section == "teacher_base" and not text:
        text = f"as base.{field}"
    if section == "arms":
        text = ", ".join(f"loss.{key} = {setting!r}" for key, setting in value.items())
        return f"| `{name}` | | {text} |"
    if not text:
        raise ValueError(f"configs/base.py has no comment for the field {name}")
    return f"| `{name}` | `{value!r}` | {text} |".replace("||", "\\|\\|").replace("__", "\\_\\_")


if __name__ == "__main__":
    PAGE.write_text(write_page(Path(base.__file__).read_text(), base.get_config()))
