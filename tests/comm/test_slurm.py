import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm

from tozan.comm.jobs import Job, script

WORKER = str(Path(__file__).with_name("worker.py"))
pytestmark = pytest.mark.skipif(not slurm.installed(), reason="needs Slurm and munge, and root")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm.one_node(tmp_path_factory.mktemp("slurm"), cores=2) as environment:
        yield environment


def finished(environment, folder, job):
    """Submit as `tozan launch` does, and wait for the job's output."""
    code = f"from tozan.comm.jobs import *; raise SystemExit(start({job!r}))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True)
    assert "Submitted batch job" in done.stdout, done.stderr
    number = done.stdout.split()[-1]
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        state = subprocess.run(
            ["squeue", "-h", "-j", number, "-o", "%T"], env=environment, capture_output=True, text=True
        )
        if not state.stdout.strip():
            return (folder / f"{job.name}-{number}.out").read_text()
        time.sleep(0.3)
    raise AssertionError(f"job {number} did not end: {state.stdout}")


def test_sbatch_and_srun_start_ranks_bound_to_their_own_cores(cluster, tmp_path):
    text = finished(cluster, tmp_path, Job((sys.executable, WORKER, "2", "once"), ranks=2, cores=2, name="two"))
    assert "rank 0: sum 1, 1 cores, 1 threads" in text
    assert "rank 1: sum 1, 1 cores, 1 threads" in text
    assert text.count("bound by the launcher") == 2


def test_ranks_refuse_a_layout_that_the_job_is_too_small_for(cluster, tmp_path):
    text = finished(cluster, tmp_path, Job((sys.executable, WORKER, "8", "once"), ranks=2, name="small"))
    assert "asks for 8 ranks, but there are 2 ranks started by slurm" in text
    assert "Traceback" not in text


def test_inside_an_allocation_it_runs_there_or_refuses(cluster, tmp_path):
    inside = Job((sys.executable, WORKER, "2", "once"), ranks=2, name="inside")
    more = Job((sys.executable, WORKER, "4", "once"), ranks=4, name="more")
    code = (
        "from tozan.comm.jobs import *\nfrom tozan.errors import UserError\n"
        f"start({inside!r})\n"
        f"try:\n    start({more!r})\nexcept UserError as error:\n    print(error)\n"
    )
    (tmp_path / "go.py").write_text(code)
    header = [line for line in script(inside, "slurm").splitlines() if line.startswith("#")]
    (tmp_path / "job.sh").write_text("\n".join([*header, f"{sys.executable} go.py", ""]))
    done = subprocess.run(
        ["sbatch", "--wait", "job.sh"], env=cluster, cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    text = next(tmp_path.glob("inside-*.out")).read_text()
    assert done.returncode == 0, text
    assert text.count("sum 1") == 2
    assert "asked for 4 ranks, the allocation has 2" in text
