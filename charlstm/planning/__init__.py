"""What a run costs and which settings fit a time."""
