"""A hook of MkDocs: formulas become MathML, which browsers draw without a script, and pages get the version.

Pages write TeX, `$...$` or `$$...$$`. Docstrings write their formulas in plain text, which reads better in a terminal;
on the API pages `plain` turns them into TeX first.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from html.entities import html5
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# What TeX calls otherwise than HTML does.
SYMBOLS = {
    "cdot": "middot", "lVert": "Vert", "rVert": "Vert", "|": "Vert", "partial": "part", "quad": "emsp", ",": "thinsp",
    "dots": "hellip",
}  # fmt: skip
_TOKEN = re.compile(r"\\([A-Za-z]+|.)|([A-Za-z])|(\d+(?:\.\d+)?)|(\S)")
_SPACE = chr(0x2423)  # a space that must survive between tokens
_PLAIN = {
    "||": r"\|", "<-": r"\leftarrow", ">=": r"\ge", "<=": r"\le", "'": r"^{\prime}", " * ": r" \cdot ",
}  # fmt: skip
_GREEK = "alpha|beta|epsilon|eta|lambda|mu|rho|sigma|tau|theta"


def mathml(tex: str, *, block: bool = False) -> str:
    r"""A formula as MathML.

    Args:
        tex: a small part of TeX: sub- and superscripts, groups, `SYMBOLS`, \frac, \hat, \tilde, \text, \mathrm.
        block: whether it stands on a line.

    Returns:
        A `<math>` element.
    """
    tokens = [match[0] for match in _TOKEN.finditer(_protected(tex))]
    body = "".join(_items(iter([*tokens, "}"])))
    return f'<math display="{"block" if block else "inline"}"><mrow>{body}</mrow></math>'


def _protected(tex: str) -> str:
    r"""Spaces inside \text and \mathrm survive the tokens."""
    return re.sub(r"\\(text|mathrm)\{([^}]*)\}", lambda m: f"\\{m[1]}{{{m[2].replace(' ', _SPACE)}}}", tex)


def _items(tokens: Iterator[str]) -> list[str]:
    """Elements up to the closing brace."""
    found: list[str] = []
    for token in tokens:
        if token == "}":
            return found
        if token in "_^":
            base, script = found.pop(), _one(tokens)
            tag = {"_": "sub", "^": "sup"}[token]
            under = "munder" if "&sum;" in base and token == "_" else f"m{tag}"
            if base.startswith("<msub>") and token == "^":  # both, on one letter
                found.append(f"<msubsup>{base.removeprefix('<msub>').removesuffix('</msub>')}{script}</msubsup>")
            else:
                found.append(f"<{under}>{base}{script}</{under}>")
        else:
            found.append(_element(token, tokens))
    raise ValueError("a brace is not closed")


def _one(tokens: Iterator[str]) -> str:
    """The next element or group."""
    token = next(tokens)
    return f"<mrow>{''.join(_items(tokens))}</mrow>" if token == "{" else _element(token, tokens)


def _element(token: str, tokens: Iterator[str]) -> str:
    name = token[1:] if token.startswith("\\") else ""
    if token == "{":
        return f"<mrow>{''.join(_items(tokens))}</mrow>"
    if name == "frac":
        return f"<mfrac>{_one(tokens)}{_one(tokens)}</mfrac>"
    if name in ("hat", "tilde"):
        return f"<mover>{_one(tokens)}<mo>{'^' if name == 'hat' else '~'}</mo></mover>"
    if name in ("text", "mathrm"):
        next(tokens)
        letters = []
        while (letter := next(tokens)) != "}":
            letters.append(letter)
        return f"<mtext>{html.escape(''.join(letters)).replace(_SPACE, '&nbsp;')}</mtext>"
    if name:
        entity = f"{SYMBOLS.get(name, name)};"
        if entity not in html5:
            raise ValueError(f"formulas.py does not know \\{name}")
        tag = "mi" if html5[entity].isalpha() else "mo"
        return f"<{tag}>&{entity}</{tag}>"
    if token.isdigit() or re.fullmatch(r"\d+\.\d+", token):
        return f"<mn>{token}</mn>"
    return (
        f"<mi>{token}</mi>"
        if token.isalpha()
        else "<mo>&minus;</mo>"
        if token == "-"
        else f"<mo>{html.escape(token)}</mo>"
    )


def on_page_content(text: str, page: Any, **_: Any) -> str:
    """MkDocs calls this with each page's HTML."""
    text = re.sub(
        r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>',
        lambda match: mathml(html.unescape(match[2]), block=match[1] == "div"),
        text,
        flags=re.S,
    )
    if not page.url.startswith("api/"):
        return text
    return re.sub(r'<div class="highlight"><pre><span></span><code>([^<]*?)</code></pre></div>', _block, text)


def _block(code: re.Match[str]) -> str:
    """An indented block of a docstring as formulas, if each of its lines is one."""
    lines = html.unescape(code[1]).strip("\n").split("\n")
    if not all(re.search(r"=|<-", line) for line in lines):
        return code[0]
    return '<div class="formulas">' + "".join(mathml(plain(line), block=True) for line in lines) + "</div>"


def plain(line: str) -> str:
    """TeX of a formula in plain text, such as `L_g = 1/B * sum over pairs u of weight(u) * (1 - GC(u))`."""
    line = re.sub(r"sum over \w+ (\w) of", r"\\sum_{\1}", line)
    line = re.sub(r"(?<![\w\\])sum(?![a-z])", r"\\sum", line)
    line = re.sub(rf"\bd(?=(?:[A-Za-z]|{_GREEK})(?![\w(]))", "d ", line)
    line = re.sub(rf"(?<![A-Za-z\\])({_GREEK})(?![A-Za-z])", r"\\\1", line)
    line = re.sub(r"(?<![\w.)^])(\d+) ?/ ?\(([^()]*)\)", r"\\frac{\1}{\2}", line)
    line = re.sub(r"(?<![\w.)^])(\d+) ?/ ?([A-Za-z](?:_\w)?)(?!\w)", r"\\frac{\1}{\2}", line)
    line = re.sub(r"\^\(([^()]*)\)", r"^{(\1)}", line)
    line = re.sub(r"\b([a-zA-Z])~", r"\\tilde{\1}", line)
    word = r"(?<![\w\\{])[A-Za-z]{2,}(?:_[A-Za-z]{2,})*(?![A-Za-z(])"
    name = r"(?<![\w\\{])[A-Za-z]{2,}(?:_[A-Za-z]{2,})*"
    line = re.sub(rf"{word}(?: {word})+", lambda m: f"\\text{{{m[0].replace(' ', _SPACE)}}}", line)
    command = r"\\(?:text{[^}]*}|\w+)"
    line = re.sub(rf"{command}|{name}", lambda m: m[0] if m[0][0] == "\\" else f"\\mathrm{{{m[0]}}}", line)
    for text, tex in _PLAIN.items():
        line = line.replace(text, tex)
    line = re.sub(r" {2,}", r"\\quad ", line)
    return re.sub(r"(?<=[\w})]) (?=[\w\\])", r"\\, ", line)


def version() -> str:
    """The library's, read and not imported."""
    source = (ROOT / "src" / "gradconsist" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', source, re.M)
    assert found is not None
    return found[1]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this with each page's Markdown."""
    return markdown.replace("{{ version }}", version())


def on_config(config: Any) -> Any:
    """MkDocs calls this once: version and source stand under every page."""
    config.copyright = f"gradconsist {version()}, MIT licence{source((ROOT / 'pyproject.toml').read_text('utf-8'))}"
    return config


def source(project: str) -> str:
    """A link to `Source` under `[project.urls]` of pyproject.toml, once there is one."""
    found = re.search(r'^Source = "(https://[^"]+)"$', project, re.M)
    return f', <a href="{found[1]}">source</a>' if found else ""
