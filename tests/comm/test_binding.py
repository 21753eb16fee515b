from hypothesis import given
from hypothesis import strategies as st

from tozan.comm.binding import decide, numa_domains, ranges
from tozan.cpuinfo import core_of, count_cores, parse

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


def test_hardware_threads_of_a_core_stay_together():
    """Linux numbers the second thread of every core behind all first ones."""
    second = {core: core % 3 for core in range(6)}
    everyone = [list(range(6))] * 3
    assert [decide(rank, everyone, {}, second).cores for rank in range(3)] == [(0, 3), (1, 4), (2, 5)]
    assert count_cores((0, 3), second) == 1
    halves = [decide(rank, everyone[:2], {}, second).cores for rank in range(2)]
    assert sorted(halves) == [(0, 1, 3, 4), (2, 5)] or sorted(halves) == [(0, 3), (1, 2, 4, 5)]
    more_ranks_than_cores = [decide(rank, [list(range(6))] * 6, {}, second).cores for rank in range(6)]
    assert sorted(more_ranks_than_cores) == [(core,) for core in range(6)]


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
    for number in (1, 9, 17):
        (tmp_path / f"cpu{number}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{number}/topology/thread_siblings_list").write_text("1\n" if number == 1 else "9,17\n")
    assert core_of(tmp_path) == {1: 1, 9: 9, 17: 9}
    assert core_of(tmp_path / "nothing") == {}
