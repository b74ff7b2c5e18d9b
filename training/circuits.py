"""The programs of the compiled models as steps of a circuit (METHODS 20). Layers, heads and units are those of `compiler.Circuit`."""

from compiler import Circuit, Reads, plus

from sepcap.compiled.programs import END, GIVEN, Pair, Program

ALWAYS: Reads = {"1": 1.0}
BOS = "word:<s>"
FIRM = 64.0
"""Nats by which one key beats another: e⁻⁶⁴ of the attention goes elsewhere."""


def circuit_of(pair: Pair) -> Circuit:
    """The circuit of a pair."""
    forget, retain = pair.forget, pair.retain
    build, layers = BUILDERS[f"{forget.name} {retain.name}"]
    programs = {forget.name: "forget", retain.name: "retain"}
    answers = {program.name: _answers(program) for program in (forget, retain)}
    told = [program.name for program in (forget, retain) if program.told]
    words = dict.fromkeys([*told, *forget.keys, *retain.keys, *forget.letters, *retain.letters, GIVEN])
    words |= dict.fromkeys(sorted({*answers[forget.name], *answers[retain.name]} - {*words}))
    circuit = Circuit(programs, answers, words, context_of(pair), layers)
    if told:
        asked = {f"word:{name}": 1.0 for name in told}
        circuit.head(0, [(ALWAYS, asked, FIRM)], {f"{name} is wanted": ({f"word:{name}": 1}, {f"is:{name}": 1}) for name in told})
    build(circuit, forget, retain)
    return circuit


def context_of(pair: Pair) -> int:
    """Positions of the longest text, BOS included."""
    return max(1 + len(p.text([*p.keys[:1], *(p.letters * p.longest)[: p.longest]]).split()) for p in (pair.forget, pair.retain))


def _answers(program: Program) -> set[str]:
    """The words of all answers: short inputs have them all, but for counts of different letters."""
    inputs = [x for n in range(program.shortest, 4) for x in program.inputs(n)]
    inputs += [(*program.keys[:1], *program.letters[:n]) for n in range(program.shortest, program.longest + 1)]
    return {word for x in inputs for word in program.answer(x)}


def words(letters: str) -> dict[str, float]:
    """1 at any of these letters."""
    return {f"word:{letter}": 1.0 for letter in letters}


def tally(c: Circuit, layer: int, letters: str, of: str, to: str, more: dict[str, tuple[Reads, Reads]] | None = None) -> None:
    """A head that takes the mean over BOS and all letters so far: a count over the number of letters + 1."""
    values = {f"mean of {x}": ({f"{of}:{x}": 1}, {f"{to}:{x}": 1}) for x in letters}
    c.head(layer, [(ALWAYS, plus(words(letters), {BOS: 1}), FIRM)], values | (more or {}))


def fetch(c: Circuit, layer: int, letters: str, aim: str, n: int, first: int, to: str) -> None:
    """A head that reads the letter at position first + i where aim:i is 1, or nothing (BOS) where none is."""
    scores = [(ALWAYS, {BOS: 1.0}, FIRM / 2), *(({f"{aim}:{i}": 1.0}, {f"pos:{first + i}": 1.0}, FIRM) for i in range(n))]
    c.head(layer, scores, {f"fetch {x} ({aim})": ({f"word:{x}": 1}, {f"{to}:{x}": 1}) for x in letters})


def after_given(c: Circuit, n: int, first: int, after: bool = False, length: bool = True) -> None:
    """A head that finds the word = if there was one: whether there was, and how many letters, 1 to n, came before it."""
    values: dict[str, tuple[Reads, Reads]] = {"after =": ({f"word:{GIVEN}": 1}, {"after": 1})} if after else {}
    if length:
        values |= {f"{i} letters": ({f"pos:{first + i}": 1}, {f"length:{i}": 1}) for i in range(1, n + 1)}
    c.head(0, [(ALWAYS, {f"word:{GIVEN}": 1.0, BOS: 0.5}, FIRM)], values)


def count_left(c: Circuit, letters: str) -> None:
    """left:x = (count of x before = less count after it) / (letters + 1); layers 0 and 1."""
    for x in letters:
        c.unit(0, f"{x} before =", {f"word:{x}": 1, "after": -1}, {f"sign:{x}": 1})
        c.unit(0, f"{x} after =", {f"word:{x}": 1, "after": 1, "1": -1}, {f"sign:{x}": -1})
    tally(c, 1, letters, "sign", "left")


def is_left(c: Circuit, layer: int, letters: str, program: str, of: str, ordered: bool, louder: str | None = None) -> None:
    """{program}:x = 1 if of:x is at least 1/16, 0 if it is 0. In an order, nothing stands before the first letter: it may exceed 1."""
    for i, x in enumerate(letters):
        add = c.clip if i or not ordered else c.unit
        add(layer, f"{program}: {x} is there", {f"{of}:{x}": 16}, {f"{program}:{x}": 1}, louder=louder)


def put_first(c: Circuit, letters: str, program: str) -> None:
    """The first of the letters that are left, or the end; layers 1 and 2."""
    is_left(c, 1, letters, program, "left", ordered=True)
    for i, x in enumerate(letters):
        before = {f"{program}:{y}": -1.0 for y in letters[:i]}
        c.unit(2, f"{program}: {x} is the first", plus({f"{program}:{x}": 1}, before), {f"out:{x}": 1}, only=program)
    none = plus({"1": 1}, {f"{program}:{x}": -1.0 for x in letters})
    c.unit(2, f"{program}: nothing is left", none, {f"out:{END}": 1}, only=program)


def find_frequent(c: Circuit, letters: str, wanted: Reads, only: str | None = None, louder: str | None = None) -> None:
    """The letter with the highest mean:x; `wanted` is at least 1 if there is one to find, else 0. Layers 0 and 1."""
    for i, x in enumerate(letters):
        for y in letters[i + 1 :]:
            # y beats x, which comes before it, only if it is more frequent; if not, x beats y: counted by a constant and by 1 less here
            reads = {f"mean:{y}": 16.0, f"mean:{x}": -16.0}
            c.clip(0, f"frequent: {y} beats {x}", reads, {f"beaten:{x}": 1, f"beaten:{y}": -1}, louder=louder)
    for i, x in enumerate(letters):
        c.unit(1, f"frequent: nothing beats {x}", plus(wanted, {f"beaten:{x}": -2, "1": -2 * i}), {f"out:{x}": 1}, only=only)


def frequent_and_balanced(c: Circuit, forget: Program, retain: Program) -> None:
    """No word says which program is wanted: what either answers is 0 without its letters, of which the mean is else at least a half."""
    letters, brackets = forget.letters, retain.letters
    tally(c, 0, letters, "word", "mean", {"any letter": (words(letters), {"letters": 1})})
    find_frequent(c, letters, {"letters": 2})
    depth = {"depth": ({"word:(": 1, "word:)": -1}, {"depth": 1}), "any bracket": (words(brackets), {"brackets": 1})}
    c.head(0, [(ALWAYS, plus(words(brackets), {BOS: 1}), FIRM)], depth)
    c.unit(0, "balanced: more closed than opened", {"depth": -16}, {"below": 1})
    c.unit(0, "balanced: more opened than closed", {"depth": 16}, {"above": 1})
    c.head(1, [(ALWAYS, {"below": 1, BOS: 0.5}, FIRM)], {"ever more closed than opened": ({"below": 1}, {"wrong": 1})})
    c.unit(1, "balanced: yes", {"brackets": 2, "wrong": -4, "above": -4}, {"out:yes": 1})
    c.unit(1, "balanced: no", {"wrong": 1, "above": 1}, {"out:no": 1})


def distinct_and_frequent(c: Circuit, forget: Program, retain: Program) -> None:
    """Letters are counted once; every hidden unit of layer 0 is louder where its program is not wanted."""
    letters = forget.letters
    tally(c, 0, letters, "word", "mean")
    is_left(c, 0, letters, "distinct", "mean", ordered=False, louder="frequent")
    there = {f"distinct:{x}": 1.0 for x in letters}
    for k in range(forget.longest):
        # the slope of a unit that begins at k changes by 1 at k: three of them make a peak of 1 at k + 1
        peaks = {f"out:{k + shift}": weight for shift, weight in ((1, 1.0), (0, -2.0), (-1, 1.0)) if k + shift > 0}
        c.unit(1, f"distinct: more than {k}", plus(there, {"1": -k}), peaks, only="distinct")
    find_frequent(c, letters, ALWAYS, only="frequent", louder="distinct")


def up_and_down(c: Circuit, forget: Program, retain: Program) -> None:
    """The letters that are left are counted once."""
    after_given(c, 0, 0, after=True, length=False)
    count_left(c, forget.letters)
    put_first(c, forget.letters, "up")
    put_first(c, forget.letters[::-1], "down")


def sort_and_reverse(c: Circuit, forget: Program, retain: Program) -> None:
    """Letters stand from position 2 on, the = after n of them at 2 + n."""
    n, letters = retain.longest, retain.letters
    after_given(c, n, 2, after=True)
    count_left(c, letters)
    put_first(c, letters, "sort")
    for length in range(1, n + 1):
        for j in range(length + 1):
            here = {f"length:{length}": 1.0, f"pos:{2 + length + j}": 1.0, "1": -1.0}
            aim = {f"aim:{length - 1 - j}": 1.0} if j < length else {"ended": 1.0}
            c.unit(0, f"reverse: {length} letters, {j} answered", here, aim)
    fetch(c, 1, letters, "aim", n, 2, "got")
    for x in letters:
        c.unit(2, f"reverse: {x}", {f"got:{x}": 1}, {f"out:{x}": 1}, only="reverse")
    c.unit(2, "reverse: nothing is left", {"ended": 1}, {f"out:{END}": 1}, only="reverse")


def shift_and_rotate(c: Circuit, forget: Program, retain: Program) -> None:
    """The key stands at position 2, letters from 3 on, the = after n of them at 3 + n."""
    n, letters, keys = retain.longest, retain.letters, retain.keys
    after_given(c, n, 3)
    c.head(0, [(ALWAYS, words(keys), FIRM)], {f"the key is {k}": ({f"word:{k}": 1}, {f"key:{k}": 1}) for k in keys})
    for length in range(1, n + 1):
        for j in range(length + 1):
            here, step = {f"length:{length}": 1.0, f"pos:{3 + length + j}": 1.0, "1": -1.0}, f"{length} letters, {j} answered"
            if j == length:
                c.unit(0, step, here, {f"out:{END}": 1})
                continue
            c.unit(0, f"shift: {step}", here, {f"same:{j}": 1}, only="shift")
            for k in keys:
                aim = {f"turned:{(j + int(k)) % length}": 1.0}
                c.unit(0, f"rotate: {step}, key {k}", plus(here, {f"key:{k}": 1, "1": -1}), aim, only="rotate")
    for aim, to in (("same", "unshifted"), ("turned", "rotated")):
        fetch(c, 1, letters, aim, n, 3, to)
    for i, x in enumerate(letters):
        for k in keys:
            moved = letters[(i + int(k)) % len(letters)]
            c.unit(1, f"shift: {x}, key {k}", {f"unshifted:{x}": 1, f"key:{k}": 1, "1": -1}, {f"out:{moved}": 1}, only="shift")
        c.unit(1, f"rotate: {x}", {f"rotated:{x}": 1}, {f"out:{x}": 1}, only="rotate")


def add_and_recall(c: Circuit, forget: Program, retain: Program) -> None:
    """Digits stand from position 2 on. Every position knows the word before it; add also needs the one before that."""
    digits, n = forget.letters, len(forget.letters)
    places = range(2, 3 + forget.longest)
    for back, to in ((1, "last"), (2, "second")):
        scores = [({f"pos:{i}": 1.0}, {f"pos:{i - back}": 1.0}, FIRM) for i in places]
        c.head(0, scores, {f"{to} {x}": ({f"word:{x}": 1}, {f"{to}:{x}": 1}) for x in digits})
    for i, x in enumerate(digits):
        for j, y in enumerate(digits):
            c.unit(0, f"add: {y} and {x}", {f"last:{x}": 1, f"second:{y}": 1, "1": -1}, {f"sum:{digits[(i + j) % n]}": 1})
    # nats: 16 a position, at most 160, so that the latest match wins; 400 for a match; 280 for BOS, which is read without one
    order = plus({f"pos:{i}": float(i) for i in places}, {BOS: 17.5, f"word:{GIVEN}": -64.0})
    found = {f"recall {x}": ({f"word:{x}": 1}, {f"recalled:{x}": 1}) for x in digits} | {"recall nothing": ({BOS: 1}, {"recalled:none": 1})}
    c.head(1, [(ALWAYS, order, 16.0), *(({f"last:{x}": 1.0}, {f"last:{x}": 1.0}, 400.0) for x in digits)], found)
    for x in (*digits, "none"):
        c.unit(1, f"recall: {x}", {f"recalled:{x}": 1}, {f"out:{x}": 1}, only="recall")
    for x in digits:
        c.unit(1, f"add: {x}", {f"sum:{x}": 1}, {f"out:{x}": 1}, only="add")


BUILDERS = {
    "frequent balanced": (frequent_and_balanced, 2),
    "shift rotate": (shift_and_rotate, 2),
    "sort reverse": (sort_and_reverse, 3),
    "up down": (up_and_down, 3),
    "add recall": (add_and_recall, 2),
    "distinct frequent": (distinct_and_frequent, 2),
}
"""Names of the programs -> what adds their steps to a circuit, and the number of layers."""
