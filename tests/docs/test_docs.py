"""The site's sources hold together. Building it (`make docs`) runs its code, and is what CI does."""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import jaxattn

SITE = Path(__file__).parents[2] / "notebooks"
PAGES = sorted(path for path in SITE.rglob("*.md") if "_build" not in path.parts)
REFERENCE = "\n".join(path.read_text() for path in PAGES if path.parent.name == "reference")
DIRECTIVE = re.compile(r"^\.\. (currentmodule|auto\w+):: ([\w.]+)(?:\n   .*)*", re.MULTILINE)
CODE = re.compile(r"^```\{code-cell\}.*?^```$", re.MULTILINE | re.DOTALL)


def documented_objects() -> dict[str, object]:
    """What the reference documents, by name: each object, and of each module what its `__all__` lists."""
    objects: dict[str, object] = {}
    module = ""
    for directive in DIRECTIVE.finditer(REFERENCE):
        kind, name = directive[1], directive[2]
        if kind == "currentmodule":
            module = name
        elif kind == "automodule":
            excluded = re.findall(r":exclude-members: (.*)", directive[0])
            excluded = {part.strip() for names in excluded for part in names.split(",")}
            listed = importlib.import_module(name)
            names = [n for n in getattr(listed, "__all__", ()) if n not in excluded]
            objects |= {f"{name}.{n}": getattr(listed, n) for n in names}
        else:
            full = name if name.startswith(("jaxattn.", "jaxattn_kernels.")) else f"{module}.{name}"
            owner, _, attribute = full.rpartition(".")
            objects[full] = getattr(importlib.import_module(owner), attribute)
    return objects


def public_names() -> dict[str, object]:
    """What the top of the package and its rooms list."""
    rooms = (
        importlib.import_module(f"jaxattn.{room.name}") for room in pkgutil.iter_modules(jaxattn.__path__)
    )
    return {
        f"{home.__name__}.{name}": getattr(home, name)
        for home in [jaxattn, *rooms]
        for name in getattr(home, "__all__", ())
    }


def test_every_public_name_stands_in_the_reference():
    documented = {id(value) for value in documented_objects().values()}
    missing = [name for name, value in public_names().items() if id(value) not in documented]
    assert not missing, f"add them to a page of {SITE / 'reference'}: {missing}"


def test_nothing_stands_in_the_reference_twice():
    first: dict[int, str] = {}
    for name, value in documented_objects().items():
        assert first.setdefault(id(value), name) == name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(SITE)))
def test_pages(page):
    """What building the site does not refuse."""
    text = page.read_text()
    assert not re.search(r"/(home|work|tmp|root)/", text)
    for cell in CODE.findall(text):
        long = [line for line in cell.splitlines() if len(line) > 88]
        assert not long, "longer than 88 characters, which is what fits beside both sidebars"


def test_every_page_is_reached_from_the_first():
    first = (SITE / "index.md").read_text()
    trees = "\n".join(re.findall(r"^```\{toctree\}\n(.*?)^```", first, re.MULTILINE | re.DOTALL))
    names = {name.strip("<>") for line in trees.splitlines() for name in line.split()}
    for page in PAGES:
        name = page.relative_to(SITE).with_suffix("").as_posix()
        assert name in names or name.startswith("0") or name == "index", name
