"""One module per backend, all with the same functions: see `docs/dev/contract.md`."""
