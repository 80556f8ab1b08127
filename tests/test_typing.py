"""What a type checker says of a user's program: `py.typed` promises that it says something true."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import composeprob as cp

PROGRAM = """
import jax
import numpyro.distributions as dist

import composeprob as cp

ring, bar = cp.load("ring2d"), cp.load("bar2d")


@cp.program
def program(ring: cp.Factor, bar: cp.Factor, y: float = 0.3) -> None:
    x = cp.sample("x", ring * bar**0.5 / ring)
    cp.observe("y", dist.Normal(x[0], 0.1), y)


density = cp.compile(program, ring, bar, y=0.2)
result = cp.infer(density, jax.random.key(0), num_chains=100, sampler=cp.SMC(cp.MALA(cp.Adaptive()), steps_per_level=2))
if result.status.ok:
    print(result.summary(), result.mean(lambda sample: sample["x"]).interval(0.9))
result.plot().savefig("samples.png")
kernels = [cp.MALA(0.1), cp.ULA(lambda levels: 0.1 * levels.sigma**2), cp.HMC(metric={"x": 0.1})]
"""
WRONG = {
    'cp.infer(density, jax.random.key(0), num_chains="many")': "arg-type",
    "cp.infer(density, jax.random.key(0))": "call-arg",
    "cp.infer(density, jax.random.key(0), num_chains=100, sampler=cp.MALA())": "arg-type",
    "cp.smc()": "attr-defined",
    "result.plott()": "attr-defined",
    'cp.Schedule.cosine("100")': "arg-type",
    'cp.MALA({"x": 0.1})': "arg-type",
    'cp.zoo("bar2d").sigma': "attr-defined",
}
ANY = 85
"""Lines of the package that say `Any`: less is better, more needs a reason."""


def test_few_lines_say_any():
    """`Any` tells neither a reader nor a type checker anything."""
    found = set()
    for path in Path(cp.__file__).parent.rglob("*.py"):
        names = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Name))
        found |= {(path, name.lineno) for name in names if name.id == "Any"}
    assert 0 < len(found) <= ANY


@pytest.mark.slow
def test_a_users_program_is_checked(tmp_path):
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(PROGRAM)
    wrong.write_text(PROGRAM + "\n".join(WRONG) + "\n")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--check-untyped-defs",
        "--ignore-missing-imports",
        "--follow-imports=silent",
        str(right),
        str(wrong),
    ]
    environment = {**os.environ, "MYPYPATH": str(Path(cp.__file__).parents[1])}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    said = [line for line in run.stdout.splitlines() if "error:" in line]
    first = len(PROGRAM.splitlines()) + 1
    for line, (statement, code) in enumerate(WRONG.items(), first):
        assert any(error.startswith(f"wrong.py:{line}:") and f"[{code}]" in error for error in said), statement
    assert len(said) == len(WRONG), said  # and nothing of the program, which is right
