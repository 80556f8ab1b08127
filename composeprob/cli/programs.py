"""Programs in Python files: finding one, values for its parameters, and how the file
says that it is sampled."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from composeprob.errors import (
    InvalidValueError,
    LoadError,
    ProgramError,
    WrongTypeError,
)

if TYPE_CHECKING:
    from composeprob.density.annealed import AnnealedDensity
    from composeprob.language.decorator import Program


def compiled(
    target: str, given: Mapping[str, Callable[[], object]] | None = None
) -> tuple[AnnealedDensity, ModuleType, dict[str, Any]]:
    """What ``FILE[:PROGRAM]`` names, compiled with what makes the values of
    `arguments`; the file as a module, and how it says that it is sampled, by arguments
    of `infer`."""
    from composeprob import api

    program, module = load_program(target)
    args, settings = arguments(program, module, given or {}), presets(module)
    return (
        api.compile(program, **args, precision=settings.pop("precision", None)),
        module,
        settings,
    )


def load_program(target: str) -> tuple[Program, ModuleType]:
    """Loads the program that ``FILE[:PROGRAM]`` names; returns it with the file as a
    module."""
    from composeprob.language.decorator import Program

    file, _, name = target.rpartition(":") if ".py:" in target else (target, "", "")
    path = Path(file)
    if not path.is_file():
        fix = "pass the path of a Python file: composeprob run FILE[:PROGRAM]."
        raise LoadError(f"There is no file {file!r}.", fix=fix)
    spec = importlib.util.spec_from_file_location(f"composeprob_run_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise LoadError(
            f"{file!r} is not a Python file.", fix="its name must end in .py."
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = (
        module  # dataclasses and pickled functions look their module up by name
    )
    sys.path.insert(
        0, str(path.resolve().parent)
    )  # the file may import its neighbours, as `python FILE` lets it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.resolve().parent))
    programs = {
        key: value for key, value in vars(module).items() if isinstance(value, Program)
    }
    defined = {
        key: p
        for key, p in programs.items()
        if getattr(p.function, "__module__", None) == spec.name
    }
    if name:
        if name not in programs:
            has = ", ".join(programs) or "none"
            raise ProgramError(
                f"{file} has no program {name!r}.", fix=f"its programs are: {has}."
            )
        return programs[name], module
    if not programs:
        fix = "decorate a function with @cp.program, at the top level of the file."
        raise ProgramError(f"{file} has no program.", fix=fix)
    candidates = defined or programs
    if len(candidates) > 1:
        fix = f"name one: composeprob run {file}:{next(iter(candidates))}"
        raise ProgramError(
            f"{file} has {len(candidates)} programs: {', '.join(candidates)}.", fix=fix
        )
    return next(iter(candidates.values())), module


def arguments(
    program: Program, module: ModuleType, given: Mapping[str, Callable[[], object]]
) -> dict[str, Any]:
    """Finds values for the parameters without a default: what the command gives, made
    by ``given``, or else the file's variables of the same names."""
    parameters = inspect.signature(program.function).parameters
    for name in given:
        if name not in parameters:
            raise InvalidValueError(
                f"--{name} was given, but program '{program.name}' has no parameter {name!r}.",
                where=program.where,
                fix=f"name the parameter that it should be {name}, or leave --{name} out.",
            )
    values = {name: make() for name, make in given.items()}
    for name, parameter in parameters.items():
        several = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if name in given or several or parameter.default is not parameter.empty:
            continue
        if not hasattr(module, name):
            raise ProgramError(
                f"Program '{program.name}' needs a value for its parameter {name!r}.",
                where=program.where,
                fix=f"give it a default, or define a variable {name} at the top level of the file.",
            )
        if name in ("schedule", "precision"):
            raise ProgramError(
                f"Program '{program.name}' has a parameter {name!r}, which is what cp.compile calls one of its own.",
                where=program.where,
                fix="rename the parameter.",
            )
        values[name] = getattr(module, name)
    return values


def presets(module: ModuleType) -> dict[str, Any]:
    """Finds how a module says that it is sampled: its variables by the names of
    arguments of `infer`, and of `compile` the precision; ``num_chains`` is 1000 where
    it has none."""
    import numpy as np

    from composeprob.runtime.writer import Checkpoint, Draws
    from composeprob.samplers.sampler import Sampler

    # What each may be; that its values are right, `infer` and `compile` see to.
    kinds: dict[str, tuple[tuple[type, ...], str]] = {
        "sampler": ((Sampler,), "a sampler such as cp.SMC()"),
        "num_chains": ((int,), "a whole number"),
        "levels": ((str, Sequence, np.ndarray), '"adaptive" or an array of log-SNR'),
        "draws": ((int, Draws), "cp.Draws(1000, thin=5) or a whole number"),
        "checkpoint_dir": (
            (str, Path, Checkpoint),
            "a folder or cp.Checkpoint(folder)",
        ),
        "chunk": ((int,), "a whole number"),
        "precision": ((str,), '"bfloat16"'),
    }
    found = {"num_chains": 1000}
    for name, (types, what) in kinds.items():
        value = getattr(module, name, None)
        if value is None:
            continue
        if not isinstance(value, types) and not (
            name == "levels" and hasattr(value, "shape")
        ):
            raise WrongTypeError(
                f"The file's variable {name}, which composeprob run uses, is of type {type(value).__name__}.",
                fix=f"make it {what}, or rename it.",
            )
        found[name] = value
    return found
