"""The peers' side of the benchmarks: TRL and llama.cpp, run by its own interpreter (`make peers`). Imports nothing of Plaudit but the standard-library `benchmarks.contest`."""
