"""One file per method, each with `solve(weight, grid, ...) -> Quantized`."""
