"""Pages and figures of runs, measurements and plans; torch-free, so that a login node or a laptop can draw them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tozan.errors import Problem, UserError

if TYPE_CHECKING:
    from tozan.report.drawing import Figure

Kind = Literal["run", "plan", "bench"]


def write(path: Path, out: Path | None = None, sample: str | None = None, machine: str | None = None) -> Path:
    """Write the page of a run, a measurement or a plan; figures (and their library) are imported only now.

    Args:
        path: a run folder; a plan's folder; a result of `tozan bench`, or a folder of them.
        out: the file to write. Default: `report.html` in the folder, or beside the file with its name.
        sample: of a run: text written by the model. Default: its `sample.txt`, if it is there.
        machine: of a run: a machine or its file, to set a prediction beside the measurement.

    Returns:
        The file written.

    Raises:
        UserError: it is none of these, or damaged.
    """
    from tozan.report import bench_page, plan_page, run_page

    found = kind_of(path)
    if found == "run":
        made = run_page.page(path, sample, machine)
    else:
        made = plan_page.page(plan_page.read(path)) if found == "plan" else bench_page.page(path)
    target = path / "report.html" if path.is_dir() else path.with_suffix(".html")
    return made.write(out or target)


def write_plan(plan: dict[str, Any], out: Path) -> Path:
    """Write the page of a plan that was just made.

    Args:
        plan: `planner.Plan.data()`.
        out: the file to write.

    Returns:
        The file written.

    Raises:
        UserError: it cannot be written.
    """
    from tozan.report import plan_page

    try:
        return plan_page.page(plan).write(out)
    except OSError as error:
        raise UserError(Problem(str(out), f"cannot be written: {error.strerror}")) from None


def draw(path: Path, machine: str | None = None) -> dict[str, Figure]:
    """The figures of a run, a measurement or a plan by name; each shows itself in a notebook.

    Raises:
        UserError: it is none of these, or damaged.
    """
    from tozan.report import bench_page, history, plan_page, ranks, run_page

    found = kind_of(path)
    if found == "plan":
        made = plan_page.figures(plan_page.read(path))
    elif found == "bench":
        made = [figure for result in bench_page.read_all(path) for figure in bench_page.figures(result)]
    else:
        run = history.read(path)
        who = run_page.everyone(run)
        slow = ranks.slow(who, run_page.stages(run)) if who else []
        detail = ranks.timeline(path, run.facts.get("processes"))
        made = run_page.all_figures(run, who, slow, run_page.machine_of(path, machine), detail)
    return {figure.name: figure for figure in made}


def kind_of(path: Path) -> Kind:
    """What a path is.

    Raises:
        UserError: nothing that a page can be made of.
    """
    if path.is_dir():
        if (path / "metrics.jsonl").is_file():
            return "run"
        if (path / "plan.json").is_file():
            return "plan"
        if any(path.glob("*.json")) and not (path / "run.json").is_file():
            return "bench"
    elif path.is_file():
        try:
            head = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            head = {}
        found = head.get("format") if isinstance(head, dict) else None
        if found in ("tozan plan", "tozan bench"):
            return "plan" if found == "tozan plan" else "bench"
    what = "not a run folder (no metrics.jsonl), nor a plan, nor a measurement"
    fix = "give a folder that `tozan train` or `tozan plan --out` wrote, or a file of `tozan bench`"
    raise UserError(Problem(str(path), what if path.exists() else f"is not there, so {what}", fix))
