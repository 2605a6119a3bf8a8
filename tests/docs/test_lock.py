"""requirements/private.txt pins what pyproject.toml asks for, each package with hashes."""

from __future__ import annotations

import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.documents import text_of

PIN = re.compile(r"^([\w.-]+)==([\w.]+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.M)


def asked() -> list[Requirement]:
    """The requirements of shoal and of its private extra, without PyTorch."""
    text = text_of("pyproject.toml")
    core = re.search(r"^dependencies = \[(.*?)^\]", text, re.M | re.S)
    private = re.search(r"^private = \[(.*)\]", text, re.M)
    assert core is not None
    assert private is not None
    found = [Requirement(line) for line in re.findall(r'"([^"]+)"', core[1] + private[1])]
    return [requirement for requirement in found if requirement.name != "torch"]


PINNED = {canonicalize_name(name): version for name, version, _ in PIN.findall(text_of("requirements/private.txt"))}


@pytest.mark.parametrize("requirement", asked(), ids=lambda requirement: requirement.name)
def test_every_requirement_is_pinned_to_a_version_that_it_allows(requirement: Requirement) -> None:
    assert requirement.specifier.contains(PINNED[canonicalize_name(requirement.name)])


def test_every_line_is_a_package_with_hashes() -> None:
    rest = PIN.sub("", text_of("requirements/private.txt"))
    assert all(line.startswith("#") for line in rest.splitlines())
    assert not {name for name in PINNED if name == "torch" or name.startswith(("nvidia-", "cuda-"))}
