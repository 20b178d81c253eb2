"""Press Ctrl-C at many moments of a command, and count how it ends.

    python tests/press_interrupts.py 80 1.2 batchnorm stats many/

presses it 80 times, each in a new run and at another moment of its first 1.2 seconds. Every process
of the terminal gets it, as from a keyboard. The exit status is 1 if a run did not end, or printed a
traceback.
"""

import collections
import os
import random
import signal
import subprocess
import sys
import time


def press(delay, command):
    """Exit status and stderr of a run that is interrupted after `delay` seconds."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    time.sleep(delay)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    try:
        errors = process.communicate(timeout=30)[1]
        return process.returncode, errors
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, "it did not end\n" + process.communicate()[1]


def main(tries, longest, *command):
    rng = random.Random(0)
    seen, bad = collections.Counter(), []
    for _ in range(int(tries)):
        delay = rng.uniform(0, float(longest))
        status, errors = press(delay, command)
        seen[status, errors.strip().rsplit("\n", 1)[-1]] += 1
        if status is None or "Traceback" in errors or "Exception ignored" in errors:
            bad.append(f"after {delay:.3f} s:\n{errors}")
    for (status, line), times in seen.most_common():
        print(f"{times} times status {status}: {line or 'nothing on stderr'}")
    print(*bad, sep="\n", end="")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
