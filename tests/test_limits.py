"""What ``scripts/limits.py`` finds, on a small tree that is over every limit, and on one that is not."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "limits.py"


@pytest.fixture(scope="module")
def limits():
    spec = importlib.util.spec_from_file_location("limits", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def body(lines, indent):
    return "".join(f"{indent}x = {k}\n" for k in range(lines))


def write(root, text, name="a.py"):
    path = root / "cafe_flwr" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def test_what_is_over_is_named_with_its_figure(limits, tmp_path):
    long = '"""Doc."""\n' + "def f():\n" + '    """Of\n\n    three lines."""\n' + body(40, "    ")
    wide = "class C:\n" + '    """Doc."""\n' + body(200, "    ") + "\n    def g(self):\n        pass\n"
    write(tmp_path, long + "\n\n" + wide + body(110, ""))
    assert limits.complaints(tmp_path) == [
        "cafe_flwr/a.py has 362 lines, 350 at most: split it by idea",
        "cafe_flwr/a.py:f has 41 lines, 40 at most: split it by idea",
        "cafe_flwr/a.py:C has 204 lines, 200 at most: split it by idea",
        "cafe_flwr/a.py:C.g is public and has no docstring",
    ]


def test_docstrings_do_not_count_and_what_is_private_needs_none(limits, tmp_path):
    text = '"""Doc."""\n' + "def f():\n" + '    """Of\n\n    three lines."""\n' + body(39, "    ")
    write(tmp_path, text + "\n\ndef _g():\n    def inner():\n        pass\n")
    assert limits.complaints(tmp_path) == []


def test_the_root_of_the_package_is_small(limits, tmp_path):
    for k in range(8):
        write(tmp_path, '"""Doc."""\n', f"m{k}.py")
    (found,) = limits.complaints(tmp_path)
    assert found.startswith("cafe_flwr/ holds 8 modules, 7 at most: m0.py, m1.py")
