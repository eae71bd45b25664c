"""Methods, one per file; importing this package imports every file of the folder, which registers them."""

from importlib import import_module
from pkgutil import iter_modules

for _file in iter_modules(__path__):
    import_module(f"oodprompt.trainers.{_file.name}")
