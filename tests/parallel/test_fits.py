"""Layouts that do not make sense are refused from sizes alone, with the arithmetic and with layouts that do fit."""

import subprocess
import sys

import pytest

from tozan.errors import UserError
from tozan.layout import Layout
from tozan.models.arithmetic import Shape
from tozan.parallel import fits
from tozan.parallel.fits import Request

GPT = Shape("gpt2", layers=4, width=48, heads=12, kv_heads=12, mlp_width=192, vocabulary=96, sequence=32)
LLAMA = Shape("llama", layers=3, width=64, heads=8, kv_heads=2, mlp_width=172, vocabulary=100, sequence=24)
DROPS = Shape("gpt2", 4, 48, 12, 12, 192, 96, 32, dropout=0.1)


def request(shape=GPT, micro_batch=4, microbatches=4, **options):
    return Request(shape, micro_batch, microbatches, **options)


BAD = [
    (request(), Layout(tp=5), None, "heads 12 ÷ tp 5 leaves 2 over"),
    (request(), Layout(tp=8), None, "12 splits by 1, 2, 3, 4, 6, 12"),
    (request(), Layout(tp=7), None, "mlp_width 192 ÷ tp 7 leaves 3 over"),
    (request(), Layout(tp=9), None, "vocabulary 96 ÷ tp 9 leaves 6 over → vocabulary 99"),
    (request(LLAMA), Layout(tp=4), None, "kv_heads 2 ÷ tp 4 leaves 2 over"),
    (request(LLAMA), Layout(tp=8), None, "mlp_width 172 ÷ tp 8 leaves 4 over"),
    (request(), Layout(tp=25, scheme="2d"), None, "width 48 ÷ the grid's side 5 (tp 25) leaves 3 over"),
    (request(micro_batch=3), Layout(tp=4, scheme="2d"), None, "micro_batch 3 ÷ 2 grid rows"),
    (request(micro_batch=6), Layout(tp=16, scheme="2.5d", tp_depth=4), None, "leaves 6 samples over → micro_batch 8"),
    (request(DROPS), Layout(tp=4, scheme="2d"), None, "dropout 0.1 with scheme 2d"),
    (request(DROPS, sequence_parallel=True), Layout(tp=2), None, "dropout 0.1 with sequence parallelism"),
    (request(DROPS), Layout(pp=2), None, "dropout 0.1 with pp 2"),
    (request(sequence_parallel=True), Layout(tp=3), None, "sequence 32 ÷ (tp 3 × cp 1) leaves 2 tokens over"),
    (request(sequence_parallel=True), Layout(tp=4, scheme="2d"), None, "sequence parallelism with scheme 2d"),
    (request(), Layout(cp=3), None, "sequence 32 ÷ (2 × cp 3) leaves 2 tokens over"),
    (request(), Layout(cp=2, tp=4, scheme="2d"), None, "cp 2 with scheme 2d"),
    (request(), Layout(pp=5), None, "pp 5 × chunks 1 = 5 pieces of a model of 4 layers"),
    (request(schedule="interleaved", chunks=3), Layout(pp=2), None, "pp 2 × chunks 3 = 6 pieces"),
    (request(schedule="interleaved", chunks=2), Layout(), None, "chunks 2 with pp 1"),
    (request(schedule="1f1b", chunks=2), Layout(pp=2), None, "chunks 2 with schedule 1f1b"),
    (
        request(microbatches=3, schedule="interleaved", chunks=2),
        Layout(pp=2),
        None,
        "3 micro-batches ÷ pp 2 leaves 1 over → 2 micro-batches",
    ),
    (request(), Layout(pp=2, dp=2), 8, "pp 2 × dp 2 × cp 1 × tp 1 = 4 processes, but there are 8"),
    (request(), Layout(dp=8), 4, "= 8 processes, but there are 4"),
    (request(), Layout(dp=3), 2, "dp 3 × cp 1 × tp 1 = 3 processes, but there are 2"),
    (request(), Layout(tp=4, pp=4), 64, "= 16 processes, but there are 64"),
    (request(LLAMA), Layout(tp=3), None, "heads 8 ÷ tp 3 leaves 2 over"),
    (request(LLAMA), Layout(tp=16), None, "heads 8 ÷ tp 16 leaves 8 over"),
    (request(LLAMA), Layout(tp=6), None, "vocabulary 100 ÷ tp 6 leaves 4 over → vocabulary 102"),
    (request(LLAMA), Layout(tp=9, scheme="2d"), None, "width 64 ÷ the grid's side 3 (tp 9) leaves 1 over"),
    (request(LLAMA), Layout(tp=16, scheme="2d"), None, "kv_heads 2 ÷ the grid's side 4 (tp 16) leaves 2 over"),
    (request(LLAMA), Layout(tp=18, scheme="2.5d", tp_depth=2), None, "heads 8 ÷ the grid's side 3 (tp 18)"),
    (request(LLAMA), Layout(pp=4), None, "4 pieces of a model of 3 layers → at most 3 pieces"),
    (request(LLAMA, schedule="zero-bubble"), Layout(pp=8), None, "8 pieces of a model of 3 layers"),
    (request(LLAMA, sequence_parallel=True), Layout(tp=16), None, "sequence 24 ÷ (tp 16 × cp 1) leaves 8 tokens over"),
    (request(sequence_parallel=True), Layout(tp=4, cp=3), None, "÷ (tp 4 × cp 3) leaves 8 tokens over → sequence 24"),
    (request(LLAMA), Layout(cp=5), None, "sequence 24 ÷ (2 × cp 5) leaves 4 tokens over"),
    (request(), Layout(cp=6), None, "leaves 8 tokens over (each rank holds a piece from either end) → sequence 36"),
    (request(DROPS), Layout(cp=2), None, "dropout 0.1 with cp 2: the masks would depend on the layout"),
    (request(LLAMA), Layout(cp=4, tp=2, scheme="2.5d", tp_depth=2), None, "cp 4 with scheme 2.5d"),
    (request(micro_batch=1), Layout(tp=4, scheme="2d"), None, "leaves 1 samples over → micro_batch 2"),
    (request(micro_batch=5), Layout(tp=3, scheme="2.5d", tp_depth=3), None, "5 ÷ 3 grid rows (depth 3 × side 1)"),
    (request(schedule="gpipe", chunks=2), Layout(pp=2), None, "only interleaved takes more than 1"),
    (request(schedule="zero-bubble", chunks=4), Layout(), None, "chunks 4 with pp 1"),
    (request(microbatches=1, schedule="interleaved", chunks=2), Layout(pp=2), None, "leaves 1 over → 2 micro-batches"),
    (request(DROPS), Layout(tp=8, scheme="2.5d", tp_depth=2, pp=2), None, "the masks would depend on the layout"),
]


@pytest.mark.parametrize(("asked", "layout", "world_size", "expected"), BAD)
def test_refused_with_the_arithmetic(asked, layout, world_size, expected):
    with pytest.raises(UserError) as error:
        fits.require(asked, layout, world_size)
    assert expected in str(error.value).replace("\n    →", " →")
    last = error.value.problems[-1].fix
    assert "layouts that fit: " in last
    world = world_size or layout.world_size
    near = fits.nearest(asked, layout, world)
    assert all(candidate.world_size == world and not fits.problems(asked, candidate, world) for candidate in near)
    assert all(fits.describe(candidate) in last for candidate in near)
    assert near or "no layout fits" in last


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(pp=2, dp=3, tp=4, scheme="2d"),
        Layout(tp=8, scheme="2.5d", tp_depth=2),
        Layout(dp=2, cp=2, tp=2),
    ],
)
def test_what_fits_is_let_through(layout):
    fits.require(request(), layout, layout.world_size)


def test_the_nearest_layouts_come_first():
    found = fits.nearest(request(), Layout(tp=8), 8)
    assert [fits.describe(layout) for layout in found] == ["tp 8 (2.5d, 2 × 2 × 2)", "dp 2 × tp 4", "pp 2 × tp 4"]
    assert len(fits.nearest(request(), Layout(tp=8), 8, most=100)) > 6


def test_every_candidate_has_the_world_size():
    found = list(fits.candidates(24))
    assert len(found) == len(set(found))
    assert all(layout.world_size == 24 for layout in found)
    assert {(layout.scheme, layout.grid, layout.tp_depth) for layout in found if layout.tp == 24} == {
        ("1d", 4, 1),
        ("2.5d", 2, 6),
    }


def test_needs_no_torch():
    code = "import sys; from tozan.parallel import fits, volume; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
