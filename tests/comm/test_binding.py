from hypothesis import given
from hypothesis import strategies as st

from tozan.comm.binding import decide, numa_domains, parse, ranges

TWO_DOMAINS = {core: core // 4 for core in range(8)}


def test_deals_out_shared_cores_by_numa_domain():
    interleaved = {core: core % 2 for core in range(8)}
    everyone = [list(range(8))] * 2
    assert decide(0, everyone, TWO_DOMAINS).cores == (0, 1, 2, 3)
    assert decide(1, everyone, TWO_DOMAINS).domains == (1,)
    assert decide(1, everyone, interleaved).cores == (1, 3, 5, 7)
    assert str(decide(1, everyone, interleaved)) == "cores 1,3,5,7 (NUMA domain 1), bound by tozan"


def test_keeps_what_the_launcher_bound_and_says_when_cores_are_shared():
    kept = decide(1, [[0, 1], [2, 3]], TWO_DOMAINS)
    assert (kept.cores, kept.by, kept.shared) == ((2, 3), "the launcher", False)
    crowded = decide(2, [[0, 1]] * 3, {})
    assert crowded.cores == (0,)
    assert "shared with other ranks" in str(crowded)
    assert decide(0, [[0, 1], [1]], {}).shared
    assert decide(0, [[5]], {}).by == "the launcher"


@given(st.integers(1, 40), st.integers(1, 40))
def test_every_core_has_one_rank_when_there_are_enough(cores, ranks):
    given_cores = [list(range(cores))] * ranks
    chosen = [decide(rank, given_cores, {}).cores for rank in range(ranks)]
    if cores >= ranks and ranks > 1:
        assert sorted(core for each in chosen for core in each) == list(range(cores))
    assert all(chosen)


@given(st.sets(st.integers(0, 300)))
def test_lists_read_back(cores):
    assert parse(ranges(sorted(cores))) == sorted(cores)


def test_reads_this_machine(tmp_path):
    (tmp_path / "node1").mkdir()
    (tmp_path / "node1/cpulist").write_text("4-5,9\n")
    assert numa_domains(tmp_path) == {4: 1, 5: 1, 9: 1}
    assert isinstance(numa_domains(), dict)
