"""Comparing variants of a config over seeds, and what models and their steps cost.

The command lines are tools/run_ablation.py, tools/benchmark.py and tools/analyze_model.py.
"""
