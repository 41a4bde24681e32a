"""From the cells' records to means, spreads and paired differences."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["MEASURES", "bootstrap_interval", "summarise"]

RESAMPLES = 10_000
CONFIDENCE = 0.95

Record = Mapping[str, Any]


def _by_stage(get: Callable[[Mapping[str, Any]], Any]) -> Callable[[Record], Any]:
    return lambda record: None if record["stage_metrics"] is None else get(record["stage_metrics"])


def _score_change(name: str) -> Callable[[Record], Any]:
    return _by_stage(lambda m: m["score_changes"][0][name])


def _label_change(name: str) -> Callable[[Record], Any]:
    # Which label assigners were compared is the config's choice.
    return _by_stage(lambda m: m["label_changes"].get(name, {}).get("share_of_labelled"))


def _uninterrupted(record: Record, key: str) -> Any:
    # What a killed training took is not known.
    return record[key] if record["starts"] == 1 else None


# Name -> value of a record of a finished cell; None where it was not measured.
MEASURES: Mapping[str, Callable[[Record], Any]] = {
    **{
        name: (lambda record, name=name: record["metrics"].get(name))
        for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")
    },
    "test_AP": lambda record: record["test"]["metrics"]["AP"] if "test" in record else None,
    "test_AP50": lambda record: record["test"]["metrics"]["AP50"] if "test" in record else None,
    "AP_after_NMS": _by_stage(lambda m: m["last_stage_after_nms"]["AP"]),
    "duplicates": _by_stage(lambda m: m["stages"][-1]["duplicates"]),
    "faded": _score_change("faded"),
    "grown": _score_change("grown"),
    "label_changes_own_match": _label_change("own_match"),
    "label_changes_cross_stage": _label_change("cross_stage"),
    "seconds_per_step": lambda record: record["seconds_per_step"],
    "cpu_minutes": lambda record: _uninterrupted(record, "cpu_minutes"),
    "minutes": lambda record: _uninterrupted(record, "minutes"),
    "peak_memory_mb": lambda record: record["gpu_memory_mb"] or record["peak_memory_mb"],
}


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Percentile interval of the mean, by resampling the values.

    With few values it is too narrow: it never leaves their range. With one there is none.

    Args:
        values: one a seed.

    Returns:
        the ends of the interval that holds 95 % of the resampled means.
    """
    if len(values) < 2:
        return None
    generator = np.random.default_rng(0)
    drawn = generator.choice(np.asarray(values, dtype=float), (RESAMPLES, len(values)))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(drawn.mean(1), [tail, 100 - tail])
    return float(low), float(high)


def summarise(records: Sequence[Record], variants: Sequence[str]) -> dict[str, Any]:
    """Mean and spread of each measure, AP by stage, and the differences of AP seed by seed.

    Args:
        records: of finished cells.
        variants: their order.
    """
    by_variant = {
        name: {
            r["seed"]: r for r in sorted(records, key=lambda r: r["seed"]) if r["variant"] == name
        }
        for name in variants
    }
    return {
        "variants": {
            name: {
                "seeds": list(cells),
                **{
                    measure: _spread([get(record) for record in cells.values()])
                    for measure, get in MEASURES.items()
                },
                "AP_by_stage": _ap_by_stage(list(cells.values())),
                "AP_by_class": _ap_by_class(list(cells.values())),
            }
            for name, cells in by_variant.items()
        },
        **{
            f"differences_of_{measure}": [
                _difference(by_variant[a], by_variant[b], a, b, get=MEASURES[measure])
                for a, b in itertools.combinations(variants, 2)
            ]
            for measure in ("AP", "test_AP")
        },
    }


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    known = [float(v) for v in values if v is not None]
    return {
        "mean": float(np.mean(known)) if known else None,
        # Of the seeds that could have been drawn, so with n - 1.
        "std": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        "values": list(values),
    }


def _ap_by_stage(records: Sequence[Record]) -> list[dict[str, Any]]:
    stages = [
        [stage["AP"] for stage in r["stage_metrics"]["stages"]]
        for r in records
        if r["stage_metrics"] is not None
    ]
    return [_spread(values) for values in zip(*stages)]


def _ap_by_class(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    # As Detectron2's COCOEvaluator names them.
    keys = dict.fromkeys(k for r in records for k in r["metrics"] if k.startswith("AP-"))
    return {key[len("AP-") :]: _spread([r["metrics"].get(key) for r in records]) for key in keys}


def _difference(
    first: Mapping[int, Record],
    second: Mapping[int, Record],
    a: str,
    b: str,
    *,
    get: Callable[[Record], Any],
) -> dict[str, Any]:
    """Second minus first, over the seeds that both have."""
    pairs = {seed: (get(first[seed]), get(second[seed])) for seed in first if seed in second}
    known = {
        seed: after - before
        for seed, (before, after) in pairs.items()
        if None not in (before, after)
    }
    values = list(known.values())
    interval = bootstrap_interval(values)
    return {
        "from": a,
        "to": b,
        "seeds": list(known),
        "mean": float(np.mean(values)) if values else None,
        "values": values,
        "interval": None if interval is None else list(interval),
    }
