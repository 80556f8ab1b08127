"""Programs in Python files, with values of parameters and settings of runs."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from composeprob.errors import (
    InvalidValueError,
    LoadError,
    ProgramError,
    WrongTypeError,
)

if TYPE_CHECKING:
    from composeprob.core import AnnealedDensity, Program


class Compiled(NamedTuple):
    """A compiled program, its file as a module, and the file's settings of `infer`."""

    density: AnnealedDensity
    module: ModuleType
    settings: dict[str, Any]


def compiled(
    target: str, given: Mapping[str, Callable[[], object]] | None = None
) -> Compiled:
    """Compile the program of ``FILE[:PROGRAM]``.

    ``given`` has functions that make the values of parameters, as `arguments` takes
    them.
    """
    from composeprob import api

    program, module = load_program(target)
    values = arguments(program, module, given or {})
    settings = presets(module)
    precision = settings.pop("precision", None)
    density = api.compile(program, **values, precision=precision)
    _warn_of_other_levels(module, density)
    return Compiled(density, module, settings)


def load_program(target: str) -> tuple[Program, ModuleType]:
    """Load the program of ``FILE[:PROGRAM]``; return it with its file as a module."""
    file = target
    name = ""
    if ".py:" in target:
        file, _, name = target.rpartition(":")
    module = _load_module(file)
    return _chosen_program(module, file, name), module


def _load_module(file: str) -> ModuleType:
    """Execute a Python file as a module."""
    path = Path(file)
    if not path.is_file():
        raise LoadError(
            f"There is no file {file!r}.",
            fix="pass the path of a Python file: composeprob run FILE[:PROGRAM].",
        )
    spec = importlib.util.spec_from_file_location(f"composeprob_run_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise LoadError(
            f"{file!r} is not a Python file.", fix="its name must end in .py."
        )
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickled functions look their module up by name.
    sys.modules[spec.name] = module
    # The file may import its neighbours, as under `python FILE`.
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module


def _chosen_program(module: ModuleType, file: str, name: str) -> Program:
    """Return the program of this name, or the only one that the file defines.

    Programs that the file imports count only where it defines none.
    """
    from composeprob.core import Program

    programs = {
        key: value for key, value in vars(module).items() if isinstance(value, Program)
    }
    if name:
        if name not in programs:
            names = ", ".join(programs) or "none"
            raise ProgramError(
                f"{file} has no program {name!r}.", fix=f"its programs are: {names}."
            )
        return programs[name]
    if not programs:
        raise ProgramError(
            f"{file} has no program.",
            fix="decorate a function with @cp.program, at the top level of the file.",
        )
    defined = {}
    for key, program in programs.items():
        if getattr(program.function, "__module__", None) == module.__name__:
            defined[key] = program
    candidates = defined or programs
    first = next(iter(candidates))
    if len(candidates) > 1:
        raise ProgramError(
            f"{file} has {len(candidates)} programs: {', '.join(candidates)}.",
            fix=f"name one: composeprob run {file}:{first}",
        )
    return candidates[first]


def arguments(
    program: Program, module: ModuleType, given: Mapping[str, Callable[[], object]]
) -> dict[str, Any]:
    """Return values for a program's parameters without a default.

    They are made by the functions in ``given``, which options of the command fill, or
    else are the file's variables of the same names.
    """
    parameters = inspect.signature(program.function).parameters
    for name in given:
        if name not in parameters:
            raise InvalidValueError(
                f"--{name} was given, but program '{program.name}' has no parameter "
                f"{name!r}.",
                where=program.where,
                fix=f"name the parameter that it should be {name}, or leave --{name} "
                "out.",
            )
    values = {name: make() for name, make in given.items()}
    for name, parameter in parameters.items():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        has_default = parameter.default is not parameter.empty
        if name in given or variadic or has_default:
            continue
        if not hasattr(module, name):
            raise ProgramError(
                f"Program '{program.name}' needs a value for its parameter {name!r}.",
                where=program.where,
                fix=f"give it a default, or define a variable {name} at the top level "
                "of the file.",
            )
        if name in ("schedule", "precision"):
            raise ProgramError(
                f"Program '{program.name}' has a parameter {name!r}, and so has "
                "cp.compile itself.",
                where=program.where,
                fix="rename the parameter.",
            )
        values[name] = getattr(module, name)
    return values


def presets(module: ModuleType) -> dict[str, Any]:
    """Return a module's settings of its run: arguments of `infer`, and the precision.

    They are its variables of the arguments' names; ``num_chains`` is 1000 by default.
    """
    import numpy as np

    from composeprob.core import Checkpoint, Draws, Sampler

    # Only types are checked here: `infer` and `compile` check the values.
    kinds: dict[str, tuple[tuple[type, ...], str]] = {
        "sampler": ((Sampler,), "a sampler such as cp.SMC()"),
        "num_chains": ((int,), "a whole number"),
        "levels": ((str, Sequence, np.ndarray), '"adaptive" or an array of log-SNR'),
        "draws": ((int, Draws), "cp.Draws(1000, thin=5) or a whole number"),
        "thin": ((int,), "a whole number"),
        "checkpoint_dir": (
            (str, Path, Checkpoint),
            "a folder or cp.Checkpoint(folder)",
        ),
        "chunk": ((int,), "a whole number"),
        "precision": ((str,), '"bfloat16"'),
    }
    settings: dict[str, Any] = {"num_chains": 1000}
    for name, (types, expected) in kinds.items():
        value = getattr(module, name, None)
        if value is None:
            continue
        # Levels may be an array of JAX, which is not imported for this.
        is_array = name == "levels" and hasattr(value, "shape")
        if not isinstance(value, types) and not is_array:
            found = f"of type {type(value).__name__}"
            if isinstance(value, type):
                found = f"the class {value.__name__}"
            raise WrongTypeError(
                f"The file's variable {name}, which composeprob run uses, is {found}.",
                fix=f"make it {expected}, or rename it.",
            )
        settings[name] = value
    _warn_of_near_names(module, tuple(kinds))
    return settings


def _warn_of_other_levels(module: ModuleType, density: AnnealedDensity) -> None:
    """Warn of a variable that is named as compile's argument, and is not the levels of
    the run."""
    from composeprob.core import Schedule

    schedule = getattr(module, "schedule", None)
    if not isinstance(schedule, Schedule) or density.schedule.same_levels(schedule):
        return
    warnings.warn(
        "The file's variable schedule is no setting of the run, whose levels are those "
        "of the program's factors; levels = schedule.log_snr makes it one.",
        stacklevel=2,
    )


def _warn_of_near_names(module: ModuleType, names: tuple[str, ...]) -> None:
    """Warn of variables of a file that are named nearly as settings are, but for
    functions and classes."""
    for variable, value in vars(module).items():
        near = difflib.get_close_matches(variable, names, 1, 0.9)
        if variable in names or not near or callable(value):
            continue
        warnings.warn(
            f"The file's variable {variable} is no setting of the run, which is named "
            f"{near[0]}.",
            stacklevel=2,
        )
