"""Prices runs before they run: which layout, how long, how much memory, what cost. Imports no torch.

`plan` searches the layouts of a model on a machine, `predict` prices one run's config, `validate` predicts published
tables, `talk` reproduces the pages that this project started from.
"""

from tozan.planner.plan import Plan, plan
from tozan.planner.predict import Prediction, predict
from tozan.planner.talk import Talk, talk
from tozan.planner.validate import validate

__all__ = ["Plan", "Prediction", "Talk", "plan", "predict", "talk", "validate"]
