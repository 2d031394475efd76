"""What tests start beside themselves ends with them, also where it hangs or ignores signals."""

from __future__ import annotations

import subprocess
import sys
import threading

import psutil
import pytest
from processes import finished, meanwhile, started, until

FAMILY = """
import signal, subprocess, sys, time
ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); " \\
    "print('ready', flush=True); time.sleep(10**6)"
for new in (False, True):
    child = subprocess.Popen([sys.executable, "-c", ignore], stdout=subprocess.PIPE,
                             start_new_session=new)
    child.stdout.readline()
    print(child.pid, flush=True)
if sys.argv[1] == "stay":
    time.sleep(10**6)
"""


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_failed_assertion_ends_all_that_was_started():
    with pytest.raises(AssertionError, match="a test failed"):
        with started([sys.executable, "-c", FAMILY, "stay"]) as process:
            pids = [process.pid, int(process.line()), int(process.line())]
            raise AssertionError("a test failed")
    until(lambda: all(map(gone, pids)))
    assert process.stdout is not None
    assert process.stdout.closed
    assert process.returncode == -9


def test_what_a_process_leaves_behind_in_its_group_ends():
    with started([sys.executable, "-c", FAMILY, "leave"]) as process:
        pid = int(process.line())
        process.wait()
        other = int(process.line())  # in a session of its own, and of nobody any more
        psutil.Process(other).kill()
    until(lambda: gone(pid))


@pytest.mark.slow
def test_a_hung_process_says_where_it_was():
    code = "import time\ndef waits(): print('here', flush=True); time.sleep(10**6)\nwaits()"
    with pytest.raises(TimeoutError, match="had not ended after 600 s"):
        with started([sys.executable, "-c", code], stderr=subprocess.STDOUT) as process:
            assert process.line() == "here"
            process.end_as_hung()
            assert any("in waits" in line for line in process.lines())


@pytest.mark.slow
def test_whoever_waits_for_a_line_of_a_hung_process_goes_on():
    with pytest.raises(TimeoutError, match="had not ended after 1 s"):
        with started([sys.executable, "-c", "import time; time.sleep(10**6)"], seconds=1) as hung:
            assert hung.line() == ""


@pytest.mark.slow
def test_a_stopped_process_ends():
    code = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
    with pytest.raises(TimeoutError):
        finished([sys.executable, "-c", code], seconds=1)


def test_a_failure_is_raised_and_what_it_said_is_shown(capsys):
    command = [sys.executable, "-c", "import sys; sys.exit('broken')"]
    with pytest.raises(subprocess.CalledProcessError):
        finished(command)
    assert capsys.readouterr().err == "broken\n"
    assert finished(command, check=False).returncode == 1


def test_an_error_of_a_thread_is_raised():
    def work():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        with meanwhile(work, list):
            pass


def test_the_tests_own_error_is_raised_at_once_whatever_a_thread_does():
    end = threading.Event()
    with pytest.raises(KeyError):
        with meanwhile(end.wait):
            raise KeyError
    end.set()
