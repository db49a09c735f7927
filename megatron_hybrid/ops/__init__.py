"""The mathematics of the layers: no parameters and no parallelism."""
