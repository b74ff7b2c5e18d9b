"""A learned order against the best fixed score, in both directions, on texts that neither has seen (METHODS 21).

The fixed score is the one with the largest area on held-out collection texts. `python benchmarks/learned.py` prints, for each direction,
the areas with a paired interval over documents, what 80% of forgetting costs, and seconds (wall, and of the processor over all threads).
"""

import argparse
import time

import numpy as np

import sepcap
from sepcap.interventions.optimal import apart
from sepcap.learning.fit import HELD_OUT
from sepcap.learning.held_out import ROLES, area_of, masked_rows
from sepcap.learning.order import ranked_of, starting_theta
from sepcap.statistics.intervals import cluster_sums
from sepcap.studies.pruning.separability import separability
from sepcap.tasks.samples import sample_task

FIXED = ("abs", "sqrt", "rms", "std", "taylor", "fisher", "relp_abs")
STEPS = 10


def compared(model, forget: str, retain: str, tokens: int, eval_tokens: int, options: dict) -> None:
    """Print one direction."""
    started, used = time.perf_counter(), time.process_time()
    learned = sepcap.learn_ranking(model, forget=forget, retain=retain, tokens=tokens, eval_tokens=eval_tokens, **options)
    wall, cpu = time.perf_counter() - started, time.process_time() - used
    print(f"\nforget {forget}, retain {retain}: learn_ranking {wall:.0f} s wall, {cpu:.0f} s of processor", flush=True)
    print(*learned.summary(), sep="\n")
    for name in ("held_out", "cost"):
        print(learned.tables[name].to_string(index=False), flush=True)

    ranked = ranked_of(model, ["mlp"])
    samples = {
        split: {role: sample_task(model, sepcap.load_task(task), split, n) for role, task in zip(ROLES, (forget, retain), strict=True)}
        for split, n in (("collect", tokens), ("evaluate", eval_tokens))
    }
    held = {role: apart(sample, HELD_OUT)[1] for role, sample in samples["collect"].items()}
    how = {"tokens": tokens, "sites": "mlp", "gradients": ("taylor", "relp")}
    statistics = [sepcap.collect(model, task, **how) for task in (forget, retain)]
    shares = [{"mlp": i / STEPS} for i in range(1, STEPS + 1)]
    areas, whole = {}, None
    for name in FIXED:
        theta = starting_theta(ranked, sepcap.score(*statistics, name))
        whole = masked_rows(model, ranked, theta, held, shares, constants=None, batch_size=16, unpruned=whole)
        areas[name] = area_of(whole)
    best = max(areas, key=lambda name: areas[name])
    print("area on held-out collection texts:", {name: round(value, 3) for name, value in areas.items()}, "best:", best, flush=True)
    if best == "abs":
        print(f"learned - abs: {learned.area()[['gain', 'gain_low', 'gain_high']].round(3).tolist()}, the start of learning", flush=True)
        return
    found, whole = {}, None
    for name, scores in (("fixed", sepcap.score(*statistics, best)), ("learned", learned)):
        theta = starting_theta(ranked, scores)
        whole = masked_rows(model, ranked, theta, samples["evaluate"], shares, constants=None, batch_size=16, unpruned=whole)
        sums = [np.stack([cluster_sums(step, samples["evaluate"][role].clusters) for step in whole[role]]) for role in ROLES]
        found[name] = separability(*sums, samples=("forget", "retain"))
        cost, (low, high) = found[name].retain_cost(80), found[name].retain_cost_interval(80)
        print(f"{name}: {found[name]!r}; at 80% forgotten {cost:.1f}% [{low:.1f}, {high:.1f}] of the retained task is lost", flush=True)
    gain, (low, high) = found["learned"].minus(found["fixed"])
    documents = [sample.n_documents for sample in samples["evaluate"].values()]
    print(f"learned - {best}: {gain:+.3f} [{low:+.3f}, {high:+.3f}], {STEPS} steps, {documents} documents", flush=True)


def main() -> None:
    """Both directions of the embedded model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--eval-tokens", type=int, default=15_000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--direction", choices=("both", "forward", "reverse"), default="both")
    given = parser.parse_args()
    model = sepcap.load_model()
    pairs = {"forward": ("local-code", "local-prose"), "reverse": ("local-prose", "local-code")}
    for pair in pairs.values() if given.direction == "both" else [pairs[given.direction]]:
        compared(model, *pair, given.tokens, given.eval_tokens, {"steps": given.steps})


if __name__ == "__main__":
    main()
