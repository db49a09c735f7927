"""Memory, FLOPs, time and pipeline bubble of a config on a cluster, by arithmetic: no torch."""
