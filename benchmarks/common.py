"""What the benchmarks and their peers share: sizes, tokens, the machine, and turns. Standard library and NumPy alone,
for an interpreter that has a peer's library need not have hpcmp's.

**Turns.** Every job (one process, or one a rank) is started at once and stays alive; each of its processes is connected
to the driver, and waits, asleep, for an order. One job works at a time, so that two programs are compared in
alternation, under the same load of the machine, and not one after the other.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import statistics
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]

#: Of every program's optimizer.
ADAMW = {"learning_rate": 3e-4, "betas": (0.9, 0.95), "epsilon": 1e-8, "weight_decay": 0.1, "clip": 1.0}


@dataclass(frozen=True)
class Size:
    """A GPT-2 style model (tied weights, biases, heads of 64) and its global batch."""

    hidden: int
    layers: int
    batch: int
    sequence: int
    vocabulary: int
    heads: int

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.sequence

    @property
    def flops(self) -> float:
        """Of a step's matrix products: 6 a weight and token, and of attention only what a causal mask leaves."""
        weights = 12 * self.layers * self.hidden**2 + self.vocabulary * self.hidden
        return 6.0 * self.tokens * (weights + self.layers * self.sequence * self.hidden)

    def batch_of(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(inputs, targets), (sequence, batch), of a step: the same for every program."""
        tokens = np.random.default_rng([1, step]).integers(0, self.vocabulary, (self.sequence + 1, self.batch))
        return tokens[:-1], tokens[1:]


SIZES = {
    "XS": Size(64, 2, 4, 64, 512, 2),  # for tests
    "S": Size(256, 4, 8, 256, 8192, 4),
    "M": Size(512, 8, 4, 512, 8192, 8),
    "L": Size(768, 12, 2, 1024, 32768, 12),
}

#: Names of layouts, and the axes that they share over two ranks.
LAYOUTS = {"serial": "", "tp": "tp=2", "dp": "dp=2", "pp": "pp=2"}


def ranks(layout: str) -> int:
    """How many processes a layout has."""
    return 1 if layout == "serial" else 2


# A job's side


#: ``begin(i)`` begins step number i, and returns what waits for the step and gives its loss.
Begin = Callable[[int], Callable[[], float]]


def at_once(step: Callable[[int], float]) -> Begin:
    """Of a ``step(i)`` that returns its loss, after which nothing is left to do."""

    def begin(i: int) -> Callable[[], float]:
        loss = step(i)
        return lambda: loss

    return begin


def serve(
    address: str, rank: int, begin: Begin, base: int, others: Mapping[str, Callable[[], Any]], ahead: int = 0
) -> None:
    """Obey the driver at ``address`` until it hangs up. ``ahead``: how many further steps are begun before a result is
    asked for; ``others`` are further orders, each of which returns something for JSON. ``base``: the memory of the
    process before it made the model."""
    orders = {"memory": lambda: [memory(), base], **others}
    at = 0
    with socket.socket(socket.AF_UNIX) as driver:
        driver.connect(address)
        lines = driver.makefile("rw")
        _say(lines, rank)
        for order in map(json.loads, lines):  # until the driver hangs up
            if order["do"] != "steps":
                _say(lines, orders[order["do"]]())
                continue
            _say(lines, _steps(begin, at, order["warm"], order["n"], ahead))
            at += order["warm"] + order["n"]


def _steps(begin: Begin, first: int, warm: int, n: int, ahead: int) -> dict[str, Any]:
    """Run steps from ``first`` on; what the last ``n`` took. A step lasts from the result before it to its own."""
    under: deque[Callable[[], float]] = deque()
    losses, begun, at = [], [], [(time.perf_counter(), time.process_time())]
    for i in range(warm + n + ahead):
        if i < warm + n:
            start = time.perf_counter()
            under.append(begin(first + i))
            begun.append(time.perf_counter() - start)
        if i >= ahead:
            losses.append(under.popleft()())
            at.append((time.perf_counter(), time.process_time()))
    seconds = [end - start for (start, _), (end, _) in zip(at[warm:], at[warm + 1 :], strict=False)]
    return {"seconds": seconds, "begun": begun, "losses": losses, "cpu": at[-1][1] - at[warm][1]}


def memory() -> int:
    """The most memory that this process has had, in bytes (VmHWM)."""
    status = Path("/proc/self/status").read_text()  # getrusage's figure has the parent's in it
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def gemm_peak(multiply: Callable[[], Any], n: int) -> float:
    """The best of twenty products of two n x n matrices, in FLOP/s. Processor time counts where it is less than the
    time that passed: one thread that others have interrupted."""
    best = float("inf")
    for _ in range(20):
        start, used = time.perf_counter(), time.process_time()
        multiply()
        best = min(best, time.perf_counter() - start, time.process_time() - used)
    return 2.0 * n**3 / best


def _say(lines: Any, value: Any) -> None:
    lines.write(json.dumps(value) + "\n")
    lines.flush()


# The driver's side


class Job:
    """Processes that serve, ``ranks`` of them, started by ``commands`` (one for all, or one each)."""

    def __init__(
        self, name: str, commands: Sequence[Sequence[str]], ranks: int, env: Mapping[str, str], patience: float = 300
    ) -> None:
        self.name = name
        self._place = tempfile.TemporaryDirectory(prefix="bench-")
        address = f"{self._place.name}/driver"
        self._log = open(f"{self._place.name}/log", "w+")  # noqa: SIM115 (open as long as the job)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(ranks)
            listener.settimeout(1)
            environ = {**os.environ, **env, "BENCH_ADDRESS": address}
            self._processes = [
                subprocess.Popen(command, cwd=ROOT, env=environ, stdout=self._log, stderr=self._log)
                for command in commands
            ]
            self._ranks: list[Any] = []
            self._connections: list[socket.socket] = []
            until = time.monotonic() + patience
            while len(self._ranks) < ranks:
                try:
                    connection = listener.accept()[0]
                except TimeoutError:
                    if time.monotonic() > until or any(p.poll() is not None for p in self._processes):
                        self.fail("it did not start")
                    continue
                connection.settimeout(patience)
                self._connections.append(connection)
                self._ranks.append(connection.makefile("rw"))
                self._read(self._ranks[-1])

    def ask(self, do: str, **order: Any) -> list[Any]:
        """Give an order to every process, and wait for their answers."""
        for lines in self._ranks:
            _say(lines, {"do": do, **order})
        return [self._read(lines) for lines in self._ranks]

    def turn(self, n: int, warm: int = 1) -> dict[str, Any]:
        """``n`` steps after ``warm``: the slowest process's mean seconds, those of the best step, those that it took to
        begin the step that was begun fastest, the processor time of all, the share of the machine that others had, and
        the losses."""
        before, start = _busy(), time.monotonic()
        answers = self.ask("steps", n=n, warm=warm)
        busy, span = _busy() - before, time.monotonic() - start
        used = sum(a["cpu"] for a in answers)
        scale = (n + warm) / n  # the processes count the timed steps alone
        return {
            "seconds": max(sum(a["seconds"]) for a in answers) / n,
            "best": min(map(max, zip(*(a["seconds"] for a in answers), strict=True))),
            "begun": max(min(a["begun"]) for a in answers),
            "cpu_seconds": used / n,
            "others": max(0.0, busy - used * scale) / (span * (os.cpu_count() or 1)),
            "losses": answers[0]["losses"],
        }

    def stop(self) -> None:
        """End it."""
        for connection in self._connections:
            connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        for process in self._processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.terminate()
        self._log.close()
        self._place.cleanup()

    def fail(self, why: str) -> None:
        """Raise SystemExit with the end of what the job has printed."""
        for process in self._processes:
            process.terminate()
        self._log.seek(0)
        raise SystemExit(f"{self.name}: {why}\n" + self._log.read()[-4000:])

    def _read(self, lines: Any) -> Any:
        try:
            line = lines.readline()
        except TimeoutError:
            line = ""
        if not line:
            self.fail("it ended, or did not answer in time")
        return json.loads(line)


def _busy() -> float:
    """Seconds for which the machine's processors have worked, for anyone (Linux; elsewhere 0)."""
    try:
        numbers = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _idle, _wait, irq, soft = map(int, numbers[:7])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def machine() -> dict[str, Any]:
    """What a figure was measured on."""
    text = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    return {
        "cpu": found.get("Model name", platform.processor()),
        "cores": os.cpu_count(),
        "cache": found.get("L3 cache", ""),
        "load": list(os.getloadavg()),
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "python": platform.python_version(),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "low": low, "high": high, "min": min(values), "max": max(values)}
