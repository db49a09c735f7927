"""Draw and run many cases: `python -m tests.mutations --count 500 --seed 0`."""

import argparse
import tempfile
import time
from pathlib import Path

from tests.mutations.cases import draw_case
from tests.mutations.good import make_good
from tests.mutations.outcome import run


def main() -> int:
    """Print each wrong ending with what led to it; how many there were."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next has +1")
    parser.add_argument("--verbose", action="store_true", help="print every ending")
    arguments = parser.parse_args()
    wrong, codes = 0, dict[int | None, int]()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutations-") as name:
        good = make_good(Path(name, "good"))
        for number in range(arguments.count):
            seed = arguments.seed + number
            with tempfile.TemporaryDirectory(dir=name) as inner:
                folder = Path(inner)
                case = draw_case(seed, good, folder)
                found = run(case.words, folder)
                fault = case.fault(found)
            codes[found.code] = codes.get(found.code, 0) + 1
            if fault or arguments.verbose:
                print(f"--- {seed}: {case.name}\n    {' '.join(case.words)[:300]!r}")
                print(f"    {fault or found.code}\n{found.output[-1500:]}", flush=True)
            wrong += fault is not None
            if (number + 1) % 25 == 0:
                left = (time.monotonic() - started) / (number + 1) * (arguments.count - number - 1)
                print(f"{number + 1} of {arguments.count}, {wrong} wrong, {left:.0f} s left")
    endings = ", ".join(f"{count} x {code}" for code, count in sorted(codes.items(), key=str))
    print(f"{arguments.count} cases from seed {arguments.seed}: {wrong} wrong; ended {endings}")
    return wrong


if __name__ == "__main__":
    raise SystemExit(min(1, main()))
