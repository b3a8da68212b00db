"""The style of the public names: documented, keyword-only options, nothing extra."""

import inspect

import pytest

import opnorm_jax as oj

pytestmark = pytest.mark.quick

FUNCTIONS = [name for name in oj.__all__ if inspect.isfunction(getattr(oj, name))]


@pytest.mark.parametrize("name", oj.__all__)
def test_has_a_docstring(name):
    assert getattr(oj, name).__doc__ and not name.startswith("_")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_has_every_section(name):
    doc = inspect.getdoc(getattr(oj, name))
    for section in ("Args", "Returns:", "Raises", "Cost", "Examples:\n"):
        assert section in doc, section


@pytest.mark.parametrize("name", FUNCTIONS)
def test_options_are_keyword_only(name):
    for parameter in inspect.signature(getattr(oj, name)).parameters.values():
        if parameter.default is not inspect.Parameter.empty and (name, parameter.name) != ("normalize", "max_norm"):
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, parameter.name


def test_all_is_sorted_and_complete():
    assert oj.__all__ == sorted(oj.__all__)
    public = {n for n in vars(oj) if not n.startswith("_") and not inspect.ismodule(getattr(oj, n))}
    assert public == set(oj.__all__)
