import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tozan.errors import UserError
from tozan.report import history


def test_reads_steps_once_though_the_run_was_killed_and_resumed(run_folder):
    found = history.read(run_folder(390))
    assert found.steps["step"].tolist() == list(range(1, 391))
    assert found.tokens == 390 * 2048
    assert np.isnan(found.steps["loss"][39])
    assert found.evals["trained"].tolist() == (found.evals["step"] * 2048).tolist()
    assert ("skipped step", 40) in {(event.event, event.step) for event in found.events}
    assert found.origins["run.folder"] == "run.toml:3"
    assert found.manifest["licences"]["PSF-2.0"]["documents"] == 1790


def test_records_beyond_a_resume_are_dropped_until_they_are_made_again():
    first_life = [{"kind": "step", "step": step, "loss": 1.0} for step in (1, 2, 3, 4)]
    second = [{"kind": "event", "step": 2, "event": "resumed", "text": ""}, {"kind": "step", "step": 3, "loss": 2.0}]
    steps, _, _ = history.merge(first_life + second)
    assert [(record["step"], record["loss"]) for record in steps] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_a_folder_without_records_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        history.read(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "st')
    with pytest.raises(UserError, match="no complete record"):
        history.read(tmp_path)


def test_missing_and_broken_files_beside_the_metrics_leave_gaps_only(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "step", "step": 1, "loss": 3.0}) + "\n")
    (tmp_path / "run.json").write_text("{")
    (tmp_path / "config.toml").write_text("[")
    found = history.read(tmp_path)
    assert found.facts == {}
    assert found.config == {}
    assert found.steps["loss"].tolist() == [3.0]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(4, 60))
@example([1.0, 0.0, 2.0, 0.0, 0.0, 1.0, 0.0, 0.0, 3.0], 6)  # where the last one, and the highest, once got lost
def test_thinning_keeps_the_ends_the_order_and_the_extremes(values, most):
    x, y = np.arange(len(values), dtype=float), np.array(values)
    thin_x, thin_y = history.thin(x, y, most)
    assert thin_x.size <= most
    assert np.all(np.diff(thin_x) > 0)
    assert (thin_x[0], thin_x[-1]) == (0, len(values) - 1)
    assert thin_y.min() == y.min()
    assert thin_y.max() == y.max()
    assert np.array_equal(y[thin_x.astype(int)], thin_y)


def test_smoothing_leaves_a_constant_alone_and_passes_over_gaps():
    assert np.allclose(history.smooth(np.full(500, 3.0)), 3.0)
    assert np.allclose(history.smooth(np.array([2.0, np.nan, 2.0])), 2.0)
