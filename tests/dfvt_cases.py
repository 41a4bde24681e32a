"""What the tests of DFvT share."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).resolve().parent / "data" / "dfvt"

# The network of weights_mini.npz; shifted blocks in three stages, as in DFvT-B.
MINI = dict(embed_dim=32, depths=(2, 2, 2, 1), num_heads=(2, 4, 4, 8), mlp_ratio=2.0)
