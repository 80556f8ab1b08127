"""`python -m benchmarks`: what it finds, and with `--stale` which results are older
than what they depend on."""

import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import composeprob as cp
from benchmarks import __main__ as finder
from benchmarks import ages
from messages import check_wording


def test_every_benchmark_is_listed_with_what_it_measures(capsys):
    assert finder.main([]) == 0
    shown = capsys.readouterr().out
    for name, script in finder.benchmarks().items():
        assert name in shown
        assert finder.title(script)[:40] in shown
    assert {"paper-2d", "ring-product", "disjoint"} <= set(finder.benchmarks())


def test_arguments_reach_the_benchmark(tmp_path, monkeypatch, capsys):
    script = tmp_path / "echo_all.py"
    script.write_text(
        '"""Echoes."""\nimport argparse\nimport sys\nprint(sys.argv[1:])\nsys.exit(1)\n'
    )
    monkeypatch.setattr(finder, "benchmarks", lambda: {"echo-all": script})
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    monkeypatch.setattr("sys.argv", ["x"])
    with pytest.raises(SystemExit) as stopped:
        finder.run_benchmark("echo-all", ["--chains", "7"])
    assert stopped.value.code == 1
    assert capsys.readouterr().out == "['--chains', '7']\n"


@pytest.mark.parametrize(
    ("argument", "code", "shown"), [("--help", 0, "Runs for long."), ("--fast", 2, "")]
)
def test_a_benchmark_without_options_shows_help_and_does_not_run(
    tmp_path, monkeypatch, capsys, argument, code, shown
):
    script = tmp_path / "long.py"
    script.write_text('"""Runs for long."""\nraise AssertionError("it ran")\n')
    monkeypatch.setattr(finder, "benchmarks", lambda: {"long": script})
    with pytest.raises(SystemExit) as stopped:
        finder.run_benchmark("long", [argument])
    assert stopped.value.code == code
    assert shown in capsys.readouterr().out


def test_an_unknown_benchmark_is_refused_with_the_nearest():
    with pytest.raises(cp.errors.LoadError, match="'paper-2d'") as caught:
        finder.run_benchmark("paper2d", [])
    check_wording(str(caught.value))


# ── ages of results ───────────────────────────────────────────────────────────────────

SCRIPT, LIBRARY, COMMANDS = (
    "benchmarks/quick.py",
    "composeprob/core.py",
    "composeprob/cli/app.py",
)


class Checkout:
    """A repository with a library, a benchmark and its results."""

    def __init__(self, root):
        self.root = root
        ages.git(root, "init", "-q")
        for file in (
            SCRIPT,
            LIBRARY,
            COMMANDS,
            "models/weights.txt",
            "models/ring/card.md",
            "benchmarks/report.py",
            "docs/page.md",
        ):
            self.write(file)
        self.commit("begin")

    def write(self, file, text="one\n"):
        path = self.root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def commit(self, subject):
        ages.git(self.root, "add", "-A")
        who = (
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@b.c",
            "-c",
            "commit.gpgsign=false",
        )
        ages.git(self.root, *who, "commit", "-q", "--allow-empty", "-m", subject)

    def change(self, *files):
        for file in files:
            self.write(file, (self.root / file).read_text() + "more\n")
        self.commit(f"change {' '.join(files)}")

    def measured(self):
        """A result made now."""
        self.result(made_at=self.stamp())

    def stamp(self):
        return ages.Code.now(self.root).stamp()

    def result(self, **fields):
        record = {"command": "python -m benchmarks quick", **fields}
        self.write("benchmarks/results/quick.json", json.dumps(record))
        self.commit("measured")

    def age(self):
        (age,) = ages.ages(self.root)
        return age


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    made = Checkout(tmp_path)
    script = types.ModuleType("quick")
    script.__file__ = str(tmp_path / SCRIPT)
    monkeypatch.setitem(sys.modules, "quick", script)
    for name in [
        name for name in sys.modules if name.startswith("composeprob.models.")
    ]:
        monkeypatch.delitem(sys.modules, name)
    return made


def test_only_what_a_result_depends_on_makes_it_older(checkout):
    checkout.measured()
    checkout.change(
        "docs/page.md", "benchmarks/report.py", COMMANDS, "models/weights.txt"
    )
    assert not checkout.age().stale
    checkout.change(SCRIPT)
    checkout.change(LIBRARY)
    age = checkout.age()
    assert age.stale
    assert [text.split(" ", 2)[2] for text in age.later] == [
        f"change {LIBRARY}",
        f"change {SCRIPT}",
    ]
    assert age.commit == ages.git(checkout.root, "rev-parse", "HEAD~4").strip()


def test_models_and_examples_count_where_they_were_used(checkout, monkeypatch):
    for name in ("used", "beside"):
        checkout.write(f"examples/{name}.py")
    checkout.commit("examples")
    example = types.ModuleType("composeprob_run_used")
    example.__file__ = str(checkout.root / "examples/used.py")
    for module in (example, types.ModuleType("composeprob.models.scenes")):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    checkout.measured()
    # A card quotes results.
    checkout.change("examples/beside.py", "models/ring/card.md")
    assert not checkout.age().stale
    checkout.change("examples/used.py")
    checkout.change("models/weights.txt")
    assert len(checkout.age().later) == 2


def test_what_no_commit_had_is_said(checkout):
    checkout.write(LIBRARY, "tried\n")
    checkout.write(COMMANDS, "tried\n")
    stamp = checkout.stamp()
    assert stamp["changed"] == [LIBRARY]
    checkout.result(made_at=stamp)
    assert checkout.age().stale
    assert checkout.age().why == f"made with changes that no commit had: {LIBRARY}"


def test_a_result_without_a_commit_is_of_unknown_age(checkout):
    checkout.result()
    age = checkout.age()
    assert (age.commit, age.why, age.later) == (None, "no commit recorded", ())
    assert age.stale
    checkout.change(SCRIPT)
    assert len(checkout.age().later) == 1


@pytest.mark.parametrize(
    "parts",
    [lambda new, old: {"cells": {"a": new, "b": old}}, lambda *rows: {"rows": rows}],
)
def test_a_table_made_in_parts_is_as_old_as_its_oldest(checkout, parts):
    old = {"made_at": checkout.stamp()}
    checkout.change(LIBRARY)
    new = {"made_at": checkout.stamp()}
    checkout.result(**new, **parts(new, old))
    assert len(checkout.age().later) == 1
    assert checkout.age().commit == old["made_at"]["commit"]
    checkout.result(**new, **parts(new, {"made_at": None}))
    assert checkout.age().why == "no commit recorded for 1 of 2 parts"


def test_kept_parts_name_the_code_and_machine_that_made_them(
    checkout, monkeypatch, tmp_path
):
    """A later run that writes the table says what its parts were measured with, and
    the table is as old as the oldest of them."""
    monkeypatch.syspath_prepend(str(Path(finder.__file__).parent))
    report = importlib.import_module("report")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "benchmarks/results")
    first = checkout.stamp()["commit"]
    for part in ("one", "two"):
        monkeypatch.setattr(report, "PARTS", {})
        monkeypatch.setattr(report, "CODE", ages.Code.now(checkout.root))
        assert report.kept("quick", "one", lambda: [1.5]) == [1.5]
        assert report.kept("quick", part, lambda: [2.5]) != []
        checkout.change(LIBRARY)
    report.publish("quick", "Quick", ["a"], [["b"]], {}, {})
    record = json.loads((tmp_path / "benchmarks/results/quick.json").read_text())
    parts = record["parts"]
    assert parts["quick/one"]["made_at"]["commit"] == first
    assert parts["quick/two"]["made_at"]["commit"] == record["made_at"]["commit"]
    assert parts["quick/two"]["machine"]["cpu"] == record["machine"]["cpu"]
    shown = (tmp_path / "benchmarks/results/quick.md").read_text()
    assert f"1 at commit {first[:9]}" in shown
    checkout.commit("results")
    assert checkout.age().commit == first
    # A part of before parts named their code.
    (tmp_path / "out/quick/old.json").write_text('{"share": 0.5}')
    assert report.kept("quick", "old", lambda: None) == {"share": 0.5}
    report.publish("quick", "Quick", ["a"], [["b"]], {}, {})
    checkout.commit("results again")
    assert checkout.age().why == "no commit recorded for 1 of 4 parts"


@pytest.mark.parametrize(
    ("columns", "load", "told"),
    [
        (["seconds a run"], 9.1, True),
        (["error"], 9.1, False),
        (["seconds"], 1.8, False),
    ],
)
def test_seconds_of_a_busy_machine_are_told(monkeypatch, columns, load, told):
    monkeypatch.syspath_prepend(str(Path(finder.__file__).parent))
    report = importlib.import_module("report")
    sentence = report.busy(columns, {"load": load, "cores": 2})
    assert ("The machine was busy" in sentence) == told


def test_a_commit_of_another_history_is_named(checkout):
    checkout.result(
        made_at={"commit": "0" * 40, "paths": ["composeprob"], "changed": []}
    )
    assert checkout.age().why == "commit 000000000 is not in this history"


def test_the_command_lists_them_and_fails_where_one_is_stale(
    checkout, monkeypatch, capsys
):
    monkeypatch.setattr(
        finder, "__file__", str(checkout.root / "benchmarks/__main__.py")
    )
    checkout.measured()
    assert finder.main(["--stale"]) == 0
    assert "quick.json" in capsys.readouterr().out
    checkout.change(LIBRARY)
    assert finder.main(["--stale"]) == 1
    shown = capsys.readouterr().out
    cells = [
        line.split("│")[4].strip()
        for line in shown.splitlines()
        if line.startswith("│")
    ]
    assert f"change{LIBRARY}" in "".join(cells).replace(" ", "")
    with pytest.raises(cp.errors.LoadError) as caught:
        finder.main(["--stale", "quick"])
    check_wording(str(caught.value))


def test_without_a_history_it_says_so(tmp_path):
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "benchmarks/results/quick.json").write_text("{}")
    with pytest.raises(cp.errors.LoadError) as caught:
        ages.ages(tmp_path)
    check_wording(str(caught.value))
    assert ages.Code.now(tmp_path).stamp() is None


def test_without_git_it_says_so(tmp_path, monkeypatch):
    def none(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", none)
    with pytest.raises(cp.errors.LoadError, match="git") as caught:
        ages.git(tmp_path, "status")
    check_wording(str(caught.value))


# ── the gate ──────────────────────────────────────────────────────────────────────────
@pytest.fixture
def gate(monkeypatch, tmp_path):
    """The gate, whose committed line lies in an empty folder."""
    monkeypatch.syspath_prepend(str(Path(finder.__file__).parent))
    # Its import sets a flag of the compiler.
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    module = importlib.import_module("gate")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def gate_rows(gate, silent, runs=4):
    """Return rows of runs, of which so many are wrong and OK."""
    rows = []
    for number in range(runs):
        outcome = gate.Outcome.DEFECT if number < silent else gate.Outcome.RIGHT
        row = {"program": f"program {number}", "chains": 64, "key": 0, "seconds": 1.0}
        row |= {"exact": [0.5], "estimates": [0.1], "errors": [0.1], "codes": []}
        rows.append(row | {"outcome": str(outcome), "evaluations": 10})
    return rows


def written_line(gate, **families):
    every = [row for rows in families.values() for row in rows]
    line = {family: gate.counts_of(rows) for family, rows in families.items()}
    line["in all"] = gate.counts_of(every)
    (gate.RESULTS / "gate_short.json").write_text(json.dumps({"families": line}))


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [(1, 1, 0), (0, 1, 0), (2, 0, 1), (1, 2, 1), (0, 3, 1)],
)
def test_the_gate_refuses_more_runs_that_are_wrong_and_ok(
    gate, capsys, first, second, status
):
    """The line has one such run in each family. Fewer in the other family make no
    room for a rise in one."""
    one = gate_rows(gate, 1)
    written_line(gate, first=one, second=one)
    groups = {"first": gate_rows(gate, first), "second": gate_rows(gate, second)}
    assert gate.judge("gate_short", groups) == status
    assert ("FAILS" in capsys.readouterr().out) == bool(status)


def test_the_gate_refuses_other_runs_than_those_of_its_line(gate):
    rows = gate_rows(gate, 0)
    assert gate.judge("gate_short", {"first": rows}) == 1
    written_line(gate, first=rows)
    assert gate.judge("gate_short", {"first": rows}) == 0
    assert gate.judge("gate_short", {"first": rows}, missing=1) == 1
    assert gate.judge("gate_short", {"first": rows[:3]}) == 1
    assert gate.judge("gate_short", {"first": rows, "second": rows}) == 1


@pytest.mark.slow
def test_programs_of_the_gate_have_names_of_their_own(gate):
    runs = gate.selection(short=False)
    names = [(run.case.name, run.chains) for run in runs]
    assert len(set(names)) == len(names)
    short = gate.selection(short=True)
    assert {run.family for run in short} == set(gate.FAMILIES)
    assert len(short) == sum(map(len, gate.SHORT.values()))


@pytest.mark.slow
def test_the_committed_line_of_the_gate_is_of_its_short_form(gate):
    results = Path(finder.__file__).parent / "results"
    line = json.loads((results / "gate_short.json").read_text())
    runs = {(run.case.name, run.chains) for run in gate.selection(short=True)}
    assert {(row["program"], row["chains"]) for row in line["rows"]} <= runs
