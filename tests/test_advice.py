"""Advice of messages runs as printed: every fragment ``cp.…`` of a string of the
package exists and takes its arguments, and levels that a finding names are levels of
the density at hand."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import composeprob as cp
from composeprob.density.learned_scores import OwnScore
from composeprob.errors import ComposeProbError
from composeprob.factors.categorical import CategoricalEnergy
from composeprob.findings import Code
from composeprob.results.checks.fine_data import FineData
from composeprob.results.checks.own_scores import OwnScores
from composeprob.runtime.infer import on_levels
from messages import check_wording
from sampling_cases import learned, normal, single

PACKAGE = Path(cp.__file__).parent
PLACE = "_placeholder"
"""Stands for what a message fills in, and for dots."""

NAMESPACE = {
    "cp": cp,
    "jax": jax,
    "jnp": jnp,
    "np": np,
    "numpyro": numpyro,
    "dist": dist,
}


def strings(tree: ast.AST) -> Iterator[str]:
    """Strings of a module without its docstrings, with placeholders for what they fill
    in."""
    docstrings = set()
    inner = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            docstrings.add(node.value)
        if isinstance(node, ast.JoinedStr):
            inner.update(node.values)
    for node in ast.walk(tree):
        if node in docstrings or node in inner:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            pieces = []
            for value in node.values:
                piece = PLACE
                if isinstance(value, ast.Constant):
                    piece = str(value.value)
                pieces.append(piece)
            yield "".join(pieces)


def fragments(text: str) -> Iterator[str]:
    """Names ``cp.…`` of a text, each with its arguments if there are any."""
    for match in re.finditer(r"\bcp\.[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", text):
        end = match.end()
        if text[end : end + 1] == "(":
            depth = 0
            for i in range(end, len(text)):
                depth += {"(": 1, ")": -1}.get(text[i], 0)
                if depth == 0:
                    end = i + 1
                    break
        yield text[match.start() : end]


def collected() -> dict[str, str]:
    """Each fragment of the package, with the file where it is."""
    found: dict[str, str] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if "template" in path.parts:  # whole programs, which other tests run
            continue
        for text in strings(ast.parse(path.read_text())):
            for fragment in fragments(text):
                if fragment.startswith(f"cp.{PLACE}"):  # a name that is filled in
                    continue
                found.setdefault(fragment, str(path.relative_to(PACKAGE)))
    return found


FRAGMENTS = collected()


def check(fragment: str) -> None:
    """Resolve a fragment's name, bind its arguments, and make what is a class."""
    source = re.sub(r"…|\.\.\.", PLACE, fragment)
    # A place right after a string is that of more arguments.
    source = source.replace(f'{PLACE}"{PLACE}', f'{PLACE}", {PLACE}')
    source = re.sub(r"(\w)=([,)])", rf"\1={PLACE}\2", source)  # an argument's name
    tree = ast.parse(source, mode="eval").body
    called: Any = tree.func if isinstance(tree, ast.Call) else tree
    target = eval(ast.unparse(called), dict(NAMESPACE))
    if not isinstance(tree, ast.Call):
        return
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    is_maker = inspect.isclass(target) or inspect.isclass(
        getattr(target, "__self__", None)
    )
    if names <= NAMESPACE.keys() and is_maker and (tree.args or tree.keywords):
        eval(source, dict(NAMESPACE))
        return
    keywords = {word.arg: PLACE for word in tree.keywords if word.arg}
    # Dots and placeholders may stand for any number of arguments.
    given = [each for each in tree.args if ast.unparse(each) != PLACE]
    if target is cp.Energy and "num_values" in keywords:
        target = CategoricalEnergy  # which a call with these arguments makes
    inspect.signature(target).bind_partial(*given, **keywords)


def test_messages_give_code():
    assert len(FRAGMENTS) > 100


@pytest.mark.parametrize("fragment", sorted(FRAGMENTS))
def test_advised_code_exists_and_takes_its_arguments(fragment):
    check(fragment)


@pytest.mark.parametrize(
    "wrong",
    [
        "cp.Schedule.log_snr(60, maximum=6.5)",
        "cp.SMC(then=cp.HMC())",
        "cp.NoSuchName",
        "cp.Diffusion(network, schedules=…)",
    ],
)
def test_wrong_advice_fails(wrong):
    with pytest.raises((AttributeError, TypeError, ComposeProbError)):
        check(wrong)


# ── levels of the density at hand ─────────────────────────────────────────────────────
SHORT = cp.Schedule.log_snr(20, min=-4.6, max=9.0)


def minus(x, time):
    return -x


FACTORS = {
    "a closed form": normal(0.0, 1.0, cp.Schedule.log_snr(20, max=11.0)),
    # As an estimator of another package, whose range begins at little noise.
    "a network on a range": learned(minus, "score", SHORT),
    "a network of whole levels": learned(minus, "score", SHORT, time="level"),
}


def code(text: str, argument: str) -> str:
    """The value of an argument in a text."""
    begin = text.index(f"{argument}=") + len(argument) + 1
    depth = 0
    for i in range(begin, len(text)):
        if depth == 0 and text[i] in "),":
            return text[begin:i]
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(text[i], 0)
    raise AssertionError(text)


@pytest.mark.parametrize("name", FACTORS)
def test_levels_at_which_a_network_is_right_are_levels_of_the_program(name):
    density = cp.compile(single, FACTORS[name])
    score = OwnScore(shift=0.0, steepness=4.0, right_from=5)
    ((kind, text),) = OwnScores().findings({"f(x)": score}, density)
    assert kind == Code.NETWORK_DOUBTED
    advised = eval(code(text, "levels"), NAMESPACE | {"density": density})
    visited, _ = on_levels(density, advised, 100)
    assert visited.num_levels == 15
    own = np.asarray(density.schedule.log_snr)
    assert visited.schedule.log_snr[0] <= own[5] + 1e-4
    assert visited.schedule.log_snr[-1] >= own[-1] - 1e-4
    check_wording(text)


@pytest.mark.parametrize("name", FACTORS)
def test_levels_of_less_noise_are_advised_where_factors_know_them(name):
    """A quarter of level 0's noise takes ½·4² = 8 nats a number; levels that end at an
    eighth of it would do."""
    density = cp.compile(single, FACTORS[name])
    ((kind, text),) = FineData().findings(8.0, density)
    assert kind == Code.LEVELS_TOO_FEW
    assert "8 nats" in text
    assert ("cp.Schedule" in text) == (name == "a closed form")
    if "cp.Schedule" in text:
        advised = eval(code(text, "schedule"), NAMESPACE)
        assert advised.log_snr[0] == 16
        cp.compile(single, FACTORS[name], schedule=advised)
    check_wording(text)
    assert FineData().findings(0.5, density) == []
    assert FineData().findings(np.nan, density) == []
