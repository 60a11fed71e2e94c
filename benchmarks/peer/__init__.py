"""The peers' side of the benchmarks: TRL, run by its own interpreter (`make peers`). Imports nothing of Plaudit but the standard-library `benchmarks.contest`."""
