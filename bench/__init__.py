"""Benchmarks, from which every figure about speed comes: cases, peers, the timer, and the command `fusedseq bench`."""
