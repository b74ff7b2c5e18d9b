"""Worker processes: the bits of one process, whatever is killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from swept import LOAD, base_of, cell_bits

import sepcap
from sepcap.workers import pool
from sepcap.workers.engines import Process, Target

GRID = {"importance": ["abs", "rms"], "seed": [0, 1]}
STEPS = 6

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills processes by signals")


@pytest.fixture(scope="module")
def base(trained_folder, tmp_path_factory, letters, digits):
    fractions = {"mlp": 0.1}
    return base_of(trained_folder, tmp_path_factory.mktemp("texts"), letters, digits, steps=STEPS, fractions=fractions)


@pytest.fixture(scope="module")
def expected(base, tmp_path_factory):
    """Bits of the cells, made in this process."""
    out = tmp_path_factory.mktemp("here") / "s"
    sepcap.sweep(base, GRID, out=out, load=LOAD, progress=False)
    return cell_bits(out)


def begun(out: Path) -> bool:
    """Whether a cell is in the middle of its steps."""
    steps = [len(list(cell.glob("steps/[0-9]*"))) for cell in out.glob("cells/*")]
    return any(0 < n <= STEPS for n in steps)


def wait_until(what, seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.thorough
def test_two_processes_one_of_which_is_killed_have_the_bits_of_one(base, expected, tmp_path, monkeypatch):
    started = []

    class Watched(Process):
        def __init__(self, *args):
            super().__init__(*args)
            started.append(self)

    monkeypatch.setattr(pool, "Process", Watched)

    def kill_one():
        wait_until(lambda: begun(tmp_path / "s"))
        os.kill(started[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    heard = []
    found = sepcap.sweep(base, GRID, out=tmp_path / "s", load=LOAD, engine="processes", workers=2, progress=heard.append)
    killer.join()
    assert "2 worker processes, 1 thread each" in heard[0]
    assert list(found.table["state"]) == ["finished"] * 4
    assert len(started) == 3
    assert cell_bits(tmp_path / "s") == expected


DRIVER = """
import sys, sepcap
base = sepcap.PruningConfig(**{fields!r})
sepcap.sweep(base, {grid!r}, out={out!r}, load={load!r}, engine="processes", workers=2, progress=False)
"""


@pytest.mark.slow
def test_a_killed_driver_takes_its_workers_with_it_and_the_same_call_goes_on(base, expected, tmp_path):
    from sepcap.studies.sweep.grid import given

    out = tmp_path / "s"
    code = DRIVER.format(fields=given(base), grid=GRID, out=str(out), load=LOAD)
    driver = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: begun(out))
    workers = [int(pid) for pid in Path(f"/proc/{driver.pid}/task/{driver.pid}/children").read_text().split()]
    driver.kill()
    driver.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 60)
    assert "begun" in set(sepcap.load_result(out).table["state"])
    found = sepcap.sweep(base, GRID, out=out, load=LOAD, engine="processes", workers=2, progress=False)
    assert list(found.table["state"]) == ["finished"] * 4
    assert cell_bits(out) == expected


@pytest.mark.thorough
def test_a_worker_that_cannot_start_is_one_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"a worker process could not start: .*NoSuchConfig.* \(all of it is in"):
        Process(Target("studies.sweep.cell.Cells", {"kind": "NoSuchConfig", "load": {}}, 1), tmp_path / "0.log")
