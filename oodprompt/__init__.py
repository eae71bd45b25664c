"""OODPrompt: any prompt learner with any debiaser, on CLIP, with worst-group accuracy reported."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout, `trainers/` and `datasets/` lie beside this folder; setup.py installs them as subpackages. With the
# checkout on this package's path, `oodprompt.trainers` means the same folder whichever way Python found us.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "trainers" / "coop_ood.py").is_file():
    __path__.append(str(_checkout))
