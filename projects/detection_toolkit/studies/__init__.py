"""Comparing variants of a config over several seeds; the command line is tools/run_ablation.py."""
