"""Images from networks: generating, writing, editing, searching for time points."""
