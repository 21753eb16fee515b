"""What `tozan doctor` found, for a page: problems with their costs, facts of the machine, what backends can do."""

from __future__ import annotations

from typing import Any

from tozan.amounts import many, three
from tozan.bench.result import Result
from tozan.report.page import Table

VERDICTS = {"ok": "yes", "no": "—"}
GIB = 2**30


def summary(result: Result) -> str:
    """The machine and the number of problems, in a sentence."""
    m = _hardware(result)
    found = len(result.problems)
    problems = (
        f"{many(found, 'problem')} {'was' if found == 1 else 'were'} found." if found else "No problem was found."
    )
    if not m:
        return problems
    units = ", ".join(m["units"]) or "no matrix or vector unit that is known here"
    cores = m.get("cores", m["affinity"])  # files of before counted hardware threads
    return f"{m['processor']}, {many(cores, 'core')} for this process, with {units}. {problems}"


def advice(result: Result) -> list[str]:
    """Each problem with its cost and the line that mends it."""
    return [
        f"{one['name'].capitalize()}: {one['what']}. Costs: {one['cost']} ({one['source']}). `{one['fix']}`"
        for one in result.problems
    ]


def facts(result: Result) -> Table:
    """What the machine and the process are."""
    m, process = _hardware(result), result.facts.get("process", {})
    if not m:
        return Table("Doctor", [])
    kept = ", ".join(f"{name} {value >> 20:,} MiB" for name, value in process.get("mallopt", {}).items())
    up = [f"{one['name']} ({', '.join(one['addresses'])})" for one in m["interfaces"] if one["up"] and one["addresses"]]
    rows = [
        ("threads of a core", str(m["threads_per_core"])),
        ("NUMA domains", str(len(m["domains"]) or 1)),
        ("memory to be had", f"{m['available'] / GIB:.1f} GiB"),
        ("huge pages", m["huge_pages"] or "not known"),
        ("shared memory", f"{m['shared_memory'] / GIB:.1f} GiB"),
        ("clock source", m["clock"] or "not known"),
        ("load", f"{m['load']:.1f}"),
        ("threads that PyTorch starts with", str(process.get("threads", "—"))),
        ("products of linear layers", str(process.get("products", "—"))),
        ("causal attention", str(process.get("attention", "—"))),
        ("allocator", ", ".join(m["preloaded"]) or f"the C library's, told to keep: {kept}"),
        ("interfaces", ", ".join(up) or "none"),
        ("launcher", str(result.facts.get("launcher", {}).get("launcher", "—"))),
    ]
    rows += [
        (f"nominal peak, {name}", f"{three(peak.nominal / 1e9)} GFLOP/s = {peak.how}" if peak.nominal else peak.how)
        for name, peak in result.peaks.items()
    ]
    return Table("What the doctor saw", rows)


def backends(result: Result) -> list[Table]:
    """Operation by type of each communication backend."""
    made = []
    for name, by_operation in result.facts.get("backends", {}).items():
        types = list(next(iter(by_operation.values()), {}))
        rows = [
            (operation, *(VERDICTS.get(v := found[t], v) for t in types)) for operation, found in by_operation.items()
        ]
        note = (
            "As the backend does it. rounded: after every addition, so the sum depends on the ranks; NaN lost: max "
            "hides it; —: refused. tozan's own max keeps NaN, and its 16-bit sums are made in fp32 and rounded once."
        )
        made.append(Table(f"{name}, operation by type", rows, note, ("operation", *types)))
    return made


def _hardware(result: Result) -> dict[str, Any]:
    return dict(result.facts.get("hardware", {}))
