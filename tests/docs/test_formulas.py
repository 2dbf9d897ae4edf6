"""docs/generators/formulas.py: TeX, and the plain formulas of docstrings, as MathML."""

from __future__ import annotations

import html
import re
from types import ModuleType

import pytest
from pages import program


@pytest.fixture(scope="module")
def formulas() -> ModuleType:
    return program("docs/generators/formulas")


def test_parts_of_a_formula(formulas: ModuleType) -> None:
    assert formulas.mathml(r"\frac{a}{2}") == (
        '<math display="inline"><mrow><mfrac><mrow><mi>a</mi></mrow><mrow><mn>2</mn></mrow></mfrac></mrow></math>'
    )
    assert "<msubsup><mi>R</mi><mi>F</mi><mn>2</mn></msubsup>" in formulas.mathml("R_F^2")
    assert "<munder><mo>&sum;</mo><mi>u</mi></munder>" in formulas.mathml(r"\sum_u x")
    assert "<mtext>two&nbsp;words</mtext>" in formulas.mathml(r"\text{two words}")


def test_the_source_is_linked_once_it_has_an_address(formulas: ModuleType) -> None:
    project = '[project.urls]\nSource = "https://example.org/source"\n'
    assert formulas.source(project) == ', <a href="https://example.org/source">source</a>'
    assert formulas.source("[project]\n") == ""


def test_what_it_does_not_know_is_an_error(formulas: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"does not know \\unheard"):
        formulas.mathml(r"\unheard")
    with pytest.raises(ValueError, match="a brace is not closed"):
        formulas.mathml("{a")


@pytest.mark.parametrize(
    ("line", "drawn"),
    [
        ("L_g = 1/B * sum over pairs u of weight(u) * (1 - GC(u))", "Lg=1B·∑uweight(u)·(1-GC(u))"),
        ("theta' <- a theta' + (1 - a) theta", "θ'←aθ'+(1-a)θ"),
        ("mask = 1[max p >= threshold]", "mask=1[maxp≥threshold]"),
        ("w = exp(-x^2 / (2 y))", "w=exp(-x2/(2y))"),
    ],
)
def test_plain_formulas(formulas: ModuleType, line: str, drawn: str) -> None:
    element = formulas.mathml(formulas.plain(line), block=True)
    letters = re.sub("<.*?>", "", element).replace("&minus;", "-").replace("&prime;", "'")
    assert re.sub(r"\s", "", html.unescape(letters)) == drawn
