"""What `tozan doctor` prints, from its result alone; torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tozan.amounts import many, scaled
from tozan.bench.result import Result
from tozan.bench.show import binary, table

MARKS = {"ok": "yes", "NaN lost": "NaN lost", "rounded": "rounded", "wrong": "WRONG", "no": "—"}
INSTEAD = (
    "tozan's own: max that keeps NaN; 16-bit sums in fp32, rounded once; reduce_scatter without the double traffic.",
    "rounded: after every addition, so the sum depends on the ranks; NaN lost: max hides it; —: refused.",
)


def page(result: Result) -> list[object]:
    """The page's parts: machine, process, network, measured, backends, problems."""
    machine, process = result.facts["hardware"], result.facts["process"]
    parts: list[object] = [Text(f"tozan doctor · {result.created[:16].replace('T', ' ')}", style="bold")]
    parts += _section("machine", _machine(machine, result))
    parts += _section("process", _process(machine, process, result))
    parts += _section("network", _network(machine, result.facts["launcher"]))
    parts += ["", Text("matrix products, FLOP/s", style="bold"), _indented(_products(result))]
    parts += [
        Padding(Text(f"nominal, {name}: {peak.how}", style="dim"), (0, 0, 0, 2)) for name, peak in result.peaks.items()
    ]
    parts += ["", Text("all_reduce between two processes, bus bandwidth", style="bold"), _indented(_routes(result))]
    for name, by_operation in result.facts["backends"].items():
        parts += [
            "",
            Text(f"{name}, operation by type, on three ranks", style="bold"),
            _indented(_matrix(by_operation)),
        ]
    parts += [Padding(Text(line, style="dim"), (0, 0, 0, 2)) for line in INSTEAD]
    return [*parts, "", *_problems(result.problems), *(f"· {note}" for note in result.notes)]


def _machine(m: Mapping[str, Any], result: Result) -> Iterable[tuple[str, str]]:
    virtual = " (virtual machine)" if m["hypervisor"] else ""
    quota = f", time of {m['quota']:.3g}" if m["quota"] else ""
    yield "processor", f"{m['processor']}{virtual}"
    threads = (
        f"hardware threads: {m['online']} online, {m['affinity']} for this process, {m['threads_per_core']} per core"
    )
    yield "cores", f"{m['cores']} for this process{quota}; {threads}"
    yield "units", ", ".join(m["units"]) or "none known: plain vector code"
    sizes = (f"{domain}: {binary(size)}" for domain, size in m["domains"].items())
    balancing = "; the kernel moves pages between them" if m["numa_balancing"] else ""
    yield "NUMA domains", f"{len(m['domains']) or 1}" + (f" ({', '.join(sizes)})" if m["domains"] else "") + balancing
    limit = f", limit {binary(m['memory_limit'])}" if m["memory_limit"] else ""
    copy = scaled(result.row("memory copy").median, "B/s")
    yield "memory", f"{binary(m['memory'])}, {binary(m['available'])} to be had{limit}; copy {copy}, both ways counted"
    reserved = f"; {m['explicit_huge_pages']} reserved ones" if m["explicit_huge_pages"] else ""
    small, large = (
        scaled(result.row(f"first touch of 64 MiB, {kind}").median, "s") for kind in ("4 KiB pages", "huge pages")
    )
    touch = f"first touch of 64 MiB: {small} in small pages, {large} in huge ones"
    yield "huge pages", f"transparent: {m['huge_pages'] or 'not known'}{reserved}; {touch}"
    governor = f", governor {m['governor']}" if m["governor"] else ""
    stamp = scaled(result.row("time stamp").median, "s")
    yield "clock", f"{m['clock'] or 'not known'}, {stamp} for a time stamp{governor}"
    yield "load", f"{m['load']:.1f}"


def _process(m: Mapping[str, Any], p: Mapping[str, Any], result: Result) -> Iterable[tuple[str, str]]:
    yield "threads", f"PyTorch starts with {p['threads']}; {_variables(m, ('OMP', 'KMP', 'GOMP', 'MKL', 'OPENBLAS'))}"
    fresh, kept = (result.row(f"new buffer of 64 MiB, as {how}") for how in ("started", "tozan sets it"))
    loaded = f"{', '.join(m['preloaded'])} is loaded" if m["preloaded"] else "the C library's"
    yield "allocator", f"{loaded}; {_variables(m, ('LD_PRELOAD', 'GLIBC', 'MALLOC'))}"
    done = ", ".join(f"{name}={binary(value)}" for name, value in p["mallopt"].items())
    yield "", f"tozan sets, by mallopt: {done}" if done else "tozan could not set it: no mallopt in this C library"
    yield "", f"tensors are made in {p.get('arena', 'places not known')}"
    gain = fresh.median / kept.median
    faults = f"{fresh['minor_faults']:,} to {kept['minor_faults']:,} page faults"
    yield "", f"a buffer of 64 MiB: {scaled(fresh.median, 's')} to {scaled(kept.median, 's')} ({gain:.1f}×), {faults}"
    shown = ("unlimited" if value is None else f"{value:,}" for value in m["limits"].values())
    yield "limits", ", ".join(f"{name} {value}" for name, value in zip(m["limits"], shown, strict=True))
    yield "compiler", p["compiler"] or "none: train.compile needs one, and kernels at their first use"
    yield "kernels", p.get("kernels", "not known")
    yield "products", p.get("products", "not known")
    yield "attention", p.get("attention", "not known")


def _variables(m: Mapping[str, Any], starts: tuple[str, ...]) -> str:
    found = [f"{name}={value}" for name, value in m["variables"].items() if name.startswith(starts)]
    return ", ".join(found) or "no variable is set"


def _network(m: Mapping[str, Any], launcher: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for one in m["interfaces"]:
        if one["up"]:
            speed = scaled(one["bits_per_second"], "bit/s") if one["bits_per_second"] else "speed not known"
            yield one["name"], f"{', '.join(one['addresses']) or 'no address'}; {speed}, MTU {one['mtu']:,}"
    yield "/dev/shm", binary(m["shared_memory"])
    given = launcher["allocation"]
    where = f"{given['launcher']} allocation of {many(given['nodes'], 'node')}" if given else "no allocation"
    who = "no launcher" if launcher["launcher"] == "none" else f"started by {launcher['launcher']}"
    yield "job", f"{who}, {where}; installed: {', '.join(launcher['installed']) or 'none'}"


def _section(title: str, rows: Iterable[tuple[str, str]]) -> list[object]:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=12)
    grid.add_column()
    for name, value in rows:
        grid.add_row(Text(name, style="dim"), Text(value))
    return ["", Text(title, style="bold"), _indented(grid)]


def _indented(part: Any) -> Padding:
    return Padding(part, (0, 0, 0, 2))


def _products(result: Result) -> Table:
    rows = [row for row in result.rows if row.name.startswith("matrix product")]
    threads = sorted({row["threads"] for row in rows})
    rates = {(row["precision"], row["threads"]): row.median for row in rows}
    lines = []
    for name in dict.fromkeys(row["precision"] for row in rows):
        peak = result.peaks.get(name)
        nominal = scaled(peak.nominal, "FLOP/s") if peak and peak.nominal else "—"
        lines.append((name, *(scaled(rates[name, count], "FLOP/s") for count in threads), nominal))
    headings = ("", *(many(count, "thread") for count in threads), "nominal")
    return table(headings, lines)


def _routes(result: Result) -> Table:
    rows = [row for row in result.rows if row.get("route")]
    sizes = sorted({row["bytes"] for row in rows if not row["latency"]})
    lines = []
    for route in dict.fromkeys(row["route"] for row in rows):
        mine = {0 if row["latency"] else row["bytes"]: row for row in rows if row["route"] == route}
        name = {"lo": "loopback", "shared memory": "shared memory (not used by tozan)"}.get(route, route)
        rates = (scaled(mine[size].median, "B/s") if size in mine else "—" for size in sizes)
        lines.append((name, scaled(mine[0].median, "s") if 0 in mine else "—", *rates))
    return table(("", "latency", *(binary(size) for size in sizes)), lines)


def _matrix(by_operation: Mapping[str, Mapping[str, str]]) -> Table:
    types = list(next(iter(by_operation.values())))
    lines = [(name, *(MARKS[verdicts[dtype]] for dtype in types)) for name, verdicts in by_operation.items()]
    return table(("", *types), lines)


def _problems(problems: Iterable[Mapping[str, Any]]) -> list[object]:
    found = list(problems)
    if not found:
        return [Text("no problem found", style="bold green")]
    parts: list[object] = [Text(many(len(found), "problem"), style="bold red")]
    for one in found:
        cost = f"{one['cost']} ({one['source']})"
        grid = Table.grid(padding=(0, 2))
        grid.add_column(width=12)
        grid.add_column()
        grid.add_row(Text(one["name"], style="bold"), Text(one["what"]))
        grid.add_row("", Text(f"costs: {cost}"))
        grid.add_row("", Text(f"→ {one['fix']}", style="green"))
        parts.append(_indented(grid))
    return parts
