"""What would make a run fail, found before it is queued (files) or as its first step (nodes)."""
