"""Many runs: grids, launching, reading, tables."""
