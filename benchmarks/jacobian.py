"""Exact Jacobians compared with matrix-free leading singular values: time, memory and agreement in one run.

    python benchmarks/jacobian.py            (with nothing else running)

One attention block of the embedded model on real tokens. Both methods are run in turn; memory is the peak of a new process for each
method, including Python, torch and the model.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ratios import alternate

import sepcap
from sepcap.studies.base.runner import run_study
from sepcap.studies.jacobian.config import JacobianSpectrumConfig
from sepcap.studies.jacobian.plan import JacobianSpectrumPlan, plan_jacobian_spectrum
from sepcap.studies.jacobian.study import JacobianSpectrum, measure_spectra

LAYER = 2
LEADING = 32


def plan(tokens: int, method: str) -> JacobianSpectrumPlan:
    """Plan for one Jacobian of one layer."""
    config = JacobianSpectrumConfig(layers=(LAYER,), tokens=tokens, rows=1, k=LEADING, method=method, control=False)
    return plan_jacobian_spectrum(sepcap.load_model(device="cpu"), config)


def measure(prepared: JacobianSpectrumPlan) -> JacobianSpectrum:
    """The spectra of a plan, without sampling tokens and without the estimate of the cost."""
    return run_study(JacobianSpectrum, prepared.resolved, partial(measure_spectra, prepared), None)


def peak_memory(tokens: int, method: str) -> float:
    """Peak resident memory in MB of a separate process."""
    code = (
        "import resource\nfrom jacobian import measure, plan\n"
        f"measure(plan({tokens}, {method!r}))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    return float(run.stdout.split()[-1])


def ratios_of(tokens: int, repeat: int) -> Iterator[dict[str, float]]:
    """Ratios of exact to matrix-free, for one Jacobian of the given number of tokens."""
    plans = {method: plan(tokens, method) for method in ("exact", "randomized")}
    found: dict[str, JacobianSpectrum] = {}

    def side(method: str) -> None:
        found[method] = measure(plans[method])

    t = alternate("cpu", repeat, exact=lambda: side("exact"), free=lambda: side("randomized"))
    true, values = (found[method].tensors["trained"][0, 0, :LEADING] for method in ("exact", "randomized"))
    where = f"attention, {tokens} tokens, {plans['exact'].resolved['size']:,} rows, {LEADING} leading values"
    yield {
        f"{where}: exact / matrix-free, time": t["exact"] / t["free"],
        f"{where}: exact, seconds": t["exact"],
        f"{where}: largest relative difference": float(((true - values) / true).max()),
    }
    memory = {method: peak_memory(tokens, method) for method in plans}
    yield {
        f"{where}: exact / matrix-free, peak memory": memory["exact"] / memory["randomized"],
        f"{where}: exact, peak MB": memory["exact"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4, 8, 12], help="tokens per Jacobian; 256 rows each")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each method after one warm-up run")
    asked = parser.parse_args()
    for tokens in asked.tokens:
        for measured in ratios_of(tokens, asked.repeat):
            for name, value in measured.items():
                print(f"{value:12.3g}  {name}", flush=True)


if __name__ == "__main__":
    main()
