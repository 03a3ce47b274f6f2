"""Packages and programs that a machine may lack: their tests are skipped with a line that says how to get them. With
BHYT_TEST_ALL=1 a missing one is an error, so that nothing is skipped silently."""

import importlib
import importlib.util
import os
import shutil
from types import ModuleType
from typing import NoReturn

import pytest


def missing(what: str, extra: str = "integrations") -> NoReturn:
    if os.environ.get("BHYT_TEST_ALL") == "1":
        raise RuntimeError(f"BHYT_TEST_ALL=1, and {what} is missing: pip install '.[{extra}]'")
    pytest.skip(f"needs {what}: pip install '.[{extra}]'", allow_module_level=True)


def needs(name: str, extra: str = "integrations") -> ModuleType:
    """The module of this name, of a package of this extra."""
    package = name.split(".")[0]
    if importlib.util.find_spec(package) is None:
        missing(package, extra)
    return importlib.import_module(name)


def needs_program(name: str) -> str:
    """The path of a program that a package of the extra `integrations` brings."""
    return shutil.which(name) or missing(name)
