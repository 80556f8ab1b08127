"""Families of tests: each test has its marks, and a change runs the families that it
touches."""

import ast
import subprocess
from pathlib import Path

import families
import pytest
from families import FAMILIES, changed, family_of, marks, touched

ROOT = Path(__file__).parents[1]


def test_families_are_made_of_files_and_tests_that_exist():
    for family in FAMILIES.values():
        for place in (*family.tests, *family.sources):
            assert (ROOT / place).exists(), place
        for case in family.cases:
            file, *test = case.partition("[")[0].split("::")
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            names = {node.name for node in ast.walk(tree) if hasattr(node, "name")}
            assert set(test) <= names, case


def defined(body, within=()):
    """Yield the tests of a module or class with the names of their classes."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from defined(node.body, (*within, node.name))
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield (*within, node.name), node


def test_quick_tests_that_must_find_a_mutant_are_in_the_core():
    found = 0
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for names, test in defined(tree.body):
            slow = any("slow" in ast.unparse(mark) for mark in test.decorator_list)
            if slow or "assert_disagrees" not in ast.unparse(test):
                continue
            place = "::".join((file.relative_to(ROOT).as_posix(), *names))
            assert families.CORE in marks(place), place
            found += 1
    assert found


def test_a_test_is_of_the_nearest_family():
    assert family_of("tests/pretrained/test_goldens.py") == "pretrained"
    assert family_of("tests/pretrained/test_estimators.py") == "estimators"
    assert family_of("tests/sampling/test_reveal.py") == "tokens"
    assert family_of("tests/sampling/test_step.py") == "samplers"
    assert family_of("tests/algebra/test_laws.py") is None
    assert marks("tests/algebra/test_laws.py::test_it") == ["core"]
    assert marks("tests/kernels/test_mutants.py::test_it[a]") == ["kernels", "core"]
    assert marks("tests/kernels/test_gibbs.py::test_it") == ["kernels"]
    assert marks("tests/metrics/test_evidence.py::test_it[a]") == ["likelihoods"]
    case = FAMILIES["likelihoods"].cases[0]
    assert marks(f"{case}[3]") == marks(case) == ["likelihoods", "core"]
    kernel = "tests/language/test_evidence.py::TestKernel"
    assert marks(f"{kernel}::test_it[3]") == ["hierarchies", "core"]
    assert marks("tests/language/test_evidence.py::TestAlone::test_it") == [
        "hierarchies"
    ]


def test_this_test_is_of_the_core(request):
    assert request.node.get_closest_marker("core")
    assert not request.node.get_closest_marker("training")


@pytest.mark.parametrize(
    ("file", "names"),
    [
        (
            "composeprob/metrics/likelihood.py",
            ["likelihoods", "documents", "mistakes", "packaging"],
        ),
        ("tests/pretrained/test_estimators.py", ["estimators"]),
        (
            "composeprob/pretrained/estimators.py",
            ["pretrained", "estimators", "documents", "mistakes", "packaging"],
        ),
        (
            "composeprob/kernels/langevin.py",
            ["documents", "kernels", "samplers", "mistakes", "packaging"],
        ),
        ("modelsx/other.py", []),
        ("tests/conftest.py", list(FAMILIES)),
        (".ci/run", list(FAMILIES)),
    ],
)
def test_what_a_change_touches(file, names):
    assert touched(["CHANGELOG.md", file]) == names


class Checkout:
    """A repository of one commit."""

    def __init__(self, root):
        self.root = root
        self.git("init", "-q", "-b", "main")
        self.commit("README.md")

    def git(self, *arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        command = ["git", *who, "-c", "commit.gpgsign=false", *arguments]
        subprocess.run(command, cwd=self.root, check=True, capture_output=True)

    def write(self, file):
        with (self.root / file).open("a") as opened:
            opened.write("more\n")

    def commit(self, file):
        self.write(file)
        self.git("add", "-A")
        self.git("commit", "-q", "-m", f"change {file}")


def test_a_branch_is_compared_with_where_it_left_the_main_one(tmp_path):
    checkout = Checkout(tmp_path)
    assert changed(tmp_path) is None  # there is no commit before the first
    checkout.commit("a")
    checkout.commit("b")
    assert changed(tmp_path) == ["b"]
    checkout.git("checkout", "-q", "-b", "feature")
    checkout.commit("c")
    checkout.commit("d")
    checkout.write("README.md")  # not committed
    checkout.write("e.md")  # and not known to git
    checkout.write("f.py")
    assert changed(tmp_path) == ["README.md", "c", "d", "e.md", "f.py"]


def test_without_a_history_every_family_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(families, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert families.main() == 0
    assert capsys.readouterr().out.split() == list(FAMILIES)
