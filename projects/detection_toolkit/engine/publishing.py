"""A detector as a folder that others can use by its name: weights, config and model card."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from ..checkpoint.hub import HUB, RUN_CONFIG, WEIGHTS_FILE
from ..checkpoint.official_files import write_safetensors
from ..config import config_text, get_config
from ..data.registration import name_of_path
from ..durable import write_text
from ..errors import UserError
from ..evaluation.results import METRICS, read_facts, read_json
from ..program import MODULE
from ..texts import in_markdown
from .predictor import Predictor
from .runs import find_run, plain_values
from .settings import RunSettings

__all__ = ["CARD", "check_folder", "publish"]

CARD = "README.md"
_FILES = (WEIGHTS_FILE, RUN_CONFIG, CARD)
# Files that the card's commands name.
_DATA = {part: f"my/{name}.json" for part, name in (("train", "train"), ("test", "val"))}


def check_folder(folder: str | os.PathLike[str]) -> None:
    """
    Raises:
        UserError: it holds a published model already, whose card may have been written on.
    """
    there = [name for name in _FILES if os.path.lexists(os.path.join(folder, name))]
    if there:
        raise UserError(f"{folder} has a {there[0]} already: name another folder, or remove it")


def publish(
    predictor: Predictor,
    folder: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str],
    half: bool = False,
    hub_name: str = "",
    trust_config: bool = False,
) -> None:
    """Write ``model.safetensors``, ``config.yaml`` and ``README.md``.

    Paths of this machine are left out of the config.

    Args:
        predictor: whose weights and config are written.
        folder: is made; must not hold such files.
        source: what the predictor was made of: a run's folder, its config, a checkpoint in it, or
            any config. Of a run, the card tells the data, the length and what was measured.
        half: weights as float16, of half the size; what is no parameter stays float32.
        hub_name: OWNER/NAME that the folder will have on the hub, for the card's commands; empty:
            they name the folder.
        trust_config: see :func:`~detection_toolkit.config.get_config`.

    Raises:
        UserError: see :func:`check_folder`.
        ImportError: safetensors is not installed.
        OSError: it cannot be written.
    """
    check_folder(folder)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = find_run(source)
    run = None if found is None else Path(found[0]).parent
    config = config_text(_published_config(predictor.cfg, folder.resolve().name))
    name = _config_name(run, source)
    config = f"# {name}\n{config}" if name else config
    parameters = {key for key, _ in predictor.model.named_parameters(remove_duplicate=False)}
    weights = {
        key: value.to(torch.float16) if half and key in parameters else value
        for key, value in predictor.model.state_dict().items()
    }
    facts = {
        "classes": predictor.metadata.get("thing_classes"),
        "input_format": predictor.input_format,
        "resizing": plain_values(predictor.cfg.dataloader.test.mapper.augmentations),
    }
    write_safetensors(folder / WEIGHTS_FILE, weights, run=facts, config=config)
    write_text(folder / RUN_CONFIG, config)
    began = None
    if run is not None:
        train = get_config(str(run / RUN_CONFIG), trust_config=trust_config).train
        began = train.get("init_checkpoint") or ""
    card = _card(
        predictor,
        title=hub_name.rpartition("/")[2] or folder.resolve().name,
        address=f"{HUB}{hub_name}" if hub_name else folder.resolve().name,
        config_name=name,
        measured=[] if run is None else _measured(predictor, run),
        began_with=began,
        half=half,
    )
    write_text(folder / CARD, card)


def _published_config(cfg: DictConfig, name: str) -> DictConfig:
    """Without what only this machine has: data, paths of weights and results, trackers."""
    cfg = copy.deepcopy(cfg)
    for part in ("train", "test"):
        node = OmegaConf.select(cfg, f"dataloader.{part}.dataset")
        if _has_files(node):
            # And names, which count where there is no path.
            keys = ("names", "json_file", "path", "split", "format", "image_root", "name")
            node.update({key: None for key in keys if key in node})
    cfg.train.init_checkpoint = ""
    cfg.train.output_dir = f"./output/{name}"
    cfg.train.device = "cuda"  # where there is no GPU, whoever uses it takes the CPU
    cfg.train.trackers = RunSettings().trackers
    return cfg


def _has_files(node: Any) -> bool:
    """Whether a config's data set is named by a path."""
    return node is not None and bool(node.get("json_file") or node.get("path"))


def _config_name(run: Path | None, source: str | os.PathLike[str]) -> str:
    if run is None:
        return "/".join(Path(source).parts[-2:])
    return (read_facts(run, run)["config"] or "").partition(" ")[0]


def _measured(predictor: Predictor, run: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """(data set, COCO metrics) of the evaluations of exactly these weights."""
    loaded = predictor.loaded
    file = os.path.realpath(predictor.cfg.train.init_checkpoint)
    iteration = loaded.get("iteration")
    sources = set()
    if isinstance(iteration, int):
        last = min(iteration + 1, predictor.cfg.train.max_iter)
        sources.add(f"iteration {last} of the run")
    weights = "averaged" if loaded.get("averaged") else "plain"
    found = []
    for path in sorted(run.glob("inference/*/metrics*.json")):
        try:
            document = read_json(path)
        except ValueError:
            continue
        if not isinstance(document, dict) or document.get("weights") != weights:
            continue
        checkpoint, results = document.get("checkpoint"), document.get("results")
        is_it = isinstance(checkpoint, str) and (
            checkpoint in sources or os.path.realpath(checkpoint) == file
        )
        boxes = results.get("bbox") if isinstance(results, dict) else None
        if is_it and isinstance(boxes, dict):
            found.append((str(document.get("dataset")), boxes))
    return found


def _number(value: Any) -> str:
    good = isinstance(value, (int, float)) and math.isfinite(value)
    return f"{value:.2f}" if good else "–"


def _data_name(node: Any) -> str:
    """Of a config's data set, without its path."""
    if node is None:
        return ""
    names = node.get("name") or (node.get("json_file") and Path(str(node.json_file)).stem)
    names = names or (node.get("path") and name_of_path(str(node.path), node.get("split")))
    names = names or plain_values(node.get("names")) or ""
    return ", ".join(names) if isinstance(names, list) else str(names)


def _data_arguments(cfg: DictConfig, *, always: bool, parts: tuple[str, ...]) -> str:
    """The part of a command that names the data; empty for data of the catalogue."""
    given = []
    for part in parts:
        node = OmegaConf.select(cfg, f"dataloader.{part}.dataset")
        if always or _has_files(node):
            begin = f"dataloader.{part}.dataset"
            line = f"{begin}.json_file={_DATA[part]} {begin}.image_root=my/images"
            given.append(f" \\\n    {line}")
    return "".join(given)


def _card(
    predictor: Predictor,
    *,
    title: str,
    address: str,
    config_name: str,
    measured: list[tuple[str, Mapping[str, Any]]],
    began_with: str | None,
    half: bool,
) -> str:
    cfg = predictor.cfg
    kind = type(predictor.model)
    package = kind.__module__.partition(".")[0]
    library = packages_distributions().get(__name__.partition(".")[0], [package])[0]
    head = {
        "library_name": library,
        "pipeline_tag": "object-detection",
        "tags": list(dict.fromkeys(["object-detection", "detectron2", package])),
    }
    count = sum(p.numel() for p in predictor.model.parameters())
    classes = predictor.metadata.get("thing_classes")
    precision = "float16; they are computed with in float32" if half else "float32"
    config = address if address.startswith(HUB) else f"{address}/{RUN_CONFIG}"
    evaluate = f"{MODULE} eval --config-file {config}"
    evaluate += _data_arguments(cfg, always=True, parts=("test",))
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).rstrip(),
        "# license: for you to choose, for example apache-2.0",
        "---",
        "",
        f"# {in_markdown(title)}",
        "",
        f"An object detector: {kind.__name__}"
        + (f", by the config `{config_name}`" if config_name else "")
        + f". It has {count:,} parameters; the weights are {precision}.",
        "",
        "## Classes",
        "",
        f"{len(classes)}: {', '.join(map(in_markdown, classes))}." if classes else "Unnamed.",
        "",
        "## What was measured",
        "",
    ]
    if measured:
        lines += [
            "COCO's metrics, of these weights" + (" before they became float16:" if half else ":"),
            "",
            f"| data set | {' | '.join(METRICS)} |",
            "|---" * (len(METRICS) + 1) + "|",
        ]
        for name, metrics in measured:
            shown = " | ".join(_number(metrics.get(metric)) for metric in METRICS)
            lines.append(f"| {in_markdown(name)} | {shown} |")
        lines.append("")
    else:
        lines += ["No evaluation of these weights is known.", ""]
    lines += [
        "To measure it on data of yours with these classes:" if measured else "To measure it:",
        "",
        f"```bash\n{evaluate}\n```",
        "",
        "## Use",
        "",
        f"It needs the project `{library}`, whose package is `{__name__.partition('.')[0]}`"
        + (" and `huggingface_hub`." if address.startswith(HUB) else "."),
        "",
        f"```bash\n{MODULE} predict --config-file {address} --input pictures --output drawn\n```",
        "",
        "```python",
        "import cv2",
        "from detection_toolkit.engine import Predictor",
        "",
        f'predictor = Predictor.from_run("{address}")',
        'instances = predictor(cv2.imread("picture.jpg"))["instances"]',
        "```",
        "",
        "To fine-tune it on data of yours, where what it knows of classes is kept by their names:",
        "",
        f"```bash\n{MODULE} train --config-file {config} --weights {address}"
        + _data_arguments(cfg, always=True, parts=("train", "test"))
        + " \\\n    train.output_dir=output/mine\n```",
        "",
    ]
    lines += _training(cfg, config, began_with)
    return "\n".join(lines)


def _training(cfg: DictConfig, config: str, began_with: str | None) -> list[str]:
    """How the weights were made, where the run is known."""
    lines = ["## Training", ""]
    if began_with is None:
        return [*lines, "The run that made these weights is not known.", ""]
    data = _data_name(OmegaConf.select(cfg, "dataloader.train.dataset"))
    batch = OmegaConf.select(cfg, "dataloader.train.total_batch_size")
    if batch is not None:
        batch *= cfg.train.get("accumulation_steps", 1)
    first = began_with if "://" in began_with else Path(began_with).name
    return [
        *lines,
        f"- data: {in_markdown(data) or 'not known'}",
        f"- length: {cfg.train.max_iter:,} iterations"
        + (f" of {batch} images" if batch is not None else ""),
        f"- first weights: {in_markdown(first) or 'random ones'}",
        "",
        "The same run again"
        + (", with the data and these first weights (`--weights FILE`):" if first else ":"),
        "",
        f"```bash\n{MODULE} train --config-file {config}"
        + _data_arguments(cfg, always=False, parts=("train", "test"))
        + " \\\n    train.output_dir=output/again\n```",
        "",
    ]
