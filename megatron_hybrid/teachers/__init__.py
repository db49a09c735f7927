"""Teachers: frozen models whose answers an objective learns from, on the ranks of its run."""
