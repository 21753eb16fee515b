"""What a run is: a strict, versioned TOML config with an origin for every value.

`load` reads one; `Config` is what it means. `schema.py` has the fields, `check.py` the rules between them.
"""

from tozan.config.check import check
from tozan.config.loader import Loaded, load
from tozan.config.presets import preset
from tozan.config.schema import Config

__all__ = ["Config", "Loaded", "check", "load", "preset"]
