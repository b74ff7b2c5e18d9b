"""The whole Jacobian against its leading singular values by products alone: time, memory and agreement in one run.

    python benchmarks/tight_pass.py            (with nothing else running)

One attention block of the embedded model at real tokens. Both sides are run in turn; memory is the peak beyond what the process held
before, of a fresh process for each side.
"""

import argparse
import multiprocessing
import resource
from collections.abc import Iterator

from ratios import alternate

import sepcap
from sepcap.experiments.tight_pass import TightPass, make_config, measure_tight_pass
from sepcap.experiments.tight_pass_plan import TightPassPlan, plan_tight_pass

LAYER = 2
LEADING = 32


def plan(tokens: int, method: str) -> TightPassPlan:
    """One Jacobian of one layer."""
    config = make_config(layer=LAYER, part="attn", tokens=tokens, rows=1, k=LEADING, method=method, control=False)
    return plan_tight_pass(sepcap.load_model(device="cpu"), config)


def _peak(tokens: int, method: str, answer: "multiprocessing.queues.SimpleQueue[float]") -> None:
    prepared = plan(tokens, method)
    measure_tight_pass(plan(1, method))  # what is imported and cached at the first use counts for neither side
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    measure_tight_pass(prepared)
    answer.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def peak_memory(tokens: int, method: str) -> float:
    """MB beyond what is held before, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    process = context.Process(target=_peak, args=(tokens, method, answer))
    process.start()
    process.join()
    return answer.get()


def tight_pass(tokens: int, repeat: int = 3) -> Iterator[dict[str, float]]:
    """Exact over matrix-free, for one Jacobian of so many tokens."""
    plans = {method: plan(tokens, method) for method in ("exact", "randomized")}
    found: dict[str, TightPass] = {}

    def side(method: str) -> None:
        found[method] = measure_tight_pass(plans[method])

    t = alternate("cpu", repeat, exact=lambda: side("exact"), free=lambda: side("randomized"))
    true, values = (found[method].tensors["trained"][0, 0, :LEADING] for method in ("exact", "randomized"))
    where = f"attention, {tokens} tokens, {plans['exact'].resolved['size']:,} rows, {LEADING} leading values"
    yield {
        f"{where}: exact / matrix-free, time": t["exact"] / t["free"],
        f"{where}: exact, seconds": t["exact"],
        f"{where}: largest relative difference": float(((true - values) / true).max()),
    }
    memory = {method: peak_memory(tokens, method) for method in plans}
    yield {f"{where}: exact / matrix-free, memory": memory["exact"] / memory["randomized"], f"{where}: exact, MB": memory["exact"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2, 4, 8], help="tokens per Jacobian; 256 rows each")
    for tokens in parser.parse_args().tokens:
        for measured in tight_pass(tokens):
            for name, value in measured.items():
                print(f"{value:12.3g}  {name}", flush=True)


if __name__ == "__main__":
    main()
