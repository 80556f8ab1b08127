"""`composeprob bench`: what it finds, and what it says where there is nothing to find."""

import pytest
from typer.testing import CliRunner

import composeprob as cp
from composeprob.cli import app
from composeprob.cli import benchmarks as finder


def test_every_benchmark_is_listed_with_what_it_measures():
    shown = CliRunner().invoke(app, ["bench"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert shown.exit_code == 0
    for name, script in finder.benchmarks().items():
        assert name in shown.stdout
        assert finder.title(script)[:40] in shown.stdout
    assert {"paper-2d", "ring-product", "disjoint"} <= set(finder.benchmarks())


def test_arguments_reach_the_benchmark(tmp_path, monkeypatch, capsys):
    script = tmp_path / "echo_all.py"
    script.write_text('"""Echoes."""\nimport sys\nprint(sys.argv[1:])\nsys.exit(1)\n')
    monkeypatch.setattr(finder, "benchmarks", lambda: {"echo-all": script})
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    monkeypatch.setattr("sys.argv", ["x"])
    with pytest.raises(SystemExit) as stopped:
        finder.run_benchmark("echo-all", ["--chains", "7"])
    assert stopped.value.code == 1
    assert capsys.readouterr().out == "['--chains', '7']\n"


def test_an_unknown_benchmark_is_refused_with_the_nearest():
    with pytest.raises(cp.errors.LoadError, match="did you mean 'paper-2d'"):
        finder.run_benchmark("paper2d", [])


def test_a_wheel_says_that_it_has_none(monkeypatch, tmp_path):
    monkeypatch.setattr(finder, "__file__", str(tmp_path / "a" / "b" / "c" / "benchmarks.py"))
    with pytest.raises(cp.errors.LoadError, match="clone the repository"):
        finder.benchmarks()
