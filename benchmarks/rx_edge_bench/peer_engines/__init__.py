"""One module per engine that is timed beside ours: `is_available()` and a class to draft with."""
