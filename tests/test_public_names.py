"""The names of ``import equipoise``: sorted, all there, and free of heavy imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

import equipoise

HEAVY = ("torch", "transformers", "pyarrow", "numpy", "pydantic")


def test_the_list_is_sorted_and_every_name_exists() -> None:
    assert equipoise.__all__ == sorted(set(equipoise.__all__))
    for name in equipoise.__all__:
        value = getattr(equipoise, name)
        assert getattr(value, "__name__", name) == name
    assert set(equipoise.__all__) <= set(dir(equipoise))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'dial'"):
        _ = equipoise.dial


def test_no_public_name_hides_a_module() -> None:
    """``equipoise.tune`` is a package: a function of that name would come and go with imports."""
    import pkgutil

    modules = {module.name for module in pkgutil.iter_modules(equipoise.__path__)}
    assert not modules & set(equipoise.__all__)


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = (
        "import sys, equipoise\n"
        "assert equipoise.DialSetting((4, None)).is_cell is False\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
