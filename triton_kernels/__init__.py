"""Attention kernels in Triton. `passes.py` is the way in; nothing here is imported before the backend runs."""
