from pathlib import Path

from ranks import Pool


def test_ranks_leave_nothing_behind():
    pool = Pool(1)
    assert pool.run(abs, (-1,), 60) == [1]
    assert list(Path(pool.folder).iterdir())
    pool.kill()
    assert not Path(pool.folder).exists()
