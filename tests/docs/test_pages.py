"""What the pages and the README say can be followed: links, commands, and lists that are whole."""

from __future__ import annotations

import ast
import copy
import re
import shlex
from pathlib import Path

import pytest
from small_runs import make_batch, make_detector

from detection_toolkit.commands import COMMANDS, Group
from detection_toolkit.config import apply_overrides, find_config_file, get_config

ROOT = Path(__file__).resolve().parents[2]
TOP_PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *TOP_PAGES])
# A page that holds a command line of its own is listed by how it is called.
ENTRY_POINTS = sorted(
    path
    for folder in ("demo", "tools", "projects")
    for path in (ROOT / folder).rglob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
) + [ROOT / "train_net.py"]

COMMAND = "stageinteractor"
FIGURES = ROOT / "projects" / "detection_toolkit" / "commands" / "figures.py"
SHARED_ARGUMENTS = ROOT / "projects" / "detection_toolkit" / "engine" / "arguments.py"


def how_it_is_called(path: Path) -> str:
    if ROOT / "projects" not in path.parents:
        return str(path.relative_to(ROOT))
    parts = path.relative_to(ROOT / "projects").with_suffix("").parts
    return "python -m " + ".".join(parts[:-1] if parts[-1] == "__main__" else parts)


def blocks(page: Path, *languages: str) -> list[str]:
    """Fenced blocks of a language, and those indented by four spaces as "indented"."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [block for language, block in found if language in languages]


def file_of_module(name: str) -> str:
    """Of what ``python -m`` runs, relative to the checkout."""
    path = Path("projects", *name.split("."))
    if not (ROOT / path).is_dir():
        return str(path.with_suffix(".py"))
    is_run = (ROOT / path / "__main__.py").is_file()
    return str(path / ("__main__.py" if is_run else "__init__.py"))


def file_of_subcommand(words: list[str]) -> list[str]:
    """Of what follows the name of the installed command: the file, and the rest."""
    command = Group(COMMANDS, "")
    while isinstance(command, Group) and words[:1] and not words[0].startswith("-"):
        assert words[0] in command.members, words
        command, *words = command.members[words[0]], *words[1:]
    module = "commands" if isinstance(command, Group) else command.module
    return [file_of_module(f"detection_toolkit.{module}"), *words]


def source_of(script: Path) -> str:
    """Of a command line, and of the module that a thin script calls."""
    source = script.read_text(encoding="utf-8")
    for pattern in (
        r"from detection_toolkit\.(commands\.\w+) import main",
        r"from \. import (train)$",
    ):
        for name in re.findall(pattern, source, flags=re.M):
            module = name if name.startswith("commands") else f"commands.{name}"
            file = ROOT / file_of_module(f"detection_toolkit.{module}")
            source += file.read_text(encoding="utf-8")
    return source


def commands(page: Path) -> list[list[str]]:
    """Calls of Python scripts, of the project's modules, and of its command, in the blocks of a
    page, as words."""
    found = []
    for block in blocks(page, "bash", ""):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == [COMMAND] or words[:3] == ["python", "-m", "detection_toolkit"]:
                found.append(file_of_subcommand(words[1 if words[0] == COMMAND else 3 :]))
                continue
            if words[1:2] == ["-m"] and (ROOT / "projects" / words[2].split(".")[0]).is_dir():
                found.append([file_of_module(words[2]), *words[3:]])
                continue
            scripts = [i for i, word in enumerate(words) if re.fullmatch(r"[\w/]+\.py", word)]
            is_call = any(w.startswith(("python", "torchrun", "srun")) for w in words)
            if is_call and scripts:
                found.append(words[scripts[0] :])
    return found


def test_there_are_commands_to_check():
    found = [words for page in PAGES for words in commands(page)]
    assert len(found) > 50
    files = {words[0] for words in found}
    for name in ("train", "evaluate", "predict", "configs"):
        assert f"projects/detection_toolkit/commands/{name}.py" in files


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_scripts_options_and_configs_that_exist(page):
    for words in commands(page):
        script = ROOT / words[0]
        assert script.is_file(), words
        source = source_of(script)
        if "figures_parser(" in source:
            source += FIGURES.read_text(encoding="utf-8")
        if re.search(r"add_(config|overrides)_arguments?\(", source):
            source += SHARED_ARGUMENTS.read_text(encoding="utf-8")
        for word in words[1:]:
            if re.match(r"--[a-z]", word):
                # train_net.py has the options of Detectron2.
                assert f'"{word}"' in source or "default_argument_parser" in source, words
        for i, word in enumerate(words[:-1]):
            name = words[i + 1]
            if word == "--config-file" and re.fullmatch(r"[\w/]+\.py", name) and "/" in name:
                find_config_file(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_overrides_in_commands_are_keys_of_their_config(page):
    for words in commands(page):
        names = [b for a, b in zip(words, words[1:]) if a == "--config-file"]
        scripts = ("train_net.py", "demo/demo.py", "train.py", "evaluate.py", "predict.py")
        if not words[0].endswith(scripts) or not names:
            continue
        if not re.fullmatch(r"[\w/]+\.py", names[0]) or "/" not in names[0]:
            continue  # "…", or a config of the reader's own
        overrides = [word for word in words if re.match(r"\+?[a-z_]+\.[\w.]+=", word)]
        apply_overrides(get_config(names[0]), overrides)


def test_keys_in_the_text_of_pages_are_keys_of_the_config():
    """Keys that these pages name in code, with a value or without one."""
    cfg = get_config("stageinteractor/stageinteractor_r50_100q_1x.py")
    pattern = r"`((?:model|train|dataloader|optimizer|lr_multiplier)\.[\w.]+(?:=[^`\s]+)?)"
    checked = 0
    pages = [ROOT / "docs" / f"{name}.md" for name in ("coco", "configs", "faq", "own_data")]
    for page in [*pages, ROOT / "README.md"]:
        for text in re.findall(pattern, page.read_text(encoding="utf-8")):
            key, _, value = text.partition("=")
            if "*" in key or key.endswith("."):
                continue
            override = f"{key}={value or 'null'}"
            apply_overrides(copy.deepcopy(cfg), [override])
            checked += 1
    assert checked > 40


def test_every_config_is_in_the_table_with_its_own_words():
    text = (ROOT / "docs" / "configs.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| \[[\w/]+\]\(\.\./(configs/[^)]+)\) \| (.+?) \|$", text, re.M))
    configs = {str(path.relative_to(ROOT)): path for path in (ROOT / "configs").rglob("*.py")}
    assert rows.keys() == configs.keys()
    for name, path in configs.items():
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        said = docstring.split("\n\n")[0].replace("\n", " ").rstrip(".")
        assert rows[name] == said, f"docs/configs.md and {name} differ"


@pytest.mark.parametrize("path", ENTRY_POINTS, ids=how_it_is_called)
def test_every_tool_is_listed_with_a_line_and_an_example(path):
    text = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
    called = how_it_is_called(path)
    (line,) = re.findall(rf"^\| `{re.escape(called)}` \| (.+) \|$", text, flags=re.MULTILINE)
    assert len(line) > 15
    examples = "\n".join(blocks(ROOT / "docs" / "tools.md", "bash"))
    start = called if called.startswith("python") else rf"python3? {re.escape(called)}"
    assert re.search(rf"^{start}\b", examples, flags=re.MULTILINE), called


def test_a_config_of_ones_own_works_as_the_page_says(tmp_path):
    (text,) = [
        block
        for block in blocks(ROOT / "docs" / "configs.md", "python")
        if block.startswith("# my_config.py")
    ]
    path = tmp_path / "my_config.py"
    path.write_text(text)
    cfg = get_config(str(path))
    assert cfg.model.decoder.num_stages == 4 and cfg.train.output_dir == "output/mine"
    assert set(cfg) == {"model", "dataloader", "optimizer", "lr_multiplier", "train"}


def test_the_example_of_a_released_config_is_the_config():
    released = ROOT / "configs" / "stageinteractor" / "stageinteractor_r50_100q_1x.py"
    (block,) = [
        b for b in blocks(ROOT / "docs" / "configs.md", "python") if b.startswith("from ..common")
    ]
    assert set(block.splitlines()) <= set(released.read_text(encoding="utf-8").splitlines())


def test_the_readme_leads_to_the_notebook_and_the_site():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "](notebooks/tutorial.ipynb)" in text and "`make docs`" in text


def test_the_example_of_other_decoders_computes_the_losses_of_the_stages():
    (code,) = [b for b in blocks(ROOT / "docs" / "sqr.md", "python") if "recollect(" in b]
    detector = make_detector()
    batch = [{**x, "image": x["image"].double()} for x in make_batch([2, 1])]
    images = detector.preprocess_image(batch)
    maps = detector.extract_features(images)
    truth = detector.prepare_ground_truth(batch, images.image_sizes)
    names = {
        "decoder": detector.decoder,
        "plain_criterion": detector.criterion,
        "maps": maps,
        "queries": detector.initial_queries(maps),
        "truth": truth.to(maps.levels[0].dtype),
    }
    exec(code, names)
    plain = detector.criterion(detector.predict(images), names["truth"]).as_dict()
    assert names["losses"].keys() == plain.keys()
    assert all(loss.isfinite() for loss in names["losses"].values())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_use_the_words_of_the_field(page):
    """Those that readers stumbled on: a run, to fix, per step, a package or module."""
    text = page.read_text(encoding="utf-8").lower()
    for pattern, instead in {
        r"\btrainings\b": "runs",
        r"\bmend(s|ed|ing)?\b": "fix",
        r"\brooms?\b": "package",
        r"\b(images|seconds|samples|batches|objects|queries) an? (step|image|class)\b": "per",
    }.items():
        found = re.search(pattern, text)
        assert found is None, f"{page.name} has {found[0]!r}: write {instead!r}"
