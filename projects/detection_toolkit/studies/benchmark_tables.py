"""The figures of a benchmark as tables in Markdown."""

from __future__ import annotations

from typing import Any

__all__ = ["print_cells", "print_curves", "print_parts"]


def print_cells(results: dict[str, Any], published: float | None) -> None:
    """Times and memory of both forms."""
    inference = results["cells"]["decoder, inference"]
    resnet = inference["ResNet-50"]
    print("\n| | plain (s) | ours (s) | ratio |\n|---|---|---|---|")
    for name, cell in results["cells"].items():
        for form in ("ours", "compiled"):
            if form in cell:
                ratio = cell["plain"] / cell[form]
                label = name if form == "ours" else f"{name}, {form}"
                print(f"| {label} | {cell['plain']:.4f} | {cell[form]:.4f} | {ratio:.2f}x |")
    memory = results["memory"]
    kinds = (("above_interpreter", "decoder + criterion"), ("peak", "whole process"))
    for kind, label in kinds if memory else ():
        plain = memory["plain"][kind]
        for form in ("ours", "checkpointed"):
            value = memory[form][kind]
            print(
                f"| peak memory of a training step, {label}{', checkpointed' * (form != 'ours')} "
                f"| {plain / 1e9:.2f} GB | {value / 1e9:.2f} GB | {value / plain:.2f} of it |"
            )
    print(
        f"\nResNet-50 forward: {resnet:.3f} s. Decoder inference, plain, in these units: "
        f"{inference['plain'] / resnet:.2f}",
        end="",
    )
    if published:
        print(f" (the official one was measured at {published:.2f})", end="")
    print(f"; ours: {inference['ours'] / resnet:.2f}.")


def print_parts(results: dict[str, Any]) -> None:
    """What each part takes, beside its bound."""
    print("\n| part | ms | GFLOP | MB | bound (ms) | reached |\n|---|---|---|---|---|---|")
    for part in results["parts"]:
        bound = part["bound"]
        reached = f"{bound / part['seconds']:.0%}" if bound else "-"
        bound_text = f"{1e3 * bound:.1f}" if bound else "-"
        print(
            f"| {part['name']} | {1e3 * part['seconds']:.1f} | {part['operations'] / 1e9:.1f} | "
            f"{part['bytes'] / 1e6:.0f} | {bound_text} | {reached} |"
        )
    whole = results["detector"]
    print(f"\nWhole detector, inference: {whole['images_per_second']:.2f} images/s.")


def print_curves(results: dict[str, Any]) -> None:
    """How cost grows with queries and stages."""
    for name, rows in results["curves"].items():
        print(f"\n| {name} | s | time, relative | operations, relative |\n|---|---|---|---|")
        for row in rows:
            print(
                f"| {row[name]} | {row['seconds']:.3f} | "
                f"{row['seconds'] / rows[0]['seconds']:.2f} | "
                f"{row['operations'] / rows[0]['operations']:.2f} |"
            )
