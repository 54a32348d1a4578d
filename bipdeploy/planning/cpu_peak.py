"""What this CPU can do, in a second: FLOP/s of a matrix product, bytes/s of a copy.

Run as a module it prints both as JSON, so that who asks need not load numpy.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import lru_cache

from bipdeploy.errors import StageError


@lru_cache(maxsize=1)
def measured() -> dict[str, float]:
    """`flops` and `bandwidth` (bytes read and written), measured in a process of its own."""
    done = subprocess.run([sys.executable, "-m", __name__], capture_output=True, text=True,
                          check=False)
    if done.returncode:
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        raise StageError(f"measuring this CPU failed: {last}")
    return json.loads(done.stdout)


def _measure() -> dict[str, float]:
    import numpy

    size, rows = 16 << 20, 1024
    source, matrix = numpy.ones(size, "float32"), numpy.ones((rows, rows), "float32")
    target = source.copy()
    copied = _best(lambda: numpy.copyto(target, source))
    multiplied = _best(lambda: matrix @ matrix)
    return {"flops": 2 * rows ** 3 / multiplied, "bandwidth": 2 * source.nbytes / copied}


def _best(work: Callable[[], object]) -> float:
    """The least seconds of several runs."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    print(json.dumps(_measure()))
