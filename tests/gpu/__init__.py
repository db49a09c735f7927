"""What needs a GPU. Written without one, and not run on one yet."""
