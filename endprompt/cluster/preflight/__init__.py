"""Checks before a GPU-hour is spent: `head` on the batch host, `rank` on every rank of the job, `judge` on the batch host again.

They talk through small JSON files in one folder (`records.py`), which must lie on the file system that all nodes share.
"""
