"""The examples in the library's docstrings run, and give the digits that they show."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import gradconsist

MODULES = ["gradconsist", *(found.name for found in pkgutil.walk_packages(gradconsist.__path__, "gradconsist."))]


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, _ = doctest.testmod(importlib.import_module(module), optionflags=flags)
    assert failed == 0
