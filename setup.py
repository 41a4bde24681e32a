raise SystemExit("stageinteractor is built from pyproject.toml: pip install .")
