"""The offline tasks on a small installation made for the purpose: splits, near-duplicates, and what cleaning leaves."""

import functools
import hashlib
import itertools
import os
import random
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from sepcap.tasks.sources import cleaning, local
from sepcap.tasks.sources.ngrams import among, runs, sampled, united

KINDS = ("prose", "python", "cpp")
WORDS = ["the", "model", "reads", "text", "slowly", "while", "every", "small", "number", "of", "rows", "keeps", "its"]
WORDS += ["own", "name", "between", "two", "long", "calls", "and", "nobody", "asks", "where", "it", "came", "from"]


def sentence(rng, n=12) -> str:
    return " ".join(rng.choices(WORDS, k=n)).capitalize() + "."


def paragraph(rng, n=4) -> str:
    return " ".join(sentence(rng) for _ in range(n))


def module(rng, n=12) -> str:
    """A Python file with a docstring, comments and code."""
    lines = [f'"""{paragraph(rng)}"""', "", "import os", ""]
    for i in range(n):
        name = f"value_{rng.randrange(10**6)}"
        lines += [f"def {name}(argument):  # comment {i}", f'    """{paragraph(rng, 2)}"""']
        lines += [f"    return argument + {rng.randrange(1000)}", ""]
    return "\n".join(lines)


def header(rng, n=20) -> str:
    lines = ["// Copyright of somebody.", "#pragma once", ""]
    lines += [f"int function_{rng.randrange(10**6)}(int argument_{i}); // says nothing" for i in range(n)]
    return "\n".join(lines)


def write(path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@functools.cache
def installed() -> dict[str, str]:
    """Text of every file of the installation, by its path in the standard library."""
    rng, found = random.Random(0), {}
    for i in range(120):
        found[f"package{i % 7}/module{i}.py"] = module(rng)
        found[f"site-packages/other{i % 5}/module{i}.py"] = module(rng)
        found[f"site-packages/torch/include/ATen/header{i}.h"] = header(rng)
    for i in range(60):
        text = f"Name: dist{i}\nVersion: 1.0\n\n{paragraph(rng)}\n\n{paragraph(rng)}\n"
        found[f"site-packages/dist{i}-1.0.dist-info/METADATA"] = text
    return found


@pytest.fixture
def installation(tmp_path, monkeypatch):
    """A standard library and a site-packages folder of a few hundred files."""
    stdlib, purelib = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    for path, text in installed().items():
        write(stdlib / path, text)
    monkeypatch.setattr(local.sysconfig, "get_path", lambda name: str({"stdlib": stdlib}.get(name, purelib)))
    monkeypatch.setattr(local.importlib.util, "find_spec", lambda name: None)  # the real torch is not part of it
    made = {"torch", "odd", "copies", "documented", "vendored", *(f"other{i}" for i in range(5)), *(f"dist{i}" for i in range(60))}
    monkeypatch.setattr(local, "PACKAGES", frozenset(made))
    return tmp_path / "lib"


def read(kind) -> dict[str, dict[str, str]]:
    """The documents of every split, each with the texts of the splits before it, as a task reads them."""
    found: dict[str, dict[str, str]] = {}
    for split in local.SPLITS:
        earlier = [text for rows in found.values() for text in rows.values()]
        found[split] = {row["name"]: row["text"] for row in local.documents(kind, split, earlier=earlier)}
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_splits_share_no_file_and_no_paragraph(installation, kind):
    by_split = read(kind)
    assert all(by_split.values())
    for one, other in itertools.combinations(by_split, 2):
        assert not set(by_split[one]) & set(by_split[other])
        pieces = [{p for text in by_split[s].values() for p in text.split("\n\n")} for s in (one, other)]
        if kind == "prose":
            assert not pieces[0] & pieces[1]
        assert not set(by_split[one].values()) & set(by_split[other].values())
    for split, rows in by_split.items():
        assert all(local.split_of(name) == split for name in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_do_not_depend_on_the_order_of_the_disk(installation, kind, monkeypatch):
    # here every split reads those before it; there they are given
    expected = [[(row["name"], row["text"]) for row in local.documents(kind, split)] for split in local.SPLITS]
    walk = os.walk

    def other_order(root):
        for folder, subfolders, files in walk(root):
            random.Random(folder).shuffle(files)
            subfolders.reverse()
            yield folder, subfolders, files

    monkeypatch.setattr(os, "walk", other_order)
    assert [list(rows.items()) for rows in read(kind).values()] == expected
    hashes = [hashlib.sha256(f.name.encode()).hexdigest() for f in local.find_files(kind)]
    assert hashes == sorted(hashes)


def test_bucket_is_the_hash_of_the_name_and_nothing_else():
    for name in ("stdlib:os.py", "torch/include/ATen/ATen.h", "ü"):
        assert local.bucket(name) == int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) % 100
    shares = [local.split_of(f"package/module{i}.py") for i in range(20_000)]
    assert shares.count("train") / 20_000 == pytest.approx(0.80, abs=0.01)
    assert shares.count("collect") / 20_000 == pytest.approx(0.10, abs=0.01)
    assert shares.count("evaluate") / 20_000 == pytest.approx(0.10, abs=0.01)


def test_upgrade_moves_nothing_to_another_split(installation):
    before = read("prose")
    fingerprint = local.fingerprint(local.find_files("prose"))
    site = installation / "site-packages"
    for folder in list(site.glob("*-1.0.dist-info")):
        folder.rename(site / folder.name.replace("-1.0.", "-2.10.3rc1."))
    assert read("prose") == before
    assert local.fingerprint(local.find_files("prose")) == fingerprint
    write(site / "dist0-2.10.3rc1.dist-info" / "METADATA", "Name: dist0\n\nshorter")
    assert local.fingerprint(local.find_files("prose")) != fingerprint


def test_what_is_read_and_what_is_not(installation):
    site = installation / "site-packages"
    rng = random.Random(1)
    for path in ("sepcap/x.py", "sepcap-0.1.dist-info/METADATA", "a/__pycache__/b.py", "a/node_modules/b.py", "a/b.txt", "elsewhere/c.h"):
        write(site / path, module(rng))
    for path in ("torch/include/a.hpp", "torch/include/b.cuh", "torch/include/c.cpp"):
        write(site / path, header(rng))
    names = {kind: {f.name for f in local.find_files(kind)} for kind in KINDS}
    everything = set().union(*names.values())
    assert not [n for n in everything if "sepcap" in n or "__pycache__" in n or "node_modules" in n or n.endswith((".txt", ".cpp"))]
    assert {"torch/include/a.hpp", "torch/include/b.cuh"} <= names["cpp"]
    assert "elsewhere/c.h" not in everything
    assert "dist3/METADATA" in names["prose"] - names["python"]
    # the standard library stops where site-packages begins: no file has two names
    assert len([n for n in names["python"] if n.endswith("module3.py")]) == 2
    assert {"stdlib:package3/module3.py", "other3/module3.py"} <= names["python"]


@pytest.mark.parametrize("kind", ["python", "cpp"])
def test_near_duplicates_under_another_path_are_dropped(installation, kind):
    before = read(kind)
    suffix, site = {"python": ".py", "cpp": ".h"}[kind], installation / "site-packages"
    source = site / ("other1" if kind == "python" else "torch/include/ATen")
    target = site / ("vendored" if kind == "python" else "torch/include/caffe2")
    for path in sorted(source.glob(f"*{suffix}")):
        text = path.read_text()
        extra = "import sys\n" if kind == "python" else "#include <cstdint>\n"
        # vendored copies differ in a line or two
        write(target / path.name, text.replace("import os\n", "from .. import os\n") + extra)
    after = read(kind)
    copies = {n for rows in after.values() for n in rows} - {n for rows in before.values() for n in rows}
    originals = {n for rows in before.values() for n in rows} - {n for rows in after.values() for n in rows}
    # of a pair one stays: the one that comes first in the order evaluate, collect, train
    assert len(copies) == len(originals) > 5
    texts = [text for rows in after.values() for text in rows.values()]
    assert len(texts) == len(set(texts))
    assert sum(map(len, after.values())) == sum(map(len, before.values()))


def test_what_evaluate_has_stays_and_train_loses_it(installation):
    site = installation / "site-packages"
    train = next(f for f in local.find_files("python") if local.split_of(f.name) == "train")
    copy = next(f"copies/c{i}.py" for i in range(1000) if local.split_of(f"copies/c{i}.py") == "evaluate")
    (site / "copies").mkdir()
    shutil.copy(train.path, site / copy)
    by_split = read("python")
    assert copy in by_split["evaluate"]
    assert train.name not in by_split["train"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_line_of_the_evaluation_part_leaves_the_others(installation, kind):
    """Every file of the first package quotes its own line of a held-out file; the other lines stay."""
    rng, site = random.Random(8), installation / "site-packages"
    suffix, folder = {"python": (".py", "other0"), "cpp": (".h", "torch/include/ATen"), "prose": (".py", "other0")}[kind]
    held = next(f for f in local.find_files(kind) if local.split_of(f.name) == "evaluate" and f.name.endswith(suffix))
    lines = [sentence(rng, 16)[:-1] for _ in range(200)]

    def said(line: str) -> str:
        return {"python": f"text = '{line}'", "cpp": f'const char* text = "{line}";', "prose": f'def quoting():\n    """{line}."""'}[kind]

    write(Path(held.path), Path(held.path).read_text() + "\n" + "\n".join(map(said, lines)) + "\n")
    for path, line in zip(sorted((site / folder).glob(f"*{suffix}")), lines, strict=False):
        if str(path) != held.path:
            write(path, path.read_text() + "\n" + said(line) + "\n")
    by_split = read(kind)
    assert all(line in by_split["evaluate"][held.name] for line in lines)
    texts = [text for split in ("collect", "train") for text in by_split[split].values()]
    assert len(texts) > 100
    assert not any(line in text for text in texts for line in lines)
    found = {split: united([runs(text) for text in rows.values()]) for split, rows in by_split.items()}
    assert not among(found["train"], found["evaluate"]).any()
    assert not among(found["train"], found["collect"]).any()
    assert not among(found["collect"], found["evaluate"]).any()


@pytest.mark.thorough
def test_what_is_installed_beside_the_list_changes_nothing(installation):
    before = {kind: (read(kind), local.fingerprint(local.find_files(kind))) for kind in KINDS}
    rng, site = random.Random(9), installation / "site-packages"
    for i in range(20):
        write(site / "another" / f"m{i}.py", module(rng))
        write(site / f"single{i}.py", module(rng))
        write(site / f"more{i}-2.0.dist-info" / "METADATA", f"Name: more{i}\n\n{paragraph(rng)}\n")
        write(installation / "test" / f"test_{i}.py", module(rng))
    assert {kind: (read(kind), local.fingerprint(local.find_files(kind))) for kind in KINDS} == before
    # but for training all of a package can be asked for
    more = {row["name"] for row in local.documents("python", "train", more=("another",))}
    assert more - set(before["python"][0]["train"]) == {f"another/m{i}.py" for i in range(20)}


def test_what_the_embedded_model_was_trained_on_is_not_held_out(installation, monkeypatch, tmp_path):
    """Training texts with one held-out document of each split, and with a few lines of another one."""
    before = read("python")
    evaluated, collected = (dict(before[split]) for split in ("evaluate", "collect"))
    whole, part = [next(iter(evaluated)), next(iter(collected))], list(evaluated)[1]
    fingerprint = local.fingerprint(local.find_files("python"))
    texts = [evaluated[whole[0]], collected[whole[1]], "\n".join(evaluated[part].split("\n")[:2])]
    monkeypatch.setattr(local, "TRAINED_ON", tmp_path / "trained.safetensors")
    save_file({"runs": sampled(united([runs(text) for text in texts]))}, local.TRAINED_ON)
    after = read("python")
    assert set(evaluated) - set(after["evaluate"]) == {whole[0]}
    assert set(collected) - set(after["collect"]) == {whole[1]}
    assert set(after["train"]) >= set(before["train"])
    assert local.fingerprint(local.find_files("python")) != fingerprint


def test_what_a_program_wrote_is_left_out(installation):
    site, rng = installation / "site-packages", random.Random(10)
    write(site / "torch/include/ATen/made.h", "#pragma once\n\n// @generated by gen.py from Ops.h\n" + header(rng))
    write(site / "odd" / "made.py", "# This file was automatically generated from schema.json.\n" + module(rng))
    write(site / "odd" / "says.py", module(rng) + "\n# what is automatically generated stands elsewhere\n")
    names = {name for kind in ("python", "cpp") for rows in read(kind).values() for name in rows}
    assert "odd/says.py" in names
    assert not {"torch/include/ATen/made.h", "odd/made.py"} & names


def test_paragraphs_that_repeat_are_given_once(installation):
    site = installation / "site-packages"
    rng = random.Random(5)
    shared = paragraph(rng)
    for i in range(40):
        write(site / "documented" / f"m{i}.py", f'"""{paragraph(rng)}\n\n{shared}\n"""\n')
    texts = [text for rows in read("prose").values() for text in rows.values()]
    assert sum(shared in text for text in texts) == 1


def test_chapters_of_the_language_reference_are_documents_of_their_own(installation):
    rng = random.Random(6)
    topics = {f"topic{i}": "\n\n".join(paragraph(rng) for _ in range(3)) for i in range(80)}
    write(installation / "pydoc_data" / "topics.py", f"topics = {topics!r}\n")
    by_split = read("prose")
    found = {split: {n.partition("#")[2] for n in rows if "#" in n} for split, rows in by_split.items()}
    assert set().union(*found.values()) == set(topics)
    assert all(found.values())
    assert all(local.split_of(f"stdlib:pydoc_data/topics.py#{t}") == split for split, names in found.items() for t in names)


def test_files_that_cannot_be_used_are_left_out(installation):
    site = installation / "site-packages"
    names = [n for i in range(400) if local.split_of(n := f"odd/m{i}.py") == "evaluate"]
    rng = random.Random(7)
    (site / "odd").mkdir()
    (site / names[0]).write_bytes(b"x = '\xff'\n" * 100)  # no UTF-8
    write(site / names[1], "def broken(:\n" * 50)
    write(site / names[2], "x = 1\n")  # too short
    write(site / names[3], "\n".join(f"x{i} = {rng.random()}" for i in range(5000)))  # too long
    write(site / names[4], "TABLE = [" + ", ".join(str(rng.randrange(10**6)) for _ in range(1000)) + "]")
    (site / names[5]).symlink_to(site / "nowhere.py")
    write(site / names[6], module(rng))
    os.remove(site / names[5])
    assert {n for n in read("python")["evaluate"] if n.startswith("odd/")} == {names[6]}


@pytest.mark.parametrize(
    ("source", "left"),
    [
        ("def f():\n    'Say it.'\n    return 1  # one", "def f():\n    return 1"),
        ('"""Module."""\nx = 1', "x = 1"),
        ('class A:\n    """Only this."""\n\ny = 2', "class A:\n    pass\n\ny = 2"),
        ('async def f():\n    """Long.\n\n    Text.\n    """\n    await g()', "async def f():\n    await g()"),
        ("x = '# no comment'  # a comment\n# another\ny = 2", "x = '# no comment'\n\ny = 2"),
        ('x = """\n# kept\n"""', 'x = """\n# kept\n"""'),
        ("def f():\n    x = 'kept'\n    return x", "def f():\n    x = 'kept'\n    return x"),
        ("x = (", ""),
        ("\0", ""),
    ],
)
def test_strip_python(source, left):
    assert cleaning.strip_python(source) == left


def test_docstrings_in_reading_order():
    source = '"""One."""\nclass A:\n    """Two."""\n    def f(self):\n        """Three."""\n\ndef g():\n    "Four."\n    x = "no"'
    assert cleaning.docstrings(source) == ["One.", "Two.", "Three.", "Four."]
    assert cleaning.docstrings("def (") == []


@pytest.mark.parametrize(
    ("source", "left"),
    [
        ("int a; // one\nint b;", "int a;\nint b;"),
        ("/* licence\n * text */\nint a;", "int a;"),
        ('auto s = "// kept /* too */"; // gone', 'auto s = "// kept /* too */";'),
        ("char c = '\"'; // gone\nint d;", "char c = '\"';\nint d;"),
        ("int a; /* one */ int b; /* two */", "int a; int b;"),
        ("a\n\n\n\n\nb", "a\n\nb"),
    ],
)
def test_strip_cpp(source, left):
    assert cleaning.strip_cpp_comments(source) == left


GOOD = "This function reads the whole file and gives back the lines that it found there."
MORE = "It keeps them in the order in which they stand, and nothing else is ever changed."

CODE = "this is code that looks like a sentence of many words, is it not."


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"{GOOD}\n\n{MORE}", f"{GOOD}\n\n{MORE}"),
        (f"{GOOD}\n    {MORE}", f"{GOOD} {MORE}"),  # the lines of a paragraph are joined
        (f"{GOOD}\n\n>>> read('file')\n['line']\n\n{MORE}", f"{GOOD}\n\n{MORE}"),
        (f"{GOOD}\n\n    >>> read('file')\n    ['line']", GOOD),
        (f"{GOOD}\n\n```python\n{CODE}\n```\n\n{MORE}", f"{GOOD}\n\n{MORE}"),
        (f"{GOOD} For example::\n\n    {CODE}\n\n{MORE}", f"{GOOD} For example:\n\n{MORE}"),
        (f"{GOOD}\n\n====  =====\nname  value\n====  =====\none   first\n====  =====\n\n{MORE}", f"{GOOD}\n\n{MORE}"),
        (f"{GOOD}\n\n| a | b |\n|---|---|\n| the | table |\n\n{MORE}", f"{GOOD}\n\n{MORE}"),
        (f"Title\n=====\n\n{GOOD}", GOOD),
        (f"{GOOD}\n\nArgs:\n    path (str): {MORE}", f"{GOOD}\n\n{MORE}"),
        (f"- {GOOD}\n- {MORE}\n- short", f"{GOOD}\n\n{MORE}"),
        (GOOD.replace("the whole file", ":class:`~io.File`"), GOOD.replace("the whole file", "io.File")),
        (GOOD.replace("the whole file", "`the file <https://example.org>`_"), GOOD.replace("the whole file", "the file")),
        (GOOD.replace("the whole file", "[the file](https://example.org)"), GOOD.replace("the whole file", "the file")),
        (GOOD.replace("whole", "``whole``"), GOOD),
        ("Too short to be prose.", ""),
        ("a list of words that never comes to the end of any sentence at all", ""),
        ("0x1 0x2 0x3 0x4 0x5 0x6 0x7 0x8 0x9 0xa 0xb 0xc 0xd 0xe is it.", ""),
    ],
)
def test_clean_prose(text, left):
    assert cleaning.clean_prose(text) == left


@pytest.mark.parametrize("kind", KINDS)
def test_the_installation_that_runs_this(kind, monkeypatch):
    """The first of its files; reading all of them takes half a minute."""
    files = local.find_files(kind)
    assert len(files) > 1000
    assert not any("sepcap" in file.name for file in files)
    held = [file for file in files if local.split_of(file.name) == "evaluate"]
    monkeypatch.setattr(local, "find_files", lambda *_: held[:60])
    rows = list(itertools.islice(local.documents(kind, "evaluate"), 12))
    assert len(rows) == 12
    for row in rows:
        assert local.split_of(row["name"]) == "evaluate"
        assert len(row["text"]) >= local.MIN_CHARS
    texts = "\n".join(row["text"] for row in rows)
    if kind == "prose":
        assert ">>>" not in texts
        assert "```" not in texts
    if kind == "cpp":
        assert "#include" in texts
        assert "\n//" not in texts
    if kind == "python":
        assert "import " in texts
        assert all(cleaning.docstrings(row["text"]) == [] for row in rows)


def test_a_linked_library_folder_is_read_once(tmp_path, monkeypatch):
    """lib64 is a link to lib on some systems: the same file must not appear in two splits under two names."""
    for name in ("stdlib", "lib"):
        (tmp_path / name).mkdir()
    (tmp_path / "lib" / "package.py").write_text("x = 1\n")
    (tmp_path / "lib" / "gone.py").symlink_to(tmp_path / "nowhere.py")
    (tmp_path / "lib64").symlink_to(tmp_path / "lib")
    paths = {"stdlib": tmp_path / "stdlib", "purelib": tmp_path / "lib", "platlib": tmp_path / "lib64"}
    monkeypatch.setattr(local.sysconfig, "get_path", lambda name: str(paths[name]))
    monkeypatch.setattr(local.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(local, "PACKAGES", frozenset({"package", "gone"}))
    files = local.find_files("python")
    assert [f.name for f in files] == ["package.py"]
    assert local.fingerprint(files)
