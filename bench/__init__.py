"""Benchmarks: the list of cases, the timer, and `python -m fusedseq.bench`, which prints one table."""
