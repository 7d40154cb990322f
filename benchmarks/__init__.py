"""Benchmarks, installed as `attn.benchmarks`: `python -m attn.benchmarks.overhead` and its neighbours."""
