"""`python -m benchmarks`: what it finds, and what it says where there is nothing to find."""

import pytest

import composeprob as cp
from benchmarks import __main__ as finder


def test_every_benchmark_is_listed_with_what_it_measures(capsys):
    assert finder.main([]) == 0
    shown = capsys.readouterr().out
    for name, script in finder.benchmarks().items():
        assert name in shown
        assert finder.title(script)[:40] in shown
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
