"""mmalign aligns multimodal generators (flow models and captioners) by reinforcement learning."""

from pathlib import Path

__version__ = "0.1.0"

# In a wheel `pipelines` and `rewardmodels` lie inside this package; in a checkout they lie beside it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "rewardmodels").is_dir():
    __path__.append(str(_checkout))
