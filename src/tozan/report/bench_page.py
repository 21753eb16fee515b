"""The page of a measurement: one result of `tozan bench`, or a folder of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tozan.amounts import percent, scaled, seconds, three
from tozan.bench.result import Result, Row, read
from tozan.errors import Problem, UserError
from tozan.report import doctor_tables
from tozan.report.drawing import Figure
from tozan.report.figures import kernels, rates, scaling, steps
from tozan.report.page import Page, Table
from tozan.report.run_page import value_text
from tozan.report.words import Tile, plain

KINDS = {
    "gemm": "matrix products of a step",
    "collectives": "collectives",
    "io": "reading samples",
    "step": "phases of a step",
    "scaling": "scaling",
    "doctor": "this machine",
}
MOST_ROWS = 60


def page(path: Path) -> Page:
    """The page of a result file, or of all result files in a folder.

    Raises:
        UserError: no result there, or a damaged one.
    """
    results = read_all(path)
    first = results[0]
    drawn = [figures(result) for result in results]
    names = list(dict.fromkeys(KINDS[result.kind] for result in results))
    return Page(
        kind="tozan measurement",
        title=names[0].capitalize() if len(names) == 1 else "Measurements",
        when=f"{value_text(first.machine.get('processor', ''))} · measured {first.created[:16].replace('T', ' ')}",
        tiles=_tiles(results),
        summary=[sentence for pair in zip(results, drawn, strict=True) for sentence in summary(*pair)],
        advice=[sentence for pair in zip(results, drawn, strict=True) for sentence in advice(*pair)],
        figures=[figure for some in drawn for figure in some],
        wide=[table for pair in zip(results, drawn, strict=True) for table in tables(*pair)],
        facts=[
            _machine(first),
            *(doctor_tables.facts(result) for result in results if result.kind == "doctor"),
            *(_options(result) for result in results),
        ],
        foot="Medians with an interval that holds the true median in 95 cases of 100. " + " ".join(_notes(results)),
    )


def read_all(path: Path) -> list[Result]:
    """One file's result, or those of every result file in a folder, each kind's newest.

    Raises:
        UserError: nothing there, or a damaged file.
    """
    if path.is_file():
        return [read(path)]
    newest: dict[str, Result] = {}
    for file in sorted(path.glob("*.json")):
        try:
            result = read(file)
        except UserError:
            continue
        if result.kind not in newest or result.created >= newest[result.kind].created:
            newest[result.kind] = result
    if not newest:
        what = "holds no result of `tozan bench`"
        raise UserError(Problem(str(path), what, "name a file that `tozan bench` wrote, or a folder of them"))
    return [newest[kind] for kind in KINDS if kind in newest]


def figures(result: Result) -> list[Figure]:
    """Every figure that a result has data for."""
    made: list[Figure | None] = [kernels.roofline(result), *rates.of_doctor(result), kernels.collectives(result)]
    made += [rates.latencies_of_collectives(result), *rates.of_io(result)]
    if result.kind == "scaling":
        for mode in ("strong", "weak"):
            found = scaling.points(result, mode)
            made += [scaling.curve(found, mode), scaling.breakdown(found, mode)]
    if result.kind == "step":
        made.append(steps.of_bench(result))
    return [one for one in made if one is not None]


def summary(result: Result, drawn: Sequence[Figure]) -> list[str]:
    """What was found, in a sentence or two; the figures' own words."""
    if result.kind == "doctor":
        return [doctor_tables.summary(result)]
    if drawn:
        if result.kind == "io":
            return [_readers(result)]
        return [f"{KINDS[result.kind].capitalize()}: {drawn[0].description}"]
    first = ", ".join(f"{row.name}: {shown(row)}" for row in result.rows[:3])
    return [f"{KINDS[result.kind].capitalize()}: {first}."] if first else []


def advice(result: Result, drawn: Sequence[Figure]) -> list[str]:
    """What to do next about it."""
    if result.kind == "gemm":
        worst = kernels.slowest_products(result, 1)
        if not worst:
            return []
        name, shape, _, rate, share, _, time = worst[0]
        return [
            f"Most of the products' time ({time}) goes into {name} ({shape}): {rate}, {share} of the best product. "
            "Another `train.micro_batch` or `layout.tensor` changes its shape; measure it to see whether it helps."
        ]
    if result.kind == "scaling":
        found = scaling.points(result)
        made = next((figure for figure in drawn if figure.name == "strong-breakdown"), None)
        if len(found) > 1:
            ideal = found[0].seconds * found[0].ranks / found[-1].ranks / found[-1].seconds
            ends = f"{made.description.rpartition('. ')[2]} " if made else ""
            return [
                f"{ends}At {percent(ideal)} of ideal on {found[-1].ranks:,} ranks, `tozan plan MODEL --machine FILE` "
                "says which layout suits that many better."
            ]
    if result.kind == "doctor":
        return doctor_tables.advice(result)
    return []


def tables(result: Result, drawn: Sequence[Figure]) -> list[Table]:
    """The tables of a result: the talk's for scaling, the products that cost most, or its rows."""
    if result.kind == "scaling":
        found = scaling.points(result) or scaling.points(result, "weak")
        peak = found[0].peak if found else None
        return [Table("FLOP/s", scaling.talk_table(found), scaling.talk_note(peak), scaling.TALK_HEAD)]
    if result.kind == "gemm":
        head = ("product", "m × n × k", "precision", "rate", "of best", "of nominal", "of the products' time")
        return [Table("Products that take most time", kernels.slowest_products(result), "", head)]
    if result.kind == "doctor":
        return doctor_tables.backends(result)
    if drawn:
        return []
    rows = [
        (row.name, shown(row), f"{_text(row, row.low)} – {_text(row, row.high)}", str(row.repeats))
        for row in result.rows
    ]
    note = f"… and {len(rows) - MOST_ROWS} more in the file." if len(rows) > MOST_ROWS else ""
    return [Table(KINDS[result.kind].capitalize(), rows[:MOST_ROWS], note, ("what", "median", "interval", "repeats"))]


def _readers(result: Result) -> str:
    """The fastest and the slowest reader, in a sentence."""
    rows = sorted((row for row in result.rows if row.get("p50_seconds")), key=lambda row: -row.median)
    if not rows:
        return ""
    ends = f"{three(rows[0].median)} reads a second by {rows[0].name}, {three(rows[-1].median)} by {rows[-1].name}"
    return f"Documents in random order: {ends}."


def shown(row: Row) -> str:
    """A row's median with its unit."""
    return _text(row, row.median)


def _text(row: Row, value: float) -> str:
    if row.unit == "s":
        return seconds(value)
    return scaled(value, row.unit.replace("bytes/s", "B/s"))


def _tiles(results: Sequence[Result]) -> list[Tile]:
    made: dict[str, Tile] = {}
    for result in results:
        for precision, peak in result.peaks.items():
            remark = f"of {scaled(peak.nominal, 'FLOP/s')} nominal" if peak.nominal else "measured"
            made.setdefault(precision, Tile(f"Peak, {precision}", scaled(peak.measured, "FLOP/s"), remark))
        if result.bandwidth:
            made.setdefault("bandwidth", Tile("Memory", scaled(result.bandwidth, "B/s"), "large copy"))
        if result.kind == "step":
            made |= _step_tiles(result)
        if result.kind == "scaling" and (found := scaling.points(result)):
            made["scaling"] = Tile("Ranks", f"{found[-1].ranks:,}", f"from {found[0].ranks:,}")
    return list(made.values())


def _step_tiles(result: Result) -> dict[str, Tile]:
    """Speed of the whole step and its shares of both peaks."""
    whole = next((row for row in result.rows if row.get("tokens_per_second")), None)
    if whole is None:
        return {}
    share = f", {percent(whole['nominal_share'])} of nominal" if whole.get("nominal_share") else ""
    return {
        "speed": Tile("Speed", three(whole["tokens_per_second"]), "tokens/s, median step"),
        "flops": Tile("Model FLOP/s", scaled(whole["flops_per_second"], "FLOP/s"), "3 × forward"),
        "mfu": Tile("MFU", percent(whole["mfu"]), f"of the best product{share}"),
    }


def _machine(result: Result) -> Table:
    facts = {key: value for key, value in result.machine.items() if plain(value)}
    memory = facts.pop("memory_bytes", None)
    rows = [(key.replace("_", " "), value_text(value)) for key, value in facts.items()]
    rows += [("memory", f"{memory / 2**30:.1f} GiB")] if memory else []
    rows += [(name, version) for name, version in result.versions.items()]
    return Table("Machine and versions", rows)


def _options(result: Result) -> Table:
    rows = [(key.replace("_", " "), value_text(value)) for key, value in result.options.items()]
    return Table(f"Asked for: {KINDS[result.kind]}", rows)


def _notes(results: Sequence[Result]) -> list[str]:
    return [f"{note[0].upper()}{note[1:].rstrip('.')}." for result in results for note in result.notes]
