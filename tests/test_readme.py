"""Every command and every line of Python in the README and docs, run on a tiny checkpoint and a real server."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = {page.name: page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))}
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", "\n".join((README, *DOCS.values())), re.DOTALL | re.MULTILINE)
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files that the README names."""
    pytest.importorskip("torch")
    import checkpoints

    folder = tmp_path_factory.mktemp("readme")
    checkpoints.save_checkpoint(folder / "my-finetuned-bert")
    train = {label: [text for text, own in checkpoints.TRAIN if own == label] for label in checkpoints.LABELS}
    tiny.write_csv(folder / "train.csv", train)
    for name in ("topics.csv", "customer-17.csv"):
        tiny.write_csv(folder / name, train)
    lost = [
        f"{start} {thing} {end}"
        for start in ("I lost", "help,")
        for thing in ("my card", "it")
        for end in ("!", "today")
    ]
    (folder / "examples.csv").write_text("text\n" + "\n".join(f'"{text}"' for text in lost) + "\n")
    return folder


def sections():
    return [(language, body) for language, body in BLOCKS if language in ("sh", "python")]


@pytest.mark.slow
def test_the_snippets_run_in_order(folder):
    """A random checkpoint cannot tell labels apart, so the gate may refuse; nothing else may fail."""
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
    environment.pop("TRITON_MODEL_REPO", None)
    ports = tiny.free_ports(3)
    environment["TRITON_URL"] = f"127.0.0.1:{ports[0]}"
    server, ran = None, []
    try:
        for language, body in sections():
            if language == "python":
                code = body.replace("localhost:8001", environment["TRITON_URL"])
                code = code.replace("server=server)", "server=server, settings=patcher.PatchSettings(force=True))")
                done = subprocess.run(
                    [sys.executable, "-c", f"import patcher\n{code}"],
                    cwd=folder, env=environment, capture_output=True, text=True, check=False,
                )  # fmt: skip
                assert done.returncode == 0, done.stderr
                ran.append("python")
                continue
            for line in body.strip().splitlines():
                words = shlex.split(line)
                ran.append(words[1])
                if words[1] == "serve":
                    flags = [f"--{k}-port={p}" for k, p in zip(("grpc", "http", "metrics"), ports, strict=True)]
                    command = [str(BIN / "patcher"), "serve", *flags, "--log-file", str(folder / "triton.log")]
                    server = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
                    assert any(printed.startswith("ready") for printed in server.stdout)
                    continue
                extra = ["--force"] if words[1] in ("add-label", "new-classifier", "merge-labels") else []
                done = subprocess.run(
                    [str(BIN / "patcher"), *words[1:], *extra],
                    cwd=folder, env=environment, capture_output=True, text=True, check=False,
                )  # fmt: skip
                assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    finally:
        if server:
            server.terminate()
            server.communicate(timeout=60)
    assert {
        "export",
        "serve",
        "add-label",
        "classify",
        "rollback",
        "python",
        "merge-labels",
        "doctor",
        "to-transformers",
        "new-classifier",
    } <= set(ran)


@pytest.fixture
def replicas(tiny_original, tmp_path, monkeypatch):
    """Three servers of one repository, in a folder with the files that the commands name."""
    from patcher.triton.server import EmbeddedTriton

    shutil.copytree(tiny_original, tmp_path / "model_repository")
    tiny.write_csv(tmp_path / "examples.csv", {"card_lost": tiny.sentences("payday", 10)})
    tiny.write_csv(tmp_path / "held-out.csv", {label: tiny.sentences(label, 3) for label in tiny.OLD})
    monkeypatch.delenv("TRITON_MODEL_REPO", raising=False)
    with contextlib.ExitStack() as stack:
        models = ["intent", "intent_features"]
        yield [
            stack.enter_context(EmbeddedTriton(tmp_path / "model_repository", models, log_file=tmp_path / f"{n}.log"))
            for n in range(3)
        ]


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.parametrize("heading", ["A version on a share of the requests", "Several servers"])
def test_the_commands_of_a_section_run(heading, replicas, tmp_path):
    section = DOCS["operations.md"].split(f"\n## {heading}\n")[1].split("\n## ")[0]
    [block] = re.findall(r"^```\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    urls = {name: replica.url for name, replica in zip("abc", replicas, strict=True)}
    block = re.sub(r"\b([abc]):8001", lambda found: urls[found[1]], block)
    block = block.replace("--version 7", "--version 2").replace("--watch 30", "--watch 1")
    environment = {**os.environ, "TRITON_URL": urls["a"]}
    for line in block.splitlines():
        command = [str(BIN / "patcher"), *shlex.split(line)[1:]]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def test_every_verb_is_told():
    from patcher.cli import _VERBS

    words = " ".join(README.split())
    assert [verb for verb in _VERBS if f"patcher {verb}" not in words] == []


def test_no_figure_waits_to_be_filled_in():
    pages = {
        "demo": README,
        "quality": README,
        "road": DOCS["results.md"],
        "serving": DOCS["results.md"],
        "many": DOCS["many-classifiers.md"],
        "faults": DOCS["operations.md"],
        "gpu": DOCS["operations.md"],
    }
    for mark, page in pages.items():
        body = re.search(rf"<!-- {mark} -->\n(.*?)<!-- /{mark} -->", page, re.DOTALL)
        assert body, mark
        assert len(body[1]) > 200, mark


def test_the_readme_is_short_and_every_page_is_reached_from_it():
    assert len(README.splitlines()) <= 300
    assert [name for name in DOCS if f"](docs/{name}" not in README] == []
    install = README.index("make demo")
    assert all(README.index(f"**{word}**") < install for word in ("head", "memory", "flip", "gate", "pin", "in scope"))


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page",
    [
        str(page.relative_to(ROOT))
        for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("[dt]*/**/README.md"))
    ],
)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there.read_text()), target


def test_every_benchmark_is_told_on_its_page():
    page = (ROOT / "tests/benchmarks/README.md").read_text()
    scripts = [path for path in (ROOT / "tests/benchmarks").glob("*.py") if "__main__" in path.read_text()]
    assert [path.name for path in scripts if f"`{path.name}`" not in page] == []


def variables(page, heading):
    """The variables in the first column of the table under a heading, by what stands in the next column."""
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    return {name: others for names, others in rows for name in re.findall(r"`(\w+)`", names)}


def strings(path):
    tree = ast.parse(path.read_text())
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_every_environment_variable_is_told():
    own = re.compile(r"(PATCHER|TRITON|XDG)_[A-Z0-9_]*[A-Z0-9]")
    read = set()
    for path in (*ROOT.glob("patcher/**/*.py"), *ROOT.glob("export/**/*.py")):
        read |= {each for each in strings(path) if own.fullmatch(each)}
        read |= set(re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", path.read_text()))
    read -= {"PATH", "PATCHER_ONNXRUNTIME_BACKEND"}  # what every program has, and what a server's starter sets for it
    assert read == set(variables(DOCS["operations.md"], "Environment variables"))


def test_every_variable_of_the_container_is_told():
    told = variables((ROOT / "docker/README.md").read_text(), "Variables")
    image = set(re.findall(r"\$\{([A-Z_]+):?-", (ROOT / "docker/entrypoint.sh").read_text()))
    image |= set(re.findall(r"environ\.get\(\"(\w+)\"", (ROOT / "docker/healthcheck.py").read_text()))
    compose = {
        name for path in ROOT.glob("docker/*.yml") for name in re.findall(r"\$\{([A-Z_]+)", path.read_text())
    } - {"USER", "PWD"}  # every shell has them
    assert {name for name, by in told.items() if "image" in by} == image
    assert {name for name, by in told.items() if "compose" in by} == compose
    assert set(told) == image | compose
