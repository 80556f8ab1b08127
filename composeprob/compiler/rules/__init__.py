"""The compiler's rules of every kind of combination, one kind a file. A new file is loaded with the others."""

from importlib import import_module
from pkgutil import iter_modules

for found in iter_modules(__path__):
    import_module(f"{__name__}.{found.name}")
