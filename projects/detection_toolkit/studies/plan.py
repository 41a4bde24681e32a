"""What is compared: a base config, named overrides, seeds; one cell for each pair of the latter."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from detectron2.utils.registry import _convert_target_to_string
from omegaconf import DictConfig, OmegaConf

from ..config import apply_overrides, find_config_file, get_config
from ..errors import UnknownNameError, UserError
from .environment import from_root

__all__ = ["Cell", "Plan", "choose_plan", "load_plan"]

_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
# Of a cell's own, or of the machine; not of what is compared.
_OWN_KEYS = ("train.seed", "train.output_dir")
_KEYS_OF_THE_MACHINE = (*_OWN_KEYS, "train.device")


@dataclass(frozen=True)
class Cell:
    """One training: a variant with a seed."""

    variant: str
    seed: int
    config: str
    overrides: tuple[str, ...]
    """Of the plan, then of the variant."""
    folder: Path
    """Absolute."""
    max_iter: int
    trust_config: bool = False
    """See :class:`Plan`."""

    @property
    def name(self) -> str:
        """As it is shown."""
        return f"{self.variant}, seed {self.seed}"

    def arguments(self, *, folder: Path | None = None, resume: bool = False) -> list[str]:
        """Of Python, in the root of the checkout."""
        return [
            "train_net.py",
            *(["--resume"] if resume else []),
            *(["--trust-config"] if self.trust_config else []),
            *("--config-file", self.config),
            *self.overrides,
            f"train.seed={self.seed}",
            f"train.output_dir={_quoted(from_root(folder or self.folder))}",
        ]

    def test_arguments(self, overrides: Sequence[str]) -> list[str]:
        """Of Python, to evaluate the trained cell once more, with other overrides."""
        return [
            "train_net.py",
            "--eval-only",
            *(["--trust-config"] if self.trust_config else []),
            *("--config-file", self.config),
            *self.overrides,
            *overrides,
            f"train.init_checkpoint={_quoted(from_root(self.folder / 'model_final.pth'))}",
            f"train.output_dir={_quoted(from_root(self.folder / 'test'))}",
        ]

    def command(self, *, threads: int) -> str:
        """What one types to train the cell anew."""
        return f"OMP_NUM_THREADS={threads} python {shlex.join(self.arguments())}"


@dataclass(frozen=True)
class Plan:
    """A base config, named overrides and seeds.

    Raises:
        ValueError: there are no variants or seeds, one stands there twice, or an override sets
            what each cell has for itself.
    """

    config: str
    variants: Mapping[str, tuple[str, ...]]
    """Overrides of each variant; the first one is what the others are compared with."""
    seeds: tuple[int, ...]
    overrides: tuple[str, ...] = field(default=())
    """Of all cells."""
    test: tuple[str, ...] = field(default=())
    """With which a trained cell is evaluated on the test split."""
    name: str = "ablation"
    trust_config: bool = False
    """Whether the config may be a YAML that calls any code, see
    :func:`~detection_toolkit.config.get_config`. No plan says so of itself."""

    def __post_init__(self) -> None:
        if not self.variants:
            raise UserError("the plan has no variants: nothing can be compared")
        if not self.seeds:
            raise UserError("the plan has no seeds: give at least one, better three")
        twice = sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1})
        if twice:
            raise UserError(f"the seed {twice[0]} stands twice in {list(self.seeds)}")
        if min(self.seeds) < 0:
            raise UserError(
                f"the seed {min(self.seeds)} is negative, which means another one in every run"
            )
        for name, overrides in self.variants.items():
            if not _NAME.fullmatch(name):
                raise UserError(
                    f"the variant {name!r} names a folder: use letters, digits and . _ + -"
                )
            own = [o for o in (*self.overrides, *overrides) if o.lstrip("+").startswith(_OWN_KEYS)]
            if own:
                raise UserError(f"{own[0]!r}: each cell has its own {own[0].split('=')[0]}")

    def check(self) -> None:
        """Apply all overrides.

        Raises:
            FileNotFoundError: there is no such config.
            KeyError, ValueError: an override that does not fit; names the variant.
        """
        self.base()
        for name, overrides in self.variants.items():
            try:
                self._config([*overrides, *self.test])
            except (KeyError, ValueError) as error:
                raise type(error)(f"variant {name!r}: {error.args[0]}") from error
            self._max_iter(name)

    def base(self) -> DictConfig:
        """The config that all cells share."""
        return self._config(())

    def base_values(self) -> dict[str, Any]:
        """All values of the base config by key, apart from seed, output folder and device."""
        values: dict[str, Any] = {}
        _flatten(OmegaConf.to_container(self.base(), resolve=False), "", values)
        return {k: v for k, v in values.items() if k not in _KEYS_OF_THE_MACHINE}

    def cells(self, output: Path) -> list[Cell]:
        """All cells, seed by seed, so that what is finished first can be compared already."""
        max_iters = {name: self._max_iter(name) for name in self.variants}
        return [
            Cell(
                variant=name,
                seed=seed,
                config=self.config,
                overrides=(*self.overrides, *overrides),
                folder=output / name / f"seed_{seed}",
                max_iter=max_iters[name],
                trust_config=self.trust_config,
            )
            for seed in self.seeds
            for name, overrides in self.variants.items()
        ]

    def only(self, names: Sequence[str]) -> Plan:
        """The plan with some of its variants.

        Raises:
            KeyError: there is no such variant.
        """
        unknown = [name for name in names if name not in self.variants]
        if unknown:
            raise UnknownNameError(
                f"the plan has no variant {unknown[0]!r}; it has {', '.join(self.variants)}"
            )
        return replace(self, variants={n: o for n, o in self.variants.items() if n in names})

    def cell(self, output: Path, variant: str, seed: str) -> Cell:
        """One of :meth:`cells`.

        Raises:
            UnknownNameError: the plan has none of this variant and seed.
        """
        for cell in self.cells(output):
            if (cell.variant, str(cell.seed)) == (variant, seed):
                return cell
        raise UnknownNameError(f"the plan has no cell {variant!r} with seed {seed}")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "config": self.config,
            "overrides": list(self.overrides),
            "variants": {name: list(overrides) for name, overrides in self.variants.items()},
            "seeds": list(self.seeds),
            "test": list(self.test),
            "base_config": self.base_values(),
        }

    def _max_iter(self, variant: str) -> int:
        value = self._config(self.variants[variant]).train.max_iter
        if not isinstance(value, int) or value < 1:
            raise UserError(
                f"variant {variant!r}: train.max_iter must be a positive whole number, "
                f"not {value!r}"
            )
        return value

    def _config(self, overrides: Sequence[str]) -> DictConfig:
        return apply_overrides(copy.deepcopy(self._loaded), [*self.overrides, *overrides])

    @cached_property
    def _loaded(self) -> DictConfig:
        """Loading runs files, ten times as long as copying; every variant starts from it."""
        return get_config(self.config, trust_config=self.trust_config)


def choose_plan(
    file: str | None,
    *,
    config: str | None,
    variants: Sequence[Sequence[str]],
    seeds: Sequence[int] | None,
    overrides: Sequence[str],
    trust_config: bool = False,
) -> Plan:
    """A plan of a file, or of a config with its variants; checked.

    Args:
        file: see :func:`load_plan`.
        config: in place of a file.
        variants: each a name and its overrides; with a config only.
        seeds: in place of the file's.
        overrides: of all cells, after the file's.
        trust_config: see :class:`Plan`.

    Raises:
        FileNotFoundError, UserError: see :class:`Plan`; or both or neither of file and config.
    """
    if file and (config or variants):
        raise UserError("--plan already has a config and variants: leave the other options out")
    if file:
        plan = load_plan(file)
    elif config:
        names = [name for name, *_ in variants]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"the variant {twice[0]!r} is given twice")
        plan = Plan(
            config=config,
            variants={name: tuple(own) for name, *own in variants},
            seeds=tuple(seeds or ()),
            name=Path(config).stem,
        )
    else:
        raise UserError("give --plan, for example ablations/shapes_hard.yaml, or --config-file")
    changes: dict[str, Any] = {
        "overrides": (*plan.overrides, *overrides),
        "trust_config": trust_config,
    }
    if seeds:
        changes["seeds"] = tuple(seeds)
    plan = replace(plan, **changes)
    plan.check()
    return plan


def load_plan(path: str) -> Plan:
    """Read a plan: YAML with the keys config, variants, seeds and, if wanted, overrides and test.

    Args:
        path: a file, or a name relative to the configs that come with the project.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no plan; the message names the key.
    """
    file = Path(find_config_file(path))
    try:
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except Exception as error:
        raise UserError(f"{file} cannot be read as YAML: {error}") from error
    known = {"config": str, "overrides": list, "variants": dict, "seeds": list, "test": list}
    if not isinstance(content, dict):
        raise UserError(f"{file} is no plan: it needs the keys {', '.join(known)}")
    for key, value in content.items():
        if key not in known:
            raise UserError(f"{file}: unknown key {key!r}; a plan has {', '.join(known)}")
        if not isinstance(value, known[key]):
            raise UserError(f"{file}: {key} must be a {known[key].__name__}, not {value!r}")
    missing = [key for key in ("config", "variants", "seeds") if key not in content]
    if missing:
        raise UserError(f"{file} has no key {missing[0]!r}")
    for name, overrides in content["variants"].items():
        if overrides is not None and not isinstance(overrides, list):
            raise UserError(f"{file}: the overrides of {name!r} must be a list")
    if not all(isinstance(seed, int) for seed in content["seeds"]):
        raise UserError(f"{file}: seeds must be whole numbers, not {content['seeds']}")
    return Plan(
        config=content["config"],
        variants={str(n): tuple(map(str, o or ())) for n, o in content["variants"].items()},
        seeds=tuple(content["seeds"]),
        overrides=tuple(map(str, content.get("overrides", ()))),
        test=tuple(map(str, content.get("test", ()))),
        name=file.stem,
    )


def _flatten(node: Any, prefix: str, values: dict[str, Any]) -> None:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            _flatten(value, f"{prefix}.{key}" if prefix else str(key), values)
    elif callable(node):  # a LazyConfig holds the callables themselves
        values[prefix] = _convert_target_to_string(node)
    else:
        # As JSON gives it back.
        values[prefix] = json.loads(json.dumps(node, default=_text_of_callable))


def _text_of_callable(value: Any) -> str:
    return _convert_target_to_string(value) if callable(value) else str(value)


def _quoted(text: str) -> str:
    """As a value in Hydra's syntax."""
    return text if re.fullmatch(r"[\w./+-]+", text) else f"'{text}'"
